"""Documents in local files: text, JSON lines, Parquet. Reading begins at any document, without those before it.

Parquet is read with pyarrow rather than with streams of `datasets`: those leave threads behind when a stream is not read to its
end (as it never is here), which aborted the process in one of four runs with datasets 5.2; and they cannot seek.
JSON lines are parsed one by one, so that a row does not depend on what a library infers from its neighbours.
"""

from __future__ import annotations

import codecs
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.errors import UserError
from swarm.run_spec import DataKind
from swarm.training.data_document import Chat, Document

CHAT_FIELD = "messages"
MAX_DOCUMENT_BYTES = 16 * 2**20
# A text file is one document, read in pieces of at most so many bytes. Manifests depend on it.
PIECE_BYTES = 64 * 1024
_ROWS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document begins."""

    file: int = 0
    """Index in the list of files."""
    document: int = 0
    """Line (JSON lines), row (Parquet) or piece (text) of that file, from 0."""
    byte_offset: int = 0
    """Of the line or piece; 0 for Parquet."""


class DocumentFiles:
    """The documents of some files, in order."""

    def __init__(self, folder: Path, files: Sequence[str], kind: DataKind, text_field: str) -> None:
        """files: paths below the folder. Raises UserError if one is missing."""
        if not files:
            raise UserError("there are no files to read: name at least one")
        self.files = tuple(files)
        self.paths = tuple(folder / file for file in files)
        self.kind = kind
        self._text_field = text_field
        for path in self.paths:
            if not path.is_file():
                raise UserError(f"{path} is not there: copy the file to this place, or name another folder")

    def read(self, start: Place = Place()) -> Iterator[tuple[Place, Document]]:
        """All documents from start on, each with its place. Raises UserError, naming file and line, for what cannot be used."""
        for file in range(start.file, len(self.files)):
            begin = start if file == start.file else Place(file)
            has_documents = begin != Place(file)
            try:
                for place, document in self._read_file(begin):
                    yield place, document
                    has_documents = True
            except OSError as error:
                raise UserError(f"cannot read {self.paths[file]} ({error}): copy it again") from error
            if not has_documents:
                raise UserError(f"{self.paths[file]} is empty: remove it from the files")

    def _read_file(self, start: Place) -> Iterator[tuple[Place, Document]]:
        match self.kind:
            case DataKind.TEXT:
                return self._read_pieces(start)
            case DataKind.JSONL:
                return self._read_lines(start)
            case DataKind.PARQUET:
                return self._read_rows(start)
            case DataKind.OWN:
                raise ValueError("data of kind own has no files")

    def _read_pieces(self, start: Place) -> Iterator[tuple[Place, Document]]:
        path, name = self.paths[start.file], self.files[start.file]
        with path.open("rb") as file:
            offset, number = _skip_mark(file, start.byte_offset), start.document
            while raw := file.read(PIECE_BYTES + 1):
                continues = len(raw) > PIECE_BYTES
                piece = raw[: _piece_size(raw[:PIECE_BYTES])] if continues else raw
                text = _decode(piece, path, offset)
                yield Place(start.file, number, offset), Document(text, f"{name}, byte {offset}", continues)
                offset, number = offset + len(piece), number + 1
                file.seek(offset)

    def _read_lines(self, start: Place) -> Iterator[tuple[Place, Document]]:
        path, name = self.paths[start.file], self.files[start.file]
        with path.open("rb") as file:
            offset, number = _skip_mark(file, start.byte_offset), start.document
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                where = f"{name}, line {number + 1}"
                _check_size(len(line), where)
                if line.strip():
                    yield Place(start.file, number, offset), self._document(_parse(line, path, offset, where), where)
                offset, number = offset + len(line), number + 1

    def _read_rows(self, start: Place) -> Iterator[tuple[Place, Document]]:
        parquet, arrow_error = _import_parquet()
        path, name = self.paths[start.file], self.files[start.file]
        first = 0  # row of the group or batch
        try:
            with parquet.ParquetFile(path) as file:
                if self._text_field not in file.schema_arrow.names:
                    names = ", ".join(map(repr, file.schema_arrow.names[:20]))
                    raise UserError(f"{path} has no field {self._text_field!r}: set text_field to one of {names}")
                for group in range(file.metadata.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if first + num_rows <= start.document:
                        first += num_rows
                        continue
                    for batch in file.iter_batches(_ROWS_AT_ONCE, [group], [self._text_field], use_threads=False):
                        skipped = min(max(start.document - first, 0), batch.num_rows)
                        for row, fields in enumerate(batch.slice(skipped).to_pylist(), first + skipped):
                            document = self._document(fields, f"{name}, row {row}")
                            _check_size(len(document.to_bytes()), document.where)
                            yield Place(start.file, row), document
                        first += batch.num_rows
        except (arrow_error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged, or no Parquet file ({error}): copy it again") from error

    def _document(self, row: object, where: str) -> Document:
        content = row.get(self._text_field) if isinstance(row, Mapping) else None
        if content is None:
            raise UserError(f"{where} has no field {self._text_field!r}: correct or remove it, or set text_field")
        if self._text_field == CHAT_FIELD:
            return Document(check_chat(content, where), where)
        if not isinstance(content, str):
            raise UserError(
                f"{where}: {self._text_field!r} is {type(content).__name__}, not text: correct or remove it, or set text_field"
            )
        return Document(content, where)


def check_chat(content: object, where: str) -> Chat:
    """The chat that content is; UserError, naming where it is, if it is none."""
    is_chat = isinstance(content, list) and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in content
    )
    if not is_chat or not content:
        raise UserError(
            f"{where}: {CHAT_FIELD!r} is no chat: it must be a list of messages, each with a role and content"
        )
    assert isinstance(content, list)
    # Parquet has a value in every row for what any row has.
    return [{key: value for key, value in message.items() if value is not None} for message in content]


def _piece_size(raw: bytes) -> int:
    """Where to cut: after a paragraph, after a line, before a word, or at least not inside a character."""
    half = len(raw) // 2
    for mark, kept in ((b"\n\n", 2), (b"\n", 1), (b" ", 0)):
        if (at := raw.rfind(mark, half)) >= 0:
            return at + kept
    return next((at for at in range(len(raw) - 1, len(raw) - 4, -1) if raw[at] & 0xC0 != 0x80), len(raw))


def _skip_mark(file: Any, byte_offset: int) -> int:
    """Go to the offset, and at the start of a file over the byte order mark."""
    if byte_offset == 0 and file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
        return len(codecs.BOM_UTF8)
    file.seek(byte_offset)
    return byte_offset


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte {offset + error.start}: convert it, for example with iconv -t UTF-8"
        ) from error


def _parse(line: bytes, path: Path, offset: int, where: str) -> object:
    try:
        return json.loads(_decode(line, path, offset))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): correct or remove it") from error


def _check_size(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise UserError(f"{where} is longer than {MAX_DOCUMENT_BYTES // 2**20} MiB: cut it into several documents")


def _import_parquet() -> tuple[Any, type[Exception]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        error_type = importlib.import_module("pyarrow").ArrowException
    except ImportError as error:
        raise UserError("Parquet files need further packages: pip install 'shardswarm[train]'") from error
    return parquet, error_type
