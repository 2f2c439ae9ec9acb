"""Ledger: which microbatches a replica has added to its sum of gradients, and under which term.

The device thread adds while the event loop freezes or voids, so every method holds the lock; what is added is the caller's.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass

from swarm.epoch.messages import NO_TERM, Place, Term


class Added(enum.Enum):
    """What became of a gradient."""

    NOW = "added"
    BEFORE = "was in already"
    OUTDATED = "belongs to another epoch, term or ledger"


@dataclass(frozen=True, slots=True)
class AddTag:
    """Where a gradient is to be added."""

    place: Place
    term: Term
    ledger_id: int
    unit: int


class Ledger:
    """Opened anew with every epoch, and whenever the leader voids it."""

    def __init__(self, new_id: Callable[[], int], clear: Callable[[], None]) -> None:
        """new_id: a number that no other ledger has. clear: sets the sum of gradients to zero."""
        self._new_id, self._clear = new_id, clear
        self._lock = threading.Lock()
        self._is_frozen = False
        self._place = Place(0, b"")
        self._term = NO_TERM
        self.ledger_id = new_id()
        self.units: set[int] = set()

    def open(self, place: Place) -> None:
        """Empty, for an epoch. Obeys no term yet: nothing can be added."""
        with self._lock:
            self._place, self._term = place, NO_TERM
            self._reset()

    def promote(self, place: Place, offset: int) -> None:
        """What was added early, under numbers raised by offset, is the epoch's now. As open, but nothing is forgotten."""
        with self._lock:
            self._place, self._term, self._is_frozen = place, NO_TERM, False
            self.units = {unit - offset for unit in self.units}

    def void(self) -> None:
        """Empty, in the same epoch and term, under a new id."""
        with self._lock:
            self._reset()

    def obey(self, term: Term) -> None:
        """From now on only gradients of this term's leases are added: what is in the ledger now is all of earlier ones."""
        with self._lock:
            self._term, self._is_frozen = term, False

    def freeze(self, is_frozen: bool) -> None:
        """While frozen nothing is added."""
        with self._lock:
            self._is_frozen = is_frozen

    def accepts(self, tag: AddTag) -> Added:
        """What add would answer now, with nothing added."""
        with self._lock:
            return self._answer(tag)

    def add(self, tag: AddTag, add: Callable[[], None]) -> Added:
        """Call add(), which must add the gradient to the sum or raise and change nothing, if it belongs in and is not in yet."""
        with self._lock:
            answer = self._answer(tag)
            if answer is Added.NOW:
                add()
                self.units.add(tag.unit)
            return answer

    def _answer(self, tag: AddTag) -> Added:
        if (tag.place, tag.term, tag.ledger_id) != (self._place, self._term, self.ledger_id):
            return Added.OUTDATED
        if tag.unit in self.units:
            return Added.BEFORE
        return Added.OUTDATED if self._is_frozen else Added.NOW

    def _reset(self) -> None:
        self._is_frozen = False
        self.ledger_id = self._new_id()
        self.units = set()
        self._clear()
