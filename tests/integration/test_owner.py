"""The owner's hand: a run is paused, amended, evaluated, rolled back and ended by commands, and is what one process makes of those rules."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from swarm.cli import cli
from swarm.identity import Identity
from swarm.run_orders import open_orders
from tests.support.fork_server import ForkServer
from tests.support.one_process_training import samples_of_run, train_in_one_process
from tests.support.probes import Finished
from tests.support.processes import local_swarm, wait_until
from tests.support.training_swarm import ALICE, TrainingSwarm, largest_error, make_run, weights_of_run

Command = Callable[..., Finished]


@pytest.fixture
def training(tmp_path: Path, fork_server: ForkServer) -> Iterator[TrainingSwarm]:
    folder = tmp_path / "run"
    (folder / "held_out").mkdir(parents=True)
    (folder / "held_out" / "held_out.jsonl").write_text(json.dumps({"text": ALICE[0]}) + "\n")
    rules: dict[str, Any] = {
        "end.epochs": 100_000, "optimizer.schedule": "constant", "checkpoint_every": 10,
        "held_out.kind": "jsonl", "held_out.path": "held_out", "eval_every": 0,
    }  # fmt: skip
    with local_swarm(tmp_path, fork_server=fork_server) as swarm:
        yield TrainingSwarm(swarm, make_run(folder, **rules), folder)


@pytest.fixture
def command(training: TrainingSwarm) -> Command:
    """swarm run NAME RUN_ID..., as the owner types it; in this process, which spares it the imports."""

    def run(name: str, *arguments: str, identity: str = "owner") -> Finished:
        common = ["--initial-peers", training.swarm.bootstrap.address, "--cache-dir", str(training.folder / "cache")]
        if name != "status":
            common += ["--identity", str(training.folder / identity)]
        done = CliRunner().invoke(cli, ["run", name, training.run_id, *arguments, *common], prog_name="swarm")
        return Finished(done.exit_code, done.stdout, done.stderr, 0.0)

    return run


def said(done: Finished) -> str:
    assert done.code == 0 and done.err == "", done.err
    return done.out.strip()


def test_a_run_follows_its_owner(training: TrainingSwarm, command: Command) -> None:
    nodes = [training.start_node(0), training.start_node(1), training.start_node(1)]
    nodes[0].ready()  # whoever has an empty cache gets the rules from others
    log = training.folder / "log.jsonl"
    trainer = training.start_trainer(
        "--held-out", str(training.folder / "held_out"), "--log-file", str(log), cache=training.folder / "trainer cache"
    )
    members = [*nodes, trainer]

    def epoch() -> int:
        return max(training.steps_of(trainer), default=-1) + 1

    wait_until(lambda: epoch() > 3, 60, "the run begins")
    told = re.fullmatch(
        r"from epoch (\d+) on: lr 0\.0005, target_batch 12(; the members know it.*)?",
        said(command("amend", "--lr", "0.0005", "--batch", "12")),
    )
    assert told is not None
    amended = int(told[1])
    wait_until(lambda: epoch() > amended + 2, 60, "the amended rules hold")

    told = re.fullmatch(r"epoch (\d+): held-out loss ([\d.]+)", said(command("eval")))
    assert told is not None

    def evaluations() -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in log.read_text().splitlines() if '"validation_loss": null' not in line]
        return [(one["epoch"], round(one["validation_loss"], 4)) for one in lines]

    wait_until(evaluations, 30, "the trainer writes it down, too")
    assert evaluations() == [(int(told[1]), float(told[2]))]

    paused = int(re.fullmatch(r"paused: no epoch after (\d+) begins; .*", said(command("pause")))[1])  # type: ignore[index]
    status = json.loads(said(command("status", "--json")))
    assert status["is_paused"] and status["stands_still"] and status["epoch"] <= paused + 1
    changed = {"epoch": amended, "lr": 0.0005, "target_batch": 12, "num_epochs": None, "data_files": None}
    assert status["amendments"] == [changed]
    assert status["evaluation"] == {"epoch": int(told[1]), "loss": pytest.approx(float(told[2]), abs=1e-4)}
    shown = said(command("status"))
    assert "paused by its owner" in shown and "the run stands still since" in shown
    assert f"amended from epoch {amended} on: lr 0.0005, batch 12" in shown

    # In the pause: one node leaves, another comes, who hears of everything from the others.
    nodes[2].send(signal.SIGTERM)
    nodes[2].wait(30)
    nodes[2] = members[2] = training.start_node(1, cache=training.folder / "other cache")
    assert status["epoch"] <= epoch() <= paused + 1, "it is paused, after the epoch that had begun"

    (training.folder / "data" / "more.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ALICE[:3])
    )
    ahead = str(status["epoch"] + 3)
    told = said(command("amend", "--data", str(training.folder / "data" / "more.jsonl"), "--at", ahead))
    assert re.fullmatch(rf"from epoch {ahead} on: data 1 file\(s\) with \d+ samples; the members know it.*", told), told

    goal = (paused // 10) * 10
    assert said(command("rollback", str(goal))) == f"the run went back to epoch {goal}; it is paused"
    refused = command("rollback", str(goal + 1))
    assert refused.code == 1 and "choose one of " in refused.err and str(goal) in refused.err
    assert said(command("resume")) == f"the run goes on from epoch {goal}"
    wait_until(lambda: int(ahead) + 1 in training.steps_of(nodes[2]), 60, "the newcomer steps, with the other data")
    # Once more to the same checkpoint, and while it trains.
    assert said(command("rollback", str(goal))) == f"the run went back to epoch {goal}"

    def last_steps() -> list[dict[str, Any]]:
        return [[line for line in training.trace_of(member) if "epoch" in line][-1] for member in members]

    wait_until(lambda: (last_steps()[-1]["era"], last_steps()[-1]["epoch"] > int(ahead)) == (2, True), 60, "it goes on")
    end = int(re.match(r"the run ends after (\d+) epochs", said(command("end")))[1])  # type: ignore[index]
    assert trainer.wait(60) == 0
    wait_until(lambda: {line["epoch"] for line in last_steps()} == {end - 1}, 60, "all hear of the end")
    assert len({line["lineage"] for line in last_steps()}) == 1
    wait_until(lambda: "the run is over" in said(command("status")), 60, "the records tell of the end")
    late = command("amend", "--lr", "0.1")
    assert late.code == 1 and f"the run is over, after {end} epochs" in late.err
    # In one process: the rules of before and after the amendment, and what was rolled back never was.
    spec = training.store.spec
    orders = open_orders(
        (training.folder / "other cache" / "runs" / training.run_id / "orders.bin").read_bytes(),
        training.store.run_id, training.store.owner,
    )  # fmt: skip
    (data,) = [amendment.data for amendment in orders.amendments if amendment.data is not None]
    training.store.learn(data)
    expected = train_in_one_process(
        dataclasses.replace(spec, num_epochs=end),
        samples_of_run(training.store, training.folder / "data"),
        orders=orders,
        others={data.manifest_digest: samples_of_run(training.store, training.folder / "data", data)},
    )
    steps = training.steps_of(trainer)
    for number in (0, amended - 1, amended, int(ahead) - 1, int(ahead), end - 1):
        assert steps[number]["loss"] == pytest.approx(expected.losses[number], rel=1e-5)
    assert largest_error(weights_of_run(training, nodes[:2], trainer), expected.weights) < 1e-5


def test_nobody_but_the_owner_steers(training: TrainingSwarm, command: Command) -> None:
    Identity.load_or_create(training.folder / "stranger")
    alone = command("pause")
    assert alone.code == 1 and "nobody who takes part in the run can be reached" in alone.err
    nodes = [training.start_node(None), training.start_node(None)]
    assert {node.ready()["span"] for node in nodes} == {"0:2", "2:4"}, (
        "who starts at the same time takes different stages"
    )
    stranger = command("pause", identity="stranger")
    assert stranger.code == 1 and "only the owner of the run" in stranger.err and "--identity" in stranger.err
    missing = command("pause", identity="missing")
    assert missing.code == 1 and "there is no key in" in missing.err
    small = command("amend", "--batch", "2", "--at", "1")
    assert small.code == 1 and "name epoch 2 or a later one" in small.err
    assert said(command("pause")).startswith("paused: no epoch after 0 begins")
