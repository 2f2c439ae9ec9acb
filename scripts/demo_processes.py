"""The processes of a demo: a swarm on this machine, each process started through its public command line.

Every process has a process group of its own: a Ctrl-C reaches only the demo, which then stops them in order. Signal handlers
only set a flag that every wait looks at; so no signal can arrive between the start of a process and its entry in our list.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from swarm.cache import cache_root

BIN = Path(sys.executable).parent
NUM_KEPT_LOGS = 5

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05

# Ends the process groups whose ids it has read, once its input ends: that is, when the demo is gone, kill -9 included.
# A shell and a pipe work everywhere; Linux's PDEATHSIG does not exist on macOS, and reaches no grandchildren.
WATCHDOG = """
trap '' INT TERM HUP
groups=
while read -r group; do groups="$groups -$group"; done
[ -n "$groups" ] || exit 0
kill -s TERM -- $groups 2>/dev/null
sleep 5
kill -s KILL -- $groups 2>/dev/null
"""


class DemoError(Exception):
    """Something did not work; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path | None = None  # None: attached to the terminal

    def ready(self) -> dict[str, Any] | None:
        """What the process printed behind READY, once it did."""
        assert self.log is not None
        match = re.search(r"READY (\{.*\})\n", self.log.read_text(encoding="utf-8", errors="replace"))
        return json.loads(match[1]) if match else None


class DemoSwarm:
    """Our processes, of which every one that was started is stopped in the end."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.console = Console(stderr=True)
        self.children: list[Child] = []
        self.stop_signal: int | None = None
        self.num_signals = 0
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._on_signal)
        self.watchdog = subprocess.Popen(["/bin/sh", "-c", WATCHDOG], stdin=subprocess.PIPE, process_group=0)

    def _on_signal(self, signum: int, _frame: object) -> None:
        self.stop_signal = signum
        self.num_signals += 1

    def start_bootstrap(self) -> str:
        """Start the bootstrap peer; returns its address once it serves."""
        identity = str(self.logs / "bootstrap.id")
        listen = ("--listen", "/ip4/127.0.0.1/tcp/0")
        bootstrap = self.start("bootstrap", "swarm-bootstrap", *listen, "--identity", identity)
        return str(self.wait_ready([bootstrap])[0]["addresses"][0])

    def start(self, name: str, program: str, *arguments: str) -> Child:
        log = self.logs / f"{name}.log"
        with log.open("wb") as output:
            return self._spawn(name, program, arguments, log, output)

    def _spawn(
        self, name: str, program: str, arguments: Sequence[str], log: Path | None, output: IO[bytes] | None
    ) -> Child:
        try:
            process = subprocess.Popen(
                [str(BIN / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                process_group=0,
            )
        except OSError as error:
            raise DemoError(f"cannot start {BIN / program}: {error.strerror}") from error
        child = Child(name, process, log)
        self.children.append(child)
        assert self.watchdog.stdin is not None
        self.watchdog.stdin.write(b"%d\n" % process.pid)
        self.watchdog.stdin.flush()
        return child

    def attached(self, name: str, program: str, *arguments: str) -> None:
        """Run a command on this terminal to its end."""
        self.finish(self._spawn(name, program, arguments, None, None))

    def finish(self, child: Child) -> None:
        """Wait until a process has done its work. Raises DemoError if it could not."""
        while child.process.poll() is None:
            self.wait(may_end=(child,))
        self.children.remove(child)
        if child.process.returncode != 0:
            raise DemoError(f"{child.name} failed ({how_ended(child.process)}){last_lines(child)}; logs: {self.logs}")

    def kill(self, child: Child) -> None:
        """As if its machine lost power: SIGKILL to the process and whatever it has started."""
        self.children.remove(child)
        _kill_group(child)

    def wait_ready(
        self, children: Sequence[Child], on_progress: Callable[[int], object] = lambda _: None
    ) -> list[dict[str, Any]]:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            answers = [child.ready() for child in children]
            ready = [answer for answer in answers if answer is not None]
            on_progress(len(ready))
            if len(ready) == len(children):
                return ready
            if time.monotonic() > deadline:
                late = next(child for child, answer in zip(children, answers, strict=True) if answer is None)
                raise DemoError(f"{late.name} was not ready within {READY_TIMEOUT_S:.0f} s{last_lines(late)}")
            self.wait()

    def wait(self, may_end: Collection[Child] = ()) -> None:
        """Sleep a moment; raises KeyboardInterrupt after a signal, DemoError when a process but those of `may_end` has died."""
        time.sleep(POLL_S)
        if self.stop_signal is not None:
            raise KeyboardInterrupt
        for child in self.children:
            if child not in may_end and child.process.poll() is not None:
                raise DemoError(f"{child.name} ended early ({how_ended(child.process)}){last_lines(child)}")

    def stop(self) -> None:
        """Clients first, so that they can free their sessions; then the nodes together; the bootstrap peer last."""
        nodes = [child for child in self.children if child.name.startswith("node")]
        bootstrap = [child for child in self.children if child.name == "bootstrap"]
        clients = [child for child in self.children if child not in (*nodes, *bootstrap)]
        for stage, signum in ((clients, signal.SIGINT), (nodes, signal.SIGTERM), (bootstrap, signal.SIGTERM)):
            self._stop_together(stage, signum)
        assert self.watchdog.stdin is not None
        # Kill it rather than let it read the end of its input: the groups are gone and their ids may be used again.
        self.watchdog.kill()
        self.watchdog.stdin.close()
        self.watchdog.wait()

    def _stop_together(self, children: Sequence[Child], signum: int) -> None:
        for child in children:
            child.process.send_signal(signum)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        impatient = self.num_signals + 1
        # A further Ctrl-C does not wait for the rest.
        while time.monotonic() < deadline and self.num_signals < impatient:
            if all(child.process.poll() is not None for child in children):
                break
            time.sleep(POLL_S)
        for child in children:
            _kill_group(child)


def _kill_group(child: Child) -> None:
    """The process, and what it left in its group if it crashed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()


def how_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def last_lines(child: Child, num_lines: int = 15) -> str:
    if child.log is None:
        return ""
    lines = child.log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
    return f"; the end of {child.log}:\n" + "\n".join(f"    {line}" for line in lines)


def make_log_folder() -> Path:
    """A new folder for this run; the oldest ones beyond NUM_KEPT_LOGS are removed."""
    folder = cache_root() / "demo"
    logs = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        logs.mkdir(parents=True)
    except OSError as error:
        raise DemoError(f"cannot make {logs}: {error.strerror}; set SHARDSWARM_CACHE to a folder that works") from error
    for old in sorted(path for path in folder.iterdir() if path.is_dir())[:-NUM_KEPT_LOGS]:
        shutil.rmtree(old, ignore_errors=True)
    return logs
