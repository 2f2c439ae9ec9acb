"""What every benchmark prints: a table, or with --json one object with the machine, the commit, the parameters and the results."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum, rounded for people."""
    return {"median": _short(statistics.median(values)), "min": _short(min(values)), "max": _short(max(values))}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def print_report(name: str, parameters: Mapping[str, Any], results: Mapping[str, Any], *, as_json: bool) -> None:
    """One benchmark's outcome on stdout."""
    report = {
        "benchmark": name,
        "commit": _commit(),
        "machine": _machine(),
        "parameters": parameters,
        "results": results,
    }
    if as_json:
        print(json.dumps(report))
        return
    print(f"{name} at {report['commit']} on {report['machine']}\n{dict(parameters)}")
    for key, value in results.items():
        if isinstance(value, dict) and "median" in value:
            value = f"{value['median']:<10} ({value['min']} .. {value['max']})"
        print(f"  {key:44} {value}")


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _machine() -> str:
    import psutil
    import torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next(
            (
                line.split(":", 1)[1].strip()
                for line in cpuinfo.read_text().splitlines()
                if line.startswith("model name")
            ),
            cpu,
        )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB{gpu}, torch {torch.__version__}, Python {platform.python_version()}"
