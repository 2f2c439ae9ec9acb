"""swarm export --every: which checkpoints are written, replaced and removed. Members are played by folders on this disk; files are real."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from swarm.client import export_series
from swarm.client.export import Exported, RunMembers
from swarm.client.export_series import CheckpointSeries
from swarm.epoch.messages import Commit, Place
from swarm.errors import PeerFailed, UserError
from swarm.member_record import MemberRecord
from swarm.run_store import RunStore
from swarm.training.hf_checkpoint import read_hf_checkpoint
from swarm.training.layout import layout_of
from swarm.training.run_folder import RUN_FOLDER, place_of, restore_run, states_of
from tests.support.runs import make_member
from tests.support.training_swarm import make_run
from tests.unit.test_run_folder import LEADER, save


class Members(RunMembers):
    """Everybody, on this disk. looks: the epochs that they have at each look."""

    def __init__(self, store: RunStore, folder: Path, looks: list[list[Place]]) -> None:
        self.store, self.layout, self.folder, self.looks = store, layout_of(store.spec), folder, looks
        self.missing: list[int] = []
        """Epochs that nobody gives the next time."""

    async def records(self) -> list[MemberRecord]:
        saved = tuple(self.looks.pop(0) if self.looks else [])
        stages = range(self.store.spec.num_stages) if saved else []
        return [make_member(LEADER.peer_id, run_id=self.store.run_id, stage=stage, saved=saved) for stage in stages]

    async def is_last(self, records: Sequence[MemberRecord], place: Place) -> bool:
        return place.epoch == 30

    async def fetch_artifacts(self) -> None:
        pass

    async def fetch(
        self, records: Sequence[MemberRecord], stage: int, place: Place, run_folder: Path | None
    ) -> tuple[Commit | None, Tensor]:
        if place.epoch in self.missing:
            self.missing.remove(place.epoch)
            raise PeerFailed("it is gone")
        states = states_of(self.folder, self.store.run_id, stage)
        (saved,) = (one for one in states.found() if place.epoch == one.place.epoch)
        state = states.read(saved)
        assert run_folder is not None
        states_of(run_folder, self.store.run_id, stage).save(place, saved.commit, state)
        return saved.commit, state.values

    async def hear_orders(self, records: Sequence[MemberRecord], commit: Commit | None) -> bytes:
        return b""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return make_run(tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def disk(store: RunStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def places(store: RunStore, disk: Path) -> dict[int, Place]:
    return {epoch: save(disk, store, epoch) for epoch in (8, 10, 16, 24, 30)}


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_series, "LOOK_EVERY_S", 0.0)


def write(members: Members, out: Path, keep: int | None = None) -> list[int]:
    """The epochs that were written, until the run's end."""
    out.mkdir(exist_ok=True)
    told: list[Exported] = []
    series = CheckpointSeries(members, out, 8, keep, torch.float32, told.append)
    asyncio.run(asyncio.wait_for(series.write(), 60))
    assert not list(out.glob(".*"))
    return [one.place.epoch for one in told]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_multiples_and_the_runs_end_are_written_once_each_to_go_on_from(
    store: RunStore, disk: Path, places: dict[int, Place], tmp_path: Path
) -> None:
    looks = [[places[8]], [places[8], places[10]], [places[10], places[16]], [places[16], places[30]]]
    out = tmp_path / "out"
    assert write(Members(store, disk, looks), out) == [8, 16, 30]
    assert names(out) == ["epoch-000008", "epoch-000016", "epoch-000030"]
    for epoch in (8, 16, 30):
        folder = out / f"epoch-{epoch:06}"
        assert place_of(folder, store.run_id) == places[epoch]
        assert restore_run(folder, tmp_path / f"cache{epoch}").place == places[epoch]
        states = states_of(disk, store.run_id, 1)
        (saved,) = (one for one in states.found() if one.place == places[epoch])
        kept = folder / RUN_FOLDER / "states" / saved.path.name
        assert kept.read_bytes() == saved.path.read_bytes()  # the very file that the members have
        assert torch.equal(read_hf_checkpoint(store.spec, folder, 1), states.read(saved).values)
    AutoModelForCausalLM.from_pretrained(out / "epoch-000030")
    assert write(Members(store, disk, [[places[16], places[30]]]), out) == []  # started again


