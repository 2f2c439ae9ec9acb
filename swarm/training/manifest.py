"""Manifest: the list of all chunks of a run's data, by which every trainer sees the same samples.

A chunk is some consecutive documents, tokenised and cut into samples by itself, so that a sample can be made without the
documents before its chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from swarm.errors import UserError
from swarm.model_spec import DIGEST_BYTES
from swarm.run_spec import DataKind, DataSpec
from swarm.training.data_document import Document, digest_documents
from swarm.training.data_files import MAX_DOCUMENT_BYTES, DocumentFiles, Place
from swarm.training.tokenizer_pool import TokenizerPool, Tokenizing, TokenizingHere
from swarm.training.tokenizing import Tokens
from swarm.value_checks import check_whole, is_path_below, require

MAX_MANIFEST_BYTES = 64 * 2**20
# A chunk ends with the document that brings it to so many bytes of text.
CHUNK_BYTES = 2**20
MAX_SAMPLES_PER_CHUNK = 2**21
_MAX_DOCUMENTS_PER_CHUNK = 2**20
_MAX_FILES = 1000
_MAX_WHOLE = 2**48
_FORMAT = 1
_KEYS = {"format", "kind", "text_field", "documents_per_chunk", "sequence_length", "files", "chunks"}


@dataclass(frozen=True, slots=True)
class ManifestChunk:
    """Some consecutive documents; they may go on in the next file."""

    start: Place
    num_documents: int
    digest: bytes
    """16 bytes, of the documents."""
    num_samples: int
    """May be 0."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All chunks, in the order of the files."""

    kind: DataKind
    text_field: str
    documents_per_chunk: int
    sequence_length: int
    files: tuple[tuple[str, int], ...]
    """Path below the folder, bytes."""
    chunks: tuple[ManifestChunk, ...]

    @property
    def num_samples(self) -> int:
        return sum(chunk.num_samples for chunk in self.chunks)

    @property
    def digest(self) -> bytes:
        """16 bytes."""
        return _digest(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The manifest in its one canonical form: JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "kind": self.kind,
                "text_field": self.text_field,
                "documents_per_chunk": self.documents_per_chunk,
                "sequence_length": self.sequence_length,
                "files": self.files,
                "chunks": [
                    [
                        *(chunk.start.file, chunk.start.document, chunk.start.byte_offset, chunk.num_documents),
                        *(chunk.digest.hex(), chunk.num_samples),
                    ]
                    for chunk in self.chunks
                ],
            },
            sort_keys=True,
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_bytes(cls, raw: bytes, expected_digest: bytes) -> Manifest:
        """The manifest in raw, which may come from a stranger. UserError for another one, or a malformed one."""
        if len(raw) > MAX_MANIFEST_BYTES:
            raise UserError(
                f"a manifest has {len(raw)} bytes, at most {MAX_MANIFEST_BYTES} are read: use larger chunks"
            )
        if (digest := _digest(raw)) != expected_digest:
            raise UserError(
                f"the manifest has digest {digest.hex()}, and the run wants {expected_digest.hex()}: "
                f"get the run's own manifest, or build it again from unchanged files"
            )
        try:
            manifest = _from_json(json.loads(raw))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"the manifest is malformed ({str(error)[:200]}): whoever created the run must build it again"
            ) from error
        if manifest.to_bytes() != raw:
            raise UserError("the manifest is not in canonical form: whoever created the run must build it again")
        return manifest

    def read_chunk(self, files: DocumentFiles, number: int) -> list[Document]:
        """The documents of a chunk. UserError if they are not those from which the manifest was built."""
        chunk = self.chunks[number]
        documents, num_bytes, paths = [], 0, {files.paths[chunk.start.file]: None}
        for place, document in islice(files.read(chunk.start), chunk.num_documents):
            documents.append(document)
            paths[files.paths[place.file]] = None
            num_bytes += len(document.to_bytes())
            if num_bytes > CHUNK_BYTES + MAX_DOCUMENT_BYTES:
                break
        if digest_documents(documents) != chunk.digest:
            raise UserError(
                f"{' or '.join(map(str, paths))} has changed since the run was created (in the {chunk.num_documents} "
                f"documents from number {chunk.start.document} on): copy the original files again"
            )
        return documents


def build_manifest(
    spec: DataSpec, folder: Path, tokenizer: Any, sequence_length: int, num_workers: int = 0
) -> Manifest:
    """The manifest of spec's files below folder; reads and tokenises all of them.

    Of spec its kind, files, text_field and documents_per_chunk are used. tokenizer: a transformers tokenizer, the run's.
    num_workers: processes to tokenise in; 0: this one. Raises UserError for files that cannot be used.
    """
    if not num_workers:
        return build_manifest_with(TokenizingHere(tokenizer), spec, folder, sequence_length)
    with TokenizerPool(num_workers, tokenizer) as pool:
        return build_manifest_with(pool, spec, folder, sequence_length)


