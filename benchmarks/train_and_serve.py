"""Sessions and training on the same nodes: what each costs the other, for several shares (`swarm-node run --serving-share`).

python benchmarks/train_and_serve.py --json
2 stages x 1 node, 1 trainer, and one client with several sessions that decode token after token, each as soon as it has the last one.
In turns: sessions while the training stands still, training without sessions, and both together with each share. Before each turn
with sessions the nodes have made the newest weights ready. All processes compute with one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Threads that spin while they wait take the cores from whoever else computes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

import swarm
from benchmarks.report import print_report, spread
from benchmarks.training import NUM_STAGES, TimedSwarm, create
from swarm.client.connect import SwarmClient
from swarm.client.runs import publish_run
from swarm.client.session import Session
from tests.support.processes import local_swarm, wait_until

_SERVED_TIMEOUT_S = 60


@dataclass
class Sessions:
    """Several at a time, until they are told to stop; and how long each token took, on the way and on the nodes."""

    client: SwarmClient
    options: argparse.Namespace
    opened: threading.Event = field(default_factory=threading.Event)
    """All have their prompts behind them."""
    stop: threading.Event = field(default_factory=threading.Event)
    token_ms: list[float] = field(default_factory=list)
    queue_ms: list[float] = field(default_factory=list)
    """Of a token: waiting for the nodes' devices."""
    compute_ms: list[float] = field(default_factory=list)
    _num_opened: int = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for seed in range(self.options.sessions):
                group.create_task(self._decode(seed))

    async def _decode(self, seed: int) -> None:
        options = self.options
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(3, options.vocab, (options.rows, options.prompt), generator=generator)
        async with self.client.session(batch=options.rows, max_length=options.tokens) as session:
            token = await self._next(session, prompt)
            self._num_opened += 1
            if self._num_opened == options.sessions:
                self.opened.set()
            while not self.stop.is_set():
                started = time.monotonic()
                rewind_to = options.prompt if session.position == options.tokens else None
                token = await self._next(session, token, rewind_to)
                if self.opened.is_set():
                    self.token_ms.append(1000 * (time.monotonic() - started))
                    self.queue_ms.append(1000 * sum(hop.timing.queue_s for hop in session.hops))
                    self.compute_ms.append(1000 * sum(hop.timing.compute_s for hop in session.hops))

    async def _next(self, session: Session, token_ids: Tensor, rewind_to: int | None = None) -> Tensor:
        """int64 [rows, 1]"""
        with torch.inference_mode():
            hidden = self.client.ends.embed(token_ids, position=session.position if rewind_to is None else rewind_to)
        output = await session.step(hidden, rewind_to=rewind_to)
        with torch.inference_mode():
            return self.client.ends.logits(output[:, -1:]).argmax(-1)


@dataclass
class Turns:
    """Each kind of turn, and what was measured in it."""

    timed: TimedSwarm
    options: argparse.Namespace
    folder: Path
    numbers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def serve(self) -> None:
        """Sessions alone."""
        with self._sessions() as sessions:
            time.sleep(self.options.seconds)
        self._note_tokens(sessions, "alone")

    def train(self) -> None:
        """Training alone."""
        self._note_training(self.timed.train(self.options.epochs), "alone")

    def both(self, share: float) -> None:
        self.set_share(share)
        with self._sessions() as sessions:
            seconds = self.timed.train(self.options.epochs)
        self._note_tokens(sessions, str(share))
        self._note_training(seconds, str(share))

    def set_share(self, share: float) -> None:
        path = self.folder / "share"
        path.with_suffix(".new").write_text(str(share))
        path.with_suffix(".new").replace(path)

    @contextmanager
    def _sessions(self) -> Iterator[Sessions]:
        """Sessions that run while the body does."""
        self._wait_until_served()
        model = f"run:{self.timed.store.run_id.hex()}@{self.timed.epoch}"
        peers, cache = self.timed.swarm.initial_peers, self.folder / "client"
        with swarm.connect(initial_peers=peers, model=model, cache_dir=cache) as client, ThreadPoolExecutor(1) as pool:
            sessions = Sessions(client.client, self.options)
            running = pool.submit(client.run, sessions.run())
            try:
                while not sessions.opened.wait(0.1) and not running.done():
                    pass
                yield sessions
            finally:
                sessions.stop.set()
                running.result()

    def _wait_until_served(self) -> None:
        line = f"serving the weights of epoch={self.timed.epoch} "
        wait_until(lambda: all(line in node.log for node in self.timed.nodes), _SERVED_TIMEOUT_S, line)

    def _note_tokens(self, sessions: Sessions, turn: str) -> None:
        for name, values in (
            ("token", sessions.token_ms),
            ("queue", sessions.queue_ms),
            ("compute", sessions.compute_ms),
        ):
            self.numbers[f"{name}_p50_ms {turn}"].append(statistics.median(values))
        self.numbers[f"token_p95_ms {turn}"].append(statistics.quantiles(sessions.token_ms, n=20)[-1])

    def _note_training(self, seconds: float, turn: str) -> None:
        options = self.options
        self.numbers[f"trained_tokens_per_s {turn}"].append(options.epochs * options.batch * options.tokens / seconds)
        for node in self.timed.nodes:
            steps = self.timed.steps_of(node)
            first, last = steps[self.timed.epoch - options.epochs], steps[self.timed.epoch - 1]
            serving_s, training_s = (last[key] - first[key] for key in ("serving_s", "training_s"))
            self.numbers[f"busy {turn}"].append((serving_s + training_s) / (last["at_s"] - first["at_s"]))
            self.numbers[f"serving {turn}"].append(serving_s / (serving_s + training_s))


