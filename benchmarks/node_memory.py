"""What a node costs beside its weights: CPU and memory of its imports, memory (PSS) at rest and after serving, and the time until READY.

python benchmarks/node_memory.py --json
Bare imports (a process with the very modules of the node, and nothing else), p2pd and the node are measured side by side, since shared
pages are split among those who map them. beyond_*_mb: of the node, without bare imports, p2pd and weights; after serving this has what
the cache keeps of the conversations in it, cache_at_most_mb. beyond_*_own_mb: the same of pages that belong to no file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.report import print_report, spread
from swarm.checkpoint import open_checkpoint
from swarm.span import Span
from tests.support.fork_server import ROOT, environment
from tests.support.processes import LocalSwarm, Process, local_swarm

PROMPT = "The quick brown fox jumps over the lazy dog, and then it sees that the dog is not as lazy as it seemed."
ITEMSIZE = {"fp32": 4, "bf16": 2}
IMPORTS = {
    "plain_imports": "import torch, transformers, hivemind",
    # What a node had imported before anything was left out: the libraries whole, and the family's code.
    "whole_imports": "import torch, transformers, hivemind, node.runtime, transformers.models.llama.modeling_llama",
    "node_imports": """
from swarm.light_start import leave_out, quick_imports
leave_out()
with quick_imports():
    import node.runtime, transformers.models.llama.modeling_llama""",
    "bootstrap_imports": "import bootstrap.runtime",
}
MEASURE = """
import json, time
memory = {line.split()[0]: int(line.split()[1]) for line in open("/proc/self/smaps_rollup").readlines()[1:]}
print(json.dumps({"cpu_s": time.process_time(), "rss_mb": memory["Rss:"] * 1.024e-3, "own_mb": memory["Pss_Anon:"] * 1.024e-3}))
"""
# The modules that a node has when it ends, imported in their order.
BARE = """
import importlib, sys
from swarm.light_start import leave_out, quick_imports
leave_out()
with quick_imports():
    for name in open(sys.argv[1]).read().split():
        try:
            importlib.import_module(name)
        except ImportError:  # some are made by others and have no file
            pass
print("imported", flush=True)
sys.stdin.read()
"""


def import_figures(repeats: int) -> dict[str, list[float]]:
    """cpu_s of each kind of imports, rss_mb (all pages, as of a process that is alone) and own_mb (pages of no file)."""
    figures: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, code in IMPORTS.items():
            command = [sys.executable, "-c", code + MEASURE]
            done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, check=True)
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                figures[f"{name}_{key}"].append(value)
    return figures


def pss_mb(pid: int, kind: str = "Pss") -> float:
    """Proportional set size in MB. kind: Pss_Anon for that of pages which belong to no file."""
    match = re.search(rf"^{kind}:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1.024e-3


def mapped_weights_mb(pid: int) -> tuple[float, float]:
    """(PSS, RSS) in MB of the checkpoint's files that a process has mapped."""
    maps = [m for m in psutil.Process(pid).memory_maps() if m.path.endswith(".safetensors")]
    return sum(m.pss for m in maps) / 1e6, sum(m.rss for m in maps) / 1e6


def peak_mb(pid: int) -> float:
    """The largest resident set so far, in MB."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1.024e-3


@contextmanager
def bare_process(modules: Path) -> Iterator[int]:
    bare = subprocess.Popen(
        [sys.executable, "-c", BARE, str(modules)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
    )
    assert bare.stdin is not None and bare.stdout is not None
    bare.stdout.readline()
    try:
        yield bare.pid
    finally:
        bare.stdin.close()
        bare.wait()


def start_timed_node(swarm: LocalSwarm, *flags: str) -> Process:
    """A node whose phases are in node.trace, and its modules, once it has ended, in node.modules of the swarm's folder."""
    places = {name.upper(): str(swarm.folder / f"node.{name}") for name in ("trace", "modules")}
    command = [sys.executable, "-m", "benchmarks.timed_node", "run", "--initial-peers", swarm.bootstrap.address, *flags]
    process = Process(command, swarm.folder / "node.log", {**places, "STARTED_AT": str(time.monotonic())})
    swarm.processes.append(process)
    return process


def generate(swarm: LocalSwarm, model: str, num_tokens: int) -> int:
    """Three conversations of one, one and two rows. The tokens that nodes have seen, at most: what rows begin with is kept once."""
    import swarm as library

    num_seen = 0
    with library.connect(initial_peers=swarm.initial_peers, model=model) as connected:
        tokenizer = connected.tokenizer()
        for num_rows in (1, 1, 2):
            inputs = tokenizer([PROMPT] * num_rows, return_tensors="pt")
            output = connected.model().generate(
                **inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
            )
            num_seen += output.numel()
    return num_seen


