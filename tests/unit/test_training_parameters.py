"""A stage's weights as one vector: AdamW over them is torch's, replicas stay equal to the bit, and bad state is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from swarm.errors import BadRequest
from swarm.run_spec import OptimizerSettings
from swarm.training.parameters import (
    GradientSum,
    StageParameters,
    StageState,
    are_finite,
    gradient_digest,
    square_norm,
)

SETTINGS = OptimizerSettings(lr=1e-2, weight_decay=0.1, clip_norm=None)


@pytest.fixture
def module() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5, bias=False), nn.Linear(5, 7, bias=False))
    model[3].weight = model[0].weight
    return model


def parameters_of(module: nn.Module, *, is_delayed: bool = False) -> StageParameters:
    return StageParameters(module.named_parameters(), SETTINGS, is_delayed=is_delayed)


def gradients(parameters: StageParameters, num_steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(parameters.size, generator=generator) for _ in range(num_steps)]


def test_the_vector_holds_each_parameter_once_those_that_decay_first(module: nn.Sequential) -> None:
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    parameters = parameters_of(module)
    assert parameters.names == ("0.weight", "2.weight", "0.bias", "1.bias", "1.weight")
    assert parameters.size == 35 + 35 + 7 + 7 + 7 == len(parameters.state.values)
    for name, view in zip(parameters.names, parameters.views(parameters.state.values), strict=True):
        assert torch.equal(view, before[name]) and torch.equal(module.get_parameter(name), view)
    assert module[3].weight is module[0].weight
    parameters.state.values.fill_(2)
    assert all(bool((parameter == 2).all()) and parameter.requires_grad for parameter in module.parameters())


def test_a_step_is_that_of_torch_with_decay_for_matrices_only(module: nn.Sequential) -> None:
    twin = copy.deepcopy(module)
    parameters = parameters_of(module)
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    others = [p for p in twin.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(SETTINGS.beta1, SETTINGS.beta2),
        eps=SETTINGS.eps,
    )
    for number, gradient in enumerate(gradients(parameters, 6)):
        lr = 1e-2 / (1 + number)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, view in zip(parameters.names, parameters.views(gradient), strict=True):
            twin.get_parameter(name).grad = view.clone()
        optimizer.step()
        parameters.step(gradient, lr)
    for name in parameters.names:  # fused and plain AdamW round differently
        torch.testing.assert_close(module.get_parameter(name), twin.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert parameters.state.num_steps == 6


def test_delayed_weights_are_those_before_the_last_step_and_travel_with_the_state(module: nn.Sequential) -> None:
    at_once, delayed = parameters_of(copy.deepcopy(module)), parameters_of(module, is_delayed=True)
    newcomer = parameters_of(copy.deepcopy(module), is_delayed=True)
    first, second = gradients(delayed, 2)
    at_once.step(first, 1e-2)
    before = [parameter.detach().clone() for parameter in at_once.parameters]
    at_once.step(second, 1e-2)
    for gradient in (first, second):
        delayed.step(gradient, 1e-2)
    newcomer.install(delayed.snapshot())
    for replica in (delayed, newcomer):
        assert replica.digest() == at_once.digest()
        for previous, expected in ((True, before), (False, at_once.parameters), (True, before)):
            version = replica.version
            replica.show(previous=previous)
            shown = replica.version
            replica.show(previous=previous)
            assert shown == replica.version and (shown > version or not previous)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(replica.parameters, expected, strict=True))
    with pytest.raises(BadRequest, match="another delay"):
        at_once.install(delayed.snapshot())


def test_bf16_copies_follow_the_values(module: nn.Sequential) -> None:
    plain, mixed = parameters_of(copy.deepcopy(module)), parameters_of(module)
    mixed.hold([0, 3], torch.bfloat16)
    for gradient in gradients(mixed, 3):
        plain.step(gradient, 1e-2)
        mixed.step(gradient, 1e-2)
    assert mixed.digest() == plain.digest()
    for index, (mine, theirs) in enumerate(zip(mixed.parameters, plain.parameters, strict=True)):
        assert mine.dtype == (torch.bfloat16 if index in (0, 3) else torch.float32)
        assert torch.equal(mine, theirs.to(mine.dtype))
    mixed.hold([0, 3], torch.float32)
    mixed.state.values.fill_(3)
    assert all(bool((parameter == 3).all()) for parameter in module.parameters())


def test_a_graph_from_before_a_step_is_refused_by_autograd(module: nn.Sequential) -> None:
    parameters = parameters_of(module)
    output = module(torch.ones(2, 5)).sum()
    parameters.step(gradients(parameters, 1)[0], 1e-2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_replica_that_takes_over_the_state_stays_equal_to_the_bit(module: nn.Sequential) -> None:
    first, newcomer = parameters_of(module), parameters_of(copy.deepcopy(module))
    *early, last = gradients(first, 4)
    for gradient in early:
        first.step(gradient, 1e-2)
    state = first.snapshot()
    first.step(last, 1e-2)
    assert state.num_steps == 3 and state.digest() != first.state.digest()
    newcomer.install(state)
    assert newcomer.state.digest() == state.digest() and newcomer.version == 1
    newcomer.step(last, 1e-2)
    assert newcomer.state.digest() == first.state.digest() and newcomer.digest() == first.digest()


def with_second_moment(state: StageState, value: float) -> StageState:
    state.second_moments[3] = value
    return state


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda state: replace(state, values=state.values[:-1]), "is of 90 parameters, this stage has 91"),
        (lambda state: replace(state, first_moments=state.values.double()), "this stage has"),
        (lambda state: replace(state, values=state.values / 0), "NaN or infinite"),
        (lambda state: with_second_moment(state, float("nan")), "NaN or infinite"),
        (lambda state: with_second_moment(state, -1e-6), "negative"),
        (lambda state: replace(state, num_steps=-1), "negative"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(
    module: nn.Sequential, spoil: Callable[[StageState], StageState], reason: str
) -> None:
    parameters = parameters_of(module)
    before = parameters.state.digest()
    with pytest.raises(BadRequest, match=reason):
        parameters.install(spoil(parameters.snapshot()))
    assert parameters.state.digest() == before


def test_digests_tell_names_shapes_and_values_apart() -> None:
    weight = torch.arange(6.0)

    def digest(name: str, values: Tensor) -> bytes:
        return StageParameters([(name, nn.Parameter(values.clone()))], SETTINGS).digest()

    variants = [
        digest("a", weight),
        digest("b", weight),
        digest("a", weight.view(2, 3)),
        digest("a", weight.view(3, 2)),
        digest("a", weight + 1),
    ]
    assert len(set(variants)) == 5 and digest("a", weight) == variants[0]


def test_a_sum_of_gradients_takes_bf16_and_missing_ones_in_float32(module: nn.Sequential) -> None:
    parameters = parameters_of(module)
    total = GradientSum(parameters)
    tiny = [torch.full(p.shape, 2.0**-10, dtype=torch.bfloat16) for p in parameters.parameters]
    total.add([torch.ones(p.shape) for p in parameters.parameters])
    total.add([None, *tiny[1:]])
    first, *rest = parameters.views(total.vector)
    assert bool((first == 1).all()) and all(bool((view == 1 + 2.0**-10).all()) for view in rest)
    total.clear()
    assert not total.vector.any()
    with pytest.raises(ValueError, match="shorter"):
        total.add(tiny[:-1])


def test_only_finite_gradients_are_finite() -> None:
    fine = [torch.ones(3), None, torch.full((2,), 3e38)]  # a finite vector whose norm is not
    assert are_finite(fine) and are_finite([None])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not are_finite([*fine, torch.tensor([0.0, bad])])
        assert not are_finite([torch.tensor([bad], dtype=torch.bfloat16)])


def test_the_squared_norm_is_exact_enough_to_clip_by_and_the_digest_sees_each_bit() -> None:
    vector = torch.full((3_000_001,), 0.1)
    assert square_norm(vector) == pytest.approx(3_000_001 * float(vector[0]) ** 2, rel=1e-9)
    other = vector.clone()
    other[7] = torch.nextafter(other[7], torch.tensor(1.0))
    assert gradient_digest(vector) == gradient_digest(vector.clone()) != gradient_digest(other)
