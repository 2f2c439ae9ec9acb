"""Frozen linears compute what their weights say, forward and backward, in every shape; codes are the same everywhere.

Tolerances are parts of the largest value. In fp32 products of 640 values that are added in another order differ by some 1e-7 of it. In bf16
an output is rounded to 2^-9 of itself, weights and scales that are widened to bf16 by as much again: below 0.01 together.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swarm.linears import choice as linear_choice
from swarm.linears import frozen
from swarm.linears.choice import LinearChoice, largest_error
from swarm.linears.frozen import FrozenLinear, Int4Linear, Int8Linear, PrepackedLinear, WidenedLinear
from swarm.linears.int4_layout import Int4Layout, find_int4_layout
from swarm.linears.quantize import Codes, Int4Codes, Int8Codes, quantize, quantize_int4, quantize_int8

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.01}
KINDS = ["fp32", "bf16", "int8", "int4", "widened int8", "widened int4"]
SHAPES = [(64, 32), (8, 64), (100, 96), (192, 640), (640, 192)]
ODD_SHAPES = [(3, 5), (17, 33), (130, 100)]


def weight_of(num_outputs: int, num_inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed)) / num_inputs**0.5


def make(kind: str, weight: Tensor, bias: Tensor | None = None) -> tuple[FrozenLinear, Tensor]:
    """A linear, and the weights that it is to compute with, in float64."""
    if kind == "fp32":
        return PrepackedLinear(weight, bias), weight.double()
    if kind == "bf16":
        return PrepackedLinear(weight.bfloat16(), bias), weight.bfloat16().double()
    codes = quantize_int8(weight) if kind.endswith("int8") else quantize_int4(weight)
    if kind.startswith("widened"):
        return WidenedLinear(codes, bias), codes.dense().double()
    linear = Int8Linear(codes, bias) if isinstance(codes, Int8Codes) else Int4Linear(codes, bias)
    return linear, codes.dense().double()


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


def check(linear: FrozenLinear, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(*shape, linear.in_features, generator=generator).to(linear.dtype).requires_grad_()
    gradient = torch.randn(*shape, linear.out_features, generator=generator).to(linear.dtype)
    output = linear(given)
    assert output.dtype == linear.dtype
    expected = given.detach().double() @ weight.T
    if bias is not None:
        expected = expected + bias.to(linear.dtype).double()
    assert distance(output, expected) < TOLERANCE[linear.dtype]
    output.backward(gradient)
    assert given.grad is not None and given.grad.dtype == linear.dtype
    assert distance(given.grad, gradient.double() @ weight) < TOLERANCE[linear.dtype]
    with torch.inference_mode():
        assert torch.equal(linear(given.detach()), output)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_input_gradients_are_those_of_the_weights(
    kind: str, shape: tuple[int, int], has_bias: bool
) -> None:
    """One row, a few, more than any kernel takes; of one sequence or several."""
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)) if has_bias else None
    linear, weight = make(kind, weight_of(*shape), bias)
    for rows in [(1, 1), (3,), (2, 9), (1, 21), (5, 20)]:
        check(linear, weight, bias, rows)
    assert distance(linear.weight, weight) < TOLERANCE[linear.dtype]
    assert linear.weight.shape == shape and linear.weight.dtype == linear.dtype


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int4", "widened int8", "widened int4"])
def test_shapes_that_fill_no_block_or_group(kind: str, shape: tuple[int, int]) -> None:
    linear, weight = make(kind, weight_of(*shape))
    for rows in [(1,), (70,)]:
        check(linear, weight, None, rows)


def test_the_int8_kernel_never_gets_inputs_that_it_would_read_past() -> None:
    codes = quantize_int8(weight_of(16, 33))
    with pytest.raises(ValueError, match="32 inputs at a time"):
        Int8Linear(codes, None)
    assert isinstance(LinearChoice(torch.device("cpu")).of_codes(codes, None), WidenedLinear)


def at_offset(tensor: Tensor, num_bytes: int) -> Tensor:
    """The same values in memory that begins so far behind a multiple of 64."""
    memory = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + num_bytes
    view = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    assert view.data_ptr() % 64 == num_bytes
    return view.copy_(tensor)


@pytest.mark.parametrize("offset", [4, 8, 16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_codes_may_begin_anywhere_in_memory(kind: str, offset: int) -> None:
    """The int8 kernel itself ends the process at most of these offsets (measured), here and when a trace is replayed."""
    linear, _ = make(kind, weight_of(192, 96))
    codes = quantize_int8(weight_of(192, 96))
    if kind == "int8":
        moved = Int8Linear(Int8Codes(at_offset(codes.codes, offset), at_offset(codes.scale, offset)), None)
    else:
        moved = linear
    with torch.inference_mode():
        for rows in (1, 3, 4, 17, 20, 40):
            given = torch.randn(rows, 96).to(linear.dtype)
            expected = linear(given)
            assert torch.equal(moved(at_offset(given, offset)), expected)
            if not kind.startswith("widened"):
                traced = torch.jit.trace(linear, (given,), check_trace=False)
                assert torch.equal(traced(at_offset(given, offset)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_rows(kind: str) -> None:
    linear, _ = make(kind, weight_of(64, 32))
    assert linear(torch.zeros(0, 32, dtype=linear.dtype)).shape == (0, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_widened_in_several_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_WIDENED_AT_ONCE", 70 * 96)
    linear, weight = make(kind, weight_of(200, 96))
    check(linear, weight, None, (80,))


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_holds_no_weights(kind: str) -> None:
    linear, _ = make(kind, weight_of(64, 32))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    given = torch.randn(3, 32).to(linear.dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(given).sum().backward()
    assert saved == [] and all(parameter.grad is None for parameter in linear.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_holds_the_weights_once(kind: str) -> None:
    linear, _ = make(kind, weight_of(640, 640))
    tensors = [*linear.parameters(), *linear.buffers()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 640**2
    bound = {"fp32": 4, "bf16": 2, "int8": 1.01, "int4": 0.63}[kind.rpartition(" ")[2]]
    assert held <= bound
    assert linear.state_dict().keys() <= {"bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_another_dtype_as_under_autocast_and_without_it(kind: str) -> None:
    linear, weight = make(kind, weight_of(64, 32))
    other = torch.bfloat16 if linear.dtype == torch.float32 else torch.float32
    given = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)).to(other).requires_grad_()
    assert linear(given).dtype == other
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(given)
    assert output.dtype == linear.dtype
    output.float().sum().backward()
    assert given.grad is not None and given.grad.dtype == other
    assert distance(given.grad, torch.ones(3, 64).double() @ weight) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_twins_share_weights(kind: str) -> None:
    linear, _ = make(kind, weight_of(64, 32))
    shared = {id(tensor): tensor for tensor in linear.buffers()}
    twin = copy.deepcopy(linear, dict(shared))
    given = torch.randn(3, 32).to(linear.dtype)
    assert torch.equal(twin(given), linear(given))
    assert {id(tensor) for tensor in twin.buffers()} == shared.keys()


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_a_traced_linear_computes_the_same(kind: str) -> None:
    linear, _ = make(kind, weight_of(64, 32), torch.ones(64))
    given = torch.randn(1, 1, 32).to(linear.dtype)
    with torch.inference_mode():
        traced = torch.jit.trace(linear, (given,), check_trace=False)
        assert torch.equal(traced(3 * given), linear(3 * given))


@pytest.mark.parametrize(("kind", "bound"), [(Int8Codes, 0.008), (Int4Codes, 0.074)])
def test_codes_are_near_the_weights(kind: type[Codes], bound: float) -> None:
    """Normal weights in 8 bits, 512 to a scale, are off by 0.75 %; in 4 bits, 32 to a scale, by 7.2 %."""
    weight = weight_of(64, 512)
    found = quantize(kind, weight).dense()
    assert float((found - weight).norm() / weight.norm()) < bound


@pytest.mark.parametrize("kind", [Int8Codes, Int4Codes])
def test_weights_that_are_hard_to_quantise(kind: type[Codes]) -> None:
    """Zeros, constants, one outlier, tiny and huge ones stay finite, and within a step of their group or row."""
    weight = torch.zeros(6, 64)
    weight[1], weight[2, 5], weight[3], weight[4], weight[5] = 0.3, 1000.0, 1e-20, -7e3, torch.linspace(-1, 1, 64)
    found = quantize(kind, weight).dense()
    assert bool(found.isfinite().all())
    reach = (weight.amax(1) - weight.amin(1)).clamp_min(weight.abs().amax(1)) if kind is Int8Codes else None
    step = (weight.abs().amax(1) if reach is None else reach) / (127 if kind is Int8Codes else 7)
    assert bool(((found - weight).abs() <= step[:, None] + 1e-30).all())


# Made once; a change here is another FORMAT_VERSION, and replicas of other versions would not agree.
DIGESTS = {Int8Codes: "e0e2209a5caeaf81", Int4Codes: "a23663cc54df3d74"}


@pytest.mark.parametrize("kind", [Int8Codes, Int4Codes])
def test_codes_are_the_same_with_any_dtype_parts_and_threads(
    kind: type[Codes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same as ever, from weights that have nothing to do with torch's random numbers."""
    stream = hashlib.shake_128(b"weights").digest(2 * 48 * 80)
    weight = torch.frombuffer(bytearray(stream), dtype=torch.int16).view(48, 80).float() / 2**15
    weight = weight.bfloat16()
    codes = quantize(kind, weight)
    again = quantize(kind, weight.double())
    monkeypatch.setattr("swarm.linears.quantize._PART", 100)
    in_parts = quantize(kind, weight.t().contiguous().t())
    for other in (again, in_parts):
        assert all(torch.equal(other.tensors[name], tensor) for name, tensor in codes.tensors.items())
    digest = hashlib.sha256()
    for tensor in codes.tensors.values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[kind]


