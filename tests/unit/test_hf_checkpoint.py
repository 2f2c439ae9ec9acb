"""A run's weights as a Hugging Face checkpoint: plain transformers loads it and computes what stages and ends do.

Tolerance of logits: 1e-6 of the largest, because the whole model may add in another order; weights are equal to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from node.training.stage import TrainableStage
from swarm.client.training_ends import TrainableEnds
from swarm.errors import BadRequest, UserError
from swarm.identity import Identity
from swarm.run_orders import NO_ORDERS, Amendment
from swarm.run_spec import DataKind, Precision, certified_run_id, sign_spec
from swarm.run_store import RunStore, artifact_digest
from swarm.span import Span
from swarm.training.hf_checkpoint import WeightLayout, read_hf_checkpoint, write_hf_checkpoint
from swarm.training.initial import initial_digests, open_initial_weights
from tests.support.models import TINY, VOCAB_SIZE, save_tiny, tiny_tokenizer
from tests.support.runs import make_data, make_spec

LINEAGE = bytes(range(32))
PROMPT = "A swarm of small"
CASES = [(family, {}) for family in ("gpt2", "opt", "bloom", "gemma2", "qwen3_moe", "mixtral", "deepseek_v3")] + [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"num_hidden_layers": 12}),  # block 10 before block 2
    ("gpt2", {"tie_word_embeddings": False}),
    ("phi", {}),
]
IDS = ["-".join([family, *map(str, changes.values())]) for family, changes in CASES]


def make_store(cache: Path, family: str, changes: dict[str, Any] | None = None, **fields: Any) -> RunStore:
    """A run of three stages."""
    options = {**TINY[family], **(changes or {})}
    config = AutoConfig.for_model(family, **options).to_dict()
    num_blocks = AutoConfig.for_model(family, **options).num_hidden_layers
    tiny_tokenizer().save_pretrained(cache / "tokenizer")
    files = {path.name: path.read_bytes() for path in (cache / "tokenizer").iterdir()}
    spec = make_spec(
        **{
            "config": config,
            "stages": (Span(0, 1), Span(1, num_blocks - 1), Span(num_blocks - 1, num_blocks)),
            "initial_digests": (),
            "precision": Precision.FP32,
            "tokenizer": {name: artifact_digest(content) for name, content in files.items()},
            **fields,
        }
    )
    spec = dataclasses.replace(spec, initial_digests=initial_digests(open_initial_weights(spec), spec.stages))
    raw = sign_spec(spec, Identity.generate())
    store = RunStore.save(raw, certified_run_id(raw), cache)
    for name, content in files.items():
        if name in spec.tokenizer:
            store.put(artifact_digest(content), content)
    return store


class Trained:
    """The stages and ends of a run, with weights far from those that it began with."""

    def __init__(self, store: RunStore) -> None:
        spec = store.spec
        self.stages = [TrainableStage(open_initial_weights(spec), spec, stage) for stage, _ in enumerate(spec.stages)]
        self.ends = TrainableEnds(open_initial_weights(spec), spec)
        self.parameters = [replica.parameters for replica in (*self.stages, self.ends)]
        generator = torch.Generator().manual_seed(5)
        for parameters in self.parameters:
            state = parameters.snapshot()
            state.values.add_(0.05 * torch.randn(parameters.size, generator=generator))
            parameters.install(state)

    @property
    def values(self) -> list[Tensor]:
        return [parameters.state.values for parameters in self.parameters]

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.ends.embed(ids)
            for stage in self.stages:
                hidden = stage.forward(hidden)
            return self.ends.ends.logits(hidden).detach()

    def greedy(self, ids: Tensor, num_tokens: int) -> Tensor:
        for _ in range(num_tokens):
            ids = torch.cat([ids, self.logits(ids)[:, -1:].argmax(-1)], 1)
        return ids


def random_values(store: RunStore) -> list[Tensor]:
    """Vectors of the right sizes, without building stages."""
    layout = WeightLayout(store.spec)
    sizes = [sum(torch.Size(slot.shape).numel() for slot in layout.slots(k)) for k in range(store.spec.num_stages)]
    return [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]


def load(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize(("family", "changes"), CASES, ids=IDS)
def test_transformers_loads_and_computes_what_stages_and_ends_do(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    store = make_store(tmp_path, family, changes)
    trained, out = Trained(store), tmp_path / "out"
    write_hf_checkpoint(store, trained.values, out, epoch=5, lineage=LINEAGE)
    model = load(out)
    assert model.dtype == torch.float32
    expected = weights_by_name(trained, store, model.base_model_prefix)
    assert expected.keys() == dict(model.named_parameters()).keys()
    assert [name for name, tensor in model.named_parameters() if not torch.equal(tensor, expected[name])] == []
    for stage, vector in enumerate(trained.values):
        assert torch.equal(read_hf_checkpoint(store.spec, out, stage), vector)

    ids = torch.arange(40).view(2, 20) * 7 % VOCAB_SIZE
    logits = trained.logits(ids)
    with torch.no_grad():
        assert float((model(ids).logits - logits).abs().max() / logits.abs().max()) < 1e-6
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    generated = model.generate(prompt, max_new_tokens=8, do_sample=False)
    num_new = generated.shape[1] - prompt.shape[1]
    assert num_new > 0
    assert tokenizer.decode(generated[0]) == tokenizer.decode(trained.greedy(prompt, num_new)[0])


def weights_by_name(trained: Trained, store: RunStore, base_prefix: str) -> dict[str, Tensor]:
    """All weights by their names in the whole model, from the modules' own names, which must be in the layout's order."""
    layout, weights = WeightLayout(store.spec), {}
    for stage, parameters in enumerate(trained.parameters):
        names = list(parameters.names)
        if stage < store.spec.ends_stage:  # names within the base model, where blocks count from the span's first
            start = store.spec.stages[stage].start
            parts = [re.split(r"\b(\d+)\b", name, maxsplit=1) for name in names]
            names = [f"{base_prefix}.{before}{start + int(index)}{rest}" for before, index, rest in parts]
        shapes = [tuple(parameter.shape) for parameter in parameters.parameters]
        slots = layout.slots(stage)
        assert [(slot.key, slot.shape) for slot in slots] == list(zip(names, shapes, strict=True))
        weights |= dict(zip(names, parameters.views(parameters.state.values), strict=True))
    return weights


@pytest.mark.parametrize("family", TINY)
def test_the_files_are_those_of_save_pretrained(family: str, tmp_path: Path) -> None:
    store = make_store(tmp_path, family)
    values = random_values(store)
    write_hf_checkpoint(store, values, tmp_path / "out", epoch=1, lineage=LINEAGE)
    model = AutoModelForCausalLM.from_config(WeightLayout(store.spec).config)
    layout = WeightLayout(store.spec)
    named = {key: view for stage, vector in enumerate(values) for key, view in layout.views(stage, vector).items()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(named[key])
    model.save_pretrained(tmp_path / "expected")
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tmp_path / "expected" / "config.json").read_text()
    )
    for stage, vector in enumerate(values):
        assert torch.equal(read_hf_checkpoint(store.spec, tmp_path / "out", stage), vector)


def assert_same_tensors(one: Path, other: Path) -> None:
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_a_run_from_a_checkpoint_keeps_what_is_not_trained(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    buffers = {name: tensor for name, tensor in base.named_buffers() if name in base.state_dict()}
    for tensor in buffers.values():
        tensor.copy_(torch.linspace(-0.1, 0.1, tensor.numel()))
    assert bool(buffers) == (family == "deepseek_v3")
    base.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    store = make_store(tmp_path, family, weights=str(tmp_path / "base"), config=config)
    trained = Trained(store)
    write_hf_checkpoint(store, trained.values, tmp_path / "out", epoch=5, lineage=LINEAGE, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, tensor in buffers.items():
        assert torch.equal(model.get_buffer(name), tensor), name
    for stage, vector in enumerate(trained.values):
        assert torch.equal(read_hf_checkpoint(store.spec, tmp_path / "out", stage), vector.bfloat16().float())


def test_files_of_a_size_with_their_index_hold_the_same(tmp_path: Path) -> None:
    store = make_store(tmp_path, "qwen3_moe")
    values = random_values(store)
    for name, size in {"whole": 2**30, "cut": 50_000}.items():
        write_hf_checkpoint(store, values, tmp_path / name, epoch=1, lineage=LINEAGE, max_shard_bytes=size)
    assert_same_tensors(tmp_path / "cut", tmp_path / "whole")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "cut").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 3
    assert all(path.stat().st_size < 80_000 for path in (tmp_path / "cut").glob("*.safetensors"))
    assert index["metadata"]["total_parameters"] == sum(map(len, values)) == index["metadata"]["total_size"] / 4
    one, other = load(tmp_path / "cut"), load(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(read_hf_checkpoint(store.spec, tmp_path / "cut", 1), values[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_stored_in_the_dtype_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    store = make_store(tmp_path, "llama")
    values = random_values(store)
    write_hf_checkpoint(store, values, tmp_path / "out", epoch=1, lineage=LINEAGE, dtype=dtype)
    model = load(tmp_path / "out")
    assert model.dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for stage, vector in enumerate(values):
        assert torch.equal(read_hf_checkpoint(store.spec, tmp_path / "out", stage), vector.to(dtype).float())


def test_config_generation_config_tokenizer_and_card_are_in_the_folder(tmp_path: Path) -> None:
    store = make_store(
        tmp_path,
        "llama",
        {"temperature": 0.5, "max_length": 7},
        name="Alice",
        held_out=make_data(source="corpora/held out", manifest_digest=b"h" * 16, num_samples=7),
        eval_every=1,
    )
    out = tmp_path / "deep" / "below" / "out"
    write_hf_checkpoint(store, random_values(store), out, epoch=3, lineage=LINEAGE, loss=2.34567, eval_loss=2.5)
    assert load(out).config.hidden_size == 32
    assert "temperature" not in json.loads((out / "config.json").read_text())
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
    for name, digest in store.spec.tokenizer.items():
        assert artifact_digest((out / name).read_bytes()) == digest
    assert AutoTokenizer.from_pretrained(out).chat_template
    meta, shown = card_of(out)
    assert meta["library_name"] == "transformers" and "shardswarm" in meta["tags"]
    for fact in (
        "Alice",
        store.run_id.hex(),
        LINEAGE.hex(),
        "Epoch: 3 of 10",
        f"{3 * 32 * 64:,} at most",
        "Loss: 2.3457 per token",
        "Loss on held-out data: 2.5000 per token",
        "random, from seed 0",
        "corpora/tiny: a.jsonl, b/c.jsonl (jsonl, 100 samples",
        "corpora/held out: a.jsonl, b/c.jsonl (jsonl, 7 samples",
        "shardswarm",
        "float32",
    ):
        assert fact in shown, fact
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    exec(code.replace('"."', repr(str(out))), {"print": lambda text: None})
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    files = [*out.iterdir()]
    assert all(path.stat().st_mode & 0o777 == files[0].stat().st_mode & 0o777 for path in files)


def test_the_card_tells_of_amendments(tmp_path: Path) -> None:
    store = make_store(tmp_path, "llama")
    other = make_data(source="corpora/other", manifest_digest=b"o" * 16, files=("new.jsonl",))
    orders = NO_ORDERS
    for amendment in (
        Amendment(epoch=2, lr=0.1),
        Amendment(epoch=3, target_batch=16),
        Amendment(epoch=4, data=other),
        Amendment(epoch=6, num_epochs=20, target_batch=64),
    ):
        orders = orders.amended(amendment)
    values = random_values(store)
    for epoch, facts in {
        3: (
            "Epoch: 3 of 20",
            f"{3 * 32 * 64:,} at most (sequences of 64 tokens, 32 per epoch)",
            "b/c.jsonl (jsonl, 100 samples",
        ),
        6: (
            f"{(3 * 32 + 3 * 16) * 64:,} at most (sequences of 64 tokens, 32 per epoch in epochs 0 to 2, 16 per epoch in epochs 3 to 5)",
            " in epochs 0 to 3; corpora/other: new.jsonl",
        ),
    }.items():
        write_hf_checkpoint(store, values, tmp_path / str(epoch), epoch=epoch, lineage=LINEAGE, orders=orders)
        for fact in facts:
            assert fact in card_of(tmp_path / str(epoch))[1]
        assert ("corpora/other" in card_of(tmp_path / str(epoch))[1]) is (epoch > 4)


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The card's YAML, and the text of its Markdown as a reader sees it, without the code."""
    text = (folder / "README.md").read_text()
    empty, front, body = text.split("---\n", maxsplit=2)
    assert empty == ""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    inline = [child for token in tokens if token.type == "inline" for child in token.children or []]
    kinds = {token.type for token in (*tokens, *inline)}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "table_open", "em_open", "strong_open"}
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2"]
    lines = ["".join(c.content for c in t.children or []) for t in tokens if t.type == "inline"]
    return yaml.safe_load(front), "\n".join(lines)


