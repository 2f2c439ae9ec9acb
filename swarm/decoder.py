"""Decoder: how any transformers causal LM is cut into blocks and ends, without code for any family.

The config is shrunk to the blocks that are wanted, the checkpoint's keys are renumbered, and the library's own from_pretrained builds the
model; so fusing of experts, tying and dtypes stay the library's business. Used by the node (blocks) and the client (ends).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swarm.errors import UserError
from swarm.span import Span
from swarm.terminal import quiet_libraries

_NUMBERED = re.compile(r"(^|.*?\.)(\d+)(\..*)")
_LAYER_COUNT_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Options by which a block computes something else depending on its index, which a shrunk model would count from 0.
_INDEX_DEPENDENT = ("scale_attn_by_inverse_layer_idx",)
# Layers whose state cannot be rewound: a session could not drop tokens, nor be rebuilt up to a position.
_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv", "ssm", "rwkv", "xlstm")


class BlockSource(Protocol):
    """What is needed of a checkpoint (swarm.checkpoint.Checkpoint has it)."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Any: ...
    @property
    def num_blocks(self) -> int: ...
    def load_blocks(self, span: Span) -> dict[str, Tensor]: ...
    def load_ends(self) -> dict[str, Tensor]: ...


def refuse_unfit(config: Any, name: str) -> None:
    """Raise UserError, with the reason, for models whose blocks cannot be served one span here and one there."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} ({config.model_type}) is an encoder-decoder; only decoder models can be served")
    for option in _INDEX_DEPENDENT:
        if getattr(config, option, False):
            raise UserError(f"{name} uses {option}: its blocks depend on their index, so they cannot be cut into spans")
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or []} | {str(config.model_type)}
    recurrent = sorted(kind for kind in kinds if any(word in kind for word in _RECURRENT))
    if recurrent:
        raise UserError(f"{name} has layers with recurrent state ({', '.join(recurrent)}), which cannot be rewound or replayed in part")


def find_blocks(base: nn.Module, num_blocks: int) -> tuple[str, nn.ModuleList]:
    """Dotted name and list of the blocks of a base model. UserError if it has none."""
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks and name.count(".") <= 1:
            return name, module
    raise UserError(f"{type(base).__name__} has no list of {num_blocks} blocks; this model cannot be served")


def shrink_config(config: Any, span: Span) -> Any:
    """A copy of the config for a model of only these blocks: every list with one entry per block is sliced."""
    shrunk = copy.deepcopy(config)
    count = config.num_hidden_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count:
            setattr(shrunk, key, value[span.start : span.end])
        elif key in _LAYER_COUNT_NAMES:
            setattr(shrunk, key, len(span))
    shrunk.num_hidden_layers = len(span)
    return shrunk


def renumber(tensors: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """The tensors of a span's blocks under the names they have in a model that begins with block `first`."""
    renamed = {}
    for key, tensor in tensors.items():
        match = _NUMBERED.fullmatch(key)
        if match is None:
            raise UserError(f"tensor {key!r} belongs to no block; the checkpoint does not look like a decoder's")
        renamed[f"{match[1]}{int(match[2]) - first}{match[3]}"] = tensor
    return renamed


def build_model(config: Any, state_dict: dict[str, Tensor], *, dtype: torch.dtype, needed: Iterable[str], name: str) -> Any:
    """The causal LM class of this config, in eval mode, with the weights of state_dict.

    needed: parts of parameter names that must all have been in state_dict. Raises UserError naming up to three that are missing or unknown.
    """
    from transformers import AutoModelForCausalLM

    try:
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"transformers has no causal language model for {config.model_type} ({name})") from None
    try:
        with quiet_libraries():
            model, report = kind.from_pretrained(None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"the weights of {name} do not fit its config: {str(error).splitlines()[0][:200]}") from error
    wanted = tuple(needed)
    missing = sorted(key for key in report["missing_keys"] if any(part in key for part in wanted))
    mismatched = [str(key) for key in report["mismatched_keys"]]
    unexpected = sorted(report["unexpected_keys"])
    if missing or unexpected or mismatched:
        raise UserError(f"the weights of {name} do not fit its config: missing {missing[:3]}, unexpected {unexpected[:3]}, of other shape {mismatched[:3]}")
    return model.eval()