def test_int4_codes_go_into_a_layout_and_come_back() -> None:
    codes = quantize_int4(weight_of(200, 96))
    layout = find_int4_layout()
    one = torch.ones(3, 256, dtype=torch.bfloat16)
    widened = layout.join(layout.widen(layout.pack(codes), one)).t()
    assert torch.equal(widened[:200].float(), codes.unpacked().float() - 8)


def test_every_layout_joins_what_it_splits() -> None:
    values = torch.arange(3 * 128).view(3, 128)
    for block, is_interleaved in [(64, False), (64, True), (32, False), (32, True)]:
        layout = Int4Layout(block, is_interleaved)
        assert torch.equal(layout.join(layout.split(values)), values)


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text = io.StringIO()

    def emit(self, record: logging.LogRecord) -> None:
        self.text.write(record.getMessage() + "\n")


SOURCES: dict[str, Any] = {
    "bf16": (
        PrepackedLinear,
        nn.Linear,
        lambda choice: choice.of_weight(weight_of(64, 32), torch.ones(64), torch.bfloat16),
    ),
    "int8": (
        Int8Linear,
        WidenedLinear,
        lambda choice: choice.of_codes(quantize_int8(weight_of(64, 32)), torch.ones(64)),
    ),
    "int4": (
        Int4Linear,
        WidenedLinear,
        lambda choice: choice.of_codes(quantize_int4(weight_of(64, 32)), torch.ones(64)),
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_works_is_taken_and_what_fails_or_lies_is_not(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is missing, one that is wrong for few rows, one that is wrong in one output, a wrong gradient."""
    kind, fallback, make_one = SOURCES[source]
    given = torch.randn(5, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    right = make_one(LinearChoice(torch.device("cpu")))
    assert type(right) is kind

    def missing(*_: Any) -> Tensor:
        raise NotImplementedError("no such operator here")

    compute, gradient = kind.compute, kind.input_gradient
    faults: dict[str, Any] = {
        "compute": missing,
        "compute ": lambda self, x: compute(self, x) * (1.1 if x.numel() < 200 else 1),
        "compute  ": lambda self, x: compute(self, x) + torch.eye(64, dtype=x.dtype)[7],
        "input_gradient": lambda self, g: gradient(self, g.flip(-1)),
    }
    log = Log()
    monkeypatch.setattr(linear_choice.log, "handlers", [log])
    monkeypatch.setattr(linear_choice.log, "level", logging.INFO)
    for name, fault in faults.items():
        with monkeypatch.context() as planted:
            planted.setattr(kind, name.strip(), fault)
            choice = LinearChoice(torch.device("cpu"))
            others = [make_one(choice), make_one(choice)]
        assert all(type(other) is fallback for other in others)
        assert choice.made == {fallback.__name__: 2}
        assert distance(others[0](given), right(given).double()) < TOLERANCE[torch.bfloat16]
        assert others[0].weight.shape == (64, 32)
    lines = log.text.getvalue().splitlines()
    assert len(lines) == len(faults)  # once for each shape, not for each linear
    assert kind.__name__ in lines[0] and "no such operator here" in lines[0]
    assert "computes wrongly here, not used" in lines[1]


def test_an_error_that_is_not_a_number_counts() -> None:
    linear, weight = make("bf16", weight_of(64, 32))
    assert largest_error(linear, weight.float()) < 0.01
    weight[3, 3] = float("nan")
    assert largest_error(linear, weight.float()) == float("inf")
