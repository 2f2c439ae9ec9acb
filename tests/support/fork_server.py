"""A process that has imported everything and forks into nodes and bootstrap peers: their imports are most of their start.

What comes out is a process of its own, with its own p2pd, that runs the same command line to the same end; only its
interpreter was not started anew. Tests of the start itself use the real command line.
    python -m tests.support.fork_server DESCRIPTOR     serves requests on an inherited socket
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "bootstrap.runtime",
    "node.runtime",
    "tests.support.faulty_node",
    "tests.support.training_member",
    "node.training.runtime",
    "swarm.client.training_run",
    "pyarrow",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation",
)


class ForkServer:
    """The side of the tests. fork() may be called by one thread at a time."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **env},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._exits: dict[int, int] = {}
        self._forked: list[int] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def fork(self, module: str, arguments: Sequence[str], env: dict[str, str], log: IO[bytes]) -> ForkedProcess:
        """Run a module's main() with these arguments in a fork; its stderr goes to log."""
        reading, writing = os.pipe()
        with self._changed:
            number = len(self._forked)
        request = json.dumps({"module": module, "arguments": list(arguments), "env": env}) + "\n"
        socket.send_fds(self._socket, [request.encode()], [writing, log.fileno()])
        os.close(writing)
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._forked) > number, timeout=60):
                raise AssertionError("the fork server did not fork within 60 s")
            pid = self._forked[number]
        return ForkedProcess(self, pid, os.fdopen(reading, "rb"))

    def exit_code(self, pid: int, timeout_s: float) -> int | None:
        """None if the process is still running after timeout_s."""
        with self._changed:
            self._changed.wait_for(lambda: pid in self._exits, timeout=timeout_s)
            return self._exits.get(pid)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)
        self._popen.wait(10)
        self._reader.join(5)
        self._socket.close()

    def _read(self) -> None:
        with self._socket.makefile("r") as lines:
            for line in lines:
                event = json.loads(line)
                with self._changed:
                    if "code" in event:
                        self._exits[event["pid"]] = event["code"]
                    else:
                        self._forked.append(event["pid"])
                    self._changed.notify_all()


class ForkedProcess:
    """As far as tests need it, a subprocess.Popen."""

    def __init__(self, server: ForkServer, pid: int, stdout: IO[bytes]) -> None:
        self._server = server
        self.pid, self.stdout = pid, stdout

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._server.exit_code(self.pid, 0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._server.exit_code(self.pid, 600 if timeout is None else timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 600)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for every request and report every exit. Returns None at the end of the socket, and in each fork its request."""
    woken, wake = os.pipe()
    for descriptor in (woken, wake):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for pytest, which then stops the nodes in order
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        readable, _, _ = select.select([requests, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _report_exits(requests)
        if requests not in readable:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, 65536, 2)
        while message and not message.endswith(b"\n"):
            message += requests.recv(65536)
        if not message:
            return None
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.dup2(descriptors[0], 1)
            os.dup2(descriptors[1], 2)
            for descriptor in (*descriptors, woken, wake):
                os.close(descriptor)
            requests.close()
            request: dict[str, Any] = json.loads(message)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        requests.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def _report_exits(requests: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError, BrokenPipeError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            event = {"pid": pid, "code": os.waitstatus_to_exitcode(status)}
            requests.sendall(json.dumps(event).encode() + b"\n")


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        return
    os.environ.update(request["env"])
    sys.argv = [request["module"], *request["arguments"]]
    importlib.import_module(request["module"]).main()


if __name__ == "__main__":
    main()
