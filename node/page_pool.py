"""PagePool: which pages of the KV cache are free, held or kept, and which hold what. Pure bookkeeping, not thread-safe.

A page has room for a fixed number of tokens, of one row, in every block of the span. It is *free*, *held* by one session or several,
or *kept*: held by nobody, but its content is known by a key, so that a session that needs the same may find it. Kept pages are
given away when no free ones are left, those that were not used for longest first.
"""

from __future__ import annotations

from collections import OrderedDict


class OutOfPages(Exception):
    """Fewer pages are free or kept than were asked for."""


class PagePool:
    """num_pages pages of page_tokens tokens each."""

    _GIVEN_UP_AT_ONCE = 16
    """Kept pages are given up so many at a time: neighbours mostly, so that those who get them find them side by side."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise ValueError(f"need at least one page of one token, got {num_pages} of {page_tokens}")
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._holders = [0] * num_pages
        self._free = bytearray(b"\1") * num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._num_held = 0

    @property
    def num_held(self) -> int:
        """Pages that some session holds."""
        return self._num_held

    @property
    def num_available(self) -> int:
        """Pages that `take` could give now."""
        return self.num_pages - self._num_held

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def pages_of(self, num_tokens: int) -> int:
        """Pages that so many tokens of a row need."""
        return -(-num_tokens // self.page_tokens)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """So many pages, held once each, in a row behind `after` as far as these are free. Raises OutOfPages, and takes none."""
        if count > self.num_available:
            raise OutOfPages(f"{count} pages are needed, {self.num_available} of {self.num_pages} are free")
        taken: list[int] = []
        for _ in range(count):
            page = self._next_free(after)
            self._free[page] = 0
            self._holders[page] = 1
            taken.append(page)
            after = page
        self._num_held += count
        return taken

    def hold(self, page: int) -> None:
        """One holder more."""
        if not self._holders[page]:
            if page not in self._kept:
                raise ValueError(f"page {page} is free: nobody can hold it")
            del self._kept[page]
            self._num_held += 1
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less. Without any, a page whose content is known is kept, any other is free."""
        if not self._holders[page]:
            raise ValueError(f"page {page} is held by nobody")
        self._holders[page] -= 1
        if self._holders[page]:
            return
        self._num_held -= 1
        if page in self._key_of:
            self._kept[page] = None
        else:
            self._free[page] = 1

    def num_holders(self, page: int) -> int:
        return self._holders[page]

    def is_shared(self, page: int) -> bool:
        """Whether others hold it, too."""
        return self._holders[page] > 1

    def publish(self, page: int, key: bytes) -> None:
        """A held page's content is complete and known by `key`. A page that is known by the same key already stays the one."""
        if not self._holders[page]:
            raise ValueError(f"page {page} is held by nobody")
        if key not in self._page_of and page not in self._key_of:
            self._key_of[page], self._page_of[key] = key, page

    def forget(self, page: int) -> None:
        """The content of a held page is about to change."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]

    def find(self, key: bytes) -> int | None:
        """The page with this content, which the caller holds from now on; None if there is none."""
        page = self._page_of.get(key)
        if page is not None:
            self.hold(page)
        return page

    def _next_free(self, after: int | None) -> int:
        if after is not None and after + 1 < self.num_pages and self._free[after + 1]:
            return after + 1
        longest = max(bytes(self._free).split(b"\0"), key=len)
        if not longest:
            self._give_up_kept()
            return self._next_free(after)
        start = self._free.find(longest)
        # Whoever holds the page before this run may need its beginning soon.
        return start if start == 0 else start + len(longest) // 2

    def _give_up_kept(self) -> None:
        for _ in range(min(self._GIVEN_UP_AT_ONCE, len(self._kept))):
            page, _ = self._kept.popitem(last=False)
            self.forget(page)
            self._free[page] = 1
