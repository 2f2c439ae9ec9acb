"""Codes and scales of weights in 8 and 4 bits, the same to the bit on every machine.

Only elementwise operations, which IEEE 754 fixes, minima and maxima are used, and sums in a fixed order: nodes that quantise equal
weights have equal codes. How a processor likes to have them packed is the business of swarm/linears/frozen.py.

O outputs, I inputs of a linear; G groups of 32 inputs; J inputs, filled up with zeros to whole groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
FORMAT_VERSION = 1
"""Changes whenever the same weights get other codes."""

_PART = 1 << 22
"""Weights that are widened to float32 at a time."""
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


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
    """Of some ranges for each group the one with the least squared error."""
    missing = -weight_OI.shape[1] % GROUP
    parts = []
    for part in _parts(weight_OI):
        padded = torch.nn.functional.pad(part.float(), (0, missing))
        parts.append(_int4_of(_grouped(padded)))
    codes, scale, zero = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return Int4Codes(codes, scale, zero, weight_OI.shape[1])


def _grouped(weight_OJ: Tensor) -> Tensor:
    return weight_OJ.view(len(weight_OJ), -1, GROUP)


def _parts(weight_OI: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight_OI, max(1, _PART // weight_OI.shape[1]))


def _int8_of(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    # Codes are made with the scale as it is stored: its rounding to bf16 alone would be an error of up to 0.4 % of the weights.
    scale = _bf16(weight_OI.abs().amax(1) / 127)
    codes = (weight_OI / scale.float()[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def _int4_of(weight_OGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = weight_OGK.amin(2), weight_OGK.amax(2)
    middle, reach = (low + high) / 2, (high - low) / 2
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for shrink in _SHRINKS:
        scale = _bf16(reach * (shrink * 2 / 15))
        zero = (middle - reach * shrink + 8 * scale.float()).bfloat16()
        codes = ((weight_OGK - zero.float()[..., None]) / scale.float()[..., None]).round().add(8).clamp(0, 15)
        found = (codes - 8) * scale.float()[..., None] + zero.float()[..., None]
        error = _sum_in_order((found - weight_OGK).square())
        if best is None:
            best = error, codes, scale, zero
        else:
            is_better = error < best[0]
            best = (
                torch.where(is_better, error, best[0]),
                torch.where(is_better[..., None], codes, best[1]),
                torch.where(is_better, scale, best[2]),
                torch.where(is_better, zero, best[3]),
            )
    assert best is not None
    _, codes, scale, zero = best
    flat = codes.to(torch.uint8).flatten(1)
    return flat[:, 0::2] | (flat[:, 1::2] << 4), scale, zero


def _bf16(scale: Tensor) -> Tensor:
    """Never zero: a group of zeros is divided by its scale, too."""
    return scale.clamp_min(1e-30).bfloat16()


def _sum_in_order(values: Tensor) -> Tensor:
    """Over the last dimension, whose size is a power of two; torch's own sum adds in an order that depends on the processor."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)
