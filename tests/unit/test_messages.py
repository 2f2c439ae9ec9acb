"""Messages and tensors: what goes in comes out, and nothing malformed gets through."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from protos import node_pb2, tensor_pb2
from swarm.errors import BadReply, BadRequest, Busy, MicrobatchGone, Outdated, PeerFailed, SessionEvicted
from swarm.messages import Refused, decode_message, encode_message, error_of, refusal_of
from swarm.tensors import FLOATING, TensorLimits, WireFormat, decode_tensors, encode_tensor, num_bytes, wire_format_of


def wire(header, tensors=(), form=None):
    return b"".join(bytes(part) for part in encode_message(header, tensors, form))


def there_and_back(tensor, form):
    header, raw = encode_tensor(tensor, form)
    assert len(raw) == num_bytes(header)
    (decoded,) = decode_tensors([header], raw)
    return decoded


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


def block_maxima(values):
    """For each value the largest absolute one of its block of 64, in float64."""
    flat = values.double().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    return blocks.abs().amax(1).repeat_interleave(64)[: len(flat)].view(values.shape)


def check_errors(tensor):
    """Each form's error is what WireFormat says."""
    exact = tensor.double()
    assert torch.equal(there_and_back(tensor, WireFormat.FP32).double(), exact)
    bf16 = there_and_back(tensor, WireFormat.BF16).double()
    assert ((bf16 - exact).abs() <= exact.abs() * 2**-8 + 2**-134).all()
    int8 = there_and_back(tensor, WireFormat.INT8)
    assert int8.dtype == torch.float32 and int8.shape == tensor.shape
    assert ((int8.double() - exact).abs() <= block_maxima(tensor) / 254 * (1 + 2**-14) + 2**-142).all()


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), max_size=200), st.sampled_from(FLOATING))
def test_the_error_of_a_wire_format_is_what_it_says(values, dtype):
    check_errors(torch.tensor(values).nan_to_num(posinf=0, neginf=0).to(dtype).nan_to_num(posinf=0, neginf=0))


@given(st.integers(0, 2**32), st.integers(1, 1000), st.sampled_from([1e-44, 1e-38, 1e-3, 1.0, 1e4]))
@example(seed=0, size=64, magnitude=1e-44)
def test_an_outlier_costs_precision_in_its_own_block_only(seed, size, magnitude):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(size, generator=generator) * magnitude
    tensor[torch.rand(size, generator=generator) < 0.01] *= 1000
    check_errors(tensor)
    check_errors(tensor.bfloat16())


@pytest.mark.parametrize("form", WireFormat)
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 64), (1, 129), (1,), (0, 4), ()])
@pytest.mark.parametrize("dtype", FLOATING)
def test_a_form_keeps_shapes_and_tells_its_name_and_leaves_other_tensors_alone(form, shape, dtype):
    hidden, mask, positions = torch.randn(shape).to(dtype), torch.tensor([True, False]), torch.arange(3)
    header, tensors = decode_message(wire(node_pb2.Request(), [hidden, mask, positions], form), node_pb2.Request)
    assert wire_format_of(header.tensors[0]) is form and tensors[0].shape == shape
    assert tensors[0].dtype == (torch.bfloat16 if form is WireFormat.BF16 else torch.float32)
    assert torch.equal(tensors[1], mask) and torch.equal(tensors[2], positions)
    assert [wire_format_of(other) for other in header.tensors[1:]] == [None, None]
    again = there_and_back(tensors[0], form)
    assert torch.allclose(again, tensors[0], rtol=1e-6) and again.dtype == tensors[0].dtype


def test_without_a_form_a_tensor_goes_as_it_is_and_float16_has_none():
    names = [wire_format_of(encode_tensor(torch.ones(2, dtype=dtype))[0]) for dtype in FLOATING]
    assert names == [WireFormat.FP32, WireFormat.BF16, None]
    tensor = torch.zeros(2)
    for form in (None, WireFormat.FP32):
        _, raw = encode_tensor(tensor, form)
        tensor += 1
        assert bytes(raw) == struct.pack("<2f", *tensor.tolist()), "a view, not a copy"


def test_int8_lies_on_the_wire_as_documented():
    tensor = torch.zeros(2, 65).index_put_(
        (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 64])), torch.tensor([-254.0, 3.0, 0.5])
    )
    header, raw = encode_tensor(tensor.requires_grad_(), WireFormat.INT8)
    assert (header.dtype, header.codec, list(header.shape)) == (tensor_pb2.FLOAT32, tensor_pb2.BLOCKWISE_INT8, [2, 65])
    steps = [0] * 130
    steps[0], steps[1], steps[129] = -127, 2, 127
    assert bytes(raw) == struct.pack("<3f130b", 2.0, 0.0, torch.tensor(0.5).div(127).item(), *steps)


