"""A replica's ledger over its sum of gradients: each microbatch once, and nothing of a ledger that was voided."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from swarm.epoch.ledger import Added, AddTag, Ledger
from swarm.epoch.messages import Place, Term
from swarm.run_spec import OptimizerSettings
from swarm.training.parameters import GradientSum, StageParameters

PLACE, TERM = Place(3, b"l" * 32), Term(1, "leader")


class Replica:
    """A sum of three numbers, and the ledger over it."""

    def __init__(self) -> None:
        parameters = StageParameters([("weight", nn.Parameter(torch.zeros(3)))], OptimizerSettings())
        self.sum = GradientSum(parameters)
        ids = itertools.count(1)
        self.ledger = Ledger(lambda: next(ids), self.sum.clear)
        self.ledger.open(PLACE)
        self.ledger.obey(TERM)

    def tag(self, unit: int) -> AddTag:
        return AddTag(PLACE, TERM, self.ledger.ledger_id, unit)

    def add(self, tag: AddTag, value: float) -> Added:
        return self.ledger.add(tag, lambda: self.sum.add([torch.full((3,), value)]))

    @property
    def total(self) -> float:
        assert len(set(self.sum.vector.tolist())) == 1
        return float(self.sum.vector[0])


def test_a_repeated_microbatch_is_not_added() -> None:
    replica = Replica()
    assert [replica.add(replica.tag(unit), 10.0**unit) for unit in (0, 1, 1, 0)] == [
        Added.NOW,
        Added.NOW,
        Added.BEFORE,
        Added.BEFORE,
    ]
    assert replica.total == 11 and replica.ledger.units == {0, 1}


def test_a_gradient_that_cannot_be_added_leaves_nothing_behind() -> None:
    replica = Replica()
    with pytest.raises(RuntimeError):
        replica.ledger.add(replica.tag(0), lambda: replica.sum.add([torch.ones(4)]))
    assert replica.total == 0 and replica.ledger.units == set()
    assert replica.add(replica.tag(0), 1.0) is Added.NOW


def test_a_voided_ledger_is_empty_and_takes_nothing_that_was_meant_for_the_old_one() -> None:
    replica = Replica()
    old = replica.tag(0)
    replica.add(old, 1.0)
    replica.ledger.void()
    assert replica.total == 0 and replica.ledger.units == set()
    assert [replica.add(old, 1.0), replica.add(replica.tag(0), 2.0)] == [Added.OUTDATED, Added.NOW]
    assert replica.total == 2


def test_nothing_is_added_to_a_frozen_ledger_or_for_another_epoch_or_leader() -> None:
    replica = Replica()
    now = replica.tag(0)
    strangers = [
        AddTag(Place(4, PLACE.lineage), TERM, now.ledger_id, 0),
        AddTag(Place(3, b"x" * 32), TERM, now.ledger_id, 0),
        AddTag(PLACE, Term(2, "other"), now.ledger_id, 0),
    ]
    assert [replica.add(tag, 1.0) for tag in strangers] == [Added.OUTDATED] * 3
    replica.ledger.freeze(True)
    assert replica.add(now, 1.0) is Added.OUTDATED
    replica.ledger.freeze(False)
    assert replica.ledger.accepts(now) is Added.NOW and replica.total == 0
    assert replica.add(now, 1.0) is Added.NOW and replica.total == 1
