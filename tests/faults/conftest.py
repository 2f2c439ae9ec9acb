"""One swarm for all fault tests: two slow, honest nodes, and whatever a test starts beside them.

A fault fires on an event of its victim (its n-th step), never after a time. Nodes come from a fork server and announce the speed that they are
told, so every test knows which peers its client will choose: the fastest, which is the victim.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, set_seed

import swarm
from protos import node_pb2
from swarm.client.blocking import LoopThread
from swarm.messages import NODE_PROTOCOL, own_version
from swarm.p2p.host import HostConfig, running_host
from swarm.p2p.runtime_dir import sweep
from tests.support.fork_server import ROOT, ForkServer, environment
from tests.support.models import save_tiny
from tests.support.probes import ask
from tests.support.processes import LocalSwarm, Process, local_swarm, stop_all, wait_until

FAST, MIDDLE, SLOW = 1e-6, 1e-3, 4e-3  # announced seconds per block; a hop costs 1.5e-3
NUM_TOKENS = 12  # so many steps does a victim see in one generation: the prompt and all new tokens but the last
PROMPT = "The quick brown fox"
PROMPTS = ["The quick brown fox", "A swarm", "Numbers such as 12345 are split"]
# From the fault to the replacement's being ready, where the loss is seen at once. Mostly this machine's noise.
QUICK_STALL_S = 4.0


def processes_below(root: Path) -> list[psutil.Process]:
    """Live processes that were started anew with TMPDIR=root: our programs and the p2pds of all."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(root) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(scope="session", autouse=True)
def fault_root(fork_server: ForkServer) -> Iterator[Path]:
    """TMPDIR of all processes of these tests. At the end no process may live, and nothing stay that a sweep leaves."""
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))
    yield root
    wait_until(lambda: not processes_below(root), 6, "no process of the fault tests is left")
    left = root / f"shardswarm-{os.getuid()}"
    if left.exists():
        sweep(left)  # what the tests killed; any other program of ours does the same when it starts
        assert list(left.iterdir()) == []
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def nodes(
    tiny_path: Path, fault_root: Path, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalSwarm]:
    env = {"TMPDIR": str(fault_root)}
    with local_swarm(tmp_path_factory.mktemp("faults"), env=env, fork_server=fork_server) as started:
        yield started


@pytest.fixture(scope="session")
def honest(nodes: LocalSwarm, tiny_path: Path) -> list[Process]:
    """Nodes of blocks 0:2 and 2:4 that outlive all tests."""
    return nodes.start_nodes(tiny_path, "0:2", "2:4", s_per_block=SLOW)


@dataclass(slots=True)
class Victims:
    """Starts the nodes of one test, and ends them."""

    nodes: LocalSwarm
    model: Path
    started: list[Process]

    def start(self, *spans: str, flags: tuple[str, ...] = (), **options: Any) -> list[Process]:
        """Nodes that announce to be the fastest, ready. Dead ones are forgotten quickly."""
        options = {"s_per_block": FAST, "model": self.model, **options}
        model = options.pop("model")
        lifetime = ("--record-lifetime", "6")
        new = [self.nodes.start_node(model, span, *lifetime, *flags, **options) for span in spans]
        self.started += new
        for node in new:
            node.ready()
        return new

    def assert_fired(self, victim: Process, action: str, step: int) -> dict[str, Any]:
        """The one event that the victim wrote down."""
        (event,) = self.nodes.trace_of(victim)
        assert (event["action"], event["step"]) == (action, step)
        return event


@pytest.fixture
def victims(nodes: LocalSwarm, honest: list[Process], tiny_path: Path) -> Iterator[Victims]:
    victims = Victims(nodes, tiny_path, [])
    yield victims
    for node in victims.started:
        nodes.plant(node, None)
    stop_all(victims.started)


@contextlib.contextmanager
def client_of(nodes: LocalSwarm, model: Path, **options: Any) -> Iterator[swarm.Swarm]:
    """A new client, which knows nothing of the peers yet."""
    options = {"initial_peers": nodes.initial_peers, **options}
    with swarm.connect(model=str(model), **options) as connected:
        yield connected


@dataclass(frozen=True, slots=True)
class Reference:
    """The same model in this process, and how both are asked."""

    local: Any
    tokenizer: Any

    def generate(self, model: Any, prompts: str | list[str] = PROMPT, **options: Any) -> torch.Tensor:
        """NUM_TOKENS new tokens for each prompt, greedy unless told otherwise."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=isinstance(prompts, list))
        set_seed(11)
        length = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
        output: torch.Tensor = model.generate(**inputs, **{**length, "do_sample": False, **options})
        return output

    def assert_same(self, model: Any, prompts: str | list[str] = PROMPT, **options: Any) -> None:
        """Through the swarm comes what comes without it."""
        ours, theirs = (self.generate(m, prompts, **options) for m in (model, self.local))
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="session")
def reference(tiny_path: Path) -> Reference:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path, padding_side="left")
    return Reference(AutoModelForCausalLM.from_pretrained(tiny_path).eval(), tokenizer)


class AtToken(StoppingCriteria):
    """Does something when the n-th token was generated, and stops nothing."""

    def __init__(self, number: int, action: object) -> None:
        self._left, self._action = number, action

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            assert callable(self._action)
            self._action()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Observer:
    """A peer that asks nodes how they are."""

    def __init__(self) -> None:
        self._thread = LoopThread()
        self._stack = contextlib.AsyncExitStack()
        self._host = self._thread.run(self._stack.enter_async_context(running_host(HostConfig())))

    def status(self, node: Process) -> node_pb2.NodeStatus:
        return self._thread.run(self._ask(node))

    async def _ask(self, node: Process) -> node_pb2.NodeStatus:
        stream = await self._host.open_stream(node.peer_id, NODE_PROTOCOL, 5.0, [node.address])
        try:
            reply, _ = await ask(stream, node_pb2.Request(status=node_pb2.GetNodeStatus(version=own_version())))
            return reply.status
        finally:
            await stream.aclose()

    def wait_for_sessions(self, node: Process, number: int, timeout_s: float) -> float:
        """Wait until a node holds so many sessions; seconds that it took. Without any, no cache may be in use."""
        started = time.monotonic()
        what = f"{number} sessions on {node.log_path.name}"
        wait_until(lambda: self.status(node).num_sessions == number, timeout_s, what)
        assert number or self.status(node).cache_bytes_used == 0
        return time.monotonic() - started

    def close(self) -> None:
        self._thread.run(self._stack.aclose())
        self._thread.close()


@pytest.fixture(scope="session")
def observer() -> Iterator[Observer]:
    observer = Observer()
    yield observer
    observer.close()


class CommandLine:
    """`python -m swarm ...` in its own process, with pipes on all sides; its output is read as it comes."""

    def __init__(self, root: Path, *arguments: str, fork_server: ForkServer | None = None) -> None:
        command = [sys.executable, "-m", "swarm", *arguments]
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        env = environment({"TMPDIR": str(root)})
        self.popen: Any = (
            subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)
            if fork_server is None
            else fork_server.fork(command, env, text=True, **pipes)
        )

    @property
    def pid(self) -> int:
        return int(self.popen.pid)

    def type(self, line: str) -> None:
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def finish(self, timeout_s: float) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        code = self.popen.wait(timeout_s)
        out, err = self.popen.stdout.read(), self.popen.stderr.read()
        self.close()
        return code, out, err

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def directories_of(pid: int, root: Path) -> list[Path]:
    """The private directories of one process."""
    return list((root / f"shardswarm-{os.getuid()}").glob(f"{pid}-*"))
