"""What `swarm status --run` makes of the records of a run's members."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest

from swarm.client.run_status import RunStatus, status_as_json, status_as_table, summarize, warnings_of
from swarm.epoch.messages import Place
from swarm.member_record import MemberRecord
from swarm.records import ShardState
from tests.support.runs import make_member, make_spec

RUN = b"r" * 32
PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWfirst"
SPEC = make_spec(name="[red]tiny[/x]", min_replicas=2)
NOW = time.time()


def member(peer_id: str, stage: int, epoch: int = 7, *, heard_s: float = 0.0, **fields: Any) -> MemberRecord:
    """heard_s: how long ago it spoke."""
    return make_member(peer_id, stage=stage, epoch=epoch, expires_at=round(NOW + 30 - heard_s, 3), **fields)


def whole(**changed: MemberRecord) -> list[MemberRecord]:
    """Two of each stage and of the ends, at epoch 7."""
    members = {f"{name}{number}": member(f"{name}{number}", stage) for stage, name in enumerate(("a", "b", "t")) for number in (1, 2)}  # fmt: skip
    return list({**members, **changed}.values())


def status_of(records: list[MemberRecord]) -> RunStatus:
    return summarize(RUN, SPEC, records)


def printed(status: RunStatus) -> str:
    out = io.StringIO()
    status_as_table(status, PEER, out)
    return out.getvalue()


def test_a_whole_run_is_a_row_for_each_stage_and_nothing_to_warn_of() -> None:
    status = status_of(whole(kept=member("a1", 2, is_keeper=True)))
    assert status.place == Place(7, b"l" * 32) and status.loss == 2.5 and not status.is_over
    assert not any(one.trouble for one in status.members) and warnings_of(status, PEER) == []
    lines = printed(status).splitlines()
    assert lines[0].startswith("[red]tiny[/x] (72727272): 7 of 10 epochs done, loss 2.5000")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [
        ["0", "0:2", "2", "200", "7", "a1 a2"],
        ["1", "2:4", "2", "200", "7", "b1 b2"],
        ["trainers", "-", "2", "200", "7", "t1 t2"],
        ["keepers of the ends", "-", "1", "100", "7", "a1"],
    ]


@pytest.mark.parametrize(
    ("stage", "command"),
    [(1, f"swarm-node run --run {RUN.hex()} --blocks 2:4"), (2, f"swarm train {RUN.hex()}")],
)
def test_a_stage_without_a_replica_is_told_with_the_command_that_adds_one(stage: int, command: str) -> None:
    status = status_of([one for one in whole() if one.stage != stage])
    (warning,) = warnings_of(status, PEER)
    assert warning.startswith("no ") and warning.endswith(f": {command} --initial-peers {PEER}")
    assert warning in printed(status)


def test_who_is_leaving_is_no_replica() -> None:
    records = [member("a1", 0, state=ShardState.LEAVING), *(one for one in whole() if one.stage != 0)]
    assert warnings_of(status_of(records), PEER)[0].startswith("no replica of stage 0 (blocks 0:2)")


def test_before_the_first_epoch_there_must_be_as_many_as_the_rules_say() -> None:
    records = [member(name, stage, 0) for name, stage in (("a1", 0), ("b1", 1), ("b2", 1), ("t1", 2), ("t2", 2))]
    (warning,) = warnings_of(status_of(records), PEER)
    assert warning.startswith("1 replica of stage 0 (blocks 0:2), and the run begins with 2: swarm-node run")
    begun = [member(one.peer_id, one.stage, 1) for one in records]
    assert warnings_of(status_of(begun), PEER) == []


def test_nobody_at_all() -> None:
    status = status_of([])
    assert status.place is None and len(warnings_of(status, PEER)) == 3
    assert "nobody takes part, 10 epochs to train" in printed(status)


def test_a_run_that_is_over_lacks_nothing() -> None:
    status = status_of([member("a1", 0, 10)])
    assert status.is_over and warnings_of(status, PEER) == [] and "the run is over" in printed(status)


def test_who_spoke_later_and_is_not_as_far_is_behind() -> None:
    status = status_of(whole(b2=member("b2", 1, 3)))
    troubled = {one.record.peer_id: one.trouble for one in status.members if one.trouble}
    assert troubled.keys() == {"b2"} and troubled["b2"].startswith("is 4 epochs behind")
    assert "b2 (stage 1) is 4 epochs behind" in printed(status)


@pytest.mark.parametrize(("epoch", "heard_s"), [(3, 9.0), (6, 0.0)])
def test_an_old_record_and_a_step_just_taken_are_no_trouble(epoch: int, heard_s: float) -> None:
    status = status_of(whole(b2=member("b2", 1, epoch, heard_s=heard_s)))
    assert not any(one.trouble for one in status.members) and status.place == Place(7, b"l" * 32)


def test_another_history_is_told() -> None:
    status = status_of(whole(b2=member("b2", 1, lineage=b"x" * 32)))
    (trouble,) = [one.trouble for one in status.members if one.trouble]
    assert trouble.startswith("is in another history")


def test_an_epoch_after_the_end_is_not_believed() -> None:
    assert len(status_of(whole(b2=member("b2", 1, 2**48))).members) == 5


def test_a_script_gets_the_same() -> None:
    answer = json.loads(json.dumps(status_as_json(status_of(whole(b2=member("b2", 1, 3))), PEER, NOW)))
    assert (answer["run_id"], answer["epoch"], answer["num_epochs"], answer["loss"]) == (RUN.hex(), 7, 10, 2.5)
    assert [stage["blocks"] for stage in answer["stages"]] == ["0:2", "2:4"]
    assert [one["epoch"] for one in answer["stages"][1]["members"]] == [7, 3]
    assert answer["stages"][1]["members"][1]["trouble"].startswith("is 4 epochs behind")
    assert [one["peer_id"] for one in answer["trainers"]] == ["t1", "t2"] and answer["warnings"] == []
