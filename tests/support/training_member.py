"""A real node or trainer of a run that writes down what it does, and in which a fault may be planted.

    python -m tests.support.training_member node|trainer ARGUMENTS of swarm-node / swarm
PIECE_EPOCHS lets each piece of a saved state wait for so many steps before it is sent. MEMBERSHIP (JSON) changes fields of MembershipConfig.
TRACE (a file) gets a line of JSON for every step: epoch, lineage, digest of the weights, units in the ledger, size of the group.
VERSION (MAJOR.MINOR) makes it a member of another version, whose letters say more than ours, and which sends letters of its own kind.
DUMP (a file, *.pt) gets the weights by name at the end of the run, beside it with the run's id in the name. FAULT (JSON) is {"on": event, "at": n, "action": ...}; events are
    send:Commit, receive:Prepare ...    a letter of that kind, before it leaves (or is taken in)
    sent:Commit                         after it has left
    hop:1                               a trainer's backward at stage 1 is done
    piece                               a piece of a saved state is about to be sent
    stepped                             a step was taken, and written down
    added                               a gradient went into a node's ledger
and actions SIGKILL, SIGSTOP. It fires once, at the n-th such event or later, in the first member that creates the file "token";
it is written to TRACE first, and synced. With "from_epoch" earlier events do not count.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
import time
from collections import Counter
from typing import Any

import torch

from swarm import messages
from swarm.client import stage_hop
from swarm.epoch.ledger import Added, Ledger
from swarm.epoch.messages import Commit
from swarm.training import links, membership, saved_states
from swarm.training.member_config import MembershipConfig
from tests.support.in_namespace import enter

fault: dict[str, Any] = {}
counts: Counter[str] = Counter()
num_steps = 0


def trace(**fields: Any) -> None:
    with open(os.environ["TRACE"], "a") as file:
        file.write(json.dumps(fields) + "\n")
        file.flush()
        os.fsync(file.fileno())


def claim() -> bool:
    """Whether the fault is ours: it fires once, in whichever of the members that it was planted in gets there first."""
    try:
        os.close(os.open(fault["token"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def happens(event: str) -> bool:
    """Whether the planted fault is due at this event; signals are sent at once."""
    if num_steps < fault.get("from_epoch", 0):
        return False
    counts[event] += 1
    if fault.get("on") != event or counts[event] < fault["at"] or not claim():
        return False
    trace(fault=fault["action"], on=event, at=counts[event])
    if fault["action"].startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[fault["action"]])
    return True


class TracedLinks(links.Links):
    def send(self, peer_id: str, message: Any) -> None:
        kind = type(message).__name__
        happens(f"send:{kind}")
        super().send(peer_id, message)
        if fault.get("on") == f"sent:{kind}" and self._strike is None:
            self._strike = asyncio.get_running_loop().create_task(self._strike_when_sent(kind))

    _strike: asyncio.Task[None] | None = None

    async def _strike_when_sent(self, kind: str) -> None:
        await self.flush(5)
        await asyncio.sleep(0.05)  # p2pd has to pass it on before it dies with us
        happens(f"sent:{kind}")


class TracedMembership(membership.Membership):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        changes = json.loads(os.environ.get("MEMBERSHIP", "{}"))
        options["config"] = dataclasses.replace(options.get("config") or MembershipConfig(), **changes)
        super().__init__(*arguments, **options)

    def _on_message(self, peer: str, message: Any) -> None:
        happens(f"receive:{type(message).__name__}")
        super()._on_message(peer, message)

    def _start_averaging(self, order: Any) -> None:
        self.last_units = sorted(self.ledger.units)
        happens("average")
        super()._start_averaging(order)

    def _tell(self, commit: Commit) -> None:
        super()._tell(commit)
        global num_steps
        num_steps = commit.epoch + 1
        dump = os.environ.get("DUMP")
        if dump and commit.epoch + 1 == self.course.spec_after(commit).num_epochs:
            views = self.parameters.views(self.parameters.state.values)
            path = dump.replace(".pt", f".{self.run_id.hex()[:8]}{'.keeper' if self.is_keeper else ''}.pt")
            torch.save({n: view.clone() for n, view in zip(self.parameters.names, views, strict=True)}, path + ".new")
            os.replace(path + ".new", path)
        trace(
            run=self.run_id.hex(),
            epoch=commit.epoch,
            is_keeper=self.is_keeper,
            lineage=commit.lineage.hex(),
            digest=self.parameters.digest().hex(),
            units=getattr(self, "last_units", []),
            members=len(commit.members),
            loss=commit.loss_sum / max(commit.num_loss_tokens, 1),
            tokens=commit.num_loss_tokens,
            downloads=self.counters.num_downloads,
            attempt=commit.attempt,
            term=commit.term.number // membership.TERM_STEP,
            skipped=commit.is_skipped,
            norm=commit.norm,
            bytes=self.counters.bytes_averaged,
            size=self.parameters.size,
            era=commit.era,
        )
        happens("stepped")


class SlowState(saved_states.OpenState):
    """A donor's disk, or its line."""

    def read_piece(self, number: int) -> bytes:
        piece = super().read_piece(number)
        happens("piece")
        goal, deadline = num_steps + int(os.environ.get("PIECE_EPOCHS", "0")), time.monotonic() + 25
        while num_steps < goal and time.monotonic() < deadline:
            time.sleep(0.02)
        return piece


