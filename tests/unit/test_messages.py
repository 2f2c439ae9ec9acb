"""Messages and tensors: what goes in comes out, and nothing malformed gets through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import node_pb2, tensor_pb2
from swarm.errors import BadReply, BadRequest, Busy, PeerFailed
from swarm.messages import Refused, decode_message, encode_message, error_of, refusal_of
from swarm.tensors import FLOATING, TensorLimits, decode_tensors, encode_tensor


def wire(header, tensors=()):
    return b"".join(bytes(part) for part in encode_message(header, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1,), (0, 4), ()])
def test_tensors_survive_the_wire_bit_by_bit(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    header, tensors = decode_message(
        wire(node_pb2.Request(step=node_pb2.Step(position=7)), [tensor, torch.tensor([1.5])]), node_pb2.Request
    )
    assert header.step.position == 7
    assert tensors[0].dtype == dtype and torch.equal(tensors[0], tensor) and tensors[1].item() == 1.5


def test_a_view_is_sent_as_what_it_shows():
    base = torch.arange(12.0).view(3, 4)
    header, raw = encode_tensor(base.t()[1:])
    assert torch.equal(decode_tensors([header], raw)[0], base.t()[1:])


def test_an_odd_sized_tensor_before_a_large_dtype_is_no_problem():
    tensors = [torch.tensor([True, False, True]), torch.randn(3), torch.arange(2)]
    _, decoded = decode_message(wire(node_pb2.Request(), tensors), node_pb2.Request)
    assert all(torch.equal(a, b) for a, b in zip(tensors, decoded, strict=True))


def test_declared_sizes_must_match_what_came():
    giant = tensor_pb2.TensorHeader(dtype=tensor_pb2.FLOAT32, shape=[2**31, 2**31, 4])
    for headers in (
        [giant],
        [tensor_pb2.TensorHeader(dtype=99, shape=[1])],
        [tensor_pb2.TensorHeader(dtype=1, shape=[1] * 9)],
    ):
        message = node_pb2.Request(tensors=headers)
        encoded = message.SerializeToString()
        with pytest.raises(BadRequest):
            decode_message(len(encoded).to_bytes(4, "big") + encoded, node_pb2.Request)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_understood_but_never_crash(raw):
    try:
        decode_message(raw, node_pb2.Request)
    except BadRequest:
        return


@given(st.data())
def test_truncated_and_flipped_messages_never_crash(data):
    good = bytearray(wire(node_pb2.Request(step=node_pb2.Step(session_id=b"s" * 16)), [torch.randn(2, 3)]))
    cut = data.draw(st.integers(0, len(good)))
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] ^= data.draw(st.integers(1, 255))
    for raw in (bytes(good[:cut]), bytes(good)):
        try:
            decode_message(raw, node_pb2.Request)
        except BadRequest:
            continue


def test_limits_name_what_is_wrong():
    limits = TensorLimits(FLOATING, (2, None), "hidden states")
    assert limits.check(torch.zeros(2, 9)).shape == (2, 9)
    with pytest.raises(BadRequest, match=r"hidden states: shape \[2, any\] is needed, got \[3, 9\]"):
        limits.check(torch.zeros(3, 9))
    with pytest.raises(BadRequest, match="dtype"):
        limits.check(torch.zeros(2, 9, dtype=torch.int64))
    for value in (float("nan"), float("inf")):
        with pytest.raises(BadRequest, match="NaN or infinite"):
            limits.check(torch.full((2, 1), value))


def test_every_refusal_code_becomes_an_error_that_says_who_must_act():
    acts = {
        "THE_REQUEST_IS_WRONG": BadRequest,
        "THIS_NODE_HAS_NO_ROOM": Busy,
        "THIS_NODE_IS_LEAVING": PeerFailed,
        "THE_BLOCKS_ARE_NOT_SERVED_HERE": PeerFailed,
        "THE_WEIGHTS_DIFFER": BadReply,
        "THE_VERSIONS_DO_NOT_MEET": PeerFailed,
        "THE_SESSION_IS_UNKNOWN": PeerFailed,
        "THE_CACHE_IS_TOO_SMALL": Busy,
        "THE_COMPUTATION_FAILED": BadReply,
    }
    assert set(acts) == set(node_pb2.RefusalCode.keys())
    for name, kind in acts.items():
        reply = refusal_of(Refused(node_pb2.RefusalCode.Value(name), "because\x1b[31m"))
        error = error_of(reply.refusal, "12D3KooWpeer")
        assert type(error) is kind and name.lower().replace("_", " ") in str(error) and "\x1b" not in str(error)
    unknown = node_pb2.Refusal(code=77, message="from the future")
    assert type(error_of(unknown, "12D3KooWpeer")) is BadRequest
