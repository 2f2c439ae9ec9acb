"""What `swarm status --run` shows: who holds which stage of a run, how far they are, and what the run lacks.

It is put together from records, each up to a third of its lifetime old; so of two members that go on together one may seem some
epochs ahead. A member is called behind only if another one was further when it spoke before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from swarm.client.runs import in_directory
from swarm.epoch.messages import Place
from swarm.member_record import MemberRecord
from swarm.p2p.directory import Directory
from swarm.records import ShardState
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.training.find_run import find_run

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
    members: tuple[MemberStatus, ...]
    """By stage and peer id, without those that are leaving."""
    place: Place | None
    """Where most members are; None: there are none."""
    loss: float | None
    """Mean per token over the last epoch, as those at that place tell it."""

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

    async def fetch(directory: Directory) -> tuple[RunStore, list[MemberRecord]]:
        store = await find_run(directory, run_id, cache_dir, patience_s=0.0)
        return store, await directory.find_members(run_id, range(store.spec.num_stages))

    store, records = in_directory(initial_peers, timeout_s, fetch)
    return summarize(run_id, store.spec, records)


def summarize(run_id: bytes, spec: RunSpec, records: Iterable[MemberRecord]) -> RunStatus:
    """What these records say of the run."""
    present = sorted(
        (r for r in records if r.state != ShardState.LEAVING and r.epoch <= spec.num_epochs),
        key=lambda r: (r.stage, r.peer_id),
    )
    places = Counter(r.place for r in present)
    place = max(places, key=lambda one: (places[one], one.era, one.epoch, one.lineage), default=None)
    losses = [r.loss for r in present if r.place == place and r.loss is not None]
    members = tuple(MemberStatus(r, _trouble(r, present, place)) for r in present)
    return RunStatus(run_id, spec, members, place, losses[0] if losses else None)


def _trouble(record: MemberRecord, others: Sequence[MemberRecord], place: Place | None) -> str:
    """Of two records with one lifetime the one that expires first is the older one."""
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
        "num_epochs": spec.num_epochs,
        "lineage": place.lineage.hex() if place else None,
        "loss": status.loss,
        "is_over": status.is_over,
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
    for member in status.members:
        if member.trouble:
            line = f"{member.record.peer_id[-8:]} (stage {member.record.stage}) {member.trouble}"
            console.print(Text(line), soft_wrap=True)
    for warning in warnings_of(status, initial_peer):
        console.print(Text(f"warning: {warning}"), soft_wrap=True)


def _progress(status: RunStatus) -> str:
    if status.place is None:
        return f"nobody takes part, {status.spec.num_epochs} epochs to train"
    done = f"{status.place.epoch} of {status.spec.num_epochs} epochs done"
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    return f"{done}{loss}{', the run is over' if status.is_over else ''}"


def _epochs(epochs: Sequence[int]) -> str:
    if not epochs:
        return "-"
    return str(min(epochs)) if min(epochs) == max(epochs) else f"{min(epochs)}-{max(epochs)}"