class TracedLedger(Ledger):
    def add(self, tag: Any, add: Any) -> Added:
        answer = super().add(tag, add)
        if answer is Added.NOW:
            happens("added")
        return answer


class TracedHops(stage_hop.StageHops):
    async def backward(self, task: Any, *arguments: Any) -> Any:
        answer = await super().backward(task, *arguments)
        happens(f"hop:{task.stage}")
        return answer


# Field 1007, of which this version knows nothing, with one byte in it.
UNKNOWN = bytes([0xFA, 0x3E, 0x01, 0x07])


def speak_version(major: int, minor: int) -> None:
    for module in (messages, membership):
        module.PROTOCOL_MAJOR, module.PROTOCOL_MINOR = major, minor  # type: ignore[attr-defined]
    to_wire, on_found = links.to_wire, links.Links._adopt

    def to_newer_wire(message: Any) -> Any:
        wire = to_wire(message)
        wire.MergeFromString(UNKNOWN)
        getattr(wire, wire.WhichOneof("kind")).MergeFromString(UNKNOWN)
        return wire

    def adopt(self: Any, link: Any, stream: Any) -> None:
        on_found(self, link, stream)
        link.outbox.append(UNKNOWN)
        link.filled.set()
        trace(unknown_letter_to=link.name)

    links.to_wire, links.Links._adopt = to_newer_wire, adopt  # type: ignore[assignment,method-assign]


def main() -> None:
    if namespace := os.environ.get("NETNS"):
        enter(namespace)
    kind = sys.argv.pop(1)
    if version := os.environ.get("VERSION"):
        speak_version(*map(int, version.split(".")))
    fault.update(json.loads(os.environ.get("FAULT", "null")) or {})
    membership.Links = TracedLinks  # type: ignore[misc]
    membership.Ledger = TracedLedger  # type: ignore[misc]
    saved_states.OpenState = SlowState  # type: ignore[misc]
    if kind == "node":
        from node.cli import main as run
        from node.training import hosted_run, keeper

        hosted_run.Membership = TracedMembership  # type: ignore[misc]
        keeper.Membership = TracedMembership  # type: ignore[misc]
    else:
        from swarm.cli import main as run
        from swarm.client import trainer

        trainer.Membership = TracedMembership  # type: ignore[misc]
        trainer.StageHops = TracedHops  # type: ignore[misc]
    run()


if __name__ == "__main__":
    main()
