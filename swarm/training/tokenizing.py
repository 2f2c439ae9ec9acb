"""Documents to tokens, and tokens to samples of one length. n tokens of a chunk, T tokens of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from swarm.errors import UserError
from swarm.training.data_document import Document
from swarm.training.tokenizing_chat import tokenize_chat

IGNORED = -100
"""The label of what is not learned, as in torch.nn.functional.cross_entropy."""

Ids: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The documents of one chunk, one after another."""

    ids: NDArray[np.int32]
    """[n]"""
    is_learned: NDArray[np.bool_]
    """[n]: whether the token is to be predicted from those before it."""

    @property
    def has_loss(self) -> bool:
        """Whether anything is to be learned."""
        return bool(self.is_learned[1:].any())

    def num_samples(self, sequence_length: int) -> int:
        return count_samples(len(self.ids), sequence_length)

    def sample(self, number: int, sequence_length: int, pad_id: int) -> tuple[Ids, Ids]:
        """input_ids [T], labels [T] of sample `number`; labels[t] is what follows input_ids[t], or IGNORED."""
        start = number * sequence_length
        end = min(start + sequence_length, len(self.ids) - 1)
        input_ids = np.full(sequence_length, pad_id, np.int64)
        labels = np.full(sequence_length, IGNORED, np.int64)
        input_ids[: end - start] = self.ids[start:end]
        targets = slice(start + 1, end + 1)
        labels[: end - start] = np.where(self.is_learned[targets], self.ids[targets], IGNORED)
        return input_ids, labels


def count_samples(num_tokens: int, sequence_length: int) -> int:
    """How many samples that many tokens make. What is left over after full ones is dropped; less than a full one is padded."""
    num_pairs = num_tokens - 1
    return max(num_pairs // sequence_length, 1) if num_pairs > 0 else 0


def tokenize_documents(tokenizer: Any, documents: Sequence[Document]) -> Tokens:
    """Every text and chat with the end-of-text token after it; nothing is put before it.

    Special tokens that are spelled out in a text are taken as such. Of chats only what the assistant says is learned, and
    that it stops. Raises UserError for a tokenizer that cannot do this, or a chat that its template refuses.
    """
    eos = eos_id(tokenizer)
    ids: list[int] = []
    is_learned: list[bool] = []
    for document in documents:
        if isinstance(document.content, str):
            new_ids = tokenizer(document.content, add_special_tokens=False, verbose=False)["input_ids"]
            new_learned, stops = [True] * len(new_ids), True
        else:
            new_ids, new_learned, stops = tokenize_chat(tokenizer, document.content, document.where)
        ids += new_ids
        is_learned += new_learned
        if new_ids and not document.continues:
            ids.append(eos)
            is_learned.append(stops)
    return Tokens(np.array(ids, np.int32), np.array(is_learned, np.bool_))


def eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def pad_id(tokenizer: Any) -> int:
    """What fills a sample that is not full; its label is IGNORED, so any token would do."""
    return eos_id(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
