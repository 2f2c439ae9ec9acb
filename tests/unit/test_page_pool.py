"""PagePool: every page is free, held or kept, under any sequence of calls; pages of a row lie side by side."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from node.page_pool import OutOfPages, PagePool

KEYS = st.sampled_from([bytes([number]) for number in range(6)])


class PoolMachine(RuleBasedStateMachine):
    """Whoever calls the pool, beside a model of who holds what."""

    @initialize(num_pages=st.sampled_from([1, 3, 8, 24, 40]))
    def begin(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages, 4)
        self.holders: Counter[int] = Counter()
        self.key_of: dict[int, bytes] = {}
        self.kept: list[int] = []  # the one that was released first, first

    @property
    def page_of(self) -> dict[bytes, int]:
        return {key: page for page, key in self.key_of.items()}

    def some_held(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.holders)))

    @rule(data=st.data(), count=st.integers(0, 12))
    def take(self, data: st.DataObject, count: int) -> None:
        after = data.draw(st.none() | st.integers(0, self.pool.num_pages - 1))
        num_free = self.pool.num_pages - len(self.holders) - len(self.kept)
        if count > num_free + len(self.kept):
            before = self.pool.num_held
            with pytest.raises(OutOfPages, match=f"{count} pages are needed, {num_free + len(self.kept)} of"):
                self.pool.take(count, after)
            assert self.pool.num_held == before
            return
        taken = self.pool.take(count, after)
        assert len(set(taken)) == count and not self.holders.keys() & set(taken)
        num_given_up = len(self.kept) - self.pool.num_kept
        if count <= num_free:
            assert num_given_up == 0, "nothing is given up while there are free pages"
        for page in self.kept[:num_given_up]:
            del self.key_of[page]
        self.kept = self.kept[num_given_up:]
        assert not set(self.kept) & set(taken)
        self.holders.update(taken)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def hold_again(self, data: st.DataObject) -> None:
        page = self.some_held(data)
        self.pool.hold(page)
        self.holders[page] += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), is_by_all=st.booleans())
    def release(self, data: st.DataObject, is_by_all: bool) -> None:
        page = self.some_held(data)
        for _ in range(self.holders[page] if is_by_all else 1):
            self.pool.release(page)
            self.holders[page] -= 1
        if not self.holders[page]:
            del self.holders[page]
            self.kept += [page] * (page in self.key_of)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), key=KEYS)
    def publish(self, data: st.DataObject, key: bytes) -> None:
        page = self.some_held(data)
        self.pool.publish(page, key)
        if page not in self.key_of and key not in self.page_of:
            self.key_of[page] = key

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        page = self.some_held(data)
        self.pool.forget(page)
        self.key_of.pop(page, None)

    @rule(data=st.data(), is_known=st.booleans())
    def find(self, data: st.DataObject, is_known: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.page_of)) if is_known and self.key_of else KEYS)
        page = self.pool.find(key)
        assert page == self.page_of.get(key)
        if page is not None:
            if page in self.kept:
                self.kept.remove(page)
            self.holders[page] += 1

    @rule(data=st.data())
    def nobody_holds_or_releases_what_is_free(self, data: st.DataObject) -> None:
        page = data.draw(st.integers(0, self.pool.num_pages - 1))
        if page not in self.holders:
            with pytest.raises(ValueError, match="held by nobody"):
                self.pool.release(page)
            with pytest.raises(ValueError, match="held by nobody"):
                self.pool.publish(page, b"key")
            if page not in self.kept:
                with pytest.raises(ValueError, match="nobody can hold it"):
                    self.pool.hold(page)

    @invariant()
    def held_free_and_kept_are_all(self) -> None:
        pool = self.pool
        assert pool.num_held == len(self.holders) and pool.num_kept == len(self.kept)
        assert pool.num_available == pool.num_pages - len(self.holders)
        free = {page for page in range(pool.num_pages) if pool._free[page]}
        assert free == set(range(pool.num_pages)) - self.holders.keys() - set(self.kept)
        for page in range(pool.num_pages):
            assert pool.num_holders(page) == self.holders[page]
            assert pool.is_shared(page) == (self.holders[page] > 1)
        assert list(pool._kept) == self.kept
        assert pool._key_of == self.key_of and pool._page_of == self.page_of


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_row_that_grows_alone_lies_side_by_side() -> None:
    pool = PagePool(20, 16)
    pages: list[int] = []
    for count in (1, 1, 3, 1, 6, 1, 7):
        pages += pool.take(count, pages[-1] if pages else None)
    assert pages == list(range(20))


def test_rows_that_grow_in_turns_lie_side_by_side_while_there_is_room_between_them() -> None:
    pool = PagePool(64, 16)
    rows: list[list[int]] = [pool.take(1) for _ in range(4)]
    for _ in range(15):
        for row in rows:
            row += pool.take(1, row[-1])
    assert pool.num_available == 0
    assert all(row == list(range(row[0], row[0] + 16)) for row in rows)


def test_pages_that_were_kept_together_are_given_away_side_by_side() -> None:
    pool = PagePool(48, 16)
    for row in range(3):
        pages = pool.take(16)
        for page in pages:
            pool.publish(page, bytes([row, page]))
        for page in reversed(pages):
            pool.release(page)
    assert pool.num_kept == 48
    pages = pool.take(1)
    for _ in range(15):
        pages += pool.take(1, pages[-1])
    assert pages == list(range(16)) and pool.num_kept == 32  # of the row that was released first


def test_the_ends_of_what_is_kept_go_before_the_beginnings() -> None:
    pool = PagePool(32, 16)
    pages = pool.take(32)
    for page in pages:
        pool.publish(page, bytes([page]))
    for page in reversed(pages):
        pool.release(page)
    pool.take(1)
    assert [pool.find(bytes([page])) for page in range(16)] == list(range(16))
    assert all(pool.find(bytes([page])) is None for page in range(16, 32))


@pytest.mark.parametrize(("num_pages", "page_tokens"), [(0, 1), (1, 0), (-1, 16)])
def test_a_pool_without_room_is_refused(num_pages: int, page_tokens: int) -> None:
    with pytest.raises(ValueError, match="at least one page of one token"):
        PagePool(num_pages, page_tokens)


def test_pages_of_tokens() -> None:
    assert [PagePool(1, 16).pages_of(tokens) for tokens in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]
