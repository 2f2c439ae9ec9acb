"""Two stages and the ends in one process, no network, train as the whole model does in plain torch.

The gradient of an epoch comes from microbatches of unequal size, with unequal numbers of labels, in the ledgers of two replicas.

Tolerance: the relative error of each tensor of weights. In fp32 1e-5 after ten epochs: what is computed is the same, but sums are
formed in another order. Adam divides by the gradient's own size, so where that is zero but for rounding (gpt2's bias of the keys) its
steps would be noise; hence the large eps. In bf16 autocast 1e-6 after one epoch: the very same products are rounded in the same places.
Then weights that differ in their last bit are now and then rounded to different bf16 values, 2^-8 apart: 1e-3 after ten epochs,
measured 1e-4, where bf16 itself changes 1e-2.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from node.throughput import measure_throughput
from node.training.stage import TrainableStage
from swarm.client import training_ends
from swarm.client.training_ends import IGNORED, HeadResult, TrainableEnds, sum_gradients
from swarm.errors import BadRequest
from swarm.run_spec import DataKind, DataSpec, OptimizerSettings, Precision, RunSpec
from swarm.span import Span
from swarm.training.initial import RandomCheckpoint
from swarm.training.parameters import GradientSum, StageParameters, square_norm
from tests.support.models import NUM_BLOCKS, TINY, VOCAB_SIZE
from tests.support.one_process_training import Outcome, train_in_one_process, whole_model

TOLERANCE = 1e-5
BF16_TOLERANCE = 1e-3
NUM_TOKENS = 12
NUM_EPOCHS = 10


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    labels: Tensor

    @property
    def num_loss_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


class Samples:
    """Sample i has from 1 to NUM_TOKENS labels; every third is all padding but for the last."""

    def batch(self, start: int, count: int) -> Batch:
        rows = [
            torch.randint(3, VOCAB_SIZE, (NUM_TOKENS + 1,), generator=torch.Generator().manual_seed(index))
            for index in range(start, start + count)
        ]
        ids = torch.stack(rows)
        labels = ids[:, 1:].clone()
        for row, index in enumerate(range(start, start + count)):
            labels[row, : NUM_TOKENS - 1 if index % 3 == 0 else index % 5] = IGNORED
        return Batch(ids[:, :-1], labels)


def make_spec(family: str = "llama", config: dict[str, Any] | None = None, **rules: Any) -> RunSpec:
    optimizer = OptimizerSettings(lr=5e-3, clip_norm=0.05, warmup_epochs=2, eps=1e-5)
    values = {
        "name": family,
        "config": AutoConfig.for_model(family, **{**TINY[family], **(config or {})}).to_dict(),
        "seed": 5,
        "stages": (Span(0, 1), Span(1, NUM_BLOCKS)),
        "sequence_length": NUM_TOKENS,
        "target_batch": 7,
        "microbatch": 2,
        "optimizer": optimizer,
        "precision": Precision.FP32,
        "data": DataSpec(kind=DataKind.OWN),
        "num_epochs": NUM_EPOCHS,
    }
    return RunSpec(**{**values, **rules})


class StagesOfARun:
    """The stages and the ends of a run, each with the sums of two replicas that hold the same weights."""

    def __init__(self, spec: RunSpec) -> None:
        source = RandomCheckpoint(spec.config, spec.seed, spec.name)
        self.spec = spec
        self.stages = [TrainableStage(source, spec, number) for number in range(len(spec.stages))]
        self.ends = TrainableEnds(source, spec)
        self.parameters: list[StageParameters] = [*(stage.parameters for stage in self.stages), self.ends.parameters]
        self.sums = [[GradientSum(parameters) for parameters in self.parameters] for _ in range(2)]

    def add_microbatch(self, first: int, batch: Batch, replica: int) -> HeadResult:
        samples = range(first, first + len(batch.input_ids))
        embedded = self.ends.embed(batch.input_ids)
        hidden, entries = embedded.detach(), []
        for stage in self.stages:
            entries.append(stage.differentiable(hidden, samples))
            hidden = entries[-1].output.detach()
        head = self.ends.loss(hidden, batch.labels)
        gradient = head.hidden_gradient
        for number, stage in reversed(list(enumerate(self.stages))):
            gradient, of_weights = stage.backward(entries[number], gradient)
            self.sums[replica][number].add(of_weights)
        self.sums[replica][-1].add(sum_gradients(head.gradients, self.ends.embed_backward(embedded, gradient)))
        return head

    def take_sums(self) -> list[Tensor]:
        """Of the two replicas together, for each stage and the ends; they begin anew."""
        sums = [one.vector + other.vector for one, other in zip(*self.sums, strict=True)]
        for one in (*self.sums[0], *self.sums[1]):
            one.clear()
        return sums

    def step(self, sums: list[Tensor], num_loss_tokens: int, epoch: int) -> float:
        """The global norm of the mean gradient."""
        settings = self.spec.optimizer
        norm = math.sqrt(sum(map(square_norm, sums))) / num_loss_tokens
        factor = settings.clip_factor(norm) / num_loss_tokens
        for parameters, vector in zip(self.parameters, sums, strict=True):
            parameters.step(vector * factor, settings.lr_at(epoch, self.spec.num_epochs))
        return norm

    def show(self, *, previous: bool) -> None:
        for parameters in self.parameters:
            parameters.show(previous=previous)

    def weights(self) -> dict[str, Tensor]:
        """By name in the whole model."""
        names = {
            re.sub(r"^.*?(\w+\.\d+\.)", r"\1", name): name for name, _ in whole_model(self.spec).named_parameters()
        }
        *of_stages, named = (
            dict(zip(parameters.names, parameters.views(parameters.state.values), strict=True))
            for parameters in self.parameters
        )
        for stage, weights in zip(self.stages, of_stages, strict=True):
            for name, weight in weights.items():
                before, number, rest = re.split(r"\.(\d+)\.", name, maxsplit=1)
                named[names[f"{before.split('.')[-1]}.{stage.span.start + int(number)}.{rest}"]] = weight
        return named


def train_in_stages(spec: RunSpec) -> tuple[Outcome, list[float]]:
    """Outcome, and the norm of each epoch's gradient. With a delay, gradients are of the weights before the last step."""
    run, source = StagesOfARun(spec), Samples()
    losses, norms = [], []
    for epoch in range(spec.num_epochs):
        run.show(previous=True)
        num_loss_tokens, loss_sum = 0, 0.0
        for unit, offset in enumerate(range(0, spec.target_batch, spec.microbatch)):
            first = epoch * spec.target_batch + offset
            batch = source.batch(first, min(spec.microbatch, spec.target_batch - offset))
            head = run.add_microbatch(first, batch, replica=int(unit % 3 == 0))
            assert head.num_tokens == batch.num_loss_tokens
            num_loss_tokens, loss_sum = num_loss_tokens + head.num_tokens, loss_sum + head.loss_sum
        losses.append(loss_sum / num_loss_tokens)
        norms.append(run.step(run.take_sums(), num_loss_tokens, epoch))
    return Outcome(losses, run.weights()), norms


