"""Which linear a weight gets: the fastest one of a numeric class that proves right here, on the very weights that it is to hold."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swarm.decoder import LIBRARY_ERRORS
from swarm.linears.frozen import FrozenLinear, Int4Linear, Int8Linear, PrepackedLinear, WidenedLinear
from swarm.linears.quantize import Codes, Int8Codes

log = logging.getLogger(__name__)

# Below, between and above the numbers of rows at which linears change how they compute.
ROWS_TRIED = (1, 3, 72)
# Of the largest value: an output in bf16 is off by 2^-9 of its own, widened weights by as much of each. A wrong scale, order or
# group is off by some tenths or more.
_TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 3e-5}


@dataclass(slots=True)
class LinearChoice:
    """Of one model. `made` counts linears by kind."""

    device: torch.device
    made: dict[str, int] = field(default_factory=dict)
    _verdicts: dict[tuple[object, ...], bool] = field(default_factory=dict)

    def of_weight(self, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        """In fp32 or bf16: oneDNN's layout, or else a plain nn.Linear."""
        weight_OI = weight_OI.detach().to(dtype)
        linear = self._try(PrepackedLinear, lambda: PrepackedLinear(weight_OI, bias), weight_OI, bias)
        return linear or self._note(plain_linear(weight_OI, bias, self.device))

    def of_codes(self, codes: Codes, bias: Tensor | None) -> nn.Module:
        """In int8 or int4: torch's kernels, or else arithmetic in bf16 with the same codes."""
        linear: nn.Module | None
        if isinstance(codes, Int8Codes):
            linear = self._try(Int8Linear, lambda: Int8Linear(codes, bias), codes, bias)
        else:
            linear = self._try(Int4Linear, lambda: Int4Linear(codes, bias), codes, bias)
        return linear or self._note(WidenedLinear(codes, bias).to(self.device))

    def _try(
        self,
        kind: type[FrozenLinear],
        make: Callable[[], FrozenLinear],
        source: Codes | Tensor,
        bias: Tensor | None,
    ) -> nn.Module | None:
        """None: not on this device, or it has been found wrong for such a shape."""
        if self.device.type != "cpu":
            return None
        num_inputs = source.shape[1] if isinstance(source, Tensor) else source.num_inputs
        dtype = source.dtype if isinstance(source, Tensor) else None
        key = (kind, dtype, len(source), num_inputs, bias is None)
        if self._verdicts.get(key) is False:
            return None
        try:
            linear = make()
            if key not in self._verdicts:
                weight = source.float() if isinstance(source, Tensor) else source.dense()
                error = largest_error(linear, weight)
                self._verdicts[key] = error <= _TOLERANCE[linear.dtype]
                if not self._verdicts[key]:
                    log.warning(
                        "%s computes wrongly here, not used: off by %.1e, shape=%s", kind.__name__, error, key[2:4]
                    )
        except LIBRARY_ERRORS as failure:
            self._verdicts[key] = False
            reason = (str(failure).splitlines() or [type(failure).__name__])[0][:160]
            log.warning("%s does not work here, not used: %s, shape=%s", kind.__name__, reason, key[2:4])
        return self._note(linear) if self._verdicts[key] else None

    def _note(self, linear: nn.Module) -> nn.Module:
        kind = type(linear).__name__
        self.made[kind] = self.made.get(kind, 0) + 1
        return linear


def plain_linear(weight_OI: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
    """An nn.Linear whose weights are not trained."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight_OI.shape
    linear.weight = nn.Parameter(weight_OI.contiguous().to(device), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(device, weight_OI.dtype), requires_grad=False)
    return linear


def largest_error(linear: FrozenLinear, weight_OI: Tensor) -> float:
    """Of outputs and input gradients, as part of the largest one there is; infinite if any is not finite.

    weight_OI: float32, what the linear is to compute with.
    """
    generator = torch.Generator().manual_seed(0)
    bias = 0 if linear.bias is None else linear.bias.float()
    errors = []
    with torch.enable_grad():
        for rows in ROWS_TRIED:
            given = torch.randn(1, rows, linear.in_features, generator=generator).to(linear.dtype).requires_grad_()
            gradient = torch.randn(1, rows, linear.out_features, generator=generator).to(linear.dtype)
            output = linear(given)
            output.backward(gradient)
            assert given.grad is not None
            errors.append(relative_error(output.detach(), given.detach().float() @ weight_OI.t() + bias))
            errors.append(relative_error(given.grad, gradient.float() @ weight_OI))
            with torch.no_grad():
                errors.append(relative_error(linear(given.detach()), output.detach().float()))
    return max(error if error == error else float("inf") for error in errors)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as part of the largest value; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
