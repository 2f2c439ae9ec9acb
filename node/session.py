"""Session: one generation on one hop, and what a step does to it. Pure but for the caches that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from node.backend.span_cache import SpanCache
from node.session_pages import Growth, SessionPages
from swarm.span import Span
from swarm.tensors import Buffer


@dataclass(slots=True, eq=False)
class Session:
    """`batch` rows of up to max_length tokens."""

    session_id: bytes
    peer_id: str
    hop: Span
    batch: int
    max_length: int
    last_used: float
    pages: SessionPages
    cache: SpanCache | None = None
    """Keys and values where steps are computed one at a time; `pages` then only counts what it takes."""
    num_tokens: int = 0
    """Of each row, padding included."""
    is_busy: bool = False
    """A step is under way."""
    replied_at: float | None = None
    return_s: float | None = None
    """From a reply to the next step, smoothed."""
    ended_because: str = ""
    must_make_room: bool = False
    """An older session needs its pages: it ends with the step under way."""
    made_room: bool = False
    """It was ended for an older session's sake."""
    answered: tuple[int, int] | None = None
    """(session version, position) of the last step, and its kept reply."""
    kept_reply: list[Buffer] = field(default_factory=list)
    _mask: Tensor | None = None
    """bool [batch, num_tokens], False for padding; None while every token is real."""

    def note_arrival(self, now: float) -> None:
        """A step came."""
        self.last_used = now
        if self.replied_at is not None:
            gap_s = now - self.replied_at
            self.return_s = gap_s if self.return_s is None else 0.7 * self.return_s + 0.3 * gap_s

    def expected_at(self) -> float | None:
        """When the next step is due, by the pace so far; None while nothing is known of it, or one is under way."""
        if self.is_busy or self.replied_at is None or self.return_s is None:
            return None
        return self.replied_at + self.return_s

    def lengths_at(self, position: int) -> list[int]:
        """Tokens of each row before a position that take room: the real ones where steps are computed together, else all."""
        if self.cache is not None or self._mask is None:
            return [position] * self.batch
        return [int(count) for count in self._mask[:, :position].sum(dim=1)]

    def num_new(self, num_tokens: int, mask: Tensor | None) -> list[int]:
        """Tokens of each row that take room, of so many new ones."""
        if self.cache is not None or mask is None:
            return [num_tokens] * self.batch
        return [int(count) for count in mask.sum(dim=1)]

    def num_missing(self, position: int, rows: Sequence[int], num_new: Sequence[int]) -> int:
        """Pages that must be free for a step: a rewind, a reorder (empty: none), and so many new tokens of each row."""
        order = rows if self.cache is None else ()
        return self.pages.num_missing(self.lengths_at(position), num_new, order)

    def rewind(self, position: int) -> None:
        """Forget all tokens from position on."""
        if position == self.num_tokens:
            return
        self.pages.rewind(self.lengths_at(position))
        self._mask = None if self._mask is None or position == 0 else self._mask[:, :position]
        self.num_tokens = position

    def reorder(self, rows: Sequence[int]) -> None:
        """Row r becomes what row rows[r] was."""
        if self.cache is None:  # a SpanCache has its own keys and values for every row, and all are as long
            self.pages.reorder(rows)
        self._mask = None if self._mask is None else self._mask[torch.tensor(list(rows))]

    def append(self, hidden_BTH: Tensor, mask: Tensor | None) -> list[Growth]:
        """Make room for T tokens of each row. mask: bool [B, T]; None if all are real.

        What each row gained; its tokens to be computed are the real ones after those that were found. The pages must be there.
        """
        num_new = hidden_BTH.shape[1]
        self._append_mask(mask, num_new)
        growths = []
        for row, count in enumerate(self.num_new(num_new, mask)):
            inputs = None
            if self.cache is None and count:
                real = hidden_BTH[row] if mask is None else hidden_BTH[row][mask[row]]
                inputs = real.contiguous().view(torch.uint8).numpy().data.cast("B")
            growths.append(self.pages.grow(row, count, inputs))
        self.num_tokens += num_new
        return growths

    def _append_mask(self, mask: Tensor | None, num_new: int) -> None:
        if mask is None and self._mask is None:
            return
        old = torch.ones(self.batch, self.num_tokens, dtype=torch.bool) if self._mask is None else self._mask
        new = torch.ones(self.batch, num_new, dtype=torch.bool) if mask is None else mask
        self._mask = torch.cat([old, new], dim=1)
