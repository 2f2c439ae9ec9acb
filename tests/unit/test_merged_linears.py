"""Merged linears: blocks whose linears share an input compute what they did, forward and backward, and keep one set of weights."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from node.backend import merged_linears
from node.backend.merged_linears import merge_linears
from node.backend.span_model import SpanModel
from swarm.checkpoint import open_checkpoint
from swarm.linears.frozen import PrepackedLinear
from swarm.span import Span
from tests.support.models import save_tiny

SPAN = Span(1, 3)
MERGED = {
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],  # the first three with a bias
    "gpt2": [],  # one linear for queries, keys and values
    "opt": ["k_proj", "v_proj", "q_proj"],
}
# Of the largest value: the same sums in another order.
TOLERANCE = {"fp32": 2e-6, "bf16": 0.02}


def load(family: str, numeric_class: str, folder: Any) -> SpanModel:
    checkpoint = open_checkpoint(str(save_tiny(family, folder)), progress=False)
    return SpanModel(checkpoint, SPAN, numeric_class=numeric_class)


def merged_names(model: SpanModel) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, merged_linears._Part)]
    return [name.rpartition(".")[2] for name in names]


def results(model: SpanModel) -> list[Tensor]:
    """Outputs of several numbers of tokens, with a cache and without, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 40, model.hidden_size, generator=generator).to(model.dtype)
    cache = model.new_cache(SPAN)
    cached = [model.forward(hidden[:, first:last], cache) for first, last in ((0, 7), (7, 8), (8, 40))]
    given, output, _ = model.differentiable(SPAN, hidden)
    (gradient,) = torch.autograd.grad(output, given, torch.ones_like(output))
    return [*cached, output.detach(), gradient]


@pytest.mark.parametrize("numeric_class", ["fp32", "bf16"])
@pytest.mark.parametrize("family", list(MERGED))
def test_merged_linears_compute_what_each_did(family: str, numeric_class: str, tmp_path: Any) -> None:
    model = load(family, numeric_class, tmp_path)
    before = results(model)
    num_numbers = sum(parameter.numel() for parameter in all_tensors(model))
    merge_linears(model)
    assert merged_names(model) == MERGED[family] * len(SPAN)
    assert sum(tensor.numel() for tensor in all_tensors(model)) == num_numbers, "each weight is there once"
    for found, expected in zip(results(model), before, strict=True):
        assert (found - expected).abs().max() <= TOLERANCE[numeric_class] * expected.abs().max()


def all_tensors(model: SpanModel) -> list[Tensor]:
    modules = [module for _, module in model.named_modules()]
    tensors = [tensor for module in modules for tensor in (*module.parameters(False), *module.buffers(False))]
    return list({id(tensor): tensor for tensor in tensors}.values())


def test_a_part_alone_and_its_weights_are_those_of_its_linear(tmp_path: Any) -> None:
    """Whoever looks at one linear, or asks it out of turn, finds it as it was."""
    model = load("llama", "fp32", tmp_path)
    before = dict(model.named_modules())
    merge_linears(model)
    given = torch.randn(3, model.hidden_size)
    for name, module in model.named_modules():
        if isinstance(module, merged_linears._Part):
            own: Any = before[name]
            assert torch.equal(module.weight, own.weight)
            for _ in range(2):
                torch.testing.assert_close(module(given), own(given), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(module.compute(given), own(given), rtol=1e-5, atol=1e-6)
            gradient = torch.randn(3, own.out_features)
            expected = own.input_gradient(gradient)
            torch.testing.assert_close(module.input_gradient(gradient), expected, rtol=1e-5, atol=1e-5)


def test_what_computes_wrongly_is_not_merged(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load("llama", "bf16", tmp_path)
    expected = results(model)
    join = merged_linears.join
    monkeypatch.setattr(merged_linears, "join", lambda linears: join([*linears[1:], linears[0]]))
    with caplog.at_level(logging.WARNING):
        merge_linears(model)
    assert not merged_names(model) and "not merged: off by" in caplog.text
    assert all(torch.equal(one, other) for one, other in zip(results(model), expected, strict=True))
    assert any(isinstance(module, PrepackedLinear) for _, module in model.named_modules())