@pytest.mark.parametrize(
    "name",
    [
        "--- a: b",
        "# ] \\ ` | name: [x](javascript:alert(1)) ![y](http://z.example/t.png)",
        "<script>alert(1)</script> &lt;img src=x onerror=alert(1)&gt;",
        "```python *bold* _it_ ~~gone~~ **x** <!-- --> http://www.example.com",
        "1. list | a | b | - [ ] $x^2$ :smile: @somebody {{ code }} \"quoted\" 'text' \U0001f600 é",
        "\\[x](y) \\\\` \\",
    ],
    ids=["yaml", "links", "html", "emphasis", "lists", "backslashes"],
)
def test_what_a_stranger_wrote_is_shown_as_it_is(name: str, tmp_path: Path) -> None:
    data = make_data(source=name, files=(f"{name.replace(':', '').replace(chr(92), '').replace('//', '')}.jsonl",))
    store = make_store(tmp_path, "llama", name=name, data=data)
    write_hf_checkpoint(store, random_values(store), tmp_path / "out", epoch=1, lineage=LINEAGE)
    meta, shown = card_of(tmp_path / "out")
    assert meta.keys() == {"library_name", "pipeline_tag", "tags"}
    assert shown.split("\n")[0] == name
    assert f"Training data: {name}: {data.files[0]} (jsonl" in shown
    load(tmp_path / "out")


