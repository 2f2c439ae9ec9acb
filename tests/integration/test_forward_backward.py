"""Loss, logits and gradients through the swarm are those of the same model in one process.

Tolerance: 1e-5 of the largest value with the fp32 wire. Nothing is computed otherwise than locally, but a microbatch's matrix products
have fewer rows, and add up in another order. bf16 and int8 round what travels, at every hop: their bounds stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import swarm
from tests.support.fork_server import ForkServer
from tests.support.models import VOCAB_SIZE, save_tiny
from tests.support.processes import LocalSwarm, local_swarm, stop_all

FAMILIES = ("llama", "gpt2", "qwen3", "gemma2", "bloom", "mixtral")
SPANS = {1: ("0:4",), 2: ("0:3", "3:4"), 3: ("0:1", "1:3", "3:4")}
TOLERANCE = 1e-5
# Largest relative error over loss, logits and gradients of the tiny models below; measured 1.2e-2 and 4e-2.
WIRE_TOLERANCE = {"bf16": 3e-2, "int8": 0.12}
NUM_TOKENS = 20  # more than two windows of the families whose attention slides


@pytest.fixture(scope="module")
def nodes(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    with local_swarm(tmp_path_factory.mktemp("swarm"), fork_server=fork_server) as started:
        yield started


def distance(actual: Tensor | None, expected: Tensor | None) -> float:
    assert actual is not None and expected is not None and actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def batch(rows: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right, as for training."""
    ids = torch.randint(3, VOCAB_SIZE, (rows, NUM_TOKENS), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, -6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def compare(remote: Any, local: Any, tolerance: float) -> dict[str, float]:
    """The relative errors of everything that a training step reads, by name."""
    inputs = batch()
    for model in (remote, local):
        model.zero_grad(set_to_none=True)
    actual, expected = remote(**inputs), local(**inputs)
    actual.loss.backward()
    expected.loss.backward()
    real = inputs["attention_mask"].bool()
    errors = {
        "loss": distance(actual.loss, expected.loss),
        "logits": distance(actual.logits[real], expected.logits[real]),
        "embedding gradient": distance(
            remote.get_input_embeddings().weight.grad, local.get_input_embeddings().weight.grad
        ),
        "head gradient": distance(
            remote.get_output_embeddings().weight.grad, local.get_output_embeddings().weight.grad
        ),
    }
    prompts = [torch.randn(1, 4, local.get_input_embeddings().weight.shape[1]) * 0.1]
    prompts = [prompts[0].clone().requires_grad_(), prompts[0].clone().requires_grad_()]
    for model, prompt in zip((remote, local), prompts, strict=True):
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        whole = torch.cat([prompt.expand(len(embeds), -1, -1), embeds], dim=1)
        mask = torch.cat([torch.ones(len(embeds), 4, dtype=torch.long), inputs["attention_mask"]], dim=1)
        labels = torch.cat([torch.full((len(embeds), 4), -100), inputs["labels"]], dim=1)
        model(inputs_embeds=whole, attention_mask=mask, labels=labels).loss.backward()
    errors["soft prompt gradient"] = distance(prompts[0].grad, prompts[1].grad)
    assert all(error < tolerance for error in errors.values()), errors
    return errors


# All families through three hops; that one or two make no difference is shown with one family.
CASES = [(family, 3) for family in FAMILIES] + [(family, count) for family in ("llama",) for count in (1, 2)]


@pytest.mark.parametrize(("family", "num_nodes"), CASES)
def test_a_training_step_equals_the_local_one(nodes: LocalSwarm, family: str, num_nodes: int, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path / family, seed=num_nodes)
    started = nodes.start_nodes(path, *SPANS[num_nodes])
    try:
        local = AutoModelForCausalLM.from_pretrained(path).eval()
        options = {"initial_peers": nodes.initial_peers, "model": str(path), "microbatch_tokens": 40}
        with swarm.connect(wire="fp32", **options) as connected:
            compare(connected.model(), local, TOLERANCE)
            stats = connected.model().microbatch_stats
            # Two microbatches of 20 tokens a row, then three of 24; nothing was computed twice.
            assert (stats.num_forwards, stats.num_backwards) == (5 * num_nodes, 5 * num_nodes)
            assert (stats.num_recomputed, stats.num_reroutes) == (0, 0)
        if num_nodes == 3 and family in ("llama", "gemma2"):
            for wire, tolerance in WIRE_TOLERANCE.items():
                with swarm.connect(wire=wire, **options) as connected:
                    errors = compare(connected.model(), local, tolerance)
                assert max(errors.values()) > TOLERANCE, "a wire that does not round is not this one"
    finally:
        stop_all(started)


def test_hidden_states_at_the_boundaries_are_the_local_ones_and_carry_gradients(
    nodes: LocalSwarm, tmp_path: Path
) -> None:
    path = save_tiny("llama", tmp_path / "llama", seed=11)
    started = nodes.start_nodes(path, *SPANS[3])
    try:
        local = AutoModelForCausalLM.from_pretrained(path).eval()
        with swarm.connect(
            initial_peers=nodes.initial_peers, model=str(path), wire="fp32", microbatch_tokens=20
        ) as connected:
            gradients = []
            for model in (connected.model(), local):
                embeds = local.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
                output = model(
                    inputs_embeds=embeds, attention_mask=batch()["attention_mask"], output_hidden_states=True
                )
                states = output.hidden_states
                blocks = getattr(output, "hidden_state_blocks", (0, 1, 3, 4))
                assert blocks == (0, 1, 3, 4)
                if model is local:
                    states = [states[block] for block in blocks]
                sum((state.pow(2).mean() * weight for weight, state in enumerate(states, start=1)), start=0).backward()
                gradients.append((embeds.grad, states))
        (actual, own), (expected, others) = gradients
        assert distance(actual, expected) < TOLERANCE
        real = batch()["attention_mask"].bool()
        assert all(distance(one[real], other[real]) < TOLERANCE for one, other in zip(own, others, strict=True))
    finally:
        stop_all(started)


def test_position_ids_are_those_that_were_given(nodes: LocalSwarm, tmp_path: Path) -> None:
    path = save_tiny("gpt2", tmp_path / "gpt2", seed=12)
    started = nodes.start_nodes(path, *SPANS[2])
    try:
        local = AutoModelForCausalLM.from_pretrained(path).eval()
        ids = batch()["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        counted = (mask.cumsum(1) - 1).clamp_min(0)
        with swarm.connect(initial_peers=nodes.initial_peers, model=str(path), wire="fp32") as connected:
            for positions in (None, counted, torch.arange(5, 5 + NUM_TOKENS)[None]):
                options = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
                with torch.no_grad():
                    actual, expected = connected.model()(**options).logits, local(**options).logits
                assert distance(actual[mask.bool()], expected[mask.bool()]) < TOLERANCE
    finally:
        stop_all(started)


def test_dropout_is_off_unless_asked_for_and_then_the_same_wherever_it_is_computed(
    nodes: LocalSwarm, tmp_path: Path
) -> None:
    path = save_tiny("gpt2", tmp_path / "gpt2", seed=13)  # with dropout 0.1 at three places, by default
    inputs = batch()
    options = {"initial_peers": nodes.initial_peers, "model": str(path), "wire": "fp32"}
    results: list[tuple[float, Tensor]] = []

    def step(model: Any, seed: int) -> tuple[float, Tensor]:
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        return float(loss.detach()), model.get_input_embeddings().weight.grad.clone()

    # One node that keeps its graphs, then three that compute again.
    for spans, flags in ((SPANS[1], ()), (SPANS[3], ("--stash-mib", "0"))):
        started = [nodes.start_node(path, span, *flags) for span in spans]
        for node in started:
            node.ready()
        try:
            with swarm.connect(**options) as connected:
                model = connected.model().train()
                off = step(model, 0)
                assert distance(off[1], step(model.eval(), 1)[1]) == 0
            with swarm.connect(**options, dropout=True) as connected:
                model = connected.model().train()
                results += [step(model, 0), step(model, 0), step(model, 1)]
                assert abs(results[-1][0] - off[0]) > 1e-4, "dropout is on"
                assert abs(results[-1][0] - results[-2][0]) > 1e-4, "another seed, another dropout"
                assert step(model.eval(), 0)[0] == off[0]
        finally:
            stop_all(started)
    for loss, gradient in (results[1], results[3], results[4]):
        assert abs(loss - results[0][0]) < TOLERANCE * loss
        assert distance(gradient, results[0][1]) < TOLERANCE


def test_replicas_share_the_microbatches_of_a_batch(nodes: LocalSwarm, tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "llama", seed=14)
    started = nodes.start_nodes(path, "0:4", "0:4")
    try:
        local = AutoModelForCausalLM.from_pretrained(path).eval()
        with swarm.connect(
            initial_peers=nodes.initial_peers, model=str(path), wire="fp32", microbatch_tokens=20, max_in_flight=4
        ) as connected:
            inputs = batch(rows=12)
            with torch.no_grad():
                assert distance(connected.model()(**inputs).loss, local(**inputs).loss) < TOLERANCE
            measured = connected.client.blocks.load.peers
            assert {node.peer_id for node in started} == {
                peer for peer, load in measured.items() if load.s_per_token_block
            }
    finally:
        stop_all(started)
