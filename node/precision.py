"""Which numeric class a node serves in when it is told "auto": the fastest that changes the model little enough."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import torch

from node.backend.span_model import SpanModel
from swarm.numeric_class import AUTO, NUMERIC_CLASSES
from swarm.run_spec import RunSpec
from swarm.span import Span
from swarm.training.initial import RandomCheckpoint

log = logging.getLogger(__name__)

_ROUNDS = 7
_SWEPT_BYTES = 1 << 26
"""More than caches hold."""
_EQUALLY_FAST = 1.05


def classes_within(max_perplexity_change: float) -> tuple[str, ...]:
    """Classes whose stated change of perplexity, in percent, is at most this much; the most exact first."""
    return tuple(one.name for one in NUMERIC_CLASSES.values() if one.perplexity_change_percent <= max_perplexity_change)


def fastest(step_s: Mapping[str, float]) -> str:
    """The class of the shortest step; of those that are as good as equal the most exact."""
    least = min(step_s.values())
    return next(name for name in NUMERIC_CLASSES if step_s.get(name, float("inf")) <= _EQUALLY_FAST * least)


def choose_class(wanted: str, max_perplexity_change: float, config: object, *, device: str, threads: int | None) -> str:
    """The class that a node is told, or the fastest within its budget.

    config: of transformers. No weight is read: a block of random ones takes the same time.
    """
    if wanted != AUTO:
        return wanted
    classes = classes_within(max_perplexity_change)
    if len(classes) == 1:
        return classes[0]
    step_s = measure_classes(config, classes, device=device, threads=threads)
    chosen = fastest(step_s)
    figures = " ".join(f"{name}={1000 * seconds:.2f}" for name, seconds in step_s.items())
    log.info(
        "numeric class %s of those within %g %% of perplexity, ms per block: %s", chosen, max_perplexity_change, figures
    )
    return chosen


def class_of_run(wanted: str, spec: RunSpec) -> str:
    """What a node that trains serves sessions in."""
    own = spec.precision if spec.lora is None else spec.lora.frozen_precision or spec.precision
    return own.value if wanted == AUTO else wanted


def measure_classes(
    config: object, classes: Sequence[str], *, device: str = "cpu", threads: int | None = None
) -> dict[str, float]:
    """Seconds that one row of one token takes in one block of each class, its weights read from memory as they are in a larger span."""
    described = config.to_dict()  # type: ignore[attr-defined]
    source = RandomCheckpoint(described, 0, str(described.get("model_type")))
    index = source.num_blocks // 2  # the first and last ones are unlike the others in some families
    span = Span(index, index + 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or 1)
    try:
        models = [SpanModel(source, span, numeric_class=name, device=device) for name in classes]
        # In turn, so that what else the machine does hits all alike; the shortest is the one that it disturbed least.
        rounds = [[_step_s(model) for model in models] for _ in range(_ROUNDS)]
        return {name: min(times) for name, times in zip(classes, zip(*rounds, strict=True), strict=True)}
    finally:
        torch.set_num_threads(before)


def _step_s(model: SpanModel) -> float:
    cache = model.new_cache(model.span)
    hidden = torch.zeros(1, 1, model.hidden_size, dtype=model.dtype)
    model.forward(hidden, cache)
    torch.zeros(_SWEPT_BYTES, dtype=torch.int8).add_(1)
    started = time.perf_counter()
    model.forward(hidden, cache)
    return time.perf_counter() - started
