"""Decoder: how any transformers causal LM is cut into blocks and ends, without code for any family.

The model's own class is built whole, but without memory (torch's meta device), and cut at the end of its constructor: blocks keep
the index that they have in the whole model, and so whatever depends on it, while weights are only made for what is left. The library's
own from_pretrained then loads the checkpoint's tensors, renumbered; fusing of experts, tying and dtypes stay its business. Used by the
node (blocks) and the client (ends).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swarm.errors import UserError
from swarm.span import Span
from swarm.terminal import quiet_libraries

# What torch and transformers raise over a config or weights that they cannot use.
LIBRARY_ERRORS = (RuntimeError, ValueError, KeyError, AttributeError, TypeError, IndexError, AssertionError)

_NUMBERED = re.compile(r"(^|.*?\.)(\d+)(\..*)")
# Masks and rotations that older versions of transformers saved with the weights; they are computed now.
_OLD_BUFFER = re.compile(r".*(attn|attention)\.(bias|masked_bias)|.*\.inv_freq")
_LAYER_COUNT_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Layers whose state cannot be rewound: a session could not drop tokens, nor be rebuilt up to a position.
_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv", "ssm", "rwkv", "xlstm", "hybrid")
# Options by which a block reads what was computed before the block before it.
_ACROSS_BLOCKS = {
    "num_kv_shared_layers": "some of its blocks use the keys and values of others",
    "hidden_size_per_layer_input": "each of its blocks reads the token ids",
}


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


def positions_of(mask: Tensor, past: int) -> Tensor:
    """Positions [batch, tokens - past] of the tokens from `past` on: the real tokens before each, as transformers' generate counts.

    mask: [batch, tokens] over all tokens, false for padding, whose position is that of the token before it, or 0.
    """
    return (mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]


def text_config(config: Any, name: str) -> Any:
    """The config of the language model: the config itself, but for models made of several. UserError if it has several of those, too."""
    try:
        return config.get_text_config()
    except ValueError:
        raise _several_models(config, name) from None


def refuse_unfit(config: Any, name: str) -> None:
    """Raise UserError, with the reason, for models whose blocks cannot be served one span here and one there."""
    kind = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} ({kind}) is an encoder-decoder; only decoder models can be served")
    if text_config(config, name) is not config:
        raise _several_models(config, name)
    recurrent = _recurrent_kinds(config)
    if recurrent:
        raise UserError(
            f"{name} has layers with recurrent state ({', '.join(recurrent)}), which cannot be rewound or replayed in part"
        )
    odd = _odd_caches(config)
    if odd:
        raise UserError(
            f"{name} ({kind}) has blocks that keep more, or other things, than keys and values of each token ({', '.join(odd)}); "
            "choose another model"
        )
    if any(table.get("rope_type") == "dynamic" for table in _rotary_tables(config)):
        raise UserError(
            f'{name} ({kind}) has rotary tables of type "dynamic", which grow with the longest text so far: '
            "sessions on one node would change each other's results; choose another model"
        )
    for option, reason in _ACROSS_BLOCKS.items():
        if getattr(config, option, None):
            raise UserError(f"{name} ({kind}) cannot be cut into spans: {reason} ({option})")


def longest_text(config: Any) -> int | None:
    """Tokens up to which a text's rotary tables stay as they are, None if for ever.

    Those of type "longrope" are others for all of its positions once it is longer, and keys that a session keeps would be wrong.
    """
    limits = [
        table["original_max_position_embeddings"]
        for table in _rotary_tables(config)
        if table.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def find_blocks(base: nn.Module, num_blocks: int) -> tuple[str, nn.ModuleList]:
    """Dotted name and list of the blocks of a base model. UserError if it has none."""
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks and name.count(".") <= 1:
            return name, module
    raise UserError(f"{type(base).__name__} has no list of {num_blocks} blocks; this model cannot be served")


def shrink_config(config: Any, blocks: Sequence[int]) -> Any:
    """A copy of the config for a model of only these blocks, in this order: of every list with one entry per block, theirs are left."""
    shrunk = copy.deepcopy(config)
    count = config.num_hidden_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count:
            setattr(shrunk, key, [value[block] for block in blocks])
        elif key in _LAYER_COUNT_NAMES:
            setattr(shrunk, key, len(blocks))
    shrunk.num_hidden_layers = len(blocks)
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


def replace_blocks(base: Any, num_blocks: int, places: Sequence[int], blocks: Iterable[nn.Module]) -> list[Any]:
    """Put other blocks, which stand for those that are at `places` now, in the place of all blocks, with a config for them.

    Returns the modules from base down to the one that has the list of blocks.
    """
    *path, attribute = find_blocks(base, num_blocks)[0].split(".")
    parents = [base]
    for step in path:
        parents.append(getattr(parents[-1], step))
    setattr(parents[-1], attribute, nn.ModuleList(blocks))
    shrunk = shrink_config(base.config, places)
    for parent in parents:
        if hasattr(parent, "config"):
            parent.config = shrunk
    return parents


def build_model(
    config: Any, state_dict: dict[str, Tensor], *, dtype: torch.dtype, cut: Callable[[Any], None], name: str
) -> Any:
    """The causal LM class of this config, cut, in eval mode, with the weights of state_dict.

    cut: takes away from the built model (still without memory) what is not wanted.
    Raises UserError naming up to three tensors of what was left that state_dict lacks, or that it has too many.
    """
    whole = _causal_lm_class(config, name)

    class Cut(whole):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            cut(self)

    # transformers finds conversions of old checkpoints by the names of classes.
    Cut.__name__, Cut.__qualname__, Cut.__module__ = whole.__name__, whole.__qualname__, whole.__module__
    try:
        with quiet_libraries():
            model, report = Cut.from_pretrained(
                None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
            )
    except LIBRARY_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the weights of {name} do not fit its config: {reason}") from error
    model.__class__ = whole
    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not _OLD_BUFFER.fullmatch(key))
    mismatched = [str(key) for key in report["mismatched_keys"]]
    if missing or unexpected or mismatched:
        raise UserError(
            f"the weights of {name} do not fit its config: missing {missing[:3]}, unexpected {unexpected[:3]}, of other shape {mismatched[:3]}"
        )
    return model.eval()


def _recurrent_kinds(config: Any) -> list[str]:
    """What says that some blocks keep a recurrent state: the kinds of layers or, where there are none, other parts of the config."""
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds:
        kinds = {config.model_type, *(key for key in config.to_dict() if key.startswith(("mamba_", "ssm_")))}
    return sorted(str(kind) for kind in kinds if any(word in str(kind) for word in _RECURRENT))[:3]


def _odd_caches(config: Any) -> list[str]:
    """The kinds of blocks for which transformers itself makes other caches than lists of keys and values."""
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, DynamicSlidingWindowLayer

    kinds = set(getattr(config, "layer_types", None) or [])
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return sorted(str(kind) for kind in kinds if DYNAMIC_LAYER_TYPE_MAPPING.get(kind) not in plain)


def _several_models(config: Any, name: str) -> UserError:
    return UserError(
        f"{name} ({config.model_type}) is made of several models; choose a checkpoint of its language model alone"
    )


def _rotary_tables(config: Any) -> list[Mapping[str, Any]]:
    """Parameters of the model's rotary tables: one, or one for each kind of block."""
    tables = getattr(config, "rope_parameters", None) or {}
    return [table for table in (tables, *tables.values()) if isinstance(table, Mapping)]


def _causal_lm_class(config: Any, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"transformers has no causal language model for {config.model_type} ({name})") from None
