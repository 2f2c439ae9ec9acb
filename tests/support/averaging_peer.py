"""A member of a group in its own process, which does itself harm in mid-round: python -m tests.support.averaging_peer JSON

It prints READY {"peer_id": ..., "addresses": [...]}, begins the round of plan_with(itself) when the file `begin` exists, and when it
sends its n-th contribution it writes {"action": ..., "chunk": n} to `trace` (synced), and raises the signal `action` in itself.
Also what members of groups are compared with: the exchange without a network.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protos import averaging_pb2
from swarm.exchange import ErrorFeedback, ExchangeMember, ExchangePlan
from swarm.p2p import averaging_round
from swarm.p2p.averaging import Averager, plan_exchange
from swarm.p2p.host import HostConfig, running_host
from swarm.tensors import WireFormat


def plan_with(others: Sequence[Sequence[Any]], victim: Sequence[Any], round_id: bytes, size: int) -> ExchangePlan:
    """others, victim: (peer id, addresses)."""
    members = [ExchangeMember(peer_id, tuple(addresses)) for peer_id, addresses in [*others, victim]]
    return plan_exchange(round_id, members, [1] * len(members), size, WireFormat.FP32)


def exchange_locally(
    plan: ExchangePlan, vectors: Sequence[Tensor | None], residuals: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """What the members of a plan end with: the result, and the new residual of each. In the order of the plan."""
    feedbacks = [ErrorFeedback(plan, vector, old) for vector, old in zip(vectors, residuals, strict=True)]
    result = torch.full([plan.size], math.nan)
    for reducer in plan.reducers:
        for chunk in plan.chunks_of(reducer):
            total = torch.zeros(chunk.end - chunk.start)
            for feedback, vector in zip(feedbacks, vectors, strict=True):
                if vector is not None:
                    total += feedback.contribution(chunk)[2]
            result[chunk.start : chunk.end] = feedbacks[reducer].result(chunk, total)[2]
    return result, [feedback.residual for feedback in feedbacks]


def plant(action: str, at_chunk: int, trace: Path) -> None:
    """Let this process raise a signal in itself when it has encoded its n-th contribution."""
    encode, num_chunks = averaging_round.chunk_message, 0

    def count(kind: Any, *arguments: Any) -> Any:
        nonlocal num_chunks
        is_contribution = kind is averaging_pb2.ExchangeRequest
        num_chunks += is_contribution
        if is_contribution and num_chunks == at_chunk:
            whole = trace.with_suffix(".new")
            with whole.open("w") as file:
                json.dump({"action": action, "chunk": num_chunks}, file)
                file.flush()
                os.fsync(file.fileno())
            whole.rename(trace)
            os.kill(os.getpid(), signal.Signals[action])
        return encode(kind, *arguments)

    averaging_round.chunk_message = count  # type: ignore[assignment]


async def main(orders: dict[str, Any]) -> None:
    has_begun = Path(orders["begin"]).exists
    plant(orders["action"], orders["at_chunk"], Path(orders["trace"]))
    async with running_host(HostConfig()) as host:
        averager = Averager(host)
        await averager.start()
        me = (host.peer_id, await host.addresses())
        plan = plan_with(orders["others"], me, bytes.fromhex(orders["round_id"]), orders["size"])
        print("READY", json.dumps({"peer_id": me[0], "addresses": me[1]}), flush=True)
        while not has_begun():
            await asyncio.sleep(0.02)
        try:
            await averager.average(plan, torch.ones(plan.size), timeout_s=60)
        finally:
            await averager.aclose()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main(json.loads(sys.argv[1])))
