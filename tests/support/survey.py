"""Survey: which of the model types that transformers has a causal language model for can be served, found out by trying each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from swarm.checkpoint import INDEX_FILE, open_checkpoint
from swarm.decoder import refuse_unfit
from swarm.errors import UserError
from swarm.span import Span
from tests.support.families import (
    PADDINGS,
    Cut,
    Whole,
    check_forward_and_decode,
    check_gradients,
    check_padding,
    check_rewind_and_reorder,
    check_swapped_blocks_are_noticed,
    check_two_sessions,
)
from tests.support.tiny_configs import NUM_BLOCKS, tiny_config

ALL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
MAX_PARAMETERS = 1_000_000
SINGLE_BLOCKS = {Span(block, block + 1): [Span(block, block + 1)] for block in range(NUM_BLOCKS)}
PARTS_OF_SHARDS = {Span(0, 1): [Span(0, 1)], Span(1, 4): [Span(1, 3), Span(3, 4)]}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model type. reason: as the user reads it; empty if it works."""

    verdict: str  # "works", "refused" or "not built"
    reason: str = ""


def survey(model_type: str, folder: Path) -> Outcome:
    """Try one type on a tiny model of it, which is left in folder/MODEL. AssertionError if something other than the model is computed."""
    path = folder / "MODEL"
    try:
        config = _config(model_type)
    except Exception as error:
        return Outcome("not built", _one_line(error))
    config.save_pretrained(path)
    try:
        with open_checkpoint(str(path), progress=False) as checkpoint:
            refuse_unfit(checkpoint.config, checkpoint.name)
    except UserError as error:
        return _refused(error, path)
    try:
        save(config, path)
        whole = Whole(path)
        whole.logits(whole.ids)
    except Exception as error:
        return Outcome("not built", _one_line(error))
    refusals = []
    cuts = []
    for shards in (SINGLE_BLOCKS, PARTS_OF_SHARDS):
        try:
            cuts.append(Cut(path, shards))
        except UserError as error:
            refusals.append(_refused(error, path))
    if not refusals: Cut(path, {Span(0, 4): [Span(0, 4)]}, torch.bfloat16)
    for cut in cuts:
        check_all(whole, cut)
    return refusals[0] if refusals else Outcome("works")

def check_all(whole, cut):
    check_forward_and_decode(whole, cut)
    check_padding(whole, cut)
    check_rewind_and_reorder(whole, cut)
    check_two_sessions(whole, cut)
    for padding in PADDINGS:
        check_gradients(whole, [cut], padding)
    check_swapped_blocks_are_noticed(whole, cut)

def save(config: Any, path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"its tiny model has {size} parameters")
        model = AutoModelForCausalLM.from_config(config)
        stored = model.state_dict()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name in stored and tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor) * 0.05)
    model.eval().save_pretrained(path, max_shard_size="60KB")
    assert (path / INDEX_FILE).exists()

def _config(model_type: str) -> Any:
    try:
        return tiny_config(model_type)
    except Exception:
        return CONFIG_MAPPING[model_type]()

def _refused(error: Exception, path: Path) -> Outcome:
    return Outcome("refused", " ".join(str(error).split()).replace(str(path), "MODEL"))

def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:300]
