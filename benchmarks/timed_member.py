"""A real node or trainer for benchmarks of training that writes down when it does what, and whose trainers wait at a gate.

    python -m benchmarks.timed_member node|trainer ARGUMENTS of swarm-node / swarm
TRACE (a file) gets a line of JSON for every step. GATE (a file) holds a number: trainers begin no microbatch of that epoch or a later one.
SHARE (a file) holds a number: nodes give sessions this share of the device, and not that of their flags.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from node.device_share import DeviceShare, Purpose
from swarm.epoch.messages import EARLY
from swarm.training import membership

_GATE_POLL_S = 0.05
_SHARE_POLL_S = 0.05
times = {
    "forward_s": 0.0, "backward_s": 0.0, "idle_s": 0.0, "last_backward_at": 0.0, "serving_s": 0.0, "training_s": 0.0
}  # fmt: skip
"""Of a stage since the start; serving_s and training_s: jobs of sessions and of the training on the device. idle_s: from the last backward of an epoch to the first forward of the next."""


class TimedMembership(membership.Membership):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not self.is_keeper:
            self.on_commit.append(self._write)

    def _write(self, commit: Any) -> None:
        line = {
            "epoch": commit.epoch,
            "at_s": time.monotonic(),  # one clock for all processes of a machine
            "loss": commit.loss_sum / max(commit.num_loss_tokens, 1),
            "num_loss_tokens": commit.num_loss_tokens,
            "members": len(commit.members),
            "averaging_s": self.counters.averaging_s,
            "bytes_averaged": self.counters.bytes_averaged,
            **times,
        }
        with open(os.environ["TRACE"], "a") as file:
            file.write(json.dumps(line) + "\n")
        times["is_new_epoch"] = 1.0


def time_stage() -> None:
    """Let the node's stage add up its times."""
    from node.training import hosted_run, runtime
    from node.training.stage import TrainableStage

    class TimedStage(TrainableStage):
        def differentiable(self, *arguments: Any) -> Any:
            started = time.monotonic()
            if times.pop("is_new_epoch", None):
                times["idle_s"] = started - times["last_backward_at"]
            answer = super().differentiable(*arguments)
            times["forward_s"] += time.monotonic() - started
            return answer

        def backward(self, *arguments: Any) -> Any:
            started = time.monotonic()
            answer = super().backward(*arguments)
            times["last_backward_at"] = time.monotonic()
            times["backward_s"] += times["last_backward_at"] - started
            return answer

    class TimedShare(DeviceShare):
        _looked_at = 0.0

        def choose(self, waiting: Any) -> Purpose:
            now = time.monotonic()
            if share and now > self._looked_at + _SHARE_POLL_S:
                self._looked_at, serving = now, float(Path(share).read_text())
                self.of.update({Purpose.SERVING: serving, Purpose.TRAINING: 1 - serving})
            return super().choose(waiting)

        def charge(self, purpose: Purpose, seconds: float) -> None:
            super().charge(purpose, seconds)
            times[f"{purpose.name.lower()}_s"] = self.used_s[purpose]

    share = os.environ.get("SHARE")
    hosted_run.TrainableStage = TimedStage  # type: ignore[misc]
    runtime.DeviceShare = TimedShare  # type: ignore[misc]
    hosted_run.Membership = TimedMembership  # type: ignore[misc]


def gate_trainer() -> None:
    from swarm.client import trainer

    gate = Path(os.environ["GATE"])

    class GatedTrainer(trainer.Trainer):
        async def _run_unit(self, order: Any, place: Any) -> None:
            while place.epoch + (order.unit >= EARLY) >= int(gate.read_text()):  # noqa: ASYNC110, ASYNC240  a file is the gate
                await asyncio.sleep(_GATE_POLL_S)
            await super()._run_unit(order, place)

    trainer.Trainer = GatedTrainer  # type: ignore[misc]
    trainer.Membership = TimedMembership  # type: ignore[misc]


def main() -> None:
    if sys.argv.pop(1) == "node":
        from node.cli import main as run

        time_stage()
    else:
        from swarm.cli import main as run

        gate_trainer()
    run()


if __name__ == "__main__":
    main()
