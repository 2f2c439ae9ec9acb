"""FastHead: the LM head of a client that only generates, in bf16 or int8, beside the one in fp32 that is trained and exported.

At one token the head is read from memory whole: of SmolLM2-135M 113 MB in fp32, as much as all its blocks in int8.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from swarm.linears.choice import LinearChoice
from swarm.linears.quantize import Int8Codes, quantize

log = logging.getLogger(__name__)


class FastHead:
    """Stands in for a head's own forward whenever no gradient is asked for; converted anew when the weights have changed."""

    def __init__(self, head: nn.Linear, numeric_class: str) -> None:
        """numeric_class: "bf16" or "int8"."""
        self._head, self._numeric_class, self._usual = head, numeric_class, head.forward
        self._may_have_changed = False
        self._convert()
        head.forward = self._forward  # type: ignore[method-assign, assignment]

    def _convert(self) -> None:
        weight = self._head.weight.detach()
        bias = None if self._head.bias is None else self._head.bias.detach()
        choice = LinearChoice(weight.device)
        if self._numeric_class == "int8":
            self._fast = choice.of_codes(quantize(Int8Codes, weight), bias)
        else:
            self._fast = choice.of_weight(weight, bias, torch.bfloat16)
        self._version, self._fingerprint = self._head.weight._version, _fingerprint(weight)
        log.info("head computes in %s where nothing is trained: %s", self._numeric_class, type(self._fast).__name__)

    def _forward(self, given: Tensor) -> Tensor:
        weight = self._head.weight
        if torch.is_grad_enabled():
            # A fused optimizer changes weights without a sign of it.
            self._may_have_changed = self._may_have_changed or weight.requires_grad
            return self._usual(given)
        if self._may_have_changed or weight._version != self._version:
            self._may_have_changed, self._version = False, weight._version
            if _fingerprint(weight) != self._fingerprint:
                self._convert()
        output: Tensor = self._fast(given)
        return output.to(given.dtype)


def _fingerprint(weight: Tensor) -> tuple[float, float, int]:
    """Other for weights that an optimizer has changed."""
    values = weight.detach()
    return float(values.sum(dtype=torch.float64)), float(values.square().sum(dtype=torch.float64)), values.data_ptr()
