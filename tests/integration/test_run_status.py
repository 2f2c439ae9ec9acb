"""A small training run as people see it: `swarm status --run`, and a trainer that is driven from Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from swarm.cli import cli
from swarm.client.runs import publish_run
from tests.integration.test_examples import run_example
from tests.support.fork_server import ForkServer
from tests.support.probes import Finished
from tests.support.processes import local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, make_run

NUM_EPOCHS = 4


@pytest.fixture(scope="module")
def training(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingSwarm]:
    """A run of which only the rules are there."""
    folder = tmp_path_factory.mktemp("status")
    store = make_run(folder / "run", **{"end.epochs": NUM_EPOCHS})
    with local_swarm(folder / "swarm", fork_server=fork_server) as swarm:
        publish_run(store, swarm.initial_peers, 15)
        yield TrainingSwarm(swarm, store, folder / "run")


@pytest.fixture
def status(training: TrainingSwarm, tmp_path: Path) -> Callable[..., Finished]:
    """status(flags): from a machine that has never heard of the run."""
    peers = ["--initial-peers", training.swarm.bootstrap.address, "--cache-dir", str(tmp_path)]

    def run(*flags: str) -> Finished:
        """In this process, which spares it the imports."""
        done = CliRunner().invoke(cli, ["status", "--run", training.run_id, *peers, *flags], prog_name="swarm")
        return Finished(done.exit_code, done.stdout, done.stderr, 0.0)

    return run


def answer_of(done: Finished) -> dict[str, Any]:
    assert done.code == 0 and done.err == "", done
    answer: dict[str, Any] = json.loads(done.out)
    return answer


def test_a_run_that_nobody_takes_part_in_lacks_everything(
    training: TrainingSwarm, status: Callable[..., Finished]
) -> None:
    done = status()
    assert done.code == 0 and done.err == "", done
    assert f"({training.run_id[:8]}): nobody takes part, {NUM_EPOCHS} epochs to train" in done.out
    commands = [line.split(": ", 2)[2] for line in done.out.splitlines() if line.startswith("warning: no ")]
    where = f"--initial-peers {training.swarm.bootstrap.address}"
    node = f"swarm-node run --run {training.run_id}"
    assert commands == [
        f"{node} --blocks 0:2 {where}",
        f"{node} --blocks 2:4 {where}",
        f"swarm train {training.run_id} {where}",
    ]


def test_a_stage_without_a_replica_is_seen_and_gone_when_the_command_was_followed(
    training: TrainingSwarm, status: Callable[..., Finished]
) -> None:
    first = training.start_node(0)
    first.ready()
    answer = answer_of(status("--json"))
    assert [[one["peer_id"] for one in stage["members"]] for stage in answer["stages"]] == [[first.peer_id], []]
    assert (answer["epoch"], answer["num_epochs"], answer["loss"], answer["is_over"]) == (0, NUM_EPOCHS, None, False)
    assert [warning.split(":")[0] for warning in answer["warnings"]] == [
        "no replica of stage 1 (blocks 2",
        "no trainer",
    ]
    second = training.start_node(None)
    assert second.ready()["span"] == "2:4", "it takes the stage that nobody has"
    (warning,) = answer_of(status("--json"))["warnings"]
    assert warning.startswith("no trainer")


def test_an_example_trains_the_run_to_its_end_and_status_says_so(
    training: TrainingSwarm, status: Callable[..., Finished], fork_server: ForkServer
) -> None:
    done = run_example(
        fork_server, "train_from_python.py", training.run_id, "--initial-peers", training.swarm.bootstrap.address,
        "--data", str(training.folder / "data"), "--cache-dir", str(training.folder / "cache"), "--threads", "1",
    )  # fmt: skip
    assert done.code == 0 and done.err == "", done.err
    rules, *epochs, counted = done.out.splitlines()
    assert rules == f"run: 2 stages, {NUM_EPOCHS} epochs, 8 samples each"
    assert [line.split(": loss")[0] for line in epochs] == [f"epoch {number}" for number in range(NUM_EPOCHS)]
    assert all(line.endswith(" 3 members") for line in epochs)
    assert counted == f"this trainer ran {8 * NUM_EPOCHS} microbatches"
    last_loss = float(epochs[-1].split()[3].rstrip(","))

    def is_over() -> bool:  # records are renewed each 10 s
        answer = answer_of(status("--json"))
        return bool(answer["is_over"] and answer["loss"] == pytest.approx(last_loss, abs=1e-4))

    wait_until(is_over, 40, "the records tell the end of the run")
    done = status()
    assert f"{NUM_EPOCHS} of {NUM_EPOCHS} epochs done" in done.out and "the run is over" in done.out
    assert "warning" not in done.out