def test_adapter_runs_are_exported_and_restored_as_well(tmp_path: Path) -> None:
    store = make_run(tmp_path / "owner", trainable="lora", **{"lora.rank": 2})
    place = save(tmp_path / "disk", store, 30)
    assert write(Members(store, tmp_path / "disk", [[place]]), tmp_path / "out") == [30]
    folder = tmp_path / "out" / "epoch-000030"
    assert (folder / "adapter_model.safetensors").is_file()
    assert restore_run(folder, tmp_path / "cache").place == place


def test_only_the_newest_are_kept(store: RunStore, disk: Path, places: dict[int, Place], tmp_path: Path) -> None:
    out = tmp_path / "out"
    looks = [[places[8], places[16]], [places[8], places[16], places[24]], [places[24], places[30]]]
    assert write(Members(store, disk, looks), out, keep=2) == [8, 16, 24, 30]
    assert names(out) == ["epoch-000024", "epoch-000030"]


def test_a_full_disk_costs_a_line_and_the_next_checkpoint_is_tried(
    store: RunStore, disk: Path, places: dict[int, Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    usage, out = shutil.disk_usage(tmp_path), tmp_path / "out"

    class FullFor8(Members):
        async def records(self) -> list[MemberRecord]:
            found = await super().records()
            free = 1000 if found[0].saved == (places[8],) else usage.free
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
            return found

    members = FullFor8(store, disk, [[places[8]], [places[8], places[16]], [places[30]]])
    assert write(members, out) == [16, 30]
    (line,) = caplog.messages
    assert line.startswith("checkpoint not exported epoch=8 reason=the checkpoint takes") and "free some space" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        UserError, match="the checkpoint takes"
    ):  # if it is the run's last one, whoever waits for it is told
        write(Members(store, disk, [[places[30]]]), tmp_path / "other")
    assert names(tmp_path / "other") == []


def test_what_members_could_not_give_is_tried_again(
    store: RunStore, disk: Path, places: dict[int, Place], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    members = Members(store, disk, [[places[8]], [places[8]], [places[8]], [places[30]]])
    members.missing = [8, 8]
    assert write(members, tmp_path / "out") == [8, 30]
    assert caplog.messages == ["checkpoint not exported yet epoch=8 reason=it is gone"]


def test_a_checkpoint_of_a_history_that_the_run_has_left_is_replaced(
    store: RunStore, disk: Path, places: dict[int, Place], tmp_path: Path
) -> None:
    out, newer = tmp_path / "out", places[16].rolled_back(1)
    looks = [[places[8], places[16]], [places[16], newer], [places[16], newer], [places[30].rolled_back(1)]]
    assert write(Members(store, disk, looks), out) == [8, 16, 16, 30]
    assert names(out) == ["epoch-000008", "epoch-000016", "epoch-000030"]
    assert place_of(out / "epoch-000016", store.run_id) == newer


def test_a_folder_of_somebody_else_is_left_alone(
    store: RunStore, disk: Path, places: dict[int, Place], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tmp_path / "out" / "epoch-000008"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    assert write(Members(store, disk, [[places[8]], [places[30]]]), tmp_path / "out", keep=1) == [30]
    assert (mine / "notes.txt").read_text() == "mine"
    (line,) = caplog.messages
    assert "is there, and is no whole export of this run: move it away" in line


def test_one_process_at_a_time_writes_into_a_folder_and_what_a_dead_one_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".partial-x" / "checkpoint").mkdir(parents=True)
    (out / "epoch-000008").mkdir()
    with export_series._claimed(out):
        assert names(out) == ["epoch-000008"]
        with pytest.raises(UserError, match="another process exports to"), export_series._claimed(out):
            pass
    with export_series._claimed(out):
        pass
