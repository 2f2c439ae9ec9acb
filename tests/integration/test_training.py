"""A swarm of real processes trains as one process does: 2 stages x 2 nodes, 2 trainers, the same samples."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from swarm.client.runs import publish_run
from tests.support.fork_server import ForkServer
from tests.support.one_process_training import Outcome, samples_of_run, train_in_one_process
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, largest_error, make_run, weights_of_run


def train(
    folder: Path, fork_server: ForkServer, *, others: str = "", **rules: Any
) -> tuple[TrainingSwarm, list[Process], list[Process]]:
    """Run a swarm of 2 x 2 nodes and 2 trainers to the end of the run. (swarm, nodes, trainers), all stopped.

    others: the version of the protocol that one of each two speaks.
    """
    store = make_run(folder / "run", **{"min_replicas": 2, **rules})
    with local_swarm(folder / "swarm", fork_server=fork_server) as swarm:
        publish_run(store, swarm.initial_peers, 15)
        training = TrainingSwarm(swarm, store, folder / "run")
        versions = ({}, {"VERSION": others} if others else {})
        nodes = [training.start_node(stage, **one) for stage in range(len(store.spec.stages)) for one in versions]
        trainers = [training.start_trainer(**one) for one in versions]
        last = store.spec.num_epochs - 1
        with contextlib.suppress(AssertionError):  # the checks below say more
            wait_until(lambda: all(last in training.steps_of(m) for m in (*nodes, *trainers)), 60, "the run ends")
        return training, nodes, trainers


def check_equal(training: TrainingSwarm, nodes: list[Process], trainers: list[Process], tolerance: float) -> Outcome:
    spec = training.store.spec
    source = samples_of_run(training.store, training.folder / "data")
    expected = train_in_one_process(spec, source)
    members = [*nodes, *trainers]
    steps = {member: training.steps_of(member) for member in members}
    for member in members:
        assert sorted(steps[member]) == list(range(spec.num_epochs)), f"{member.log_path.name}: {member.log[-2000:]}"
    for epoch in range(spec.num_epochs):
        lines = [steps[member][epoch] for member in members]
        for one, other in zip(members[::2], members[1::2], strict=True):
            assert steps[one][epoch]["digest"] == steps[other][epoch]["digest"], f"replicas differ after epoch {epoch}"
        assert all(line["units"] for line in lines), f"somebody added nothing in epoch {epoch}"
        assert {line["members"] for line in lines} == {len(members)} and {line["lineage"] for line in lines} == {
            lines[0]["lineage"]
        }
        assert abs(lines[0]["loss"] / expected.losses[epoch] - 1) < tolerance
    assert all(step["downloads"] == 0 for lines in steps.values() for step in lines.values())
    error = largest_error(weights_of_run(training, nodes[::2], trainers[0]), expected.weights)
    print(f"largest relative error {error:.1e}, loss {expected.losses[0]:.3f} to {expected.losses[-1]:.3f}")
    assert error < tolerance
    return expected


def test_a_swarm_trains_as_one_process_does(tmp_path: Path, fork_server: ForkServer) -> None:
    """fp32, tied embeddings, clipping active, unequal loss masks (padded samples), four microbatches of a trainer under way."""
    rules = {"end.epochs": 30, "microbatch": 1, "optimizer.lr": 5e-3, "optimizer.clip_norm": 0.5}
    config = {"tie_word_embeddings": True}
    expected = check_equal(*train(tmp_path, fork_server, config=config, **rules), tolerance=1e-5)
    assert expected.losses[-1] < 0.8 * expected.losses[0]


@pytest.mark.parametrize(
    ("rules", "tolerance"),
    [
        pytest.param({"delay": 1, "optimizer.clip_norm": 0.5}, 1e-5, id="one epoch of delay"),
        # bf16 has 8 bits: gradients differ by 2**-8 in their smaller parts, and AdamW turns each into a step of about lr.
        pytest.param(
            {"precision": "bf16", "averaging": "bf16", "microbatch": 2, "target_batch": 14}, 3e-2, id="bf16 autocast"
        ),
    ],
)
def test_other_rules_give_the_same_weights_too(
    tmp_path: Path, fork_server: ForkServer, rules: dict[str, Any], tolerance: float
) -> None:
    check_equal(*train(tmp_path, fork_server, **{"end.epochs": 8, **rules}), tolerance=tolerance)


def test_adapters_are_trained_as_peft_does_in_one_process(tmp_path: Path, fork_server: ForkServer) -> None:
    """Blocks and ends are frozen: the ends' members sum vectors of no values."""
    rules = {"trainable": "lora", "lora.rank": 4, "optimizer.lr": 2e-2, "optimizer.clip_norm": 0.1, "end.epochs": 6}
    training, nodes, trainers = train(tmp_path, fork_server, **rules)
    expected = check_equal(training, nodes, trainers, tolerance=1e-5)
    assert {step["size"] for step in training.steps_of(trainers[0]).values()} == {0}
    assert expected.losses[-1] < expected.losses[0]


