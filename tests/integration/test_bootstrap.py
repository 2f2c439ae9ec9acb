"""Bootstrap peers: a stable address, a join command that works as printed, several of them, and an end without leftovers."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.p2p.runtime_dir import runtime_root
from tests.support.fork_server import ForkServer
from tests.support.models import save_tiny
from tests.support.probes import run_program
from tests.support.processes import Process, wait_until


class Bootstraps:
    """Bootstrap peers whose identities and logs are in one folder."""

    def __init__(self, folder: Path, fork_server: ForkServer) -> None:
        self.folder, self.fork_server = folder, fork_server
        self.started: list[Process] = []

    def start(self, name: str, *flags: str, real_command: bool = False) -> Process:
        command = [sys.executable, "-m", "bootstrap", "--identity", str(self.folder / f"{name}.identity"), *flags]
        fork_server = None if real_command else self.fork_server
        process = Process(command, self.folder / f"{name}-{len(self.started)}.log", fork_server=fork_server)
        self.started.append(process)
        return process


@pytest.fixture
def bootstraps(tmp_path: Path, fork_server: ForkServer) -> Iterator[Bootstraps]:
    bootstraps = Bootstraps(tmp_path, fork_server)
    yield bootstraps
    for process in bootstraps.started:
        process.stop()


def directories_of(pid: int) -> list[Path]:
    root = runtime_root()
    return list(root.glob(f"{pid}-*")) if root.exists() else []


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text()


def stop_cleanly(process: Process, number: signal.Signals = signal.SIGTERM) -> None:
    """End a process with a signal: exit code 0, in time, and neither p2pd nor a socket stays."""
    pid, p2pd = process.pid, process.p2pd_pids()
    assert len(p2pd) == 1 and len(directories_of(pid)) == 1
    process.send(number)
    assert process.wait(10) == 0, process.log
    wait_until(lambda: not any(map(is_alive, p2pd)), 5, "p2pd gone")
    assert directories_of(pid) == []


def test_a_bootstrap_peer_says_ready_and_leaves_nothing_behind(bootstraps: Bootstraps) -> None:
    process = bootstraps.start("a", real_command=True)
    ready = process.ready()
    assert ready["pid"] == process.pid
    assert ready["addresses"] and all(a.endswith(f"/p2p/{ready['peer_id']}") for a in ready["addresses"])
    stop_cleanly(process)
    assert "Traceback" not in process.log and "destroyed" not in process.log


def test_ctrl_c_ends_it_as_well(bootstraps: Bootstraps) -> None:
    process = bootstraps.start("a")
    process.ready()
    stop_cleanly(process, signal.SIGINT)


def test_the_peer_id_is_the_same_after_a_restart_and_after_a_kill(bootstraps: Bootstraps) -> None:
    first = bootstraps.start("a")
    peer_id = first.peer_id
    p2pd = first.p2pd_pids()
    first.send(signal.SIGKILL)
    first.wait(5)
    # As where SHARDSWARM_INITIAL_PEERS holds its own address.
    second = bootstraps.start("a", "--initial-peers", first.address)
    assert second.peer_id == peer_id
    wait_until(lambda: not any(map(is_alive, p2pd)), 5, "the killed peer's p2pd gone")
    assert directories_of(first.pid) == [], "swept by the second start"
    assert bootstraps.start("b").peer_id != peer_id
    assert (bootstraps.folder / "a.identity").stat().st_mode & 0o777 == 0o600


def test_the_printed_command_joins_as_it_is_printed_and_a_second_bootstrap_peer_carries_on_alone(
    bootstraps: Bootstraps, fork_server: ForkServer, tmp_path: Path
) -> None:
    first = bootstraps.start("first")
    second = bootstraps.start("second", "--initial-peers", first.address)
    second.ready()
    model = save_tiny("llama", tmp_path / "tiny")

    def printed(process: Process, label: str) -> list[str]:
        """The command after a label, with this test's model; console scripts are beside our interpreter."""
        wait_until(lambda: label in process.log, 5, f"{label} in the log")
        line = next(line for line in process.log.splitlines() if line.startswith(label))
        program, *arguments = shlex.split(line.removeprefix(label))
        script = Path(sysconfig.get_path("scripts")) / program
        assert script.exists(), f"{program} is not installed"
        return [sys.executable, str(script), *(str(model) if word == "smollm2-135m" else word for word in arguments)]

    node = Process([*printed(first, "Host blocks:"), "--drain-timeout", "1"], tmp_path / "node.log", None, fork_server)
    bootstraps.started.append(node)
    assert node.ready()["span"] == "0:4"

    first.send(signal.SIGKILL)
    first.wait(5)
    # The first is gone: who joins by the second still finds the node.
    command = printed(second, "Generate:")
    generate = Process([*command, "--max-new-tokens", "2", "--json"], tmp_path / "generate.log", None, fork_server)
    bootstraps.started.append(generate)
    assert generate.wait(60) == 0, generate.log
    status = run_program("swarm", "status", "--initial-peers", second.address, fork_server=fork_server)
    assert status.code == 0 and "all blocks served" in status.out, status
    # One address of several that works is enough.
    peers = f"{first.address},{second.address}"
    both = run_program("swarm", "status", "--initial-peers", peers, "--timeout", "5", fork_server=fork_server)
    assert both.code == 0 and "all blocks served" in both.out, both
    assert node.is_running() and os.path.exists(f"/proc/{node.pid}")
    stop_cleanly(node)
    stop_cleanly(second)
