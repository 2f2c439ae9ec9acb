"""Parts that are benchmarks of their own: run as scripts, whose results are taken over under the part's name."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def measure_perplexity(options: argparse.Namespace) -> dict[str, Any]:
    """benchmarks/perplexity.py, with its own defaults."""
    return _run_script("perplexity", [])


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """benchmarks/node_memory.py. options: see benchmarks/engine.py."""
    return _run_script("node_memory", ["--repeats", str(min(options.repeats, 3))])


def _run_script(name: str, flags: list[str]) -> dict[str, Any]:
    path = Path(__file__).with_name(f"{name}.py")
    if not path.exists():
        return {name: f"not measured: there is no benchmarks/{path.name}"}
    done = subprocess.run([sys.executable, str(path), "--json", *flags], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        return {name: f"not measured: benchmarks/{path.name} ended with exit code {done.returncode}"}
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["results"]
    return {f"{name}.{key}": value for key, value in results.items()}