def build_manifest_with(tokenizing: Tokenizing, spec: DataSpec, folder: Path, sequence_length: int) -> Manifest:
    """As build_manifest, with a pool that is open already."""
    files = DocumentFiles(folder, spec.files, spec.kind, spec.text_field)
    chunks, learns_something = [], False
    for start, documents, tokens in tokenize_chunks(tokenizing, files.read(), spec.documents_per_chunk):
        num_samples = tokens.num_samples(sequence_length)
        if num_samples > MAX_SAMPLES_PER_CHUNK:
            raise UserError(
                f"{documents[0].where}: the chunk that begins here makes {num_samples} samples, at most "
                f"{MAX_SAMPLES_PER_CHUNK} are possible: make sequence_length longer than {sequence_length}"
            )
        learns_something |= tokens.has_loss
        chunks.append(ManifestChunk(start, len(documents), digest_documents(documents), num_samples))
    if not learns_something:
        raise UserError(
            f"there is nothing to learn from in {folder}: need texts of more than a token, or chats in which the assistant speaks"
        )
    sizes = (path.stat().st_size for path in files.paths)
    manifest = Manifest(
        kind=spec.kind,
        text_field=spec.text_field,
        documents_per_chunk=spec.documents_per_chunk,
        sequence_length=sequence_length,
        files=tuple(zip(files.files, sizes, strict=True)),
        chunks=tuple(chunks),
    )
    if (num_bytes := len(manifest.to_bytes())) > MAX_MANIFEST_BYTES:
        raise UserError(
            f"the manifest would have {num_bytes} bytes, at most {MAX_MANIFEST_BYTES} are allowed: make documents_per_chunk larger"
        )
    return manifest


def tokenize_chunks(
    tokenizing: Tokenizing, documents: Iterable[tuple[Place, Document]], documents_per_chunk: int
) -> Iterator[tuple[Place, list[Document], Tokens]]:
    """Documents grouped into chunks, each with the place of its first document and its tokens."""
    pending: deque[tuple[Place, list[Document], Future[Tokens]]] = deque()
    for start, chunk in _group(documents, documents_per_chunk):
        pending.append((start, chunk, tokenizing.submit(partial(list, chunk))))
        if len(pending) > 2 * tokenizing.num_workers:
            yield _finished(*pending.popleft())
    while pending:
        yield _finished(*pending.popleft())


def _group(
    documents: Iterable[tuple[Place, Document]], documents_per_chunk: int
) -> Iterator[tuple[Place, list[Document]]]:
    start, chunk, num_bytes = Place(), list[Document](), 0
    for place, document in documents:
        if not chunk:
            start, num_bytes = place, 0
        chunk.append(document)
        num_bytes += len(document.to_bytes())
        if len(chunk) == documents_per_chunk or num_bytes >= CHUNK_BYTES:
            yield start, chunk
            chunk = []
    if chunk:
        yield start, chunk


def _finished(start: Place, documents: list[Document], tokens: Future[Tokens]) -> tuple[Place, list[Document], Tokens]:
    return start, documents, tokens.result()


def _from_json(given: object) -> Manifest:
    """ValueError for anything that to_bytes does not make."""
    require(isinstance(given, dict) and given.keys() == _KEYS, f"it must be an object of {', '.join(sorted(_KEYS))}")
    assert isinstance(given, dict)
    require(given["format"] == _FORMAT, f"its format is not {_FORMAT}, the only one that this version knows")
    kind = DataKind(given["kind"])
    require(kind is not DataKind.OWN, "data of kind own has none")
    require(isinstance(given["text_field"], str), "text_field must be text")
    files = given["files"]
    require(
        isinstance(files, list)
        and 0 < len(files) <= _MAX_FILES
        and all(isinstance(entry, list) and len(entry) == 2 and is_path_below(entry[0]) for entry in files),
        f"files must be 1 to {_MAX_FILES} pairs of a path below the folder and bytes",
    )
    for _, num_bytes in files:
        check_whole("bytes of a file", num_bytes, 0, _MAX_WHOLE)
    check_whole("documents_per_chunk", given["documents_per_chunk"], 1, _MAX_DOCUMENTS_PER_CHUNK)
    check_whole("sequence_length", given["sequence_length"], 2, _MAX_WHOLE)
    require(isinstance(given["chunks"], list) and bool(given["chunks"]), "chunks must be a list that is not empty")
    return Manifest(
        kind=kind,
        text_field=given["text_field"],
        documents_per_chunk=given["documents_per_chunk"],
        sequence_length=given["sequence_length"],
        files=tuple((path, num_bytes) for path, num_bytes in files),
        chunks=tuple(_chunk(entry, len(files), given["documents_per_chunk"]) for entry in given["chunks"]),
    )


def _chunk(entry: object, num_files: int, documents_per_chunk: int) -> ManifestChunk:
    require(isinstance(entry, list) and len(entry) == 6, "a chunk must be a list of 6")
    assert isinstance(entry, list)
    file, document, byte_offset, num_documents, digest, num_samples = entry
    require(isinstance(digest, str) and len(digest) == 2 * DIGEST_BYTES, f"a digest must have {DIGEST_BYTES} bytes")
    check_whole("file", file, 0, num_files - 1)
    check_whole("document", document, 0, _MAX_WHOLE)
    check_whole("byte_offset", byte_offset, 0, _MAX_WHOLE)
    check_whole("num_documents", num_documents, 1, documents_per_chunk)
    check_whole("num_samples", num_samples, 0, MAX_SAMPLES_PER_CHUNK)
    return ManifestChunk(Place(file, document, byte_offset), num_documents, bytes.fromhex(digest), num_samples)


def _digest(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:DIGEST_BYTES]
