"""Adapters in a SpanModel: what they add to its linears. The weights of the linears stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from node.backend.span_model import SpanModel
from swarm.training.adapters import AdapterLayout


class Adapter(nn.Module):
    """scale * B A x, in PEFT's order of operations. R rank, I inputs, O outputs."""

    def __init__(self, a_RI: Tensor, b_OR: Tensor, scale: float) -> None:
        super().__init__()
        self.a_RI, self.b_OR = nn.Parameter(a_RI, requires_grad=False), nn.Parameter(b_OR, requires_grad=False)
        self.scale = scale

    def forward(self, given: Tensor) -> Tensor:
        return F.linear(F.linear(given, self.a_RI), self.b_OR) * self.scale


def attach(
    model: SpanModel, layout: AdapterLayout, stage: int, tensors: Mapping[str, Tensor]
) -> dict[str, nn.Parameter]:
    """Give linears of a stage's blocks their adapters; these use the tensors, which the layout names. The parameters by name."""
    named: dict[str, nn.Parameter] = {}
    for target in layout.targets_of(stage):
        a_RI, b_OR = tensors[target.a_name], tensors[target.b_name]
        adapter = Adapter(a_RI.to(model.device, model.dtype), b_OR.to(model.device, model.dtype), layout.lora.scale)
        linear = model.block(target.block).get_submodule(target.path)
        # A hook, not a module in the linear's place: some families look at their linears' types and weights.
        linear.add_module("adapter", adapter)
        linear.register_forward_hook(_add)
        named |= {target.a_name: adapter.a_RI, target.b_name: adapter.b_OR}
    model.note_weights()
    return named


def _add(linear: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
    adapted: Tensor = output + linear.get_submodule("adapter")(given[0])
    return adapted
