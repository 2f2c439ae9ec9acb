"""Numeric classes: what a shard computes in, what that costs in memory, and how far it is from fp32. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NumericClass:
    """Of a shard that only serves. Norms, experts in one tensor and all else that is no linear are as wide as the activations."""

    name: str
    """As records carry it."""
    dtype_name: str
    """Of activations and caches: "float32" or "bfloat16"."""
    bits: int | None
    """Of a linear's weights; None: as wide as the activations."""
    bytes_per_parameter: float
    """Of all linears' weights in memory, scales included."""
    perplexity_change_percent: float
    """Bound of what we measured with SmolLM2-135M (benchmarks/perplexity.py, docs/log.md). Larger models lose less."""


AUTO = "auto"
"""In the place of a class: the node measures which one is the fastest."""

NUMERIC_CLASSES = {
    one.name: one
    for one in (
        NumericClass("fp32", "float32", None, 4, 0),
        NumericClass("bf16", "bfloat16", None, 2, 0.1),
        # One bf16 scale for each output row: 2 bytes for some 576 or more weights.
        NumericClass("int8", "bfloat16", 8, 1.004, 0.5),
        # 4 bits, and bf16 scale and zero for each group of 32: 0.625 bytes; some 5 % of the weights have 8 bits.
        NumericClass("int4", "bfloat16", 4, 0.65, 8),
    )
}

HEAD_CLASSES = ("fp32", "bf16", "int8")


def head_class_for(numeric_classes: set[str]) -> str:
    """What the head computes in beside nodes of these classes: as rough as the finest of them, but never rougher than int8."""
    for name in ("fp32", "bf16"):
        if name in numeric_classes:
            return name
    return "int8" if numeric_classes else "fp32"
