"""A real node with a planted fault: python -m tests.support.faulty_node run ... with FAULT_FILE and FAULT_TRACE in its environment.

The file holds {"action": ..., "on": ..., "at_step": n, "id": ...}. The fault fires on the n-th step (or, with "on", the n-th forward or backward
of a microbatch, or record that it announces) that this node takes after a file with a new id was planted, is written to FAULT_TRACE first
(and synced), and is one of
    SIGKILL, SIGSTOP, SIGTERM    what the process does to itself, once
    kill_p2pd                    it kills its network daemon, once
    slow                         every step from then on takes delay_s longer
    nan, wrong_shape, wrong_dtype, wrong_position, garbage, truncate, giant_header, giant_frame, silence, refuse
                                 how it lies from then on
    mute                         as silence, and it opens no more sessions either
ANNOUNCED_S_PER_BLOCK, if set, is what the node tells the swarm in place of what it measured: routes become predictable.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from node import announcer, microbatches, runtime, service, serving
from node.throughput import Throughput, measure_throughput
from protos import node_pb2
from swarm.messages import decode_message, encode_message
from swarm.p2p import framing
from swarm.p2p.framing import FramedStream


class Fault:
    """What is planted now, and how many steps were taken since."""

    def __init__(self, path: Path, trace: Path) -> None:
        self._path, self._trace = path, trace
        self._planted: dict[str, Any] = {"id": None, "action": None}
        self._num_steps = 0
        self._fired = False

    def reload(self) -> None:
        planted = json.loads(self._path.read_text()) if self._path.exists() else {"id": None, "action": None}
        if planted["id"] != self._planted["id"]:
            self._planted, self._num_steps, self._fired = planted, 0, False

    def count(self, kind: str, **details: Any) -> str | None:
        """The action to take for this step, forward or backward. Its first one is traced."""
        self.reload()
        if kind != self._planted.get("on", "step"):
            return None
        self._num_steps += 1
        if self._planted["action"] is None or self._num_steps < self._planted["at_step"]:
            return None
        action = str(self._planted["action"])
        if not self._fired:
            self._fired = True
            self._write(
                {
                    "id": self._planted["id"],
                    "action": action,
                    "step": self._num_steps,
                    "sessions": 0 if service_of is None else len(service_of.sessions.sessions),
                    **details,
                }
            )
            return action
        return None if action in ONCE else action

    @property
    def is_mute(self) -> bool:
        self.reload()
        return self._fired and self._planted["action"] == "mute"

    @property
    def is_silent(self) -> bool:
        self.reload()
        return self._fired and self._planted["action"] in ("silence", "mute")

    @property
    def delay_s(self) -> float:
        return float(self._planted["delay_s"])

    def _write(self, event: dict[str, Any]) -> None:
        with self._trace.open("a") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())


ONCE = ("SIGKILL", "SIGSTOP", "SIGTERM", "kill_p2pd")
fault: Fault
service_of: service.NodeService | None = None


class FaultyService(service.NodeService):
    """The node's service, until the fault fires."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        global service_of
        service_of = self

    async def handle(self, stream: FramedStream) -> None:
        while fault.is_mute:
            await asyncio.sleep(0.05)
        await super().handle(stream)

    async def _step(self, session: Any, request: Any, tensors: list[torch.Tensor]) -> Any:
        shared = {"batches": self._steps.num_batches, "batched": self._steps.num_batched}
        action = fault.count("step", position=request.position, hop=str(session.hop), **shared)
        answer = super()._step
        return await _misbehave(action, lambda: answer(session, request, tensors))


class FaultyMicrobatches(microbatches.Microbatches):
    """The node's forwards and backwards, until the fault fires."""

    async def answer(self, peer_id: str, hop: Any, request: Any, tensors: list[torch.Tensor]) -> Any:
        action = fault.count(request.WhichOneof("kind"), hop=str(hop), stashed=self.stash.num_entries)
        answer = super().answer
        return await _misbehave(action, lambda: answer(peer_id, hop, request, tensors))


