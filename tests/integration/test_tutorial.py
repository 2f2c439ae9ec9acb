"""docs/tutorial.md, typed as it stands: three friends with a folder, a cache and terminals of their own.

A terminal is a bash. What it finds as swarm, swarm-node, swarm-bootstrap and python asks the fork server for the real program, with
the terminal's folder, environment and output. Only what the page tells the reader to change is changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.fork_server import ROOT, ForkedProcess, ForkServer, environment
from tests.support.processes import wait_until

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
PROGRAMS = {"swarm": "swarm", "swarm-node": "node", "swarm-bootstrap": "bootstrap"}
# What the page calls being in a hurry.
NUM_EPOCHS = 40
HURRY = {
    "target_batch = 8": "target_batch = 2",
    "checkpoint_every = 20": "checkpoint_every = 15",
    "epochs = 300": f"epochs = {NUM_EPOCHS}",
    "--epoch 300": f"--epoch {NUM_EPOCHS}",
}
PORTS = ("31337", "31338", "31339", "31340", "31341")
COMMAND_TIMEOUT_S = 120.0

# Stands for a program in a terminal: hands its arguments, folder, environment and output over, and ends as the program does.
STAND_IN = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as door:
    door.connect(os.environ["TUTORIAL_DOOR"])
    request = {"command": [sys.argv[1], *sys.argv[2:]], "folder": os.getcwd(), "env": dict(os.environ)}
    socket.send_fds(door, [json.dumps(request).encode() + b"\\n"], [1, 2])
    code = door.makefile().readline()
sys.exit(int(code))
"""
# Runs in the fork: goes to the terminal's folder, and is the program there.
PROGRAM = """
import os, runpy, sys
_, folder, kind, *sys.argv = sys.argv
os.chdir(folder)
sys.path[0] = folder
(runpy.run_module if kind == "module" else runpy.run_path)(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block."""

    language: str
    title: str
    """What its first line says behind the #; of text blocks empty."""
    code: str

    @property
    def terminal(self) -> str:
        """Such as "Ada, terminal 1"."""
        return ", ".join(self.title.split(", ")[:2])

    @property
    def keeps_running(self) -> bool:
        return self.title.endswith("keeps running")


def read_blocks(page: str) -> list[Block]:
    blocks = []
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S):
        first = code.partition("\n")[0]
        blocks.append(Block(language, first.removeprefix("# ") if first.startswith("# ") else "", code))
    return blocks


class Door:
    """Where stand-ins ask for their programs."""

    def __init__(self, folder: Path, fork_server: ForkServer) -> None:
        self._fork_server = fork_server
        self.path = folder / "door"
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "stand_in.py").write_text(STAND_IN)
        (folder / "program.py").write_text(PROGRAM)
        self._program = str(folder / "program.py")
        for name in (*PROGRAMS, "python"):
            script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -ES {shlex.quote(str(folder / "stand_in.py"))} {name} "$@"\n'
            (self.bin / name).write_text(script)
            (self.bin / name).chmod(0o755)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self.path))
        self._socket.listen()
        self.running: dict[str, ForkedProcess] = {}
        """What runs in each terminal."""
        self._started: list[ForkedProcess] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            message, descriptors, _, _ = socket.recv_fds(connection, 65536, 2)
            while not message.endswith(b"\n"):
                message += connection.recv(65536) or b"\n"
            request: dict[str, Any] = json.loads(message)
            name, *arguments = request["command"]
            kind = ["module", PROGRAMS[name]] if name in PROGRAMS else ["file"]
            command = [sys.executable, self._program, request["folder"], *kind, *arguments]
            process = self._fork_server.fork(command, request["env"], stdout=descriptors[0], stderr=descriptors[1])
            for descriptor in descriptors:
                os.close(descriptor)
            self.running[request["env"]["TUTORIAL_TERMINAL"]] = process
            self._started.append(process)
            connection.sendall(b"%d\n" % process.wait())

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()
        for process in self._started:
            process.kill()
        for process in self._started:
            process.wait(60)


