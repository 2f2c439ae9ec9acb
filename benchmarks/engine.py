"""The node's engine, part by part, against llama.cpp, transformers and the machine's own limits. Any of the parts:

generate     SmolLM2-135M through two nodes against llama.cpp (F16, Q8_0) and transformers; where a token's time goes
span         decode, prefill and training of blocks of a 1.1B LLaMA as shares of memory's and of bf16 products' speed
concurrency  16 sessions against 1; a prompt of 512 tokens among 8 that decode
perplexity   what each precision costs in quality: benchmarks/perplexity.py
memory       what a node costs beside its weights, and its start: benchmarks/node_memory.py
profile      which operators a decode step spends its time in (not measured unless asked for)

python benchmarks/engine.py --llama-python PATH --json
python benchmarks/engine.py --part span --part profile --quick
PATH is a Python interpreter with llama-cpp-python, which this project does not need: without one there are no ratios to llama.cpp.
All have the same number of threads; what is compared takes turns in one run; figures are medians, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# As our programs have it (swarm/openmp.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from benchmarks.engine_concurrency import measure_concurrency
from benchmarks.engine_generate import measure_generate
from benchmarks.engine_models import LlamaShape, tinyllama
from benchmarks.engine_others import measure_memory, measure_perplexity
from benchmarks.engine_profile import measure_profile
from benchmarks.engine_span import measure_span
from benchmarks.report import print_report
from swarm.allocator import share_one_arena
from swarm.cache import cache_root

PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "generate": measure_generate,
    "span": measure_span,
    "concurrency": measure_concurrency,
    "perplexity": measure_perplexity,
    "memory": measure_memory,
    "profile": measure_profile,
}
DEFAULT_PARTS = [name for name in PARTS if name != "profile"]

GOALS = {
    "bf16.ratio_to_llama_cpp_f16": 0.45,
    "int8.ratio_to_llama_cpp_q8_0": 0.40,
    "bf16.overhead_per_hop_ms": -0.8,
    "int8.overhead_per_hop_ms": -0.8,
    "bf16.decode_share_of_floor": 0.70,
    "int8.decode_share_of_floor": 0.45,
    "int4.decode_share_of_floor": 0.45,
    "bf16.prefill_share_of_gemm": 0.65,
    "training.share_of_gemm": 0.65,
    "concurrency.16_sessions_ratio_to_1": 5.0,
}
"""What a median is to be at least; negative: at most."""


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="may be given several times")
    parser.add_argument("--quick", action="store_true", help="a tiny LLaMA and few tokens: only to see that it runs")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each part")
    parser.add_argument("--threads", type=int, default=2, help="of every process that computes")
    parser.add_argument("--precisions", default="bf16,int8,int4", help="of nodes, those that they have")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a generation")
    parser.add_argument("--blocks", type=int, default=6, help="of the 1.1B LLaMA, which would have 22")
    parser.add_argument("--llama-python", type=Path, help="an interpreter with llama-cpp-python")
    parser.add_argument("--cache", type=Path, help="where models are kept (about 1.2 GB)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    options.precisions = options.precisions.split(",")
    options.cache = (options.cache or cache_root() / "benchmarks").expanduser().absolute()
    sizes: dict[str, Any] = {
        "shape": tinyllama(options.blocks),
        "decode_steps": 30,
        "prefill_tokens": 512,
        "training_blocks": 4,
        "training_rows": 8,
        "training_tokens": 128,
        "sessions": 16,
        "session_steps": 32,
        "decoders": 8,
        "longest_session": 1500,
        "generate_tokens": 32,
    }
    if options.quick:
        sizes |= {"shape": LlamaShape(256, 512, 4, 2, 2), "decode_steps": 3, "prefill_tokens": 64}
        sizes |= {
            "training_rows": 2,
            "training_tokens": 16,
            "training_blocks": 2,
            "session_steps": 4,
            "generate_tokens": 4,
        }
        sizes |= {"tokens": 8, "repeats": 1}
    for name, value in sizes.items():
        setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    share_one_arena()  # as a node that trains does
    results: dict[str, Any] = {}
    parts = options.part or DEFAULT_PARTS
    for name in parts:
        before = os.getloadavg()[0]
        results |= PARTS[name](options)
        results[f"load_average.{name}"] = f"{before:.1f} before, {os.getloadavg()[0]:.1f} after"
        print(f"part {name} is done", file=sys.stderr)
    if not options.quick:
        results |= judge(results)
    shown = ("repeats", "threads", "precisions", "tokens", "quick", "shape", "prefill_tokens")
    parameters = {"parts": parts, **{name: getattr(options, name) for name in shown}}
    parameters |= {"training": f"{options.training_rows} x {options.training_tokens}", "shape": str(options.shape)}
    print_report("engine", parameters, results, as_json=options.json)


def judge(results: dict[str, Any]) -> dict[str, str]:
    """Of each goal that was measured: whether the median reaches it, and whether every round does."""
    judged = {}
    for key, goal in GOALS.items():
        measured = results.get(key)
        if isinstance(measured, dict):
            margins = [value - goal if goal > 0 else -goal - value for value in measured.values()]
            median, *extremes = (margin >= 0 for margin in margins)
            doubt = "" if all(one == median for one in extremes) else " by the median, not by all that was measured"
            judged[f"goal.{key}"] = f"{'>=' if goal > 0 else '<='} {abs(goal)}: {'met' if median else 'missed'}{doubt}"
    return judged


if __name__ == "__main__":
    main()
