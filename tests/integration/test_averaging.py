"""Groups of peers that sum their gradients: all end with the same bytes, or all abandon the round and know whom to leave out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import Tensor

from protos import averaging_pb2, tensor_pb2
from swarm.errors import BadRequest, PeerFailed
from swarm.exchange import (
    Chunk,
    ExchangeFailed,
    ExchangeMember,
    ExchangePlan,
    PatienceSettings,
    chunk_message,
    plain_message,
    split_message,
)
from swarm.messages import PROTOCOL_MAJOR, own_version
from swarm.p2p.averaging import Averager, AveragerConfig, Exchanged, plan_exchange
from swarm.p2p.averaging_streams import EXCHANGE_PROTOCOL
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host, HostConfig, running_host
from swarm.p2p.shares import share_out
from swarm.tensors import WireFormat, encode_tensor
from tests.support.averaging_peer import exchange_locally, plan_with
from tests.support.processes import Process

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMEOUT_S = 20.0
# A failure that is seen at once, and this machine's noise.
QUICK_S = 4.0
IMPATIENT = PatienceSettings(min_s=0.4, cap_s=1.5)
VICTIMS_SIZE, VICTIMS_CHUNK = 1_000_000, 9  # it sends 14: 7 to each of two reducers
REQUEST, REPLY = averaging_pb2.ExchangeRequest, averaging_pb2.ExchangeReply
Change = Callable[[Any, memoryview], list[Any]]


@dataclass(slots=True)
class Peer:
    host: Host
    averager: Averager
    addresses: tuple[str, ...]

    @property
    def peer_id(self) -> str:
        return self.host.peer_id


@contextlib.asynccontextmanager
async def running_peers(number: int, config: AveragerConfig) -> AsyncIterator[list[Peer]]:
    """In the order of their ids."""
    async with contextlib.AsyncExitStack() as stack:
        peers = []
        for _ in range(number):
            host = await stack.enter_async_context(running_host(HostConfig()))
            averager = Averager(host, config)
            await averager.start()
            stack.push_async_callback(averager.aclose)
            peers.append(Peer(host, averager, tuple(await host.addresses())))
        yield sorted(peers, key=lambda peer: peer.peer_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def peers() -> AsyncIterator[list[Peer]]:
    async with running_peers(4, AveragerConfig(patience=PatienceSettings(min_s=1.0, cap_s=9.0))) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def impatient() -> AsyncIterator[list[Peer]]:
    async with running_peers(3, AveragerConfig(patience=IMPATIENT, park_s=0.5, max_parked=3)) as running:
        yield running


@dataclass(slots=True)
class Victim:
    """A process that does itself harm in the round with the first two peers, which it begins when told to."""

    process: Process
    begin: Path
    trace: Path
    round_id: bytes


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def victims(peers: list[Peer], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Victim]]:
    """One for each signal. They start while the other tests run."""
    started = {}
    for action in ("SIGKILL", "SIGSTOP"):
        folder = tmp_path_factory.mktemp(action)
        victim = Victim(None, folder / "begin", folder / "trace", os.urandom(32))  # type: ignore[arg-type]
        orders = {
            "others": [(peer.peer_id, peer.addresses) for peer in peers[:2]],
            "round_id": victim.round_id.hex(),
            "size": VICTIMS_SIZE,
            "action": action,
            "at_chunk": VICTIMS_CHUNK,
            "begin": str(victim.begin),
            "trace": str(victim.trace),
        }
        command = [sys.executable, "-m", "tests.support.averaging_peer", json.dumps(orders)]
        victim.process = Process(command, folder / "log")
        started[action] = victim
    yield started
    for victim in started.values():
        victim.process.stop()


def plan_of(
    peers: Sequence[Peer],
    size: int,
    wire: WireFormat = WireFormat.FP32,
    *,
    no_gradient: Sequence[int] = (),
    outgoing_only: Sequence[int] = (),
) -> ExchangePlan:
    members = [
        ExchangeMember(
            peer.peer_id,
            () if number in outgoing_only else peer.addresses,
            number not in no_gradient,
        )
        for number, peer in enumerate(peers)
    ]
    shares = share_out([0.0 if number in outgoing_only else 1e6 for number in range(len(peers))])
    return plan_exchange(os.urandom(32), members, shares, size, wire)


def vectors_of(plan: ExchangePlan, seed: int = 0) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(plan.size, generator=generator) if member.has_gradient else None for member in plan.members]


async def attempt(
    peers: Sequence[Peer],
    plan: ExchangePlan,
    vectors: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """What average() returned or raised, for each peer."""
    residuals = residuals or [None] * len(peers)
    return await asyncio.gather(
        *(
            peer.averager.average(plan, vector, residual=residual, timeout_s=timeout_s)
            for peer, vector, residual in zip(peers, vectors, residuals, strict=True)
        ),
        return_exceptions=True,
    )


async def assert_succeed(
    peers: Sequence[Peer], plan: ExchangePlan, residuals: Sequence[Tensor | None] | None = None, seed: int = 0
) -> list[Exchanged]:
    """All end with the bits that the exchange without a network gives."""
    vectors = vectors_of(plan, seed)
    before = [None if values is None else values.clone() for values in [*vectors, *(residuals or [])]]
    outcomes = await attempt(peers, plan, vectors, residuals)
    expected, new_residuals = exchange_locally(plan, vectors, residuals or [None] * len(peers))
    for outcome, residual in zip(outcomes, new_residuals, strict=True):
        assert isinstance(outcome, Exchanged), outcome
        assert torch.equal(outcome.vector, expected)
        assert (outcome.residual is None) == (residual is None)
        assert residual is None or torch.equal(outcome.residual, residual)
    for values, kept in zip([*vectors, *(residuals or [])], before, strict=True):
        assert values is kept or torch.equal(values, kept), "an argument was changed"
    return outcomes


def assert_named(outcomes: Sequence[Any], culprits: set[str], reason: str = "") -> None:
    """These members' calls failed, and together they name the culprits and nobody else."""
    assert all(isinstance(outcome, ExchangeFailed) for outcome in outcomes), outcomes
    assert frozenset().union(*(outcome.culprits for outcome in outcomes)) == culprits, outcomes
    assert any(outcome.culprits and reason in str(outcome) for outcome in outcomes), outcomes


