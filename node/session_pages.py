"""SessionPages: which pages hold the tokens of a session's rows, and which of them others have computed already. Pure.

Only real tokens are counted: padding takes no room. A page that is full and was filled from the first token on without a gap is
*published* under a key that follows from all inputs up to its end, so a later row that begins with the same inputs on the same hop
need not compute them again (vLLM calls this automatic prefix caching).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from node.page_pool import PagePool

_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Growth:
    """What a row gained: tokens start .. start + found - 1 were found, and num_new after these are to be computed."""

    start: int
    found: int
    num_new: int


@dataclass(slots=True)
class _Row:
    length: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Of the first pages: as many as are full and known."""
    hasher: Any = None
    """Of the inputs in the page after those; None where they are not known any more."""
    num_published: int = 0

    def copy(self) -> _Row:
        return _Row(
            self.length, list(self.pages), list(self.keys), self.hasher and self.hasher.copy(), self.num_published
        )


class SessionPages:
    """Rows of one session in a PagePool."""

    def __init__(self, pool: PagePool, batch: int, origin: bytes | None) -> None:
        """origin: what the content of a page depends on besides inputs: the hop. None: nothing is shared."""
        self._pool = pool
        self._origin = origin
        self._rows = [self._empty_row() for _ in range(batch)]
        self.copies: list[tuple[int, int]] = []
        """Pages to copy, (from, to) in this order, before anything is written. The sources are held until `computed`."""

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [row.length for row in self._rows]

    @property
    def num_pages(self) -> int:
        return sum(len(row.pages) for row in self._rows)

    def table(self, row: int) -> list[int]:
        """The row's pages, in the order of their tokens."""
        return self._rows[row].pages

    def held(self) -> list[int]:
        """Each page as often as this session holds it."""
        return [*(page for row in self._rows for page in row.pages), *(source for source, _ in self.copies)]

    def num_missing(self, lengths: Sequence[int], growths: Sequence[int], order: Sequence[int] = ()) -> int:
        """Pages that must be free for a step: at most so many are needed beyond those that it gives back itself.

        It rewinds the rows to these lengths, then reorders them (empty: not), then lets row r grow by growths[r].
        """
        pool = self._pool
        sources = order or range(len(self._rows))
        times = Counter(order)
        needed = 0
        for source, growth in zip(sources, growths, strict=True):
            length = lengths[source]
            kept = pool.pages_of(length)
            needed += pool.pages_of(length + growth) - kept
            if growth and length % pool.page_tokens:
                needed += times[source] > 1 or pool.is_shared(self._rows[source].pages[kept - 1])
        if needed and (order or list(lengths) != self.lengths):
            needed -= self._num_given_back(lengths, sources)
        return max(0, needed)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of each row after so many."""
        for row, length in zip(self._rows, lengths, strict=True):
            if not 0 <= length <= row.length:
                raise ValueError(f"cannot rewind a row of {row.length} tokens to {length}")
            if length == row.length:
                continue
            kept = self._pool.pages_of(length)
            for page in reversed(row.pages[kept:]):
                self._pool.release(page)
            del row.pages[kept:]
            row.length = length
            full = length // self._pool.page_tokens
            whole_page = len(row.keys) >= full and length % self._pool.page_tokens == 0
            row.keys = row.keys[:full]
            row.num_published = min(row.num_published, full)
            row.hasher = self._hasher(row.keys) if whole_page and self._origin is not None else None

    def reorder(self, order: Sequence[int]) -> None:
        """Row r becomes what row order[r] was."""
        rows = [self._rows[source].copy() for source in order]
        for row in rows:
            for page in row.pages:
                self._pool.hold(page)
        self._release_rows()
        self._rows = rows

    def grow(self, index: int, num_tokens: int, inputs: memoryview | None) -> Growth:
        """Append tokens to a row. inputs: their bytes, as many for each token; None if nothing of them is to be shared.

        Raises OutOfPages, with the row as long as it had become; whoever wants all or nothing asks num_missing before.
        """
        row, pool = self._rows[index], self._pool
        start, found = row.length, 0
        if inputs is None and num_tokens:
            row.hasher = None
        token_bytes = len(inputs) // num_tokens if inputs is not None and num_tokens else 0
        while inputs is not None and row.hasher is not None and num_tokens - found >= pool.page_tokens:
            if row.length % pool.page_tokens:
                break
            hasher = row.hasher.copy()
            hasher.update(inputs[found * token_bytes : (found + pool.page_tokens) * token_bytes])
            page = pool.find(key := hasher.digest())
            if page is None:
                break
            row.pages.append(page)
            row.keys.append(key)
            row.num_published += 1
            row.length += pool.page_tokens
            row.hasher = self._hasher(row.keys)
            found += pool.page_tokens
        num_new = num_tokens - found
        if num_new:
            self._make_writable(row)
            wanted = pool.pages_of(row.length + num_new) - len(row.pages)
            row.pages += pool.take(wanted, row.pages[-1] if row.pages else None)
            self._take_note(row, num_new, None if inputs is None else inputs[found * token_bytes :], token_bytes)
        return Growth(start, found, num_new)

    def computed(self) -> None:
        """All pages in `copies` have been copied, all tokens so far computed: full pages can be found by others."""
        self._let_go_of_copied()
        for row in self._rows:
            for place in range(row.num_published, len(row.keys)):
                self._pool.publish(row.pages[place], row.keys[place])
            row.num_published = len(row.keys)

    def release(self) -> None:
        """Give all pages back."""
        self._let_go_of_copied()
        self._release_rows()
        self._rows = [self._empty_row() for _ in self._rows]

    def _let_go_of_copied(self) -> None:
        for source, _ in self.copies:
            self._pool.release(source)
        self.copies = []

    def _num_given_back(self, lengths: Sequence[int], sources: Sequence[int]) -> int:
        """Pages that nobody holds any more once the rows are those that came from these sources, rewound to these lengths."""
        held = Counter(page for row in self._rows for page in row.pages)
        stay = {page for s in sources for page in self._rows[s].pages[: self._pool.pages_of(lengths[s])]}
        return sum(page not in stay and self._pool.num_holders(page) == count for page, count in held.items())

    def _release_rows(self) -> None:
        for row in self._rows:
            for page in reversed(row.pages):  # so that of what is kept the ends go before the beginnings
                self._pool.release(page)

    def _empty_row(self) -> _Row:
        return _Row(hasher=None if self._origin is None else self._hasher([]))

    def _hasher(self, keys: Sequence[bytes]) -> Any:
        assert self._origin is not None
        return hashlib.blake2b(keys[-1] if keys else self._origin, digest_size=_KEY_BYTES)

    def _make_writable(self, row: _Row) -> None:
        """The page that the next token goes into, if it has tokens already, must be this row's alone, and found by nobody."""
        if row.length % self._pool.page_tokens == 0:
            return
        last = row.pages[-1]
        if self._pool.is_shared(last):
            (fresh,) = self._pool.take(1, row.pages[-2] if len(row.pages) > 1 else None)
            self.copies.append((last, fresh))
            row.pages[-1] = fresh
        else:
            self._pool.forget(last)

    def _take_note(self, row: _Row, num_new: int, inputs: memoryview | None, token_bytes: int) -> None:
        """Count the new tokens, with the keys of the pages that they fill."""
        room = self._pool.page_tokens
        offset = 0
        while row.hasher is not None and inputs is not None and offset < num_new:
            count = min(room - (row.length + offset) % room, num_new - offset)
            row.hasher.update(inputs[offset * token_bytes : (offset + count) * token_bytes])
            offset += count
            if (row.length + offset) % room == 0:
                row.keys.append(row.hasher.digest())
                row.hasher = self._hasher(row.keys)
        row.length += num_new
