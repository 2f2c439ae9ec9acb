"""Orders: what the owner of a run has said since its rules were signed: pauses, amendments, evaluations, a return to a checkpoint.

One signed document holds all of it; a later one (by its serial number) takes its place. Members pass the newest one on, and every
Commit carries the one that is in force from the next epoch on: so all members at one place follow the same rules, whenever they
heard of them. A pause needs no agreement: whoever leads begins no epoch as long as the newest orders that he knows say so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from protos import training_pb2
from swarm.epoch.messages import Place
from swarm.identity import Identity, verify_signature
from swarm.run_spec import MAX_EPOCHS, MAX_TARGET_BATCH, DataKind, DataSpec, RunSpec, data_from_wire, data_to_wire
from swarm.value_checks import check_number, check_whole, require

MAX_ORDERS_BYTES = 4096
MAX_AMENDMENTS = 64
MAX_EVALS = 64
NOTICE_EPOCHS = 2
"""What orders name must lie so many epochs after the one whose Commit brings them: with delay, the next one has begun by then."""
_LINEAGE_BYTES = 32
_TAG = b"shardswarm RunOrders 1\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Amendment:
    """Rules that change from an epoch on; None: as they were."""

    epoch: int
    lr: float | None = None
    """Peak learning rate, as in OptimizerSettings."""
    target_batch: int | None = None
    num_epochs: int | None = None
    data: DataSpec | None = None
    """Other training data, whose samples are counted from 0 on."""

    def __post_init__(self) -> None:
        check_whole("epoch", self.epoch, 1, MAX_EPOCHS)
        if self.lr is not None:
            check_number("lr", self.lr, "must be positive", lambda value: value > 0)
        if self.target_batch is not None:
            check_whole("target_batch", self.target_batch, 1, MAX_TARGET_BATCH)
        if self.num_epochs is not None:
            check_whole("num_epochs", self.num_epochs, 1, MAX_EPOCHS)
            require(
                self.num_epochs >= self.epoch,
                f"num_epochs is {self.num_epochs}, before epoch {self.epoch} from which it is to hold",
            )
        if self.data is not None:
            require(self.data.kind is not DataKind.OWN, "data of kind own is the trainers' affair, and not amended")
            require(
                bool(self.data.files and self.data.manifest_digest and self.data.num_samples),
                "data needs files, manifest_digest and num_samples",
            )

    def applied_to(self, spec: RunSpec) -> RunSpec:
        """The rules from this epoch on. ValueError if they make no sense together."""
        require(
            self.data is None or spec.data.kind is not DataKind.OWN,
            "in this run every trainer brings its own text: there is no data to amend",
        )
        changes = {name: getattr(self, name) for name in ("target_batch", "num_epochs", "data")}
        num_epochs = self.num_epochs or spec.num_epochs
        optimizer = replace(
            spec.optimizer,
            lr=self.lr or spec.optimizer.lr,
            # A run may be ended while it still warms up.
            warmup_epochs=min(spec.optimizer.warmup_epochs, num_epochs),
        )
        return replace(
            spec, optimizer=optimizer, **{name: value for name, value in changes.items() if value is not None}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """All that the owner has said."""

    serial: int = 0
    """0: nothing yet."""
    is_paused: bool = False
    amendments: tuple[Amendment, ...] = ()
    """By epoch, at most one for each."""
    eval_epochs: tuple[int, ...] = ()
    """Epochs that evaluate on the held-out data, besides those that the rules name."""
    rollback: Place | None = None
    """Where the run goes on (Place.rolled_back)."""

    def __post_init__(self) -> None:
        check_whole("serial", self.serial, 0, 2**63 - 1)
        epochs = [amendment.epoch for amendment in self.amendments]
        require(epochs == sorted(set(epochs)), "amendments must be ordered by epoch, one for each")
        require(
            len(epochs) <= MAX_AMENDMENTS,
            f"a run can be amended {MAX_AMENDMENTS} times at most: start another one from its checkpoint",
        )
        require(
            len(self.eval_epochs) <= MAX_EVALS and list(self.eval_epochs) == sorted(set(self.eval_epochs)),
            f"at most {MAX_EVALS} evaluations, in order",
        )
        if self.rollback is not None:
            require(self.rollback.era > 0 and len(self.rollback.lineage) == _LINEAGE_BYTES, "rollback makes no sense")

    def spec_at(self, spec: RunSpec, epoch: int) -> RunSpec:
        """The rules of an epoch; spec: those that were signed first. ValueError if they make no sense."""
        for amendment in self.amendments:
            if amendment.epoch <= epoch:
                spec = amendment.applied_to(spec)
        return spec

    def num_epochs(self, spec: RunSpec, epoch: int) -> int:
        """Where the run ends, as seen in an epoch."""
        ends = [one.num_epochs for one in self.amendments if one.epoch <= epoch and one.num_epochs is not None]
        return ends[-1] if ends else spec.num_epochs

    def planned_end(self, spec: RunSpec) -> int:
        """Number of epochs, with what is amended from later epochs on."""
        return self.num_epochs(spec, MAX_EPOCHS)

    def first_sample(self, spec: RunSpec, epoch: int) -> int:
        """Index of an epoch's first sample in its data: all earlier ones have been used."""
        total, since, batch = 0, 0, spec.target_batch
        for amendment in self.amendments:
            if amendment.epoch <= epoch:
                total += (amendment.epoch - since) * batch
                since, batch = amendment.epoch, amendment.target_batch or batch
                total = total if amendment.data is None else 0
        return total + (epoch - since) * batch

    def may_follow(self, other: Orders, epoch: int) -> bool:
        """Whether the Commit of an epoch may bring these where others are in force: the rules of what has begun stay."""
        begun = epoch + NOTICE_EPOCHS

        def fixed(orders: Orders) -> tuple[object, ...]:
            evals = {one for one in orders.eval_epochs if epoch <= one < begun}
            return evals, [one for one in orders.amendments if one.epoch < begun]

        return self.serial > other.serial and fixed(self) == fixed(other)

    def rebased(self, in_force: Orders, now: int) -> Orders:
        """What the next orders begin with, when the run is in epoch `now`: what came too late to be in force is left out."""
        begun = now + NOTICE_EPOCHS
        amendments = [one for one in in_force.amendments if one.epoch < begun]
        amendments += [one for one in self.amendments if one.epoch >= begun]
        evals = {one for one in in_force.eval_epochs if one < begun} | {one for one in self.eval_epochs if one >= begun}
        return replace(self, amendments=tuple(amendments), eval_epochs=tuple(sorted(evals)))

    def amended(self, amendment: Amendment) -> Orders:
        """With another amendment, the next serial number; one of the same epoch is completed, later ones are as they were."""
        others = {one.epoch: one for one in self.amendments}
        before = others.get(amendment.epoch, amendment)
        names = ("lr", "target_batch", "num_epochs", "data")
        merged = {
            name: value if (value := getattr(amendment, name)) is not None else getattr(before, name) for name in names
        }
        others[amendment.epoch] = Amendment(epoch=amendment.epoch, **merged)
        return self.changed(amendments=tuple(others[epoch] for epoch in sorted(others)))

    def with_eval(self, epoch: int) -> Orders:
        """With an evaluation in an epoch; of too many the oldest is forgotten."""
        return self.changed(eval_epochs=tuple(sorted({*self.eval_epochs, epoch})[-MAX_EVALS:]))

    def changed(self, **changes: object) -> Orders:
        """The next ones, with these changes."""
        return replace(self, serial=self.serial + 1, **changes)  # type: ignore[arg-type]

    def to_bytes(self, run_id: bytes) -> bytes:
        """The one canonical form."""
        message = training_pb2.RunOrders(
            run_id=run_id,
            serial=self.serial,
            is_paused=self.is_paused,
            amendments=[
                training_pb2.Amendment(
                    epoch=one.epoch,
                    lr=one.lr,
                    target_batch=one.target_batch,
                    num_epochs=one.num_epochs,
                    data=None if one.data is None else data_to_wire(one.data),
                )
                for one in self.amendments
            ],
            eval_epochs=self.eval_epochs,
        )
        if self.rollback is not None:
            place = self.rollback
            message.rollback.CopyFrom(training_pb2.Place(epoch=place.epoch, lineage=place.lineage, era=place.era))
        return message.SerializeToString(deterministic=True)


