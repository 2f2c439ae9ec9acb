"""The exchange without a network: every position summed once, nothing lost over the rounds, patience that adapts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import averaging_pb2, tensor_pb2
from swarm.errors import BadReply, BadRequest
from swarm.exchange import (
    MAX_CHUNK_BYTES,
    Chunk,
    ErrorFeedback,
    ExchangeMember,
    ExchangePlan,
    Patience,
    PatienceSettings,
    RateMeter,
    Verdict,
    chunk_message,
    plain_message,
    read_chunk,
    result_patience_s,
)
from swarm.p2p.averaging import plan_exchange
from swarm.p2p.shares import share_out
from swarm.tensors import WireFormat, encode_tensor
from tests.support.averaging_peer import exchange_locally

REQUEST, REPLY = averaging_pb2.ExchangeRequest, averaging_pb2.ExchangeReply


def plan_of(parts, wire=WireFormat.FP32, has_gradient=None, round_id=bytes(32)):
    """A plan of members a, b, c ..."""
    has_gradient = has_gradient or [True] * len(parts)
    members = tuple(ExchangeMember(chr(ord("a") + number), has_gradient=has) for number, has in enumerate(has_gradient))
    return ExchangePlan(round_id, members, tuple(parts), wire)


def joined(buffers):
    return b"".join(bytes(buffer) for buffer in buffers)


# Plans ------------------------------------------------------------------------------------------------------------------

parts_of = st.lists(st.integers(0, 300_000), min_size=1, max_size=6).filter(any)


@settings(deadline=None)
@given(parts_of, st.sampled_from(WireFormat))
def test_chunks_cover_every_position_once_and_each_fits_a_frame(parts, wire):
    plan = plan_of(parts, wire)
    position = 0
    for index in range(len(parts)):
        for number, chunk in enumerate(plan.chunks_of(index)):
            assert (chunk.index, chunk.start) == (number, position) and chunk.start < chunk.end
            header, raw = encode_tensor(torch.zeros(chunk.end - chunk.start), plan.codec)
            assert len(joined(chunk_message(REQUEST, plan, chunk, header, raw))) <= MAX_CHUNK_BYTES + 256
            position = chunk.end
        assert position == sum(parts[: index + 1])


rates_of = st.lists(st.sampled_from([None, 0.0, 1.0, 3e3, 1e6, 1.1e6, 5e7, 1e9]), min_size=1, max_size=8)


@settings(deadline=None)
@given(rates_of, st.one_of(st.integers(1, 20), st.integers(21, 10**9)), st.randoms())
def test_a_balanced_plan_gives_every_position_to_somebody_who_can_be_reached(rates, size, random):
    members = [ExchangeMember(f"peer{number}") for number in range(len(rates))]
    random.shuffle(members)
    rate_of = dict(zip((member.peer_id for member in members), rates, strict=True))
    if len(rates) > 1 and all(rate == 0 for rate in rates):
        with pytest.raises(ValueError, match="can be reached"):
            share_out(rates)
        return
    shares = share_out(rates)
    plan = plan_exchange(bytes(32), members, shares, size, WireFormat.FP32)
    assert [member.peer_id for member in plan.members] == sorted(member.peer_id for member in members)
    assert plan.size == size and plan_exchange(bytes(32), members[::-1], shares[::-1], size, WireFormat.FP32) == plan
    for member, part in zip(plan.members, plan.parts, strict=True):
        assert part == 0 or rate_of[member.peer_id] != 0 or len(rates) == 1


def test_equal_rates_give_equal_parts_and_faster_members_larger_ones():
    def parts(*rates):
        members = [ExchangeMember(str(number)) for number in range(len(rates))]
        return plan_exchange(bytes(32), members, share_out(rates), 9_000_000, WireFormat.INT8).parts

    assert parts(1e9, 1e9) == parts(None, None) == parts(1.3e6, 1e6) == (4_500_000, 4_500_000)
    assert max(parts(1e9, 1e9, 1e9)) - min(parts(1e9, 1e9, 1e9)) < 20
    assert parts(1e6, 1e6, 0) == (4_500_000, 4_500_000, 0)
    slow, middle, fast = parts(1e6, 2e6, 4e6)
    assert slow < middle < fast
    assert parts(1e3, 1e9, 0)[2] == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round_id": bytes(31)}, "32 bytes, got 31"),
        ({"members": (ExchangeMember("b"), ExchangeMember("a"))}, "order of their peer ids"),
        ({"members": (ExchangeMember("a"), ExchangeMember("a"))}, "different members"),
        ({"members": ()}, "different members"),
        ({"parts": (1, 2, 3)}, "each of 2 members"),
        ({"parts": (-1, 2)}, "0 or more values"),
        ({"parts": (0, 0)}, "0 or more values"),
        ({"members": (ExchangeMember("a", has_gradient=False), ExchangeMember("b", has_gradient=False))}, "no member"),
    ],
)
def test_a_plan_that_makes_no_sense_cannot_be_made(changes, reason):
    fields = {
        "round_id": bytes(32),
        "members": (ExchangeMember("a"), ExchangeMember("b")),
        "parts": (3, 4),
        "wire": WireFormat.FP32,
    }
    with pytest.raises(ValueError, match=reason):
        ExchangePlan(**{**fields, **changes})


def test_the_digest_names_everything_that_members_must_agree_on():
    a, b = ExchangeMember("a"), ExchangeMember("b")
    fields = {"round_id": bytes(32), "members": (a, b), "parts": (3, 4), "wire": WireFormat.FP32}
    changes = [
        {"round_id": bytes(31) + b"x"},
        {"members": (a, ExchangeMember("c"))},
        {"members": (a, ExchangeMember("b", has_gradient=False))},
        {"parts": (4, 3)},
        {"wire": WireFormat.INT8},
    ]
    digests = {ExchangePlan(**{**fields, **change}).digest for change in [{}, *changes]}
    assert len(digests) == len(changes) + 1
    moved = (a, ExchangeMember("b", addresses=("/ip4/192.0.2.1/tcp/1",)))
    assert ExchangePlan(**{**fields, "members": moved}).digest == ExchangePlan(**fields).digest


def test_members_are_found_by_their_ids():
    plan = plan_of((1, 1, 1))
    assert [plan.index_of(member.peer_id) for member in plan.members] == [0, 1, 2]
    assert plan.index_of("") is None and plan.index_of("zzz") is None


# Error feedback ---------------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw):
    """(number of members, for each round: parts that move, and who has a gradient)"""
    num_members, size = draw(st.integers(2, 4)), draw(st.integers(1, 700))
    rounds = []
    for _ in range(draw(st.integers(1, 6))):
        cuts = sorted(draw(st.lists(st.integers(0, size), min_size=num_members - 1, max_size=num_members - 1)))
        parts = tuple(end - start for start, end in zip([0, *cuts], [*cuts, size], strict=True))
        has_gradient = draw(st.lists(st.booleans(), min_size=num_members, max_size=num_members).filter(any))
        rounds.append((parts, has_gradient))
    return num_members, rounds


@settings(max_examples=60, deadline=None)
@given(schedules(), st.sampled_from([WireFormat.BF16, WireFormat.INT8]), st.integers(0, 2**31))
def test_over_all_rounds_nothing_is_lost_but_what_the_residuals_hold(schedule, wire, seed):
    num_members, rounds = schedule
    generator = torch.Generator().manual_seed(seed)
    size = sum(rounds[0][0])
    residuals = [None] * num_members
    sent, received = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for parts, has_gradient in rounds:
        vectors = [torch.randn(size, generator=generator) if has else None for has in has_gradient]
        sent += sum(vector.double() for vector in vectors if vector is not None)
        before = [None if residual is None else residual.clone() for residual in residuals]
        result, new = exchange_locally(plan_of(parts, wire, has_gradient), vectors, residuals)
        for old, kept in zip(residuals, before, strict=True):  # an abandoned attempt leaves them as they were
            assert old is kept or torch.equal(old, kept)
        residuals = new
        received += result.double()
    held = sum(residual.double() for residual in residuals)
    # float32's rounding of at most 24 sums of values below 40
    torch.testing.assert_close(received + held, sent, rtol=0, atol=2e-4)
    for residual in residuals:  # a codec's error of one round, and of the sum; not a heap of all rounds'
        assert residual.abs().max() < 0.5


def test_without_feedback_of_errors_a_small_gradient_would_never_arrive():
    plan = plan_of((64, 64), WireFormat.INT8)
    vector = torch.full([128], 0.1)
    vector[::64] = 100.0  # steps of 0.79: what is below half of one becomes zero
    residuals, received = [None, None], torch.zeros(128)
    for _ in range(40):
        result, residuals = exchange_locally(plan, [vector, vector], residuals)
        received += result
    torch.testing.assert_close(received / 40, 2 * vector, rtol=0, atol=2 * 0.79 / 40)


def test_fp32_is_exact_and_delivers_a_residual_that_an_earlier_codec_left():
    plan = plan_of((30, 70), has_gradient=(True, False))
    vector, residual = torch.randn(100), torch.randn(100)
    result, residuals = exchange_locally(plan, [vector, None], [None, None])
    assert torch.equal(result, vector) and residuals == [None, None]
    result, residuals = exchange_locally(plan, [vector, None], [residual, residual])
    expected = vector + residual
    expected[30:] += residual[30:]  # the one without gradient tells what it owes where it reduces, and keeps the rest
    assert torch.equal(result, expected)
    assert not residuals[0].any() and torch.equal(residuals[1][:30], residual[:30]) and not residuals[1][30:].any()


def test_a_group_of_one_loses_nothing_whatever_the_wire_format():
    vector = torch.randn(1000)
    result, (residual,) = exchange_locally(plan_of((1000,), WireFormat.INT8), [vector], [None])
    assert torch.equal(result, vector) and residual is None


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (torch.zeros(99), r"float32 \[100\]"),
        (torch.zeros(1, 100), r"got torch.float32 \[1, 100\]"),
        (torch.zeros(100, dtype=torch.float64), "float64"),
        (torch.full([100], math.nan), "NaN"),
        (torch.full([100], -math.inf), "NaN, infinite"),
        (torch.full([100], 1e38), "absurdly large"),
    ],
)
def test_own_values_that_others_would_refuse_are_not_sent(vector, reason):
    plan = plan_of((50, 50))
    for arguments in ((vector, None), (torch.zeros(100), vector)):
        with pytest.raises(BadRequest, match=reason):
            ErrorFeedback(plan, *arguments)


# Chunks -----------------------------------------------------------------------------------------------------------------

PLAN = plan_of((100, 100), WireFormat.BF16)
CHUNK = Chunk(0, 0, 100)


@pytest.mark.parametrize("kind", [REQUEST, REPLY])
def test_a_chunk_arrives_as_it_was_sent(kind):
    values = torch.randn(100).bfloat16().float()
    message = joined(chunk_message(kind, PLAN, CHUNK, *encode_tensor(values, WireFormat.BF16)))
    assert torch.equal(read_chunk(message, kind, PLAN, CHUNK), values)


def message_of(values, wire=WireFormat.BF16, plan=PLAN, chunk=CHUNK, kind=REQUEST):
    return joined(chunk_message(kind, plan, chunk, *encode_tensor(values, wire)))


def lying_header(**fields):
    header = tensor_pb2.TensorHeader(dtype=tensor_pb2.BFLOAT16, codec=tensor_pb2.RAW, shape=[100])
    header.MergeFrom(tensor_pb2.TensorHeader(**fields))
    return joined(chunk_message(REQUEST, PLAN, CHUNK, header, memoryview(bytes(200))))


ZEROS = torch.zeros(100)
WRONG = {
    "empty": (b"", "of 0 bytes"),
    "no_header": (b"\0\0\0\1", "header of 1"),
    "giant_header": (b"\xff" * 100, "header of 4294967295"),
    "long_header": (b"\0\0\x02\x01" + bytes(600), "header of 513"),
    "garbage": (b"\0\0\0\x10" + b"\xff" * 16, "not valid protobuf"),
    "join_again": (joined(plain_message(REQUEST(join=averaging_pb2.JoinExchange()))), "of kind join where a chunk"),
    "nothing": (joined(plain_message(REQUEST())), "of kind None"),
    "result_for_contribution": (message_of(ZEROS, kind=REPLY), "of kind None"),
    "other_round": (message_of(ZEROS, plan=plan_of((100, 100), round_id=b"x" * 32)), "of round 78787878 in round"),
    "other_chunk": (message_of(ZEROS, chunk=Chunk(1, 0, 100)), "chunk 1 where chunk 0 was due"),
    "other_dtype": (message_of(ZEROS, WireFormat.FP32), "not one bf16 tensor"),
    "other_codec": (message_of(ZEROS, WireFormat.INT8), "not one bf16 tensor"),
    "integers": (lying_header(dtype=tensor_pb2.INT64), "not one bf16 tensor"),
    "too_short": (message_of(ZEROS[:-1]), r"shape \[99\], due were 100"),
    "too_long": (message_of(torch.zeros(101)), r"shape \[101\]"),
    "two_dimensions": (message_of(ZEROS.view(10, 10)), r"shape \[10, 10\]"),
    "truncated": (message_of(ZEROS)[:-1], "200 bytes are declared, 199"),
    "longer": (message_of(ZEROS) + b"\0", "200 bytes are declared, 201"),
    "nan": (message_of(torch.full([100], math.nan)), "NaN or infinite"),
    "infinity": (message_of(torch.full([100], math.inf)), "NaN or infinite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_chunk_that_is_not_the_one_due_is_refused_by_what_it_is(name):
    message, reason = WRONG[name]
    with pytest.raises(BadReply, match=reason):
        read_chunk(message, REQUEST, PLAN, CHUNK)


def test_nothing_is_allocated_for_a_giant_that_is_only_declared():
    header = tensor_pb2.TensorHeader(dtype=tensor_pb2.BFLOAT16, codec=tensor_pb2.RAW, shape=[2**32 - 1] * 3)
    message = joined(chunk_message(REQUEST, PLAN, CHUNK, header, memoryview(b"")))
    with pytest.raises(BadReply, match="due were 100 values"):
        read_chunk(message, REQUEST, PLAN, CHUNK)


# Patience ---------------------------------------------------------------------------------------------------------------

SETTINGS = PatienceSettings(min_s=2.0, factor=4.0, cap_s=30.0, first_rate_bytes_per_s=64e3)


def patience(rate=None, longest_s=30.0, due_at=math.inf):
    meter = RateMeter()
    if rate is not None:
        meter.observe(int(rate), 1.0)
    return Patience(SETTINGS, meter, longest_s=longest_s, due_at=due_at)


@pytest.mark.parametrize(
    ("rate", "num_bytes", "quiet_s"),
    [
        (1e8, 256_000, 2.0),  # 10 ms are expected: the floor
        (1e5, 100_000, 4.0),  # 1 s is expected
        (1e3, 100_000, 10.0),  # 100 s are expected: a third of the cap
        (None, 64_000, 4.0),  # not measured yet: 1 s is assumed
        (None, 0, 2.0),
    ],
)
def test_a_peer_is_asked_after_a_multiple_of_what_it_was_expected_to_take(rate, num_bytes, quiet_s):
    waiting = patience(rate)
    waiting.begin(100.0, 0, num_bytes)
    assert waiting.verdict(100.0 + quiet_s - 0.01, 0) is Verdict.WAIT
    assert waiting.verdict(100.0 + quiet_s, 0) is Verdict.PING
    assert waiting.verdict(100.0 + 2 * quiet_s - 0.01, 0) is Verdict.WAIT
    assert waiting.verdict(100.0 + 2 * quiet_s, 0) is Verdict.FROZEN


def test_any_byte_proves_that_a_peer_lives_but_only_until_the_cap():
    waiting = patience(1e6)
    waiting.begin(0.0, 500, 1000)
    verdicts = []
    heard = 500
    for tick in range(1, 130):
        now = tick / 4
        verdict = waiting.verdict(now, heard)
        if verdict is Verdict.PING:
            heard += 9  # it answers at once
        if verdict is not Verdict.WAIT:
            verdicts.append((now, verdict))
    pings = [now for now, verdict in verdicts if verdict is Verdict.PING]
    assert pings[0] == 2.0 and all(later - earlier == 2.25 for earlier, later in itertools.pairwise(pings))
    assert verdicts[len(pings)] == (30.0, Verdict.TOO_SLOW)


def test_all_waits_must_be_over_when_the_round_is():
    waiting = patience(1e6, due_at=5.0)
    waiting.begin(4.0, 0, 1000)
    assert waiting.verdict(4.9, 0) is Verdict.WAIT
    assert waiting.verdict(5.0, 0) is Verdict.TOO_SLOW


def test_who_is_not_awaited_is_not_judged():
    waiting = patience()
    assert waiting.verdict(1e9, 0) is Verdict.WAIT
    waiting.begin(0.0, 0, 1000)
    waiting.end(1.0, 1000)
    assert waiting.verdict(1e9, 0) is Verdict.WAIT


def test_time_in_which_we_ourselves_stood_still_does_not_count():
    waiting = patience(1e6)
    waiting.begin(0.0, 0, 1000)
    assert waiting.verdict(2.0, 0) is Verdict.PING
    waiting.forgive(1000.0)
    assert waiting.verdict(1003.9, 0) is Verdict.WAIT
    assert waiting.verdict(1004.0, 0) is Verdict.FROZEN


def test_a_wait_teaches_the_rate_and_recent_bytes_count_more():
    meter = RateMeter()
    assert meter.bytes_per_s is None
    waiting = Patience(SETTINGS, meter, longest_s=30.0, due_at=math.inf)
    waiting.begin(0.0, 0, 2**20)
    waiting.end(9.0, 2**20)
    assert meter.bytes_per_s is None  # it may have begun late
    waiting.begin(10.0, 0, 2**20)
    waiting.end(12.0, 2**20)
    assert meter.bytes_per_s == 2**19
    waiting.begin(20.0, 0, 2**20)
    waiting.end(21.0, 0)  # nothing came: nothing is learned
    assert meter.bytes_per_s == 2**19
    for _ in range(100):
        meter.observe(2**20, 10.0)
    assert meter.bytes_per_s == pytest.approx(2**20 / 10, rel=0.01)
    meter.observe(100, 0.0)
    assert math.isfinite(meter.bytes_per_s)


def test_a_peer_that_never_kept_us_waiting_is_not_taken_for_a_slow_one():
    waiting = patience()
    waiting.begin(0.0, 0, 256_000)
    assert waiting.quiet_s == 10.0
    waiting.end(0.0, 0)
    waiting.begin(0.0, 0, 256_000)
    assert waiting.quiet_s == SETTINGS.min_s


def test_a_reducer_is_awaited_longer_than_it_may_wait_itself():
    assert result_patience_s(SETTINGS) > 2 * SETTINGS.cap_s


@pytest.mark.parametrize(
    "fields", [{"min_s": 0}, {"min_s": 11.0}, {"factor": 0.5}, {"first_rate_bytes_per_s": 0}, {"cap_s": math.nan}]
)
def test_patience_that_makes_no_sense_cannot_be_set(fields):
    with pytest.raises(ValueError, match="need 0 < min_s"):
        PatienceSettings(**fields)
