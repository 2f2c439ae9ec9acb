"""While a run is trained, and afterwards, everybody can generate with it: on weights that stay as they are for a session."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import swarm
from swarm.client.runs import publish_run
from swarm.errors import SwarmError, UserError
from tests.support.fork_server import ForkServer
from tests.support.probes import Finished, run_program
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, make_run

NUM_EPOCHS = 60
EVERY = 15
SHARE = "0.25"
PROMPT = "Alice was"


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Iterator[TrainingSwarm]:
    folder = tmp_path_factory.mktemp("live")
    rules: dict[str, Any] = {"end.epochs": NUM_EPOCHS, "checkpoint_every": EVERY, "keepers": 1, "microbatch": 2}
    store = make_run(folder / "run", **rules)
    with local_swarm(folder / "swarm", fork_server=fork_server) as nodes:
        publish_run(store, nodes.initial_peers, 15)
        started = TrainingSwarm(nodes, store, folder / "run")
        for stage in (0, 1):
            started.start_node(stage, "--serving-share", SHARE, cache=folder / f"node{stage}")
        started.start_trainer()
        yield started


def connect(training: TrainingSwarm, folder: Path, epoch: int | None = None) -> Any:
    name = f"run:{training.run_id}" + ("" if epoch is None else f"@{epoch}")
    return swarm.connect(initial_peers=training.swarm.initial_peers, model=name, cache_dir=folder / "client")


def generate(client: Any, **options: Any) -> list[int]:
    inputs = client.tokenizer()(PROMPT, return_tensors="pt")
    return client.model().generate(**inputs, max_new_tokens=12, do_sample=False, **options)[0].tolist()


def epoch_of(client: Any) -> int:
    return int(client.client.checkpoint.name.partition("@")[2])


def served_epochs(node: Process) -> list[int]:
    return [int(epoch) for epoch in re.findall(r"serving the weights of epoch=(\d+)", node.log)]


def test_a_conversation_keeps_its_weights_while_the_run_goes_on_and_ends_with_a_clear_word(
    training: TrainingSwarm, tmp_path: Path
) -> None:
    nodes = training.members[:2]
    assert [node.ready()["serving_share"] for node in nodes] == [float(SHARE)] * 2
    wait_until(lambda: all(served_epochs(node) for node in nodes), 60, "the first checkpoint is served")
    with connect(training, tmp_path) as client:
        epoch = epoch_of(client)
        assert epoch % EVERY == 0
        model = client.model()
        with model.session(max_length=64):
            first = generate(client)
            assert generate(client) == first, "the same weights give the same text"
            wait_until(
                lambda: all(max(served_epochs(node)) >= epoch + 2 * EVERY for node in nodes), 90, "newer weights"
            )
            with pytest.raises(SwarmError) as caught:  # what was opened goes with the weights
                generate(client)
        assert f"@{epoch}" in str(caught.value) or "weights" in str(caught.value)
        assert client.is_outdated()


def test_the_finished_run_speaks_as_its_export_does(training: TrainingSwarm, tmp_path: Path) -> None:
    nodes, trainer = training.members[:2], training.members[2]
    trainer.wait(120)
    wait_until(lambda: all(NUM_EPOCHS in served_epochs(node) for node in nodes), 30, "the last weights are served")
    with connect(training, tmp_path, NUM_EPOCHS) as client:
        tokens = generate(client)
        assert not client.is_outdated()

    def run_swarm(*arguments: str) -> Finished:
        common = ["--cache-dir", str(tmp_path / "client"), "--initial-peers", training.swarm.initial_peers[0]]
        done = run_program("swarm", *arguments, *common, fork_server=training.swarm.fork_server)
        assert done.code == 0, done.err
        return done

    run_swarm("export", "--run", training.run_id, "--out", str(tmp_path / "out"))
    said = run_swarm("generate", "--run", training.run_id, "--max-new-tokens", "12", "--json", PROMPT)
    assert json.loads(said.out)["token_ids"] == tokens[-12:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = torch.tensor([tokens[: len(tokens) - 12]])
    assert model.generate(inputs, max_new_tokens=12, do_sample=False)[0].tolist() == tokens
    with pytest.raises(UserError, match=rf"epoch {EVERY + 1} of this run is not served; .*{NUM_EPOCHS}"):
        swarm.connect(
            initial_peers=training.swarm.initial_peers,
            model=f"run:{training.run_id}@{EVERY + 1}",
            cache_dir=tmp_path / "client",
            request_timeout_s=3.0,
        )
