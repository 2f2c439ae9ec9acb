"""Ragged attention: tokens of many rows of many sessions, one behind the other, through blocks that think that it is one row.

All that a block does to a token is done to each alone, but for attention. So a batch of rows of any lengths is laid out as one row,
without padding, and with each token's own position; and transformers' AttentionInterface hands the attention to `attend`, which
writes keys and values into the rows' pages and lets each token see those of its own row. Families whose blocks do not go through
that interface, or add something to it that is not known here, are found out by node/backend/ragged_span.py and serve one session at a time.

N tokens in all, Q query heads, K key heads, D size of a head, L tokens of a row so far, T new ones.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from node.backend.page_store import PageStore, RowPart

NAME = "shardswarm_ragged"

# What attention modules hand over besides queries, keys and values, and what it must be to make no difference.
_HARMLESS = {"dropout": (0.0,), "position_bias": (None,), "output_attentions": (None, False), "is_causal": (None, True)}
_UNUSED = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_hidden_states", "position_embeddings", "layer_idx"}
)


class NotRagged(Exception):
    """This family's attention needs something that ragged batches do not have."""


class RaggedStep:
    """Where the tokens of one batch are written, and what each row sees. Active while its batch is computed."""

    def __init__(self, store: PageStore, parts: Sequence[RowPart]) -> None:
        self.store, self.parts = store, parts
        slots = [store.slots(part.pages, part.start, part.length) for part in parts]
        self.slots = slots[0] if len(slots) == 1 else torch.cat(slots)
        self.block = -1
        """The block that attends now."""
        self._seen: dict[int, list[Tensor | slice]] = {}

    def positions(self) -> Tensor:
        """int64 [1, N]."""
        return torch.cat([torch.arange(part.start, part.length) for part in self.parts])[None]

    def seen(self, window: int) -> list[Tensor | slice]:
        """For each row the slots of all that its new tokens see together; window: 0 for all."""
        if window not in self._seen:
            self._seen[window] = [self._slots_seen(part, window) for part in self.parts]
        return self._seen[window]

    def _slots_seen(self, part: RowPart, window: int) -> Tensor | slice:
        first = max(0, part.start + 1 - window) if window else 0
        run = self.store.run(part.pages, first, part.length)
        return self.store.slots(part.pages, first, part.length) if run is None else run


_active = threading.local()


@contextlib.contextmanager
def active(step: RaggedStep, *, is_trial: bool = False) -> Iterator[None]:
    """While this lasts, attention in this thread is of this batch. is_trial: look closely at the masks that the model wants."""
    _active.step, _active.is_trial = step, is_trial
    try:
        yield
    finally:
        _active.step = None


def _attend(
    query_1QND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    block: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_Q: Tensor | None,
) -> Tensor:
    """Write the new keys and values, and return what the new tokens attend to, [1, N, Q, size of a value]."""
    step: RaggedStep = _active.step
    new_keys, new_values = key_1KND[0].transpose(0, 1), value_1KND[0].transpose(0, 1)
    keys, values = step.store.block(block, new_keys, new_values)
    keys.index_copy_(0, step.slots, new_keys)
    values.index_copy_(0, step.slots, new_values)
    outputs, offset = [], 0
    for part, slots in zip(step.parts, step.seen(window), strict=True):
        query = query_1QND[:, :, offset : offset + part.num_tokens]
        offset += part.num_tokens
        row_keys, row_values = keys[slots].transpose(0, 1)[None], values[slots].transpose(0, 1)[None]
        if softcap or sinks_Q is not None:
            outputs.append(_attend_plainly(query, row_keys, row_values, scale, window, softcap, sinks_Q))
        elif part.num_tokens == 1:
            # The heads that share keys as so many tokens: SDPA's own grouping takes 4 to 18 times as long here in bf16.
            grouped = query.reshape(1, row_keys.shape[1], -1, query.shape[3])
            output = F.scaled_dot_product_attention(grouped, row_keys, row_values, scale=scale)
            outputs.append(output.reshape(1, 1, query.shape[1], -1))
        else:
            outputs.append(_attend_many(query, row_keys, row_values, scale, window))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_many(query_1QTD: Tensor, key_1KLD: Tensor, value_1KLD: Tensor, scale: float, window: int) -> Tensor:
    num_new, length = query_1QTD.shape[2], key_1KLD.shape[2]
    groups = query_1QTD.shape[1] // key_1KLD.shape[1]
    options: dict[str, Any] = {"is_causal": True}
    if length != num_new or (window and window < num_new):
        options = {"attn_mask": _visible(num_new, length, window, query_1QTD.device)}
    if groups > 1:
        key_1KLD, value_1KLD = key_1KLD.repeat_interleave(groups, 1), value_1KLD.repeat_interleave(groups, 1)
    output = F.scaled_dot_product_attention(query_1QTD, key_1KLD, value_1KLD, scale=scale, **options)
    return output.transpose(1, 2)


