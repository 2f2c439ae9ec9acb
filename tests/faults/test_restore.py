"""All members of a run and all their disks are gone, but for an export: on an empty swarm the run goes on from it as if nothing had been."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from swarm.cli import cli
from swarm.run_store import RunStore
from tests.faults.test_restarts import running
from tests.support.fork_server import ForkServer
from tests.support.one_process_training import samples_of_run, train_in_one_process
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, largest_error, weights_of_run

NUM_EPOCHS = 32
EVERY = 8
STOPPED_IN = 20


def start_export(training: TrainingSwarm, out: Path, *flags: str) -> Process:
    """swarm export --every, from a machine that knows the run's id alone."""
    command = [sys.executable, "-m", "swarm", "export", "--run", training.run_id, "--out", str(out)]
    command += ["--every", str(EVERY), *flags, "--initial-peers", training.swarm.initial_peers[0]]
    command += ["--cache-dir", str(out.parent / "exporter")]
    number = len(training.swarm.processes)
    log_path, swarm = training.folder / f"export{number}.log", training.swarm
    process = Process(command, log_path, swarm.env, swarm.fork_server)
    swarm.processes.append(process)
    return process


def exported(out: Path) -> list[int]:
    """Epochs; nothing but whole checkpoints may be there."""
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith(".partial-"))
    return [int(name.removeprefix("epoch-")) for name in names]


def restore(folder: Path, cache: Path, swarm_address: str, *flags: str) -> str:
    command = ["run", "restore", str(folder), "--cache-dir", str(cache), "--initial-peers", swarm_address, *flags]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    return done.stderr


def test_a_run_goes_on_from_an_export_when_all_its_members_and_their_disks_are_gone(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    out, lost = tmp_path / "exports", tmp_path / "lost"
    rules = {"end.epochs": NUM_EPOCHS, "checkpoint_every": EVERY, "keepers": 1, "microbatch": 4}
    with running(lost, fork_server, **rules) as first:
        exporter = start_export(first, out)
        nodes = [first.start_node(stage, cache=lost / f"node{stage}") for stage in (0, 1)]
        wait_until(lambda: any("keeping the ends" in node.log for node in nodes), 60, "a node keeps the ends")
        trainer = first.start_trainer(fault={"on": "stepped", "from_epoch": STOPPED_IN, "action": "SIGKILL"})
        wait_until(
            lambda: out.exists() and len(exported(out)) == 2, 60, f"two checkpoints are exported\n{exporter.log}"
        )
        wait_until(lambda: not trainer.is_running(), 60, "the trainer dies")
        assert first.faults_of(trainer)
        for member in nodes:
            member.send(signal.SIGKILL)
        exporter.send(signal.SIGTERM)
        assert exporter.wait(20) == 0 and "Traceback" not in exporter.log, exporter.log
        assert exported(out) == [EVERY, 2 * EVERY] and not list(out.glob(".*"))
        begun = 2 * EVERY
    data = lost / "run" / "data"
    data.rename(tmp_path / "data")
    shutil.rmtree(lost)
    (tmp_path / "again").mkdir()

    with local_swarm(tmp_path / "again" / "swarm", fork_server=fork_server) as swarm:
        checkpoint, address = out / f"epoch-{begun:06}", swarm.initial_peers[0]
        told = restore(checkpoint, tmp_path / "one", address, "--stage", "0")
        assert "--blocks 0:2" in told and "Restore elsewhere, with --stage:  1, ends" in told, told
        restore(checkpoint, tmp_path / "two", address, "--stage", "1", "--stage", "ends")
        (run,) = (tmp_path / "two" / "runs").iterdir()
        store = RunStore.open(bytes.fromhex(run.name), tmp_path / "two")
        again = TrainingSwarm(swarm, store, tmp_path / "again")
        nodes = [again.start_node(0, cache=tmp_path / "one"), again.start_node(1, cache=tmp_path / "two")]
        newcomer = again.start_node(1, cache=tmp_path / "elsewhere")  # knows nothing but the run's id
        trainer = again.start_trainer("--data", str(tmp_path / "data"), cache=tmp_path / "two")
        exporter = start_export(again, out, "--keep", "2")
        members = [*nodes, newcomer, trainer]
        wait_until(
            lambda: all(NUM_EPOCHS - 1 in again.steps_of(member) for member in members),
            90,
            "the run ends\n" + "\n".join(member.log[-2000:] for member in members),
        )
        for member in (*nodes, trainer):
            steps = again.steps_of(member)
            assert min(steps) == begun and all(step["downloads"] == 0 and step["era"] == 0 for step in steps.values())
        lasts = [again.steps_of(member)[NUM_EPOCHS - 1] for member in members]
        assert len({last["lineage"] for last in lasts}) == 1 and lasts[1]["digest"] == lasts[2]["digest"]
        expected = train_in_one_process(store.spec, samples_of_run(store, tmp_path / "data"))
        weights = weights_of_run(again, nodes, trainer)
        error = largest_error(weights, expected.weights)
        assert error < 1e-5, f"largest relative error {error:.1e}"

        assert exporter.wait(30) == 0, exporter.log  # it ends with the run
        assert exported(out) == [NUM_EPOCHS - EVERY, NUM_EPOCHS]
        loaded = dict(AutoModelForCausalLM.from_pretrained(out / f"epoch-{NUM_EPOCHS:06}").named_parameters())
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
