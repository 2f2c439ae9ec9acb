"""Training data: files to samples, the same for everybody, and refused where they would not be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pyarrow
import pytest
import torch
from pyarrow import parquet

from swarm.errors import UserError
from swarm.run_spec import DataKind, DataSpec
from swarm.training.data import OwnSource, SampleSource
from swarm.training.data_files import PIECE_BYTES, DocumentFiles
from swarm.training.data_order import WINDOW_CHUNKS, SampleOrder
from swarm.training.manifest import Manifest, build_manifest
from swarm.training.tokenizer_pool import TokenizerPool
from swarm.training.tokenizing import IGNORED, count_samples
from tests.support.models import tiny_tokenizer

T = 64
ROOT = Path(__file__).resolve().parents[2]
PAGES = [topics[name][:2000] for name in sorted(topics)][:32]  # Python's reference manual
CHATS = [
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": f"What is {number} and one?"},
        {"role": "assistant", "content": f"That is {number + 1}, I think."},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "Yes."},
    ][: 3 + 2 * (number % 2)]
    for number in range(40)
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pool():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if messages[0].role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
    with TokenizerPool(2, tokenizer) as pool:
        yield pool


@pytest.fixture
def written(tmp_path):
    """Function: write rows or texts, and return the spec that names the files."""

    def write(kind, parts, field="text", documents_per_chunk=4):
        names = [f"part{number}.{kind}" for number in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            path, rows = tmp_path / name, [{field: content} for content in part]
            if kind is DataKind.TEXT:
                path.write_text("".join(part), encoding="utf-8")
            elif kind is DataKind.JSONL:
                path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
            else:
                parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return DataSpec(kind=kind, files=tuple(names), text_field=field, documents_per_chunk=documents_per_chunk)

    return write


@pytest.fixture
def rows_spec(written):
    return written(DataKind.JSONL, [PAGES[:18], PAGES[18:]])


def open_source(spec, folder, tokenizer, *, seed=7, **options):
    manifest = build_manifest(spec, folder, tokenizer, T)
    fixed = dataclasses.replace(spec, manifest_digest=manifest.digest, num_samples=manifest.num_samples)
    return SampleSource(fixed, manifest, folder, tokenizer, T, seed, **options)


def same(left, right):
    return torch.equal(left.input_ids, right.input_ids) and torch.equal(left.labels, right.labels)


def samples_of(source, first=0):
    """The samples of one pass as a sorted list."""
    batch = source.batch(first, source.num_samples)
    return sorted(zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True))


# Order ------------------------------------------------------------------------------------------------------------------


def test_every_sample_of_a_pass_comes_exactly_once_and_passes_differ():
    sizes = [5, 0, 1, 30, *[7] * 20, 0]
    order = SampleOrder(sizes, seed=3)
    everything = {(chunk, number) for chunk, size in enumerate(sizes) for number in range(size)}
    passes = [[order.locate(order.num_samples * n + at) for at in range(order.num_samples)] for n in range(3)]
    assert order.num_samples == len(everything) == 176
    assert all(len(each) == 176 and set(each) == everything for each in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != [SampleOrder(sizes, seed=4).locate(index) for index in range(176)]


def test_neighbours_come_from_different_chunks_of_a_few():
    order = SampleOrder([16] * 40, seed=1)
    chunks = [order.locate(index)[0] for index in range(order.num_samples)]
    windows = [chunks[start : start + 16 * WINDOW_CHUNKS] for start in range(0, len(chunks), 16 * WINDOW_CHUNKS)]
    assert [len(set(window)) for window in windows] == [WINDOW_CHUNKS] * 5
    assert len(set(chunks[:WINDOW_CHUNKS])) > 3
    assert set(order.coming_chunks(0)) == {*windows[0], *windows[1]}
    last_two = {*windows[4], *(order.locate(order.num_samples + at)[0] for at in range(16 * WINDOW_CHUNKS))}
    assert set(order.coming_chunks(order.num_samples - 1)) == last_two


def test_the_order_is_fixed_for_ever():
    order = SampleOrder([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], seed=11)
    indices = [0, 1, 2, 3, 38, 39, 40, 10**15]
    assert [order.locate(index) for index in indices] == [
        (7, 1),
        (8, 4),
        (8, 2),
        (7, 0),
        (3, 0),
        (7, 3),
        (2, 1),
        (5, 0),
    ]


# Samples ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DataKind.JSONL, DataKind.PARQUET])
def test_samples_are_the_documents_with_an_end_after_each(written, tmp_path, tokenizer, kind):
    spec = written(kind, [PAGES[:5], PAGES[5:8]])
    source = open_source(spec, tmp_path, tokenizer)
    expected = []
    for chunk in (PAGES[:4], PAGES[4:8]):  # the second goes on in the next file
        ids = [token for page in chunk for token in [*tokenizer(page)["input_ids"], tokenizer.eos_token_id]]
        for start in range(0, (len(ids) - 1) // T * T, T):
            expected.append((ids[start : start + T], ids[start + 1 : start + T + 1]))
    assert samples_of(source) == sorted(expected) == samples_of(source, source.num_samples)
    batch = source.batch(0, 3)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.shape == (3, T) and batch.num_loss_tokens == 3 * T


def test_less_than_a_sample_is_padded_and_what_is_left_after_whole_ones_is_dropped(written, tmp_path, tokenizer):
    assert [count_samples(tokens, 8) for tokens in (0, 1, 2, 8, 9, 16, 17)] == [0, 0, 1, 1, 1, 1, 2]
    source = open_source(written(DataKind.TEXT, [["xyz"]]), tmp_path, tokenizer)
    batch = source.batch(5, 2)
    ids = [*tokenizer("xyz")["input_ids"], tokenizer.eos_token_id]
    assert source.num_samples == 1 and batch.num_loss_tokens == 2 * 3
    assert batch.input_ids[1].tolist() == ids[:-1] + [tokenizer.pad_token_id] * (T - 3)
    assert batch.labels[1].tolist() == ids[1:] + [IGNORED] * (T - 3)


def test_a_text_file_is_one_document_however_long(written, tmp_path, tokenizer):
    text = "\n\n".join(PAGES) + "é漢" * (PIECE_BYTES // 2)  # at last, nowhere to cut but between characters
    spec = written(DataKind.TEXT, [[text], ["short\n"]], documents_per_chunk=3)
    files = DocumentFiles(tmp_path, spec.files, spec.kind, spec.text_field)
    pieces = [document for _, document in files.read()]
    assert "".join(piece.content for piece in pieces) == text + "short\n"
    assert [piece.continues for piece in pieces] == [True] * (len(pieces) - 2) + [False, False]
    assert max(len(piece.content.encode()) for piece in pieces) <= PIECE_BYTES
    for place, document in files.read():
        assert next(files.read(place)) == (place, document), "reading may begin anywhere"
    manifest = build_manifest(spec, tmp_path, tokenizer, T)
    documents = [manifest.read_chunk(files, number) for number in range(len(manifest.chunks))]
    assert [document for chunk in documents for document in chunk] == pieces
    ends = samples_of(open_source(spec, tmp_path, tokenizer))
    assert sum(labels.count(tokenizer.eos_token_id) for _, labels in ends) <= 2


def test_samples_do_not_depend_on_what_was_read_before(rows_spec, tmp_path, tokenizer):
    whole = open_source(rows_spec, tmp_path, tokenizer)
    first = whole.batch(0, 2 * whole.num_samples)
    other = open_source(rows_spec, tmp_path, tokenizer, cache_chunks=1)
    for index in (whole.num_samples + 3, 100, 0, 57, 100):
        alone = other.batch(index, 1)
        assert torch.equal(alone.input_ids[0], first.input_ids[index])
        assert torch.equal(alone.labels[0], first.labels[index])
    assert not same(open_source(rows_spec, tmp_path, tokenizer, seed=8).batch(0, 8), whole.batch(0, 8))


def test_worker_processes_make_the_same_samples(rows_spec, tmp_path, tokenizer, pool):
    here = open_source(rows_spec, tmp_path, tokenizer)
    there = open_source(rows_spec, tmp_path, tokenizer, pool=pool)
    assert all(same(here.batch(first, 16), there.batch(first, 16)) for first in (0, 16, 300, here.num_samples - 8))
    assert {psutil.Process(pid).ppid() for pid in pool.pids} == {os.getpid()} and len(pool.pids) == 2
    assert build_manifest(rows_spec, tmp_path, tokenizer, T, num_workers=1) == build_manifest(
        rows_spec, tmp_path, tokenizer, T
    )


def test_workers_tokenize_ahead_what_comes_next(rows_spec, tmp_path, tokenizer, pool):
    source = open_source(rows_spec, tmp_path, tokenizer, pool=pool)
    source.batch(0, 1)
    assert len(source._tokens) == len(PAGES) // 4  # a window of chunks is all there is
    for tokens in source._tokens.values():
        tokens.result()
    for name in rows_spec.files:
        (tmp_path / name).unlink()
    source.batch(0, source.num_samples)


# Chats ------------------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "the tokenizer's": None,
    "marked": "{% for m in messages %}<bos>{{ m.role }}\n{% if m.role == 'assistant' %}{%- generation %} {{ m.content }}<eos>"
    "{% endgeneration -%}\n\n{% else %}{{ m.content }}<eos>\n{% endif %}{% endfor %}",
    "no special tokens": "{% for m in messages %}### {{ m.role | upper }}:\n{{ m.content | trim }}\n\n{% endfor %}",
    "turns in pairs": "{% for m in messages %}{% if m.role == 'user' %}{{ '<bos>[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' <eos>' }}{% endif %}{% endfor %}",
    "last turn differs": "{% for m in messages %}<bos>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<eos>\n{% endfor %}",
    "refuses half a chat": "{% if messages[-1].role == 'assistant' and messages|length == 3 and 'sure' in messages[1].content %}"
    "{{ raise_exception('no') }}{% endif %}{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}",
}


@pytest.mark.parametrize("kind", [DataKind.JSONL, DataKind.PARQUET])
@pytest.mark.parametrize("template", TEMPLATES)
def test_only_the_assistants_words_are_learned(written, tmp_path, kind, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    spec = written(kind, [CHATS[:4]], "messages")
    source = SampleSource(spec, build_manifest(spec, tmp_path, tokenizer, 2048), tmp_path, tokenizer, 2048, seed=0)
    said = "".join(message["content"] for chat in CHATS[:4] for message in chat if message["role"] == "assistant")
    batch = source.batch(0, 1)
    text = tokenizer.decode([token for token in batch.labels[0].tolist() if token != IGNORED])
    assert "".join(text.replace("<eos>", "").split()) == "".join(said.split())
    assert text.count("<eos>") == (4 if "special" in template else 6), "the assistant learns to stop"
    assert source.num_samples == 1


def test_samples_may_have_unequal_numbers_of_labels(written, tmp_path, tokenizer):
    source = open_source(written(DataKind.JSONL, [CHATS], "messages"), tmp_path, tokenizer)
    counts = [source.batch(index, 1).num_loss_tokens for index in range(source.num_samples)]
    assert len(set(counts)) > 3 and source.batch(0, source.num_samples).num_loss_tokens == sum(counts) > 0


def test_a_template_that_writes_the_date_renders_the_same_every_day(written, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "Today is {{ strftime_now('%d %B %Y') }}.<eos>" + tokenizer.chat_template
    source = open_source(written(DataKind.JSONL, [CHATS[:1]], "messages"), tmp_path, tokenizer)
    texts = tokenizer.batch_decode(source.batch(0, source.num_samples).input_ids)
    assert any("Today is 01 January 2025.<eos>" in text for text in texts)


# What is refused --------------------------------------------------------------------------------------------------------


def test_a_changed_text_is_refused_by_name(rows_spec, tmp_path, tokenizer):
    manifest = build_manifest(rows_spec, tmp_path, tokenizer, T)
    path = tmp_path / "part1.jsonl"
    original = path.read_bytes()

    def read_all():
        source = SampleSource(rows_spec, manifest, tmp_path, tokenizer, T, 0)
        source.batch(0, source.num_samples)

    read_all()
    path.write_bytes(original.replace(b" the ", b" teh ", 1))
    with pytest.raises(UserError, match=r"part0\.jsonl or .*part1\.jsonl has changed .*copy the original files again"):
        read_all()
    path.write_bytes(original + b'{"text": "more"}\n')
    with pytest.raises(UserError, match=rf"part1\.jsonl has {len(original) + 17} bytes, and had {len(original)}"):
        read_all()
    path.unlink()
    with pytest.raises(UserError, match=r"part1\.jsonl is not there: copy the file"):
        read_all()


def test_another_tokenizer_is_refused(rows_spec, tmp_path, tokenizer):
    manifest = build_manifest(rows_spec, tmp_path, tokenizer, T)
    other = tiny_tokenizer()
    other.add_tokens(["e", "a"])
    source = SampleSource(rows_spec, manifest, tmp_path, other, T, 0)
    with pytest.raises(UserError, match="the tokenizer is another one"):
        source.batch(0, source.num_samples)


def test_a_manifest_comes_back_as_it_was_built_and_no_other_passes_for_it(rows_spec, tmp_path, tokenizer):
    manifest = build_manifest(rows_spec, tmp_path, tokenizer, T)
    raw = manifest.to_bytes()
    assert Manifest.from_bytes(raw, manifest.digest) == manifest
    assert manifest.digest == hashlib.sha256(raw).digest()[:16]
    other = build_manifest(rows_spec, tmp_path, tokenizer, T + 1)
    with pytest.raises(UserError, match=f"{manifest.digest.hex()}.*{other.digest.hex()}"):
        Manifest.from_bytes(raw, other.digest)
    fixed = dataclasses.replace(rows_spec, manifest_digest=manifest.digest)
    with pytest.raises(UserError, match=f"{other.digest.hex()}.*{manifest.digest.hex()}"):
        SampleSource(fixed, other, tmp_path, tokenizer, T + 1, 0)
    with pytest.raises(UserError, match="sequence_length is not the run's"):
        SampleSource(rows_spec, other, tmp_path, tokenizer, T, 0)


GOOD = {
    "chunks": [[0, 0, 0, 1, "00" * 16, 1]],
    "documents_per_chunk": 4,
    "files": [["a.txt", 3]],
    "format": 1,
    "kind": "text",
    "sequence_length": 8,
    "text_field": "text",
}
MALFORMED = [
    b"",
    b"\xff",
    b"[" * 10**5,
    b"null",
    json.dumps(GOOD).encode(),
    *(
        json.dumps({**GOOD, **change}, sort_keys=True, separators=(",", ":")).encode()
        for change in (
            {"format": 2},
            {"more": 1},
            {"kind": "own"},
            {"kind": ["text"]},
            {"files": []},
            {"files": [["../a.txt", 3]]},
            {"files": [["a.txt", "x" * 10**6]]},
            {"files": [["a.txt", 3]] * 1001},
            {"sequence_length": True},
            {"documents_per_chunk": 0},
            {"text_field": None},
            {"chunks": {}},
            {"chunks": [[]]},
            *({"chunks": [[*GOOD["chunks"][0][:at], value, *GOOD["chunks"][0][at + 1 :]]]}
              for at, value in ((0, 1), (1, -1), (2, 2**60), (3, 5), (4, "zz" * 16), (4, 7), (5, 2**40), (5, 1.0))),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("raw", MALFORMED, ids=lambda raw: raw[:60].decode(errors="replace"))
def test_malformed_manifests_are_refused(raw):
    with pytest.raises(UserError, match=r"the manifest is (malformed|not in canonical form)") as caught:
        Manifest.from_bytes(raw, hashlib.sha256(raw).digest()[:16])
    assert len(str(caught.value)) < 400


BAD_FILES = {
    "empty text": ("text", b"", r"part0.text is empty: remove it"),
    "not UTF-8": ("text", b"0123456789\xff123", r"part0.text is not UTF-8 at byte 10: convert it"),
    "not UTF-8, further on": ("text", b"word " * PIECE_BYTES + b"\xe9t\xe9", rf"UTF-8 at byte {5 * PIECE_BYTES}:"),
    "a byte order mark alone": ("text", b"\xef\xbb\xbf", r"part0.text is empty"),
    "no row": ("jsonl", b"\n \n", r"part0.jsonl is empty"),
    "not JSON": ("jsonl", b'{"text": "a b"}\n{"text": ', r"part0.jsonl, line 2 is not JSON"),
    "nested": ("jsonl", b"[" * 10**5, r"line 1 is not JSON"),
    "row not UTF-8": ("jsonl", b'{"text": "a b"}\n{"text": "\xff"}', r"part0.jsonl is not UTF-8 at byte 26"),
    "no field": ("jsonl", b'{"text": "a b"}\n\n{"txt": "a"}', r"part0.jsonl, line 3 has no field 'text'"),
    "no object": ("jsonl", b"7", r"line 1 has no field 'text'"),
    "no text": ("jsonl", b'{"text": [1]}', r"line 1: 'text' is list, not text"),
    "half a character": ("jsonl", b'{"text": "\\ud800"}', r"line 1 cannot be used"),
    "nothing in it": ("jsonl", b'{"text": ""}', r"there is nothing to learn from in .*: need texts"),
    "no chat": ("jsonl", b'{"messages": ["Hello"]}', r"line 1: 'messages' is no chat"),
    "a role is missing": ("jsonl", b'{"messages": [{"content": "Hello"}]}', r"line 1: 'messages' is no chat"),
    "no assistant": ("jsonl", b'{"messages": [{"role": "user", "content": "Hello"}]}', r"nothing to learn from"),
    "no Parquet": ("parquet", b"PAR1 nonsense", r"part0.parquet is damaged, or no Parquet file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_with_their_place(tmp_path, tokenizer, case):
    kind, content, message = BAD_FILES[case]
    (tmp_path / f"part0.{kind}").write_bytes(content)
    field = "messages" if b"messages" in content else "text"
    spec = DataSpec(kind=DataKind(kind), files=(f"part0.{kind}",), text_field=field)
    with pytest.raises(UserError, match=message):
        build_manifest(spec, tmp_path, tokenizer, T)


def test_parquet_without_the_field_or_a_value_is_refused(written, tmp_path, tokenizer, monkeypatch):
    spec = written(DataKind.PARQUET, [["one text", *["another"] * 9, None]])
    with pytest.raises(UserError, match=r"part0\.parquet, row 10 has no field 'text'"):
        build_manifest(spec, tmp_path, tokenizer, T)
    with pytest.raises(UserError, match=r"part0\.parquet has no field 'body': set text_field to one of 'text'"):
        build_manifest(dataclasses.replace(spec, text_field="body"), tmp_path, tokenizer, T)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'shardswarm\[train\]'"):
        build_manifest(spec, tmp_path, tokenizer, T)


def test_tokenizers_that_cannot_do_it_are_refused(written, tmp_path):
    spec = written(DataKind.JSONL, [CHATS[:1]], "messages")
    tokenizer = tiny_tokenizer()
    for template, message in ((None, "no chat template"), ("{{ raise_exception('never') }}", r"line 1: .*never")):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=message):
            build_manifest(spec, tmp_path, tokenizer, T)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        build_manifest(spec, tmp_path, tokenizer, T)


# A trainer's own text ---------------------------------------------------------------------------------------------------


def test_an_index_of_own_text_gives_the_same_sample_again(tmp_path, tokenizer):
    (tmp_path / "notes").mkdir()
    for number, page in enumerate(PAGES[:10]):
        (tmp_path / "notes" / f"{number:02}.md").write_text(page)
    source = OwnSource(tmp_path, tokenizer, T, seed=5)
    batch = source.batch(10**9, 8)
    source.batch(0, 50)
    assert same(batch, source.batch(10**9, 8)) and same(
        batch, OwnSource(tmp_path, tokenizer, T, seed=5).batch(10**9, 8)
    )
    assert same(batch, OwnSource(iter(PAGES[:10]), tokenizer, T, seed=5).batch(10**9, 8))
    assert not same(batch, OwnSource(tmp_path, tokenizer, T, seed=6).batch(10**9, 8))


def test_own_chats_are_learned_as_a_runs_are(written, tmp_path, tokenizer):
    spec = written(DataKind.JSONL, [CHATS], "messages", documents_per_chunk=256)
    source = open_source(spec, tmp_path, tokenizer, seed=5)
    assert same(source.batch(0, 20), OwnSource(CHATS, tokenizer, T, seed=5).batch(0, 20))
    assert same(
        source.batch(0, 20), OwnSource(tmp_path / "part0.jsonl", tokenizer, T, 5, text_field="messages").batch(0, 20)
    )


def test_own_text_that_cannot_be_used_is_refused(tmp_path, tokenizer):
    for documents, message in (
        ([], "nothing to learn"),
        ([""], "nothing to learn"),
        ([["x"]], "document 0: .*no chat"),
    ):
        with pytest.raises(UserError, match=message):
            OwnSource(documents, tokenizer, T, 0)
    with pytest.raises(UserError, match="is not there"):
        OwnSource(tmp_path / "absent", tokenizer, T, 0)
    with pytest.raises(UserError, match=r"holds no files: need files of one kind, with names that end in \.txt"):
        OwnSource(tmp_path, tokenizer, T, 0)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match="holds jsonl and text files"):
        OwnSource(tmp_path, tokenizer, T, 0)


# Worker processes -------------------------------------------------------------------------------------------------------


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from swarm.training.tokenizer_pool import TokenizerPool\n"
        "if __name__ == '__main__':\n"
        "    with TokenizerPool(2, None) as pool:\n"
        "        print(*pool.pids, flush=True)\n"
        "        sys.stdin.read()\n"
    )
    command = [sys.executable, str(script)]
    parent = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_alive, pids))
        parent.kill()
    wait_for(lambda: not any(map(is_alive, pids)))


def test_a_lost_worker_is_told_and_a_closed_pool_leaves_nobody(tokenizer):
    with TokenizerPool(1, tokenizer) as pool:
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UserError, match="start again with fewer tokenizing workers"):
            OwnSource(PAGES[:2], tokenizer, T, 0, pool=pool)
    with TokenizerPool(2, tokenizer) as pool:
        pids = pool.pids
    assert len(pids) == 2 and not any(map(is_alive, pids))


def test_errors_of_workers_name_the_document(tokenizer, pool):
    with pytest.raises(UserError, match=r"document 1: the chat template refuses it \(who\?\)"):
        OwnSource(["text", [{"role": "nobody", "content": "Hello"}]], tokenizer, T, 0, pool=pool)
