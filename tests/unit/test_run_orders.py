"""Orders of a run's owner: what they make of the rules, whose they are, and which may follow which."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import training_pb2
from swarm.epoch.messages import Place
from swarm.identity import Identity
from swarm.run_orders import MAX_ORDERS_BYTES, NO_ORDERS, NOTICE_EPOCHS, Amendment, Orders, open_orders, sign_orders
from swarm.run_spec import OptimizerSettings
from tests.support.runs import make_spec

OWNER = Identity.generate()
RUN = b"r" * 32
SPEC = make_spec(target_batch=32, microbatch=4, num_epochs=100, optimizer=OptimizerSettings(lr=1e-3, warmup_epochs=20))
ORDERS = Orders(
    serial=3,
    is_paused=True,
    amendments=(Amendment(epoch=10, lr=5e-4), Amendment(epoch=20, target_batch=8), Amendment(epoch=30, num_epochs=50)),
    eval_epochs=(7, 9),
    rollback=Place(4, b"l" * 32, 2),
)
AMENDMENTS = st.builds(
    lambda epoch, lr, batch: Amendment(epoch=epoch, lr=lr, target_batch=batch),
    st.integers(1, 40), st.none() | st.floats(1e-6, 1.0), st.none() | st.integers(4, 64),
)  # fmt: skip


def test_rules_change_at_the_epoch_that_is_named_and_no_sample_is_left_out() -> None:
    def rules(epoch: int) -> tuple[float, int, int, int]:
        spec = ORDERS.spec_at(SPEC, epoch)
        return spec.optimizer.lr, spec.target_batch, spec.num_epochs, ORDERS.first_sample(SPEC, epoch)

    assert rules(9) == (1e-3, 32, 100, 9 * 32)
    assert rules(10) == (5e-4, 32, 100, 10 * 32)
    assert rules(20) == (5e-4, 8, 100, 20 * 32)
    assert rules(21) == (5e-4, 8, 100, 20 * 32 + 8)
    assert rules(30) == (5e-4, 8, 50, 20 * 32 + 10 * 8)
    assert [ORDERS.num_epochs(SPEC, epoch) for epoch in (29, 30)] == [100, 50]


@given(st.lists(AMENDMENTS, max_size=5), st.integers(0, 60))
def test_the_samples_of_an_epoch_begin_where_those_before_it_end(amendments: list[Amendment], epoch: int) -> None:
    orders = NO_ORDERS
    for amendment in amendments:
        orders = orders.amended(amendment)
    batch = orders.spec_at(SPEC, epoch).target_batch
    assert orders.first_sample(SPEC, epoch + 1) == orders.first_sample(SPEC, epoch) + batch
    assert orders.first_sample(SPEC, 0) == 0


def test_a_run_may_be_ended_while_it_warms_up() -> None:
    orders = NO_ORDERS.amended(Amendment(epoch=5, num_epochs=5))
    assert orders.spec_at(SPEC, 4) == SPEC
    assert orders.spec_at(SPEC, 5).num_epochs == 5


def test_an_amendment_completes_an_earlier_one_of_the_same_epoch() -> None:
    orders = NO_ORDERS.amended(Amendment(epoch=5, lr=0.1)).amended(Amendment(epoch=5, target_batch=8))
    assert orders.amendments == (Amendment(epoch=5, lr=0.1, target_batch=8),)
    assert orders.serial == 2


@pytest.mark.parametrize(
    ("change", "may_follow"),
    {
        "a later one": ({"amendments": (Amendment(epoch=12, lr=0.1),)}, True),
        "for an epoch that has begun": ({"amendments": (Amendment(epoch=11, lr=0.1),)}, False),
        "for one that is over": ({"amendments": (Amendment(epoch=3, lr=0.1),)}, False),
        "an evaluation to come": ({"eval_epochs": (12,)}, True),
        "an evaluation in an epoch that may have begun": ({"eval_epochs": (11,)}, False),
        "an evaluation that was missed": ({"eval_epochs": (4,)}, True),
        "a pause": ({"is_paused": True}, True),
        "an older one": ({"serial": 0}, False),
    }.values(),
)
def test_what_has_begun_is_not_changed_by_a_commit_of_epoch_10(change: dict[str, Any], may_follow: bool) -> None:
    assert dataclasses.replace(NO_ORDERS, **{"serial": 1, **change}).may_follow(NO_ORDERS, 10) is may_follow


def test_amendments_in_force_are_not_taken_back() -> None:
    in_force = NO_ORDERS.amended(Amendment(epoch=5, lr=0.1))
    assert not in_force.changed(amendments=()).may_follow(in_force, 10)
    assert in_force.amended(Amendment(epoch=20, lr=0.2)).may_follow(in_force, 10)


def test_signed_orders_come_back_and_are_those_of_one_owner_and_run() -> None:
    raw = sign_orders(ORDERS, RUN, OWNER)
    assert open_orders(raw, RUN, OWNER.peer_id) == ORDERS and len(raw) < MAX_ORDERS_BYTES
    assert open_orders(b"", RUN, OWNER.peer_id) == NO_ORDERS
    for run_id, owner in ((b"s" * 32, OWNER.peer_id), (RUN, Identity.generate().peer_id)):
        with pytest.raises(ValueError, match=r"another run|did not sign"):
            open_orders(raw, run_id, owner)
    for position in range(0, len(raw), 7):
        broken = raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]
        with pytest.raises(ValueError, match="orders"):
            open_orders(broken, RUN, OWNER.peer_id)


def test_orders_that_this_software_does_not_understand_are_refused() -> None:
    message = training_pb2.RunOrders.FromString(ORDERS.to_bytes(RUN))
    payload = message.SerializeToString(deterministic=True) + bytes([0xF8, 0x07, 0x01])  # field 127
    signature = OWNER.sign(b"shardswarm RunOrders 1\0" + payload)
    raw = training_pb2.SignedRunOrders(payload=payload, signature=signature).SerializeToString(deterministic=True)
    with pytest.raises(ValueError, match="install a newer version"):
        open_orders(raw, RUN, OWNER.peer_id)


@pytest.mark.parametrize(
    ("values", "problem"),
    {
        "no epoch": ({"epoch": 0, "lr": 0.1}, "epoch must be a whole number from 1"),
        "negative rate": ({"epoch": 1, "lr": -0.1}, "lr must be positive"),
        "no batch": ({"epoch": 1, "target_batch": 0}, "target_batch must be a whole number from 1"),
        "end in the past": ({"epoch": 9, "num_epochs": 8}, "num_epochs is 8, before epoch 9"),
    }.values(),
)
def test_nonsense_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Amendment(**values)


def test_a_batch_smaller_than_a_microbatch_is_refused_with_the_rules() -> None:
    orders = NO_ORDERS.amended(Amendment(epoch=5, target_batch=3))
    with pytest.raises(ValueError, match="microbatch is 4, more than the target_batch of 3"):
        orders.spec_at(SPEC, 5)


def test_orders_that_came_too_late_do_not_keep_later_ones_from_being_in_force() -> None:
    in_force = NO_ORDERS.amended(Amendment(epoch=5, lr=0.1)).with_eval(9)
    late = in_force.amended(Amendment(epoch=11, lr=0.2)).with_eval(11)
    assert not late.may_follow(in_force, 10)
    assert not late.amended(Amendment(epoch=40, lr=0.3)).may_follow(in_force, 20)
    again = late.rebased(in_force, 10).amended(Amendment(epoch=40, lr=0.3))
    assert again.may_follow(in_force, 10) and [one.epoch for one in again.amendments] == [5, 40]
    assert again.eval_epochs == (9,) and again.serial > late.serial


@given(
    st.lists(AMENDMENTS, max_size=4), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 50), st.integers(0, 8)
)
def test_what_is_rebased_and_names_later_epochs_may_follow(
    amendments: list[Amendment], evals: list[int], now: int, ahead: int
) -> None:
    in_force = newest = NO_ORDERS
    for number, amendment in enumerate(amendments):
        newest = newest.amended(amendment)
        in_force = newest if number % 2 else in_force
    for epoch in evals:
        newest = newest.with_eval(epoch)
    named = now + NOTICE_EPOCHS + ahead
    orders = newest.rebased(in_force, now).amended(Amendment(epoch=max(named, 1), lr=0.5)).with_eval(named)
    assert all(
        orders.may_follow(in_force, epoch)
        for epoch in range(now, now + ahead + 1)
        if epoch + NOTICE_EPOCHS <= named and is_calm(newest, now, named)
    )


def is_calm(newest: Orders, now: int, named: int) -> bool:
    """Nothing that was said before is due until then."""
    due = range(now + NOTICE_EPOCHS, named)
    return not any(one in due for one in (*(a.epoch for a in newest.amendments), *newest.eval_epochs))


def test_orders_of_a_rolled_back_run_may_follow_at_the_checkpoint() -> None:
    """An evaluation and an amendment that were in force at epoch 150 when the run goes back to 100."""
    at_base = NO_ORDERS.with_eval(101).amended(Amendment(epoch=50, lr=0.1))
    at_150 = at_base.amended(Amendment(epoch=120, lr=0.2)).with_eval(152)
    goes_back = at_150.rebased(at_150, 150).changed(rollback=Place(100, b"l" * 32, 1))
    assert goes_back.may_follow(at_base, 100)
    assert goes_back.rebased(at_base, 100).amended(Amendment(epoch=102, lr=0.05)).may_follow(at_base, 100)


def test_a_batch_of_too_many_microbatches_is_refused_with_the_rules() -> None:
    orders = NO_ORDERS.amended(Amendment(epoch=5, target_batch=4 * 2**18))
    assert orders.spec_at(SPEC, 5).target_batch == 4 * 2**18
    with pytest.raises(ValueError, match="an epoch would have 262145 microbatches"):
        orders.amended(Amendment(epoch=5, target_batch=4 * 2**18 + 1)).spec_at(SPEC, 5)
