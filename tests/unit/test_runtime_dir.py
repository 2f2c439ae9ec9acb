"""Private directories: one for each process, gone with it, swept by the next when it was killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.errors import UserError
from swarm.p2p import runtime_dir
from swarm.p2p.runtime_dir import private_directory, runtime_root, sweep
from tests.support.processes import ROOT

HOLDER = (
    "from swarm.p2p.runtime_dir import private_directory\n"
    "with private_directory() as directory:\n"
    "    (directory / 'socket').touch()\n"
    "    print(directory, flush=True)\n"
    "    input()\n"
)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of our own: other tests, and other sessions on this machine, use the real one."""
    root = tmp_path / "r"
    monkeypatch.setattr(runtime_dir, "runtime_root", lambda: root)
    return root


def start_holder(root: Path) -> tuple[subprocess.Popen[str], Path]:
    script = (
        f"import pathlib, swarm.p2p.runtime_dir as r\nr.runtime_root = lambda: pathlib.Path({str(root)!r})\n{HOLDER}"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    return holder, Path(holder.stdout.readline().strip())


def test_a_directory_is_private_and_gone_after_a_clean_exit_with_the_root(root: Path) -> None:
    with private_directory() as directory:
        assert directory.parent == root and stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        (directory / "file").touch()
    assert not root.exists()


def test_a_directory_is_removed_when_its_block_fails(root: Path) -> None:
    with pytest.raises(RuntimeError), private_directory():
        raise RuntimeError
    assert not root.exists()


def test_what_a_killed_process_left_is_swept_by_the_next_start_and_a_living_one_is_not(root: Path) -> None:
    dead, left = start_holder(root)
    alive, kept = start_holder(root)
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert (left / "socket").exists()
        with private_directory() as own:
            assert not left.exists() and (kept / "socket").exists()
            assert own != kept
    finally:
        alive.communicate("\n")
        dead.communicate()
    assert alive.returncode == 0 and not root.exists()


def test_a_frozen_process_keeps_its_directory(root: Path) -> None:
    frozen, directory = start_holder(root)
    frozen.send_signal(signal.SIGSTOP)
    try:
        with private_directory():
            assert directory.exists()
    finally:
        frozen.send_signal(signal.SIGCONT)
        frozen.communicate("\n")


def test_a_reused_pid_does_not_keep_a_dead_directory(root: Path) -> None:
    stale = root / f"{os.getpid()}-stale"
    stale.mkdir(parents=True)
    (stale / "lock").touch()
    (root / "no-lock-yet").mkdir()
    assert sorted(path.name for path in sweep(root)) == sorted([stale.name, "no-lock-yet"])
    assert not any(root.iterdir())


def test_two_directories_of_one_process_do_not_disturb_each_other(root: Path) -> None:
    with private_directory() as first:
        with private_directory() as second:
            assert first != second
        assert first.exists() and not second.exists()


def test_a_root_that_cannot_be_used_is_named_with_a_way_out(root: Path) -> None:
    root.write_text("a file")
    with pytest.raises(UserError, match=r"cannot make a private directory in .*; set TMPDIR to a folder that works"):
        with private_directory():
            pass


def test_a_root_that_is_a_link_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="belongs to another user; remove it or set TMPDIR"):
        with private_directory():
            pass


def test_socket_paths_stay_short_enough_whatever_tmpdir_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_dir.tempfile, "gettempdir", lambda: "/" + "long/" * 40)
    assert len(str(runtime_root())) <= 60
