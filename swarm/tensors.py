"""Tensors as bytes: nothing is pickled, and nothing from a peer is allocated before its size was checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from protos import tensor_pb2
from swarm.errors import BadRequest
from swarm.wire_format import Buffer as Buffer
from swarm.wire_format import WireFormat as WireFormat

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
INT8_BLOCK = 64
_INT8_MAX = 127


_WIRE_FORMAT_OF = {
    (tensor_pb2.FLOAT32, tensor_pb2.RAW): WireFormat.FP32,
    (tensor_pb2.BFLOAT16, tensor_pb2.RAW): WireFormat.BF16,
    (tensor_pb2.FLOAT32, tensor_pb2.BLOCKWISE_INT8): WireFormat.INT8,
}


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


def wire_format_of(header: tensor_pb2.TensorHeader) -> WireFormat | None:
    """The form that a tensor came in, to answer in the same; None: in another one."""
    return _WIRE_FORMAT_OF.get((header.dtype, header.codec))


def encode_tensor(tensor: Tensor, wire: WireFormat | None = None) -> tuple[tensor_pb2.TensorHeader, memoryview]:
    """Header and little-endian bytes. wire is for floating tensors, others ignore it; None: in the tensor's own dtype.

    The bytes are a view of a contiguous CPU tensor, not a copy, if nothing has to be converted.
    """
    plain = tensor.detach() if tensor.requires_grad else tensor
    if wire is not None and plain.dtype.is_floating_point:
        if wire is WireFormat.INT8:
            return _encode_blockwise_int8(plain)
        plain = plain.to(torch.float32 if wire is WireFormat.FP32 else torch.bfloat16)
    if plain.device.type != "cpu" or not plain.is_contiguous():
        plain = plain.to("cpu").contiguous()
    header = tensor_pb2.TensorHeader(dtype=_TO_WIRE[plain.dtype], codec=tensor_pb2.RAW, shape=plain.shape)
    if plain.numel() == 0:
        return header, memoryview(b"")
    if plain.dtype is torch.bfloat16:  # which numpy does not know
        plain = plain.view(torch.int16)
    values: memoryview = plain.numpy().data
    return header, values.cast("B")


def _encode_blockwise_int8(tensor: Tensor) -> tuple[tensor_pb2.TensorHeader, memoryview]:
    """NaN or infinity in a block make its scale so, which a receiver refuses."""
    header = tensor_pb2.TensorHeader(dtype=tensor_pb2.FLOAT32, codec=tensor_pb2.BLOCKWISE_INT8, shape=tensor.shape)
    size = tensor.numel()
    if size == 0:
        return header, memoryview(b"")
    blocks = F.pad(tensor.reshape(-1).float(), (0, -size % INT8_BLOCK)).view(-1, INT8_BLOCK)
    scales = blocks.abs().amax(dim=1) / _INT8_MAX
    # Divided by a scale of 0 (of zeros, or of values too small to have one) they would be NaN, which as int8 is undefined; a
    # subnormal scale may be so far off that they leave the range.
    divisors = torch.where(scales == 0, torch.inf, scales)
    steps = (blocks / divisors[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX)
    payload = torch.empty(num_bytes(header), dtype=torch.uint8)
    payload[: scales.nbytes].view(torch.float32).copy_(scales)
    payload[scales.nbytes :].view(torch.int8).copy_(steps.view(-1)[:size])
    return header, payload.numpy().data


def num_bytes(header: tensor_pb2.TensorHeader) -> int:
    """Bytes that the tensor which header describes takes on the wire. BadRequest for headers that describe none."""
    dtype = _FROM_WIRE.get(header.dtype)
    if dtype is None or header.codec not in (tensor_pb2.RAW, tensor_pb2.BLOCKWISE_INT8):
        raise BadRequest(f"tensor header: unknown dtype {header.dtype} or codec {header.codec}")
    if header.codec == tensor_pb2.BLOCKWISE_INT8 and dtype is not torch.float32:
        raise BadRequest(f"tensor header: codec BLOCKWISE_INT8 is of FLOAT32, not of {dtype}")
    if len(header.shape) > MAX_DIMENSIONS:
        raise BadRequest(f"tensor header: {len(header.shape)} dimensions, at most {MAX_DIMENSIONS} are allowed")
    size = math.prod(header.shape)
    if header.codec == tensor_pb2.BLOCKWISE_INT8:
        return size + 4 * -(-size // INT8_BLOCK)
    return size * dtype.itemsize


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
        if header.codec == tensor_pb2.BLOCKWISE_INT8:
            tensors.append(_decode_blockwise_int8(part, math.prod(header.shape)).view(tuple(header.shape)))
        elif dtype is torch.bool:
            tensors.append(torch.frombuffer(part, dtype=torch.uint8).view(tuple(header.shape)) != 0)
        else:
            tensors.append(torch.frombuffer(part, dtype=dtype).view(tuple(header.shape)))
        offset += size
    return tensors


def _decode_blockwise_int8(part: bytearray, size: int) -> Tensor:
    """float32 [size]."""
    scales = torch.frombuffer(part, dtype=torch.float32, count=-(-size // INT8_BLOCK))
    if not bool(((scales >= 0) & (scales < torch.inf)).all()):
        raise BadRequest("tensor: the scales of its blocks must be finite and not negative")
    values = torch.frombuffer(part, dtype=torch.int8, offset=scales.nbytes).float()
    in_whole_blocks = size - size % INT8_BLOCK
    values[:in_whole_blocks].view(-1, INT8_BLOCK).mul_(scales[: size // INT8_BLOCK, None])
    values[in_whole_blocks:].mul_(scales[-1])
    return values