class Terminal:
    """A bash to type into, and what it has shown."""

    def __init__(self, name: str, folder: Path, door: Door, cache: Path, log: Path) -> None:
        self.name, self._door, self._log = name, door, log
        self._num_typed = 0
        self.last = ""
        variables = {
            "PATH": f"{door.bin}:{os.environ['PATH']}",
            "SHARDSWARM_CACHE": str(cache),
            "TUTORIAL_DOOR": str(door.path),
            "TUTORIAL_TERMINAL": name,
            "COLUMNS": "200",
        }
        with log.open("wb") as output:
            self._bash = subprocess.Popen(
                ["bash", "--norc"], cwd=folder, env=environment(variables), stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    @property
    def shown(self) -> str:
        return self._log.read_text(errors="replace")

    def type(self, code: str) -> None:
        """Without waiting. A terminal whose last command still runs does it afterwards."""
        self.last = code.strip().splitlines()[-1]
        self._num_typed += 1
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{code}\necho END {self._num_typed} CODE $?\n")
        self._bash.stdin.flush()

    def code(self) -> int | None:
        """The exit code of what was typed last; None: it has not ended."""
        found = re.search(rf"^END {self._num_typed} CODE (\d+)$", self.shown, re.M)
        return int(found[1]) if found else None

    def run(self, code: str, *, again_if: str | None = None) -> str:
        """Wait for its end, and fail if it fails. What it showed. again_if: the error with which it is to be typed again."""
        for _ in range(3):
            before = len(self.shown)
            self.type(code)
            self.wait_for(lambda: self.code() is not None, "the command ends")
            if self.code() == 0:
                return self.shown[before:]
            if again_if is None or again_if not in self.shown[before:]:
                break
        raise AssertionError(f"{self.name}: {code}\n{self.shown[before:]}")

    def start(self, code: str) -> None:
        """Until it has something to show: a node's READY, a trainer's epoch, or its end."""
        before = len(self.shown)
        self.type(code)
        self.wait_for(lambda: re.search(r"^(READY |\d+/\d+ |END )", self.shown[before:], re.M), "it runs")
        assert self.code() in (None, 0), f"{self.name}: {code}\n{self.shown[before:]}"

    def press_ctrl_c(self) -> None:
        process = self._door.running[self.name]
        process.send_signal(signal.SIGINT)
        self.wait_for(lambda: self.code() is not None, "the command ends at Ctrl-C")
        assert self.code() == 0, self.shown[-2000:]

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        try:
            wait_until(condition, COMMAND_TIMEOUT_S, what)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {error}\n{self.shown[-3000:]}") from None

    def close(self) -> None:
        self._bash.kill()
        self._bash.wait()
        assert self._bash.stdin is not None
        self._bash.stdin.close()


class Friends:
    """Everybody's terminals, made when they are first used."""

    def __init__(self, folder: Path, fork_server: ForkServer) -> None:
        self.folder = folder
        self.door = Door(folder, fork_server)
        self.terminals: dict[str, Terminal] = {}
        self.peer_id = ""
        self.ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))

    def terminal(self, name: str) -> Terminal:
        if name not in self.terminals:
            friend = name.partition(",")[0]
            clone, cache = self.folder / friend / "shardswarm", self.folder / friend / "cache"
            clone.mkdir(parents=True, exist_ok=True)
            log = self.folder / f"{name.replace(', ', '-').replace(' ', '-')}.log"
            self.terminals[name] = Terminal(name, clone, self.door, cache, log)
            if friend != "Ada":  # Ada sent it to them
                shutil.copy(self.files / "friends.env", clone)
            elif self.files.is_dir():
                self.terminals[name].run("cd ../first-model")
        return self.terminals[name]

    @property
    def files(self) -> Path:
        """Where Ada's terminals are, once she has made it."""
        return self.folder / "Ada" / "first-model"

    def change(self, code: str) -> str:
        """As the page tells the reader to: free ports, the peer id, less of everything when in a hurry."""
        for shown, ours in {**self.ports, **HURRY, "PEER_ID": self.peer_id}.items():
            code = code.replace(shown, ours)
        return code

    def follow(self, block: Block) -> str:
        """Do what a block says. What it showed, if it is a command that ends."""
        if block.language == "text":
            for line in block.code.splitlines():
                action, _, name = line.partition(": ")
                terminal = self.terminals[name]
                terminal.press_ctrl_c() if action == "Ctrl-C" else terminal.start(terminal.last)
            return ""
        if block.language in ("python", "toml"):
            owner = self.files if block.title != "talk.py" else self.folder / "Ben" / "shardswarm"
            (owner / block.title).write_text(self.change(block.code))
            return ""
        terminal, code = self.terminal(block.terminal), self.change(block.code)
        if not block.keeps_running:
            return terminal.run(code, again_if="are not served here any more")
        terminal.start(code)
        if found := re.search(r'^READY \{"peer_id": "(\w+)"', terminal.shown, re.M):
            self.peer_id = self.peer_id or found[1]
        return ""

    def close(self) -> None:
        self.door.close()
        for terminal in self.terminals.values():
            terminal.close()


