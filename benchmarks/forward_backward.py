"""Forward and forward+backward through the swarm against the same model in one process: tokens/s, latency of one batch, bytes per token.

python benchmarks/forward_backward.py --nodes 2 --json
Each round runs `batches` batches, at most two in flight through the swarm, one after another locally with 1 or 2 threads, whichever is
faster in a trial; the rounds alternate. Gradients are those w.r.t. the inputs, as for a soft prompt. The nodes choose their own number of threads, as they do for everybody.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Threads that spin while they wait take the cores from the nodes, and from the local run's other threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import swarm
from benchmarks.report import print_report, spread
from swarm.checkpoint import open_checkpoint
from tests.support.processes import local_swarm

MAX_IN_FLIGHT = 2


def forward(model: Any, ids: Tensor, embeds: Tensor) -> None:
    with torch.no_grad():
        loss = model(inputs_embeds=embeds, labels=ids).loss
    assert bool(torch.isfinite(loss))


def forward_backward(model: Any, ids: Tensor, embeds: Tensor) -> None:
    given = embeds.clone().requires_grad_()
    model(inputs_embeds=given, labels=ids).loss.backward()
    assert given.grad is not None and bool(torch.isfinite(given.grad).all())


def run_s(
    job: Callable[[Any, Tensor, Tensor], None], model: Any, batches: list[tuple[Tensor, Tensor]], lanes: int
) -> float:
    """Seconds for all batches, `lanes` of them at a time."""
    started = time.perf_counter()
    if lanes == 1:
        for ids, embeds in batches:
            job(model, ids, embeds)
    else:
        with ThreadPoolExecutor(lanes) as pool:
            for done in [pool.submit(job, model, ids, embeds) for ids, embeds in batches]:
                done.result()
    return time.perf_counter() - started


def local_s(
    job: Callable[[Any, Tensor, Tensor], None], model: Any, batches: list[tuple[Tensor, Tensor]], threads: int
) -> float:
    """Seconds in this process, one batch after another."""
    torch.set_num_threads(threads)
    return run_s(job, model, batches, 1)


def measure(local: Any, remote: Any, options: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (options.rows, options.tokens)
    batches = []
    for _ in range(options.batches):
        ids = torch.randint(100, local.config.vocab_size, shape, generator=generator)
        batches.append((ids, local.get_input_embeddings()(ids).detach()))
    num_tokens = options.batches * options.rows * options.tokens
    results: dict[str, Any] = {}
    for job in (forward, forward_backward):
        run_s(job, remote, batches[:2], 1)
        pilot = {threads: local_s(job, local, batches[:2], threads) for threads in (1, 2)}
        threads = min(pilot, key=lambda count: pilot[count])
        times: dict[str, list[float]] = {"local": [], "swarm": [], "single_local": [], "single_swarm": []}
        moved_before = remote.microbatch_stats.bytes_moved
        for _ in range(options.repeats):
            times["local"].append(local_s(job, local, batches, threads))
            times["single_local"].append(local_s(job, local, batches[:1], threads))
            torch.set_num_threads(options.client_threads)
            times["swarm"].append(run_s(job, remote, batches, MAX_IN_FLIGHT))
            times["single_swarm"].append(run_s(job, remote, batches[:1], 1))
        moved = remote.microbatch_stats.bytes_moved - moved_before
        results[job.__name__] = {
            "ratio_to_local": spread([a / b for a, b in zip(times["local"], times["swarm"], strict=True)]),
            "swarm_tokens_per_s": spread([num_tokens / t for t in times["swarm"]]),
            "local_tokens_per_s": spread([num_tokens / t for t in times["local"]]),
            "local_threads": threads,
            "single_batch_swarm_s": spread(times["single_swarm"]),
            "single_batch_local_s": spread(times["single_local"]),
            "client_bytes_per_token": round(moved / (options.repeats * (num_tokens + options.rows * options.tokens))),
        }
        print(job.__name__, results[job.__name__], file=sys.stderr)
    stats = remote.microbatch_stats
    results["num_recomputed"], results["num_reroutes"] = stats.num_recomputed, stats.num_reroutes
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--client-threads", type=int, default=1)
    parser.add_argument("--node-threads", type=int, default=0, help="0: as the nodes decide")
    parser.add_argument("--microbatch-tokens", type=int, default=1024)
    parser.add_argument("--wire", default="bf16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.client_threads)
    checkpoint = open_checkpoint(options.model)
    edges = [round(index * checkpoint.num_blocks / options.nodes) for index in range(options.nodes + 1)]
    spans = [f"{start}:{end}" for start, end in itertools.pairwise(edges)]
    local = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder, local_swarm(Path(folder)) as nodes:
        # One after another, so that each measures its threads on an idle machine.
        ready = [nodes.start_node(options.model, span, threads=options.node_threads or None).ready() for span in spans]
        with swarm.connect(
            initial_peers=nodes.initial_peers,
            model=options.model,
            wire=options.wire,
            microbatch_tokens=options.microbatch_tokens,
            max_in_flight=MAX_IN_FLIGHT,
        ) as connected:
            remote = connected.model().requires_grad_(False)
            results = measure(local, remote, options)
    results["node_threads"] = [node["threads"] for node in ready]
    parameters = {key: value for key, value in vars(options).items() if key != "json"}
    flat = {
        f"{name}.{key}": value
        for name, part in results.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    flat |= {name: value for name, value in results.items() if not isinstance(value, dict)}
    print_report(
        "forward_backward", {**parameters, "dtype": "float32"}, results if options.json else flat, as_json=options.json
    )


if __name__ == "__main__":
    main()