def cache_bytes_per_token(config: Any, span: Span, itemsize: int) -> int:
    """Of a model whose blocks have keys and values of one size: those of the span, and what comes out of its last block."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int((2 * config.num_key_value_heads * head_dim * len(span) + config.hidden_size) * itemsize)


def start_figures(swarm: LocalSwarm, node: Process) -> dict[str, float]:
    """Of a node's start; waits for READY."""
    ready = node.ready()
    times = psutil.Process(node.pid).cpu_times()
    figures = {
        "ready_s": ready["ready_s"],
        "cpu_until_ready_s": times.user + times.system,
        "peak_mb": peak_mb(node.pid),
        "processes": 1 + len(psutil.Process(node.pid).children(recursive=True)),
    }
    trace = [json.loads(line) for line in (swarm.folder / "node.trace").read_text().splitlines()]
    for line in trace:
        phase = line["phase"].replace(" ", "_")
        figures[f"phase_{phase}_s"], figures[f"phase_{phase}_cpu_s"] = line["wall_s"], line["cpu_s"]
    return figures | {"start_until_ready_s": sum(line["wall_s"] for line in trace)}


def memory_figures(when: str, node: Process, modules: Path, weights_mb: float) -> dict[str, float]:
    """Of a node and its p2pd now, beside a process that has only its modules."""
    (p2pd,) = node.p2pd_pids()
    mapped_pss, mapped_rss = mapped_weights_mb(node.pid)
    packed_mb = max(0.0, weights_mb - mapped_rss)
    with bare_process(modules) as bare_pid:
        node_mb, bare_mb = pss_mb(node.pid), pss_mb(bare_pid)
        own_mb = pss_mb(node.pid, "Pss_Anon") - pss_mb(bare_pid, "Pss_Anon")
        return {
            "bare_imports_mb": bare_mb,
            "bare_imports_rss_mb": psutil.Process(bare_pid).memory_info().rss / 1e6,
            f"p2pd_{when}_mb": pss_mb(p2pd),
            f"node_{when}_mb": node_mb,
            f"beyond_{when}_mb": node_mb - mapped_pss - packed_mb - bare_mb,
            f"beyond_{when}_own_mb": own_mb - packed_mb,
        }


def node_figures(options: argparse.Namespace, modules: Path | None, weights_mb: float) -> tuple[dict[str, float], str]:
    """Of one node that starts, rests, serves, and ends; and the names of its modules. modules: these of another one."""
    checkpoint, span = open_checkpoint(options.model), Span.parse(options.blocks)
    with tempfile.TemporaryDirectory() as folder, local_swarm(Path(folder)) as swarm:
        node = start_timed_node(
            swarm, "--model", options.model, "--blocks", options.blocks, "--precision", options.precision
        )
        figures = start_figures(swarm, node)
        if modules is not None:
            figures |= memory_figures("at_rest", node, modules, weights_mb)
            peak = figures["peak_mb"] - figures["bare_imports_rss_mb"]
            figures["peak_beyond_imports_to_weights"] = peak / weights_mb
        others = [Span(*ends) for ends in ((0, span.start), (span.end, checkpoint.num_blocks)) if ends[0] < ends[1]]
        swarm.start_nodes(options.model, *map(str, others))
        num_seen = generate(swarm, options.model, options.tokens)
        if modules is not None:
            per_token = cache_bytes_per_token(checkpoint.config, span, ITEMSIZE[options.precision])
            figures["cache_at_most_mb"] = num_seen * per_token / 1e6
            figures |= memory_figures("after_serving", node, modules, weights_mb)
        node.stop()
        return figures, (swarm.folder / "node.modules").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--blocks", default="0:15")
    parser.add_argument("--precision", default="fp32", choices=list(ITEMSIZE))
    parser.add_argument("--tokens", type=int, default=64, help="that each conversation has after its prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    span = Span.parse(options.blocks)
    weights_mb = open_checkpoint(options.model).block_bytes(span, ITEMSIZE[options.precision]) / 1e6
    figures = import_figures(options.repeats)
    _, names = node_figures(options, None, weights_mb)
    with tempfile.TemporaryDirectory() as folder:
        modules = Path(folder) / "modules"
        modules.write_text(names)
        for _ in range(options.repeats):
            for key, value in node_figures(options, modules, weights_mb)[0].items():
                figures[key].append(value)
    results: dict[str, Any] = {key: spread(values) for key, values in figures.items()}
    parameters = {"model": options.model, "blocks": options.blocks, "precision": options.precision}
    print_report(
        "node_memory",
        {**parameters, "tokens": options.tokens, "cpus": os.cpu_count()},
        {**results, "weights_mb": round(weights_mb, 1)},
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