def largest_error(actual: Outcome, expected: Outcome) -> float:
    assert actual.weights.keys() == expected.weights.keys()
    pairs = [(actual.weights[name], expected.weights[name]) for name in expected.weights]
    return max(float((mine - theirs).norm() / theirs.norm().clamp_min(1e-12)) for mine, theirs in pairs)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True}),
    ("gpt2", {}),
    ("qwen3", {}),
    ("gemma2", {}),
    ("mixtral", {}),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("family", "config"), CASES)
def test_stages_train_as_the_whole_model(family: str, config: dict[str, Any]) -> None:
    spec = make_spec(family, config)
    (actual, norms), expected = train_in_stages(spec), train_in_one_process(spec, Samples())
    error = largest_error(actual, expected)
    print(f"{error:.1e}", norms[:3], actual.losses[0], actual.losses[-1])
    assert error < TOLERANCE
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert min(norms) > spec.optimizer.clip_norm, "no gradient was clipped"
    began = whole_model(spec).state_dict()
    unmoved = [name for name, weight in actual.weights.items() if torch.equal(weight, began[name])]
    assert not unmoved, "these were not trained"


@pytest.mark.parametrize("wrong", ["dropped", "doubled", "unweighted"])
def test_a_planted_bug_exceeds_the_tolerance(wrong: str) -> None:
    """One microbatch of one epoch lost or counted twice; the mean of two replicas' means."""
    spec = make_spec()
    error = largest_error(train_in_stages(spec)[0], train_in_one_process(spec, Samples(), wrong=wrong))
    print(f"{error:.1e}")
    assert error > 30 * TOLERANCE


def test_in_bf16_stages_train_as_the_whole_model_under_autocast() -> None:
    errors = {}
    for num_epochs in (1, NUM_EPOCHS):
        optimizer = replace(make_spec().optimizer, warmup_epochs=0)
        spec = make_spec(precision=Precision.BF16, num_epochs=num_epochs, optimizer=optimizer)
        actual, expected = train_in_stages(spec)[0], train_in_one_process(spec, Samples())
        errors[num_epochs] = largest_error(actual, expected)
        in_fp32 = train_in_one_process(replace(spec, precision=Precision.FP32), Samples())
        assert largest_error(actual, in_fp32) > 3 * BF16_TOLERANCE
    print(errors)
    assert errors[1] < 1e-6 and errors[NUM_EPOCHS] < BF16_TOLERANCE


def test_with_a_delay_gradients_are_of_the_weights_before_the_last_step() -> None:
    delayed = make_spec(delay=1)
    actual = train_in_stages(delayed)[0]
    error = largest_error(actual, train_in_one_process(delayed, Samples()))
    assert error < TOLERANCE
    assert largest_error(actual, train_in_one_process(make_spec(), Samples())) > 30 * TOLERANCE


def run_of(stages: tuple[Span, ...] = (Span(0, NUM_BLOCKS),), family: str = "gpt2", **rules: Any) -> StagesOfARun:
    return StagesOfARun(make_spec(family, stages=stages, **rules))


