"""A node that is lost, freezes or lies in the middle of a forward or a backward changes nothing of the result.

The victim serves all blocks; the honest nodes that take its place serve half of them each.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.faults.conftest import Victims, client_of
from tests.support.processes import LocalSwarm, wait_until

TOLERANCE = 1e-5
SEED = 5
NUM_MICROBATCHES = 3


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A batch, and what a training step on it gives in one process: loss and gradient w.r.t. the inputs."""

    embeds: Tensor
    labels: Tensor
    loss: float
    gradient: Tensor


@pytest.fixture(scope="module")
def local(tiny_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def expected(local: Any) -> TrainingStep:
    labels = torch.randint(3, 280, (NUM_MICROBATCHES, 16), generator=torch.Generator().manual_seed(SEED))
    embeds = local.get_input_embeddings()(labels)
    loss, gradient = step(local, embeds, labels)
    return TrainingStep(embeds, labels, loss, gradient)


def step(
    model: Any, embeds: Tensor, labels: Tensor, between: Callable[[], None] = lambda: None
) -> tuple[float, Tensor]:
    given = embeds.clone().requires_grad_()
    loss = model(inputs_embeds=given, labels=labels).loss
    between()
    loss.backward()
    assert given.grad is not None
    return float(loss.detach()), given.grad


@pytest.fixture
def client(nodes: LocalSwarm, tiny_path: Path, victims: Victims) -> Iterator[Callable[..., Any]]:
    """Makes a client, once the victims have joined: one microbatch a row, one after another, so that faults fire where they should."""
    with contextlib.ExitStack() as stack:

        def connect(**options: Any) -> Any:
            options = {
                "wire": "fp32",
                "microbatch_tokens": 16,
                "max_in_flight": 1,
                "microbatch_timeout_s": 12.0,
                "ping_timeout_s": 1.0,
                **options,
            }
            return stack.enter_context(client_of(nodes, tiny_path, **options))

        yield connect


def assert_equal(actual: tuple[float, Tensor], expected: TrainingStep) -> None:
    loss, gradient = actual
    assert abs(loss - expected.loss) < TOLERANCE * expected.loss
    assert float((gradient - expected.gradient).abs().max() / expected.gradient.abs().max()) < TOLERANCE


@pytest.mark.parametrize("on", ["forward", "backward"])
@pytest.mark.parametrize("action", ["SIGKILL", "SIGSTOP", "nan"])
def test_a_lost_node_changes_nothing(
    victims: Victims, client: Callable[..., Any], expected: TrainingStep, action: str, on: str
) -> None:
    (victim,) = victims.start("0:4", fault={"action": action, "on": on, "at_step": 2})
    model = client().model()
    assert_equal(step(model, expected.embeds, expected.labels), expected)
    event = victims.assert_fired(victim, action, 2)
    assert event["hop"] == "0:4" and event["stashed"] == (1 if on == "forward" else 2)
    assert model.microbatch_stats.num_reroutes >= 1
    # What the victim kept between forward and backward is gone with it, and was computed again by the honest two.
    assert model.microbatch_stats.num_recomputed >= (1 if on == "backward" else 0)


@pytest.mark.parametrize(
    ("action", "on"),
    [
        ("wrong_shape", "forward"),
        ("garbage", "backward"),
        ("truncate", "forward"),
        ("giant_frame", "backward"),
        ("refuse", "forward"),
        ("kill_p2pd", "backward"),
        ("silence", "backward"),
    ],
)
def test_a_lying_node_changes_nothing(
    victims: Victims, client: Callable[..., Any], expected: TrainingStep, action: str, on: str
) -> None:
    (victim,) = victims.start("0:4", fault={"action": action, "on": on, "at_step": 1})
    model = client().model()
    assert_equal(step(model, expected.embeds, expected.labels), expected)
    victims.assert_fired(victim, action, 1)
    assert model.microbatch_stats.num_reroutes >= 1


def test_a_node_that_leaves_between_forward_and_backward_finishes_what_it_keeps(
    victims: Victims, client: Callable[..., Any], expected: TrainingStep
) -> None:
    (victim,) = victims.start("0:4")
    model = client().model()

    def leave() -> None:
        victim.send(signal.SIGTERM)
        wait_until(lambda: "leaving" in victim.log, 10, "the node leaves")

    assert_equal(step(model, expected.embeds, expected.labels, leave), expected)
    assert model.microbatch_stats.num_recomputed == 0 and model.microbatch_stats.num_reroutes == 0
    assert victim.wait(10) == 0


@pytest.mark.parametrize("flags", [("--stash-mib", "0"), ("--stash-expiry", "1")])
def test_what_is_not_kept_is_computed_again(
    victims: Victims, client: Callable[..., Any], expected: TrainingStep, flags: tuple[str, ...]
) -> None:
    victims.start("0:4", flags=(*flags, "--log-level", "info"))
    connected = client()
    model = connected.model()

    def expire() -> None:
        started = time.monotonic()
        wait_until(lambda: flags[0] == "--stash-mib" or time.monotonic() - started > 1.3, 5, "the stash has expired")

    assert_equal(step(model, expected.embeds, expected.labels, expire), expected)
    stats = model.microbatch_stats
    assert (stats.num_recomputed, stats.num_reroutes) == (NUM_MICROBATCHES, 0)


def test_fifty_steps_of_prompt_tuning_follow_the_local_curve_though_a_node_is_killed(
    victims: Victims, client: Callable[..., Any], local: Any, expected: TrainingStep
) -> None:
    victims.start("1:2", "2:4")
    (victim,) = victims.start("0:1", fault={"action": "SIGKILL", "on": "backward", "at_step": 25 * NUM_MICROBATCHES})
    model = client().model().requires_grad_(False)
    curve, local_curve = tune(model, expected), tune(local, expected)
    victims.assert_fired(victim, "SIGKILL", 25 * NUM_MICROBATCHES)
    assert model.microbatch_stats.num_reroutes >= 1
    deviation = max(abs(a - b) / b for a, b in zip(curve, local_curve, strict=True))
    assert deviation < 1e-4, deviation
    assert local_curve[-1] < 0.97 * local_curve[0]


def tune(model: Any, batch: TrainingStep, num_steps: int = 50) -> list[float]:
    """Losses of a soft prompt of 4 tokens, trained on one batch."""
    prompt = torch.nn.Parameter(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(SEED)) * 0.1)
    optimizer = torch.optim.AdamW([prompt], lr=0.05)
    losses = []
    for _ in range(num_steps):
        embeds = torch.cat([prompt.expand(NUM_MICROBATCHES, -1, -1), batch.embeds], dim=1)
        labels = torch.cat([torch.full((NUM_MICROBATCHES, 4), -100), batch.labels], dim=1)
        loss = model(inputs_embeds=embeds, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