@pytest.mark.parametrize("wrong", ["dropped", "doubled", "unweighted"])
def test_a_wrong_sum_would_be_seen(tmp_path: Path, wrong: str) -> None:
    """The bugs that the tests above are for, planted into the oracle: each is a hundred times the tolerance away."""
    store = make_run(tmp_path, **{"end.epochs": 3})
    source = samples_of_run(store, tmp_path / "data")
    right = train_in_one_process(store.spec, source)
    planted = train_in_one_process(store.spec, source, wrong=wrong)
    assert largest_error(planted.weights, right.weights) > 1e-3


def test_neighbouring_versions_hold_one_round_and_others_refuse(tmp_path: Path, fork_server: ForkServer) -> None:
    training, nodes, trainers = train(tmp_path, fork_server, others="1.9", **{"end.epochs": 4})
    check_equal(training, nodes, trainers, tolerance=1e-5)
    newer = [
        member
        for member in (*nodes, *trainers)
        if any("unknown_letter_to" in line for line in training.trace_of(member))
    ]
    assert newer and set(newer) <= {nodes[1], nodes[3], trainers[1]}
    with local_swarm(tmp_path / "two", fork_server=fork_server) as swarm:
        training = TrainingSwarm(swarm, make_run(tmp_path / "second"), tmp_path / "second")
        first, foreign = training.start_node(0), training.start_node(1, VERSION="2.0")
        wait_until(lambda: "speak protocol 2, this software speaks 1" in first.log, 60, "one side says why")
        wait_until(lambda: "speak protocol 1, this software speaks 2" in foreign.log, 60, "and so does the other")
        training.start_trainer()
        wait_until(lambda: "speaks another version of the protocol" in foreign.log, 60, "streams are refused, too")
        assert not any(training.steps_of(member) for member in training.members)


def test_int8_averaging_learns_as_well_at_a_quarter_of_the_bytes(tmp_path: Path, fork_server: ForkServer) -> None:
    training, nodes, trainers = train(tmp_path, fork_server, averaging="int8", **{"end.epochs": 20})
    last = training.store.spec.num_epochs - 1
    expected = train_in_one_process(training.store.spec, samples_of_run(training.store, training.folder / "data"))
    for pair in (nodes[:2], nodes[2:], trainers):
        one, other = (training.steps_of(member)[last] for member in pair)
        assert one["digest"] == other["digest"]
        # Of two replicas each sends half of the vector to be summed, and a half that it summed.
        ideal = 2 * (2 - 1) / 2 * 4 * one["size"] * (last + 1)
        sent = (one["bytes"] + other["bytes"]) / 2
        print(f"bytes sent: {sent / ideal:.3f} of float32's")
        assert sent < 0.28 * ideal
    loss = training.steps_of(nodes[0])[last]["loss"]
    print(f"loss {loss:.4f}, with float32 {expected.losses[last]:.4f}")
    assert abs(loss / expected.losses[last] - 1) < 0.01