def hidden_states(rows: int, num_tokens: int = NUM_TOKENS) -> Tensor:
    return torch.randn(rows, num_tokens, 32, generator=torch.Generator().manual_seed(rows))


def test_a_samples_dropout_depends_on_nothing_but_its_index() -> None:
    """Not on the rows beside it, nor on the stages' borders; so a microbatch that runs again gives the same gradient."""
    whole, halves = run_of(dropout=0.3), run_of((Span(0, 1), Span(1, NUM_BLOCKS)), dropout=0.3)
    hidden = hidden_states(4)
    together = whole.stages[0].differentiable(hidden, range(8, 12)).output
    alone = [whole.stages[0].differentiable(hidden[row : row + 1], range(8 + row, 9 + row)).output for row in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    between = halves.stages[0].differentiable(hidden, range(8, 12)).output
    torch.testing.assert_close(halves.stages[1].differentiable(between, range(8, 12)).output, together)
    others = whole.stages[0].differentiable(hidden, range(9, 13)).output
    assert float((together - others).detach().abs().max()) > 1e-2
    torch.testing.assert_close(whole.stages[0].forward(hidden), run_of().stages[0].forward(hidden))


def test_without_dropout_in_the_rules_a_family_has_none() -> None:
    stage = run_of().stages[0]  # gpt2's own default is 0.1
    torch.testing.assert_close(stage.differentiable(hidden_states(2), range(2)).output, stage.forward(hidden_states(2)))
    assert {module.p for module in stage.model._base.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_an_entry_from_before_a_step_is_refused() -> None:
    run = run_of()
    entry = run.stages[0].differentiable(hidden_states(2), range(2))
    fresh = run.stages[0].backward(run.stages[0].differentiable(hidden_states(2), range(2)), hidden_states(2))
    assert all(gradient is not None for gradient in fresh[1])
    run.parameters[0].step(torch.ones(run.parameters[0].size), 1e-3)
    with pytest.raises(BadRequest, match="the weights have changed"):
        run.stages[0].backward(entry, hidden_states(2))


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bytes_of_an_entry_are_those_of_its_tokens_not_of_the_weights(family: str, precision: Precision) -> None:
    stage = run_of(family=family, precision=precision).stages[0]
    one, three = (stage.differentiable(hidden_states(rows, 16), range(rows)).num_bytes for rows in (1, 3))
    assert 2.7 < three / one <= 3


def test_gradients_of_bf16_copies_are_those_of_autocast_to_the_bit() -> None:
    stage = run_of(family="llama", precision=Precision.BF16).stages[0]
    hidden, gradient = hidden_states(3), hidden_states(3).flip(0)
    copies = stage.backward(stage.differentiable(hidden, range(3)), gradient)
    dtypes = {parameter.dtype for parameter in stage.parameters.parameters}
    stage.parameters.hold(range(len(stage.parameters.parameters)), torch.float32)
    casts = stage.backward(stage.differentiable(hidden, range(3)), gradient)
    assert dtypes == {torch.float32, torch.bfloat16} and torch.equal(copies[0], casts[0])
    for mine, theirs in zip(copies[1], casts[1], strict=True):
        assert mine is not None and theirs is not None and torch.equal(mine.float(), theirs)


def test_a_stages_speed_can_be_measured_in_bf16() -> None:
    assert measure_throughput(run_of(precision=Precision.BF16).stages[0].model, 1).prefill_tokens_per_s > 0


def test_a_head_computed_in_pieces_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = run_of(family="gemma2").ends
    batch, hidden = Samples().batch(0, 5), hidden_states(5)
    whole = ends.loss(hidden, batch.labels)
    monkeypatch.setattr(training_ends, "_LOGITS_BYTES", 4 * 7 * VOCAB_SIZE)
    monkeypatch.setattr(training_ends, "_MIN_PIECE", 1)
    pieces = ends.loss(hidden, batch.labels)
    assert whole.num_tokens == pieces.num_tokens == batch.num_loss_tokens > 3 * 7
    assert whole.loss_sum == pytest.approx(pieces.loss_sum, rel=1e-6)
    assert ends.evaluate(hidden, batch.labels) == (pytest.approx(whole.loss_sum, rel=1e-6), whole.num_tokens)
    pairs = zip([whole.hidden_gradient, *whole.gradients], [pieces.hidden_gradient, *pieces.gradients], strict=True)
    for expected, actual in pairs:
        assert (expected is None) == (actual is None)
        if expected is not None and actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not whole.hidden_gradient[batch.labels == IGNORED].any()


def test_a_microbatch_without_labels_has_no_loss_and_no_gradient() -> None:
    run = run_of(family="llama")
    batch = Samples().batch(0, 2)
    unlabelled = Batch(batch.input_ids, torch.full_like(batch.labels, IGNORED))
    head = run.add_microbatch(0, unlabelled, replica=0)
    assert (head.loss_sum, head.num_tokens) == (0, 0)
    assert run.ends.evaluate(hidden_states(2), unlabelled.labels) == (0, 0)
    assert not any(total.vector.any() for total in run.sums[0])
