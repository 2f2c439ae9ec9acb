"""Survey: which of the model types that transformers has a causal language model for can be served, found out by trying each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from node.backend.span_model import SpanModel
from swarm.checkpoint import INDEX_FILE, open_checkpoint
from swarm.decoder import LIBRARY_ERRORS, refuse_unfit
from swarm.errors import UserError
from swarm.span import Span
from tests.support.families import Cut, Whole, check_basics, check_everything, computes_together
from tests.support.models import NUM_BLOCKS, save_random
from tests.support.tiny_configs import default_config, tiny_config

ALL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
WORKS, REFUSED, NOT_BUILT = "works", "refused", "not built"
_WHOLE = Span(0, NUM_BLOCKS)
_ONE_BY_ONE = {Span(block, block + 1): [Span(block, block + 1)] for block in _WHOLE}
_SHARDS = {Span(0, 1): [Span(0, 1)], Span(1, NUM_BLOCKS): [Span(1, 3), Span(3, NUM_BLOCKS)]}
_MAX_PARAMETERS = 1_000_000
# What transformers raises over a config that makes no sense, or a package that is not installed.
BUILDING_ERRORS = (*LIBRARY_ERRORS, StrictDataclassError, ImportError, OSError)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model type."""

    verdict: str
    """WORKS: all that it computes, cut in several ways, is what it computes whole; REFUSED or NOT_BUILT."""
    reason: str = ""
    """Why it was refused, as the user reads it of a checkpoint called MODEL, or could not be built."""
    together: bool = False
    """Whether the sessions of many users are computed in one batch, and not one at a time."""
    kinds: tuple[str, ...] = ()
    """The kinds of blocks that were tried, where the type knows several."""
    is_option: bool = False
    """Whether it works only with `is_decoder` set, without which the type is no decoder."""


def survey(model_type: str, folder: Path, **options: Any) -> Outcome:
    """Try a type on a tiny model of it, saved in several files in an empty folder, as a checkpoint is.

    options: fields of its config that are to have another value. Raises AssertionError if anything is computed that is not the model.
    """
    outcome = _try_out(model_type, folder / "MODEL", options)
    if outcome.verdict == WORKS or "is_decoder" in options:
        return outcome
    if getattr(default_config(model_type), "is_decoder", None) is not False:
        return outcome
    as_decoder = _try_out(model_type, folder / "decoder" / "MODEL", {**options, "is_decoder": True})
    return replace(as_decoder, is_option=as_decoder.verdict == WORKS)


def _try_out(model_type: str, path: Path, options: dict[str, Any]) -> Outcome:
    try:
        config = _config_of(model_type, options)
    except BUILDING_ERRORS as error:
        return Outcome(NOT_BUILT, _in_one_line(error))
    config.save_pretrained(path)
    try:
        checkpoint = open_checkpoint(str(path), progress=False)
        refuse_unfit(checkpoint.config, checkpoint.name)
    except UserError as error:
        return Outcome(REFUSED, _in_one_line(error))
    try:
        _save(config, path)
        whole = Whole(path)
        whole.logits(whole.ids)
    except BUILDING_ERRORS as error:
        return Outcome(NOT_BUILT, _in_one_line(error))
    cuts, refusals = {}, []
    for name, shards in {"shards": _SHARDS, "one by one": _ONE_BY_ONE}.items():
        try:
            cuts[name] = Cut(path, shards)
        except UserError as error:
            refusals.append(_in_one_line(error))
    # Even if the other way is refused: whoever loads must be right.
    together = False
    if "shards" in cuts:
        check_everything(whole, cuts["shards"])
        together = computes_together(whole, cuts["shards"])
    if "one by one" in cuts:
        check_basics(whole, cuts["one by one"])
    if refusals:
        return Outcome(REFUSED, refusals[0])
    SpanModel(checkpoint, _WHOLE, dtype=torch.bfloat16)  # is not refused, either
    return Outcome(WORKS, together=together, kinds=tuple(dict.fromkeys(getattr(config, "layer_types", None) or ())))


def _config_of(model_type: str, options: dict[str, Any]) -> Any:
    """A tiny config, or the default one: that is enough where a look at the config tells that the type cannot be served."""
    try:
        return tiny_config(model_type, **options)
    except BUILDING_ERRORS:
        return default_config(model_type)


def _save(config: Any, path: Path) -> None:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"no rule of tests/support/tiny_configs.py makes it small: {size} parameters")
    save_random(config, path, max_shard_size="60KB")
    assert (path / INDEX_FILE).exists(), "to be read from several files"


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:200]}"
