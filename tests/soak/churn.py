"""A training run in which nodes and trainers are killed, frozen and replaced at random.

    scripts/soak churn [--epochs N] [--seed N] [--settle-s SECONDS]

Starts 2 stages x 2 nodes and 2 trainers of a tiny model. At random epochs, from the seed, one member is killed with SIGKILL and
another started in its place, or frozen with SIGSTOP and woken after the others went on; each stage keeps a live replica. Compares
the final loss with undisturbed runs of several seeds (in one process, which the swarm equals), and measures the memory (PSS of the
members that were never touched, with their p2pd) over the second half. p2pd's heap grows for its first 200 s, whatever it does, and
then no more, so the run begins only when the untouched members are that old. One JSON line at the end; exit code 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch

from swarm.client.runs import publish_run
from tests.support.fork_server import ForkServer
from tests.support.one_process_training import samples_of_run, train_in_one_process
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import TrainingSwarm, make_run

NUM_SEEDS = 6
MAX_DEVIATIONS = 2.0
MAX_SLOPE_MIB = 1.0
"""Per 100 epochs, of one member."""
STALL_S = 60.0


class Churn:
    """The run, and who is where."""

    def __init__(self, training: TrainingSwarm, dice: random.Random, settle_s: float) -> None:
        self.training, self.dice = training, dice
        self.places: list[tuple[str, Process]] = []
        self.counts: dict[str, int] = {"killed": 0, "frozen": 0, "joined": 0}
        self.longest_stall_s = 0.0
        for stage in (0, 0, 1, 1):
            self.places.append((f"stage {stage}", training.start_node(stage)))
        self.places.append(("trainer", training.start_trainer()))
        time.sleep(settle_s)  # without the other trainer the first epoch does not begin
        self.places.append(("trainer", training.start_trainer()))
        # The first of each pair is never touched: it is measured, and keeps the state.
        self.steady = [process for _, process in self.places[::2]]

    def epoch(self) -> int:
        return max(self.training.steps_of(self.steady[2]), default=-1)

    def wait_for(self, epoch: int) -> None:
        started = time.monotonic()
        wait_until(lambda: self.epoch() >= epoch, STALL_S, f"epoch {epoch} ends")
        self.longest_stall_s = max(self.longest_stall_s, time.monotonic() - started)

    def disturb(self) -> str:
        index = self.dice.choice([1, 3, 5])
        name, victim = self.places[index]
        if self.dice.random() < 0.5:
            victim.send(signal.SIGKILL)
            replacement = (
                self.training.start_trainer() if name == "trainer" else self.training.start_node(int(name[-1]))
            )
            self.places[index] = name, replacement
            self.counts["killed"] += 1
            self.counts["joined"] += 1
            return f"killed a {name}, another joins"
        victim.send(signal.SIGSTOP)
        self.wait_for(self.epoch() + 2)  # the others have gone on without it
        victim.send(signal.SIGCONT)
        self.counts["frozen"] += 1
        return f"froze a {name} for two steps"

    def pss_mib(self) -> list[float]:
        """Of each steady member's own process, then of each one's p2pd."""
        pids = [process.pid for process in self.steady] + [process.p2pd_pids()[0] for process in self.steady]
        return [psutil.Process(pid).memory_full_info().pss / 2**20 for pid in pids]


def slope_per_100(points: list[tuple[int, float]]) -> float:
    """Least squares, per 100 epochs."""
    if len(points) < 3:
        return 0.0
    return 100 * statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--settle-s", type=float, default=240.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {options.seed}", flush=True)
    dice = random.Random(options.seed)
    rules: dict[str, Any] = {"end.epochs": options.epochs, "optimizer.lr": 2e-3, "min_replicas": 2}
    with tempfile.TemporaryDirectory(prefix="churn-") as folder:
        store = make_run(Path(folder) / "run", **rules)
        source = samples_of_run(store, Path(folder) / "run" / "data")
        finals = []
        for seed in range(NUM_SEEDS):
            spec = dataclasses.replace(store.spec, seed=100 + seed, initial_digests=())
            finals.append(statistics.mean(train_in_one_process(spec, source).losses[-3:]))
        mean, deviation = statistics.mean(finals), statistics.stdev(finals)
        print(f"undisturbed, {NUM_SEEDS} seeds: final loss {mean:.4f} +- {deviation:.4f}", flush=True)
        server = ForkServer()
        try:
            with local_swarm(Path(folder) / "swarm", fork_server=server) as swarm:
                publish_run(store, swarm.initial_peers, 15)
                churn = Churn(TrainingSwarm(swarm, store, Path(folder) / "run"), dice, options.settle_s)
                memory: list[tuple[int, list[float]]] = []
                while (epoch := churn.epoch()) < options.epochs - 1:
                    churn.wait_for(min(epoch + dice.randint(1, 6), options.epochs - 1))
                    memory.append((churn.epoch(), churn.pss_mib()))
                    if churn.epoch() < options.epochs - 8:
                        print(f"epoch {churn.epoch()}: {churn.disturb()}", flush=True)
                steps = churn.training.steps_of(churn.steady[2])
                downloads = sum(
                    any(line.get("downloads") for line in churn.training.trace_of(m)) for m in churn.training.members
                )
        finally:
            server.close()
    final = statistics.mean(steps[epoch]["loss"] for epoch in range(options.epochs - 3, options.epochs))
    half = [(epoch, values) for epoch, values in memory if epoch >= options.epochs // 2]
    slopes = [slope_per_100([(epoch, values[i]) for epoch, values in half]) for i in range(6)]
    report = {
        "seed": options.seed,
        "epochs": options.epochs,
        "final_loss": final,
        "undisturbed_mean": mean,
        "undisturbed_stdev": deviation,
        "deviations": (final - mean) / deviation,
        **churn.counts,
        "members_that_downloaded": downloads,
        "longest_stall_s": round(churn.longest_stall_s, 1),
        "python_pss_slope_mib_per_100_epochs": [round(slope, 2) for slope in slopes[:3]],
        "p2pd_pss_slope_mib_per_100_epochs": [round(slope, 2) for slope in slopes[3:]],
        "pss_mib_at_end": [round(value, 1) for value in memory[-1][1]],
    }
    print(json.dumps(report))
    broken = []
    if abs(report["deviations"]) > MAX_DEVIATIONS:
        broken.append("final loss")
    if max(slopes) > MAX_SLOPE_MIB:
        broken.append("memory")
    if options.epochs >= 50 and not (churn.counts["killed"] and churn.counts["frozen"] and downloads):
        broken.append("too few faults")
    print("broken: " + ", ".join(broken) if broken else "all bounds kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
