"""Whatever bytes a peer sends to a node, it refuses them or breaks that stream, and serves everybody else as before."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from node.admission import MAX_STEP_TOKENS
from node.service import MAX_REFUSALS_PER_STREAM, OPEN_TIMEOUT_S
from protos import node_pb2, tensor_pb2
from swarm.errors import BadRequest, PeerFailed
from swarm.messages import MAX_HEADER_BYTES, PROTOCOL_MAJOR, encode_message
from swarm.p2p.framing import MAX_FRAME_BYTES, FrameKind
from swarm.span import Span
from tests.support.fork_server import ForkServer
from tests.support.models import NUM_BLOCKS, save_tiny
from tests.support.probes import NodeProbe, ask, ask_raw, node_probe, rss_bytes, step_request
from tests.support.processes import LocalSwarm, Process, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPAN = Span(1, NUM_BLOCKS)
SESSIONS_PER_PEER = 6
STREAMS_PER_PEER = SESSIONS_PER_PEER + 8
IDLE_S = 5
CACHE_MIB = 2
REPEATS = 200
MAX_GROWTH_BYTES = 20 * 2**20


@dataclass(slots=True)
class Target:
    """The node under attack."""

    node: Process
    probe: NodeProbe
    silent_stream_closed_after_s: asyncio.Task[float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("hostile") / "tiny")


@pytest.fixture(scope="module")
def swarm(fork_server: ForkServer, folder: Path) -> Any:
    with local_swarm(folder.parent / "swarm", fork_server=fork_server) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(swarm: LocalSwarm, folder: Path) -> AsyncIterator[Target]:
    node = swarm.start_node(
        folder,
        str(SPAN),
        "--cache-mib",
        str(CACHE_MIB),
        "--max-sessions-per-peer",
        str(SESSIONS_PER_PEER),
        "--session-idle",
        str(IDLE_S),
    )
    await asyncio.to_thread(node.ready)
    async with node_probe(node, folder, SPAN) as probe:

        async def stay_silent() -> float:
            started = time.monotonic()
            async with probe.talking() as stream:
                with pytest.raises(PeerFailed, match="no request came"):
                    await stream.receive()
            return time.monotonic() - started

        silent = asyncio.create_task(stay_silent())
        await probe.assert_serves_correctly()
        yield Target(node, probe, silent)
        silent.cancel()
        await asyncio.wait([silent])


async def assert_unharmed(target: Target) -> None:
    """The node answers a good session with the right hidden states, and holds neither session nor cache of the attacker's."""
    await target.probe.assert_serves_correctly()
    await target.probe.wait_for_usage(num_sessions=0, cache_bytes=0)
    assert target.node.is_running()


