"""ModelSpec and its digests: what counts as the same model."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.model_spec import DIGEST_BYTES, ModelSpec, TensorBytes, config_digest, tensors_digest

A = TensorBytes("h.0.w", "float32", (2,), b"12345678")
B = TensorBytes("h.1.w", "float32", (1,), b"1234")


def make_spec(**changes: object) -> ModelSpec:
    fields: dict[str, object] = {
        "name": "m",
        "source": "dir:/m",
        "num_blocks": 2,
        "hidden_size": 8,
        "config_digest": b"c" * DIGEST_BYTES,
        "ends_digest": b"e" * DIGEST_BYTES,
    }
    return ModelSpec(**{**fields, **changes})  # type: ignore[arg-type]


def test_digest_depends_on_config_and_ends_but_not_on_names() -> None:
    digest = make_spec().digest
    assert len(digest) == DIGEST_BYTES
    assert make_spec(name="other", source="hub:a/b@c").digest == digest
    assert make_spec(config_digest=b"x" * DIGEST_BYTES).digest != digest
    assert make_spec(ends_digest=b"x" * DIGEST_BYTES).digest != digest
    assert make_spec(config_digest=b"e" * DIGEST_BYTES, ends_digest=b"c" * DIGEST_BYTES).digest != digest


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"source": ""},
        {"num_blocks": 0},
        {"num_blocks": 10**9},
        {"hidden_size": 0},
        {"ends_digest": b"short"},
    ],
)
def test_nonsense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="need"):
        make_spec(**changes)


def test_tensors_digest_ignores_order_only() -> None:
    digest = tensors_digest([A, B])
    assert tensors_digest([B, A]) == digest
    for changed in (
        [A],
        [TensorBytes("h.0.v", A.dtype, A.shape, A.content), B],
        [TensorBytes(A.name, "int32", A.shape, A.content), B],
        [TensorBytes(A.name, A.dtype, (1, 2), A.content), B],
        [TensorBytes(A.name, A.dtype, A.shape, b"12345679"), B],
    ):
        assert tensors_digest(changed) != digest
    with pytest.raises(ValueError, match="twice"):
        tensors_digest([A, A])


TENSORS = st.lists(
    st.builds(
        TensorBytes,
        st.text("ab", max_size=3),
        st.sampled_from(["a", "ab"]),
        st.lists(st.integers(0, 12), max_size=2).map(tuple),
        st.binary(max_size=3),
    ),
    max_size=3,
    unique_by=lambda tensor: tensor.name,
)


@given(TENSORS, TENSORS)
def test_different_tensors_have_different_digests(one: list[TensorBytes], other: list[TensorBytes]) -> None:
    same = sorted(one, key=lambda tensor: tensor.name) == sorted(other, key=lambda tensor: tensor.name)
    assert (tensors_digest(one) == tensors_digest(other)) is same


def test_config_digest_ignores_who_wrote_it_and_in_what_precision() -> None:
    config = {"architectures": ["X"], "rope_theta": 10000.0, "inner": {"n": 1, "dtype": "float16"}, "eps": 1e-5}
    same = {
        "eps": 0.00001,
        "inner": {"torch_dtype": "bfloat16", "n": 1.0},
        "rope_theta": 10000,
        "architectures": ["X"],
        "transformers_version": "4.0",
        "_name_or_path": "/somewhere",
        "dtype": "float32",
    }
    assert config_digest(config) == config_digest(same)
    assert config_digest({**config, "eps": 1e-6}) != config_digest(config)
    assert config_digest({**config, "architectures": ["Y"]}) != config_digest(config)
    assert config_digest({**config, "tie": True}) != config_digest({**config, "tie": 1})


def test_the_pure_modules_import_nothing_heavy() -> None:
    code = (
        "import sys, swarm.checkpoint, swarm.model_spec; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "set()"
