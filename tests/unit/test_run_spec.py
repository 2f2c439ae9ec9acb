"""A run's rules: nonsense is refused by name, bytes are canonical, and nobody can change a bit of them under their id."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import run_pb2
from swarm.identity import Identity, public_key_of
from swarm.run_id import parse_run_id
from swarm.run_spec import (
    MAX_CONFIG_BYTES,
    MAX_SPEC_BYTES,
    DataKind,
    DataSpec,
    FrozenPrecision,
    LoraSettings,
    OptimizerSettings,
    Precision,
    RunSpec,
    Schedule,
    certified_run_id,
    open_spec,
    sign_spec,
)
from swarm.span import Span
from swarm.tensors import WireFormat
from tests.support.runs import CONFIG, make_data, make_spec

OWNER = Identity.generate()

# Nonsense --------------------------------------------------------------------------------------------------------------

NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": ""}, "name must be 1 to 200 printable characters"),
    "blank name": ({"name": " x"}, "name must not begin or end with a blank"),
    "terminal codes": ({"name": "\x1b[2J"}, "name must be 1 to 200 printable"),
    "long name": ({"name": "x" * 201}, "name must be 1 to 200 printable"),
    "config is a list": ({"config": []}, "config must be the object of a config.json"),
    "config of objects": ({"config": {**CONFIG, "dtype": object()}}, "config cannot be written as JSON"),
    "config with NaN": ({"config": {**CONFIG, "x": float("nan")}}, "config cannot be written as JSON"),
    "config too large": ({"config": {**CONFIG, "x": "y" * MAX_CONFIG_BYTES}}, "at most 16384 are allowed"),
    "config without blocks": ({"config": {"model_type": "llama"}}, "add num_hidden_layers to it"),
    "no weights": ({"weights": ""}, "weights must be 1 to 200"),
    "seed below zero": ({"seed": -1}, "seed must be a whole number from 0"),
    "seed is true": ({"seed": True}, "seed must be a whole number"),
    "digest too short": ({"initial_digests": (b"x",) * 3}, "initial_digests must be digests of 16 bytes"),
    "a digest too few": ({"initial_digests": (b"x" * 16,) * 2}, "one for each of 2 stages and the ends"),
    "tokenizer outside": ({"tokenizer": {"../x": bytes(32)}}, "plain names such as tokenizer.json, got '../x'"),
    "tokenizer hidden": ({"tokenizer": {".x": bytes(32)}}, "plain names"),
    "tokenizer digest": ({"tokenizer": {"x.json": bytes(16)}}, "tokenizer must be digests of 32 bytes"),
    "tokenizer files": ({"tokenizer": {f"f{n}": bytes(32) for n in range(17)}}, "at most 16 are allowed"),
    "no stages": ({"stages": ()}, "stages must be 1 to 256, got 0"),
    "hole": ({"stages": (Span(0, 1), Span(2, 4))}, "2:4 comes where one from 1 is due"),
    "overlap": ({"stages": (Span(0, 3), Span(2, 4))}, "2:4 comes where one from 3 is due"),
    "late start": ({"stages": (Span(1, 4),)}, "1:4 comes where one from 0 is due"),
    "too few blocks": ({"stages": (Span(0, 3),)}, "end at block 3, but the config has 4"),
    "sequences of one": ({"sequence_length": 1}, "sequence_length must be a whole number from 2 to"),
    "no batch": ({"target_batch": 0}, "target_batch must be a whole number from 1 to"),
    "half a batch": ({"target_batch": 1.5}, "target_batch must be a whole number"),
    "no microbatch": ({"microbatch": 0}, "microbatch must be a whole number from 1 to"),
    "large microbatch": ({"microbatch": 33}, "microbatch is 33, more than the target_batch of 32: make it smaller"),
    "many microbatches": (
        {"target_batch": 2**18 + 1, "microbatch": 1},
        "an epoch would have 262145 microbatches, .* at most 262144 are possible: make microbatch larger",
    ),
    "many of held-out data": (
        {"target_batch": 2**18, "microbatch": 1, "held_out": make_data(num_samples=1)}, "would have 262145 microbatches",
    ),
    "precision": ({"precision": "fp64"}, "precision must be one of fp32, bf16"),
    "averaging": ({"averaging": "int4"}, "averaging must be one of fp32, bf16, int8"),
    "dropout of all": ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    "dropout NaN": ({"dropout": float("nan")}, "dropout must be in"),
    "dropout as text": ({"dropout": "0.1"}, "dropout must be in .* got '0.1'"),
    "delay": ({"delay": 2}, "delay must be a whole number from 0 to 1"),
    "no replicas": ({"min_replicas": 0}, "min_replicas must be a whole number from 1"),
    "no epochs": ({"num_epochs": 0}, "num_epochs must be a whole number from 1"),
    "warm-up too long": ({"optimizer": OptimizerSettings(warmup_epochs=11)}, "warmup_epochs is 11, more than the run's 10"),
    "nothing to evaluate on": ({"eval_every": 5}, "give held_out"),
    "own held-out": ({"held_out": DataSpec(kind=DataKind.OWN)}, "its kind cannot be own"),
}  # fmt: skip
BAD_OPTIMIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": 0.0}, "lr must be positive, got 0.0"),
    "endless lr": ({"lr": float("inf")}, "lr must be positive"),
    "beta1": ({"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
    "beta2": ({"beta2": -0.1}, r"beta2 must be in \[0, 1\)"),
    "eps": ({"eps": 0}, "eps must be positive"),
    "weight decay": ({"weight_decay": -1.0}, "weight_decay must not be negative"),
    "clip": ({"clip_norm": 0.0}, "clip_norm must be positive, or false for no clipping"),
    "warm-up": ({"warmup_epochs": -1}, "warmup_epochs must be a whole number"),
    "floor": ({"min_lr_ratio": 1.1}, "min_lr_ratio must be between 0 and 1"),
    "schedule": ({"schedule": "step"}, "schedule must be one of constant, linear, cosine"),
}
BAD_LORA: dict[str, tuple[dict[str, Any], str]] = {
    "no rank": ({"rank": 0}, "lora.rank must be a whole number from 1 to 1024, got 0"),
    "endless rank": ({"rank": 1025}, "lora.rank must be a whole number from 1 to 1024"),
    "alpha": ({"alpha": 0}, "lora.alpha must be positive, got 0"),
    "a pattern": ({"target_modules": (".*proj",)}, r"names of modules such as q_proj or self_attn.q_proj, got '\.\*proj'"),
    "a number": ({"target_modules": (3,)}, "names of modules"),
    "twice": ({"target_modules": ("q", "q")}, "lora.target_modules must differ"),
    "too many": ({"target_modules": tuple(f"q{n}" for n in range(65))}, "at most 64 are allowed"),
    "frozen precision": ({"frozen_precision": "bf16"}, "lora.frozen_precision must be one of int8, int4, got 'bf16'"),
}  # fmt: skip
BAD_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "csv"}, "kind must be one of text, jsonl, parquet, own"),
    "outside": ({"files": ("a/../../etc/passwd",)}, r"files must be paths below the source, .* without \.\."),
    "absolute": ({"files": ("/etc/passwd",)}, "files must be paths below the source"),
    "of another system": ({"files": ("c:\\x",)}, "files must be paths below the source"),
    "twice": ({"files": ("a", "a")}, "files must differ"),
    "too many": ({"files": tuple(map(str, range(1001)))}, "at most 1000 are allowed"),
    "field": ({"text_field": ""}, "text_field must be 1 to 200"),
    "chunk": ({"documents_per_chunk": 0}, "documents_per_chunk must be a whole number from 1"),
    "digest": ({"manifest_digest": b"x"}, "manifest_digest must be digests of 16 bytes"),
    "samples": ({"num_samples": -1}, "num_samples must be a whole number from 0"),
    "own with files": ({"kind": DataKind.OWN}, "stays with each trainer: leave out files"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_by_name(name: str) -> None:
    fields, sentence = NONSENSE[name]
    with pytest.raises(ValueError, match=sentence):
        make_spec(**fields)


@pytest.mark.parametrize("name", BAD_OPTIMIZERS)
def test_a_nonsensical_optimizer_is_refused_by_name(name: str) -> None:
    fields, sentence = BAD_OPTIMIZERS[name]
    with pytest.raises(ValueError, match=sentence):
        OptimizerSettings(**fields)


@pytest.mark.parametrize("name", BAD_LORA)
def test_nonsensical_adapters_are_refused_by_name(name: str) -> None:
    fields, sentence = BAD_LORA[name]
    with pytest.raises(ValueError, match=sentence):
        LoraSettings(**fields)


@pytest.mark.parametrize("name", BAD_DATA)
def test_nonsensical_data_is_refused_by_name(name: str) -> None:
    fields, sentence = BAD_DATA[name]
    with pytest.raises(ValueError, match=sentence):
        make_data(**fields)


def test_more_than_256_stages_are_refused_and_256_fit_into_the_bytes_of_a_spec() -> None:
    def with_stages(count: int) -> RunSpec:
        return make_spec(
            config={"num_hidden_layers": count, "padding": "x" * 14_000},
            stages=tuple(Span(block, block + 1) for block in range(count)),
            initial_digests=(b"d" * 16,) * (count + 1),
        )

    assert len(sign_spec(with_stages(256), OWNER)) < MAX_SPEC_BYTES
    with pytest.raises(ValueError, match="stages must be 1 to 256, got 257"):
        with_stages(257)


def test_the_config_is_a_copy_of_our_own_as_json_has_it() -> None:
    config = {**CONFIG, "id2label": {1: "a", 10: "b", 9: "c"}, "ranges": (1, 2)}
    spec = make_spec(config=config)
    config["num_hidden_layers"] = 5
    assert spec.config == {**CONFIG, "id2label": {"1": "a", "10": "b", "9": "c"}, "ranges": [1, 2]}
    assert RunSpec.from_bytes(spec.to_bytes()) == spec


@pytest.mark.parametrize(
    "config", [{"n_layer": 4}, {"n_layers": 4}, {"num_layers": 4}, {"text_config": {"num_hidden_layers": 4}}]
)
def test_the_number_of_blocks_has_several_names(config: dict[str, Any]) -> None:
    assert make_spec(config=config).num_blocks == 4


def test_stages_are_counted_with_the_ends_as_the_last() -> None:
    spec = make_spec()
    assert (spec.num_blocks, spec.ends_stage, spec.num_stages) == (4, 2, 3)


# Bytes -----------------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
optimizers = st.builds(
    OptimizerSettings,
    lr=st.floats(1e-9, 10),
    beta1=st.floats(0, 0.999),
    clip_norm=st.none() | st.floats(1e-6, 1e6),
    schedule=st.sampled_from(Schedule),
    warmup_epochs=st.integers(0, 5),
    min_lr_ratio=st.floats(0, 1),
)
loras = st.builds(
    LoraSettings,
    rank=st.integers(1, 1024),
    alpha=st.floats(1e-6, 1e6),
    target_modules=st.lists(
        st.from_regex(r"[a-z_]{1,9}(\.[a-z0-9]{1,5})?", fullmatch=True), unique=True, min_size=1
    ).map(tuple),
    frozen_precision=st.none() | st.sampled_from(FrozenPrecision),
)
data_specs = st.builds(
    DataSpec,
    kind=st.sampled_from([DataKind.TEXT, DataKind.JSONL, DataKind.PARQUET]),
    source=texts,
    files=st.lists(st.from_regex(r"[a-z]{1,5}(/[a-z]{1,5})?", fullmatch=True), unique=True, min_size=1).map(tuple),
    text_field=texts,
    documents_per_chunk=st.integers(1, 1000),
    manifest_digest=st.binary(min_size=16, max_size=16),
    num_samples=st.integers(1, 2**48),
)


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    ends = sorted(draw(st.sets(st.integers(1, 1000), min_size=1, max_size=12)))
    stages = tuple(Span(start, end) for start, end in zip([0, *ends], ends, strict=False))
    digests = st.binary(min_size=16, max_size=16)
    target_batch = draw(st.integers(1, 2**24))
    microbatch = draw(st.integers(-(-target_batch // 2**17), target_batch))
    held_out = draw(
        st.none()
        | data_specs.map(lambda data: dataclasses.replace(data, num_samples=min(data.num_samples, microbatch * 2**17)))
    )
    return RunSpec(
        name=draw(texts),
        config={**draw(st.dictionaries(texts, json_values, max_size=4)), "num_hidden_layers": ends[-1]},
        weights=draw(texts),
        seed=draw(st.integers(0, 2**63 - 1)),
        initial_digests=tuple(draw(st.lists(digests, min_size=len(stages) + 1, max_size=len(stages) + 1))),
        tokenizer=draw(
            st.dictionaries(
                st.from_regex(r"[a-z_]{1,9}\.json", fullmatch=True),
                st.binary(min_size=32, max_size=32),
                min_size=1,
                max_size=5,
            )
        ),
        stages=stages,
        sequence_length=draw(st.integers(2, 2**20)),
        target_batch=target_batch,
        microbatch=microbatch,
        optimizer=draw(optimizers),
        precision=draw(st.sampled_from(Precision)),
        dropout=draw(st.floats(0, 0.99)),
        averaging=draw(st.sampled_from(WireFormat)),
        delay=draw(st.integers(0, 1)),
        data=draw(st.just(DataSpec(kind=DataKind.OWN)) | data_specs),
        held_out=held_out,
        eval_every=draw(st.integers(0, 100)) if held_out else 0,
        min_replicas=draw(st.integers(1, 1000)),
        keepers=draw(st.integers(0, 1000)),
        checkpoint_every=draw(st.integers(1, 10**9)),
        num_epochs=draw(st.integers(5, 2**31 - 1)),
        lora=draw(st.none() | loras),
    )


@settings(deadline=None, max_examples=100)
@given(specs())
def test_every_spec_comes_back_from_its_bytes_and_from_its_signed_bytes(spec: RunSpec) -> None:
    payload = spec.to_bytes()
    assert RunSpec.from_bytes(payload) == spec
    assert RunSpec.from_bytes(payload).to_bytes() == payload
    raw = sign_spec(spec, OWNER)
    run_id = certified_run_id(raw)
    assert run_id == spec.run_id(OWNER.peer_id)
    assert open_spec(raw, run_id) == (spec, OWNER.peer_id)


def test_the_order_in_which_things_were_written_changes_nothing() -> None:
    tokenizer = {"b.json": b"b" * 32, "a.json": b"a" * 32}
    one = make_spec(config=CONFIG, tokenizer=tokenizer)
    other = make_spec(config=dict(reversed(list(CONFIG.items()))), tokenizer=dict(reversed(list(tokenizer.items()))))
    assert one.to_bytes() == other.to_bytes()


def test_the_order_of_target_modules_changes_nothing_and_runs_without_adapters_have_the_bytes_that_they_had() -> None:
    one, other = (make_spec(lora=LoraSettings(target_modules=names)) for names in (("a", "b"), ("b", "a")))
    assert one.to_bytes() == other.to_bytes()
    assert hashlib.sha256(make_spec().to_bytes()).hexdigest()[:16] == "a920d1c4d784b358"


def test_runs_over_blocks_in_the_runs_precision_have_the_bytes_that_they_had() -> None:
    lora = LoraSettings(rank=4, alpha=32.0, target_modules=("q_proj", "v_proj"))
    found = hashlib.sha256(make_spec(lora=lora).to_bytes()).hexdigest()[:16]
    assert found == "10546cd1c691a1c9"  # of the version before frozen_precision
    others = [make_spec(lora=dataclasses.replace(lora, frozen_precision=precision)) for precision in FrozenPrecision]
    assert len({found, *(hashlib.sha256(spec.to_bytes()).hexdigest()[:16] for spec in others)}) == 3


def test_every_rule_changes_the_run_id_and_so_does_the_owner() -> None:
    base = make_spec(held_out=make_data(), eval_every=1)
    changed = {
        "name": "other",
        "config": {**CONFIG, "hidden_size": 33},
        "weights": "smollm2-135m",
        "seed": 1,
        "initial_digests": (b"1" * 16, b"2" * 16, b"f" * 16),
        "tokenizer": {"tokenizer.json": bytes(32)},
        "stages": (Span(0, 1), Span(1, 4)),
        "sequence_length": 65,
        "target_batch": 33,
        "microbatch": 5,
        "optimizer": OptimizerSettings(clip_norm=None),
        "precision": Precision.FP32,
        "dropout": 0.1,
        "averaging": WireFormat.INT8,
        "delay": 1,
        "data": make_data(documents_per_chunk=1),
        "held_out": make_data(num_samples=1),
        "eval_every": 2,
        "min_replicas": 2,
        "keepers": 1,
        "checkpoint_every": 7,
        "num_epochs": 11,
        "lora": LoraSettings(target_modules=("q_proj",)),
    }
    assert changed.keys() == {field.name for field in dataclasses.fields(RunSpec)}
    ids = {dataclasses.replace(base, **{name: value}).run_id(OWNER.peer_id) for name, value in changed.items()}
    ids |= {base.run_id(OWNER.peer_id), base.run_id(Identity.generate().peer_id)}
    assert len(ids) == len(changed) + 2


LORA = run_pb2.Lora(rank=4, alpha=1).SerializeToString()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda message: message.MergeFromString(b"\xa0\x06\x01"), "rules that this software does not know"),
        (lambda message: message.tokenizer.add(name="a.json", sha256=bytes(32)), "does not know"),  # not in order
        (lambda message: setattr(message, "config_json", message.config_json + b" "), "does not know"),
        (lambda message: setattr(message, "config_json", b"[" * 10_000), "nested too deeply"),
        (lambda message: setattr(message, "config_json", b"\xff{}"), "decode"),
        (lambda message: setattr(message, "config_json", b'{"num_hidden_layers":4,"x":1e999}'), "cannot be written"),
        (lambda message: setattr(message, "precision", "fp8"), "fp8"),
        (
            lambda message: message.lora.MergeFromString(LORA + b"\xa0\x06\x01"),
            "does not know: install a newer version",
        ),
        (lambda message: message.lora.MergeFromString(LORA + b"\x22\x04int2"), "'int2' is not a valid FrozenPrecision"),
        (lambda message: message.stage_ends.append(4), "need 0 <= start < end"),
        (lambda message: message.ClearField("stage_ends"), "stages must be 1 to 256"),
        (lambda message: message.ClearField("data"), "is not a valid DataKind"),
        (lambda message: setattr(message, "dropout", float("nan")), "dropout must be"),
    ],
)
def test_bytes_that_no_spec_makes_are_refused(change: Any, sentence: str) -> None:
    message = run_pb2.RunSpec.FromString(make_spec().to_bytes())
    change(message)
    with pytest.raises(ValueError, match=sentence):
        RunSpec.from_bytes(message.SerializeToString(deterministic=True))


# Signed bytes ----------------------------------------------------------------------------------------------------------


def signed(**changes: Any) -> tuple[bytes, bytes]:
    """(the id of a proper run, its bytes with these fields of the envelope changed)."""
    raw = sign_spec(make_spec(), OWNER)
    envelope = run_pb2.SignedRunSpec.FromString(raw)
    for name, value in changes.items():
        setattr(envelope, name, value)
    return certified_run_id(raw), envelope.SerializeToString(deterministic=True)


def test_no_bit_of_a_signed_spec_can_be_changed() -> None:
    run_id, raw = signed()
    assert open_spec(raw, run_id)[0] == make_spec()
    for position in range(len(raw)):
        mutated = bytearray(raw)
        mutated[position] ^= 1 << position % 8
        with pytest.raises(ValueError):  # noqa: PT011  each for a reason of its own
            open_spec(bytes(mutated), run_id)


def test_forged_foreign_oversized_and_padded_specs_are_refused_with_the_reason() -> None:
    other = Identity.generate()
    run_id, raw = signed()
    payload = run_pb2.SignedRunSpec.FromString(raw).payload
    tag = b"shardswarm RunSpec 1\0"
    cases = [
        (signed(signature=other.sign(tag + payload)), "not signed by its owner"),
        (signed(signature=b""), "not signed by its owner"),
        (signed(signature=OWNER.sign(payload)), "not signed by its owner"),  # without the tag
        (signed(owner="nobody"), "not signed by its owner"),
        (
            signed(owner=OWNER.peer_id + " "),
            "not signed by its owner",
        ),  # which a lenient decoder takes for the same key
        (signed(owner=other.peer_id, signature=other.sign(tag + payload)), "that of run"),
        ((bytes(32), raw), "that of run"),
        ((run_id, b"\xff" * 100), "not valid protobuf"),
        ((run_id, bytes(MAX_SPEC_BYTES + 1)), "at most 24576 are allowed"),
        ((run_id, raw + b"\xa2\x06\x04junk"), "not in canonical form"),
    ]
    for (expected_id, forged), sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            open_spec(forged, expected_id)


def test_a_spec_is_signed_only_when_others_can_check_everything() -> None:
    spec = make_spec(initial_digests=(), tokenizer={}, data=make_data(manifest_digest=b"", num_samples=0))
    assert spec.missing_parts() == ["initial_digests", "tokenizer", "data.manifest_digest", "data.num_samples"]
    with pytest.raises(ValueError, match=r"initial_digests, tokenizer, data\.manifest_digest.* must be filled in"):
        sign_spec(spec, OWNER)
    envelope = run_pb2.SignedRunSpec(payload=spec.to_bytes(), owner=OWNER.peer_id)
    envelope.signature = OWNER.sign(b"shardswarm RunSpec 1\0" + envelope.payload)
    raw = envelope.SerializeToString(deterministic=True)
    with pytest.raises(ValueError, match="lacks initial_digests, tokenizer"):
        open_spec(raw, certified_run_id(raw))
    assert make_spec(data=DataSpec(kind=DataKind.OWN)).missing_parts() == []
    assert make_spec(lora=LoraSettings()).missing_parts() == ["lora.target_modules"]


def test_a_spec_that_is_too_large_cannot_be_signed() -> None:
    files = tuple(f"{number:0100}" for number in range(300))
    with pytest.raises(ValueError, match="at most 24576 are allowed: use fewer files"):
        sign_spec(make_spec(data=make_data(files=files)), OWNER)


def test_a_run_id_is_typed_as_64_digits() -> None:
    run_id = make_spec().run_id(OWNER.peer_id)
    assert parse_run_id(run_id.hex()) == parse_run_id(f" {run_id.hex().upper()}\n") == run_id
    for text in ("", "abc", run_id.hex()[:-1], run_id.hex() + "0", "g" * 64, json.dumps(run_id.hex())):
        with pytest.raises(ValueError, match="is not a run id: give the 64 hexadecimal digits"):
            parse_run_id(text)


def test_a_peer_id_has_one_form() -> None:
    assert len(public_key_of(OWNER.peer_id)) == 32
    for text in (OWNER.peer_id + " ", " " + OWNER.peer_id, "1" + OWNER.peer_id, "x" * 100_000, "é"):
        with pytest.raises(ValueError):  # noqa: PT011  also the decoder's own
            public_key_of(text)
