"""What `swarm status --run` shows: who holds which stage of a run, how far they are, and what the run lacks.

It is put together from what members say who answer, and from records of all, each up to a third of its lifetime old; so of two members that go on together one may seem some
epochs ahead. A member is called behind only if another one was further when it spoke before it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from swarm.client.runs import in_swarm
from swarm.epoch.messages import Place
from swarm.member_record import MemberRecord
from swarm.messages import PROTOCOL_MAJOR
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host
from swarm.records import ShardState
from swarm.run_orders import NO_ORDERS, Amendment, Orders
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.training.find_run import find_run
from swarm.training.rollback import newest
from swarm.training.standing import Standing, ask_standings, newest_orders

# Members hear of a step within moments of each other, so one epoch says nothing.
_EPOCHS_BEHIND = 2


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One member, as its record and those of the others show it."""

    record: MemberRecord
    trouble: str = ""
    """What is the matter with it, in words; empty: nothing."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at one moment."""

    run_id: bytes
    spec: RunSpec
    """As the owner has amended it."""
    members: tuple[MemberStatus, ...]
    """By stage and peer id, without those that are leaving."""
    place: Place | None
    """Where most members are; None: there are none."""
    loss: float | None
    """Mean per token over the last epoch, as those at that place tell it."""
    orders: Orders = NO_ORDERS
    """The newest that somebody knows."""
    idle_s: float | None = None
    """Since the last step; None: nobody says."""
    evaluation: tuple[int, float] | None = None
    """Epoch and mean loss per token of the last one; None: nobody has seen any."""

    @property
    def num_epochs(self) -> int:
        """Where the run is to end."""
        return self.orders.planned_end(self.spec)

    @property
    def stands_still(self) -> bool:
        """Whether it cannot go on, or is not to."""
        lacks = any(not self.of_stage(stage) for stage in range(self.spec.num_stages))
        return not self.is_over and (lacks or self.orders.is_paused)

    @property
    def is_over(self) -> bool:
        return self.place is not None and self.place.epoch >= self.spec.num_epochs

    def of_stage(self, stage: int) -> list[MemberStatus]:
        """Those that train: nodes, or the trainers."""
        return [member for member in self.members if member.record.stage == stage and not member.record.is_keeper]

    @property
    def keepers(self) -> list[MemberStatus]:
        """Nodes that hold the ends, too."""
        return [member for member in self.members if member.record.is_keeper]


def fetch_run_status(
    run_id: bytes, initial_peers: Sequence[str], timeout_s: float, cache_dir: Path | None = None
) -> RunStatus:
    """The run's rules, from this disk or the swarm, and its members. Raises UserError, JoinFailed or RouteBroken, in time."""

    async def fetch(
        host: Host, directory: Directory
    ) -> tuple[RunStore, list[MemberRecord], dict[tuple[str, int], Standing]]:
        store = await find_run(directory, run_id, cache_dir, patience_s=0.0)
        records = await directory.find_members(run_id, range(store.spec.num_stages))
        return store, records, await ask_standings(host, store, records)

    store, records, standings = in_swarm(initial_peers, timeout_s, fetch)
    orders, _ = newest_orders([one.orders for one in standings.values()], store)
    return summarize(run_id, store.spec, records, standings, orders)


