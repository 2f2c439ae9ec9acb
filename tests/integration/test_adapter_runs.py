"""Adapter runs from end to end: PEFT loads what is exported, and it says what the swarm says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm
from swarm.client.export import export_run
from swarm.client.runs import publish_run
from tests.support.fork_server import ForkServer
from tests.support.models import save_tiny
from tests.support.processes import local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, make_run

NUM_EPOCHS = 6
PROMPT = "Alice was"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "base")


def adapter_run(folder: Path, base: Path, **rules: Any) -> Any:
    lora = {"trainable": "lora", "lora.rank": 4, "optimizer.lr": 3e-2, "model.weights": str(base), "model.seed": 1}
    saving = {"end.epochs": NUM_EPOCHS, "checkpoint_every": 3, "keepers": 1}
    return make_run(folder, **{**lora, **saving, **rules})


def greedy(model: Any, tokenizer: Any) -> list[int]:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    return list(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist())


def test_the_exported_adapter_says_what_the_swarm_says(tmp_path: Path, fork_server: ForkServer, base: Path) -> None:
    store = adapter_run(tmp_path / "run", base)
    with local_swarm(tmp_path / "swarm", fork_server=fork_server) as nodes:
        publish_run(store, nodes.initial_peers, 15)
        training = TrainingSwarm(nodes, store, tmp_path / "run")
        members = [training.start_node(stage, cache=tmp_path / f"node{stage}") for stage in (0, 1)]
        trainer = training.start_trainer()
        trainer.wait(60)
        served = f"serving the weights of epoch={NUM_EPOCHS}"
        wait_until(lambda: all(served in member.log for member in members), 30, "the last adapters are served")
        client_cache, peers = tmp_path / "client", nodes.initial_peers
        exported = export_run(store.run_id, peers, tmp_path / "out", cache_dir=client_cache)
        with swarm.connect(
            initial_peers=peers, model=f"run:{training.run_id}@{NUM_EPOCHS}", cache_dir=client_cache
        ) as client:
            said = greedy(client.model(), client.tokenizer())
    assert exported.place.epoch == NUM_EPOCHS
    plain = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    before = greedy(plain, tokenizer)
    assert greedy(PeftModel.from_pretrained(plain, tmp_path / "out"), tokenizer) == said
    assert said != before, "the adapter changed nothing"
