"""Samples by index, from a run's data or from a trainer's own. Files and order only: knows no leases, epochs or peers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swarm.errors import UserError
from swarm.run_spec import DataKind, DataSpec
from swarm.training.data_document import Chat, Document
from swarm.training.data_files import DocumentFiles, Place, check_chat
from swarm.training.data_order import WINDOW_CHUNKS, SampleOrder
from swarm.training.manifest import Manifest, build_manifest_with, tokenize_chunks
from swarm.training.tokenizer_pool import TokenizerPool, Tokenizing, TokenizingHere
from swarm.training.tokenizing import IGNORED, Tokens, pad_id

if TYPE_CHECKING:
    from torch import Tensor

CACHE_CHUNKS = 2 * WINDOW_CHUNKS
"""A window and the next one: about 80 MB of tokens at most, if documents are short."""
_OWN_DOCUMENTS_PER_CHUNK = 256
_KIND_OF_SUFFIX = {
    ".txt": DataKind.TEXT,
    ".md": DataKind.TEXT,
    ".jsonl": DataKind.JSONL,
    ".parquet": DataKind.PARQUET,
}


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some samples of T tokens."""

    input_ids: Tensor
    """int64 [count, T]"""
    labels: Tensor
    """int64 [count, T]; labels[:, t] is the token after input_ids[:, t], or IGNORED. Not to be shifted again."""

    @property
    def num_loss_tokens(self) -> int:
        """How many labels are learned; may be 0."""
        return int((self.labels != IGNORED).sum())


