"""A conversation whose KV caches stay on the nodes: each turn sends only the tokens that are new.

python examples/chat.py --initial-peers /ip4/127.0.0.1/tcp/31337/p2p/12D3KooW...
An empty line or the end of the input ends it.
"""

from __future__ import annotations

import argparse
import sys

from transformers import TextStreamer

import swarm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="MULTIADDR")
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id, directory or GGUF file")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of the whole conversation")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens of one answer")
    options = parser.parse_args()

    messages: list[dict[str, str]] = []
    with swarm.connect(initial_peers=options.initial_peers, model=options.model) as connected:
        model, tokenizer = connected.model(), connected.tokenizer()
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with model.session(max_length=options.max_length) as session:
            for line in iter(lambda: read_line("you> "), ""):
                messages.append({"role": "user", "content": line})
                prompt = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                output = model.generate(
                    **prompt, max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer
                )
                answer = output[0, prompt["input_ids"].shape[1] :]
                messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
                print(f"[the nodes hold {session.get_seq_length()} tokens of this conversation]", file=sys.stderr)


def read_line(prompt: str) -> str:
    """One line from the user; empty at the end of the input."""
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    try:
        main()
    except swarm.SwarmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
