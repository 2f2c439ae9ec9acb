"""What an adapter run over int8 and int4 blocks loses in loss and saves in memory, against one over blocks in bf16.

python benchmarks/frozen_precision.py --json
The same run of real processes (two nodes, a trainer) once for each precision: SmolLM2-135M off the grid (benchmarks/perplexity.py) reads
Python's manual. The node of the first stage serves no sessions, that of the second does. Memory: PSS of a node's own process when the run
is over and its last adapters are served, without mapped weights, beyond that of the same node in a run of a tiny model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.node_memory import mapped_weights_mb, peak_mb, pss_mb
from benchmarks.perplexity import OffGrid
from benchmarks.report import print_report
from node.backend.span_model import SpanModel
from node.training.frozen_blocks import FrozenBlocks
from swarm.checkpoint import open_checkpoint
from swarm.client.runs import publish_run
from swarm.run_creation import create_run
from swarm.run_spec import FrozenPrecision, RunSpec
from swarm.run_store import RunStore
from swarm.span import Span
from swarm.training.initial import open_initial_weights
from tests.support import processes
from tests.support.models import save_tiny
from tests.support.processes import local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm

RULES = """
stages = 2
sequence_length = {length}
target_batch = 8
microbatch = 2
keepers = 0
checkpoint_every = {epochs}
trainable = "lora"
model.weights = "{weights}"
optimizer.lr = 1e-3
optimizer.warmup_epochs = 2
data.kind = "jsonl"
data.path = "data"
end.epochs = {epochs}
[lora]
rank = 8
"""
LAST_EPOCHS = 4
PRECISIONS = ["bf16", *FrozenPrecision]
# 53 M weights are quantised in 2 s by a core of one's own, and in minutes on a busy machine.
processes.READY_TIMEOUT_S = 600


def save_off_grid(model: str, folder: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        source = OffGrid(checkpoint)
        tensors = {**source.load_ends(), **source.load_blocks(Span(0, source.num_blocks))}
        source.config.save_pretrained(folder)
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        AutoTokenizer.from_pretrained(checkpoint.folder).save_pretrained(folder)


def create(folder: Path, weights: Path, precision: FrozenPrecision | None, options: argparse.Namespace) -> RunStore:
    from pydoc_data.topics import topics

    (folder / "data").mkdir(parents=True)
    lines = [json.dumps({"text": topics[name].strip()}) for name in sorted(topics)]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
    rules = RULES.format(weights=weights, epochs=options.epochs, length=options.length)
    if precision is not None:
        rules += f'frozen_precision = "{precision}"\n'
    (folder / "run.toml").write_text(rules)
    return create_run(folder / "run.toml", identity_path=folder / "owner", cache_dir=folder / "cache")


def frozen_mb(spec: RunSpec) -> float:
    """What the weights of the first stage's blocks take."""
    return sum(map(_num_bytes, {id(t): t for t in _tensors(spec)}.values())) / 1e6


def _tensors(spec: RunSpec) -> list[Any]:
    model: SpanModel = FrozenBlocks().for_training(spec, 0, "cpu", open_initial_weights(spec))
    return [
        tensor
        for index in model.span
        for part in (model.block(index),)
        for tensor in (*part.parameters(), *part.buffers())
    ]


def _num_bytes(tensor: Any) -> int:
    return int(tensor.untyped_storage().nbytes())


def run(folder: Path, store: RunStore) -> dict[str, Any]:
    """Losses, seconds of the run, and each node's memory in MB."""
    with local_swarm(folder / "swarm") as swarm:
        publish_run(store, swarm.initial_peers, 15)
        training = TrainingSwarm(swarm, store, folder)
        nodes = [training.start_node(0, "--no-sessions"), training.start_node(1)]
        for node in nodes:
            node.ready()
        trainer, started = training.start_trainer(), time.monotonic()
        trainer.wait(1800)
        run_s = time.monotonic() - started
        served = f"serving the weights of epoch={store.spec.num_epochs} "
        wait_until(lambda: served in nodes[1].log, 60, "the last adapters are served")
        losses = [step["loss"] for _, step in sorted(training.steps_of(trainer).items())]
        memory = [pss_mb(node.pid) - mapped_weights_mb(node.pid)[0] for node in nodes]
        peaks = [peak_mb(node.pid) for node in nodes]
    return {"losses": losses, "run_s": run_s, "memory_mb": memory, "peak_mb": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_off_grid(options.model, folder / "model")
        tiny = run(folder / "tiny", create(folder / "tiny", save_tiny("llama", folder / "base"), None, options))
        for place in (folder / name for name in options.precisions):
            precision = None if place.name == "bf16" else FrozenPrecision(place.name)
            store = create(place, folder / "model", precision, options)
            found = run(place, store)
            own, with_sessions = (mb - bare for mb, bare in zip(found["memory_mb"], tiny["memory_mb"], strict=True))
            results[place.name] = {
                "frozen_mb": round(frozen_mb(store.spec), 1),
                "node_beyond_tiny_mb": round(own, 1),
                "node_with_sessions_beyond_tiny_mb": round(with_sessions, 1),
                "peaks_mb": [round(peak) for peak in found["peak_mb"]],
                "first_loss": round(found["losses"][0], 4),
                "last_loss": round(statistics.mean(found["losses"][-LAST_EPOCHS:]), 4),
                "run_s": round(found["run_s"], 1),
                "load": os.getloadavg()[0],
            }
            print(place.name, results[place.name], file=sys.stderr, flush=True)
    results["tiny_memory_mb"] = [round(mb, 1) for mb in tiny["memory_mb"]]
    parameters = {"model": options.model, "epochs": options.epochs, "length": options.length}
    print_report("frozen_precision", parameters, results, as_json=options.json)


if __name__ == "__main__":
    main()