def _free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


@pytest.fixture
def friends(tmp_path: Path, fork_server: ForkServer) -> Iterator[Friends]:
    made = Friends(tmp_path, fork_server)
    yield made
    made.close()


def test_the_page_is_made_of_blocks_that_say_where_they_belong() -> None:
    assert all(port in PAGE for port in PORTS)
    assert all(PAGE.count(shown) == 1 and f"`{ours}`" in PAGE for shown, ours in HURRY.items())
    for block in read_blocks(PAGE):
        if block.language == "text":
            assert all(re.fullmatch(r"(Ctrl-C|Again): \w+, terminal \d", line) for line in block.code.splitlines())
        elif block.language == "bash":
            assert re.fullmatch(r"(everybody, once|\w+, terminal \d)(, in the clone|, keeps running)?", block.title)
        else:
            assert re.fullmatch(r"\w+\.(py|toml)", block.title)


def test_a_newcomer_who_types_the_tutorial_gets_a_model(friends: Friends) -> None:
    blocks = [block for block in read_blocks(PAGE) if not block.title.startswith("everybody")]  # that is installed
    shown: dict[str, list[str]] = {}
    for block in blocks:
        if "swarm export" in block.code:
            trainer = friends.terminal("Ada, terminal 4")
            trainer.wait_for(lambda: trainer.code() == 0, "the run ends, and the trainer with it")  # noqa: B023
        said = friends.follow(block)
        command = block.code.strip().splitlines()[-1]
        shown.setdefault(" ".join(command.split()[:2]), []).append(said)

    losses = [json.loads(line)["loss"] for line in (friends.files / "loss.jsonl").read_text().splitlines()]
    # A step that a member heard of only from the state that it got is not in its log.
    assert (
        NUM_EPOCHS - 3 <= len(losses) <= NUM_EPOCHS and statistics.mean(losses[-5:]) < statistics.mean(losses[:5]) - 0.3
    ), losses

    first_status, lonely_status = shown["swarm status"]
    assert f"of {NUM_EPOCHS} epochs done" in first_status and "warning" not in first_status
    if "the run is over" not in lonely_status:  # else this machine was quicker than its terminals
        assert "warning: no replica of stage 1 (blocks 2:4): swarm-node run --run" in lonely_status
    (said,) = shown["swarm generate"]
    text, summary = re.split(r"\n(?=\[\d+ tokens)", said)
    assert len(text.strip()) > 10 and re.search(
        r"route 0:2 at \w+ \((fp32|bf16)\) -> 2:4 at \w+ \((fp32|bf16)\)", summary
    )
    assert len(re.findall(r"going on from this disk epoch=\d+", friends.terminals["Ben, terminal 1"].shown)) >= 2
    assert "state installed epoch=" in friends.terminals["Cleo, terminal 1"].shown
    (exported,) = shown["swarm export"]
    assert f"my-model: epoch {NUM_EPOCHS}, loss " in exported
    (spoken,) = [said for command, outputs in shown.items() if command == "python talk.py" for said in outputs]
    assert spoken.count("The for statement") == 1 and len(spoken) > 100
