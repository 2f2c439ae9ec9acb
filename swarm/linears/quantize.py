"""Codes and scales of weights in 8 and 4 bits, the same to the bit on every machine.

Only elementwise operations, which IEEE 754 fixes, minima and maxima are used, and sums in a fixed order: nodes that quantise equal
weights have equal codes. How a processor likes to have them packed is the business of swarm/linears/frozen.py.

O outputs, I inputs of a linear; J inputs, filled up with zeros to whole groups; G groups of K = 32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
FORMAT_VERSION = 1
"""Changes whenever the same weights get other codes."""

_PART = 1 << 18
"""Weights that are widened to float32 at a time: a few such arrays stay in a cache."""
_SMALLEST = 1e-30
"""Scale of a row or group of zeros."""
# Of normal weights 7.2 % are lost; 7.8 % with the whole range and no turns, 7.1 % with twice the work.
_SHRINKS = (1.0, 0.9, 0.8)
_TURNS = 4


@dataclass(frozen=True, slots=True)
class Int8Codes:
    """weight = codes * scale."""

    codes: Tensor
    """int8 [O, I], -127 .. 127."""
    scale: Tensor
    """bf16 [O]."""

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def num_inputs(self) -> int:
        return self.codes.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names that `of` takes."""
        return {"codes": self.codes, "scale": self.scale}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], num_inputs: int) -> Int8Codes:
        """Raises ValueError for tensors of another linear or kind of codes."""
        num_outputs = len(tensors["codes"])
        _check(tensors, {"codes": (torch.int8, num_outputs, num_inputs), "scale": (torch.bfloat16, num_outputs)})
        return cls(tensors["codes"], tensors["scale"])

    def rows(self, start: int, end: int) -> Int8Codes:
        """Of some outputs."""
        return Int8Codes(self.codes[start:end], self.scale[start:end])

    def dense(self) -> Tensor:
        """float32 [O, I]."""
        return self.codes.float() * self.scale.float()[:, None]


