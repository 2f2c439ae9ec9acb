"""Part "generate": SmolLM2-135M through two nodes against llama.cpp and transformers on this machine, and where a token's time goes.

Whole greedy generate() calls of the client library with a short prompt; each round runs everybody once, so that a ratio is of
neighbours in time. llama.cpp has the same weights as GGUF: F16 against bf16 nodes, Q8_0 against int8 nodes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

import swarm
from benchmarks.engine_llama import LlamaProcess, fastest_llama
from benchmarks.engine_models import SMOLLM2, smollm2_gguf
from benchmarks.generation import PROMPT, generate_s
from benchmarks.report import spread
from swarm.checkpoint import open_checkpoint
from swarm.client.model import RemoteCache
from tests.support.processes import local_swarm

SPANS = ("0:15", "15:30")
COUNTERPARTS = {"bf16": "f16", "int8": "q8_0"}
"""Of a node's precision: the GGUF that holds as much of a weight."""


@dataclass(slots=True)
class Contestant:
    """Nodes of one precision with their client, and llama.cpp beside them if there is one."""

    precision: str
    model: Any
    llama: LlamaProcess | None
    swarm_rates: list[float] = field(default_factory=list)
    llama_rates: list[float] = field(default_factory=list)
    llama_tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class TokenTimes:
    """Milliseconds of each decoded token, by where they went."""

    of: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def measure_generate(options: argparse.Namespace) -> dict[str, Any]:
    """Results of the part. options: see benchmarks/engine.py."""
    checkpoint = open_checkpoint(SMOLLM2)
    tokenizer = checkpoint.tokenizer()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    wanted = [name for name in options.precisions if name in COUNTERPARTS]
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        contestants = [Contestant(name, *_start(stack, name, prompt, options)) for name in wanted]
        torch.set_num_threads(options.threads)
        local = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
        results |= _race(contestants, local, prompt, options)
        for contestant in contestants:
            times = trace_generate(contestant.model, prompt, options.tokens)
            results |= {f"{contestant.precision}.{key}": spread(values) for key, values in times.of.items()}
    return results


def _start(
    stack: ExitStack, precision: str, prompt: dict[str, Any], options: argparse.Namespace
) -> tuple[Any, LlamaProcess | None]:
    """Nodes in a swarm of their own, so that no route mixes precisions; their model; llama.cpp."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    nodes = stack.enter_context(local_swarm(folder))
    for node in [nodes.start_node(SMOLLM2, span, "--precision", precision, threads=options.threads) for span in SPANS]:
        node.ready()
    connected = stack.enter_context(swarm.connect(initial_peers=nodes.initial_peers, model=SMOLLM2))
    if options.llama_python is None:
        return connected.model(), None
    gguf = smollm2_gguf(options.cache, COUNTERPARTS[precision])
    llama = fastest_llama(options.llama_python, gguf, options.threads, prompt["input_ids"][0].tolist())
    return connected.model(), stack.enter_context(llama)


def _race(
    contestants: Sequence[Contestant], local: Any, prompt: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    ids, num_new = prompt["input_ids"][0].tolist(), options.tokens
    local_rates: list[float] = []
    for model in (local, *(contestant.model for contestant in contestants)):
        generate_s(model, prompt, 8)
    for _ in range(options.repeats):
        for contestant in contestants:
            if contestant.llama is not None:
                round_ = contestant.llama.generate(ids, num_new)
                contestant.llama_rates.append(num_new / round_.seconds)
                contestant.llama_tokens = round_.tokens
            contestant.swarm_rates.append(num_new / generate_s(contestant.model, prompt, num_new))
        local_rates.append(num_new / generate_s(local, prompt, num_new))
    results: dict[str, Any] = {"local_fp32.tokens_per_s": spread(local_rates)}
    for contestant in contestants:
        name, rates = contestant.precision, contestant.swarm_rates
        results[f"{name}.tokens_per_s"] = spread(rates)
        results[f"{name}.ratio_to_local_fp32"] = spread(_ratios(rates, local_rates))
        if contestant.llama is not None:
            theirs = f"llama_cpp_{COUNTERPARTS[name]}"
            results[f"{name}.ratio_to_{theirs}"] = spread(_ratios(rates, contestant.llama_rates))
            results[f"{theirs}.tokens_per_s"] = spread(contestant.llama_rates)
            results[f"{theirs}.tokens_as_local_fp32"] = _num_agreed(local, prompt, contestant.llama_tokens)
            results[f"{theirs}.build"] = (
                f"llama-cpp-python {contestant.llama.build['version']}, wait policy {contestant.llama.wait_policy or 'its own'}, {contestant.llama.build['system']}"
            )
    return results


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def _num_agreed(local: Any, prompt: dict[str, Any], tokens: Sequence[int]) -> int:
    """How many of llama.cpp's tokens transformers would have chosen in their place in fp32: shows that the GGUF holds the same model."""
    whole = torch.cat([prompt["input_ids"][0], torch.tensor(tokens)])
    with torch.inference_mode():
        chosen = local(whole[None]).logits[0].argmax(-1)
    return int((chosen[-len(tokens) - 1 : -1] == whole[-len(tokens) :]).sum())


class _TokenClock(BaseStreamer):
    """When each token came, and what the hops said of their last step."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.came: list[float] = []
        self.hops: list[list[Any]] = []

    def put(self, value: Any) -> None:
        session = self._model.current_session
        if session is not None:  # there is none when the prompt is put
            self.came.append(time.perf_counter())
            self.hops.append([hop.timing for hop in session.hops])

    def end(self) -> None: ...


def trace_generate(model: Any, prompt: dict[str, Any], num_new: int) -> TokenTimes:
    """One generate() with clocks inside. The first token, which opens the session and carries the prompt, is left out.

    token = embedding + head + blocks + bookkeeping (transformers' loop, sampling, masks), and blocks = crossing (to the client's
    event loop and back, the session's own work) + for each hop: queue + compute, as the node says, + overhead (encoding, wire, p2pd).
    """
    clock, ends = _TokenClock(model), model._ends
    with _timed(ends, "embed") as embeds, _timed(ends, "logits") as heads, _timed(RemoteCache, "step") as steps:
        generate_s(model, prompt, num_new, clock)
    times = TokenTimes()
    for index in range(1, len(clock.came)):
        token_s = clock.came[index] - clock.came[index - 1]
        hops = clock.hops[index]
        spent = {"embedding": embeds[index], "head": heads[index]}
        spent["crossing"] = steps[index] - sum(hop.step_s for hop in hops)
        spent["bookkeeping"] = token_s - embeds[index] - heads[index] - steps[index]
        for number, hop in enumerate(hops, 1):
            spent |= {f"hop{number}_queue": hop.queue_s, f"hop{number}_compute": hop.compute_s}
            spent[f"hop{number}_overhead"] = overhead_s = hop.step_s - hop.queue_s - hop.compute_s
            times.of["overhead_per_hop_ms"].append(1000 * overhead_s)
        for what, seconds in {"whole": token_s, **spent}.items():
            times.of[f"token_time.{what}_ms"].append(1000 * seconds)
    return times


@contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Seconds of each call of a method, of one object or of a class."""
    original: Callable[..., Any] = getattr(owner, name)
    was_own = name in vars(owner)
    seconds: list[float] = []

    def call(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, call)
    try:
        yield seconds
    finally:
        if was_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
