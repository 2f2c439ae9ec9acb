"""A process that has imported everything and forks into our programs: their imports are most of their start.

What comes out is a process of its own, with its own p2pd, that runs the same command line to the same end; only its
interpreter was not started anew. Tests of the start itself use the real command line.
    python -m tests.support.fork_server DESCRIPTOR MODULE...     imports the modules and serves requests on an inherited socket
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from swarm.light_start import leave_out

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "bootstrap.runtime",
    "node.runtime",
    "node.training.runtime",
    "swarm.cli",
    "swarm.client.blocking",
    "swarm.client.terminal_chat",
    "swarm.client.training_run",
    "swarm.run_creation",
    "psutil",
    "pyarrow",
    "pyarrow.parquet",
    "sympy",  # which torch imports when a model is made without memory
    "torch.fx.experimental.symbolic_shapes",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation",
)
# What the modules read when they are imported: a fork cannot have it otherwise than its server.
READ_BY_IMPORTS = ("HF_", "HIVEMIND_", "HOME", "OMP_", "PYTHON", "TRANSFORMERS_", "XDG_")


def environment(changes: dict[str, str] | None = None) -> dict[str, str]:
    """Of every process that the tests start, by whichever way."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **(changes or {})}


class ForkServer:
    """The side of the tests."""

    def __init__(self, modules: Sequence[str] = MODULES) -> None:
        # What our programs set before they import torch.
        self._env = {**environment(), "OMP_WAIT_POLICY": "PASSIVE"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno()), *modules],
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
            )
        self._exits: dict[int, int] = {}
        self._forked: list[int] = []
        self._is_open = True
        self._asking = threading.Lock()
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def fork(
        self,
        command: Sequence[str],
        env: dict[str, str],
        *,
        stdout: IO[bytes] | int,
        stderr: IO[bytes] | int,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        text: bool = False,
    ) -> ForkedProcess:
        """Run [python, "-m", module, arguments...] or [python, file, arguments...] in a fork; else as subprocess.Popen.

        env: all of its environment. Raises ValueError where it differs in what the imports have read already.
        """
        env = {**env, "OMP_WAIT_POLICY": "PASSIVE"}
        differing = {name for name, _ in env.items() ^ self._env.items() if name.startswith(READ_BY_IMPORTS)}
        if differing:
            raise ValueError(
                f"a fork cannot have another {', '.join(sorted(differing))} than its server: start it anew"
            )
        with contextlib.ExitStack() as stack:
            pipes: list[IO[Any] | None] = []
            descriptors = []
            for stream, mode in ((stdin, "w"), (stdout, "r"), (stderr, "r")):
                pipe = None
                if stream == subprocess.PIPE:
                    reading, writing = os.pipe()
                    ours, descriptor = (writing, reading) if mode == "w" else (reading, writing)
                    pipe = os.fdopen(ours, mode if text else mode + "b")
                    stack.callback(os.close, descriptor)
                elif stream == subprocess.DEVNULL:
                    descriptor = os.open(os.devnull, os.O_RDWR)
                    stack.callback(os.close, descriptor)
                else:
                    descriptor = stream if isinstance(stream, int) else stream.fileno()
                pipes.append(pipe)
                descriptors.append(descriptor)
            request = json.dumps({"command": list(command[1:]), "env": env}) + "\n"
            return ForkedProcess(self, self._ask(request.encode(), descriptors), command, pipes)

    def _ask(self, request: bytes, descriptors: Sequence[int]) -> int:
        """The pid of a new fork."""
        with self._asking:
            number = len(self._forked)
            socket.send_fds(self._socket, [request], descriptors)
            with self._changed:
                done = self._changed.wait_for(lambda: len(self._forked) > number or not self._is_open, timeout=90)
            if not done or len(self._forked) == number:
                self._errors.seek(0)
                raise AssertionError(f"the fork server did not fork:\n{self._errors.read().decode(errors='replace')}")
            return self._forked[number]

    def exit_code(self, pid: int, timeout_s: float | None) -> int | None:
        """None if the process is still running after timeout_s."""
        with self._changed:
            self._changed.wait_for(lambda: pid in self._exits or not self._is_open, timeout=timeout_s)
            return self._exits.get(pid)

    def running(self) -> list[int]:
        """Pids of the forks that have not ended."""
        with self._changed:
            return [pid for pid in self._forked if pid not in self._exits]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)
        self._popen.wait(20)
        self._reader.join(5)
        self._socket.close()
        self._errors.close()

    def _read(self) -> None:
        with self._socket.makefile("r") as lines:
            for line in lines:
                event = json.loads(line)
                with self._changed:
                    if "code" in event:
                        self._exits[event["pid"]] = event["code"]
                    else:
                        self._exits.pop(event["pid"], None)  # a pid that comes again
                        self._forked.append(event["pid"])
                    self._changed.notify_all()
        with self._changed:
            self._is_open = False
            self._changed.notify_all()


class ForkedProcess:
    """As far as tests need it, a subprocess.Popen."""

    def __init__(self, server: ForkServer, pid: int, command: Sequence[str], pipes: Sequence[IO[Any] | None]) -> None:
        self._server, self._command = server, command
        self.pid = pid
        self.stdin, self.stdout, self.stderr = pipes

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._server.exit_code(self.pid, 0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._server.exit_code(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(self._command), timeout or 0)
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
        message, descriptors, _, _ = socket.recv_fds(requests, 65536, 3)
        while message and not message.endswith(b"\n"):
            message += requests.recv(65536)
        if not message:
            return None
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
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


def _become(request: dict[str, Any]) -> None:
    """Be the interpreter that was asked for, and run its program."""
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None  # of the server's TMPDIR
    if "numpy" in sys.modules:  # the others' generators reseed themselves in a fork, or begin the same in each process
        sys.modules["numpy"].random.seed()
    program, *arguments = request["command"]
    if program == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")


def _end(code: str | int | None) -> NoReturn:
    """What the interpreter does at its end, but for taking apart all modules: that copies each page shared with the server (0.4 s)."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code or 0)


def _warm_up() -> None:
    """What every program does once, and imports for it: parse an address; cut a model."""
    from hivemind.utils.multiaddr import Multiaddr
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from swarm.identity import Identity

    str(Multiaddr(f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"))
    get_checkpoint_conversion_mapping("llama")


def main() -> None:
    descriptor, *modules = sys.argv[1:]
    leave_out()
    gc.disable()  # looking for garbage takes a quarter of the time of these imports
    for module in modules:
        importlib.import_module(module)
    _warm_up()
    assert threading.active_count() == 1, f"a fork has one thread, its server has {threading.enumerate()}"
    gc.freeze()  # so that a collection in a fork does not copy the pages of what it shares
    gc.enable()
    for finalizer in weakref.finalize._registry.values():  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch takes its operators apart, which copies 9000 pages of a fork that ends
    request = serve(socket.socket(fileno=int(descriptor)))
    if request is not None:
        try:
            _become(request)
        except SystemExit as end:
            _end(end.code)
        _end(None)


if __name__ == "__main__":
    main()
