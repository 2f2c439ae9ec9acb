"""Generation through the swarm against local transformers: tokens/s, overhead per hop, time to the first token of a long prompt.

python benchmarks/generation.py --nodes 2 --json
Both run in turn, in this process, with the same number of threads, and the swarm's nodes in processes of their own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer

import swarm
from benchmarks.report import print_report, spread
from swarm.checkpoint import open_checkpoint
from tests.support.processes import local_swarm

PROMPT = "The capital of France is"


class StepTimes(BaseStreamer):
    """Collects the hops' timings after every token."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.times: list[float] = []
        self.hops: list[list[tuple[float, float, float]]] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        session = self._model.current_session
        if session is not None:
            self.hops.append([(hop.timing.step_s, hop.timing.queue_s, hop.timing.compute_s) for hop in session.hops])

    def end(self) -> None:
        pass


def generate_s(model: Any, inputs: dict[str, Any], num_tokens: int, streamer: BaseStreamer | None = None) -> float:
    """Seconds of a greedy generate of exactly num_tokens.

    It ends at a token that does not come: min_new_tokens would look at every logit of every step.
    """
    started = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        eos_token_id=model.config.vocab_size - 1,
        do_sample=False,
        streamer=streamer,
    )
    elapsed = time.perf_counter() - started
    assert output.shape[1] == inputs["input_ids"].shape[1] + num_tokens
    return elapsed


def local_layers_ms(model: Any, num_past: int, repeats: int) -> float:
    """Median milliseconds of one token through all blocks of the local model (no embedding, no head)."""
    hidden = torch.randn(1, num_past, model.config.hidden_size)
    cache = DynamicCache()
    with torch.inference_mode():
        model.model(inputs_embeds=hidden, past_key_values=cache)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            model.model(inputs_embeds=hidden[:, :1], past_key_values=cache)
            times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    edges = [round(index * checkpoint.num_blocks / options.nodes) for index in range(options.nodes + 1)]
    spans = [f"{start}:{end}" for start, end in itertools.pairwise(edges)]
    local = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder, local_swarm(Path(folder)) as nodes:
        for node in [nodes.start_node(options.model, span, "--threads", str(options.threads)) for span in spans]:
            node.ready()
        with swarm.connect(initial_peers=nodes.initial_peers, model=options.model) as connected:
            results = measure(local, connected.model(), connected.tokenizer(), options)
    parameters = {key: value for key, value in vars(options).items() if key != "json"}
    print_report("generation", {**parameters, "dtype": "float32"}, results, as_json=options.json)


def measure(local: Any, remote: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    long_prompt = {"input_ids": torch.randint(100, 20_000, (1, 512), generator=torch.Generator().manual_seed(0))}
    long_prompt["attention_mask"] = torch.ones_like(long_prompt["input_ids"])
    times: dict[str, list[float]] = {"local": [], "swarm": [], "local_first": [], "swarm_first": [], "layers_ms": []}
    hop_overheads_ms: list[float] = []
    step_ms: list[float] = []
    num_hops = 0
    generate_s(local, prompt, 8), generate_s(remote, prompt, 8)
    for _ in range(options.repeats):
        times["local"].append(generate_s(local, prompt, options.tokens))
        streamer = StepTimes(remote)
        times["swarm"].append(generate_s(remote, prompt, options.tokens, streamer))
        decode_steps = streamer.hops[1:]
        num_hops = len(decode_steps[0])
        hop_overheads_ms += [1000 * (step - compute) for hops in decode_steps for step, _, compute in hops]
        step_ms += [1000 * sum(step for step, _, _ in hops) for hops in decode_steps]
        times["local_first"].append(generate_s(local, long_prompt, 1))
        times["swarm_first"].append(generate_s(remote, long_prompt, 1))
        times["layers_ms"].append(local_layers_ms(local, options.tokens // 2, 30))
    ratios = [a / b for a, b in zip(times["local"], times["swarm"], strict=True)]
    first_ratios = [a / b for a, b in zip(times["local_first"], times["swarm_first"], strict=True)]
    cross_check = (statistics.median(step_ms) - statistics.median(times["layers_ms"])) / num_hops
    return {
        "ratio_to_local": spread(ratios),
        "swarm_tokens_per_s": spread([options.tokens / t for t in times["swarm"]]),
        "local_tokens_per_s": spread([options.tokens / t for t in times["local"]]),
        "overhead_per_hop_ms": spread(hop_overheads_ms),
        "overhead_per_hop_by_difference_ms": round(cross_check, 3),
        "first_token_512_swarm_s": spread(times["swarm_first"]),
        "first_token_512_local_s": spread(times["local_first"]),
        "first_token_512_ratio_to_local": spread(first_ratios),
        "num_hops": num_hops,
    }


if __name__ == "__main__":
    main()