class Samples:
    """Samples by index, made from chunks of documents. Any thread may use it; one batch is made at a time."""

    def __init__(
        self,
        chunks: _Chunks,
        tokenizer: Any,
        sequence_length: int,
        seed: int,
        cache_chunks: int,
        pool: TokenizerPool | None,
    ) -> None:
        if sequence_length < 2 or cache_chunks < 1:
            raise ValueError(f"need sequence_length >= 2 and cache_chunks >= 1, got {sequence_length}, {cache_chunks}")
        self.sequence_length = sequence_length
        self._chunks = chunks
        self._order = SampleOrder(chunks.num_samples, seed)
        self._pad_id = pad_id(tokenizer)
        self._tokenizing: Tokenizing = pool or TokenizingHere(tokenizer)
        self._cache_chunks = cache_chunks
        self._tokens: OrderedDict[int, Future[Tokens]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_samples(self) -> int:
        """Of one pass over the data."""
        return self._order.num_samples

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first+count-1, for any first >= 0: after one pass over the data comes the next, in another order.

        Reads and tokenises what is not kept. Raises UserError if a file has changed or a tokenizing process was lost.
        """
        import torch

        if first < 0 or count < 1:
            raise ValueError(f"need first >= 0 and count >= 1, got {first}, {count}")
        with self._lock:
            places = [self._order.locate(index) for index in range(first, first + count)]
            needed = {chunk: self._request(chunk) for chunk in dict.fromkeys(chunk for chunk, _ in places)}
            if self._tokenizing.num_workers and self._cache_chunks >= WINDOW_CHUNKS:
                for chunk in islice(self._order.coming_chunks(first + count - 1), self._cache_chunks):
                    self._request(chunk)
            tokens = {chunk: self._result(chunk, future) for chunk, future in needed.items()}
        rows = [tokens[chunk].sample(number, self.sequence_length, self._pad_id) for chunk, number in places]
        input_ids, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return Batch(input_ids, labels)

    def _request(self, chunk: int) -> Future[Tokens]:
        """Tokens of a chunk that are kept, or will be; the chunk becomes the last to go."""
        future = self._tokens.get(chunk)
        if future is None:
            future = self._tokens[chunk] = self._tokenizing.submit(partial(self._chunks.load, chunk))
        self._tokens.move_to_end(chunk)
        while len(self._tokens) > self._cache_chunks:
            self._tokens.popitem(last=False)
        return future

    def _result(self, chunk: int, future: Future[Tokens]) -> Tokens:
        try:
            tokens = future.result()
        except BaseException:
            self._tokens.pop(chunk, None)  # the next try may succeed
            raise
        expected = self._chunks.num_samples[chunk]
        if (found := tokens.num_samples(self.sequence_length)) != expected:
            raise UserError(
                f"a part of the data makes {found} samples here and {expected} where the run was created: "
                f"the tokenizer is another one; use the run's, and the same version of the tokenizers package"
            )
        return tokens


class SampleSource(Samples):
    """The samples of a run's data: the same on every machine that has the files, the tokenizer and the seed."""

    def __init__(
        self,
        spec: DataSpec,
        manifest: Manifest,
        folder: Path,
        tokenizer: Any,
        sequence_length: int,
        seed: int,
        cache_chunks: int = CACHE_CHUNKS,
        *,
        pool: TokenizerPool | None = None,
    ) -> None:
        """folder: holds spec's files. tokenizer: a transformers tokenizer, the run's; pool: with the same, to tokenise ahead.

        cache_chunks: how many tokenised chunks are kept; does not change the samples.
        Raises UserError if a file is not there, or has another size, or the manifest is not the spec's.
        """
        _check_manifest(manifest, spec, sequence_length)
        super().__init__(_chunks_of_files(manifest, folder), tokenizer, sequence_length, seed, cache_chunks, pool)


class OwnSource(Samples):
    """Samples of a trainer's own text. An index gives the same sample whenever it is asked for, also after a restart."""

    def __init__(
        self,
        source: Path | Iterable[str | Chat],
        tokenizer: Any,
        sequence_length: int,
        seed: int,
        cache_chunks: int = CACHE_CHUNKS,
        *,
        text_field: str = "text",
        pool: TokenizerPool | None = None,
    ) -> None:
        """source: a file, or a folder with files of one kind (.txt and .md, .jsonl or .parquet), of which only what is needed
        is in memory; or texts and chats, kept in memory. text_field: of jsonl and parquet rows, as in DataSpec.

        Tokenises everything once, to count the samples. Raises UserError for what cannot be used.
        """
        tokenizing = pool or TokenizingHere(tokenizer)
        if isinstance(source, str):
            raise ValueError(f"give a Path, or several texts, not one of type str: {source[:40]!r}")
        if isinstance(source, Path):
            spec, folder = _spec_of(source, text_field)
            chunks = _chunks_of_files(build_manifest_with(tokenizing, spec, folder, sequence_length), folder)
        else:
            chunks = _chunks_in_memory(tokenizing, source, sequence_length)
        super().__init__(chunks, tokenizer, sequence_length, seed, cache_chunks, pool)


@dataclass(frozen=True, slots=True)
class _Chunks:
    num_samples: Sequence[int]
    """Of each chunk."""
    load: Callable[[int], Sequence[Document]]
    """The documents of a chunk; may raise UserError."""


def _check_manifest(manifest: Manifest, spec: DataSpec, sequence_length: int) -> None:
    if spec.manifest_digest and manifest.digest != spec.manifest_digest:
        raise UserError(
            f"the manifest has digest {manifest.digest.hex()}, and the run wants {spec.manifest_digest.hex()}: "
            f"get the run's own manifest"
        )
    for name, theirs, ours in (
        ("kind", manifest.kind, spec.kind),
        ("files", tuple(path for path, _ in manifest.files), spec.files),
        ("text_field", manifest.text_field, spec.text_field),
        ("documents_per_chunk", manifest.documents_per_chunk, spec.documents_per_chunk),
        ("sequence_length", manifest.sequence_length, sequence_length),
        ("num_samples", manifest.num_samples, spec.num_samples or manifest.num_samples),
    ):
        if theirs != ours:
            raise UserError(f"the manifest's {name} is not the run's: whoever created the run must build it again")
    if not manifest.num_samples:
        raise UserError("the manifest has no samples: whoever created the run must build it again")


def _chunks_of_files(manifest: Manifest, folder: Path) -> _Chunks:
    files = DocumentFiles(folder, [file for file, _ in manifest.files], manifest.kind, manifest.text_field)
    for path, (_, num_bytes) in zip(files.paths, manifest.files, strict=True):
        if (found := path.stat().st_size) != num_bytes:
            raise UserError(
                f"{path} has {found} bytes, and had {num_bytes} when the run was created: copy the original file again"
            )
    return _Chunks([chunk.num_samples for chunk in manifest.chunks], lambda number: manifest.read_chunk(files, number))


def _chunks_in_memory(tokenizing: Tokenizing, contents: Iterable[str | Chat], sequence_length: int) -> _Chunks:
    chunks, num_samples, learns_something = [], [], False
    for _, chunk, tokens in tokenize_chunks(tokenizing, _numbered(contents), _OWN_DOCUMENTS_PER_CHUNK):
        chunks.append(chunk)
        num_samples.append(tokens.num_samples(sequence_length))
        learns_something |= tokens.has_loss
    if not learns_something:
        raise UserError("there is nothing to learn from: give texts of more than a token, or chats with an assistant")
    return _Chunks(num_samples, chunks.__getitem__)


def _numbered(contents: Iterable[str | Chat]) -> Iterator[tuple[Place, Document]]:
    for number, content in enumerate(contents):
        where = f"document {number}"
        yield (
            Place(0, number),
            Document(content if isinstance(content, str) else check_chat(content, where), where),
        )


def _spec_of(path: Path, text_field: str) -> tuple[DataSpec, Path]:
    """A file's or a folder's data, in the order of paths, and the folder below which the files are."""
    if not path.exists():
        raise UserError(f"{path} is not there: name a file or folder with text")
    folder = path if path.is_dir() else path.parent
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in _KIND_OF_SUFFIX and file.is_file()]
    kinds = {_KIND_OF_SUFFIX[file.suffix] for file in files}
    if len(kinds) != 1:
        raise UserError(
            f"{path} holds {' and '.join(sorted(kinds)) or 'no'} files: need files of one kind, "
            f"with names that end in {', '.join(_KIND_OF_SUFFIX)}"
        )
    try:
        spec = DataSpec(
            kind=kinds.pop(),
            files=tuple(file.relative_to(folder).as_posix() for file in files),
            text_field=text_field,
            documents_per_chunk=_OWN_DOCUMENTS_PER_CHUNK,
        )
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    return spec, folder
