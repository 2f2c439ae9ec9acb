"""Throughput: how fast this shard is on this machine, measured once before the node goes online."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from node.backend.span_model import SpanModel

_PREFILL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Throughput:
    """Rates of a whole shard, one row."""

    threads: int
    decode_s_per_block: float
    prefill_tokens_per_s: float


def thread_counts(threads: int | None) -> list[int]:
    """To choose from: what was asked for, or else 1, half of the cores and all of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [threads] if threads else sorted({1, max(1, cores // 2), cores})


def measure_throughput(model: SpanModel, threads: int | None) -> Throughput:
    """Time decoding and prefill. With threads=None also choose the thread count: the fastest of 1, half and all cores.

    More threads than free cores are slower, not faster (spinning barriers), so it must be measured. Leaves torch set to the choice.
    """
    candidates = thread_counts(threads)
    measured = {}
    for count in candidates:
        torch.set_num_threads(count)
        measured[count] = _decode_s(model)
    best = min(measured, key=lambda count: measured[count])
    torch.set_num_threads(best)
    return Throughput(best, measured[best] / len(model.span), _PREFILL_TOKENS / _prefill_s(model))


def _decode_s(model: SpanModel) -> float:
    cache = model.new_cache(model.span)
    hidden = torch.zeros(1, 1, model.hidden_size, dtype=model.dtype)
    return _median_s(lambda: model.forward(hidden, cache))


def _prefill_s(model: SpanModel) -> float:
    hidden = torch.zeros(1, _PREFILL_TOKENS, model.hidden_size, dtype=model.dtype)
    return _median_s(lambda: model.forward(hidden, model.new_cache(model.span)))


def _median_s(function: Callable[[], object], *, at_least: int = 3, budget_s: float = 0.15) -> float:
    """Median seconds of a call, after one that warms up; at_least times, and more while the budget lasts."""
    function()
    times: list[float] = []
    while len(times) < at_least or (sum(times) < budget_s and len(times) < 20):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
