"""FastHead: as good as the head that it stands for, never stale, and out of the way of training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from swarm.fast_head import FastHead
from swarm.numeric_class import head_class_for

INPUTS, OUTPUTS = 64, 300
# Relative to the largest logit: bf16 has 8 bits, int8 codes 7 and a sign, and errors of 64 products add up to less than that.
TOLERANCES = {"bf16": 0.01, "int8": 0.02}


def make_head(*, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS, bias=bias)


def distance(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("numeric_class", TOLERANCES)
def test_it_computes_what_the_head_does(numeric_class: str, bias: bool) -> None:
    head, given = make_head(bias=bias), torch.randn(2, 3, INPUTS)
    expected = head(given).detach()
    FastHead(head, numeric_class)
    with torch.no_grad():
        found = head(given)
    assert found.dtype == torch.float32 and 0 < distance(found, expected) < TOLERANCES[numeric_class]


def test_with_gradients_the_head_computes_as_ever() -> None:
    head, given = make_head(), torch.randn(1, 2, INPUTS, requires_grad=True)
    expected = head(given)
    FastHead(head, "int8")
    found = head(given)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert given.grad is not None and head.weight.grad is not None


@pytest.mark.parametrize("fused", [False, True], ids=["plain AdamW", "fused AdamW, which leaves no sign of a change"])
def test_after_training_it_computes_with_the_new_weights(fused: bool) -> None:
    head, given = make_head(), torch.randn(1, 2, INPUTS)
    FastHead(head, "int8")
    with torch.no_grad():
        before = head(given)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05, fused=fused)
    head(given).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        found, expected = head(given), nn.functional.linear(given, head.weight)
    assert distance(found, expected) < TOLERANCES["int8"] < distance(before, expected)


def test_weights_that_were_loaded_anew_are_used() -> None:
    head, given = make_head(), torch.randn(1, 2, INPUTS)
    FastHead(head, "bf16")
    head.load_state_dict({"weight": torch.randn(OUTPUTS, INPUTS)})
    with torch.no_grad():
        assert distance(head(given), nn.functional.linear(given, head.weight)) < TOLERANCES["bf16"]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (set(), "fp32"),
        ({"fp32"}, "fp32"),
        ({"fp32", "int4"}, "fp32"),
        ({"bf16", "int8"}, "bf16"),
        ({"int8"}, "int8"),
        ({"int4"}, "int8"),
    ],
)
def test_the_head_is_as_fine_as_the_finest_nodes(nodes: set[str], expected: str) -> None:
    assert head_class_for(nodes) == expected