def measure(turns: Turns) -> dict[str, Any]:
    shares = turns.options.shares
    turns.set_share(shares[0])
    turns.timed.train(turns.options.epochs)  # the first checkpoint
    for repeat in range(turns.options.repeats):
        turns.serve()
        turns.train()
        for index in range(len(shares)):
            turns.both(shares[(index + repeat) % len(shares)])
        latest = {key: round(values[-1], 2) for key, values in turns.numbers.items() if "_p50" in key or "per_s" in key}
        print(f"{latest} load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return summary(turns.numbers, [str(share) for share in shares])


def summary(numbers: dict[str, list[float]], shares: list[str]) -> dict[str, Any]:
    """Ratios are of turns of one repeat."""

    def ratio(name: str, share: str) -> dict[str, float]:
        pairs = zip(numbers[f"{name} {share}"], numbers[f"{name} alone"], strict=True)
        return spread([together / alone for together, alone in pairs])

    results: dict[str, Any] = {}
    for share in shares:
        results[f"token_latency_ratio_at_{share}"] = ratio("token_p50_ms", share)
        results[f"trained_tokens_ratio_at_{share}"] = ratio("trained_tokens_per_s", share)
    for turn in ("alone", *shares):
        for name in ("token_p50_ms", "token_p95_ms", "queue_p50_ms", "compute_p50_ms", "trained_tokens_per_s"):
            results[f"{name}_{turn}"] = spread(numbers[f"{name} {turn}"])
        results[f"busy_part_of_devices_{turn}"] = spread(numbers[f"busy {turn}"])
        results[f"serving_part_of_their_work_{turn}"] = spread(numbers[f"serving {turn}"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="of sessions")
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1, help="of a session")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128, help="of a sample, and of a session")
    parser.add_argument("--batch", type=int, default=64, help="samples of an epoch")
    parser.add_argument("--microbatch", type=int, default=2, help="samples")
    parser.add_argument("--in-flight", type=int, default=4, help="microbatches of the trainer")
    parser.add_argument("--epochs", type=int, default=3, help="of a turn with training")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn without")
    parser.add_argument("--repeats", type=int, default=10, help="turns of each kind")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be 2 or more: what happens between two epochs is measured, too")
    if not 0 < options.prompt < options.tokens:
        parser.error("--prompt must be less than --tokens")
    torch.set_num_threads(1)
    fixed = argparse.Namespace(**vars(options), replicas=1, trainers=1, delay=0)
    num_turns = 1 + options.repeats * (1 + len(options.shares))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rules = {"checkpoint_every": options.epochs, "end.epochs": 1 + options.epochs * num_turns}
        store = create(folder, fixed, **rules)
        nodes = stack.enter_context(local_swarm(folder / "swarm"))
        publish_run(store, nodes.initial_peers, 15)
        timed = TimedSwarm(nodes, store, folder, fixed, env={"SHARE": str(folder / "share")})
        turns = Turns(timed, fixed, folder)
        turns.set_share(options.shares[0])
        timed.start()
        results = measure(turns)
    parameters = {key: value for key, value in vars(options).items() if key != "json"}
    print_report("train_and_serve", {**parameters, "stages": NUM_STAGES}, results, as_json=options.json)


if __name__ == "__main__":
    main()
