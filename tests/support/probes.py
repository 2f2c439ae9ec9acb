"""Helpers that look at our programs from outside: command lines run to their end, and a peer that says to a node whatever it likes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from node.backend.span_model import SpanModel
from protos import node_pb2
from swarm.checkpoint import open_checkpoint
from swarm.messages import NODE_PROTOCOL, decode_message, encode_message, own_version
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host, HostConfig, running_host
from swarm.span import Span
from tests.support.fork_server import ROOT, ForkServer, environment
from tests.support.processes import Process

ANSWER_TIMEOUT_S = 10.0
# A program that imports torch, transformers and hivemind while others do the same needs this long before it does anything.
START_S = 60.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A command line that came to its end."""

    code: int
    out: str
    err: str
    seconds: float

    def assert_refused(self, program: str, *fragments: str, within_s: float) -> None:
        """One line on stderr that begins with the program and holds all fragments, exit code 1, nothing on stdout, in time."""
        lines = self.err.splitlines()
        assert self.code == 1, self
        assert len(lines) == 1 and lines[0].startswith(f"{program}: "), self.err
        self._assert_says(fragments, within_s)

    def assert_usage_error(self, *fragments: str, within_s: float = 1.0) -> None:
        """click's usage lines and one "Error:" line, exit code 2, at once."""
        assert self.code == 2, self
        assert self.err.startswith("Usage: ") and self.err.splitlines()[-1].startswith("Error: "), self.err
        self._assert_says(fragments, within_s)

    def _assert_says(self, fragments: Sequence[str], within_s: float) -> None:
        missing = [fragment for fragment in fragments if fragment not in self.err]
        assert not missing, f"{missing} not in {self.err!r}"
        assert "Traceback" not in self.err and self.out == "", self
        assert self.seconds <= within_s, f"took {self.seconds:.1f} s, at most {within_s} s are allowed: {self.err}"


def run_program(
    module: str,
    *arguments: str,
    env: dict[str, str] | None = None,
    timeout_s: float = 90,
    fork_server: ForkServer | None = None,
) -> Finished:
    """Run python -m module to its end."""
    return run_python("-m", module, *arguments, env=env, timeout_s=timeout_s, fork_server=fork_server)


def run_python(
    *arguments: str,
    typed: str = "",
    env: dict[str, str] | None = None,
    timeout_s: float = 90,
    fork_server: ForkServer | None = None,
) -> Finished:
    """Run python with these arguments to its end, with `typed` on its stdin."""
    started = time.monotonic()
    command = [sys.executable, *arguments]
    with contextlib.ExitStack() as stack:
        stdin, out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
        stdin.write(typed)
        stdin.seek(0)
        process: Any
        if fork_server is None:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(env), stdin=stdin, stdout=out, stderr=err, text=True
            )
        else:
            process = fork_server.fork(command, environment(env), stdin=stdin, stdout=out, stderr=err)
        try:
            code = process.wait(timeout_s)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.monotonic() - started
        for stream in (out, err):
            stream.seek(0)
        return Finished(code, out.read(), err.read(), seconds)


class ProgramRuns:
    """Command lines that run beside each other, a few at a time, while the tests that ask for them come one after another."""

    def __init__(self, fork_server: ForkServer, at_once: int = 2) -> None:
        self._fork_server = fork_server
        self._pool = ThreadPoolExecutor(at_once)
        self._runs: dict[str, Future[Finished]] = {}

    def start(
        self, name: str, module: str, *arguments: str, env: dict[str, str] | None = None, real_command: bool = False
    ) -> None:
        """real_command: an interpreter of its own, for a changed environment that is read by imports."""
        fork_server = None if real_command else self._fork_server
        self._runs[name] = self._pool.submit(run_program, module, *arguments, env=env, fork_server=fork_server)

    def __getitem__(self, name: str) -> Finished:
        return self._runs[name].result()

    def close(self) -> None:
        for run in self._runs.values():
            run.cancel()
        self._pool.shutdown()


def rss_bytes(process: Process) -> int:
    return int(psutil.Process(process.pid).memory_info().rss)


