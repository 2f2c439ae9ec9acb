"""A document: the unit that is read, digested and tokenised. Cheap to import, because processes that tokenise do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from swarm.errors import UserError
from swarm.model_spec import DIGEST_BYTES

Chat: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages, each with a role and content."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, a piece of one, or a chat."""

    content: str | Chat
    where: str
    """For messages: file and line."""
    continues: bool = False
    """The next document goes on with this one's text."""

    def to_bytes(self) -> bytes:
        """What its digest is made from. UserError for what no file can hold as UTF-8 or JSON."""
        try:
            if isinstance(self.content, str):
                return self.content.encode()
            return json.dumps(self.content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{self.where} cannot be used ({error}): correct or remove it") from error


def digest_documents(documents: Iterable[Document]) -> bytes:
    """16 bytes."""
    hasher = hashlib.sha256(b"shardswarm documents 1\0")
    for document in documents:
        raw = document.to_bytes()
        hasher.update(len(raw).to_bytes(8, "big") + bytes([document.continues]) + raw)
    return hasher.digest()[:DIGEST_BYTES]
