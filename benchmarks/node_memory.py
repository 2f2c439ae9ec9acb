"""What a node costs beside its weights: processes, memory (PSS), and the time from the end of the imports to READY.

python benchmarks/node_memory.py --json
Bare imports, the bootstrap peer's p2pd and the node are measured side by side, since shared pages are split among those who map them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.report import print_report, spread
from swarm.checkpoint import open_checkpoint
from swarm.span import Span
from tests.support.processes import local_swarm

# The modules that a node has loaded when it begins, and those that transformers loads lazily for a llama.
BARE = """
import sys, uvloop
import node.runtime
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
print("imported", flush=True)
sys.stdin.read()
"""


def pss_mb(pid: int) -> float:
    """Proportional set size in MB."""
    return psutil.Process(pid).memory_full_info().pss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--blocks", default="0:15")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    weights_mb = open_checkpoint(options.model).block_bytes(Span.parse(options.blocks), 4) / 1e6
    figures: dict[str, list[float]] = {
        "bare_imports_mb": [],
        "p2pd_mb": [],
        "node_mb": [],
        "beyond_mb": [],
        "ready_s": [],
        "processes": [],
    }
    for _ in range(options.repeats):
        bare = subprocess.Popen(
            [sys.executable, "-c", BARE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[1],
        )
        assert bare.stdin is not None and bare.stdout is not None
        bare.stdout.readline()
        with tempfile.TemporaryDirectory() as folder, local_swarm(Path(folder)) as nodes:
            (node,) = nodes.start_nodes(options.model, options.blocks)
            (p2pd,) = node.p2pd_pids()
            node_mb, p2pd_mb, bare_mb = pss_mb(node.pid), pss_mb(p2pd), pss_mb(bare.pid)
            figures["bare_imports_mb"].append(bare_mb)
            figures["p2pd_mb"].append(p2pd_mb)
            figures["node_mb"].append(node_mb)
            figures["beyond_mb"].append(node_mb - weights_mb - bare_mb)
            figures["ready_s"].append(node.ready()["ready_s"])
            figures["processes"].append(1 + len(psutil.Process(node.pid).children(recursive=True)))
        bare.stdin.close()
        bare.wait()
    results = {**{key: spread(values) for key, values in figures.items()}, "weights_mb": round(weights_mb, 1)}
    print_report(
        "node_memory",
        {"model": options.model, "blocks": options.blocks, "dtype": "float32"},
        results,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
