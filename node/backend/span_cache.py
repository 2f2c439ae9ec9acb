"""SpanCache: keys and values of a session on one hop, for a model that serves one session at a time.

B batch rows, T new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from swarm.decoder import positions_of
from swarm.errors import BadRequest
from swarm.span import Span


class SpanCache:
    """Keys and values of a session on one hop: num_tokens for each row, and which of them are real."""

    def __init__(self, hop: Span) -> None:
        self.hop = hop
        self.num_tokens = 0
        self.layers = _OffsetCache(hop.start)
        self._mask: Tensor | None = None  # bool [B, num_tokens]; None while every token is real

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        tensors = [
            tensor for layer in self.layers.layers if layer.is_initialized for tensor in (layer.keys, layer.values)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def is_complete(self) -> bool:
        """Whether every block of the hop has keys and values for every token."""
        return [layer.get_seq_length() for layer in self.layers.layers] == [self.num_tokens] * len(self.hop)

    def rewind(self, position: int) -> None:
        """Forget all tokens from position on."""
        if not 0 <= position <= self.num_tokens:
            raise BadRequest(f"cannot rewind to {position}: the cache holds {self.num_tokens} tokens")
        if position == 0:
            self.layers = _OffsetCache(self.hop.start)
        elif position < self.num_tokens:
            self.layers.crop(position - self.num_tokens)
        self._mask = None if self._mask is None or position == 0 else self._mask[:, :position]
        self.num_tokens = position

    def reorder(self, rows: Tensor) -> None:
        """Row r becomes what row rows[r] was. rows: int64 [B]."""
        if self.num_tokens == 0:
            return
        with torch.inference_mode():
            self.layers.batch_select_indices(rows)
            self._mask = None if self._mask is None else self._mask[rows]

    def extend_mask(self, new: Tensor | None, batch: int, num_new: int) -> tuple[Tensor | None, Tensor]:
        """Take note of which new tokens are real. (attention mask [B, past + T] or None, positions [B or 1, T]) for them."""
        past = self.num_tokens
        if new is None and self._mask is None:
            return None, torch.arange(past, past + num_new)[None]
        old = torch.ones(batch, past, dtype=torch.bool) if self._mask is None else self._mask[:, :past]
        fresh = torch.ones(batch, num_new, dtype=torch.bool) if new is None else new
        self._mask = torch.cat([old, fresh], dim=1)
        attention_mask = self._mask.long()
        return attention_mask, positions_of(attention_mask, past)


class _OffsetCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache for blocks that know themselves by their index in the model, while it holds only those of the hop."""

    def __init__(self, first_block: int) -> None:
        super().__init__()  # without the config: full-length layers, which can be rewound even where attention slides
        self.first_block = first_block

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states, layer_idx - self.first_block, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Base models ask for "the" length as that of layer 0, blocks for their own.
        return int(super().get_seq_length(max(layer_idx - self.first_block, 0)))