@dataclass(frozen=True, slots=True)
class Int4Codes:
    """weight = (code - 8) * scale + zero, in groups of 32 inputs."""

    codes: Tensor
    """uint8 [O, J / 2]: of two neighbours the first in the low bits."""
    scale: Tensor
    """bf16 [O, G]."""
    zero: Tensor
    """bf16 [O, G]."""
    num_inputs: int

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names that `of` takes."""
        return {"codes": self.codes, "scale": self.scale, "zero": self.zero}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], num_inputs: int) -> Int4Codes:
        """Raises ValueError for tensors of another linear or kind of codes."""
        num_outputs, num_groups = len(tensors["codes"]), -(-num_inputs // GROUP)
        scales = torch.bfloat16, num_outputs, num_groups
        codes = torch.uint8, num_outputs, num_groups * GROUP // 2
        _check(tensors, {"codes": codes, "scale": scales, "zero": scales})
        return cls(tensors["codes"], tensors["scale"], tensors["zero"], num_inputs)

    def rows(self, start: int, end: int) -> Int4Codes:
        """Of some outputs."""
        return Int4Codes(self.codes[start:end], self.scale[start:end], self.zero[start:end], self.num_inputs)

    def unpacked(self) -> Tensor:
        """uint8 [O, J], 0 .. 15."""
        return torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(1)

    def dense(self) -> Tensor:
        """float32 [O, I]."""
        codes = _grouped(self.unpacked().float()) - 8
        weight = codes * self.scale.float()[..., None] + self.zero.float()[..., None]
        return weight.flatten(1)[:, : self.num_inputs]


Codes = Int8Codes | Int4Codes


def quantize(kind: type[Codes], weight_OI: Tensor) -> Codes:
    """weight_OI: any floating dtype."""
    return quantize_int8(weight_OI) if kind is Int8Codes else quantize_int4(weight_OI)


def quantize_int8(weight_OI: Tensor) -> Int8Codes:
    """One scale for each output. weight_OI: any floating dtype."""
    parts = [_int8_of(part.float()) for part in _parts(weight_OI)]
    return Int8Codes(torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts]))


def quantize_int4(weight_OI: Tensor) -> Int4Codes:
    """For each group scale and zero of a small squared error, as they are when rounded to bf16."""
    num_groups = -(-weight_OI.shape[1] // GROUP)
    missing = num_groups * GROUP - weight_OI.shape[1]
    parts = []
    for part in _parts(weight_OI):
        padded = torch.nn.functional.pad(part.float(), (0, missing))
        codes, scale, zero = _int4_of(padded.reshape(-1, GROUP).t().contiguous())
        flat = codes.add_(8).to(torch.uint8).t().reshape(len(part), -1)
        parts.append((flat[:, 0::2] | flat[:, 1::2] << 4, scale.view(-1, num_groups), zero.view(-1, num_groups)))
    packed, scales, zeros = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return Int4Codes(packed, scales.bfloat16(), zeros.bfloat16(), weight_OI.shape[1])


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[object, ...]]) -> None:
    found = {name: (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"codes of {expected} were expected, found {found}")


def _grouped(weight_OJ: Tensor) -> Tensor:
    return weight_OJ.view(len(weight_OJ), -1, GROUP)


def _parts(weight_OI: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight_OI, max(1, _PART // weight_OI.shape[1]))


def _int8_of(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    scale = _rounded((weight_OI.abs().amax(1) / 127).clamp_min(_SMALLEST))
    codes = (weight_OI / scale[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale.bfloat16()


def _int4_of(weight_KG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes -8 .. 7 [K, G], scales and zeros [G] of groups of K weights, all float32.

    The range of a group's codes is its weights' or somewhat less; then codes, and for these the best scale and zero by least squares, in
    turn. What has the least error of all that was tried on the way is taken, so weights that lie on such a grid stay as they are.
    """
    low, high = weight_KG.amin(0), weight_KG.amax(0)
    middle, reach, mean = (low + high) / 2, (high - low) / 2, _sum_in_order(weight_KG) / GROUP
    codes, product = torch.empty_like(weight_KG), torch.empty_like(weight_KG)
    best_error = torch.full_like(mean, float("inf"))
    best_scale, best_zero = mean, mean
    for shrink in _SHRINKS:
        scale = _rounded((reach * (shrink * 2 / 15)).clamp_min(_SMALLEST))
        zero = _rounded(middle + scale / 2)
        for turn in range(_TURNS):
            _encode(weight_KG, scale, zero, codes)
            torch.mul(codes, scale, out=product).add_(zero).sub_(weight_KG).square_()
            error = _sum_in_order(product)
            is_better = error < best_error
            best_error = torch.where(is_better, error, best_error)
            best_scale = torch.where(is_better, scale, best_scale)
            best_zero = torch.where(is_better, zero, best_zero)
            if turn + 1 < _TURNS:
                mean_code = _sum_in_order(codes) / GROUP
                covariance = _sum_in_order(torch.mul(codes, weight_KG, out=product)) / GROUP - mean_code * mean
                variance = _sum_in_order(codes.square_()) / GROUP - mean_code.square()
                slope = covariance / variance
                # Codes that are all equal have no slope.
                scale = _rounded(torch.where((variance > 0.01) & (slope > _SMALLEST), slope, scale))
                zero = _rounded(mean - scale * mean_code)
    _encode(weight_KG, best_scale, best_zero, codes)
    return codes, best_scale, best_zero


def _encode(weight_KG: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> None:
    torch.sub(weight_KG, zero, out=codes).mul_(1 / scale).round_().clamp_(-8, 7)


def _rounded(values: Tensor) -> Tensor:
    """As they are stored. Codes are made with these: the rounding of a scale alone would be an error of up to 0.4 % of the weights."""
    return values.bfloat16().float()


def _sum_in_order(values_KG: Tensor) -> Tensor:
    """Over the K weights of each group; torch's own sum adds in an order that depends on the processor."""
    while len(values_KG) > 1:
        half = len(values_KG) // 2
        values_KG = values_KG[:half] + values_KG[half:]
    return values_KG[0]
