"""Many sessions at once on real nodes: each gets the text that it would get alone, in shared batches, over shared pages, in little room."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm
from protos import node_pb2
from swarm.span import Span
from tests.support.probes import node_probe
from tests.support.processes import Process, local_swarm

WHOLE = Span(0, 4)
BEGINNING = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3
NUM_AT_ONCE = 8


def status_of(node: Process, path: Path) -> node_pb2.NodeStatus:
    async def ask() -> node_pb2.NodeStatus:
        async with node_probe(node, path, WHOLE) as probe:
            return await probe.status()

    return asyncio.run(ask())


class Texts:
    """Greedy generation of any of some prompts, through the swarm or in this process."""

    def __init__(self, path: Path, remote) -> None:
        self.remote = remote
        self.local = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def of(self, model, prompt: str, num_new: int) -> list[int]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        return model.generate(**inputs, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)[0].tolist()

    def assert_same_when_generated_at_once(self, wanted: list[tuple[str, int]]) -> None:
        def generate(number: int) -> list[int]:
            torch.set_num_threads(1)
            return self.of(self.remote, *wanted[number])

        with ThreadPoolExecutor(len(wanted)) as threads:
            found = list(threads.map(generate, range(len(wanted))))
        expected = [self.of(self.local, *one) for one in wanted]
        assert found == expected


@pytest.fixture(scope="module")
def served(tiny_path, fork_server, tmp_path_factory):
    """(one node that serves all blocks, Texts)"""
    with local_swarm(tmp_path_factory.mktemp("many"), fork_server=fork_server) as nodes:
        (node,) = nodes.start_nodes(tiny_path, "0:4")
        with swarm.connect(initial_peers=nodes.initial_peers, model=str(tiny_path)) as connected:
            yield node, Texts(tiny_path, connected.model())


def test_sessions_of_all_lengths_share_batches_and_none_notices(served, tiny_path) -> None:
    node, texts = served
    before = status_of(node, tiny_path)
    prompts = [f"{number}: " + "word " * (7 * number) for number in range(NUM_AT_ONCE)]
    texts.assert_same_when_generated_at_once(
        [(prompt, 24 + 3 * number) for number, prompt in enumerate(prompts)],
    )
    after = status_of(node, tiny_path)
    num_steps, num_batches = after.num_steps - before.num_steps, after.num_batches - before.num_batches
    assert num_steps == sum(24 + 3 * number for number in range(NUM_AT_ONCE))
    assert num_batches < 0.8 * num_steps


def test_what_others_began_with_is_not_computed_again(served, tiny_path) -> None:
    node, texts = served
    texts.assert_same_when_generated_at_once([(BEGINNING + "One.", 8)])
    before = status_of(node, tiny_path).num_found_tokens
    texts.assert_same_when_generated_at_once([(BEGINNING + "Another.", 8), (BEGINNING, 8)])
    found = status_of(node, tiny_path).num_found_tokens - before
    num_tokens = len(texts.tokenizer(BEGINNING)["input_ids"])
    assert 2 * (num_tokens - 2 * 16) <= found <= 2 * num_tokens + 32


def test_without_room_for_all_the_youngest_wait_and_none_is_lost(tiny_path, fork_server, tmp_path_factory) -> None:
    num_new = 150
    with local_swarm(tmp_path_factory.mktemp("little-room"), fork_server=fork_server) as nodes:
        # One MiB is 1,600 tokens of this model; six rows of 400 to 450 are more.
        node = nodes.start_node(tiny_path, "0:4", "--cache-mib", "1")
        node.ready()
        with swarm.connect(
            initial_peers=nodes.initial_peers, model=str(tiny_path), request_timeout_s=120.0
        ) as connected:
            texts = Texts(tiny_path, connected.model())
            prompts = [f"{number} " + BEGINNING[number:] for number in range(6)]
            texts.assert_same_when_generated_at_once([(prompt, num_new) for prompt in prompts])
        assert status_of(node, tiny_path).num_evicted_sessions > 0