NO_ORDERS = Orders()


def sign_orders(orders: Orders, run_id: bytes, identity: Identity) -> bytes:
    """The signed orders as bytes. ValueError if they are larger than MAX_ORDERS_BYTES."""
    payload = orders.to_bytes(run_id)
    signed = training_pb2.SignedRunOrders(payload=payload, signature=identity.sign(_TAG + payload))
    raw = signed.SerializeToString(deterministic=True)
    require(len(raw) <= MAX_ORDERS_BYTES, f"orders of {len(raw)} bytes, at most {MAX_ORDERS_BYTES} are allowed")
    return raw


@functools.lru_cache(maxsize=256)
def open_orders(raw: bytes, run_id: bytes, owner: str) -> Orders:
    """The orders in raw; of b"" NO_ORDERS. ValueError, naming the reason, if the run's owner did not sign them for this run."""
    if not raw:
        return NO_ORDERS
    require(len(raw) <= MAX_ORDERS_BYTES, f"orders of {len(raw)} bytes, at most {MAX_ORDERS_BYTES} are allowed")
    try:
        signed = training_pb2.SignedRunOrders.FromString(raw)
        require(
            verify_signature(owner, _TAG + signed.payload, signed.signature), "the run's owner did not sign the orders"
        )
        message = training_pb2.RunOrders.FromString(signed.payload)
    except DecodeError:
        raise ValueError("the orders are not valid protobuf") from None
    require(message.run_id == run_id, "the orders are those of another run")
    orders = _from_message(message)
    # What is not understood must not be overlooked.
    require(
        orders.to_bytes(run_id) == signed.payload and signed.SerializeToString(deterministic=True) == raw,
        "the orders say what this software does not know: install a newer version",
    )
    return orders


def _from_message(message: training_pb2.RunOrders) -> Orders:
    rollback = message.rollback
    return Orders(
        serial=message.serial,
        is_paused=message.is_paused,
        amendments=tuple(
            Amendment(
                epoch=one.epoch,
                lr=one.lr if one.HasField("lr") else None,
                target_batch=one.target_batch if one.HasField("target_batch") else None,
                num_epochs=one.num_epochs if one.HasField("num_epochs") else None,
                data=data_from_wire(one.data) if one.HasField("data") else None,
            )
            for one in message.amendments
        ),
        eval_epochs=tuple(message.eval_epochs),
        rollback=Place(rollback.epoch, rollback.lineage, rollback.era) if message.HasField("rollback") else None,
    )
