"""Disks that fill up, and files on them that are not what they should be: the run goes on, and no wrong state gets into it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from node.training.stage import TrainableStage
from swarm.epoch.messages import Commit, Term
from swarm.identity import Identity
from swarm.run_store import RunStore
from swarm.training.initial import open_initial_weights
from swarm.training.parameters import StageParameters
from swarm.training.saved_states import SavedStates
from swarm.training.wire import sign_commit
from tests.faults.test_restarts import check_end, last_epoch, running
from tests.support.fork_server import ForkServer
from tests.support.processes import Process, wait_until
from tests.support.training_swarm import TrainingSwarm, make_run

DISK_BYTES = 4 * 2**20
"""Some 20 states of a stage."""
NOT_SAVED = re.compile(
    r"state not saved epoch=(\d+) reason=saving the state of epoch (\d+) needs ([\d,]+) bytes in (\S+) and ([\d,]+) are free "
    r"\(No space left on device\): free some space, .*"
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room, also none that has become free since the last call."""
    filler = disk / "filler"
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while os.write(descriptor, bytes(4096)):
            pass
    except OSError:  # full
        return filler
    finally:
        os.close(descriptor)
    raise AssertionError("a disk without end")


def parameters_of(store: RunStore) -> StageParameters:
    """Of stage 0, as at the run's start."""
    return TrainableStage(open_initial_weights(store.spec), store.spec, 0).parameters


def states_of(training: TrainingSwarm, cache: Path) -> SavedStates:
    return SavedStates(cache / "runs" / training.run_id / "states", training.store.run_id, 0)


def saved_epochs(member: Process) -> list[int]:
    """In the order of the log, and -1 where one was not saved."""
    return [int(epoch) if epoch else -1 for epoch in re.findall(r"state (?:saved epoch=(\d+)|not saved)", member.log)]


@pytest.mark.parametrize("is_alone", [False, True], ids=["with a replica", "the only replica"])
def test_a_node_whose_disk_fills_up_says_so_and_trains_on_and_saves_again_when_there_is_room(
    tmp_path: Path, small_disk: Path, fork_server: ForkServer, is_alone: bool
) -> None:
    rules = {"checkpoint_every": 4, "end.epochs": 2000}  # it is left before its end
    with running(tmp_path, fork_server, **rules) as training:
        node = training.start_node(0, cache=small_disk)
        if not is_alone:
            training.start_node(0, cache=tmp_path / "replica")
        training.start_node(1, cache=tmp_path / "other")
        training.start_trainer()
        wait_until(lambda: len(saved_epochs(node)) >= 2, 60, "two states are saved")

        def is_told() -> bool:
            fill(small_disk)  # pruning makes room
            return NOT_SAVED.search(node.log) is not None

        wait_until(is_told, 60, "a state cannot be saved")
        told = NOT_SAVED.search(node.log)
        assert told is not None and told[1] == told[2]
        failed_at = int(told[1])
        needed, free = (int(number.replace(",", "")) for number in (told[3], told[5]))
        states, parameters = states_of(training, small_disk), parameters_of(training.store)
        assert told[4] == str(states.folder) and free < needed
        newest = states.newest_whole(parameters)
        assert newest is not None and 4 <= newest[0].place.epoch != failed_at
        assert newest[0].num_bytes <= needed + 64  # numbers in the header differ in length
        steps_before = last_epoch(training, node)
        wait_until(lambda: last_epoch(training, node) > max(steps_before, failed_at) + 4, 60, "the run goes on")

        (small_disk / "filler").unlink()
        wait_until(lambda: saved_epochs(node)[-1] > failed_at, 60, "a later state is saved")
        node.send(signal.SIGTERM)
        assert node.wait(20) == 0
        assert saved_epochs(node)[-1] - (last_epoch(training, node) + 1) in (
            0,
            1,
        )  # a last step may not be in its trace
        newest = states.newest_whole(parameters)
        assert newest is not None and newest[0].place.epoch == saved_epochs(node)[-1]
        assert "Traceback" not in node.log, node.log


def truncate(path: Path, folder: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero_end(path: Path, folder: Path) -> None:
    """What a file system may leave of a file when the power goes: its size, but not all of its bytes."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


def put_foreign(path: Path, folder: Path) -> None:
    """Another run's state, whole, for a stage of that size."""
    store = make_run(folder, **{"model.seed": 4})
    leader = Identity.generate()
    term = Term(1, leader.peer_id)
    commit = Commit(20, b"p" * 32, term, 0, 100, 1.5, False, (b"d" * 32,) * 3, ((leader.peer_id, 0),), 2.5)
    commit = sign_commit(commit, store.run_id, leader)
    saved = SavedStates(folder / "states", store.run_id, 0).save(commit.after, commit, parameters_of(store).state)
    shutil.copyfile(saved.path, path)


TORN = (truncate, r"it has \d+ bytes and should have \d+")
ZEROED = (zero_end, "the vectors do not have the digest that the header names")
FOREIGN = (put_foreign, r"it is of stage 0 of run [0-9a-f]{64}")


@pytest.mark.parametrize(
    ("damages", "is_alone"), [((TORN, FOREIGN), False), ((ZEROED,), True)], ids=["with a replica", "the only replica"]
)
def test_a_saved_state_that_is_torn_or_of_another_run_is_named_and_not_used(
    tmp_path: Path,
    fork_server: ForkServer,
    damages: tuple[tuple[Callable[[Path, Path], None], str], ...],
    is_alone: bool,
) -> None:
    with running(tmp_path, fork_server, checkpoint_every=5) as training:
        first = training.start_node(0, cache=tmp_path / "disk")
        if not is_alone:
            training.start_node(0, cache=tmp_path / "replica")
        # Without copies on another's disk: the run would go back to one of them.
        other, trainer = training.start_node(1, "--no-copies", cache=tmp_path / "other"), training.start_trainer()
        wait_until(lambda: last_epoch(training, first) >= 12, 60, "some epochs")
        first.send(signal.SIGTERM)
        assert first.wait(20) == 0
        *newer, oldest = states_of(training, tmp_path / "disk").found()
        assert len(newer) >= len(damages) and newer[0].place.epoch - last_epoch(training, first) in (1, 2)
        damaged = list(zip(newer, itertools.cycle(damages)))
        for number, (saved, (damage, _)) in enumerate(damaged):
            damage(saved.path, tmp_path / f"foreign{number}")
        back = training.start_node(0, cache=tmp_path / "disk")
        check_end(training, [back, other], trainer)

        for saved, (_, reason) in damaged:
            (line,) = (line for line in back.log.splitlines() if saved.path.name in line)
            assert " W " in line and re.search(reason, line), line
        assert f"going on from this disk epoch={oldest.place.epoch}\n" in back.log
        assert "Traceback" not in back.log
        last = max(training.steps_of(trainer).values(), key=lambda step: step["epoch"])
        if is_alone:  # nobody has the newest state any more
            goes_back = f"to epoch={oldest.place.epoch}: nobody has the newest state of stages=0"
            assert goes_back in trainer.log + other.log + back.log
            assert (
                last["era"] >= 1
            )  # first to what the record of the node's first life, which is left for a while, names
        else:
            assert max(step["downloads"] for step in training.steps_of(back).values()) >= 1
            assert last["era"] == 0