def summarize(
    run_id: bytes,
    spec: RunSpec,
    records: Iterable[MemberRecord],
    standings: Mapping[tuple[str, int], Standing] | None = None,
    orders: Orders = NO_ORDERS,
) -> RunStatus:
    """What these records, and the members who answered, say of the run."""
    standings = standings or {}
    told = list(standings.values())
    records = [_updated(record, standings.get((record.peer_id, record.stage))) for record in records]
    here = newest(one.place for one in told)
    spec = orders.spec_at(spec, 0 if here is None else here.epoch)
    evaluations = [one.evaluation for one in told if one.evaluation is not None]
    present = sorted(
        (r for r in records if r.state != ShardState.LEAVING and r.epoch <= orders.planned_end(spec)),
        key=lambda r: (r.stage, r.peer_id),
    )
    places = Counter(r.place for r in present)
    place = max(places, key=lambda one: (places[one], one.era, one.epoch, one.lineage), default=None)
    losses = [r.loss for r in present if r.place == place and r.loss is not None]
    members = tuple(MemberStatus(r, _trouble(r, present, place)) for r in present)
    return RunStatus(
        run_id,
        spec,
        members,
        place,
        losses[0] if losses else None,
        orders,
        min((one.idle_s for one in told if one.place == here), default=None),
        max(evaluations, default=None),
    )


def _updated(record: MemberRecord, standing: Standing | None) -> MemberRecord:
    """As its member says that it is now."""
    if standing is None:
        return record
    place, commit = standing.place, standing.commit
    loss = record.loss if commit is None or commit.loss is None or not math.isfinite(commit.loss) else commit.loss
    return replace(record, epoch=place.epoch, lineage=place.lineage, era=place.era, loss=loss)


def _trouble(record: MemberRecord, others: Sequence[MemberRecord], place: Place | None) -> str:
    """Of two records with one lifetime the one that expires first is the older one."""
    if record.protocol_major != PROTOCOL_MAJOR:
        return (
            f"speaks protocol {record.protocol_major}, this software {PROTOCOL_MAJOR}: the older side must be upgraded"
        )
    if record.state == ShardState.JOINING:
        return "is joining: it looks for the others, or downloads the state of its stage"
    if place is not None and record.epoch == place.epoch and record.lineage != place.lineage:
        return "is in another history of the weights: it downloads that of the others, if it can reach them"
    seen = max((other.epoch for other in others if other.expires_at <= record.expires_at), default=record.epoch)
    if seen - record.epoch >= _EPOCHS_BEHIND:
        return f"is {seen - record.epoch} epochs behind: it has just joined, downloads, or cannot keep up"
    return ""


def warnings_of(status: RunStatus, initial_peer: str) -> list[str]:
    """What the run lacks, each with the command that would bring it."""
    if status.is_over:
        return []
    run_id, spec = status.run_id.hex(), status.spec
    has_begun = status.place is not None and status.place.epoch > 0
    needed = 1 if has_begun else spec.min_replicas
    warnings = []
    for stage in range(spec.num_stages):
        num_present = len(status.of_stage(stage))
        if num_present >= needed:
            continue
        if stage == spec.ends_stage:
            what, command = "trainer", f"swarm train {run_id}"
        else:
            what = f"replica of stage {stage} (blocks {spec.stages[stage]})"
            command = f"swarm-node run --run {run_id} --blocks {spec.stages[stage]}"
        lack = f"no {what}" if not num_present else f"{num_present} {what}, and the run begins with {needed}"
        warnings.append(f"{lack}: {command} --initial-peers {initial_peer}")
    return warnings


def status_as_json(status: RunStatus, initial_peer: str, now: float) -> dict[str, Any]:
    """The same as the table, for scripts."""
    spec, place = status.spec, status.place
    return {
        "run_id": status.run_id.hex(),
        "name": spec.name,
        "epoch": place.epoch if place else None,
        "num_epochs": status.num_epochs,
        "lineage": place.lineage.hex() if place else None,
        "loss": status.loss,
        "is_over": status.is_over,
        "is_paused": status.orders.is_paused,
        "stands_still": status.stands_still,
        "since_last_step_s": None if status.idle_s is None else round(status.idle_s, 1),
        "evaluation": None
        if status.evaluation is None
        else dict(zip(("epoch", "loss"), status.evaluation, strict=True)),
        "amendments": [
            {
                "epoch": one.epoch,
                "lr": one.lr,
                "target_batch": one.target_batch,
                "num_epochs": one.num_epochs,
                "data_files": None if one.data is None else list(one.data.files),
            }
            for one in status.orders.amendments
        ],
        "stages": [
            {
                "stage": stage,
                "blocks": str(span),
                "members": [_member_as_json(member, now) for member in status.of_stage(stage)],
            }
            for stage, span in enumerate(spec.stages)
        ],
        "trainers": [_member_as_json(member, now) for member in status.of_stage(spec.ends_stage)],
        "keepers": [_member_as_json(member, now) for member in status.keepers],
        "warnings": warnings_of(status, initial_peer),
    }


