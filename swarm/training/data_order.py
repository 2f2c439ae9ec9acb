"""In which order samples are taken. Pure; the same on every machine and in every version of Python and numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

WINDOW_CHUNKS = 8


class SampleOrder:
    """Index 0, 1, ... without end -> sample. Every pass over the data takes each sample once, in another order.

    In each pass the chunks are put in random order and then in windows of WINDOW_CHUNKS, and samples are mixed within a
    window: neighbours come from different documents, and yet a trainer needs only a few chunks at a time.
    """

    def __init__(self, num_samples: Sequence[int], seed: int) -> None:
        """num_samples: of each chunk; their sum must be positive."""
        self._chunks = np.flatnonzero(np.asarray(num_samples, np.int64))
        self._sizes = np.asarray(num_samples, np.int64)
        self.num_samples = int(self._sizes.sum())
        if not self.num_samples:
            raise ValueError("need at least one sample")
        self._seed = seed
        self._pass = lru_cache(2)(self._make_pass)
        self._window = lru_cache(4)(self._make_window)

    def locate(self, index: int) -> tuple[int, int]:
        """The chunk, and which of its samples, of the sample at index."""
        number, window, at = self._find(index)
        chunks = self._chunks_of(number, window)
        ends = np.cumsum(self._sizes[chunks])
        sample = int(self._window(number, window, int(ends[-1]))[at])
        place = int(np.searchsorted(ends, sample, side="right"))
        return int(chunks[place]), sample - int(ends[place] - self._sizes[chunks[place]])

    def coming_chunks(self, index: int) -> Iterator[int]:
        """The chunks of index's window and of the one after it, as far as they are different."""
        number, window, _ = self._find(index)
        num_windows = -(-len(self._chunks) // WINDOW_CHUNKS)
        following = (number, window + 1) if window + 1 < num_windows else (number + 1, 0)
        here, there = self._chunks_of(number, window), self._chunks_of(*following)
        yield from dict.fromkeys(map(int, chain(here, there)))

    def _find(self, index: int) -> tuple[int, int, int]:
        """Pass, window and position in the window."""
        number, position = divmod(index, self.num_samples)
        starts = self._pass(number)[1]
        window = int(np.searchsorted(starts, position, side="right")) - 1
        return number, window, position - int(starts[window])

    def _chunks_of(self, number: int, window: int) -> NDArray[np.int64]:
        return self._pass(number)[0][window * WINDOW_CHUNKS : (window + 1) * WINDOW_CHUNKS]

    def _make_pass(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All chunks in their order, and the positions at which the windows begin."""
        chunks = self._chunks[permutation(len(self._chunks), f"{self._seed} chunks {number}")]
        ends = np.cumsum(self._sizes[chunks])
        return chunks, np.concatenate([[0], ends[WINDOW_CHUNKS - 1 : -1 : WINDOW_CHUNKS]])

    def _make_window(self, number: int, window: int, size: int) -> NDArray[np.int64]:
        return permutation(size, f"{self._seed} samples {number} {window}")


def permutation(size: int, key: str) -> NDArray[np.int64]:
    """0 .. size-1 in an order that only key decides: sorted by 64 bits of SHAKE-256 each.

    Random number generators promise the same bits in all versions, but not the same shuffles.
    """
    stream = hashlib.shake_256(b"shardswarm sample order 1\0" + key.encode()).digest(8 * size)
    return np.argsort(np.frombuffer(stream, "<u8"), kind="stable")
