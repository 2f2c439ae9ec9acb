"""PageStore: the memory of the pages in which sessions keep keys and values, and what came out of a hop for them.

A page is page_tokens *slots* side by side, of one token each. Which page is whose, node/page_pool.py knows. N slots, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowPart:
    """Tokens of one row of a session that are computed together with others'."""

    pages: Sequence[int]
    """The row's pages, from its first token to the last of these at least."""
    start: int
    """Tokens of the row before these."""
    num_tokens: int

    @property
    def length(self) -> int:
        return self.start + self.num_tokens


class PageStore:
    """Memory for num_pages pages. On the CPU the system gives it page by page when it is first written."""

    def __init__(
        self, num_pages: int, page_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self._outputs: Tensor | None = None

    def block(self, index: int, keys_NKD: Tensor, values_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, [slots, heads, size of a head]; made when first asked for, for such as are given."""
        if index not in self._blocks:
            self._blocks[index] = (
                self._empty(keys_NKD.shape[1:], keys_NKD.dtype),
                self._empty(values_NKD.shape[1:], values_NKD.dtype),
            )
        return self._blocks[index]

    @property
    def outputs(self) -> Tensor:
        """What came out of the hop for each token, [slots, H]: a page is of one session's hop at a time."""
        if self._outputs is None:
            self._outputs = self._empty((self._hidden_size,), self._dtype)
        return self._outputs

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to), one after another."""
        tensors = [self.outputs, *(tensor for pair in self._blocks.values() for tensor in pair)]
        for source, target in copies:
            for tensor in tensors:
                pages = tensor.view(self.num_pages, self.page_tokens, *tensor.shape[1:])
                pages[target].copy_(pages[source])

    def slots(self, pages: Sequence[int], start: int, end: int) -> Tensor:
        """int64 [end - start]: where tokens start .. end-1 of a row with these pages are."""
        size = self.page_tokens
        if end - start == 1:
            return torch.tensor([pages[start // size] * size + start % size], device=self._device)
        first, last = start // size, (end - 1) // size
        table = torch.tensor(pages[first : last + 1], device=self._device)
        places = torch.arange(start, end, device=self._device)
        return table[torch.div(places, size, rounding_mode="floor") - first] * size + places % size

    def run(self, pages: Sequence[int], start: int, end: int) -> slice | None:
        """The slots of tokens start .. end-1, if they lie side by side."""
        size = self.page_tokens
        first, last = start // size, (end - 1) // size
        if any(pages[place + 1] != pages[place] + 1 for place in range(first, last)):
            return None
        begin = pages[first] * size + start % size
        return slice(begin, begin + end - start)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(mode=False):  # so that it may be written outside of that mode, too
            return torch.empty(self.num_pages * self.page_tokens, *shape, dtype=dtype, device=self._device)
