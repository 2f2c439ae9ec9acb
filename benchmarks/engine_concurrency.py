"""Part "concurrency": many sessions on one node against one, whole generations beside each other, and a long prompt among decoders.

At the node's stream: one client process, a real node with blocks of a 1.1B LLaMA, random hidden states in and out, sessions of one row.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swarm
from benchmarks.engine_generate import SPANS
from benchmarks.engine_models import SMOLLM2, random_llama
from benchmarks.generation import PROMPT, generate_s
from benchmarks.report import spread
from swarm.client.connect import SwarmClient
from swarm.client.session import Session
from tests.support.processes import local_swarm

_PROMPT_TOKENS = 16
_STEPS_BEFORE = 8
"""Each decoder takes so many steps before the long prompt comes."""


def measure_concurrency(options: argparse.Namespace) -> dict[str, Any]:
    """Results of the part, with the first of the precisions. options: see benchmarks/engine.py."""
    precision = options.precisions[0]
    torch.set_num_threads(1)  # the node computes; what the client does is small
    results: dict[str, Any] = {"concurrency.precision": precision}
    model, hidden_size = random_llama(options.cache, options.shape), options.shape.hidden
    with tempfile.TemporaryDirectory() as folder, local_swarm(Path(folder)) as nodes:
        blocks = f"0:{options.shape.blocks}"
        nodes.start_node(model, blocks, "--precision", precision, threads=options.threads).ready()
        with swarm.connect(initial_peers=nodes.initial_peers, model=str(model)) as connected:
            client = connected.client
            results |= connected.run(_measure_rates(client, hidden_size, options))
            results |= connected.run(_measure_stalls(client, hidden_size, options))
    return results | _measure_generations(precision, options)


async def _measure_rates(client: SwarmClient, hidden_size: int, options: argparse.Namespace) -> dict[str, Any]:
    many = options.sessions
    rates: dict[int, list[float]] = {1: [], many: []}
    await _decode_rate(client, hidden_size, many, 2)
    for _ in range(options.repeats):
        for num_sessions, found in rates.items():
            found.append(await _decode_rate(client, hidden_size, num_sessions, options.session_steps))
    return {
        "concurrency.1_session_tokens_per_s": spread(rates[1]),
        f"concurrency.{many}_sessions_tokens_per_s": spread(rates[many]),
        f"concurrency.{many}_sessions_ratio_to_1": spread(
            [together / alone for alone, together in zip(rates[1], rates[many], strict=True)]
        ),
    }


async def _decode_rate(client: SwarmClient, hidden_size: int, num_sessions: int, num_steps: int) -> float:
    """Tokens per second of all sessions together."""
    token = _hidden(1, hidden_size)

    async def decode(session: Session) -> None:
        for _ in range(num_steps):
            await session.step(token)

    async with _opened(client, hidden_size, num_sessions, num_steps) as sessions:
        started = time.perf_counter()
        await asyncio.gather(*map(decode, sessions))
        return num_sessions * num_steps / (time.perf_counter() - started)


@asynccontextmanager
async def _opened(
    client: SwarmClient, hidden_size: int, num_sessions: int, num_steps: int
) -> AsyncIterator[Sequence[Session]]:
    """Sessions that have had a short prompt and have room for num_steps more tokens."""
    async with AsyncExitStack() as stack:
        sessions = []
        for _ in range(num_sessions):
            session = client.session(batch=1, max_length=_PROMPT_TOKENS + num_steps)
            sessions.append(await stack.enter_async_context(session))
            await session.step(_hidden(_PROMPT_TOKENS, hidden_size))
        yield sessions


def _hidden(num_tokens: int, hidden_size: int) -> Tensor:
    return torch.randn(1, num_tokens, hidden_size, generator=torch.Generator().manual_seed(0))


@dataclass(slots=True)
class _Decoder:
    """A session that decodes until it is told to stop, and when each of its steps was done."""

    session: Session
    done: list[float] = field(default_factory=list)
    reached: asyncio.Condition = field(default_factory=asyncio.Condition)
    is_stopped: bool = False

    async def run(self, token: Tensor) -> None:
        while not self.is_stopped:
            await self.session.step(token)
            async with self.reached:
                self.done.append(time.perf_counter())
                self.reached.notify_all()

    async def wait_for(self, num_more: int) -> None:
        """Until so many more steps are done."""
        wanted = len(self.done) + num_more
        async with self.reached:
            await self.reached.wait_for(lambda: len(self.done) >= wanted)

    def gaps(self, since: float, until: float) -> list[float]:
        """Seconds between steps, of the gaps of which some part lies between the two."""
        pairs = zip(self.done, self.done[1:], strict=False)
        return [after - before for before, after in pairs if after > since and before < until]


async def _measure_stalls(client: SwarmClient, hidden_size: int, options: argparse.Namespace) -> dict[str, Any]:
    alone, among, stalls, usual = [], [], [], []
    await _first_token_s(client, hidden_size, options.prefill_tokens)
    for _ in range(options.repeats):
        alone.append(await _first_token_s(client, hidden_size, options.prefill_tokens))
        async with _opened(client, hidden_size, options.decoders, options.longest_session) as sessions:
            decoders = [_Decoder(session) for session in sessions]
            async with asyncio.TaskGroup() as group:
                for decoder in decoders:
                    group.create_task(decoder.run(_hidden(1, hidden_size)))
                begun = time.perf_counter()
                await asyncio.gather(*(decoder.wait_for(_STEPS_BEFORE) for decoder in decoders))
                asked = time.perf_counter()
                among.append(await _first_token_s(client, hidden_size, options.prefill_tokens))
                answered = time.perf_counter()
                await asyncio.gather(*(decoder.wait_for(1) for decoder in decoders))
                for decoder in decoders:
                    decoder.is_stopped = True
        usual += [gap for decoder in decoders for gap in decoder.gaps(begun, asked)]
        stalls.append(max(gap for decoder in decoders for gap in decoder.gaps(asked, answered)))
    name = f"concurrency.first_token_{options.prefill_tokens}"
    return {
        f"{name}_alone_s": spread(alone),
        f"{name}_among_{options.decoders}_decoders_s": spread(among),
        f"concurrency.longest_stall_of_{options.decoders}_decoders_s": spread(stalls),
        "concurrency.usual_step_of_them_s": spread(usual),
    }


async def _first_token_s(client: SwarmClient, hidden_size: int, num_tokens: int) -> float:
    """Seconds to open a session and get a long prompt through it, which the node has not seen before."""
    hidden = torch.randn(1, num_tokens, hidden_size)
    started = time.perf_counter()
    async with client.session(batch=1, max_length=num_tokens) as session:
        await session.step(hidden)
        return time.perf_counter() - started


def _measure_generations(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Whole generate() of SmolLM2 through two nodes, by one thread of a client and by many at once."""
    many, num_new = options.sessions, options.generate_tokens
    rates: dict[int, list[float]] = {1: [], many: []}
    with tempfile.TemporaryDirectory() as folder, local_swarm(Path(folder)) as nodes:
        started = [nodes.start_node(SMOLLM2, span, "--precision", precision, threads=options.threads) for span in SPANS]
        for node in started:
            node.ready()
        with (
            swarm.connect(initial_peers=nodes.initial_peers, model=SMOLLM2) as connected,
            ThreadPoolExecutor(many) as pool,
        ):
            model, prompt = connected.model(), connected.tokenizer()(PROMPT, return_tensors="pt")
            generate_s(model, prompt, 4)
            for _ in range(options.repeats):
                for num_threads, found in rates.items():
                    begun = time.perf_counter()
                    for done in [pool.submit(generate_s, model, prompt, num_new) for _ in range(num_threads)]:
                        done.result()
                    found.append(num_threads * num_new / (time.perf_counter() - begun))
    return {
        "concurrency.1_generate_tokens_per_s": spread(rates[1]),
        f"concurrency.{many}_generates_tokens_per_s": spread(rates[many]),
        f"concurrency.{many}_generates_ratio_to_1": spread(
            [together / alone for alone, together in zip(rates[1], rates[many], strict=True)]
        ),
    }
