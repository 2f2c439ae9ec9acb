"""A run is restored from the folder of an export whole or not at all, and nothing in the folder is believed unchecked."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from swarm.cli import cli
from swarm.epoch.messages import Commit, Place, Term
from swarm.errors import UserError
from swarm.identity import Identity
from swarm.run_orders import Amendment, Orders, sign_orders
from swarm.run_store import RunStore, artifact_digest, folder_of_run
from swarm.training.checkpoints import saved_stages
from swarm.training.course import RunCourse
from swarm.training.layout import layout_of
from swarm.training.parameters import StageState
from swarm.training.run_folder import RUN_FOLDER, place_of, restore_run, states_of
from swarm.training.wire import sign_commit
from tests.support.training_swarm import make_run

LEADER = Identity.generate()
EPOCH = 12
PEER = f"/ip4/127.0.0.1/tcp/31337/p2p/{LEADER.peer_id}"


def save(folder: Path, store: RunStore, epoch: int, stages: list[int] | None = None) -> Place:
    """States of some stages, or of all, at an epoch."""
    layout, term = layout_of(store.spec), Term(1, LEADER.peer_id)
    commit = Commit(epoch - 1, b"p" * 32, term, 0, 100, 1.5, False, (b"d" * 32,) * 3, ((LEADER.peer_id, 0),), 2.5)
    commit = sign_commit(commit, store.run_id, LEADER)
    for stage in range(store.spec.num_stages) if stages is None else stages:
        generator = torch.Generator().manual_seed(10 * epoch + stage)
        vectors = [torch.randn(layout.size(stage), generator=generator).abs() for _ in range(3)]
        states_of(folder, store.run_id, stage).save(commit.after, commit, StageState(*vectors, epoch))
    return commit.after


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return make_run(tmp_path_factory.mktemp("owner"))


@pytest.fixture
def checkpoint(owners: RunStore, tmp_path: Path) -> Path:
    """The folder of an export, without its weights."""
    owners.copy_to(tmp_path / "checkpoint" / RUN_FOLDER)
    save(tmp_path / "checkpoint" / RUN_FOLDER, owners, EPOCH)
    return tmp_path / "checkpoint"


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_cache_has_the_very_files_and_a_member_finds_them(
    owners: RunStore, checkpoint: Path, tmp_path: Path
) -> None:
    restored = restore_run(checkpoint, tmp_path / "cache")
    assert (restored.place, restored.stages) == (place_of(checkpoint, owners.run_id), (0, 1, 2))
    assert files_below(folder_of_run(owners.run_id, tmp_path / "cache")) == files_below(checkpoint / RUN_FOLDER)
    store = RunStore.open(owners.run_id, tmp_path / "cache")
    assert store.missing() == [] and saved_stages(store) == {0, 1, 2}
    assert [path.name for path in (tmp_path / "cache" / "runs").iterdir()] == [owners.run_id.hex()]
    assert restore_run(checkpoint, tmp_path / "cache").place == restored.place  # again


def test_the_command_names_what_to_start_here_and_what_is_to_be_restored_elsewhere(
    owners: RunStore, checkpoint: Path, tmp_path: Path
) -> None:
    def restore(*flags: str) -> tuple[int, str, str]:
        command = ["run", "restore", str(checkpoint), "--cache-dir", str(tmp_path / "cache"), *flags]
        done = CliRunner().invoke(cli, command)
        return done.exit_code, done.stdout, done.stderr

    code, out, err = restore("--stage", "1", "--stage", "ends")
    assert (code, out) == (0, f"{owners.run_id.hex()}\n")
    lines = err.splitlines()
    assert lines[0].startswith(f"epoch {EPOCH} is here") and "MULTIADDR" in lines[1]
    assert "swarm-node run" in lines[1] and "--blocks 2:4" in lines[1] and "swarm train" in lines[2]
    assert lines[3] == "Restore elsewhere, with --stage:  0"
    assert saved_stages(RunStore.open(owners.run_id, tmp_path / "cache")) == {1, 2}
    code, _, err = restore("--stage", "3")
    assert code == 1 and "--stage 3 is no stage of this run; its stages are 0, 1, ends" in err


def test_only_the_files_of_the_stages_that_are_wanted_must_be_there(
    owners: RunStore, checkpoint: Path, tmp_path: Path
) -> None:
    for path in (checkpoint / RUN_FOLDER / "states").glob("stage[02]-*"):
        path.unlink()
    with pytest.raises(UserError, match="lacks a whole state of stage 0 and the ends: copy it again"):
        restore_run(checkpoint, tmp_path / "cache")
    assert place_of(checkpoint, owners.run_id) is None
    assert restore_run(checkpoint, tmp_path / "cache", ["1"]).stages == (1,)


def flip_last(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("states/stage1-*", flip_last, r"stage1-.* cannot be used \(the vectors do not have the digest"),
        ("states/stage1-*", lambda path: os.truncate(path, 1000), "lacks a whole state of stage 1"),
        ("states/stage1-*", Path.unlink, "lacks a whole state of stage 1"),
        ("tokenizer/tokenizer.json", flip_last, "lacks files that the run's rules name"),
        ("manifest.json", Path.unlink, "lacks files that the run's rules name"),
        ("spec.bin", flip_last, r"holds no run: spec.bin cannot be used \(the run spec"),
        ("spec.bin", Path.unlink, "export with --moments or --every"),
    ],
)
def test_a_torn_folder_is_refused_and_nothing_is_installed(
    checkpoint: Path, tmp_path: Path, name: str, damage: object, reason: str
) -> None:
    assert callable(damage)
    (path,) = (checkpoint / RUN_FOLDER).glob(name)
    damage(path)
    with pytest.raises(UserError, match=reason):
        restore_run(checkpoint, tmp_path / "cache")
    assert files_below(tmp_path / "cache") == {}


def test_what_is_of_another_run_or_of_several_epochs_is_refused(
    owners: RunStore, checkpoint: Path, tmp_path: Path
) -> None:
    other = make_run(tmp_path / "other", **{"model.seed": 4})
    assert place_of(checkpoint, other.run_id) is None
    states = checkpoint / RUN_FOLDER / "states"
    shutil.rmtree(states)
    save(checkpoint / RUN_FOLDER, other, EPOCH)
    with pytest.raises(UserError, match="lacks a whole state of stage 0 and stage 1 and the ends"):
        restore_run(checkpoint, tmp_path / "cache")
    shutil.rmtree(states)
    for stage in range(3):
        save(checkpoint / RUN_FOLDER, owners, EPOCH + stage, [stage])
    with pytest.raises(UserError, match="holds states of different epochs"):
        restore_run(checkpoint, tmp_path / "cache")
    assert files_below(tmp_path / "cache") == {}


def test_a_folder_of_exports_is_not_one_of_them(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    checkpoint.rename(tmp_path / "exports" / "epoch-000012")
    with pytest.raises(UserError, match=r"holds 1 exports: choose one, such as .*exports/epoch-000012"):
        restore_run(tmp_path / "exports", tmp_path / "cache")
    with pytest.raises(UserError, match=r"nothing cannot be restored: it has no run/spec.bin"):
        restore_run(tmp_path / "nothing", tmp_path / "cache")


def test_newer_states_on_this_disk_are_not_passed_over(owners: RunStore, checkpoint: Path, tmp_path: Path) -> None:
    here = owners.copy_to(folder_of_run(owners.run_id, tmp_path / "cache")).folder
    save(here, owners, EPOCH - 4)
    restore_run(checkpoint, tmp_path / "cache")
    assert [saved.place.epoch for saved in states_of(here, owners.run_id, 0).found()] == [EPOCH, EPOCH - 4]
    save(here, owners, EPOCH + 4, [1])
    before = files_below(here)
    with pytest.raises(
        UserError, match=rf"has a newer state of this run, of epoch {EPOCH + 4}: members .* go on from it"
    ):
        restore_run(checkpoint, tmp_path / "cache", ["0"])
    assert files_below(here) == before


def test_the_newest_orders_of_the_owner_stay_in_force(owners: RunStore, checkpoint: Path, tmp_path: Path) -> None:
    owner = Identity.load_or_create(owners.folder.parents[2] / "owner")
    raws = [sign_orders(Orders(serial=n, is_paused=n == 2), owners.run_id, owner) for n in range(1, 4)]
    RunStore.load(checkpoint / RUN_FOLDER).keep_orders(raws[1])
    assert restore_run(checkpoint, tmp_path / "cache").store.read_orders() == raws[1]
    here = RunStore.open(owners.run_id, tmp_path / "cache")
    here.keep_orders(raws[2])
    restore_run(checkpoint, tmp_path / "cache")
    assert here.read_orders() == raws[2]


def test_data_that_the_owner_has_amended_belongs_to_the_run(tmp_path: Path) -> None:
    owners = make_run(tmp_path / "owner")
    manifest = b"a list of other data"
    other = replace(owners.spec.data, manifest_digest=artifact_digest(manifest)[:16])
    orders = Orders(serial=1, amendments=(Amendment(epoch=20, data=other),))
    raw = sign_orders(orders, owners.run_id, Identity.load_or_create(tmp_path / "owner" / "owner"))
    assert RunCourse(owners).hear(raw)
    owners.put(other.manifest_digest, manifest)
    folder = tmp_path / "checkpoint" / RUN_FOLDER
    owners.copy_to(folder).keep_orders(raw)
    save(folder, owners, EPOCH)
    store = restore_run(tmp_path / "checkpoint", tmp_path / "cache").store
    assert RunCourse(store).newest == orders and store.missing() == [] and store.manifest(other) == manifest
    (folder / f"manifest-{other.manifest_digest.hex()}.json").unlink()
    with pytest.raises(UserError, match="lacks files that the run's rules name"):
        restore_run(tmp_path / "checkpoint", tmp_path / "cache")


def test_a_full_disk_leaves_the_cache_as_it_was(
    owners: RunStore, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes in .* and 100 are free"):
        restore_run(checkpoint, tmp_path / "cache")
    assert files_below(tmp_path / "cache") == {}
