"""Codes that a disk keeps: made once, used only if they are what was written, and no error if they cannot be kept."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from node.backend import block_codes
from node.backend.block_codes import BlockCodes, kind_of_codes
from node.backend.code_store import CodeStore
from node.shard import Shard, load_shard
from swarm.cache import list_cache, prune_cache
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.linears.quantize import Codes, Int4Codes, Int8Codes, quantize
from swarm.span import Span
from tests.support.models import save_tiny

SPAN = Span(1, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("stored"))


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), progress=False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that were quantised."""
    shapes: list[tuple[int, ...]] = []

    def counted(kind: type[Codes], weight_OI: Tensor) -> Codes:
        shapes.append(tuple(weight_OI.shape))
        return quantize(kind, weight_OI)

    monkeypatch.setattr(block_codes, "quantize", counted)
    return shapes


def load(checkpoint: Checkpoint, cache: Path, numeric_class: str = "int4", span: Span = SPAN) -> Shard:
    return load_shard(checkpoint, span, precision=numeric_class, device="cpu", cache_dir=cache)


def output_of(shard: Shard) -> Tensor:
    hidden = torch.randn(1, 5, shard.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    return shard.model.forward(hidden, shard.model.new_cache(shard.span))


def files_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("models/codes-*/*.safetensors"))


@pytest.mark.parametrize("numeric_class", ["int8", "int4"])
def test_codes_are_made_once_for_each_block(
    checkpoint: Checkpoint, tmp_path: Path, made: list[tuple[int, ...]], numeric_class: str
) -> None:
    first = load(checkpoint, tmp_path, numeric_class, Span(1, 3))
    assert len(made) == 2 * 7 and len(files_in(tmp_path)) == 2
    again = load(checkpoint, tmp_path, numeric_class, Span(1, 3))
    assert len(made) == 2 * 7
    assert torch.equal(output_of(first), output_of(again))
    load(checkpoint, tmp_path, numeric_class, Span(2, 4))
    assert len(made) == 3 * 7 and {path.stem for path in files_in(tmp_path)} == {
        digest.hex() for digest in checkpoint.block_digests(Span(1, 4))
    }


def test_classes_and_models_do_not_share_files(
    checkpoint: Checkpoint, tmp_path: Path, made: list[tuple[int, ...]]
) -> None:
    load(checkpoint, tmp_path, "int4")
    load(checkpoint, tmp_path, "int8")
    other = open_checkpoint(str(save_tiny("llama", tmp_path / "other", seed=7)), progress=False)
    load(other, tmp_path, "int8")
    assert len(made) == 3 * 3 * 7 and len(files_in(tmp_path)) == 9
    for numeric_class in ("fp32", "bf16"):
        load(checkpoint, tmp_path, numeric_class)
    assert len(list_cache(tmp_path)) == 3


def damage_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)


def damage_length(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_rubbish(path: Path) -> None:
    path.write_bytes(b"\xff" * 5000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_byte, damage_length, replace_by_rubbish, empty])
def test_a_damaged_file_is_made_again_with_a_line(
    checkpoint: Checkpoint,
    tmp_path: Path,
    made: list[tuple[int, ...]],
    caplog: pytest.LogCaptureFixture,
    damage: object,
) -> None:
    expected = output_of(load(checkpoint, tmp_path))
    path = files_in(tmp_path)[1]
    assert callable(damage)
    damage(path)
    made.clear()
    assert torch.equal(output_of(load(checkpoint, tmp_path)), expected)
    assert len(made) == 7
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "codes are made again" in line and path.name in line
    made.clear()
    load(checkpoint, tmp_path)
    assert made == []


def test_whole_files_of_other_linears_are_not_used(
    checkpoint: Checkpoint, tmp_path: Path, made: list[tuple[int, ...]]
) -> None:
    """Such as an older version of this program might have left under the same name."""
    (digest,) = checkpoint.block_digests(Span(1, 2))
    store = CodeStore(tmp_path, checkpoint.name, checkpoint.source, "int4")
    names = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"]
    wrong = [quantize(Int8Codes, torch.randn(32, 32)), quantize(Int4Codes, torch.randn(16, 32))]
    wrong += [quantize(Int4Codes, torch.randn(64, 64)), quantize(Int4Codes, torch.randn(33, 64))]
    store.write(digest, dict(zip(names, wrong, strict=True)))
    store.close()
    expected = output_of(load(checkpoint, tmp_path / "elsewhere", span=Span(1, 2)))
    made.clear()
    assert torch.equal(output_of(load(checkpoint, tmp_path, span=Span(1, 2))), expected)
    assert len(made) == 7


def test_a_full_disk_costs_one_line(checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The files that would be written are /dev/full, which has no room."""
    expected = output_of(load(checkpoint, tmp_path))
    for path in files_in(tmp_path):
        path.unlink()
        path.with_suffix(f".{os.getpid()}.partial").symlink_to("/dev/full")
    assert torch.equal(output_of(load(checkpoint, tmp_path)), expected)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "codes are not kept on this disk" in line and "No space left" in line
    assert files_in(tmp_path) == []


def test_a_cache_that_cannot_be_made_costs_one_line(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    load(checkpoint, tmp_path / "file")
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "codes are not kept on this disk" in line


def test_the_cache_lists_and_removes_codes_unless_they_are_in_use(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shard = load(checkpoint, tmp_path)
    (entry,) = list_cache(tmp_path)
    assert entry.name == checkpoint.name and entry.source == f"int4 of {checkpoint.source}"
    assert entry.bytes > sum(path.stat().st_size for path in files_in(tmp_path)) > 3000
    expected = output_of(shard)
    store = CodeStore(tmp_path, checkpoint.name, checkpoint.source, "int4")
    assert prune_cache(tmp_path, everything=True) == []
    store.close()
    assert [removed.path for removed in prune_cache(tmp_path, names=[checkpoint.name])] == [entry.path]
    assert files_in(tmp_path) == [] and torch.equal(output_of(shard), expected)


def test_what_dead_writers_left_is_removed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    load(checkpoint, tmp_path)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    path = files_in(tmp_path)[0]
    left, living = path.with_suffix(f".{done.pid}.partial"), path.with_suffix(f".{os.getppid()}.partial")
    left.touch(), living.touch()
    load(checkpoint, tmp_path)
    assert not left.exists() and living.exists()


def test_narrow_linears_keep_8_bits() -> None:
    assert kind_of_codes("int8", (64, 64), 64) is Int8Codes
    assert kind_of_codes("int4", (64, 64), 64) is Int4Codes
    assert kind_of_codes("int4", (32, 64), 64) is Int8Codes  # keys or values
    assert kind_of_codes("int4", (64, 256), 64) is Int4Codes  # down


def test_codes_without_a_store_or_a_block() -> None:
    codes = BlockCodes("int4", 64)
    weight = torch.randn(64, 64)
    assert torch.equal(codes.of("model.layers.0.q", weight).dense(), quantize(Int4Codes, weight).dense())
    assert torch.equal(codes.of("lm_head", weight).dense(), quantize(Int4Codes, weight).dense())
    codes.close()
