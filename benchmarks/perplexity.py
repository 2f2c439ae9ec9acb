"""What a numeric class costs in quality: perplexity of real text with all blocks in each class, and the ends in fp32.

python benchmarks/perplexity.py --json
The text is Python's own manual, as it comes with every Python. SmolLM2-135M as shipped is a checkpoint of 4 bits (Q4_1: groups of 32 with
a scale and a minimum), which int4 keeps almost exactly; --off-grid measures the same model with weights that lie on no such grid:
each channel between a norm and a linear, or two linears, is scaled by 0.8 to 1.25 and scaled back.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.report import print_report
from node.backend.span_model import SpanModel
from swarm.checkpoint import open_checkpoint
from swarm.decoder import BlockSource
from swarm.ends import Ends
from swarm.numeric_class import NUMERIC_CLASSES
from swarm.span import Span


def windows_of_text(tokenizer: Any, num_tokens: int, window: int) -> list[Tensor]:
    """Windows of token ids [1, window] that do not overlap, num_tokens in all or a little more."""
    from pydoc_data.topics import topics

    text = "\n\n".join(text for _, text in sorted(topics.items()))
    # Four characters are a token or more of them.
    ids = torch.tensor(tokenizer(text[: 8 * num_tokens], add_special_tokens=False)["input_ids"])
    count = -(-num_tokens // window)
    if len(ids) < count * window:
        raise SystemExit(f"this Python's manual has only {len(ids)} tokens of the {count * window} that are wanted")
    return [ids[at * window : (at + 1) * window][None] for at in range(count)]


@torch.inference_mode()
def perplexity(ends: Ends, models: Sequence[SpanModel], windows: Iterable[Tensor]) -> float:
    """Of all tokens of the windows but the first of each. models: spans that cover all blocks in order."""
    total, count = 0.0, 0
    for ids in windows:
        hidden = ends.embed(ids)
        for model in models:
            hidden = model.forward_whole(model.span, hidden.to(model.dtype))
        logits = ends.logits(hidden.to(ends.dtype))[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(logits)
    return math.exp(total / count)


def measure(
    source: BlockSource, windows: Sequence[Tensor], classes: Sequence[str] = tuple(NUMERIC_CLASSES)
) -> dict[str, float]:
    """Perplexity in each class, and its change in percent from fp32, which must be among them."""
    ends, span = Ends(source), Span(0, source.num_blocks)
    results: dict[str, float] = {}
    for name in classes:
        results[f"{name}_perplexity"] = perplexity(ends, [SpanModel(source, span, numeric_class=name)], windows)
    plain = results["fp32_perplexity"]
    for name in classes:
        if name != "fp32":
            results[f"{name}_change_percent"] = 100 * (results[f"{name}_perplexity"] / plain - 1)
    return results


class OffGrid:
    """A checkpoint of a llama with other weights that compute the same."""

    def __init__(self, checkpoint: BlockSource) -> None:
        self._checkpoint = checkpoint
        self.name, self.config, self.num_blocks = checkpoint.name, checkpoint.config, checkpoint.num_blocks

    def load_ends(self) -> dict[str, Tensor]:
        return self._checkpoint.load_ends()

    def load_blocks(self, span: Span) -> dict[str, Tensor]:
        tensors = {name: tensor.float().clone() for name, tensor in self._checkpoint.load_blocks(span).items()}
        generator = torch.Generator().manual_seed(0)
        for prefix in sorted({name.partition(".self_attn.")[0] for name in tensors if ".self_attn." in name}):
            for writer, readers in _CHANNELS.items():
                writing = tensors[f"{prefix}.{writer}.weight"]
                factors = torch.empty(len(writing)).uniform_(0.8, 1.25, generator=generator)
                writing *= factors.view(-1, *[1] * (writing.ndim - 1))
                if writer == "self_attn.v_proj":
                    factors = self._of_query_heads(factors)
                for reader in readers:
                    tensors[f"{prefix}.{reader}.weight"] /= factors
        return tensors

    def _of_query_heads(self, factors: Tensor) -> Tensor:
        """Several heads of queries read one head of values."""
        heads = factors.view(self.config.num_key_value_heads, -1)
        return heads.repeat_interleave(self.config.num_attention_heads // len(heads), 0).flatten()


_CHANNELS = {
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.v_proj": ["self_attn.o_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.up_proj": ["mlp.down_proj"],
}


def _rounded(results: dict[str, float]) -> Iterator[tuple[str, float]]:
    for key, value in results.items():
        yield key, round(value, 4 if key.endswith("_perplexity") else 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--classes", nargs="+", choices=list(NUMERIC_CLASSES), default=list(NUMERIC_CLASSES))
    parser.add_argument("--off-grid", action="store_true", help="llamas only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    windows = windows_of_text(checkpoint.tokenizer(), options.tokens, options.window)
    source: BlockSource = OffGrid(checkpoint) if options.off_grid else checkpoint
    classes = ["fp32", *(name for name in options.classes if name != "fp32")]
    results = dict(_rounded(measure(source, windows, classes)))
    parameters = {"model": options.model, "tokens": len(windows) * options.window, "window": options.window}
    print_report("perplexity", {**parameters, "off_grid": options.off_grid}, results, as_json=options.json)


if __name__ == "__main__":
    main()