def test_data_of_each_trainer_and_long_lists_of_files_are_described(tmp_path: Path) -> None:
    own = make_data(kind=DataKind.OWN, files=(), manifest_digest=b"", num_samples=0, source="")
    many = make_data(files=tuple(f"{number}.jsonl" for number in range(100)))
    for number, (data, expected) in enumerate([(own, "each trainer's own"), (many, "19.jsonl, 80 more (jsonl")]):
        store = make_store(tmp_path, "llama", data=data)
        write_hf_checkpoint(store, random_values(store), tmp_path / str(number), epoch=1, lineage=LINEAGE)
        assert expected in card_of(tmp_path / str(number))[1]


def test_a_file_that_only_claims_to_be_the_tokenizers_is_left_out(tmp_path: Path) -> None:
    hostile = b'{"auto_map": {"AutoModelForCausalLM": "evil.Model"}}'
    names = ["config.json", "adapter_config.json", "evil.py", "README.md", "model.safetensors"]
    tiny = tiny_tokenizer()
    tiny.save_pretrained(tmp_path / "t")
    files = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()} | dict.fromkeys(names, hostile)
    digests = {name: artifact_digest(content) for name, content in files.items()}
    store = make_store(tmp_path, "llama", tokenizer=digests)
    for content in files.values():
        store.put(artifact_digest(content), content)
    write_hf_checkpoint(store, random_values(store), tmp_path / "out", epoch=1, lineage=LINEAGE)
    assert not any(path.read_bytes() == hostile for path in (tmp_path / "out").iterdir())
    load(tmp_path / "out")


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path, "llama")
    values = random_values(store)
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for out in (full, file):
        with pytest.raises(UserError, match="choose another folder"):
            write_hf_checkpoint(store, values, out, epoch=1, lineage=LINEAGE)
    assert [path.name for path in full.iterdir()] == ["notes.txt"] and file.read_text() == "mine"
    write_hf_checkpoint(store, values, empty, epoch=1, lineage=LINEAGE)
    load(empty)
    with pytest.raises(UserError, match="choose another folder"):
        write_hf_checkpoint(store, values, empty, epoch=1, lineage=LINEAGE)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("num_bytes", "max_shard_bytes"), [(0, 2**30), (30_000, 20_000)])
