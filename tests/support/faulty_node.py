"""A real node with one planted fault: python -m tests.support.faulty_node run ... with FAULT='{"action": ..., "at_step": n}'.

The fault fires on the node's own n-th step, is written to FAULT_TRACE first (and synced), and is one of
    SIGKILL, SIGSTOP             what the process does to itself
    nan, wrong_shape, wrong_dtype, wrong_position, garbage, truncate, giant_header, silence, refuse     how it lies from then on
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
from typing import Any

import torch

from node import service
from node.cli import main
from protos import node_pb2
from swarm.messages import decode_message, encode_message

FAULT = json.loads(os.environ["FAULT"])


def write_trace(event: dict[str, Any]) -> None:
    with open(os.environ["FAULT_TRACE"], "a") as file:
        file.write(json.dumps(event) + "\n")
        file.flush()
        os.fsync(file.fileno())


class FaultyService(service.NodeService):
    """The node's service, until the n-th step."""

    num_seen = 0

    async def _step(self, session: Any, request: Any, tensors: list[torch.Tensor]) -> Any:
        FaultyService.num_seen += 1
        if FaultyService.num_seen < FAULT["at_step"]:
            return await super()._step(session, request, tensors)
        action = FAULT["action"]
        write_trace(
            {"action": action, "step": FaultyService.num_seen, "position": request.position, "hop": str(session.hop)}
        )
        if action in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), signal.Signals[action])
            return await super()._step(session, request, tensors)  # only after a SIGCONT
        if action == "silence":
            await asyncio.sleep(3600)
        if action == "refuse":
            raise service.Refused(node_pb2.THE_COMPUTATION_FAILED, "planted")
        return _lie(action, await super()._step(session, request, tensors))


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
    else:
        raise ValueError(f"unknown fault {action}")
    return encode_message(reply, outputs)


if __name__ == "__main__":
    service.NodeService = FaultyService  # type: ignore[misc]
    main()