def _member_as_json(member: MemberStatus, now: float) -> dict[str, Any]:
    record = member.record
    return {
        "peer_id": record.peer_id,
        "state": record.state.name,
        "epoch": record.epoch,
        "lineage": record.lineage.hex(),
        "loss": record.loss,
        "tokens_per_s": round(record.tokens_per_s, 1),
        "expires_in_s": round(record.expires_at - now, 1),
        "addresses": list(record.addresses),
        "software": record.software,
        "trouble": member.trouble or None,
    }


def status_as_table(status: RunStatus, initial_peer: str, out: TextIO) -> None:
    """A row for each stage, then what deserves attention."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    spec = status.spec
    # Texts of the owner and of peers go in as Text, so that they are not taken for markup.
    console = Console(file=out, highlight=False)
    console.print(Text(f"{spec.name} ({status.run_id.hex()[:8]}): {_progress(status)}"), soft_wrap=True)
    table = Table()
    for title in ("stage", "blocks", "replicas", "tokens/s", "epochs", "peers"):
        table.add_column(title, overflow="fold")
    rows = [(str(stage), str(span), status.of_stage(stage)) for stage, span in enumerate(spec.stages)]
    rows += [("trainers", "-", status.of_stage(spec.ends_stage)), ("keepers of the ends", "-", status.keepers)]
    for name, span, members in rows:
        tokens_per_s = sum(member.record.tokens_per_s for member in members)
        table.add_row(
            name,
            span,
            str(len(members)),
            f"{tokens_per_s:.0f}" if tokens_per_s else "-",
            _epochs([member.record.epoch for member in members]),
            Text(" ".join(member.record.peer_id[-8:] for member in members)),
        )
    console.print(table)
    for line in _owner_lines(status):
        console.print(Text(line), soft_wrap=True)
    if status.stands_still and status.idle_s is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - status.idle_s))
        console.print(Text(f"the run stands still since {since}"), soft_wrap=True)
    for member in status.members:
        if member.trouble:
            line = f"{member.record.peer_id[-8:]} (stage {member.record.stage}) {member.trouble}"
            console.print(Text(line), soft_wrap=True)
    for warning in warnings_of(status, initial_peer):
        console.print(Text(f"warning: {warning}"), soft_wrap=True)


def _progress(status: RunStatus) -> str:
    if status.place is None:
        return f"nobody takes part, {status.num_epochs} epochs to train"
    done = f"{status.place.epoch} of {status.num_epochs} epochs done"
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    held_out = "" if status.evaluation is None else "held-out loss {1:.4f} in epoch {0}".format(*status.evaluation)
    end = "the run is over" if status.is_over else "paused by its owner" if status.orders.is_paused else ""
    return ", ".join(part for part in (done + loss, held_out, end) if part)


def _owner_lines(status: RunStatus) -> list[str]:
    """What the owner has amended."""

    def rules(one: Amendment) -> str:
        data = None if one.data is None else f"{one.data.source} ({len(one.data.files)} files)"
        parts = {"lr": one.lr, "batch": one.target_batch, "end after epoch": one.num_epochs, "data": data}
        return ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)

    return [f"amended from epoch {one.epoch} on: {rules(one)}" for one in status.orders.amendments]


def _epochs(epochs: Sequence[int]) -> str:
    if not epochs:
        return "-"
    return str(min(epochs)) if min(epochs) == max(epochs) else f"{min(epochs)}-{max(epochs)}"