def test_a_failure_while_writing_leaves_nothing_behind(num_bytes: int, max_shard_bytes: int, tmp_path: Path) -> None:
    """The system itself refuses, in the first file or in the last one of the weights."""
    store = make_store(tmp_path, "llama")
    values = random_values(store)
    before, out = sorted(tmp_path.iterdir()), tmp_path / "new" / "out"
    with files_of_at_most(num_bytes), pytest.raises(UserError, match=r"cannot write .* free some space"):
        write_hf_checkpoint(store, values, out, epoch=1, lineage=LINEAGE, max_shard_bytes=max_shard_bytes)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_without_room_is_found_out_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path, "llama")
    values = random_values(store)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"the disk has 0\.00 GiB free"):
        write_hf_checkpoint(store, values, tmp_path / "out", epoch=1, lineage=LINEAGE)
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, "llama")
    values = random_values(store)
    for wrong in (values[:-1], values[::-1], [vector.double() for vector in values]):
        with pytest.raises(BadRequest, match="float32 vectors of"):
            write_hf_checkpoint(store, wrong, tmp_path / "out", epoch=1, lineage=LINEAGE)
    values[1][3] = 1e9
    with pytest.raises(UserError, match=r"not finite as torch\.float16: choose float32"):
        write_hf_checkpoint(store, values, tmp_path / "out", epoch=1, lineage=LINEAGE, dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_config_that_cannot_be_written_is_the_owners_fault(tmp_path: Path) -> None:
    fine, broken = make_store(tmp_path, "llama", {"pad_token_id": -1}), make_store(tmp_path, "llama", {"validate": 3})
    write_hf_checkpoint(fine, random_values(fine), tmp_path / "fine", epoch=1, lineage=LINEAGE)
    assert GenerationConfig.from_pretrained(tmp_path / "fine").pad_token_id is None
    with pytest.raises(UserError, match=r"cannot write the config of tiny .* ask its owner"):
        write_hf_checkpoint(broken, random_values(broken), tmp_path / "broken", epoch=1, lineage=LINEAGE)


def test_a_checkpoint_of_another_model_is_not_read(tmp_path: Path) -> None:
    store = make_store(tmp_path, "llama")
    with pytest.raises(UserError, match="does not exist"):
        read_hf_checkpoint(store.spec, tmp_path / "nothing", 0)
    save_tiny("llama", tmp_path / "longer", num_hidden_layers=5)
    with pytest.raises(UserError, match="has 5 blocks, the run 4"):
        read_hf_checkpoint(store.spec, tmp_path / "longer", 0)
    save_tiny("llama", tmp_path / "wider", intermediate_size=96)
    with pytest.raises(UserError, match="do not fit its config"):
        read_hf_checkpoint(store.spec, tmp_path / "wider", 0)


def test_no_weight_of_a_large_model_gets_memory() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=4, hidden_size=8192, intermediate_size=28672).to_dict()
    layout = WeightLayout(make_spec(config=config))
    assert all(parameter.is_meta for parameter in layout.model.parameters())
    sizes = [sum(torch.Size(slot.shape).numel() for slot in layout.slots(stage)) for stage in range(3)]
    assert sum(sizes) == sum(parameter.numel() for parameter in layout.model.parameters()) > 2**31
