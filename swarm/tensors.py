"""Tensors as bytes: nothing is pickled, and nothing from a peer is allocated before its size was checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protos import tensor_pb2
from swarm.errors import BadRequest

Buffer = bytes | bytearray | memoryview

_TO_WIRE = {
    torch.float32: tensor_pb2.FLOAT32,
    torch.bfloat16: tensor_pb2.BFLOAT16,
    torch.float16: tensor_pb2.FLOAT16,
    torch.int64: tensor_pb2.INT64,
    torch.bool: tensor_pb2.BOOL,
}
_FROM_WIRE = {wire: dtype for dtype, wire in _TO_WIRE.items()}
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorLimits:
    """What a receiver accepts as one tensor: dtypes, and a shape in which None stands for "any size"."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int | None, ...]
    name: str

    def check(self, tensor: Tensor) -> Tensor:
        """The tensor itself; BadRequest if dtype or shape differ, or a floating value is not finite."""
        if tensor.dtype not in self.dtypes:
            raise BadRequest(f"{self.name}: dtype {tensor.dtype} is not one of {', '.join(map(str, self.dtypes))}")
        fits = tensor.ndim == len(self.shape) and all(
            want is None or want == have for want, have in zip(self.shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise BadRequest(f"{self.name}: shape [{wanted}] is needed, got {list(tensor.shape)}")
        if tensor.dtype.is_floating_point and not is_finite(tensor):
            raise BadRequest(f"{self.name}: holds NaN or infinite values")
        return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity.

    A finite sum proves it in one pass; only a sum that is not (which may be an overflow) needs the element-wise look.
    """
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def encode_tensor(tensor: Tensor) -> tuple[tensor_pb2.TensorHeader, memoryview]:
    """Header and raw little-endian bytes. The bytes are a view of a contiguous CPU tensor, not a copy."""
    plain = tensor.detach() if tensor.requires_grad else tensor
    if plain.device.type != "cpu" or not plain.is_contiguous():
        plain = plain.to("cpu").contiguous()
    header = tensor_pb2.TensorHeader(dtype=_TO_WIRE[plain.dtype], codec=tensor_pb2.RAW, shape=plain.shape)
    if plain.numel() == 0:
        return header, memoryview(b"")
    if plain.dtype is torch.bfloat16:  # which numpy does not know
        plain = plain.view(torch.int16)
    values: memoryview = plain.numpy().data
    return header, values.cast("B")


def num_bytes(header: tensor_pb2.TensorHeader) -> int:
    """Bytes of the tensor that header describes. BadRequest for headers that describe none."""
    dtype = _FROM_WIRE.get(header.dtype)
    if dtype is None or header.codec != tensor_pb2.RAW:
        raise BadRequest(f"tensor header: unknown dtype {header.dtype} or codec {header.codec}")
    if len(header.shape) > MAX_DIMENSIONS:
        raise BadRequest(f"tensor header: {len(header.shape)} dimensions, at most {MAX_DIMENSIONS} are allowed")
    return math.prod(header.shape) * dtype.itemsize


def decode_tensors(headers: Sequence[tensor_pb2.TensorHeader], payload: memoryview) -> list[Tensor]:
    """The tensors that lie one after another in payload, which must be exactly as long as the headers say."""
    sizes = [num_bytes(header) for header in headers]
    if sum(sizes) != len(payload):
        raise BadRequest(f"tensors of {sum(sizes)} bytes are declared, {len(payload)} bytes came")
    tensors, offset = [], 0
    for header, size in zip(headers, sizes, strict=True):
        dtype = _FROM_WIRE[header.dtype]
        if size == 0:
            # torch refuses to make an empty tensor whose other sizes overflow when multiplied
            tensors.append(torch.empty(tuple(min(length, 2**15) for length in header.shape), dtype=dtype))
            continue
        part = bytearray(payload[offset : offset + size])  # a copy: aligned, writable and independent of the message
        if dtype is torch.bool:
            tensors.append(torch.frombuffer(part, dtype=torch.uint8).view(tuple(header.shape)) != 0)
        else:
            tensors.append(torch.frombuffer(part, dtype=dtype).view(tuple(header.shape)))
        offset += size
    return tensors
