"""Linears whose weights never change, in fewer bytes or faster than nn.Linear; they take its place where a shard only serves.

    PrepackedLinear     fp32, bf16: weights in oneDNN's own layout
    Int8Linear          codes and one scale for each output
    Int4Linear          codes, and scales and zeros for groups of 32 inputs
    WidenedLinear       either kind of codes without torch's kernels: slower, and right everywhere

Each holds its weights once. Gradients flow to the input, never to the weights, and a graph holds none of them. The operators are
private to torch: swarm/linears/choice.py tries each before it is used.

One row is bound by memory, many by arithmetic: up to some number of rows a kernel reads the codes as they are; for more of them they are
widened to bf16, for a matrix product at full speed.

R rows, I inputs, O outputs; G groups of inputs.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swarm.linears.int4_layout import find_int4_layout
from swarm.linears.quantize import GROUP, Int4Codes, Int8Codes

# Where both ways take the same time, measured on Zen 5 with one and two threads, 576 x 576 to 5632 x 2048 (docs/log.md).
INT8_KERNEL_ROWS = 20
INT4_KERNEL_ROWS = 64

_ALIGNMENT = 64
"""Bytes, as torch allocates. The int8 kernel crashes with inputs at no multiple of 32, or codes at none of 16."""
_WIDENED_AT_ONCE = 1 << 23
"""Weights that are in bf16 at a time: 16 MiB."""


class FrozenLinear(nn.Module, abc.ABC):
    """y = x W^T + b."""

    def __init__(self, num_inputs: int, num_outputs: int, dtype: torch.dtype, bias: Tensor | None) -> None:
        """dtype: of what goes in and comes out. bias: [O]."""
        super().__init__()
        self.in_features, self.out_features, self.dtype = num_inputs, num_outputs, dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """[O, I] in dtype, made anew each time: for the few who look at the weights of a linear."""
        return self.dense().to(self.dtype)

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """The weights that it computes with, [O, I]."""

    @abc.abstractmethod
    def outputs(self, given_RI: Tensor) -> Tensor:
        """x W^T + b, [R, O], of a contiguous x with rows."""

    @abc.abstractmethod
    def input_gradient(self, gradient_RO: Tensor) -> Tensor:
        """[R, I]."""

    def forward(self, given: Tensor) -> Tensor:
        """[..., I] to [..., O]. What has another dtype is rounded to this one, and the output to it, unless autocast is on."""
        if given.dtype != self.dtype:
            output: Tensor = self.forward(given.to(self.dtype))  # not self(...): hooks, such as adapters, come once
            return output if torch.is_autocast_enabled(given.device.type) else output.to(given.dtype)
        if given.requires_grad and torch.is_grad_enabled():
            # Views are made outside: what a Function returns as one cannot be changed in place, as some families do.
            rows = given.reshape(-1, self.in_features)
            output = _WithInputGradient.apply(rows, self)  # type: ignore[no-untyped-call]
            return output.view(*given.shape[:-1], self.out_features)
        return self.compute(given)

    def compute(self, given: Tensor) -> Tensor:
        """As forward, without autograd."""
        if given.numel() == 0:  # experts that were not chosen, say
            return given.new_zeros(*given.shape[:-1], self.out_features)
        rows = given.reshape(-1, self.in_features).contiguous()
        return self.outputs(rows).view(*given.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class _WithInputGradient(torch.autograd.Function):
    """The graph leads to the linear itself, not to tensors of it, so weights are never counted, copied or kept for a graph."""

    @staticmethod
    def forward(ctx: Any, given_RI: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.outputs(given_RI.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        linear: FrozenLinear = ctx.linear
        return linear.input_gradient(gradients[0].contiguous()), None


class PrepackedLinear(FrozenLinear):
    """fp32 or bf16. At one row twice as fast as nn.Linear; at many as fast in bf16, and in fp32, where that is MKL's, twice as fast."""

    packed: Tensor

    def __init__(self, weight_OI: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight_OI.shape[1], weight_OI.shape[0], weight_OI.dtype, bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), None)
        self.register_buffer("packed", packed, persistent=False)

    def dense(self) -> Tensor:
        return self.packed.to_dense()

    def compute(self, given: Tensor) -> Tensor:
        return self.outputs(given)

    def outputs(self, given_RI: Tensor) -> Tensor:
        if torch._C._get_tracing_state() is not None:
            traced: Tensor = _scripted_product(given_RI, self.packed, self.bias)
            return traced
        return _product(given_RI, self.packed, self.bias)

    def input_gradient(self, gradient_RO: Tensor) -> Tensor:
        weight = self.dense()
        # MKL's product, which @ is in fp32, takes twice the time.
        return _product(gradient_RO, weight.t(), None) if self.dtype == torch.float32 else gradient_RO @ weight