class FaultyAnnouncer(announcer.Announcer):
    """The node's word to the swarm; only actions that are signals make sense here."""

    async def announce(self, **changes: Any) -> None:
        span = changes.get("span", self.record.span)
        action, announce = fault.count("announce", span=str(span)), super().announce
        await _misbehave(action, lambda: announce(**changes))


async def _misbehave(action: str | None, answer: Callable[[], Awaitable[Any]]) -> Any:
    if action is None:
        return await answer()
    if action.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[action])  # after a SIGCONT it goes on as if nothing had been
    elif action == "kill_p2pd":
        for child in _p2pds():
            child.kill()
    elif action in ("silence", "mute"):
        while fault.is_silent:
            await asyncio.sleep(0.05)
    elif action == "slow":
        await asyncio.sleep(fault.delay_s)
    elif action == "refuse":
        raise service.Refused(node_pb2.THE_COMPUTATION_FAILED, "planted")
    else:
        return _lie(action, await answer())
    return await answer()


def _p2pds() -> Iterator[psutil.Process]:
    return (child for child in psutil.Process().children() if child.name() == "p2pd")


def _lie(action: str, answer: list[Any]) -> list[Any]:
    raw = b"".join(bytes(part) for part in answer)
    reply, outputs = decode_message(raw, node_pb2.Reply)
    del reply.tensors[:]
    if action == "nan":
        outputs[0][..., 0] = float("nan")
    elif action == "wrong_shape":
        outputs[0] = outputs[0][..., :-1]
    elif action == "wrong_dtype":
        outputs[0] = outputs[0].long()
    elif action == "wrong_position":
        reply.step.position += 1
    elif action == "garbage":
        return [os.urandom(len(raw))]
    elif action == "truncate":
        return [raw[: len(raw) // 2]]
    elif action == "giant_header":
        return [struct.pack("!I", 2**31) + raw[4:]]
    elif action == "giant_frame":
        return [GiantFrame(raw)]
    else:
        raise ValueError(f"unknown fault {action}")
    return encode_message(reply, outputs)


class GiantFrame(bytes):
    """A message whose frame claims 2 GiB."""


class _LyingHeader:
    """In the place of framing's header: tells the truth except of a GiantFrame."""

    size = framing._HEADER.size
    unpack = framing._HEADER.unpack

    @staticmethod
    def pack(size: int, kind: int, number: int) -> bytes:
        return framing_header.pack(2**31 if _LyingHeader.lies else size, kind, number)

    lies = False


framing_header = framing._HEADER


class LyingStream(FramedStream):
    def _write_frame(self, kind: framing.FrameKind, *payload: Any) -> None:
        _LyingHeader.lies = any(isinstance(part, GiantFrame) for part in payload)
        super()._write_frame(kind, *payload)
        _LyingHeader.lies = False


def main() -> None:
    from node.cli import main as node_main
    from swarm.p2p import host

    global fault
    fault = Fault(Path(os.environ["FAULT_FILE"]), Path(os.environ["FAULT_TRACE"]))
    runtime.Announcer = FaultyAnnouncer  # type: ignore[misc]
    serving.NodeService = FaultyService  # type: ignore[misc]
    serving.Microbatches = FaultyMicrobatches  # type: ignore[misc]
    framing._HEADER = _LyingHeader  # type: ignore[assignment]
    host.FramedStream = LyingStream  # type: ignore[misc]
    announced = os.environ.get("ANNOUNCED_S_PER_BLOCK")
    if announced is not None:

        def measure(*arguments: Any) -> Throughput:
            measured, s_per_block = measure_throughput(*arguments), float(announced)
            num_blocks = len(arguments[0].span)
            return dataclasses.replace(
                measured, decode_s_per_block=s_per_block, prefill_tokens_per_s=1 / (s_per_block * num_blocks)
            )

        runtime.measure_throughput = measure
    node_main()


if __name__ == "__main__":
    main()
