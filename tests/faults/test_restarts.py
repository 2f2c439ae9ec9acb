"""Members come back from their own disks: nothing is lost, or the run goes back to the newest checkpoint that all stages have."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.client.runs import publish_run
from tests.support.fork_server import ForkServer
from tests.support.one_process_training import samples_of_run, train_in_one_process
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, largest_error, make_run, weights_of_run

NUM_EPOCHS = 32
QUICK = json.dumps({"roll_back_after_s": 4.0, "record_lifetime_s": 6.0})


@contextlib.contextmanager
def running(tmp_path: Path, fork_server: ForkServer, **rules: Any) -> Iterator[TrainingSwarm]:
    values: dict[str, Any] = {"end.epochs": NUM_EPOCHS, "microbatch": 2, **rules}
    store = make_run(tmp_path / "run", **values)
    env = {"TMPDIR": str(tmp_path / "tmp"), "MEMBERSHIP": QUICK}
    (tmp_path / "tmp").mkdir()
    with local_swarm(tmp_path / "swarm", fork_server=fork_server, env=env) as swarm:
        publish_run(store, swarm.initial_peers, 15)
        yield TrainingSwarm(swarm, store, tmp_path / "run")


def last_epoch(training: TrainingSwarm, member: Process) -> int:
    return max(training.steps_of(member), default=-1)


def check_end(training: TrainingSwarm, nodes: list[Process], trainer: Process, timeout_s: float = 90) -> None:
    """All come to the end with the weights that one process has, in one history."""
    members, last = [*nodes, trainer], training.store.spec.num_epochs - 1

    def is_over() -> bool:
        return all(last in training.steps_of(member) for member in members)

    try:
        wait_until(is_over, timeout_s, "the run ends")
    except AssertionError as error:
        logs = "\n".join(f"== {member.log_path.name}\n{member.log[-2500:]}" for member in training.members)
        raise AssertionError(f"{error}\n{logs}") from None
    assert len({training.steps_of(member)[last]["lineage"] for member in members}) == 1
    expected = train_in_one_process(training.store.spec, samples_of_run(training.store, training.folder / "data"))
    error = largest_error(weights_of_run(training, nodes, trainer), expected.weights)
    assert error < 1e-5, f"largest relative error {error:.1e}"


@pytest.mark.parametrize("event", ["receive:Commit", "stepped"])
def test_the_only_replica_of_a_stage_killed_at_a_commit_comes_back_from_its_disk_and_nothing_is_lost(
    tmp_path: Path, fork_server: ForkServer, event: str
) -> None:
    with running(tmp_path, fork_server, keepers=0) as training:
        fault = {"on": event, "from_epoch": 8, "action": "SIGKILL"}
        victim = training.start_node(0, cache=tmp_path / "disk", fault=fault)
        other, trainer = training.start_node(1, cache=tmp_path / "other"), training.start_trainer()
        wait_until(lambda: not victim.is_running(), 60, "the replica dies")
        assert training.faults_of(victim)
        steps_before = last_epoch(training, victim) + 1
        assert steps_before >= 8
        back = training.start_node(0, cache=tmp_path / "disk")
        check_end(training, [back, other], trainer)
        resumed = re.search(r"going on from this disk epoch=(\d+)", back.log)
        # It may have died after a step was in its journal and before it was in its trace.
        assert resumed is not None and int(resumed[1]) - steps_before in (0, 1), back.log[-2000:]
        assert min(training.steps_of(back)) == int(resumed[1])  # it lost no step, and nobody went back
        for member in (back, other, trainer):
            assert all(step["downloads"] == 0 and step["era"] == 0 for step in training.steps_of(member).values())


def test_a_run_whose_newest_state_is_gone_goes_back_to_the_newest_checkpoint_that_all_stages_have(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    with running(tmp_path, fork_server, keepers=1, checkpoint_every=8) as training:
        fault = {"on": "stepped", "from_epoch": 21, "action": "SIGKILL"}
        victim = training.start_node(0, cache=tmp_path / "disk", fault=fault)
        older = training.start_node(0, cache=tmp_path / "older")
        other, trainer = training.start_node(1, cache=tmp_path / "other"), training.start_trainer()
        wait_until(lambda: last_epoch(training, older) >= 17, 60, "a second checkpoint")
        older.send(signal.SIGTERM)
        older.wait(20)
        assert last_epoch(training, older) < 21 and victim.is_running()
        wait_until(lambda: not victim.is_running(), 60, "the last replica of its stage dies")
        assert training.faults_of(victim)
        stood_at = last_epoch(training, trainer) + 1
        shutil.rmtree(tmp_path / "disk")
        back = training.start_node(0, cache=tmp_path / "older")
        check_end(training, [back, other], trainer)
        gone_back = re.search(r"the run goes back from epoch=(\d+) to epoch=(\d+)", trainer.log + other.log + back.log)
        assert gone_back is not None and int(gone_back[2]) == 16 and abs(int(gone_back[1]) - stood_at) <= 1
        assert {training.steps_of(member)[NUM_EPOCHS - 1]["era"] for member in (back, other, trainer)} == {1}


def test_a_stage_whose_only_disk_is_gone_goes_on_from_the_copy_that_another_node_kept(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    with running(tmp_path, fork_server, keepers=1, checkpoint_every=6, **{"end.epochs": 3 * NUM_EPOCHS}) as training:
        victim = training.start_node(0, cache=tmp_path / "disk")
        other, trainer = training.start_node(1, cache=tmp_path / "other"), training.start_trainer()

        def kept() -> list[int]:
            return [int(epoch) for epoch in re.findall(r"copy kept stage=0 epoch=(\d+)", other.log)]

        wait_until(lambda: kept() and last_epoch(training, victim) > max(kept()), 60, "the run is past a kept copy")
        victim.send(signal.SIGKILL)
        victim.wait(20)
        shutil.rmtree(tmp_path / "disk")
        stood_at, copies = last_epoch(training, trainer) + 1, kept()
        newcomer = training.start_node(0, cache=tmp_path / "new disk")
        check_end(training, [newcomer, other], trainer)
        logs = trainer.log + other.log + newcomer.log
        gone_back = re.search(r"the run goes back from epoch=(\d+) to epoch=(\d+)", logs)
        assert gone_back is not None and int(gone_back[2]) in copies and abs(int(gone_back[1]) - stood_at) <= 1
        last = [training.steps_of(member)[training.store.spec.num_epochs - 1] for member in (newcomer, other, trainer)]
        assert {step["era"] for step in last} == {1}


def test_a_whole_swarm_that_was_stopped_goes_on_from_its_disks(tmp_path: Path, fork_server: ForkServer) -> None:
    with running(tmp_path, fork_server, keepers=1, checkpoint_every=5) as training:

        def start() -> list[Process]:
            nodes = [training.start_node(stage, cache=tmp_path / f"disk{stage}") for stage in (0, 1)]
            return [*nodes, training.start_trainer(cache=tmp_path / "trainer")]

        shutil.copytree(tmp_path / "run" / "cache", tmp_path / "trainer")
        first = start()
        wait_until(lambda: last_epoch(training, first[2]) >= 12, 60, "some epochs")
        for member in first:
            member.send(signal.SIGTERM)
        for member in first:
            assert member.wait(30) == 0
        stopped_at = [last_epoch(training, member) + 1 for member in first]
        second = start()
        check_end(training, second[:2], second[2])
        begun = min(min(training.steps_of(member)) for member in second)
        assert begun >= 10 and begun >= min(stopped_at) - 5, "what was done before is not done again"
