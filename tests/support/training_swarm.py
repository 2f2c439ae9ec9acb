"""A whole training run on this machine: bootstrap, nodes and trainers as processes, its files, and what they wrote down."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from swarm.run_creation import create_run
from swarm.run_store import RunStore
from swarm.training.initial import RandomCheckpoint
from tests.support.models import TINY, tiny_tokenizer
from tests.support.processes import LocalSwarm, Process

ALICE = [
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.",
    "Once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it.",
    "So she was considering in her own mind whether the pleasure of making a daisy-chain would be worth the trouble.",
    "There was nothing so very remarkable in that; nor did Alice think it so very much out of the way.",
    "In another moment down went Alice after it, never once considering how in the world she was to get out again.",
    "The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down.",
]
"""Lewis Carroll, Alice's Adventures in Wonderland (1865), public domain."""


@dataclass
class TrainingSwarm:
    """Processes of one run."""

    swarm: LocalSwarm
    store: RunStore
    folder: Path
    members: list[Process] = field(default_factory=list)
    _traces: dict[Path, tuple[list[dict[str, Any]], int]] = field(default_factory=dict)
    """What was read of each trace, and how many bytes that were: tests look every few milliseconds."""

    @property
    def base_prefix(self) -> str:
        """Name of the base model in the whole one."""
        config = self.store.spec.config
        return str(RandomCheckpoint(config, 0, "prefix")._model.base_model_prefix)

    @property
    def run_id(self) -> str:
        return self.store.run_id.hex()

    def start_node(
        self,
        stage: int | None,
        *flags: str,
        fault: dict[str, Any] | None = None,
        cache: Path | None = None,
        **env: str,
    ) -> Process:
        """cache: its own cache; None: the one of the run's creator."""
        arguments = ["node", "run", "--run", self.run_id, "--threads", "1"]
        if stage is not None:
            arguments += ["--blocks", str(self.store.spec.stages[stage])]
        return self._start(arguments + list(flags), fault, cache, env)

    def start_trainer(
        self, *flags: str, fault: dict[str, Any] | None = None, cache: Path | None = None, **env: str
    ) -> Process:
        arguments = ["trainer", "train", self.run_id, "--threads", "1", "--json", "--data", str(self.folder / "data")]
        return self._start(arguments + list(flags), fault, cache, env)

    def _start(
        self, arguments: list[str], fault: dict[str, Any] | None, cache: Path | None, env: dict[str, str]
    ) -> Process:
        cache = cache or self.folder / "cache"
        name = f"{arguments[0]}{len(self.members)}"
        environment = {
            "SHARDSWARM_CACHE": str(cache),
            "TRACE": str(self.folder / f"{name}.trace"),
            "DUMP": str(self.folder / f"{name}.pt"),
            "FAULT": json.dumps(fault and {"at": 1, "token": str(self.folder / "token"), **fault}),
            **self.swarm.env,
            **env,
        }
        command = [sys.executable, "-m", "tests.support.training_member", *arguments]
        command += ["--initial-peers", ",".join(self.swarm.initial_peers)]
        command += ["--cache-dir", str(cache), "--log-level", "info"]
        process = Process(command, self.folder / f"{name}.log", environment, self.swarm.fork_server)
        self.members.append(process)
        self.swarm.processes.append(process)
        return process

    def trace_of(self, member: Process) -> list[dict[str, Any]]:
        path = member.log_path.with_suffix(".trace")
        lines, num_bytes = self._traces.get(path, ([], 0))
        if path.exists() and path.stat().st_size > num_bytes:
            with path.open("rb") as file:
                file.seek(num_bytes)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            lines = [*lines, *map(json.loads, new.splitlines())]
            self._traces[path] = lines, num_bytes + len(new)
        return lines

    def victim(self) -> Process | None:
        """The member in which the fault fired."""
        return next((member for member in self.members if self.faults_of(member)), None)

    def steps_of(self, member: Process, *, is_keeper: bool = False) -> dict[int, dict[str, Any]]:
        """What a member wrote at each step. is_keeper: of the ends, a node that keeps them."""
        steps = [line for line in self.trace_of(member) if "epoch" in line and line["run"] == self.run_id]
        return {line["epoch"]: line for line in steps if line["is_keeper"] is is_keeper}

    def faults_of(self, member: Process) -> list[dict[str, Any]]:
        return [line for line in self.trace_of(member) if "fault" in line]

    def weights_of(self, member: Process) -> dict[str, Tensor]:
        """At the end of the run."""
        weights: dict[str, Tensor] = torch.load(
            member.log_path.with_suffix(f".{self.run_id[:8]}.pt"), weights_only=True
        )
        return weights


def make_run(
    folder: Path,
    *,
    texts: Sequence[str] = ALICE,
    family: str = "llama",
    config: dict[str, Any] | None = None,
    **rules: Any,
) -> RunStore:
    """Write the files of a run and create it. rules: lines of run.toml, section.key for those of a section."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "data").mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
    whole = AutoConfig.for_model(family, **{**TINY[family], **(config or {})}).to_dict()
    (folder / "config.json").write_text(json.dumps(whole))
    values: dict[str, Any] = {
        "stages": 2,
        "sequence_length": 16,
        "target_batch": 8,
        "microbatch": 1,
        "precision": "fp32",
        "keepers": 0,
        "model.config": None if "model.weights" in rules else "config.json",
        "model.seed": 3,
        "tokenizer.path": "tokenizer",
        "data.kind": "jsonl",
        "data.path": "data",
        "data.documents_per_chunk": 2,
        "optimizer.lr": 3e-3,
        "end.epochs": 5,
        **rules,
    }
    sections: dict[str, list[str]] = {"": []}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if value is not None:
            sections.setdefault(section, []).append(f"{name} = {json.dumps(value)}")
    text = "\n".join(sections.pop("")) + "\n"
    for section, entries in sections.items():
        text += f"[{section}]\n" + "\n".join(entries) + "\n"
    (folder / "run.toml").write_text(text)
    return create_run(folder / "run.toml", identity_path=folder / "owner", cache_dir=folder / "cache")


def weights_of_run(training: TrainingSwarm, nodes: Sequence[Process], trainer: Process) -> dict[str, Tensor]:
    """All weights by their names in the whole model. nodes: one of each stage."""
    whole = training.weights_of(trainer)
    for node, span in zip(nodes, training.store.spec.stages, strict=True):
        if training.store.spec.lora is not None:  # adapters are called as in the whole model
            whole |= training.weights_of(node)
            continue
        for name, tensor in training.weights_of(node).items():
            before, number, rest = re.split(r"\.(\d+)\.", name, maxsplit=1)
            whole[f"{training.base_prefix}.{before}.{span.start + int(number)}.{rest}"] = tensor
    return whole


def largest_error(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all tensors: norm of the difference by norm of the tensor."""
    assert weights.keys() == expected.keys()
    return max(float((weights[n] - t).norm() / t.norm().clamp_min(1e-12)) for n, t in expected.items())