def join(linears: Sequence[PrepackedLinear]) -> PrepackedLinear:
    """One linear with the outputs of all of them, which take the same input, and of which all have a bias or none."""
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    weight = torch.cat([linear.dense() for linear in linears])
    return PrepackedLinear(weight, torch.cat(biases) if biases else None)


def _product(given: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(given, packed, bias, "none", [], "")  # type: ignore[no-any-return]


@torch.jit.script
def _scripted_product(given: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    # torch.jit.trace cannot record this operator, but a call of a scripted function.
    return torch.ops.mkldnn._linear_pointwise(given, packed, bias, "none", [], "")  # type: ignore[no-any-return]


class Int8Linear(FrozenLinear):
    """bf16 activations. Half the memory of bf16."""

    codes: Tensor
    """int8 [O, I]."""
    scale: Tensor
    """bf16 [O]."""

    def __init__(self, codes: Int8Codes, bias: Tensor | None) -> None:
        """Raises ValueError for shapes that the kernel would crash with."""
        num_outputs, num_inputs = codes.codes.shape
        super().__init__(num_inputs, num_outputs, torch.bfloat16, bias)
        if num_inputs % 32:
            raise ValueError(f"the kernel reads 32 inputs at a time, also behind the last of {num_inputs}")
        self.register_buffer("codes", _own(codes.codes), persistent=False)
        self.register_buffer("scale", _own(codes.scale), persistent=False)

    def dense(self) -> Tensor:
        return Int8Codes(self.codes, self.scale).dense()

    def outputs(self, given_RI: Tensor) -> Tensor:
        output: Tensor
        if given_RI.shape[0] <= INT8_KERNEL_ROWS:
            # A view may begin anywhere; what a trace is replayed with, nobody looks at.
            if torch._C._get_tracing_state() is not None or given_RI.data_ptr() % _ALIGNMENT:
                given_RI = given_RI.clone()
            output = torch.ops.aten._weight_int8pack_mm(given_RI, self.codes, self.scale)
        else:
            # bf16 has the codes exactly, as they are whole numbers below 256.
            products = [F.linear(given_RI, part.to(self.dtype)) for part in self._parts()]
            output = (torch.cat(products, dim=1) if len(products) > 1 else products[0]).mul_(self.scale)
        return output if self.bias is None else output.add_(self.bias)

    def input_gradient(self, gradient_RO: Tensor) -> Tensor:
        parts = self._parts()
        pieces = torch.split(gradient_RO * self.scale, [len(part) for part in parts], dim=1)
        gradients = [piece @ part.to(self.dtype) for piece, part in zip(pieces, parts, strict=True)]
        return _sum(gradients)

    def _parts(self) -> tuple[Tensor, ...]:
        return torch.split(self.codes, max(1, _WIDENED_AT_ONCE // self.in_features))


def _own(tensor: Tensor) -> Tensor:
    """In memory of torch's own, not in a mapped file, where it may begin anywhere."""
    tensor = tensor.contiguous()
    is_own = tensor.data_ptr() % _ALIGNMENT == 0 and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_own else tensor.clone()


class Int4Linear(FrozenLinear):
    """bf16 activations. Less than a third of the memory of bf16."""

    packed: Tensor
    """uint8: see Int4Layout. The outputs are filled up to N, the inputs to whole groups."""
    scale_and_zero: Tensor
    """bf16 [G, N, 2]."""

    def __init__(self, codes: Int4Codes, bias: Tensor | None) -> None:
        """Raises RuntimeError where torch has no such kernel, or one of another layout than the known ones."""
        num_outputs = len(codes.scale)
        super().__init__(codes.num_inputs, num_outputs, torch.bfloat16, bias)
        self._layout = find_int4_layout()
        packed = self._layout.pack(codes)
        self._missing_outputs, self._missing_inputs = len(packed) - num_outputs, -codes.num_inputs % GROUP
        scale_and_zero = torch.stack([codes.scale, codes.zero], dim=2)
        scale_and_zero = F.pad(scale_and_zero, (0, 0, 0, 0, 0, self._missing_outputs))
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale_and_zero", scale_and_zero.transpose(0, 1).contiguous(), persistent=False)

    def dense(self) -> Tensor:
        return self.input_gradient(torch.eye(self.out_features, dtype=self.dtype, device=self.packed.device))

    def outputs(self, given_RI: Tensor) -> Tensor:
        if self._missing_inputs:
            given_RI = F.pad(given_RI, (0, self._missing_inputs))
        output: Tensor
        if given_RI.shape[0] <= INT4_KERNEL_ROWS:
            kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
            output = kernel(given_RI, self.packed, GROUP, self.scale_and_zero)
        else:
            sums_RG = given_RI.view(len(given_RI), -1, GROUP).sum(2)
            products = [
                self._layout.join(given_RI @ self._layout.widen(packed, scale)) + sums_RG @ zero
                for packed, scale, zero in self._parts()
            ]
            output = torch.cat(products, dim=1)
        if self._missing_outputs:
            output = output[:, : self.out_features].contiguous()
        return output if self.bias is None else output.add_(self.bias)

    def input_gradient(self, gradient_RO: Tensor) -> Tensor:
        gradient = F.pad(gradient_RO, (0, self._missing_outputs))
        parts = self._parts()
        gradients = []
        for piece, (packed, scale, zero) in zip(
            torch.split(gradient, [len(part[0]) for part in parts], dim=1), parts, strict=True
        ):
            halves = self._layout.split(piece) @ self._layout.widen(packed, scale).transpose(1, 2)
            of_zeros = (piece @ zero.t()).repeat_interleave(GROUP, dim=1)
            gradients += [halves[0], halves[1], of_zeros]
        return _sum(gradients)[:, : self.in_features]

    def _parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Codes of some outputs, with their scales and zeros [G, N]."""
        block = self._layout.block
        size = max(1, _WIDENED_AT_ONCE // (2 * self.packed.shape[1]) // block) * block
        scale_GN, zero_GN = self.scale_and_zero.unbind(2)
        pieces = torch.split(self.packed, size), torch.split(scale_GN, size, dim=1), torch.split(zero_GN, size, dim=1)
        return list(zip(*pieces, strict=True))


class WidenedLinear(FrozenLinear):
    """bf16 activations, and nothing but public operations of torch, on any device: codes are widened to bf16 each time."""

    def __init__(self, codes: Int8Codes | Int4Codes, bias: Tensor | None) -> None:
        super().__init__(codes.num_inputs, len(codes), torch.bfloat16, bias)
        self.kind, self._names = type(codes), tuple(codes.tensors)
        for name, tensor in codes.tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def dense(self) -> Tensor:
        return torch.cat(self._parts())

    def outputs(self, given_RI: Tensor) -> Tensor:
        output = torch.cat([F.linear(given_RI, part) for part in self._parts()], dim=1)
        return output if self.bias is None else output.add_(self.bias)

    def input_gradient(self, gradient_RO: Tensor) -> Tensor:
        return gradient_RO @ self.dense()

    def _parts(self) -> list[Tensor]:
        codes = self.kind.of({name: self.get_buffer(name) for name in self._names}, self.in_features)
        size = max(1, _WIDENED_AT_ONCE // self.in_features)
        return [codes.rows(at, at + size).dense().to(self.dtype) for at in range(0, self.out_features, size)]


def _sum(gradients: list[Tensor]) -> Tensor:
    """In float32, as each is one part of a sum that was to be rounded once."""
    if len(gradients) == 1:
        return gradients[0]
    total = gradients[0].float()
    for gradient in gradients[1:]:
        total += gradient
    return total.to(gradients[0].dtype)
