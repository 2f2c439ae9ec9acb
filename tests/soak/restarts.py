"""A long run in miniature: every process is restarted, then the whole swarm, and the loss is that of one undisturbed process.

    scripts/soak restarts [--epochs N] [--seed N] [--settle-s SECONDS]

2 stages x 2 nodes, 2 of which keep the ends, and 2 trainers of a tiny model, each with a cache folder of its own. In the first third
each of the six is stopped with SIGTERM and started again with its folder, one after the other, in an order and at epochs from the
seed; in the second third all are stopped, and started again; the last third is undisturbed. Before it the trainers are frozen until
p2pd's heap has settled (tests/soak/churn.py), so that it can be measured. Every epoch that any member stepped through is compared with
one process on the same samples, as are the weights at the end. One JSON line at the end; exit code 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch

from swarm.client.runs import publish_run
from tests.soak.churn import MAX_SLOPE_MIB, slope_per_100
from tests.support.fork_server import ForkServer
from tests.support.one_process_training import Outcome, samples_of_run, train_in_one_process
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, largest_error, make_run, weights_of_run

MAX_ERROR = 1e-4
"""Relative, of each loss and each weight tensor."""
# The order of additions alone moves the loss by 2.3e-7 in 1,000 epochs with these; with an eps of 1e-8 and a rate of 3e-4 by 1e-2,
# with 3e-3 by a factor: AdamW is chaotic where gradients vanish or the rate is at the edge of stability. One lost step is 1e-3.
RULES: dict[str, Any] = {"optimizer.lr": 3e-4, "optimizer.eps": 1e-2, "keepers": 2}
STALL_S = 180.0
SAMPLE_EVERY = 10
"""Epochs between two looks at the memory."""


@dataclass
class Seat:
    """Whoever takes part with one cache folder, one life after the other."""

    name: str
    stage: int | None
    """None: a trainer."""
    cache: Path
    lives: list[Process] = field(default_factory=list)

    @property
    def process(self) -> Process:
        return self.lives[-1]


class Tail:
    """The first and the last step in a trace that grows, without reading it all again. What a node keeps of the ends does not count."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.first, self.last = -1, -1

    def read(self) -> int:
        """The last step; -1 if there is none yet."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read().splitlines(keepends=True)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                step = json.loads(line)
                if not step["is_keeper"]:
                    self.last = step["epoch"]
                    self.first = self.last if self.first < 0 else self.first
        return self.last


class LongRun:
    """The run, and who sits where."""

    def __init__(self, training: TrainingSwarm, folder: Path) -> None:
        self.training = training
        self._tails: dict[Process, Tail] = {}
        self.counts = {"restarted": 0, "stopped_together": 0}
        self.longest: dict[str, float] = defaultdict(float)
        self.seats = [Seat(f"node {n}", n // 2, folder / f"node{n}") for n in range(4)]
        self.seats += [Seat(f"trainer {n}", None, folder / f"trainer{n}") for n in range(2)]
        for seat in self.seats:
            if seat.stage is None:
                shutil.copytree(training.folder / "cache", seat.cache)
                wait_until(lambda: self._num_keepers() == 2, STALL_S, "two nodes keep the ends")
            self.start(seat)

    def _num_keepers(self) -> int:
        return sum("keeping the ends" in seat.process.log for seat in self.seats if seat.lives)

    def start(self, seat: Seat) -> None:
        if seat.stage is None:
            process = self.training.start_trainer(cache=seat.cache)
        else:
            process = self.training.start_node(seat.stage, cache=seat.cache)
        seat.lives.append(process)
        self._tails[process] = Tail(process.log_path.with_suffix(".trace"))

    def leave(self, seats: Sequence[Seat]) -> None:
        for seat in seats:
            seat.process.send(signal.SIGTERM)
        for seat in seats:
            code = seat.process.wait(60)
            if code:
                raise AssertionError(f"{seat.name} left with {code}:\n{seat.process.log[-3000:]}")
            seat.process.stop()

    def epoch_of(self, seat: Seat) -> int:
        return self._tails[seat.process].read()

    def epoch(self) -> int:
        return max(map(self.epoch_of, self.seats))

    def wait_for(self, epoch: int, seats: Sequence[Seat], what: str) -> None:
        """Until all of them stepped through an epoch. Nobody may end, and at least one of all must go on."""
        while min(map(self.epoch_of, seats)) < epoch:
            before, started = self.epoch(), time.monotonic()
            wait_until(lambda b=before: self.epoch() > b or min(map(self.epoch_of, seats)) >= epoch, STALL_S, what)
            self.longest["stall_s"] = max(self.longest["stall_s"], time.monotonic() - started)
            ended = [seat.name for seat in self.seats if not seat.process.is_running()]
            if ended and self.epoch() < epoch:
                raise AssertionError(f"ended: {', '.join(ended)}")

    def restart(self, seat: Seat) -> None:
        """Until it steps again."""
        at = self.epoch()
        started = time.monotonic()
        self.leave([seat])
        self.start(seat)
        self.wait_for(at + 1, [seat], f"{seat.name} steps again")
        self.longest["back_s"] = max(self.longest["back_s"], time.monotonic() - started)
        self.counts["restarted"] += 1
        print(
            f"epoch {at}: restarted {seat.name}, which steps again from {self._tails[seat.process].first} on",
            flush=True,
        )

    def restart_all(self) -> None:
        at = self.epoch()
        started = time.monotonic()
        self.leave(self.seats)
        stopped_at = [self.epoch_of(seat) + 1 for seat in self.seats]
        for seat in self.seats:
            self.start(seat)
        self.wait_for(max(stopped_at), self.seats, "all step again")
        self.longest["all_back_s"] = time.monotonic() - started
        self.counts["stopped_together"] += 1
        begun = [self._tails[seat.process].first for seat in self.seats]
        print(f"epoch {at}: stopped all at epochs {stopped_at}, which step again from {begun} on", flush=True)

    def settle(self, seconds: float) -> None:
        """Nobody trains until every p2pd is so old."""
        youngest = max(psutil.Process(seat.process.pid).create_time() for seat in self.seats)
        pause_s = youngest + seconds - time.time()
        if pause_s <= 0:
            return
        trainers = [seat.process for seat in self.seats if seat.stage is None]
        print(f"epoch {self.epoch()}: the trainers are frozen for {pause_s:.0f} s", flush=True)
        for trainer in trainers:
            trainer.send(signal.SIGSTOP)
        time.sleep(pause_s)
        for trainer in trainers:
            trainer.send(signal.SIGCONT)

    def pss_mib(self) -> list[tuple[float, float]]:
        """Of each member: Python, p2pd."""

        def pss(pid: int) -> float:
            return float(psutil.Process(pid).memory_full_info().pss) / 2**20

        processes = [seat.process for seat in self.seats]
        return [(pss(process.pid), sum(map(pss, process.p2pd_pids()))) for process in processes]

    def logs(self) -> str:
        return "\n".join(f"== {m.log_path.name}\n{m.log[-2500:]}" for m in self.training.members)


def drive(run: LongRun, num_epochs: int, dice: random.Random, settle_s: float) -> list[tuple[int, list[Any]]]:
    """Disturb, then look on. The memory in the last third."""
    order = dice.sample(run.seats, len(run.seats))
    third = num_epochs // 3
    moments = sorted(dice.sample(range(third // 20, third), len(order)))
    stop_at = dice.randrange(third, third * 3 // 2)
    plan = ", ".join(f"{seat.name} at {moment}" for seat, moment in zip(order, moments, strict=True))
    print(f"restarts: {plan}; all at {stop_at}", flush=True)
    for seat, moment in zip(order, moments, strict=True):
        run.wait_for(moment, run.seats, f"epoch {moment}")
        run.restart(seat)
    run.wait_for(stop_at, run.seats, f"epoch {stop_at}")
    run.restart_all()
    run.wait_for(2 * third, run.seats, "the second third ends")
    run.settle(settle_s)
    memory = []
    started, begun = time.monotonic(), run.epoch()
    for epoch in range(begun + SAMPLE_EVERY, num_epochs - 1, SAMPLE_EVERY):
        run.wait_for(epoch, run.seats, f"epoch {epoch}")
        if run.epoch() < num_epochs - 1:  # else the trainers are leaving
            memory.append((run.epoch(), run.pss_mib()))
    run.wait_for(num_epochs - 1, run.seats, "the run ends")
    run.longest["s_per_epoch"] = (time.monotonic() - started) / (num_epochs - 1 - begun)
    return memory


def compare(run: LongRun, expected: Outcome, tokens: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """What was found, and which bounds are broken, over everything that any member wrote down."""
    report: dict[str, Any] = {"loss_error": 0.0, "loss_error_at": None}
    broken = set()
    seen: dict[int, set[str]] = defaultdict(set)
    digests: dict[tuple[int | None, str], set[str]] = defaultdict(set)
    num_downloads = 0
    for seat in run.seats:
        for process in seat.lives:
            steps = run.training.trace_of(process)
            num_downloads += max((step["downloads"] for step in steps), default=0)
            for step in steps:
                epoch = step["epoch"]
                seen[epoch].add(step["lineage"])
                digests[None if step["is_keeper"] else seat.stage, step["lineage"]].add(step["digest"])
                error = abs(step["loss"] / expected.losses[epoch] - 1)
                if error > report["loss_error"]:
                    report.update(loss_error=error, loss_error_at=epoch)
                if step["skipped"] or step["tokens"] != tokens[epoch]:
                    broken.add("samples were skipped")
                report["rollbacks"] = max(report.get("rollbacks", 0), step["era"])
    final = len(expected.losses) - 1
    report |= {
        "epochs_stepped_again": sum(len(lineages) > 1 for lineages in seen.values()),
        "downloads": num_downloads,
        "weights_error": largest_error(
            weights_of_run(run.training, [run.seats[0].process, run.seats[2].process], run.seats[4].process),
            expected.weights,
        ),
    }
    if seen.keys() != set(range(final + 1)):
        broken.add("epochs are missing")
    if len(seen[final]) != 1:
        broken.add("several lineages")
    if any(len(found) > 1 for found in digests.values()):
        broken.add("replicas differ")
    if not report["loss_error"] <= MAX_ERROR:
        broken.add("loss")
    if not report["weights_error"] <= MAX_ERROR:
        broken.add("weights")
    return report, sorted(broken)


def slopes_of(memory: list[tuple[int, list[Any]]], part: int) -> list[float]:
    """MiB per 100 epochs of each member. part: 0 Python, 1 p2pd."""
    num_members = len(memory[0][1]) if memory else 0
    return [round(slope_per_100([(e, values[n][part]) for e, values in memory]), 2) for n in range(num_members)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--settle-s", type=float, default=240.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="restarts-") as name:
        folder = Path(name)
        checkpoint_every = max(5, min(50, options.epochs // 20))
        store = make_run(
            folder / "run", **RULES, **{"end.epochs": options.epochs, "checkpoint_every": checkpoint_every}
        )
        source, batch = samples_of_run(store, folder / "run" / "data"), store.spec.target_batch
        expected = train_in_one_process(store.spec, source)
        tokens = [source.batch(epoch * batch, batch).num_loss_tokens for epoch in range(options.epochs)]
        print(f"undisturbed: loss {expected.losses[0]:.4f} to {expected.losses[-1]:.4f}", flush=True)
        started = time.monotonic()
        server = ForkServer()
        try:
            with local_swarm(folder / "swarm", fork_server=server) as swarm:
                publish_run(store, swarm.initial_peers, 15)
                run = LongRun(TrainingSwarm(swarm, store, folder / "run"), folder)
                try:
                    memory = drive(run, options.epochs, random.Random(options.seed), options.settle_s)
                except AssertionError as error:
                    raise AssertionError(f"{error}\n{run.logs()}") from error
                found, broken = compare(run, expected, tokens)
        finally:
            server.close()
    slopes = {name: slopes_of(memory, part) for part, name in enumerate(("python", "p2pd"))}
    report = {
        "seed": options.seed,
        "epochs": options.epochs,
        "final_loss": expected.losses[-1],
        **found,
        **run.counts,
        **{name: round(value, 2) for name, value in run.longest.items()},
        "run_s": round(time.monotonic() - started, 1),
        **{f"{name}_pss_slope_mib_per_100_epochs": values for name, values in slopes.items()},
        "pss_mib_first_and_last": [
            [[round(x, 1) for x in member] for member in memory[at][1]] for at in (0, -1) if memory
        ],
    }
    print(json.dumps(report))
    if any(slope > MAX_SLOPE_MIB for values in slopes.values() for slope in values):
        broken.append("memory")
    print("broken: " + ", ".join(broken) if broken else "all bounds kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
