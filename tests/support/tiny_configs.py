"""A tiny config for any model type that transformers has: whatever is a size in the type's default config becomes small.

Nothing here knows a family, but for OVERRIDES: what the rules cannot guess. A type that a later version of transformers adds is shrunk by
the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

NUM_BLOCKS = 4
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 32
WINDOW = 8
BIG = 64
"""Whatever no rule knows and is larger becomes HIDDEN."""

# What a type needs to have a default config at all.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    }
}
# What the rules below cannot guess, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},  # else it is no decoder
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_BLOCKS // 2]]},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"] * 2},
    "xmod": {"default_language": "en_XX"},
}

# The first pattern that fits the whole name of a field says how large an integer there may be.
_SIZES: list[tuple[str, int]] = [
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r".*token_id", 2),
    (r".*vocab.*", 288),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_blocks", NUM_BLOCKS),
    (r".*(kv_heads|key_value_heads)", KV_HEADS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r".*(head_dim|d_head|head_size|headdim|dim_head|kv_channels)", HEAD_DIM),
    (r".*rotary_dim", HEAD_DIM // 2),
    (r".*heads?", HEADS),
    (r".*shared_experts?|n_shared.*|first_k_dense.*|num_dense_layers|topk_group", 1),
    (r".*(per_tok|per_token|topk|top_k|moe_k)", 2),
    (r".*experts?(_num)?", 4),
    (r"n_group|num_expert_group|n_groups|o_groups|max_window_layers", 2),
    (r".*(rank|multiple_of|multiple_size)", 8),
    (r".*(floor|window|chunk|topk_blocks|block_size|local_attention).*", WINDOW),
    (r".*(position|n_ctx|seq_len|max_length|context_length).*", 256),
    (r".*(intermediate|ffn|d_inner|dff|feed_forward|_ff).*", 2 * HIDDEN),
    (r".*(hidden|d_model|embd|embed|emb_dim|dim|size|width|scalar).*", HIDDEN),
]
# Sizes that a default config may leave open, although its blocks need them.
_LEFT_OPEN = r"head_dim|.*(key_value_heads|experts|experts_per_tok|topk|top_k)"


def default_config(model_type: str) -> Any:
    """The config that a type has when nothing is said about it."""
    return CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))


def tiny_config(model_type: str, **options: Any) -> Any:
    """The smallest useful config of a type: NUM_BLOCKS blocks, among which is each kind of block that the default config has.

    options: fields that are to have another value. Raises what the type's config class raises where there is no such config.
    """
    default = default_config(model_type)
    return type(default)(**{**_shrunk(default), **OVERRIDES.get(model_type, {}), **options})


def _shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    """Fields to make a small config of the same class with."""
    written = default.to_dict()
    fields = type(default).__dataclass_fields__
    stored = {name: written.get(default.attribute_map.get(name, name)) for name in [*fields, "per_layer_config"]}
    count = int(getattr(default, "num_hidden_layers", 0))
    blocks = _chosen_blocks(stored, count)
    small: dict[str, Any] = {}
    for name, field in fields.items():
        value, kept = stored[name], default.__dict__.get(name)
        if isinstance(kept, PreTrainedConfig):
            small[name] = type(kept)(**_shrunk(kept))
        elif isinstance(value, Mapping):
            small[name] = _shrunk_rotations(value)
        elif isinstance(value, list):
            small[name] = _per_block(value, count, blocks)
        elif value is None and "int" in str(field.type) and re.fullmatch(_LEFT_OPEN, name):
            small[name] = _size(name, BIG)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _size_among(stored, name)
    if stored["per_layer_config"]:
        small["per_layer_config"] = {
            place: {name: _size_among(own, name) for name in own}
            for place, block in enumerate(blocks)
            for key, own in stored["per_layer_config"].items()
            if int(key) == block
        }
    return small


def _size_among(stored: Mapping[str, Any], name: str) -> int:
    has_full_heads = name == "num_key_value_heads" and stored[name] == stored.get("num_attention_heads")
    return HEADS if has_full_heads else _size(name, stored[name])


def _size(name: str, value: int) -> int:
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return size if size == NUM_BLOCKS and "layer" in name else min(value, size)
    return HIDDEN if value > BIG else value


def _chosen_blocks(stored: Mapping[str, Any], count: int) -> list[int]:
    """NUM_BLOCKS of the default's blocks, in order: the first ones, and for each kind that is not among them the first of it."""
    lists = [values for values in stored.values() if isinstance(values, list) and len(values) == count]
    kinds = [repr([values[block] for values in lists]) for block in range(count)]
    chosen = list(range(min(count, NUM_BLOCKS)))
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    missing = [block for block in firsts if block not in chosen][: NUM_BLOCKS - 1]
    return sorted([*chosen[: len(chosen) - len(missing)], *missing])


def _per_block(values: Sequence[Any], count: int, blocks: Sequence[int]) -> list[Any]:
    """What is left of a list that has an entry for each block, or names some of them; any other list as it is."""
    if len(values) > NUM_BLOCKS and values == sorted({value for value in values if isinstance(value, int)}):
        return [place for place, block in enumerate(blocks) if block in values]
    if len(values) == count:
        return [_size("", values[block]) if isinstance(values[block], int) else values[block] for block in blocks]
    return list(values)


def _shrunk_rotations(tables: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, Mapping):
            small[name] = _shrunk_rotations(value)
        elif name == "mrope_section":
            small[name] = [2, 1, 1]
        elif isinstance(value, list):
            small[name] = value[: HEAD_DIM // 2]
        elif isinstance(value, int) and "position" in name:
            small[name] = min(value, WINDOW)
        else:
            small[name] = value
    return small
