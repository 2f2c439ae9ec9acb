"""How torch's int4 kernel on this processor keeps its codes, so that they can be read back and widened to bf16.

The kernel's packing is private and differs between AVX-512, AVX2 and others. It is recognised once by packing codes that are known.

N outputs, filled up to a multiple of 64; K inputs, of 32; blocks of B outputs, of which each byte holds two: P = N / 2.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.linears.quantize import GROUP, Int4Codes

OUTPUTS = 64
"""A multiple of this many outputs is packed alike on all processors: in whole blocks."""
_PACKED_AT_ONCE = 1 << 21
"""Weights; the operator wants them as int32."""


@dataclass(frozen=True, slots=True)
class Int4Layout:
    """Blocks of so many outputs: for each input a row of bytes, whose low bits are one half of the outputs, and high bits the other."""

    block: int
    is_interleaved: bool
    """Whether the halves are even and odd outputs, or the first and the second ones."""

    def pack(self, codes: Int4Codes) -> Tensor:
        """uint8 [N, K / 2]. The outputs that are filled up have any codes: their scales are zero."""
        num_outputs, num_bytes = codes.codes.shape
        packed = torch.zeros(-(-num_outputs // OUTPUTS) * OUTPUTS, num_bytes, dtype=torch.uint8)
        at_once = max(1, _PACKED_AT_ONCE // (2 * num_bytes) // OUTPUTS) * OUTPUTS
        for start in range(0, num_outputs, at_once):
            part = codes.rows(start, start + at_once).unpacked().to(torch.int32)
            part = torch.nn.functional.pad(part, (0, 0, 0, -len(part) % OUTPUTS))
            packed[start : start + len(part)] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 2)
        return packed

    def widen(self, packed: Tensor, scale_GN: Tensor) -> Tensor:
        """(codes - 8) * scale, bf16 [2, K, P]: see `split`."""
        num_outputs, num_inputs = packed.shape[0], 2 * packed.shape[1]
        # Byte by byte as long as possible: wider types cost more time than the arithmetic.
        bytes_KP = packed.view(-1, num_inputs, self.block // 2).transpose(0, 1).reshape(num_inputs, -1)
        weight = torch.empty(2, num_inputs, num_outputs // 2, dtype=torch.bfloat16, device=packed.device)
        weight[0] = (bytes_KP & 15).view(torch.int8).sub_(8)
        weight[1] = (bytes_KP >> 4).view(torch.int8).sub_(8)
        weight.view(2, -1, GROUP, num_outputs // 2).mul_(self.split(scale_GN)[:, :, None])
        return weight

    def split(self, of_outputs: Tensor) -> Tensor:
        """[rows, N] to [2, rows, P], in the order in which the halves of the bytes have the outputs."""
        rows = of_outputs.shape[0]
        blocks = of_outputs.view(rows, -1, *((self.block // 2, 2) if self.is_interleaved else (2, self.block // 2)))
        order = (3, 0, 1, 2) if self.is_interleaved else (2, 0, 1, 3)
        return blocks.permute(order).reshape(2, rows, -1)

    def join(self, halves: Tensor) -> Tensor:
        """[2, rows, P] to [rows, N]."""
        rows = halves.shape[1]
        blocks = halves.view(2, rows, -1, self.block // 2)
        return blocks.permute((1, 2, 3, 0) if self.is_interleaved else (1, 2, 0, 3)).reshape(rows, -1)


@functools.cache
def find_int4_layout() -> Int4Layout:
    """That of this processor. RuntimeError (or what torch raises) if it is not known, or if there is no such kernel."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2 * OUTPUTS, GROUP), dtype=torch.uint8, generator=generator)
    one = torch.ones(len(codes), 1, dtype=torch.bfloat16)
    known = Int4Codes(codes[:, 0::2] | codes[:, 1::2] << 4, one, one, GROUP)
    for block, is_interleaved in ((64, False), (32, False), (32, True), (64, True)):
        layout = Int4Layout(block, is_interleaved)
        widened = layout.widen(layout.pack(known), one.t())
        if torch.equal(layout.join(widened), (codes.t().bfloat16() - 8)):
            return layout
    raise RuntimeError("the int4 kernel of this torch on this processor has a layout that is not known")
