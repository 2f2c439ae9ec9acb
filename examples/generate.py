"""Continue a prompt with a model that is spread over a swarm, and say how it went.

python examples/generate.py --initial-peers /ip4/127.0.0.1/tcp/31337/p2p/12D3KooW... "The capital of France is"
"""

from __future__ import annotations

import argparse
import sys
import time

from transformers import TextStreamer

import swarm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="MULTIADDR")
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id, directory or GGUF file")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()

    with swarm.connect(initial_peers=options.initial_peers, model=options.model) as connected:
        model, tokenizer = connected.model(), connected.tokenizer()
        inputs = tokenizer(options.prompt, return_tensors="pt")
        started = time.monotonic()
        output = model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
        elapsed_s = time.monotonic() - started
        num_new = output.shape[1] - inputs["input_ids"].shape[1]
        session = model.last_session
        route = " -> ".join(f"{hop.span} at {hop.peer_id[-8:]}" for hop in session.last_route)
        print(f"[{num_new} tokens in {elapsed_s:.1f} s through {route}; hops replaced: {session.stats.num_reroutes}]")


if __name__ == "__main__":
    try:
        main()
    except swarm.SwarmError as error:
        sys.exit(f"error: {error}")
