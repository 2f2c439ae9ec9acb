"""SessionPages: whatever sessions do, each row reads its own tokens through its table, and what it found it would have computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from node.page_pool import OutOfPages, PagePool
from node.session_pages import Growth, SessionPages

PAGE = 4
TOKEN_BYTES = 3
ORIGINS = (b"0:2", b"0:2", b"2:4", None)
# Few, so that many rows begin alike.
TEXTS = [[1] * length for length in (0, 1, 1, PAGE - 1, PAGE, PAGE + 1, 9, 13)] + [[2] * length for length in (1, 5)]


def inputs_of(tokens: Sequence[int]) -> memoryview:
    return memoryview(b"".join(token.to_bytes(TOKEN_BYTES, "big") for token in tokens))


def content(origin: bytes | None, tokens: Sequence[int]) -> tuple[object, ...]:
    """What a hop keeps for the last of these tokens: it depends on the hop and on all tokens so far."""
    return (origin, *tokens)


@dataclass(eq=False)
class Step:
    """What the device gets of a step: places in memory, which may belong to others by the time that it computes."""

    growths: list[Growth]
    tables: list[list[int]]
    copies: list[tuple[int, int]]
    rows: list[list[int]]


@dataclass(eq=False)
class Session:
    """A session, and what its rows must hold."""

    origin: bytes | None
    pages: SessionPages
    rows: list[list[int]] = field(default_factory=list)
    step: Step | None = None


class PagesMachine(RuleBasedStateMachine):
    """Sessions whose steps are admitted at once and computed later, in any order, as a node does it."""

    sessions: list[Session]

    @initialize(num_pages=st.integers(4, 14))
    def begin(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages, PAGE)
        self.memory: dict[tuple[int, int], object] = {}
        self.sessions = []

    def some(self, data: st.DataObject, *, with_step: bool) -> Session:
        return data.draw(st.sampled_from([s for s in self.sessions if (s.step is not None) == with_step]))

    @precondition(lambda self: len(self.sessions) < 5)
    @rule(origin=st.sampled_from(ORIGINS), batch=st.integers(1, 3))
    def open(self, origin: bytes | None, batch: int) -> None:
        pages = SessionPages(self.pool, batch, origin)
        self.sessions.append(Session(origin, pages, [[] for _ in range(batch)]))

    @precondition(lambda self: any(s.step is None for s in self.sessions))
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        """A step: perhaps a rewind, perhaps a reorder, and new tokens; all of it if there is room, else nothing of it."""
        session = self.some(data, with_step=False)
        rows, pages = session.rows, session.pages
        lengths = [len(row) for row in rows]
        if data.draw(st.integers(0, 3)) == 0:
            lengths = [data.draw(st.integers(0, length)) for length in lengths]
        order: list[int] = []
        if data.draw(st.integers(0, 3)) == 0:
            order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=len(rows), max_size=len(rows)))
        texts = [data.draw(st.sampled_from(TEXTS)) for _ in rows]
        num_new = [len(text) for text in texts]
        missing = pages.num_missing(lengths, num_new, order)
        if missing > self.pool.num_available:
            return  # Refused
        # Now and then others hold all that is not needed.
        ballast = self.pool.take(self.pool.num_available - missing) if data.draw(st.integers(0, 3)) == 0 else []
        pages.rewind(lengths)
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        if order:
            pages.reorder(order)
            rows = [list(rows[source]) for source in order]
        growths = []
        for index, text in enumerate(texts):
            is_told = data.draw(st.integers(0, 9)) > 0
            growth = pages.grow(index, len(text), inputs_of(text) if is_told else None)  # never OutOfPages
            assert growth.start == len(rows[index]) and growth.found + growth.num_new == len(text)
            assert growth.found % PAGE == 0 and (session.origin is not None or growth.found == 0)
            rows[index] += text
            growths.append(growth)
            # What was found was computed, by somebody, and is what this row needs.
            self.assert_reads(session, index, rows[index], growth.start, growth.start + growth.found)
        for page in ballast:
            self.pool.release(page)
        session.rows = rows
        session.step = Step(growths, [pages.table(index) for index in range(len(rows))], pages.copies, rows)
        assert pages.lengths == [len(row) for row in rows]

    @precondition(lambda self: any(s.step is not None for s in self.sessions))
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        session = self.some(data, with_step=True)
        assert session.step is not None
        self.on_device(session.origin, session.step)
        session.step = None
        session.pages.computed()

    @precondition(lambda self: any(s.step is not None for s in self.sessions))
    @rule(data=st.data(), is_on_device=st.booleans())
    def cancel(self, data: st.DataObject, is_on_device: bool) -> None:
        """The client is gone; perhaps the device is just computing its step, and notices nothing."""
        session = self.some(data, with_step=True)
        step = session.step
        assert step is not None
        session.pages.release()
        self.sessions.remove(session)
        if is_on_device:
            self.on_device(session.origin, step)

    @precondition(lambda self: any(s.step is None for s in self.sessions))
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = self.some(data, with_step=False)
        session.pages.release()
        self.sessions.remove(session)
        assert session.pages.num_pages == 0 and session.pages.lengths == [0] * len(session.rows)

    def on_device(self, origin: bytes | None, step: Step) -> None:
        for source, target in step.copies:
            for slot in range(PAGE):
                self.memory[target, slot] = self.memory.get((source, slot))
        for growth, table, row in zip(step.growths, step.tables, step.rows, strict=True):
            for place in range(growth.start + growth.found, growth.start + growth.found + growth.num_new):
                self.memory[table[place // PAGE], place % PAGE] = content(origin, row[: place + 1])

    def assert_reads(self, session: Session, index: int, row: list[int], start: int, end: int) -> None:
        table = session.pages.table(index)
        for place in range(start, end):
            assert self.memory[table[place // PAGE], place % PAGE] == content(session.origin, row[: place + 1])

    @invariant()
    def every_row_reads_its_own_tokens(self) -> None:
        for session in self.sessions:
            for index, row in enumerate(session.rows):
                assert len(session.pages.table(index)) == self.pool.pages_of(len(row))
                if session.step is None:
                    self.assert_reads(session, index, row, 0, len(row))
                else:  # what a step finds when it begins to be computed, but for what it copies then
                    target = dict(session.step.copies)
                    whole_pages = session.step.growths[index].start // PAGE * PAGE
                    assert not set(session.pages.table(index)[: whole_pages // PAGE]) & set(target.values())
                    self.assert_reads(session, index, row, 0, whole_pages)

    @invariant()
    def every_page_is_held_as_often_as_it_is_in_a_table_or_to_be_copied(self) -> None:
        holders: Counter[int] = Counter()
        for session in self.sessions:
            for index in range(len(session.rows)):
                table = session.pages.table(index)
                assert len(set(table)) == len(table)
                holders.update(table)
            holders.update(source for source, _ in session.pages.copies)
        assert {page: self.pool.num_holders(page) for page in range(self.pool.num_pages)} == {
            page: holders[page] for page in range(self.pool.num_pages)
        }

    @invariant()
    def nobody_writes_where_another_reads(self) -> None:
        """A page that a step under way writes to is in one table only, and nobody finds it."""
        for session in self.sessions:
            if session.step is None:
                continue
            for growth, table in zip(session.step.growths, session.step.tables, strict=True):
                if growth.num_new:
                    for page in table[(growth.start + growth.found) // PAGE :]:
                        assert self.pool.num_holders(page) == 1 and page not in self.pool._key_of


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=120, stateful_step_count=40)


def grow(pages: SessionPages, text: str, row: int = 0) -> Growth:
    """As a step that is computed at once."""
    growth = pages.grow(row, len(text), memoryview(text.encode()))
    pages.computed()
    return growth


def test_full_pages_are_found_as_far_as_the_texts_are_equal() -> None:
    pool = PagePool(32, PAGE)
    first, second, third = (SessionPages(pool, 1, b"hop") for _ in range(3))
    assert grow(first, "a text of many pages") == Growth(0, 0, 20)
    assert grow(second, "a text of other pages") == Growth(0, 8, 13)
    assert second.table(0)[:2] == first.table(0)[:2] and pool.num_held == 5 + 4
    assert grow(third, "a text") == Growth(0, 4, 2)
    assert grow(third, " of many pages") == Growth(6, 0, 14), "only from the beginning of a page"
    assert pool.num_held == 5 + 4 + 4


def test_a_whole_text_is_found_and_nothing_is_left_to_compute() -> None:
    pool = PagePool(8, PAGE)
    first, second = SessionPages(pool, 1, b"hop"), SessionPages(pool, 1, b"hop")
    grow(first, "two page")
    assert grow(second, "two page") == Growth(0, 8, 0) and pool.num_held == 2


def test_a_second_part_is_found_behind_a_first() -> None:
    pool = PagePool(16, PAGE)
    first, second = SessionPages(pool, 1, b"hop"), SessionPages(pool, 1, b"hop")
    grow(first, "one two three ")
    assert grow(second, "one ") == Growth(0, 4, 0)
    assert grow(second, "two three ") == Growth(4, 8, 2)


@pytest.mark.parametrize("origin", [b"other hop", None])
def test_nothing_is_found_on_another_hop_or_where_nothing_is_shared(origin: bytes | None) -> None:
    pool = PagePool(16, PAGE)
    grow(SessionPages(pool, 1, b"hop"), "some text")
    assert grow(SessionPages(pool, 1, origin), "some text").found == 0


def test_what_a_closed_session_computed_is_found_until_its_room_is_needed() -> None:
    pool = PagePool(4, PAGE)
    closed = SessionPages(pool, 1, b"hop")
    grow(closed, "0123456789abcdef")
    closed.release()
    assert pool.num_held == 0 and pool.num_kept == 4
    again = SessionPages(pool, 1, b"hop")
    assert grow(again, "0123456789ab") == Growth(0, 12, 0)
    grow(again, "!!!!")
    again.release()
    assert grow(SessionPages(pool, 1, b"hop"), "0123456789abcdef") == Growth(0, 12, 4)


def test_a_page_that_is_not_computed_yet_is_found_by_nobody() -> None:
    pool = PagePool(8, PAGE)
    under_way, other = SessionPages(pool, 1, b"hop"), SessionPages(pool, 1, b"hop")
    under_way.grow(0, 8, memoryview(b"two page"))
    assert grow(other, "two page").found == 0


def test_who_writes_into_a_found_page_after_a_rewind_gets_a_copy() -> None:
    pool = PagePool(16, PAGE)
    first, second = SessionPages(pool, 1, b"hop"), SessionPages(pool, 1, b"hop")
    grow(first, "one two ")
    grow(second, "one two ")
    first.rewind([6])
    first.grow(0, 3, memoryview(b"ree"))
    ((source, target),) = first.copies
    assert second.table(0) == [first.table(0)[0], source] and first.table(0)[1] == target
    first.computed()
    assert grow(SessionPages(pool, 1, b"hop"), "one two ").found == 8, "the second one's page is as it was"


def test_a_page_that_its_only_holder_writes_into_after_a_rewind_is_found_no_more() -> None:
    pool = PagePool(16, PAGE)
    pages, other = SessionPages(pool, 1, b"hop"), SessionPages(pool, 1, b"hop")
    grow(pages, "one two ")
    pages.rewind([7])
    assert grow(other, "one two ").found == 8, "nobody has written into it yet"
    other.release()
    assert grow(pages, "!") == Growth(7, 0, 1) and pages.copies == []
    assert grow(other, "one two ").found == 4


def test_what_is_written_after_a_rewind_to_the_end_of_a_page_is_found_by_others() -> None:
    pool = PagePool(16, PAGE)
    pages, other = SessionPages(pool, 1, b"hop"), SessionPages(pool, 1, b"hop")
    grow(pages, "one two three ")
    pages.rewind([4])
    grow(pages, "by one")
    assert grow(other, "one by one").found == 8


def test_a_row_that_got_nothing_yet_is_shared_later() -> None:
    """A short prompt beside a long one: its first message may be all padding."""
    pool = PagePool(16, PAGE)
    pages, other = SessionPages(pool, 1, b"hop"), SessionPages(pool, 1, b"hop")
    pages.grow(0, 0, None)
    grow(pages, "one two ")
    assert grow(other, "one two ").found == 8


def test_nothing_is_found_behind_tokens_whose_inputs_are_not_known() -> None:
    pool = PagePool(16, PAGE)
    pages, other = SessionPages(pool, 1, b"hop"), SessionPages(pool, 1, b"hop")
    grow(pages, "one two ")
    other.grow(0, 4, None)
    assert grow(other, "one two ") == Growth(4, 0, 8)


def test_rows_that_share_a_page_part_when_they_write() -> None:
    pool = PagePool(8, PAGE)
    beams = SessionPages(pool, 2, b"hop")
    grow(beams, "prompt", 0)
    assert grow(beams, "prompt", 1) == Growth(0, 4, 2) and pool.num_held == 3
    beams.reorder([1, 1])
    assert beams.table(0) == beams.table(1) and pool.num_held == 2
    assert beams.num_missing([6, 6], [1, 1]) == 2
    for row in range(2):
        beams.grow(row, 1, memoryview(b"x"))
    assert len(beams.copies) == 2 and beams.table(0)[0] == beams.table(1)[0]
    beams.computed()
    assert pool.num_held == 3


def test_the_room_that_a_step_needs_is_counted_for_the_rows_after_the_reorder() -> None:
    """Row 0 is empty and needs one page for a page of tokens; as a copy of row 1 it needs two."""
    pool = PagePool(3, PAGE)
    pages = SessionPages(pool, 2, None)
    pages.grow(1, 1, None)
    assert pages.num_missing([0, 1], [PAGE, PAGE]) == 2
    assert pages.num_missing([0, 1], [PAGE, PAGE], [1, 1]) == 4


def test_what_a_step_gives_back_itself_need_not_be_free() -> None:
    pool = PagePool(6, PAGE)
    pages = SessionPages(pool, 2, b"hop")
    for row in range(2):
        grow(pages, "0123456789"[row:] + "!" * row, row)
    assert pool.num_available == 0
    assert pages.num_missing([0, 0], [12, 12]) == 0
    assert pages.num_missing([10, 10], [1, 1], [1, 1]) == 0, "row 0's old pages become the copies"
    other = SessionPages(pool, 1, b"hop")
    other.grow(0, 8, memoryview(b"01234567"))
    assert pages.num_missing([0, 0], [12, 12]) == 2, "two of them are somebody else's, too"


def test_too_few_pages_are_an_error_for_who_did_not_ask() -> None:
    pages = SessionPages(PagePool(2, PAGE), 1, None)
    with pytest.raises(OutOfPages, match="3 pages are needed, 2 of 2 are free"):
        pages.grow(0, 9, None)


@pytest.mark.parametrize("length", [-1, 6])
def test_a_row_is_not_rewound_to_what_it_never_was(length: int) -> None:
    pages = SessionPages(PagePool(4, PAGE), 1, None)
    pages.grow(0, 5, None)
    with pytest.raises(ValueError, match=f"5 tokens to {length}"):
        pages.rewind([length])
