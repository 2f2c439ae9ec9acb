"""Part "profile": which operators a decode step of a span spends its time in, by torch's profiler.

The profiler makes small operators look slower than they are: the shares tell where to look, not how much there is to win.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine_models import random_llama
from benchmarks.engine_session import EngineSession
from node.backend.span_model import SpanModel
from node.shard import load_shard
from swarm.checkpoint import open_checkpoint
from swarm.span import Span

_NUM_STEPS = 10
_NUM_PAST = 64
_NUM_SHOWN = 12
_KINDS = {
    "linears": ("mm", "linear", "matmul", "mv", "dot", "int8pack", "int4pack"),
    "attention": ("attention", "bmm", "softmax"),
}
"""An operator is of the kind that names the longest part of its name."""


def measure_profile(options: argparse.Namespace) -> dict[str, Any]:
    """Results of the part. options: see benchmarks/engine.py."""
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(str(random_llama(options.cache, options.shape)))
    results: dict[str, Any] = {}
    for name in options.precisions:
        shard = load_shard(checkpoint, Span(0, options.shape.blocks), precision=name, device="cpu")
        results |= {f"{name}.profile.{key}": value for key, value in profile_decode(shard.model).items()}
    return results


def profile_decode(model: SpanModel) -> dict[str, Any]:
    """Of one step, on average: milliseconds, shares of the kinds of operators, and the operators with the most time of their own."""
    session = EngineSession(model)
    session.step(torch.zeros(1, _NUM_PAST, model.hidden_size, dtype=model.dtype))
    token = torch.zeros(1, 1, model.hidden_size, dtype=model.dtype)
    for _ in range(3):  # a trace is compiled in its first calls
        session.step(token)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(_NUM_STEPS):
            session.step(token)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total_us = sum(event.self_cpu_time_total for event in events)
    shares = dict.fromkeys([*_KINDS, "rest"], 0.0)
    for event in events:
        shares[kind_of(event.key)] += event.self_cpu_time_total / total_us
    results: dict[str, Any] = {"step_ms": round(total_us / 1000 / _NUM_STEPS, 3)}
    results |= {f"share_of_{kind}": round(share, 3) for kind, share in shares.items()}
    results["num_operators_per_block"] = round(sum(e.count for e in events) / _NUM_STEPS / len(model.span), 1)
    for place, event in enumerate(events[:_NUM_SHOWN], 1):
        self_ms = event.self_cpu_time_total / 1000 / _NUM_STEPS
        share = event.self_cpu_time_total / total_us
        results[f"top{place:02}"] = f"{event.key:44} {self_ms:8.3f} ms {share:6.1%} {event.count // _NUM_STEPS:5} calls"
    return results


def kind_of(operator: str) -> str:
    """linears, attention or rest, by the operator's name."""
    found = [(len(part), kind) for kind, parts in _KINDS.items() for part in parts if part in operator]
    return max(found)[1] if found else "rest"
