"""Training under fire: whoever is killed or frozen, and whenever, the run goes on and ends with the weights of an undisturbed one.

Every fault fires on an event of its victim, once, in the first member that gets there (tests/support/training_member.py).
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from swarm.client.runs import publish_run
from tests.support.fork_server import ForkServer
from tests.support.one_process_training import samples_of_run, train_in_one_process
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, largest_error, make_run, weights_of_run

NUM_EPOCHS = 8
# From the fault to the next step of the others: a frozen peer is found after 6 s without an answer to a ping.
BOUND_S = 25.0


class Field:
    """A running swarm of 2 x 2 nodes and 2 trainers with a fault planted in some of them."""

    def __init__(self, training: TrainingSwarm, nodes: list[Process], trainers: list[Process]) -> None:
        self.training, self.nodes, self.trainers = training, nodes, trainers
        self.victim: Process | None = None

    @property
    def members(self) -> list[Process]:
        return [*self.nodes, *self.trainers]

    @property
    def survivors(self) -> list[Process]:
        return [member for member in self.members if member is not self.victim]

    def wait_for_fault(self) -> Process:
        wait_until(lambda: self.training.victim() is not None, 60, "the fault fires")
        self.victim = self.training.victim()
        assert self.victim is not None
        return self.victim

    def epoch_of(self, member: Process) -> int:
        return max(self.training.steps_of(member), default=-1)

    def wait_for_progress(self) -> float:
        """Seconds until the survivors have made a step that the victim has no part in."""
        started, before = time.monotonic(), max(self.epoch_of(member) for member in self.survivors)
        target = min(before + 2, NUM_EPOCHS - 1)
        wait_until(lambda: all(self.epoch_of(member) >= target for member in self.survivors), 60, "the survivors go on")
        return time.monotonic() - started

    def wait_for_end(self, members: list[Process]) -> None:
        def over() -> bool:
            return all(self.epoch_of(member) >= NUM_EPOCHS - 1 for member in members)

        try:
            wait_until(over, 90, "the run ends")
        except AssertionError as error:
            logs = "\n".join(f"== {member.log_path.name}\n{member.log[-1500:]}" for member in self.members)
            raise AssertionError(f"{error}\n{logs}") from None

    def check_weights(self, members: list[Process]) -> None:
        """The weights at the end are those of an undisturbed run; replicas that ended hold the same bytes."""
        training = self.training
        expected = train_in_one_process(training.store.spec, samples_of_run(training.store, training.folder / "data"))
        ended = [member for member in members if (training.steps_of(member).keys() >= {NUM_EPOCHS - 1})]
        nodes = [next(m for m in self.nodes[2 * s : 2 * s + 2] if m in ended) for s in range(2)]
        trainer = next(m for m in self.trainers if m in ended)
        error = largest_error(weights_of_run(training, nodes, trainer), expected.weights)
        assert error < 1e-5, f"largest relative error {error:.1e}"
        for pair in (self.nodes[:2], self.nodes[2:], self.trainers):
            digests = {training.steps_of(m)[NUM_EPOCHS - 1]["digest"] for m in pair if m in ended}
            assert len(digests) == 1


@pytest.fixture
def start(tmp_path: Path, fault_root: Path, fork_server: ForkServer) -> Any:
    """start(nodes=fault, trainers=fault, **rules): a context with a Field."""
    import contextlib

    @contextlib.contextmanager
    def field(nodes: Any = None, trainers: Any = None, **rules: Any) -> Any:
        store = make_run(
            tmp_path / "run", min_replicas=2, **{"end.epochs": NUM_EPOCHS, "optimizer.clip_norm": 0.5, **rules}
        )
        env = {"TMPDIR": str(fault_root)}
        with local_swarm(tmp_path / "swarm", fork_server=fork_server, env=env) as swarm:
            publish_run(store, swarm.initial_peers, 15)
            training = TrainingSwarm(swarm, store, tmp_path / "run")
            yield Field(
                training,
                [training.start_node(stage, fault=nodes) for stage in (0, 0, 1, 1)],
                [training.start_trainer(fault=trainers) for _ in range(2)],
            )

    return field


def test_a_trainer_killed_between_the_backwards_of_two_stages(start: Any) -> None:
    with start(trainers={"on": "hop:1", "from_epoch": 1, "at": 2, "action": "SIGKILL"}) as field:
        assert field.wait_for_fault() in field.trainers
        assert field.wait_for_progress() < BOUND_S
        field.wait_for_end(field.survivors)
        field.check_weights(field.survivors)


def test_a_replica_killed_with_a_full_ledger(start: Any) -> None:
    with start(nodes={"on": "average", "from_epoch": 2, "action": "SIGKILL"}) as field:
        assert field.wait_for_fault() in field.nodes
        assert field.wait_for_progress() < BOUND_S
        field.wait_for_end(field.survivors)
        field.check_weights(field.survivors)
        steps = field.training.steps_of(field.survivors[0]).values()
        assert any(step["attempt"] > 0 or step["term"] > 1 for step in steps), "a round was abandoned"


def test_a_replica_that_wakes_up_after_it_was_fenced(start: Any) -> None:
    with start(nodes={"on": "added", "from_epoch": 1, "at": 2, "action": "SIGSTOP"}) as field:
        victim = field.wait_for_fault()
        assert field.wait_for_progress() < BOUND_S
        victim.send(signal.SIGCONT)
        field.wait_for_end(field.survivors)
        wait_until(lambda: field.epoch_of(victim) == NUM_EPOCHS - 1, 60, "the victim catches up")
        field.check_weights(field.survivors)


@pytest.mark.parametrize(
    "moment", ["send:Prepare", "send:Commit", "sent:Commit"], ids=["before the commit", "during it", "after it"]
)
def test_a_coordinator_killed(start: Any, moment: str) -> None:
    """Before: with every report still to come. During: with one letter of the Commit sent. After: with all of them sent."""
    fault = {"on": moment, "from_epoch": 1, "at": 2 if moment == "send:Commit" else 1, "action": "SIGKILL"}
    with start(nodes=fault, trainers=fault) as field:
        field.wait_for_fault()
        assert field.wait_for_progress() < BOUND_S
        field.wait_for_end(field.survivors)
        field.check_weights(field.survivors)


def test_replicas_without_samples_take_part(start: Any) -> None:
    with start(**{"target_batch": 4, "microbatch": 4}) as field:
        field.wait_for_end(field.members)
        field.check_weights(field.members)
        for pair in (field.nodes[:2], field.nodes[2:]):
            units = [field.training.steps_of(node)[3]["units"] for node in pair]
            assert sorted(map(len, units)) == [0, 1]
