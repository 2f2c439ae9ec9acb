"""Random kills, freezes, lies, leavings and joins under continuous generation: every output is compared with the local model's.

    scripts/soak kills [--seed N] [--minutes M] [--clients C]

Two slow, honest nodes outlive everything, so no generation may fail and every one must give the text without faults. A fault fires on a
random step of its victim. Prints the seed, each round's faults as they fire, and at the end one JSON line; exit code 1 at any difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm
from tests.support.fork_server import ForkServer
from tests.support.models import save_tiny
from tests.support.processes import LocalSwarm, Process, local_swarm

SPANS = ("0:1", "0:2", "0:3", "0:4", "1:2", "1:3", "1:4", "2:3", "2:4", "3:4")
FAULTS = ("SIGKILL", "SIGKILL", "SIGKILL", "SIGSTOP", "SIGTERM", "kill_p2pd", "silence", "nan", "garbage", "truncate")
MAX_VICTIMS = 4
TEXT = "The quick brown fox jumps over a lazy swarm of 12345 small machines and then, by the sea, it sleeps"
# What a frozen or silent peer costs one generation at most, times the victims that it may meet.
REQUEST_TIMEOUT_S = 8.0
GENERATION_BOUND_S = 60.0


@dataclass(slots=True)
class Tally:
    """What happened so far; written by all clients."""

    num_generations: int = 0
    num_tokens: int = 0
    num_reroutes: int = 0
    stall_s: float = 0.0
    longest_stall_s: float = 0.0
    longest_generation_s: float = 0.0
    planted: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Chaos:
    """Keeps up to MAX_VICTIMS fast nodes in the swarm, each with a fault planted, and clears away those whose fault has fired."""

    def __init__(self, nodes: LocalSwarm, model: Path, dice: random.Random, tally: Tally) -> None:
        self._nodes, self._model, self._dice, self._tally = nodes, model, dice, tally
        self._victims: dict[Process, str] = {}

    def advance(self) -> None:
        for victim, action in list(self._victims.items()):
            if self._nodes.trace_of(victim):
                self._tally.fired[action] += 1
                print(f"  fired {action} on {victim.log_path.name}", flush=True)
                del self._victims[victim]
                self._retire(victim, action)
            elif not victim.is_running():
                self._tally.failures.append(f"{victim.log_path.name} ended by itself: {victim.log[-500:]}")
                del self._victims[victim]
        if len(self._victims) < MAX_VICTIMS:
            self._join()

    def _retire(self, victim: Process, action: str) -> None:
        if action == "SIGSTOP" and self._dice.random() < 0.5:
            victim.send(signal.SIGCONT)  # it wakes up and serves on, without a fault
        elif action not in ("SIGKILL", "SIGTERM", "kill_p2pd"):
            victim.send(signal.SIGKILL)

    def _join(self) -> None:
        action, at_step = self._dice.choice(FAULTS), self._dice.randint(1, 40)
        span = self._dice.choice(SPANS)
        flags = ("--record-lifetime", "6", "--drain-timeout", str(self._dice.choice((0.1, 5))))
        fault = {"action": action, "at_step": at_step}
        speed = self._dice.choice((1e-6, 5e-4, 1e-3))
        victim = self._nodes.start_node(self._model, span, *flags, s_per_block=speed, fault=fault)
        victim.ready()
        self._victims[victim] = action
        self._tally.planted[action] += 1

    def close(self) -> None:
        for victim in self._victims:
            self._nodes.plant(victim, None)


def generate_for_ever(
    client: swarm.Swarm, local: Any, tokenizer: Any, seed: int, tally: Tally, stop: threading.Event
) -> None:
    """One client: random prompts and ways of generating, each compared with the local model, until stop is set."""
    dice, model = random.Random(seed), client.model()
    while not stop.is_set():
        prompts = [" ".join(dice.sample(TEXT.split(), dice.randint(1, 12))) for _ in range(dice.choice((1, 1, 1, 3)))]
        length = dice.randint(4, 40)
        options: dict[str, Any] = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        options |= dice.choice(({}, {}, {"num_beams": 3}))
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        started = time.monotonic()
        try:
            ours = model.generate(**inputs, **options)
        except swarm.SwarmError as error:
            with tally.lock:
                tally.failures.append(f"{type(error).__name__}: {error}")
            continue
        took_s, stats = time.monotonic() - started, model.last_stats
        theirs = local.generate(**inputs, **options)
        with tally.lock:
            tally.num_generations += 1
            tally.num_tokens += length * len(prompts)
            tally.num_reroutes += stats.num_reroutes
            tally.stall_s += stats.stall_s
            tally.longest_stall_s = max(tally.longest_stall_s, stats.stall_s)
            tally.longest_generation_s = max(tally.longest_generation_s, took_s)
            if not torch.equal(ours, theirs):
                tally.failures.append(f"other tokens for {prompts} {options}: {ours.tolist()} != {theirs.tolist()}")
            if took_s > GENERATION_BOUND_S:
                tally.failures.append(f"a generation took {took_s:.1f} s: {prompts} {options}")


@contextlib.contextmanager
def forking_swarm(folder: Path) -> Iterator[LocalSwarm]:
    server = ForkServer()
    try:
        with local_swarm(folder / "swarm", fork_server=server) as nodes:
            yield nodes
    finally:
        server.close()


def run(seed: int, minutes: float, num_clients: int) -> Tally:
    dice, tally, stop = random.Random(seed), Tally(), threading.Event()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    torch.set_num_threads(1)
    model = save_tiny("llama", folder / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    locals_ = [AutoModelForCausalLM.from_pretrained(model).eval() for _ in range(num_clients)]
    with forking_swarm(folder) as nodes, contextlib.ExitStack() as stack:
        nodes.start_nodes(model, "0:2", "2:4", s_per_block=4e-3)
        clients = [
            stack.enter_context(
                swarm.connect(
                    initial_peers=nodes.initial_peers,
                    model=str(model),
                    request_timeout_s=REQUEST_TIMEOUT_S,
                    records_max_age_s=1.0,
                )
            )
            for _ in range(num_clients)
        ]
        chaos = Chaos(nodes, model, dice, tally)
        threads = [
            threading.Thread(target=generate_for_ever, args=(client, local, tokenizer, seed + i, tally, stop))
            for i, (client, local) in enumerate(zip(clients, locals_, strict=True))
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60 * minutes
        try:
            while time.monotonic() < deadline and not tally.failures:
                chaos.advance()
                time.sleep(0.2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            chaos.close()
    if tally.failures:
        print(f"logs are kept in {folder}", flush=True)
    else:
        shutil.rmtree(folder)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=2)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    tally = run(options.seed, options.minutes, options.clients)
    numbers = {
        name: getattr(tally, name)
        for name in (
            "num_generations",
            "num_tokens",
            "num_reroutes",
            "stall_s",
            "longest_stall_s",
            "longest_generation_s",
        )
    }
    numbers |= {"planted": dict(tally.planted), "fired": dict(tally.fired), "failures": tally.failures}
    print(json.dumps({"seed": options.seed, "minutes": options.minutes, "clients": options.clients, **numbers}))
    if not tally.fired:
        print("no fault fired: nothing was shown", file=sys.stderr)
    return 1 if tally.failures or not tally.fired else 0


if __name__ == "__main__":
    sys.exit(main())
