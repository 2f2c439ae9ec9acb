"""gathering_s: how long a batch waits for sessions that are about to be back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.step_queue import gathering_s

NOW = 1000.0
TIMES = st.floats(min_value=NOW - 1, max_value=NOW + 1)


@pytest.mark.parametrize(
    ("due_in_s", "waits"),
    [([], False), ([0.01], True), ([0.01, 0.015], True), ([0.03], False), ([-0.004], True), ([-0.006], False)],
    ids=["nobody", "soon", "two soon", "too late", "a little late", "long overdue"],
)
def test_only_sessions_that_are_due_soon_are_waited_for(due_in_s: list[float], waits: bool) -> None:
    assert (gathering_s([NOW + s for s in due_in_s], NOW, batch_s=0.1) > 0) is waits


def test_it_waits_until_the_last_of_them_and_a_little_longer() -> None:
    assert gathering_s([NOW + 0.002, NOW + 0.01], NOW, batch_s=0.1) == pytest.approx(0.015)


@given(returns=st.lists(TIMES), batch_s=st.floats(min_value=0, max_value=5))
def test_it_never_waits_longer_than_a_fifth_of_a_batch(returns: list[float], batch_s: float) -> None:
    assert 0 <= gathering_s(returns, NOW, batch_s) <= 0.2 * batch_s
