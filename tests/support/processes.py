"""Real processes for tests: bootstrap peers and nodes started through their command lines, with their logs and traces."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.fork_server import ROOT, ForkServer, environment

READY_TIMEOUT_S = 90


class Process:
    """One of our programs. Its stdout is read for the READY line, its stderr goes to a log file.

    With a fork server the command must be [python, "-m", module, arguments...].
    """

    def __init__(
        self,
        command: list[str],
        log_path: Path,
        env: dict[str, str] | None = None,
        fork_server: ForkServer | None = None,
    ) -> None:
        self.log_path = log_path
        self._log = log_path.open("wb")
        self._popen: Any
        if fork_server is not None:
            self._popen = fork_server.fork(command, environment(env), stdout=subprocess.PIPE, stderr=self._log)
        else:
            self._popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(env),
                stdout=subprocess.PIPE,
                stderr=self._log,
                stdin=subprocess.DEVNULL,
            )
        self._ready: dict[str, Any] | None = None
        self._saw_ready = threading.Event()
        self._reader = threading.Thread(target=self._read_stdout, daemon=True)
        self._reader.start()

    def _read_stdout(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            if line.startswith(b"READY "):
                self._ready = json.loads(line[6:])
                self._saw_ready.set()
        self._saw_ready.set()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def ready(self) -> dict[str, Any]:
        """The READY line's fields, once it came. Fails with the log if the process ends or takes too long."""
        self._saw_ready.wait(READY_TIMEOUT_S)
        if self._ready is None:
            raise AssertionError(
                f"no READY from {self.log_path.name} (exit code {self._popen.poll()}):\n{self.log[-3000:]}"
            )
        return self._ready

    @property
    def address(self) -> str:
        return str(self.ready()["addresses"][0])

    @property
    def peer_id(self) -> str:
        return str(self.ready()["peer_id"])

    def p2pd_pids(self) -> list[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(self.pid).children() if child.name() == "p2pd"]
        return []

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        return int(self._popen.wait(timeout_s))

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def stop(self, timeout_s: float = 20) -> int | None:
        """SIGTERM (after SIGCONT, if it was frozen), then SIGKILL. The exit code."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGCONT)
            self._popen.terminate()
            try:
                self._popen.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._reader.join(5)
        assert self._popen.stdout is not None
        self._popen.stdout.close()
        self._log.close()
        code: int | None = self._popen.returncode
        return code


@dataclass(slots=True)
class LocalSwarm:
    """Bootstrap peers and nodes on this machine."""

    folder: Path
    bootstrap: Process
    processes: list[Process] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    fork_server: ForkServer | None = None
    """Given: bootstrap peers and nodes are forked from it, which is quick."""

    @property
    def initial_peers(self) -> list[str]:
        return [self.bootstrap.address]

    def start_node(
        self,
        model: Path | str,
        blocks: str | None,
        *flags: str,
        fault: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        s_per_block: float | None = None,
        real_command: bool = False,
        initial_peers: list[str] | None = None,
        threads: int | None = 1,
        precision: str = "fp32",
    ) -> Process:
        """Start a node without waiting for it. threads: None leaves them to the node.

        precision: in fp32 what a node computes is that of one process, but for the order of additions.
        fault: see tests/support/faulty_node.py. s_per_block: what the node announces, so that routes are predictable.
        real_command: python -m node, also when there is a fork server.
        """
        name = f"node{len(self.processes)}"
        fork_server = None if real_command else self.fork_server
        module = "node" if fault is None and s_per_block is None else "tests.support.faulty_node"
        environment = {
            **self.env,
            "FAULT_FILE": str(self.folder / f"{name}.fault"),
            "FAULT_TRACE": str(self.folder / f"{name}.trace"),
            **(env or {}),
        }
        if s_per_block is not None:
            environment["ANNOUNCED_S_PER_BLOCK"] = str(s_per_block)
        if fault is not None:
            _write_fault(self.folder / f"{name}.fault", fault)
        command = [sys.executable, "-m", module, "run"]
        command += ["--model", str(model), "--initial-peers", ",".join(initial_peers or self.initial_peers)]
        command += ["--drain-timeout", "2", "--precision", precision]
        command += ["--threads", str(threads)] if threads else []
        command += ["--blocks", blocks] if blocks else []
        process = Process([*command, *flags], self.folder / f"{name}.log", environment, fork_server)
        self.processes.append(process)
        return process

    def start_nodes(self, model: Path | str, *spans: str, **options: Any) -> list[Process]:
        """Start nodes together and wait until all are ready."""
        nodes = [self.start_node(model, span, **options) for span in spans]
        for node in nodes:
            node.ready()
        return nodes

    def start_bootstrap(self, name: str, *flags: str) -> Process:
        """A further bootstrap peer, without waiting for it; a name's identity is kept."""
        log_path = self.folder / f"{name}-{len(self.processes)}.log"
        process = _start_bootstrap(self.folder, name, log_path, self.env, self.fork_server, *flags)
        self.processes.append(process)
        return process

    def plant(self, node: Process, action: str | None, at_step: int = 1, **details: Any) -> int:
        """Plant a fault in a running node, which forgets its last one: it fires on the at_step-th step from now. Its id.

        The node must have been started with a fault, or with s_per_block.
        """
        return _write_fault(node.log_path.with_suffix(".fault"), {"action": action, "at_step": at_step, **details})

    def trace_of(self, node: Process) -> list[dict[str, Any]]:
        """The events that a faulty node wrote down before each fault."""
        path = node.log_path.with_suffix(".trace")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


_fault_ids = itertools.count(1)


def _write_fault(path: Path, fault: dict[str, Any]) -> int:
    number = next(_fault_ids)
    path.with_suffix(".new").write_text(json.dumps({"at_step": 1, **fault, "id": number}))
    path.with_suffix(".new").replace(path)
    return number


def _start_bootstrap(
    folder: Path, name: str, log_path: Path, env: dict[str, str], fork_server: ForkServer | None, *flags: str
) -> Process:
    command = [sys.executable, "-m", "bootstrap", "--identity", str(folder / f"{name}.identity"), *flags]
    return Process(command, log_path, env, fork_server)


@contextlib.contextmanager
def local_swarm(
    folder: Path, *, env: dict[str, str] | None = None, fork_server: ForkServer | None = None
) -> Iterator[LocalSwarm]:
    """A swarm with a bootstrap peer; everything is stopped at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    bootstrap = _start_bootstrap(folder, "bootstrap", folder / "bootstrap.log", env or {}, fork_server)
    swarm = LocalSwarm(folder, bootstrap, env=env or {}, fork_server=fork_server)
    try:
        bootstrap.ready()
        yield swarm
    finally:
        stop_all([*swarm.processes, bootstrap])


def stop_all(processes: list[Process]) -> None:
    """Stop processes beside each other."""
    for process in processes:
        if process.is_running():
            process.send(signal.SIGCONT)
            process.send(signal.SIGTERM)
    for process in processes:
        process.stop()


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Poll a condition until it holds; fail with `what` after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s} s still not: {what}")
        time.sleep(0.02)
