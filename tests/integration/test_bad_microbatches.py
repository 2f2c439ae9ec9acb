"""What a client gets wrong in forward and backward is told to it, by the model or by the node, and nobody else notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import Tensor

import swarm
from protos import node_pb2
from swarm.errors import BadRequest, RouteBroken, UserError
from swarm.messages import own_version
from swarm.p2p.framing import FramedStream
from swarm.span import Span
from tests.support.fork_server import ForkServer
from tests.support.models import VOCAB_SIZE, save_tiny
from tests.support.probes import NodeProbe, ask, node_probe
from tests.support.processes import LocalSwarm, Process, local_swarm

MAX_TOKENS = 64
ID = bytes(range(16))
WRONG = node_pb2.THE_REQUEST_IS_WRONG


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("bad") / "tiny")


@pytest.fixture(scope="module")
def nodes(fork_server: ForkServer, folder: Path) -> Iterator[LocalSwarm]:
    with local_swarm(folder.parent / "swarm", fork_server=fork_server) as running:
        yield running


@pytest.fixture(scope="module")
def node(nodes: LocalSwarm, folder: Path) -> Process:
    node = nodes.start_node(folder, "0:4", "--max-microbatch-tokens", str(MAX_TOKENS), "--stash-mib", "1")
    node.ready()
    return node


@pytest.fixture(scope="module")
def model(nodes: LocalSwarm, node: Process, folder: Path) -> Iterator[Any]:
    options = {"wire": "fp32", "microbatch_timeout_s": 10.0, "patience_s": 1.0}
    with swarm.connect(initial_peers=nodes.initial_peers, model=str(folder), **options) as connected:
        yield connected.model()


# What the model tells its user ----------------------------------------------------------------------------------------


IDS = torch.arange(3, 23).reshape(2, 10)
INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({}, "either input_ids or inputs_embeds"),
    "both inputs": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 10, 32)}, "either input_ids or inputs_embeds"),
    "ids of one dimension": ({"input_ids": IDS[0]}, r"input_ids must be \[rows, tokens\]"),
    "no tokens": ({"input_ids": IDS[:, :0]}, "at least one of each"),
    "another tokenizer's ids": ({"input_ids": IDS + VOCAB_SIZE}, f"input_ids must be 0 .. {VOCAB_SIZE - 1}"),
    "embeddings of another size": ({"inputs_embeds": torch.zeros(2, 10, 31)}, r"must be \[rows, tokens, 32\]"),
    "mask of another shape": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 9)},
        r"attention_mask must be \[2, 10\]",
    ),
    "positions of another shape": (
        {"input_ids": IDS, "position_ids": torch.arange(9)[None]},
        r"position_ids must be \[1 or 2, 10\]",
    ),
    "label out of range": ({"input_ids": IDS, "labels": IDS + VOCAB_SIZE}, f"labels must be 0 .. {VOCAB_SIZE - 1}"),
    "negative label": ({"input_ids": IDS, "labels": IDS - 50}, "or -100 for none, got -47"),
    "labels of another shape": ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels must have the shape \[2, 10\]"),
    "NaN embeddings": ({"inputs_embeds": torch.full((2, 10, 32), float("nan"))}, "holds NaN or infinite values"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_bad_input_is_told_at_once(model: Any, name: str) -> None:
    options, message = INPUTS[name]
    started = time.monotonic()
    with pytest.raises(BadRequest, match=message):
        model(**options)
    assert time.monotonic() - started < 5
    assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)


def test_a_loss_that_is_not_finite_is_told_before_anything_is_sent(model: Any) -> None:
    loss = model(input_ids=IDS, labels=IDS).loss * float("nan")
    with pytest.raises(BadRequest, match="gradient of the loss holds NaN"):
        loss.backward()


def test_rows_that_no_node_takes_are_told_with_the_limit(model: Any) -> None:
    assert model(input_ids=IDS.repeat(20, 1)).logits.shape == (40, 10, VOCAB_SIZE), "many rows are split"
    with pytest.raises(
        UserError, match=f"a row of 65 tokens is too long: .* takes {MAX_TOKENS} tokens at once; shorten"
    ):
        model(input_ids=torch.ones(1, MAX_TOKENS + 1, dtype=torch.long))


def test_blocks_that_nobody_serves_end_a_backward_in_time(nodes: LocalSwarm, tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "other", seed=9)
    lonely = nodes.start_node(path, "0:4")
    lonely.ready()
    options = {"request_timeout_s": 4.0, "patience_s": 1.0, "microbatch_timeout_s": 4.0}
    with swarm.connect(initial_peers=nodes.initial_peers, model=str(path), **options) as connected:
        loss = connected.model()(input_ids=IDS, labels=IDS).loss
        lonely.stop()
        started = time.monotonic()
        with pytest.raises(RouteBroken, match="nobody serves"):
            loss.backward()
        assert time.monotonic() - started < 15


# What a node tells a client of another make ---------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def probe(node: Process, folder: Path) -> AsyncIterator[NodeProbe]:
    await asyncio.to_thread(node.ready)
    async with node_probe(node, folder, Span(0, 4)) as probe:
        yield probe


def opening(probe: NodeProbe, **changes: Any) -> node_pb2.Request:
    fields: dict[str, Any] = {
        "version": own_version(),
        "model_digest": probe.model_digest,
        "start": 0,
        "end": 4,
        "block_digests": probe.block_digests,
    }
    return node_pb2.Request(open_microbatches=node_pb2.OpenMicrobatches(**{**fields, **changes}))


def forward(**fields: Any) -> node_pb2.Request:
    return node_pb2.Request(forward=node_pb2.Forward(**{"microbatch_id": ID, "wants_gradients": True, **fields}))


def backward(**fields: Any) -> node_pb2.Request:
    return node_pb2.Request(backward=node_pb2.Backward(**{"microbatch_id": ID, **fields}))


async def assert_unharmed(probe: NodeProbe, stream: FramedStream) -> None:
    """The same stream gives the right gradient; sessions work, and nothing of the microbatch is kept."""
    hidden = probe.hidden(5, batch=2)
    given, output, _ = probe.model.differentiable(probe.span, hidden)
    (expected,) = torch.autograd.grad(output, given, hidden)
    reply, (actual,) = await ask(stream, forward(microbatch_id=b"good" * 4), [hidden])
    assert reply.forward.is_stashed
    torch.testing.assert_close(actual, output.detach(), atol=1e-4, rtol=1e-4)
    reply, (gradient,) = await ask(stream, backward(microbatch_id=b"good" * 4), [hidden])
    assert reply.backward.was_stashed
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
    await probe.assert_serves_correctly()
    status = await probe.status()
    assert status.num_sessions == 0


H = torch.randn(2, 5, 32)
AGAIN = node_pb2.Forward(microbatch_id=ID)
REQUESTS: dict[str, tuple[Callable[[], node_pb2.Request], list[Tensor], int, str]] = {
    "no tensor": (forward, [], WRONG, "1 tensors are announced"),
    "too many tensors": (forward, [H, H], WRONG, "1 tensors are announced"),
    "a mask that does not come": (lambda: forward(has_mask=True), [H], WRONG, "2 tensors are announced"),
    "two dimensions": (forward, [H[0]], WRONG, "shape"),
    "another hidden size": (forward, [H[..., 1:]], WRONG, "shape"),
    "integers": (forward, [H.long()], WRONG, "dtype"),
    "NaN": (forward, [H * float("nan")], WRONG, "holds NaN"),
    "infinite": (forward, [H * float("inf")], WRONG, "holds NaN or infinite"),
    "no rows": (forward, [H[:0]], WRONG, "at least one row"),
    "no tokens": (forward, [H[:, :0]], WRONG, "at least one row"),
    "too many tokens": (
        forward,
        [torch.randn(2, MAX_TOKENS, 32)],
        node_pb2.THE_MICROBATCH_IS_TOO_LARGE,
        f"takes {MAX_TOKENS} tokens at once",
    ),
    "a mask of numbers": (lambda: forward(has_mask=True), [H, torch.ones(2, 5)], WRONG, "mask: dtype"),
    "a mask of another shape": (
        lambda: forward(has_mask=True),
        [H, torch.ones(2, 4, dtype=torch.bool)],
        WRONG,
        "mask: shape",
    ),
    "negative positions": (lambda: forward(has_positions=True), [H, torch.full((1, 5), -1)], WRONG, "position ids"),
    "absurd positions": (lambda: forward(has_positions=True), [H, torch.full((2, 5), 2**40)], WRONG, "position ids"),
    "positions for other rows": (
        lambda: forward(has_positions=True),
        [H, torch.ones(3, 5).long()],
        WRONG,
        "position ids",
    ),
    "a short id": (lambda: forward(microbatch_id=b"short"), [H], WRONG, "16 bytes, got 5"),
    "a step on this stream": (
        lambda: node_pb2.Request(step=node_pb2.Step(session_id=ID)),
        [H],
        node_pb2.THE_SESSION_IS_UNKNOWN,
        "no session",
    ),
    "a gradient of a microbatch never seen": (
        backward,
        [H],
        node_pb2.THE_MICROBATCH_IS_UNKNOWN,
        "send its input again",
    ),
    "a gradient of an id of no length": (lambda: backward(microbatch_id=b""), [H], WRONG, "16 bytes, got 0"),
    "a backward without its gradient": (lambda: backward(again=AGAIN), [], WRONG, "needs a gradient"),
    "a backward without its input": (lambda: backward(again=AGAIN), [H], WRONG, "1 tensors are announced"),
    "a NaN gradient": (lambda: backward(again=AGAIN), [H * float("nan"), H], WRONG, "gradient: holds NaN"),
    "a gradient of another shape": (lambda: backward(again=AGAIN), [H[:1], H], WRONG, "gradient: shape"),
    "a gradient of integers": (lambda: backward(again=AGAIN), [H.long(), H], WRONG, "gradient: dtype"),
    "an input too large to compute again": (
        lambda: backward(again=AGAIN),
        [torch.randn(2, MAX_TOKENS, 32)] * 2,
        node_pb2.THE_MICROBATCH_IS_TOO_LARGE,
        "takes",
    ),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", REQUESTS)
async def test_nonsense_is_refused_and_harms_nobody(probe: NodeProbe, name: str) -> None:
    make, tensors, code, message = REQUESTS[name]
    async with probe.talking() as stream:
        await ask(stream, opening(probe))
        reply, _ = await ask(stream, make(), tensors)
        assert reply.WhichOneof("kind") == "refusal", reply
        assert reply.refusal.code == code and message in reply.refusal.message, reply
        await assert_unharmed(probe, stream)


@pytest.mark.asyncio(loop_scope="module")
async def test_streams_must_be_opened_for_what_they_carry(probe: NodeProbe) -> None:
    for request in (forward(), backward()):
        async with probe.talking() as stream:
            reply, _ = await ask(stream, request, [H])
            assert "not opened for microbatches" in reply.refusal.message
    async with probe.session() as (stream, _):
        reply, _ = await ask(stream, opening(probe))
        assert "opened already" in reply.refusal.message
    for changes, code in (
        ({"model_digest": bytes(16)}, node_pb2.THE_WEIGHTS_DIFFER),
        ({"block_digests": [bytes(16)] * 4}, node_pb2.THE_WEIGHTS_DIFFER),
        ({"end": 5}, node_pb2.THE_BLOCKS_ARE_NOT_SERVED_HERE),
        ({"start": 4}, WRONG),
        ({"version": node_pb2.ProtocolVersion(major=9)}, node_pb2.THE_VERSIONS_DO_NOT_MEET),
    ):
        async with probe.talking() as stream:
            reply, _ = await ask(stream, opening(probe, **changes))
            assert reply.refusal.code == code, reply


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_kept_is_bounded_and_goes_with_the_client(probe: NodeProbe) -> None:
    before = (await probe.status()).stash_bytes_used  # other clients may keep something
    async with probe.talking() as stream:
        await ask(stream, opening(probe))
        stashed = []
        for index in range(30):
            reply, _ = await ask(stream, forward(microbatch_id=index.to_bytes(16, "big")), [probe.hidden(32, batch=2)])
            stashed.append(reply.forward.is_stashed)
            status = await probe.status()
            assert status.stash_bytes_used <= status.stash_bytes_budget == 2**20
        assert all(stashed), "an older one of ours makes room"
        assert status.stash_bytes_used > 2**19
        reply, _ = await ask(stream, backward(microbatch_id=bytes(16)), [probe.hidden(32, batch=2)])
        assert reply.refusal.code == node_pb2.THE_MICROBATCH_IS_UNKNOWN, "the first was pushed out"
    deadline = time.monotonic() + 5
    while (await probe.status()).stash_bytes_used > before:
        assert time.monotonic() < deadline, "the stash outlives the client"
        await asyncio.sleep(0.01)