def message_of(header: bytes, payload: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("!I", len(header) if length is None else length) + header + payload


# Before a session is open -----------------------------------------------------------------------------------------------

WRONG = node_pb2.THE_REQUEST_IS_WRONG
OPENINGS: dict[str, tuple[Callable[[NodeProbe], node_pb2.Request], int, str]] = {
    "wrong_model_digest": (
        lambda p: p.open_request(model_digest=bytes(16)),
        node_pb2.THE_WEIGHTS_DIFFER,
        "serves tiny",
    ),
    "empty_model_digest": (lambda p: p.open_request(model_digest=b""), node_pb2.THE_WEIGHTS_DIFFER, "serves tiny"),
    "wrong_block_digests": (
        lambda p: p.open_request(block_digests=[bytes(16)] * len(SPAN)),
        node_pb2.THE_WEIGHTS_DIFFER,
        "digests of blocks 1:4",
    ),
    "too_few_block_digests": (lambda p: p.open_request(block_digests=[]), node_pb2.THE_WEIGHTS_DIFFER, "digests"),
    "too_many_block_digests": (
        lambda p: p.open_request(block_digests=[*p.block_digests, bytes(16)]),
        node_pb2.THE_WEIGHTS_DIFFER,
        "digests",
    ),
    "hop_outside_the_span": (
        lambda p: p.open_request(Span(0, 4)),
        node_pb2.THE_BLOCKS_ARE_NOT_SERVED_HERE,
        "serves blocks 1:4, not 0:4",
    ),
    "hop_beyond_the_model": (
        lambda p: p.open_request(start=1, end=2**32 - 1),
        node_pb2.THE_BLOCKS_ARE_NOT_SERVED_HERE,
        "not 1:4294967295",
    ),
    "hop_reversed": (lambda p: p.open_request(start=3, end=1), WRONG, "start < end, got 3:1"),
    "hop_empty": (lambda p: p.open_request(start=2, end=2), WRONG, "start < end, got 2:2"),
    "batch_zero": (lambda p: p.open_request(batch=0), WRONG, "batch 0"),
    "batch_absurd": (lambda p: p.open_request(batch=2**32 - 1), WRONG, "batch 4294967295"),
    "max_length_zero": (lambda p: p.open_request(max_length=0), WRONG, "max_length 0"),
    "max_length_absurd": (lambda p: p.open_request(max_length=2**32 - 1), WRONG, "max_length 4294967295"),
    "larger_than_the_cache": (
        lambda p: p.open_request(batch=64, max_length=2**16),
        node_pb2.THE_CACHE_IS_TOO_SMALL,
        f"this node has {CACHE_MIB:.1f} MiB in all: at most",
    ),
    "session_id_too_short": (lambda p: p.open_request(session_id=b"short"), WRONG, "16 bytes, got 5"),
    "session_id_too_long": (lambda p: p.open_request(session_id=bytes(40_000)), WRONG, "16 bytes, got 40000"),
    "session_id_missing": (lambda p: p.open_request(session_id=b""), WRONG, "16 bytes, got 0"),
    "next_protocol_version": (
        lambda p: p.open_request(version=node_pb2.ProtocolVersion(major=PROTOCOL_MAJOR + 1)),
        node_pb2.THE_VERSIONS_DO_NOT_MEET,
        f"this node speaks protocol {PROTOCOL_MAJOR}, you speak {PROTOCOL_MAJOR + 1}; upgrade the older of the two",
    ),
    "no_protocol_version": (
        lambda p: p.open_request(version=node_pb2.ProtocolVersion()),
        node_pb2.THE_VERSIONS_DO_NOT_MEET,
        f"this node speaks protocol {PROTOCOL_MAJOR}, you speak 0",
    ),
    "step_before_open": (
        lambda p: step_request(os.urandom(16), 0),
        node_pb2.THE_SESSION_IS_UNKNOWN,
        "no session was opened on this stream",
    ),
    "nothing_asked": (lambda p: node_pb2.Request(), WRONG, "no kind"),
}


@pytest.mark.parametrize("name", OPENINGS)
async def test_an_opening_that_makes_no_sense_is_refused_and_the_same_stream_can_open_properly(
    target: Target, name: str
) -> None:
    make, code, sentence = OPENINGS[name]
    async with target.probe.talking() as stream:
        reply, _ = await ask(stream, make(target.probe))
        assert reply.refusal.code == code and sentence in reply.refusal.message, reply
        reply, _ = await ask(stream, target.probe.open_request())
        assert reply.WhichOneof("kind") == "opened"
    await assert_unharmed(target)


def _tensor_headers(*headers: tuple[int, int, list[int]]) -> bytes:
    request = node_pb2.Request(status=node_pb2.GetNodeStatus())
    for dtype, codec, shape in headers:
        request.tensors.append(tensor_pb2.TensorHeader(dtype=dtype, codec=codec, shape=shape))  # type: ignore[arg-type]
    return request.SerializeToString()


MALFORMED = {
    "empty_message": (b"", "too short"),
    "three_bytes": (b"\0\0\0", "too short"),
    "header_longer_than_the_message": (message_of(b"abc", length=100), "does not fit"),
    "giant_header_length": (message_of(b"abc", length=2**32 - 1), "does not fit"),
    "header_above_the_limit": (message_of(bytes(MAX_HEADER_BYTES + 1)), "does not fit"),
    "truncated_protobuf": (message_of(_tensor_headers((1, 0, [1, 1, 32]))[:-3]), "not valid protobuf"),
    "random_bytes": (message_of(b"\xff" * 200), "not valid protobuf"),
    "giant_declared_tensor": (message_of(_tensor_headers((1, 0, [2**32 - 1] * 4))), "are declared, 0 bytes came"),
    "empty_tensor_of_overflowing_shape": (message_of(_tensor_headers((1, 0, [0, *[2**32 - 1] * 3]))), ""),
    "five_dimensions": (message_of(_tensor_headers((1, 0, [1] * 5)), bytes(4)), "5 dimensions"),
    "nine_tensors": (message_of(_tensor_headers(*[(1, 0, [1])] * 9), bytes(36)), "9 tensors"),
    "unknown_dtype": (message_of(_tensor_headers((99, 0, [1])), bytes(4)), "unknown dtype 99"),
    "unknown_codec": (message_of(_tensor_headers((1, 7, [1])), bytes(4)), "codec 7"),
    "bytes_without_a_tensor": (message_of(_tensor_headers(), bytes(1000)), "0 bytes are declared, 1000 bytes came"),
    "fewer_bytes_than_declared": (message_of(_tensor_headers((1, 0, [8])), bytes(31)), "32 bytes are declared, 31"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_message_is_refused_and_the_same_stream_goes_on(target: Target, name: str) -> None:
    message, sentence = MALFORMED[name]
    async with target.probe.talking() as stream:
        if sentence:
            reply, _ = await ask_raw(stream, message)
            assert reply.refusal.code == WRONG and sentence in reply.refusal.message, reply
        else:  # odd, but it says what it is
            reply, _ = await ask_raw(stream, message)
            assert reply.WhichOneof("kind") in ("refusal", "status")
        reply, _ = await ask(stream, target.probe.open_request())
        assert reply.WhichOneof("kind") == "opened"
    await assert_unharmed(target)


# Within a session -------------------------------------------------------------------------------------------------------


def _poisoned(hidden: Tensor, value: float) -> Tensor:
    hidden = hidden.clone()
    hidden[0, -1, 5] = value
    return hidden


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


Steps = Callable[[NodeProbe, bytes], tuple[node_pb2.Request, list[Tensor]]]
# The session has 2 rows, at most 32 tokens, and holds 4.
STEPS: dict[str, tuple[Steps, int, str]] = {
    "too_few_rows": (lambda p, s: (step_request(s, 4), [p.hidden(1)]), WRONG, "shape [2, any, 32] is needed"),
    "too_many_rows": (lambda p, s: (step_request(s, 4), [p.hidden(1, 3)]), WRONG, "got [3, 1, 32]"),
    "hidden_size_wrong": (
        lambda p, s: (step_request(s, 4), [p.hidden(1, 2)[..., :31]]),
        WRONG,
        "got [2, 1, 31]",
    ),
    "two_dimensions": (lambda p, s: (step_request(s, 4), [p.hidden(1, 2)[:, 0]]), WRONG, "got [2, 32]"),
    "integers": (lambda p, s: (step_request(s, 4), [p.hidden(1, 2).long()]), WRONG, "dtype torch.int64"),
    "booleans": (lambda p, s: (step_request(s, 4), [p.hidden(1, 2) > 0]), WRONG, "dtype torch.bool"),
    "nan": (lambda p, s: (step_request(s, 4), [_poisoned(p.hidden(2, 2), float("nan"))]), WRONG, "NaN or infinite"),
    "infinite": (lambda p, s: (step_request(s, 4), [_poisoned(p.hidden(2, 2), float("inf"))]), WRONG, "NaN or inf"),
    "opposite_infinities": (
        lambda p, s: (step_request(s, 4), [_poisoned(_poisoned(p.hidden(2, 2), float("-inf")), float("inf"))]),
        WRONG,
        "NaN or infinite",
    ),
    "no_tensor": (lambda p, s: (step_request(s, 4), []), WRONG, "one or two tensors"),
    "three_tensors": (
        lambda p, s: (step_request(s, 4), [p.hidden(1, 2), _ones(2, 1), _ones(2, 1)]),
        WRONG,
        "one or two tensors",
    ),
    "no_token": (lambda p, s: (step_request(s, 4), [p.hidden(1, 2)[:, :0]]), WRONG, "at least one token"),
    "more_tokens_than_a_step_may_have": (
        lambda p, s: (step_request(s, 4), [p.hidden(MAX_STEP_TOKENS + 1, 2)]),
        WRONG,
        f"at most {MAX_STEP_TOKENS} tokens",
    ),
    "more_tokens_than_the_session": (
        lambda p, s: (step_request(s, 4), [p.hidden(29, 2)]),
        WRONG,
        "position 4 + 29 new tokens exceed the session's 32",
    ),
    "position_too_high": (lambda p, s: (step_request(s, 5), [p.hidden(1, 2)]), WRONG, "position 5 is out of range"),
    "position_huge": (lambda p, s: (step_request(s, 2**32 - 1), [p.hidden(1, 2)]), WRONG, "out of range"),
    "position_too_low": (
        lambda p, s: (step_request(s, 3), [p.hidden(1, 2)]),
        WRONG,
        "position 3 is out of range: the cache holds 4 tokens",
    ),
    "rewind_beyond": (
        lambda p, s: (step_request(s, 9, rewind_to=9), [p.hidden(1, 2)]),
        WRONG,
        "cannot rewind to 9: the cache holds 4 tokens",
    ),
    "rewind_to_another_position": (
        lambda p, s: (step_request(s, 3, rewind_to=2), [p.hidden(1, 2)]),
        WRONG,
        "the cache holds 2 tokens",
    ),
    "reorder_out_of_range": (
        lambda p, s: (step_request(s, 4, reorder=[0, 2]), [p.hidden(1, 2)]),
        WRONG,
        "reorder must name 2 rows",
    ),
    "reorder_huge": (lambda p, s: (step_request(s, 4, reorder=[0, 2**32 - 1]), [p.hidden(1, 2)]), WRONG, "reorder"),
    "reorder_too_short": (lambda p, s: (step_request(s, 4, reorder=[0]), [p.hidden(1, 2)]), WRONG, "reorder"),
    "reorder_too_long": (
        lambda p, s: (step_request(s, 4, reorder=[0] * 10_000), [p.hidden(1, 2)]),
        WRONG,
        "reorder must name 2 rows",
    ),
    "mask_of_wrong_shape": (
        lambda p, s: (step_request(s, 4), [p.hidden(2, 2), _ones(2, 3)]),
        WRONG,
        "mask: shape [2, 2] is needed",
    ),
    "mask_of_wrong_dtype": (
        lambda p, s: (step_request(s, 4), [p.hidden(2, 2), torch.ones(2, 2)]),
        WRONG,
        "mask: dtype torch.float32",
    ),
    "another_session": (
        lambda p, s: (step_request(os.urandom(16), 4), [p.hidden(1, 2)]),
        node_pb2.THE_SESSION_IS_UNKNOWN,
        "another session than the stream",
    ),
    "session_id_missing": (
        lambda p, s: (step_request(b"", 4), [p.hidden(1, 2)]),
        node_pb2.THE_SESSION_IS_UNKNOWN,
        "another session",
    ),
    "second_open": (lambda p, s: (p.open_request(), []), WRONG, "was opened already"),
}


@pytest.mark.parametrize("name", STEPS)
async def test_a_step_that_makes_no_sense_is_refused_and_its_session_is_as_before(target: Target, name: str) -> None:
    make, code, sentence = STEPS[name]
    probe = target.probe
    hidden = probe.hidden(6, 2, seed=3)
    async with probe.session(batch=2) as (stream, session_id):
        _, first = await ask(stream, step_request(session_id, 0), [hidden[:, :4]])
        before = await probe.status()
        reply, _ = await ask(stream, *make(probe, session_id))
        assert reply.refusal.code == code and sentence in reply.refusal.message, reply
        after = await probe.status()
        assert (after.num_sessions, after.cache_bytes_used) == (before.num_sessions, before.cache_bytes_used)
        # The very session that was abused goes on where it was.
        _, second = await ask(stream, step_request(session_id, 4), [hidden[:, 4:]])
    whole = probe.model.forward(hidden, probe.model.new_cache(SPAN))
    torch.testing.assert_close(torch.cat([*first, *second], dim=1), whole, atol=1e-4, rtol=1e-4)
    await assert_unharmed(target)


async def test_a_session_cannot_be_used_from_another_stream(target: Target) -> None:
    probe = target.probe
    async with probe.session() as (_, session_id), probe.talking() as other:
        reply, _ = await ask(other, step_request(session_id, 0), [probe.hidden(1)])
        assert reply.refusal.code == node_pb2.THE_SESSION_IS_UNKNOWN
        reply, _ = await ask(other, probe.open_request(session_id=session_id))
        assert reply.refusal.code == WRONG and "open already" in reply.refusal.message
    await assert_unharmed(target)


async def test_a_repeated_step_is_answered_from_the_kept_reply_and_not_computed_again(target: Target) -> None:
    probe = target.probe
    async with probe.session() as (stream, session_id):
        _, first = await ask(stream, step_request(session_id, 0), [probe.hidden(4)])
        num_steps = (await probe.status()).num_steps
        _, again = await ask(stream, step_request(session_id, 0), [probe.hidden(4)])
        assert torch.equal(first[0], again[0]) and (await probe.status()).num_steps == num_steps
    await assert_unharmed(target)


async def test_a_stream_that_only_sends_nonsense_is_ended(target: Target) -> None:
    async with target.probe.talking() as stream:
        for _ in range(MAX_REFUSALS_PER_STREAM):
            reply, _ = await ask_raw(stream, b"nonsense")
            assert reply.WhichOneof("kind") == "refusal"
        with pytest.raises(PeerFailed, match="too many refused requests"):
            await stream.receive()
    await assert_unharmed(target)


# Below the messages: frames ---------------------------------------------------------------------------------------------


def _frame(kind: int, number: int, payload: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("!IBI", len(payload) if size is None else size, kind, number) + payload


RAW_FRAMES = {
    "unknown_kind": _frame(99, 0),
    "kind_zero": _frame(0, 0, b"abc"),
    "sequence_does_not_start_at_zero": _frame(FrameKind.LAST, 7, b"abc"),
    "sequence_repeats": _frame(FrameKind.PING, 0) + _frame(FrameKind.PING, 0),
    "giant_frame_declared": _frame(FrameKind.LAST, 0, b"abc", size=2**32 - 1),
    "frame_just_above_the_limit": _frame(FrameKind.LAST, 0, size=MAX_FRAME_BYTES + 1),
    "credit_of_wrong_size": _frame(FrameKind.CREDIT, 0, b"x"),
    "more_than_the_window": b"".join(_frame(FrameKind.MORE, i, bytes(MAX_FRAME_BYTES)) for i in range(3)),
    "endless_empty_pieces": b"".join(_frame(FrameKind.MORE, i) for i in range(5_000)),
    "endless_tiny_pieces": b"".join(_frame(FrameKind.MORE, i, b"x") for i in range(5_000)),
    "text_of_another_protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "error_frame_of_garbage": _frame(FrameKind.ERROR, 0, os.urandom(1000)),
}


@pytest.mark.parametrize("name", RAW_FRAMES)
async def test_frames_that_break_the_rules_end_only_their_own_stream(target: Target, name: str) -> None:
    reader, writer = await target.probe.raw_stream()
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            writer.write(RAW_FRAMES[name])
            await writer.drain()
            while await reader.read(65536):
                pass  # until the node closes
    writer.close()
    await assert_unharmed(target)


async def test_a_frame_that_never_comes_to_its_end_holds_nothing(target: Target) -> None:
    _, writer = await target.probe.raw_stream()
    writer.write(_frame(FrameKind.LAST, 0, b"half", size=100_000))
    await writer.drain()
    await assert_unharmed(target)
    writer.close()
    await assert_unharmed(target)


async def test_empty_messages_that_nobody_reads_do_not_pile_up(target: Target) -> None:
    reader, writer = await target.probe.raw_stream()
    before = rss_bytes(target.node)
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(5):
            for start in range(0, 400_000, 10_000):
                writer.write(b"".join(_frame(FrameKind.LAST, i) for i in range(start, start + 10_000)))
                await writer.drain()
            while await reader.read(65536):
                pass
    writer.close()
    await assert_unharmed(target)
    assert rss_bytes(target.node) - before < MAX_GROWTH_BYTES


async def test_pings_whose_answers_are_not_read_do_not_pile_up(target: Target) -> None:
    _, writer = await target.probe.raw_stream()
    before = rss_bytes(target.node)
    number = 0
    # p2pd and the sockets hold some 10 MB of answers before anything can pile up in the node.
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(3):
            while True:
                writer.write(b"".join(_frame(FrameKind.PING, i) for i in range(number, number + 20_000)))
                number += 20_000
                await writer.drain()
    writer.close()
    await assert_unharmed(target)
    assert rss_bytes(target.node) - before < MAX_GROWTH_BYTES


# Greed ------------------------------------------------------------------------------------------------------------------


async def test_a_silent_stream_is_closed_in_bounded_time(target: Target) -> None:
    async with asyncio.timeout(OPEN_TIMEOUT_S + 5):
        seconds = await asyncio.shield(target.silent_stream_closed_after_s)
    assert 0.9 * OPEN_TIMEOUT_S <= seconds <= OPEN_TIMEOUT_S + 3
    await assert_unharmed(target)


async def test_a_silent_session_is_closed_when_it_expires_and_its_cache_is_freed(target: Target) -> None:
    probe = target.probe
    async with probe.session() as (stream, _):
        assert (await probe.status()).num_sessions == 1
        with pytest.raises(PeerFailed, match="the session expired"):
            async with asyncio.timeout(IDLE_S + 5):
                await stream.receive()
        await assert_unharmed(target)


async def test_one_peer_cannot_have_more_sessions_than_its_share_and_others_still_get_one(
    target: Target, folder: Path
) -> None:
    probe = target.probe
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(SESSIONS_PER_PEER):
            await stack.enter_async_context(probe.session())
        async with probe.talking() as stream:
            reply, _ = await ask(stream, probe.open_request())
            assert reply.refusal.code == node_pb2.THIS_NODE_HAS_NO_ROOM
            assert f"one peer may have {SESSIONS_PER_PEER} sessions here; close some" in reply.refusal.message
        async with node_probe(target.node, folder, SPAN) as other:
            await other.assert_serves_correctly()
    await assert_unharmed(target)


async def test_a_session_that_could_never_fit_is_told_how_many_tokens_would(target: Target) -> None:
    probe = target.probe
    async with probe.talking() as stream:
        reply, _ = await ask(stream, probe.open_request(batch=1024, max_length=2**20))
        assert reply.refusal.code == node_pb2.THE_CACHE_IS_TOO_SMALL
        assert "of cache, this node has" in reply.refusal.message and "in all: at most" in reply.refusal.message
    await assert_unharmed(target)


async def test_one_peer_cannot_open_more_streams_than_its_share(target: Target) -> None:
    probe = target.probe
    await probe.wait_for_usage(0, 0)
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(probe.talking()) for _ in range(STREAMS_PER_PEER + 5)]

        async def is_refused(stream: Any) -> bool:
            try:
                await ask(stream, node_pb2.Request(status=node_pb2.GetNodeStatus()))
            except PeerFailed as error:
                return f"more than {STREAMS_PER_PEER} streams from one peer" in str(error)
            return False

        refused = sum([await is_refused(stream) for stream in streams])
        assert 5 <= refused <= 7  # a silent stream of another test may be open as well
    await assert_unharmed(target)


async def test_a_client_that_never_reads_its_replies_blocks_nobody_and_loses_its_session(target: Target) -> None:
    probe = target.probe
    request = probe.open_request(batch=4, max_length=256)
    stream = await probe.stream()
    reply, _ = await ask(stream, request)
    assert reply.WhichOneof("kind") == "opened"
    hidden = probe.hidden(256, 4)

    async def ask_for_ever() -> None:
        """Ask as fast as the node lets us, and take no reply: it returns credit for what it reads and gets none for what it writes."""
        version = 0
        while True:
            version += 1
            step = step_request(request.open.session_id, 0, rewind_to=0, session_version=version)
            await stream.send(encode_message(step, [hidden]))

    asking = asyncio.create_task(ask_for_ever())
    before = rss_bytes(target.node)
    started = time.monotonic()
    try:
        await probe.assert_serves_correctly()
        while (await probe.status()).num_sessions:
            await probe.assert_serves_correctly()
            assert time.monotonic() - started < 2 * IDLE_S + 5
            await asyncio.sleep(0.1)
        assert time.monotonic() - started > IDLE_S / 2, "the node had something to wait for"
        assert rss_bytes(target.node) - before < MAX_GROWTH_BYTES
    finally:
        asking.cancel()
        await asyncio.wait([asking])
        await stream.aclose()
    await assert_unharmed(target)


# Many at once -----------------------------------------------------------------------------------------------------------


async def test_the_memory_of_a_node_does_not_grow_with_hostile_traffic(target: Target) -> None:
    probe = target.probe

    async def attack() -> None:
        async with probe.talking() as stream:
            for message, _ in MALFORMED.values():
                await ask_raw(stream, message)
        async with probe.session(batch=2) as (stream, session_id):
            await ask(stream, step_request(session_id, 0), [probe.hidden(4, 2)])
            for make, _, _ in STEPS.values():
                await ask(stream, *make(probe, session_id))
        reader, writer = await probe.raw_stream()
        writer.write(RAW_FRAMES["giant_frame_declared"])
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    for _ in range(20):
        await attack()  # allocators and caches reach their size
    before = rss_bytes(target.node)
    for _ in range(REPEATS):
        await attack()
    growth = rss_bytes(target.node) - before
    print(f"growth after {REPEATS} rounds: {growth / 2**20:.1f} MiB")
    assert growth < MAX_GROWTH_BYTES
    await assert_unharmed(target)


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    edit = st.tuples(
        st.sampled_from(["flip", "cut", "insert", "double"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)
    )
    return draw(st.lists(edit, min_size=1, max_size=4))


def mutated(message: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, junk in edits:
        at = int(where * len(message))
        if kind == "flip":
            message = message[:at] + junk + message[at + len(junk) :]
        elif kind == "cut":
            message = message[:at]
        elif kind == "insert":
            message = message[:at] + junk + message[at:]
        else:
            message = message[:at] + message[at // 2 :]
    return message[:200_000]


@given(edits=mutations(), opened=st.booleans())
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_a_valid_message_with_some_bytes_changed_never_harms_the_node(
    target: Target, edits: list[tuple[str, float, bytes]], opened: bool
) -> None:
    probe = target.probe
    async with probe.talking() as stream:
        request, tensors = probe.open_request(), []
        if opened:
            reply, _ = await ask(stream, request)
            assert reply.WhichOneof("kind") == "opened"
            request, tensors = step_request(request.open.session_id, 0, reorder=[0]), [probe.hidden(3)]
        message = b"".join(bytes(part) for part in encode_message(request, tensors))
        try:
            reply, _ = await ask_raw(stream, mutated(message, edits))
            assert reply.WhichOneof("kind") in ("refusal", "opened", "step", "status")
        except (PeerFailed, BadRequest) as error:
            raise AssertionError(f"the node broke the stream instead of refusing: {error}") from error
    await assert_unharmed(target)
