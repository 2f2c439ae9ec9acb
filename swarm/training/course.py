"""RunCourse: the rules of a run as its owner has amended them, for the members of a process. Orders are in swarm/run_orders.py."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

from swarm.epoch.messages import EARLY, Commit, Place, Rules
from swarm.errors import BadReply, UserError
from swarm.run_orders import NO_ORDERS, Orders
from swarm.run_spec import DataSpec, RunSpec
from swarm.run_store import RunStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UnitSamples:
    """What a microbatch consists of."""

    data: DataSpec
    indices: range


class RunCourse:
    """What the owner has said, as far as it is known here."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.spec, self.run_id = store.spec, store.run_id
        # Asked for each microbatch: RunSpec checks itself whenever it is made.
        self._opened = functools.lru_cache(maxsize=16)(self._open)
        self._spec_at = functools.lru_cache(maxsize=16)(self._make_spec)
        self.newest_raw = b""
        """Signed."""
        self.newest = NO_ORDERS
        raw = store.read_orders()
        try:
            self._take(raw, self._opened(raw))
        except ValueError as error:
            log.warning("orders on this disk not used reason=%s", error)

    def hear(self, raw: bytes) -> bool:
        """Whether these orders are newer than those that were known; they are kept then. BadReply if the owner did not give them."""
        try:
            orders = self._opened(raw)
        except ValueError as error:
            raise BadReply(f"orders are refused: {error}") from error
        if orders.serial <= self.newest.serial:
            return False
        self._take(raw, orders)
        try:
            self.store.keep_orders(raw)
        except UserError as error:
            log.error("orders not kept serial=%d reason=%s", orders.serial, error)
        return True

    def _take(self, raw: bytes, orders: Orders) -> None:
        self.newest, self.newest_raw = orders, raw
        for amendment in orders.amendments:
            if amendment.data is not None:
                self.store.learn(amendment.data)

    def orders_of(self, commit: Commit | None) -> Orders:
        """In force after a commit whose orders were heard; None: at the start of the run."""
        return NO_ORDERS if commit is None else self._opened(commit.orders)

    def spec_after(self, commit: Commit | None) -> RunSpec:
        """The rules of the epoch after a commit."""
        return self._spec_at(b"", 0) if commit is None else self._spec_at(commit.orders, commit.epoch + 1)

    def samples_of(self, epoch: int, unit: int, commit: Commit | None) -> UnitSamples:
        """The samples of a microbatch: of the epoch's, of the next one's, or of the held-out data from 0 on.

        commit: the one before the epoch.
        """
        raw = b"" if commit is None else commit.orders
        if unit >= EARLY:
            epoch, unit = epoch + 1, unit - EARLY
        spec = self._spec_at(raw, epoch)
        num_units = num_units_of(spec)
        if unit >= num_units:
            first = (unit - num_units) * spec.microbatch
            assert spec.held_out is not None
            return UnitSamples(spec.held_out, range(first, min(first + spec.microbatch, spec.num_eval_samples)))
        begin = self._opened(raw).first_sample(self.spec, epoch)
        first = begin + unit * spec.microbatch
        return UnitSamples(spec.data, range(first, min(first + spec.microbatch, begin + spec.target_batch)))

    # As the state machine asks (swarm.epoch.messages.Course).

    @property
    def is_paused(self) -> bool:
        return self.newest.is_paused

    def rules_at(self, place: Place, orders: bytes) -> Rules:
        now, later = self._spec_at(orders, place.epoch), self._spec_at(orders, place.epoch + 1)
        return Rules(
            num_stages=now.num_stages,
            num_units=num_units_of(now),
            num_eval_units=-(-now.num_eval_samples // now.microbatch),
            eval_every=now.eval_every,
            min_replicas=now.min_replicas,
            num_epochs=now.num_epochs,
            delay=now.delay,
            num_next_units=num_units_of(later),
            eval_epochs=frozenset(self._opened(orders).eval_epochs),
        )

    def next_orders(self, place: Place, orders: bytes) -> bytes:
        return self.newest_raw if self.newest.may_follow(self._opened(orders), place.epoch) else orders

    def allows(self, place: Place, orders: bytes, following: bytes) -> bool:
        return following == orders or self._opened(following).may_follow(self._opened(orders), place.epoch)

    def _make_spec(self, raw: bytes, epoch: int) -> RunSpec:
        return self._opened(raw).spec_at(self.spec, epoch)

    def _open(self, raw: bytes) -> Orders:
        """ValueError, naming the reason."""
        orders = self.store.open_orders(raw)
        for amendment in orders.amendments:
            orders.spec_at(self.spec, amendment.epoch)
        return orders


def num_units_of(spec: RunSpec) -> int:
    """Microbatches of an epoch."""
    return -(-spec.target_batch // spec.microbatch)
