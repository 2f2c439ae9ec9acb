"""Blocks of every family compute in every numeric class what the same codes do in plain modules in fp32.

The oracle is a SpanModel whose linears are transformers' own, with the weights that the codes stand for. What is left is rounding: some
1e-6 of the largest value in fp32; in bf16 activations are rounded to 2^-9 at each of some ten operations of four blocks, and softmax
and norms pass that on. Codes of one linear in the place of another's, or a family's transposed weights taken as they are, change the
first digit.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from node.backend.span_model import SpanModel
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.linears.frozen import FrozenLinear, Int4Linear, Int8Linear, WidenedLinear
from swarm.linears.quantize import Codes, Int4Codes, Int8Codes, quantize
from swarm.span import Span
from tests.support.models import NUM_BLOCKS, TINY, save_tiny

CLASSES = ["fp32", "bf16", "int8", "int4"]
SPAN, HOP = Span(1, NUM_BLOCKS), Span(2, 3)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=sorted(TINY))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(save_tiny(request.param, tmp_path_factory.mktemp(request.param))), progress=False)


def oracle_of(checkpoint: Checkpoint, frozen: SpanModel) -> SpanModel:
    """Plain modules in fp32, with the weights of the class where the other model has linears of it."""
    model = SpanModel(checkpoint, SPAN)
    for index in SPAN:
        block, other = model.block(index), frozen.block(index)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and (kind := kind_of(other.get_submodule(name))) is not None:
                weight = module.weight.data
                is_transposed = isinstance(module, Conv1D)
                found = quantize(kind, weight.t() if is_transposed else weight).dense()
                module.weight.data = found.t() if is_transposed else found
    return model


def kind_of(linear: nn.Module) -> type[Codes] | None:
    """Of the codes that it holds."""
    if isinstance(linear, WidenedLinear):
        return linear.kind
    return {Int8Linear: Int8Codes, Int4Linear: Int4Codes}.get(type(linear))


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("numeric_class", CLASSES)
def test_a_family_in_a_class_computes_what_its_codes_say(checkpoint: Checkpoint, numeric_class: str) -> None:
    """Prefill, decode, a part of the span, input gradients; and every linear of the blocks is of the class."""
    model = SpanModel(checkpoint, SPAN, numeric_class=numeric_class)
    assert model.numeric_class == numeric_class
    assert model.dtype == (torch.float32 if numeric_class == "fp32" else torch.bfloat16)
    oracle = oracle_of(checkpoint, model)
    linears = [module for index in SPAN for module in model.block(index).modules() if isinstance(module, FrozenLinear)]
    plain = [
        name
        for index in SPAN
        for name, module in model.block(index).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if numeric_class == "int4":
        assert {kind_of(linear) for linear in linears} >= {Int4Codes}
    assert len(linears) >= 2 * len(SPAN)
    assert all("gate" in name or "router" in name for name in plain)
    hidden = torch.randn(2, 25, model.hidden_size, generator=torch.Generator().manual_seed(3))
    hidden = hidden.to(model.dtype)
    bound = TOLERANCE[model.dtype]
    with torch.inference_mode():
        expected = oracle.forward(hidden.float(), oracle.new_cache(SPAN))
    cache = model.new_cache(SPAN)
    steps = [model.forward(hidden[:, start:end], cache) for start, end in ((0, 22), (22, 23), (23, 25))]
    assert distance(torch.cat(steps, 1), expected) < bound
    expected_hop = oracle.forward(hidden.float(), oracle.new_cache(HOP))
    assert distance(model.forward(hidden, model.new_cache(HOP)), expected_hop) < bound
    gradients = []
    for one in (model, oracle):
        given, output, _ = one.differentiable(SPAN, hidden.to(one.dtype))
        gradients += torch.autograd.grad(output, [given], torch.ones_like(output))
    assert distance(gradients[0], gradients[1]) < 2 * bound
