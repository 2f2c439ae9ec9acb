"""Which tensors a run's vectors hold."""

from __future__ import annotations

from typing import TypeAlias

from swarm.run_spec import RunSpec
from swarm.training.adapters import AdapterLayout
from swarm.training.hf_checkpoint import WeightLayout

Layout: TypeAlias = WeightLayout | AdapterLayout


def layout_of(spec: RunSpec) -> Layout:
    """All weights, or adapters. Raises UserError if the run's config or target modules are of no use."""
    return WeightLayout(spec) if spec.lora is None else AdapterLayout(spec)