@dataclass(slots=True)
class NodeProbe:
    """A peer of ours that talks to one node, and knows what the node's blocks must answer."""

    host: Host
    peer_id: str
    address: str
    model: SpanModel
    model_digest: bytes
    block_digests: list[bytes]

    @property
    def span(self) -> Span:
        return self.model.span

    async def stream(self) -> FramedStream:
        return await self.host.open_stream(self.peer_id, NODE_PROTOCOL, ANSWER_TIMEOUT_S, [self.address])

    async def raw_stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream without our framing."""
        from hivemind.p2p import PeerID

        await self.host.connect(self.peer_id, [self.address], ANSWER_TIMEOUT_S)
        _, reader, writer = await self.host.p2p.call_binary_stream_handler(
            PeerID.from_base58(self.peer_id), NODE_PROTOCOL
        )
        return reader, writer

    def open_request(self, hop: Span | None = None, **changes: Any) -> node_pb2.Request:
        hop = hop or self.span
        fields: dict[str, Any] = {
            "version": own_version(),
            "session_id": os.urandom(16),
            "model_digest": self.model_digest,
            "start": hop.start,
            "end": hop.end,
            "block_digests": [self.block_digests[block - self.span.start] for block in hop if self.span.has(block)],
            "batch": 1,
            "max_length": 32,
        }
        return node_pb2.Request(open=node_pb2.OpenSession(**{**fields, **changes}))

    async def status(self) -> node_pb2.NodeStatus:
        async with self.talking() as stream:
            reply, _ = await ask(stream, node_pb2.Request(status=node_pb2.GetNodeStatus(version=own_version())))
            return reply.status

    @contextlib.asynccontextmanager
    async def talking(self) -> AsyncIterator[FramedStream]:
        stream = await self.stream()
        try:
            yield stream
        finally:
            await stream.aclose()

    @contextlib.asynccontextmanager
    async def session(self, hop: Span | None = None, **changes: Any) -> AsyncIterator[tuple[FramedStream, bytes]]:
        """An opened session: its stream and id."""
        request = self.open_request(hop, **changes)
        async with self.talking() as stream:
            reply, _ = await ask(stream, request)
            assert reply.WhichOneof("kind") == "opened", reply
            yield stream, request.open.session_id

    def hidden(self, num_tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, num_tokens, self.model.hidden_size, generator=generator)

    async def assert_serves_correctly(self) -> None:
        """A fresh session gives the hidden states that the blocks give in this process, in two steps."""
        hidden = self.hidden(6)
        async with self.session() as (stream, session_id):
            _, first = await ask(stream, step_request(session_id, 0), [hidden[:, :4]])
            _, second = await ask(stream, step_request(session_id, 4), [hidden[:, 4:]])
        whole = self.model.forward(hidden, self.model.new_cache(self.span))
        # fp32, other thread count and other split of the tokens: sums in another order
        torch.testing.assert_close(torch.cat([*first, *second], dim=1), whole, atol=1e-4, rtol=1e-4)

    async def wait_for_usage(self, num_sessions: int, cache_bytes: int, within_s: float = 5.0) -> None:
        """Wait until the node holds so many sessions and cache bytes."""
        deadline = time.monotonic() + within_s
        while True:
            status = await self.status()
            if (status.num_sessions, status.cache_bytes_used) == (num_sessions, cache_bytes):
                return
            assert time.monotonic() < deadline, f"after {within_s} s still: {status}"
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def node_probe(node: Process, folder: Path, span: Span) -> AsyncIterator[NodeProbe]:
    """A probe of a node that serves `span` of the checkpoint in folder."""
    checkpoint = open_checkpoint(str(folder), progress=False)
    async with running_host(HostConfig()) as host:
        yield NodeProbe(
            host,
            node.peer_id,
            node.address,
            SpanModel(checkpoint, span),
            checkpoint.spec.digest,
            checkpoint.block_digests(span),
        )


def step_request(session_id: bytes, position: int, **fields: Any) -> node_pb2.Request:
    return node_pb2.Request(step=node_pb2.Step(session_id=session_id, position=position, **fields))


async def ask(
    stream: FramedStream, request: node_pb2.Request, tensors: Sequence[Tensor] = ()
) -> tuple[node_pb2.Reply, list[Tensor]]:
    return await ask_raw(stream, b"".join(bytes(part) for part in encode_message(request, tensors)))


async def ask_raw(stream: FramedStream, message: bytes) -> tuple[node_pb2.Reply, list[Tensor]]:
    """Send bytes as one message and decode the answer. Raises PeerFailed if the node broke the stream."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await stream.send([message])
        answer = await stream.receive()
    assert answer is not None, "the node ended the stream without an answer"
    return decode_message(answer, node_pb2.Reply)