def test_int8_of_a_view_is_of_what_it_shows():
    base = torch.randn(70, 30)
    view = base.t()[1:, ::2]
    assert torch.equal(there_and_back(view, WireFormat.INT8), there_and_back(view.contiguous(), WireFormat.INT8))


def test_blocks_of_zeros_and_of_values_too_small_for_a_scale_stay_finite():
    for value in (0.0, -0.0, 1e-45, 7e-44, 2e-43, 1e-38):
        check_errors(torch.full((65,), value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_cannot_hide_in_int8(value):
    tensor = torch.ones(200)
    tensor[150] = value
    with pytest.raises(BadRequest, match="finite and not negative"):
        there_and_back(tensor, WireFormat.INT8)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf"), -1e-45])
def test_int8_with_scales_that_are_none_is_refused(scale):
    header, raw = encode_tensor(torch.ones(130), WireFormat.INT8)
    for position in range(3):
        changed = bytearray(raw)
        struct.pack_into("<f", changed, 4 * position, scale)
        with pytest.raises(BadRequest, match="finite and not negative"):
            decode_tensors([header], memoryview(changed))


@pytest.mark.parametrize("dtype", [tensor_pb2.BFLOAT16, tensor_pb2.FLOAT16, tensor_pb2.INT64, tensor_pb2.BOOL])
def test_int8_is_of_float32_only(dtype):
    header = tensor_pb2.TensorHeader(dtype=dtype, codec=tensor_pb2.BLOCKWISE_INT8, shape=[4])
    assert wire_format_of(header) is None
    with pytest.raises(BadRequest, match="codec BLOCKWISE_INT8 is of FLOAT32"):
        decode_tensors([header], memoryview(bytes(8)))


def test_unknown_codecs_and_payloads_of_another_size_are_refused():
    header, raw = encode_tensor(torch.ones(130), WireFormat.INT8)
    for payload in (b"", raw[:-1], bytes(raw) + b"x", bytes(130), bytes(520)):
        with pytest.raises(BadRequest, match="tensors of 142 bytes are declared"):
            decode_tensors([header], memoryview(payload))
    with pytest.raises(BadRequest, match="codec 2"):
        num_bytes(tensor_pb2.TensorHeader(dtype=tensor_pb2.FLOAT32, codec=2, shape=[1]))
    giant = tensor_pb2.TensorHeader(dtype=tensor_pb2.FLOAT32, codec=tensor_pb2.BLOCKWISE_INT8, shape=[2**31, 2**31, 4])
    with pytest.raises(BadRequest, match="142 bytes came"):
        decode_tensors([giant], raw)


def test_several_int8_tensors_lie_one_after_another():
    tensors = [torch.randn(5), torch.tensor([True]), torch.randn(67), torch.randn(0, 3), torch.randn(64)]
    _, decoded = decode_message(wire(node_pb2.Request(), tensors, WireFormat.INT8), node_pb2.Request)
    for tensor, other in zip(tensors, decoded, strict=True):
        assert torch.equal(other, there_and_back(tensor, WireFormat.INT8))


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
    form = data.draw(st.sampled_from([None, *WireFormat]))
    good = bytearray(wire(node_pb2.Request(step=node_pb2.Step(session_id=b"s" * 16)), [torch.randn(2, 3)], form))
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
        "THE_MICROBATCH_IS_UNKNOWN": MicrobatchGone,
        "THE_MICROBATCH_IS_TOO_LARGE": BadRequest,
        "THE_RUN_IS_ANOTHER": PeerFailed,
        "THE_EPOCH_IS_ANOTHER": Outdated,
        "THIS_SESSION_MADE_ROOM": SessionEvicted,
    }
    assert set(acts) == set(node_pb2.RefusalCode.keys())
    for name, kind in acts.items():
        reply = refusal_of(Refused(node_pb2.RefusalCode.Value(name), "because\x1b[31m"))
        error = error_of(reply.refusal, "12D3KooWpeer")
        assert type(error) is kind and name.lower().replace("_", " ") in str(error) and "\x1b" not in str(error)
    unknown = node_pb2.Refusal(code=77, message="from the future")
    assert type(error_of(unknown, "12D3KooWpeer")) is BadRequest