def _attend_plainly(
    query_1QTD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks_Q: Tensor | None,
) -> Tensor:
    """With capped scores (Gemma 2, arXiv:2408.00118) or with sinks, to which attention goes that nobody gets (gpt-oss)."""
    num_new, length = query_1QTD.shape[2], key_1KLD.shape[2]
    groups = query_1QTD.shape[1] // key_1KLD.shape[1]
    keys, values = key_1KLD.repeat_interleave(groups, 1), value_1KLD.repeat_interleave(groups, 1)
    scores = torch.matmul(query_1QTD, keys.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~_visible(num_new, length, window, scores.device), float("-inf"))
    if sinks_Q is not None:
        sinks = sinks_Q.float().reshape(1, -1, 1, 1).expand(1, -1, num_new, 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights.to(values.dtype), values).transpose(1, 2)


def _visible(num_new: int, length: int, window: int, device: torch.device) -> Tensor:
    """bool [T, L]: which of the last L tokens each of the T new ones, which are the last of these, sees."""
    new = torch.arange(length - num_new, length, device=device)[:, None]
    old = torch.arange(length, device=device)[None]
    visible = old <= new
    return visible & (old > new - window) if window else visible


# As an operator, so that a traced step calls it like any other.
_library = torch.library.Library("shardswarm", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attend(Tensor query, Tensor key, Tensor value, int block, float scale, int window, float softcap, Tensor? sinks) -> Tensor"
)
_library.impl("attend", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


class NotingCache(DynamicCache):  # type: ignore[misc]
    """What the base model has for a cache: keeps nothing, but takes note of which block is about to attend."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        _active.step.block = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' AttentionInterface. Raises NotRagged."""
    for name, given in options.items():
        if name in _HARMLESS and any(given is harmless or given == harmless for harmless in _HARMLESS[name]):
            continue
        if given is not None and name not in _UNUSED:
            raise NotRagged(f"its attention takes {name}")
    if attention_mask is not None and attention_mask.shape != _MARK_SHAPE:
        raise NotRagged("it makes its own masks")
    window = int(attention_mask) if attention_mask is not None else int(sliding_window or 0)
    if window == _UNKNOWN:
        raise NotRagged("its tokens do not just see those before them")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    output = torch.ops.shardswarm.attend(
        query, key, value, _active.step.block, scale, window, float(softcap or 0), s_aux
    )
    return output, None


_MARK_SHAPE = (1, 1, 1, 1)
_UNKNOWN = -1


def _mask(*_: Any, mask_function: Callable[..., Any], **options: Any) -> Tensor:
    """transformers' AttentionMaskInterface: in the place of a mask, a mark that says how far back a token sees."""
    window = int(options.get("local_size") or 0)
    if _active.is_trial and not _sees_all_before(mask_function, window):
        window = _UNKNOWN  # which matters only if some block uses it
    return torch.full(_MARK_SHAPE, window, dtype=torch.long)


def _sees_all_before(mask_function: Callable[..., Any], window: int) -> bool:
    """Whether a token sees itself and all before it, or the last `window` of these, and nothing else."""

    def sees(new: int, old: int) -> bool:
        zero = torch.tensor(0)
        return bool(mask_function(zero, zero, torch.tensor(new), torch.tensor(old)))

    for new in (2**30, 2**30 + 1, 2**30 + window // 2 + 1):  # a chunk of any size would end before one of them
        oldest = new - window + 1 if window else 0
        if not sees(new, new) or sees(new, new + 1) or not sees(new, oldest) or (window and sees(new, oldest - 1)):
            return False
    return True


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