def num_open(peer: Peer) -> int:
    """Streams that a peer holds open for exchanges."""
    kept = sum(len(streams) for streams in peer.averager._pool._idle.values())
    return kept + len(peer.averager._serving)


async def until(condition: Callable[[], bool], what: str, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"after {within_s} s still not: {what}"
        await asyncio.sleep(0.005)


# All end with the same bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("wire", list(WireFormat))
async def test_all_members_end_with_the_same_bits(peers: list[Peer], number: int, wire: WireFormat) -> None:
    for size in (1, number - 1, 65, 400_000):
        await assert_succeed(peers[:number], plan_of(peers[:number], size, wire))


@pytest.mark.parametrize(
    ("no_gradient", "outgoing_only"),
    [([1], []), ([], [0]), ([], [1, 2, 3]), ([0], [3]), ([2], [2]), ([0, 1, 2], [3]), ([0, 1, 3], [2, 3])],
)
async def test_members_without_gradient_and_such_as_cannot_be_reached_take_part(
    peers: list[Peer], no_gradient: list[int], outgoing_only: list[int]
) -> None:
    plan = plan_of(peers, 200_000, WireFormat.INT8, no_gradient=no_gradient, outgoing_only=outgoing_only)
    assert all(bool(part) == (number not in outgoing_only) for number, part in enumerate(plan.parts))
    residuals = [torch.randn(plan.size) / 100 for _ in peers]
    outcomes = await assert_succeed(peers, plan, residuals)
    for number, outcome in enumerate(outcomes):
        if number in outgoing_only:
            assert outcome.rates == {}
            sent = 0 if number in no_gradient else plan.size * 17 / 16
            assert sent <= outcome.bytes_sent < sent * 1.01 + 2000


async def test_nobody_opens_a_stream_to_a_member_that_reduces_nothing(impatient: list[Peer]) -> None:
    await assert_succeed(impatient, plan_of(impatient, 1000, outgoing_only=[1]))
    assert impatient[1].averager._serving == set()


async def test_every_member_sends_and_receives_the_ideal_number_of_bytes(peers: list[Peer]) -> None:
    size = 300_000
    for wire, bytes_per_value in ((WireFormat.FP32, 4), (WireFormat.BF16, 2), (WireFormat.INT8, 17 / 16)):
        outcomes = await assert_succeed(peers, plan_of(peers, size, wire))
        ideal = 2 * (len(peers) - 1) / len(peers) * size * bytes_per_value
        for outcome in outcomes:
            assert ideal <= outcome.bytes_sent < 1.01 * ideal
            assert ideal <= outcome.bytes_received < 1.01 * ideal
            assert set(outcome.rates) < {peer.peer_id for peer in peers} and len(outcome.rates) == len(peers) - 1
            assert 0 < outcome.seconds < TIMEOUT_S


async def test_feedback_of_errors_holds_over_rounds_in_which_parts_move_and_attempts_fail(peers: list[Peer]) -> None:
    group, size = peers[:3], 30_000
    residuals: list[Tensor | None] = [None] * 3
    sent, received = torch.zeros(size), torch.zeros(size)
    for number in range(6):
        plan = plan_of(group, size, WireFormat.INT8, no_gradient=[number % 4], outgoing_only=[(number + 1) % 4])
        if number == 3:
            with lying(group[0], REQUEST, at_chunk=1, change=LIES["nan"][0]):
                assert_named((await attempt(group, plan, vectors_of(plan), residuals))[1:], {group[0].peer_id})
            plan = dataclasses.replace(plan, round_id=os.urandom(32))
        sent += sum(vector for vector in vectors_of(plan, number) if vector is not None)
        outcomes = await assert_succeed(group, plan, residuals, seed=number)
        residuals = [outcome.residual for outcome in outcomes]
        received += outcomes[0].vector
    held = sum(residual for residual in residuals if residual is not None)
    assert (received + held - sent).abs().max() < 1e-4  # float32's rounding


async def test_a_group_of_one_needs_no_network_and_loses_nothing(peers: list[Peer]) -> None:
    (outcome,) = await assert_succeed(peers[:1], plan_of(peers[:1], 100_000, WireFormat.INT8, outgoing_only=[0]))
    assert outcome.residual is None and outcome.bytes_sent == outcome.bytes_received == 0


async def test_rounds_may_run_beside_each_other(peers: list[Peer]) -> None:
    plans = [plan_of(group, 100_000) for group in (peers, peers[:2], peers[1:])]
    groups = (peers, peers[:2], peers[1:])
    await asyncio.gather(*(assert_succeed(group, plan) for group, plan in zip(groups, plans, strict=True)))


async def test_the_callers_thread_does_the_sums_if_one_is_given(peers: list[Peer]) -> None:
    with ThreadPoolExecutor(1) as executor:
        async with running_host(HostConfig()) as host:
            averager = Averager(host, executor=executor)
            await averager.start()
            own = Peer(host, averager, tuple(await host.addresses()))
            group = sorted([own, peers[0]], key=lambda peer: peer.peer_id)
            await assert_succeed(group, plan_of(group, 1000))
            await averager.aclose()
        assert len(executor._threads) == 1 and executor.submit(lambda: 7).result() == 7


# Streams ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_openings(peers: Sequence[Peer]) -> Iterator[list[str]]:
    """The peers to which streams are opened meanwhile."""
    opened: list[str] = []
    for peer in peers:
        pool, original = peer.averager._pool, peer.averager._pool.open

        async def count(member: ExchangeMember, original: Any = original) -> FramedStream:
            opened.append(member.peer_id)
            return await original(member)

        pool.open = count  # type: ignore[method-assign]
    try:
        yield opened
    finally:
        for peer in peers:
            del peer.averager._pool.open


async def test_streams_are_kept_for_later_rounds_and_opened_anew_when_they_broke(impatient: list[Peer]) -> None:
    await assert_succeed(impatient, plan_of(impatient, 1000))
    with counted_openings(impatient) as opened:
        for _ in range(3):
            await assert_succeed(impatient, plan_of(impatient, 1000))
        assert opened == []
        # Ended by the other side; that may become known only while the next round joins.
        await asyncio.gather(*(stream.aclose() for stream in impatient[0].averager._serving))
        await assert_succeed(impatient, plan_of(impatient, 1000))
        assert opened == [impatient[0].peer_id] * 2
    assert all(num_open(peer) == 4 for peer in impatient)


async def test_members_that_begin_early_wait_for_those_that_begin_late(peers: list[Peer]) -> None:
    plan = plan_of(peers[:3], 100_000)
    vectors = vectors_of(plan)
    early = [
        asyncio.create_task(peer.averager.average(plan, vector, timeout_s=TIMEOUT_S))
        for peer, vector in zip(peers[:2], vectors[:2], strict=True)
    ]
    await until(lambda: len(peers[2].averager._parked) == 2, "both wait at the late one")
    late = await peers[2].averager.average(plan, vectors[2], timeout_s=TIMEOUT_S)
    expected, _ = exchange_locally(plan, vectors, [None] * 3)
    assert all(torch.equal(outcome.vector, expected) for outcome in [late, *await asyncio.gather(*early)])
    assert peers[2].averager._parked == {}


async def test_a_member_that_left_before_another_began_is_not_awaited(peers: list[Peer]) -> None:
    plan = plan_of(peers[:3], 1000)
    vectors = vectors_of(plan)
    early = asyncio.create_task(peers[0].averager.average(plan, vectors[0], timeout_s=TIMEOUT_S))
    await until(lambda: all(peer.averager._parked for peer in peers[1:3]), "it waits at both others")
    early.cancel()
    await asyncio.wait([early])
    started = time.monotonic()
    outcomes = await attempt(peers[1:3], plan, vectors[1:])
    assert time.monotonic() - started < QUICK_S
    assert all(isinstance(outcome, ExchangeFailed) and not outcome.culprits for outcome in outcomes), outcomes
    assert any(outcome.gave_up == {peers[0].peer_id} for outcome in outcomes)


async def test_a_cancelled_round_leaves_nothing_and_the_others_blame_nobody(peers: list[Peer]) -> None:
    group = peers[:3]
    plan = plan_of(group, 3_000_000)
    reached = asyncio.Event()

    def notice(header: Any, payload: memoryview) -> list[Any]:
        reached.set()
        return message_of(header, payload)

    with lying(group[0], REQUEST, at_chunk=2, change=notice):
        tasks = [
            asyncio.create_task(peer.averager.average(plan, vector, timeout_s=TIMEOUT_S))
            for peer, vector in zip(group, vectors_of(plan), strict=True)
        ]
        await reached.wait()
        tasks[0].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    for outcome in outcomes[1:]:
        assert isinstance(outcome, ExchangeFailed) and not outcome.culprits and outcome.gave_up, outcome
    assert any(group[0].peer_id in outcome.gave_up for outcome in outcomes[1:])
    assert all(not peer.averager._rounds and not peer.averager._parked for peer in group)
    await assert_succeed(group, plan_of(group, 100_000))


# Culprits ---------------------------------------------------------------------------------------------------------------


def message_of(header: Any, payload: Any) -> list[Any]:
    encoded = header.SerializeToString()
    return [len(encoded).to_bytes(4, "big") + encoded, payload]


def chunk_of(header: Any) -> Any:
    return getattr(header, header.WhichOneof("kind"))


def with_values(value: float) -> Change:
    """As the first value, or scale."""

    def change(header: Any, payload: memoryview) -> list[Any]:
        return message_of(header, struct.pack("<f", value) + bytes(payload[4:]))

    return change


def shorter(header: Any, payload: memoryview) -> list[Any]:
    header.tensors[0].shape[0] -= 1
    return message_of(header, payload[:-4])


def other_dtype(header: Any, payload: memoryview) -> list[Any]:
    header.tensors[0].dtype = tensor_pb2.BFLOAT16
    return message_of(header, payload[: len(payload) // 2])


def other_round(header: Any, payload: memoryview) -> list[Any]:
    chunk_of(header).round_id = bytes(32)
    return message_of(header, payload)


def other_chunk(header: Any, payload: memoryview) -> list[Any]:
    chunk_of(header).index += 1
    return message_of(header, payload)


def too_large(header: Any, payload: memoryview) -> list[Any]:
    header.tensors[0].shape[0] *= 3
    return message_of(header, bytes(payload) * 3)


LIES: dict[str, tuple[Change, str]] = {
    "nan": (with_values(math.nan), "sent NaN or infinite values"),
    "infinity": (with_values(-math.inf), "sent NaN or infinite values"),
    "shorter": (shorter, "sent a chunk of shape"),
    "too_large": (too_large, "sent a chunk of shape"),
    "truncated": (lambda header, payload: message_of(header, payload[:-1]), "sent a malformed chunk"),
    "other_dtype": (other_dtype, "is not one fp32 tensor"),
    "other_round": (other_round, "sent a chunk of round 00000000 in round"),
    "other_chunk": (other_chunk, "was due"),
    "garbage": (lambda header, payload: [os.urandom(5000)], "sent a message"),
    "empty": (lambda header, payload: [b""], "sent a message of 0 bytes"),
}


def nothing(header: Any, payload: memoryview) -> list[Any]:
    return []


class Lies:
    """How often it was lied."""

    num_told = 0


@contextlib.contextmanager
def lying(peer: Peer, kind: Any, at_chunk: int, change: Change) -> Iterator[Lies]:
    """A peer that changes its n-th chunk on every stream, or keeps it back: contributions (REQUEST) or results (REPLY)."""
    lies, averager, is_active = Lies(), peer.averager, True
    seat, take, open_stream = averager._seat, averager._pool.take, averager._pool.open

    def corrupt(stream: FramedStream) -> None:
        send, num_chunks = FramedStream.send.__get__(stream), 0

        async def send_changed(message: list[Any]) -> None:
            nonlocal num_chunks
            header, payload = split_message(b"".join(bytes(part) for part in message), kind)
            if len(payload) and is_active:
                num_chunks += 1
                if num_chunks == at_chunk:
                    lies.num_told += 1
                    message = change(header, payload)
            if message:
                await send(message)

        stream.send = send_changed  # type: ignore[method-assign]

    async def seat_and_corrupt(stream: FramedStream, message: bytes) -> Any:
        corrupt(stream)
        return await seat(stream, message)

    async def open_and_corrupt(member: ExchangeMember) -> FramedStream:
        stream = await open_stream(member)
        corrupt(stream)
        return stream

    if kind is REPLY:
        averager._seat = seat_and_corrupt  # type: ignore[method-assign]
    else:
        averager._pool.take = lambda peer_id: None  # type: ignore[method-assign]
        averager._pool.open = open_and_corrupt  # type: ignore[method-assign]
    try:
        yield lies
    finally:
        is_active = False
        averager._seat, averager._pool.take, averager._pool.open = seat, take, open_stream  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [REQUEST, REPLY], ids=["contribution", "result"])
@pytest.mark.parametrize("name", LIES)
async def test_a_peer_that_sends_nonsense_is_named_and_the_others_go_on_without_it(
    peers: list[Peer], name: str, kind: Any
) -> None:
    change, reason = LIES[name]
    honest, liar = [peers[0], peers[2], peers[3]], peers[1]
    plan = plan_of(peers, 600_000)
    started = time.monotonic()
    with lying(liar, kind, at_chunk=2, change=change) as lies:
        outcomes = await attempt(peers, plan, vectors_of(plan))
    assert lies.num_told and time.monotonic() - started < QUICK_S
    outcomes.pop(1)  # a reducer that lies may itself get all that it needs
    assert_named(outcomes, {liar.peer_id}, reason)
    for outcome in outcomes:
        assert outcome.culprits or outcome.gave_up
    await assert_succeed(honest, plan_of(honest, 600_000))


async def test_peers_whose_values_are_finite_but_whose_sum_is_not_are_named(peers: list[Peer]) -> None:
    group = peers[:3]
    plan = plan_of(group, 3000)
    huge = with_values(3e38)
    with lying(group[0], REQUEST, 1, huge), lying(group[1], REQUEST, 1, huge):
        outcomes = await attempt(group, plan, vectors_of(plan))
    assert_named(outcomes[2:], {group[0].peer_id, group[1].peer_id}, "their sum is not")


async def test_a_peer_that_is_alive_but_silent_is_named_in_time(impatient: list[Peer]) -> None:
    for kind, longest_s in ((REQUEST, IMPATIENT.cap_s), (REPLY, 2 * IMPATIENT.cap_s + IMPATIENT.min_s)):
        plan = plan_of(impatient, 10_000)
        started = time.monotonic()
        with lying(impatient[1], kind, at_chunk=1, change=nothing) as lies:
            outcomes = await attempt(impatient, plan, vectors_of(plan))
        assert lies.num_told and longest_s <= time.monotonic() - started < longest_s + QUICK_S
        assert_named([outcomes[0], outcomes[2]], {impatient[1].peer_id}, "did not send the next message in time")
    await assert_succeed(impatient, plan_of(impatient, 1000))


async def test_a_round_ends_within_its_time_even_if_peers_had_more(peers: list[Peer]) -> None:
    plan, timeout_s = plan_of(peers[:3], 10_000), 1.0
    started = time.monotonic()
    with lying(peers[1], REQUEST, at_chunk=1, change=nothing):
        outcomes = await attempt(peers[:3], plan, vectors_of(plan), timeout_s=timeout_s)
    assert time.monotonic() - started < timeout_s + 1
    assert_named([outcomes[0], outcomes[2]], {peers[1].peer_id})


async def test_a_peer_that_takes_no_results_is_named(impatient: list[Peer]) -> None:
    victim = impatient[2]
    open_stream = victim.averager._pool.open
    num_taken = 0

    async def open_deaf(member: ExchangeMember) -> FramedStream:
        stream = await open_stream(member)
        receive = stream.receive

        async def receive_little() -> bytes | None:
            nonlocal num_taken
            num_taken += 1
            if num_taken > 4:
                await asyncio.Event().wait()
            return await receive()

        stream.receive = receive_little  # type: ignore[method-assign]
        return stream

    victim.averager._pool.take = lambda peer_id: None  # type: ignore[method-assign]
    victim.averager._pool.open = open_deaf  # type: ignore[method-assign]
    plan = plan_of(impatient, 3_000_000)  # its parts are larger than a window
    outcomes = await attempt(impatient, plan, vectors_of(plan))
    del victim.averager._pool.take, victim.averager._pool.open
    assert num_taken > 4
    assert_named(outcomes[:2], {victim.peer_id}, "did not take the next message in time")
    await assert_succeed(impatient, plan_of(impatient, 1000))


async def test_a_member_that_never_begins_or_cannot_be_reached_is_named(impatient: list[Peer]) -> None:
    plan = plan_of(impatient, 1000)
    outcomes = await attempt(impatient[:2], plan, vectors_of(plan)[:2])
    assert_named(outcomes, {impatient[2].peer_id})
    nowhere = tuple(address.rpartition("/tcp/")[0] + "/tcp/1" for address in impatient[2].addresses)
    stranger = ExchangeMember("12D3KooWJvyP3VJYymTqG7eH4PM5rN4T2agk5cdNCfNymAqwqcvZ", nowhere)
    members = [*plan.members[:2], stranger]
    plan = plan_exchange(os.urandom(32), members, [1, 1, 1], 1000, WireFormat.FP32)
    outcomes = await attempt(impatient[:2], plan, [torch.zeros(1000), torch.zeros(1000)])
    assert_named(outcomes, {stranger.peer_id}, "could not be reached")


async def test_members_whose_plans_differ_find_out_at_once(peers: list[Peer]) -> None:
    plan = plan_of(peers[:2], 1000)
    other = dataclasses.replace(plan, parts=plan.parts[::-1] if plan.parts[0] != 500 else (501, 499))
    vectors = vectors_of(plan)
    started = time.monotonic()
    outcomes = await asyncio.gather(
        peers[0].averager.average(plan, vectors[0], timeout_s=TIMEOUT_S),
        peers[1].averager.average(other, vectors[1], timeout_s=TIMEOUT_S),
        return_exceptions=True,
    )
    assert time.monotonic() - started < QUICK_S
    assert any("has no such place for you" in str(outcome) for outcome in outcomes)
    for outcome, peer in zip(outcomes, (peers[1], peers[0]), strict=True):  # the second to ask may hear that it is over
        assert isinstance(outcome, ExchangeFailed) and outcome.culprits | outcome.gave_up == {peer.peer_id}


@pytest.mark.parametrize("change", ["stranger", "used", "gradient", "nan"])
async def test_a_call_that_makes_no_sense_is_refused_at_once(peers: list[Peer], change: str) -> None:
    plan = plan_of(peers[:2], 100)
    vector: Tensor | None = torch.zeros(100)
    averager = peers[0].averager
    if change == "stranger":
        averager, reason = peers[3].averager, "is no member"
    elif change == "used":
        await assert_succeed(peers[:2], plan)
        reason = "was begun before"
    elif change == "gradient":
        vector, reason = None, "disagree on whether this member has a gradient"
    else:
        vector, reason = torch.full([100], math.nan), "holds NaN"
    with pytest.raises(BadRequest, match=reason):
        await averager.average(plan, vector, timeout_s=TIMEOUT_S)
    await assert_succeed(peers[:2], plan_of(peers[:2], 100))


# Strangers --------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def stream_to(peer: Peer, source: Peer) -> AsyncIterator[FramedStream]:
    stream = await source.host.open_stream(peer.peer_id, EXCHANGE_PROTOCOL, 5.0, peer.addresses)
    try:
        yield stream
    finally:
        await stream.aclose()


def joining(plan: ExchangePlan, **changes: Any) -> list[Any]:
    fields = {"version": own_version(), "round_id": plan.round_id, "plan_digest": plan.digest, **changes}
    return plain_message(REQUEST(join=averaging_pb2.JoinExchange(**fields)))


async def refusal_of(stream: FramedStream, message: list[Any]) -> tuple[int, str]:
    """The refusal, after which nothing more may come."""
    async with asyncio.timeout(5):
        await stream.send(message)
        answer = await stream.receive()
        assert answer is not None
        header, _ = split_message(answer, REPLY)
        assert header.WhichOneof("kind") == "refusal", header
        assert await stream.receive() is None
    return header.refusal.code, header.refusal.message


async def test_joinings_that_are_not_due_are_refused_by_name(impatient: list[Peer]) -> None:
    over = plan_of(impatient, 100)
    await assert_succeed(impatient, over)
    unknown = plan_of(impatient, 100)
    late_chunk = chunk_message(REQUEST, over, Chunk(0, 0, 9), *encode_tensor(torch.zeros(9)))
    next_version = type(own_version())(major=PROTOCOL_MAJOR + 1)
    cases: list[tuple[list[Any], int, str]] = [
        (joining(over), averaging_pb2.THIS_ROUND_IS_OVER, f"round {over.round_id.hex()[:8]} has ended here"),
        (late_chunk, averaging_pb2.THE_JOINING_IS_MALFORMED, "must be joined first"),
        (joining(unknown), averaging_pb2.THIS_ROUND_DID_NOT_BEGIN, "did not begin here"),
        (joining(unknown, round_id=b"short"), averaging_pb2.THE_JOINING_IS_MALFORMED, "must be joined first"),
        (joining(unknown, version=next_version), averaging_pb2.THE_EXCHANGE_VERSIONS_DIFFER, "you speak"),
        ([b"\xff" * 1000], averaging_pb2.THE_JOINING_IS_MALFORMED, "you sent a message of 1000 bytes"),
    ]
    for message, code, sentence in cases:
        async with stream_to(impatient[0], impatient[1]) as stream:
            refused_with, reason = await refusal_of(stream, message)
            assert refused_with == code and sentence in reason, reason


async def test_a_stranger_cannot_join_a_running_round(peers: list[Peer]) -> None:
    plan = plan_of(peers[:2], 1000)
    waiting = asyncio.create_task(peers[0].averager.average(plan, vectors_of(plan)[0], timeout_s=TIMEOUT_S))
    await until(lambda: bool(peers[0].averager._rounds), "the round has begun")
    for changes in ({}, {"plan_digest": bytes(32)}):
        for source in (peers[3], peers[1]) if changes else (peers[3],):
            async with stream_to(peers[0], source) as stream:
                code, _ = await refusal_of(stream, joining(plan, **changes))
                assert code == averaging_pb2.THE_PLANS_DIFFER
    late = await peers[1].averager.average(plan, vectors_of(plan)[1], timeout_s=TIMEOUT_S)
    assert torch.equal(late.vector, (await waiting).vector)


async def test_only_so_many_peers_may_wait_for_rounds_that_have_not_begun(impatient: list[Peer]) -> None:
    target = impatient[0]
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(stream_to(target, impatient[1])) for _ in range(4)]
        for stream in streams[:3]:
            await stream.send(joining(plan_of(impatient, 100)))
        await until(lambda: len(target.averager._parked) == 3, "three wait")
        started = time.monotonic()
        code, _ = await refusal_of(streams[3], joining(plan_of(impatient, 100)))
        assert code == averaging_pb2.THIS_ROUND_DID_NOT_BEGIN and time.monotonic() - started < 0.5
        await until(lambda: not target.averager._parked, "all were sent away", within_s=3)
    await assert_succeed(impatient, plan_of(impatient, 1000))


async def test_peers_that_are_not_expected_may_not_even_wait(peers: list[Peer]) -> None:
    async with running_host(HostConfig()) as host:
        averager = Averager(host, is_expected=lambda peer_id: peer_id == peers[0].peer_id)
        await averager.start()
        target = Peer(host, averager, tuple(await host.addresses()))
        async with stream_to(target, peers[1]) as stream:
            with pytest.raises(PeerFailed, match="no round with you is expected"):
                await stream.receive()
        for source in (peers[0], peers[1]):  # a member of a round that runs always may
            group = sorted([target, source], key=lambda peer: peer.peer_id)
            plan = plan_of(group, 100)
            running = asyncio.create_task(averager.average(plan, torch.ones(100), timeout_s=TIMEOUT_S))
            await until(lambda: bool(averager._rounds), "the round has begun")
            await source.averager.average(plan, torch.ones(100), timeout_s=TIMEOUT_S)
            assert torch.equal((await running).vector, torch.full([100], 2.0))
        await averager.aclose()


# Processes --------------------------------------------------------------------------------------------------------------


async def fall(victim: Victim, peers: list[Peer]) -> tuple[list[Any], float]:
    """Let the victim harm itself in a round with the first two peers: what these got, and after how many seconds."""
    ready = await asyncio.to_thread(victim.process.ready)
    others = [(peer.peer_id, peer.addresses) for peer in peers[:2]]
    plan = plan_with(others, (ready["peer_id"], ready["addresses"]), victim.round_id, VICTIMS_SIZE)
    victim.begin.touch()
    calls = [peer.averager.average(plan, torch.ones(plan.size), timeout_s=TIMEOUT_S) for peer in peers[:2]]
    running = asyncio.gather(*calls, return_exceptions=True)
    await until(victim.trace.exists, "the victim came to its chunk", within_s=10)
    fell_at = time.monotonic()
    outcomes = await running
    seconds = time.monotonic() - fell_at
    assert json.loads(victim.trace.read_text())["chunk"] == VICTIMS_CHUNK
    return outcomes, seconds


async def test_a_member_killed_in_mid_round_is_named_and_the_others_go_on(
    peers: list[Peer], victims: dict[str, Victim]
) -> None:
    victim = victims["SIGKILL"]
    outcomes, seconds = await fall(victim, peers)
    assert victim.process.wait(5) == -signal.SIGKILL
    assert_named(outcomes, {victim.process.peer_id})
    assert seconds < QUICK_S
    await assert_succeed(peers[:2], plan_of(peers[:2], 100_000))


async def test_a_member_frozen_in_mid_round_is_named_and_harms_nobody_when_it_goes_on(
    peers: list[Peer], victims: dict[str, Victim]
) -> None:
    victim = victims["SIGSTOP"]
    outcomes, seconds = await fall(victim, peers)
    assert_named(outcomes, {victim.process.peer_id}, "answers no ping")
    assert seconds < 6 + QUICK_S  # two thirds of cap_s at most, and twice min_s mostly
    assert victim.process.is_running()
    await assert_succeed(peers[:2], plan_of(peers[:2], 100_000))
    victim.process.send(signal.SIGCONT)
    assert await asyncio.to_thread(victim.process.wait, 10) == 1
    assert "ExchangeFailed" in victim.process.log
    await assert_succeed(peers[:2], plan_of(peers[:2], 100_000))
