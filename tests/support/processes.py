"""Real processes for tests: bootstrap peers and nodes started through their command lines, with their logs and traces."""

from __future__ import annotations

import contextlib
import json
import os
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

READY_TIMEOUT_S = 90
ROOT = Path(__file__).resolve().parents[2]


class Process:
    """One of our programs. Its stdout is read for the READY line, its stderr goes to a log file."""

    def __init__(self, command: list[str], log_path: Path, env: dict[str, str] | None = None) -> None:
        self.log_path = log_path
        self._log = log_path.open("wb")
        self._popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
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
        return self._popen.wait(timeout_s)

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
        return self._popen.returncode


@dataclass(slots=True)
class LocalSwarm:
    """A bootstrap peer and nodes on this machine."""

    folder: Path
    bootstrap: Process
    processes: list[Process] = field(default_factory=list)

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
    ) -> Process:
        """Start a node without waiting for it. fault: see tests/support/faulty_node.py; its trace is at node.trace_path."""
        name = f"node{len(self.processes)}"
        command = [sys.executable, "-m", "node"]
        environment = dict(env or {})
        if fault is not None:
            command = [sys.executable, "-m", "tests.support.faulty_node"]
            environment |= {"FAULT": json.dumps(fault), "FAULT_TRACE": str(self.folder / f"{name}.trace")}
        command += [
            "run",
            "--model",
            str(model),
            "--initial-peers",
            self.bootstrap.address,
            "--threads",
            "1",
            "--drain-timeout",
            "2",
        ]
        command += ["--blocks", blocks] if blocks else []
        process = Process([*command, *flags], self.folder / f"{name}.log", environment)
        self.processes.append(process)
        return process

    def start_nodes(self, model: Path | str, *spans: str) -> list[Process]:
        """Start nodes together and wait until all are ready."""
        nodes = [self.start_node(model, span) for span in spans]
        for node in nodes:
            node.ready()
        return nodes

    def trace_of(self, node: Process) -> list[dict[str, Any]]:
        """The events that a faulty node wrote down before each fault."""
        path = node.log_path.with_suffix(".trace")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def local_swarm(folder: Path) -> Iterator[LocalSwarm]:
    """A swarm with a bootstrap peer; everything is stopped at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = folder / "bootstrap.identity"
    bootstrap = Process([sys.executable, "-m", "bootstrap", "--identity", str(identity)], folder / "bootstrap.log")
    swarm = LocalSwarm(folder, bootstrap)
    try:
        bootstrap.ready()
        yield swarm
    finally:
        for process in [*swarm.processes, bootstrap]:
            if process.is_running():
                process.send(signal.SIGCONT)
                process.send(signal.SIGTERM)
        for process in [*swarm.processes, bootstrap]:
            process.stop()


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Poll a condition until it holds; fail with `what` after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s} s still not: {what}")
        time.sleep(0.02)
