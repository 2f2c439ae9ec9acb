"""Every trainer is killed and all their files are gone: nodes keep the ends, and new trainers go on from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.client.runs import publish_run
from tests.support.fork_server import ForkServer
from tests.support.one_process_training import samples_of_run, train_in_one_process
from tests.support.probes import run_program
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, largest_error, make_run, weights_of_run

NUM_EPOCHS = 24
KILLED_IN = 16


def test_new_trainers_go_on_when_all_others_and_their_files_are_gone(
    tmp_path: Path, fault_root: Path, fork_server: ForkServer
) -> None:
    store = make_run(tmp_path / "run", keepers=2, **{"end.epochs": NUM_EPOCHS, "microbatch": 2})
    expected = train_in_one_process(store.spec, samples_of_run(store, tmp_path / "run" / "data"))
    cache = tmp_path / "run" / "cache"
    with local_swarm(tmp_path / "swarm", fork_server=fork_server, env={"TMPDIR": str(fault_root)}) as swarm:
        publish_run(store, swarm.initial_peers, 15)
        training = TrainingSwarm(swarm, store, tmp_path / "run")
        nodes = [training.start_node(stage, cache=tmp_path / f"node{stage}") for stage in (0, 1)]
        wait_until(lambda: all("keeping the ends" in node.log for node in nodes), 40, "both nodes keep the ends")
        first = []
        for number in range(2):
            fault = {
                "on": "hop:0",
                "from_epoch": KILLED_IN,
                "action": "SIGKILL",
                "token": str(tmp_path / f"token{number}"),
            }
            first.append(training.start_trainer(cache=cache, fault=fault))
        wait_until(lambda: not any(trainer.is_running() for trainer in first), 60, "both trainers are dead")
        assert all(training.faults_of(trainer) for trainer in first)
        shutil.rmtree(cache)

        last = training.start_trainer(cache=tmp_path / "new", fault=None)
        wait_until(lambda: NUM_EPOCHS - 1 in training.steps_of(last), 60, f"the run ends:\n{last.log[-2000:]}")
        steps = training.steps_of(last)
        begun = min(steps)
        assert steps[begun]["downloads"] == 1 and begun >= KILLED_IN - 1
        for epoch, step in steps.items():
            assert abs(step["loss"] / expected.losses[epoch] - 1) < 1e-5
        wait_until(lambda: all(NUM_EPOCHS - 1 in training.steps_of(node) for node in nodes), 20, "nodes are there, too")
        error = largest_error(weights_of_run(training, nodes, last), expected.weights)
        assert error < 1e-5, f"largest relative error {error:.1e}"
        last.stop()
        check_export(training, nodes, last, tmp_path)
        for node in nodes:  # what is kept are the trainers' bytes, after every step
            kept = training.steps_of(node, is_keeper=True)
            assert len(kept) >= NUM_EPOCHS - 4
            for trainer in (*first, last):
                for epoch, step in training.steps_of(trainer).items():
                    assert epoch not in kept or kept[epoch]["digest"] == step["digest"]


def check_export(training: TrainingSwarm, nodes: list[Process], trainer: Process, folder: Path) -> None:
    """With no trainer there, what nodes have on their disks makes a checkpoint of the replicas' very bytes."""
    out = folder / "exported"
    arguments = ["export", "--run", training.run_id, "--out", str(out), "--epoch", str(NUM_EPOCHS)]
    arguments += ["--initial-peers", training.swarm.initial_peers[0], "--cache-dir", str(folder / "stranger")]
    done = run_program("swarm", *arguments, fork_server=training.swarm.fork_server)
    assert done.code == 0, done.err
    assert f"epoch {NUM_EPOCHS}, loss" in done.out
    model = AutoModelForCausalLM.from_pretrained(out)
    weights = weights_of_run(training, nodes, trainer)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("Alice was")["input_ids"]
