"""Any decoder can be cut: ends and spans of random tiny models compute what the whole model does, or are refused with the reason.

Every model type of transformers is tried once (docs/models.md has what became of each); those that people use most are checked more
closely, with options that real checkpoints have. What is compared, and how exactly: tests/support/families.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from node.backend.span_model import SpanModel
from swarm.checkpoint import INDEX_FILE, open_checkpoint
from swarm.ends import Ends
from swarm.errors import BadRequest, UserError
from swarm.span import Span
from tests.support.families import (
    NUM_TOKENS,
    PADDINGS,
    TOLERANCE,
    Cut,
    Whole,
    check_forward_and_decode,
    check_gradients,
    check_padding,
    check_rewind_and_reorder,
    check_swapped_blocks_are_noticed,
    check_two_sessions,
    computes_together,
    distance,
    gradient_through,
)
from tests.support.models import TINY, save_tiny
from tests.support.models_page import PAGE, row, rows_of
from tests.support.survey import ALL_TYPES, survey

SHARDS = {Span(0, 1): [Span(0, 1)], Span(1, 4): [Span(1, 3), Span(3, 4)]}
WHOLE_SHARD = {Span(0, 4): [Span(0, 2), Span(2, 4)]}
# Those that must be served, whatever becomes of the others.
PROMISED = {
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo",
    "olmo2",
    "gpt2",
    "gptj",
    "gpt_neox",
    "bloom",
    "falcon",
    "opt",
    "cohere",
    "stablelm",
    "starcoder2",
    "granite",
    "smollm3",
    "gpt_oss",
    "glm4",
    "mpt",
}


def long_rotations(longest: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": longest, **factors}


# Options that change how a family may be cut.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-alibi": (
        "falcon",
        {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
    ),
    "gpt2-scaled-by-index": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-upcast": ("gpt2", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "qwen2-sliding-from-2": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "phi3-longrope": ("phi3", {"rope_parameters": long_rotations(32), "original_max_position_embeddings": 32}),
}
DYNAMIC_ROTATIONS = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
CASES = {**{family: (family, dict[str, Any]()) for family in sorted(TINY)}, **VARIANTS}


class Subject:
    """One family: the model whole, and cut in two ways."""

    def __init__(self, name: str, folder: Path) -> None:
        family, options = CASES[name]
        self.path = save_tiny(family, folder, max_shard_size="60KB", **options)
        assert (self.path / INDEX_FILE).exists()
        self.whole = Whole(self.path)
        self.cut, self.cut_by_hops = Cut(self.path, SHARDS), Cut(self.path, WHOLE_SHARD)


@pytest.fixture(scope="module", autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_every_type_is_served_or_refused_as_the_page_says(tmp_path: Path, model_type: str) -> None:
    found = row(model_type, survey(model_type, tmp_path))
    assert found == rows_of(PAGE.read_text())[model_type], "run scripts/gen_models, and look at what changed"


def test_the_page_has_every_type_and_those_that_must_be_served_are() -> None:
    rows = rows_of(PAGE.read_text())
    assert list(rows) == list(ALL_TYPES), "run scripts/gen_models"
    assert {model_type for model_type in PROMISED if "| yes |" not in rows[model_type]} == set()
    assert set(TINY) >= PROMISED


def test_forward_prefill_and_decode_equal_the_whole_model(subject: Subject) -> None:
    for cut in (subject.cut, subject.cut_by_hops):
        check_forward_and_decode(subject.whole, cut)


def test_padded_rows_equal_the_whole_model(subject: Subject) -> None:
    for cut in (subject.cut, subject.cut_by_hops):
        check_padding(subject.whole, cut)


@pytest.mark.parametrize("padding", PADDINGS)
def test_loss_and_gradients_equal_the_whole_model(subject: Subject, padding: str) -> None:
    for cut in (subject.cut, subject.cut_by_hops):
        check_gradients(subject.whole, cut, padding)


def test_two_blocks_swapped_give_other_gradients(subject: Subject) -> None:
    """What the test above is worth: it must see that two blocks changed places."""
    (first, _), (model, _), *_ = subject.cut.hops
    order = [(first, Span(0, 1)), (model, Span(2, 3)), (model, Span(1, 2)), (model, Span(3, 4))]
    embeds = subject.whole.embeds()
    _, logits, gradient = gradient_through(subject.cut.ends, subject.cut.hops, embeds, None)
    _, other_logits, other_gradient = gradient_through(subject.cut.ends, order, embeds, None)
    assert distance(other_logits, logits) > 100 * TOLERANCE
    assert distance(other_gradient, gradient) > 100 * TOLERANCE


def test_rewinding_and_reordering_leave_no_trace(subject: Subject) -> None:
    check_rewind_and_reorder(subject.whole, subject.cut)


def test_sessions_on_one_shard_do_not_disturb_each_other(subject: Subject) -> None:
    check_two_sessions(subject.whole, subject.cut_by_hops)


def test_sessions_in_one_batch_equal_the_whole_model(subject: Subject) -> None:
    computes_together(subject.whole, subject.cut_by_hops)  # if it does at all: for which types it must, the page says


def test_swapped_hops_would_be_noticed(subject: Subject) -> None:
    """Else the tests above would prove nothing."""
    check_swapped_blocks_are_noticed(subject.whole, subject.cut)


def test_gradients_pass_through_the_ends(subject: Subject) -> None:
    ends = subject.cut.ends
    embeds = ends.input_embeddings(subject.whole.ids).detach().requires_grad_()
    ends.embed(None, inputs_embeds=embeds).square().sum().backward()
    hidden = torch.randn(2, 3, ends.hidden_size, requires_grad=True)
    ends.logits(hidden).square().sum().backward()
    for leaf in (embeds, hidden):
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and float(leaf.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, r"recurrent state \(conv\)"),
        ("deepseek_v32", {}, r"keep more, or other things, than keys and values of each token \(indexed_attention"),
        ("llama", {"rope_parameters": DYNAMIC_ROTATIONS}, "change each other's results"),
        ("gemma3n_text", {}, r"some of its blocks use the keys and values of others"),
        ("musicgen", {}, "made of several models"),
        ("bert", {"is_decoder": False}, "its tokens depend on later ones"),
        ("doge", {"is_moe": True}, "its tokens depend on later ones"),
        ("roberta", {"is_decoder": True}, "does not count positions from 0"),
        ("git", {}, "something else for a text beside padding"),
        ("openai-gpt", {}, "do not keep keys and values"),
        ("longcat_flash", {}, "has no list of 8 blocks"),
        ("reformer", {"is_decoder": True}, "do not run without its blocks"),
        ("bart", {"is_encoder_decoder": False, "is_decoder": True}, "at a given position"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(
    tmp_path: Path, model_type: str, options: dict[str, Any], reason: str
) -> None:
    outcome = survey(model_type, tmp_path, **options)
    assert re.search(reason, outcome.reason)


def test_a_session_ends_where_rotary_tables_change(tmp_path: Path) -> None:
    """Not only those of later tokens do, so keys in the cache would be wrong."""
    path = save_tiny("phi3", tmp_path, rope_parameters=long_rotations(12), original_max_position_embeddings=12)
    whole, cut = Whole(path), Cut(path, SHARDS)
    session = cut.session()
    assert distance(session.step(whole.ids[:, :12]), whole.logits(whole.ids[:, :12])) < TOLERANCE
    with pytest.raises(BadRequest, match="may have 12 tokens in a session"):
        session.step(whole.ids[:, 12:13])
    check_gradients(whole, cut, "none")  # of 20 tokens, all at once
    assert not computes_together(whole, cut)  # a long text would change the tables of those beside it


def test_bf16_is_as_near_to_fp32_as_the_whole_model_in_bf16(llama: Path) -> None:
    ids = torch.randint(3, 250, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    whole: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        cut = Cut(llama, SHARDS, torch.bfloat16).session().step(ids)
        assert cut.dtype == torch.bfloat16
        assert distance(cut, whole(ids).logits) < 0.02  # a few units of bf16's 8 bits


def test_a_hop_computes_only_on_what_it_was_made_for(llama: Path) -> None:
    model = SpanModel(open_checkpoint(str(llama), progress=False), Span(1, 4))
    with pytest.raises(BadRequest, match="hop 0:2 is not in the span 1:4"):
        model.new_cache(Span(0, 2))
    good = torch.zeros(1, 1, model.hidden_size)
    for wrong in (torch.zeros(1, 1, 7), good[0], good.double()):
        with pytest.raises(BadRequest, match="hidden states must be"):
            model.forward(wrong, model.new_cache(Span(1, 2)))
    for mask in (torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 1)):
        with pytest.raises(BadRequest, match="the mask must be bool"):
            model.forward(good, model.new_cache(Span(1, 2)), mask=mask)
    cache = model.new_cache(Span(1, 2))
    model.forward(good, cache)
    with pytest.raises(BadRequest, match="cannot rewind to 2: the cache holds 1 tokens"):
        cache.rewind(2)
    assert cache.num_bytes == model.cache_bytes_per_token() == 2 * 2 * 8 * 4  # keys, values; 2 heads of 8; fp32


def test_weights_that_do_not_fit_are_named(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama), progress=False)
    tensors = checkpoint.load_blocks(Span(1, 2))
    tensors["model.layers.1.mlp.sideways.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    reason = (
        r"missing \['model\.layers\.0\.mlp\.up_proj\.weight'\], unexpected \['model\.layers\.0\.mlp\.sideways\.weight'"
    )
    with pytest.raises(UserError, match=reason):
        SpanModel(checkpoint, Span(1, 2), state_dict=tensors)


@pytest.mark.parametrize(("family", "attention"), [("gpt2", "attn"), ("gptj", "attn"), ("gpt_neox", "attention")])
def test_checkpoints_of_older_versions_can_be_cut(tmp_path: Path, family: str, attention: str) -> None:
    """They save the causal masks with the weights, and may lack the prefix of the base model."""
    checkpoint = open_checkpoint(str(save_tiny(family, tmp_path)), progress=False)
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in checkpoint.load_blocks(Span(1, 2)).items()}
    stem = min(tensors).partition(".1.")[0]
    tensors[f"{stem}.1.{attention}.masked_bias"] = torch.tensor(-1e9)
    tensors[f"{stem}.1.{attention}.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    SpanModel(checkpoint, Span(1, 2), state_dict=tensors)
    assert tensors == {}


def test_broken_weights_are_not_blamed_on_the_family(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama), progress=False)
    tensors = {key: torch.full_like(tensor, torch.nan) for key, tensor in checkpoint.load_blocks(Span(1, 3)).items()}
    model = SpanModel(checkpoint, Span(1, 3), state_dict=tensors)
    assert bool(model.forward(torch.ones(1, 1, model.hidden_size), model.new_cache(Span(1, 3))).isnan().all())


def test_cutting_is_silent_and_leaves_the_dice_alone(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(str(llama), progress=False)
    state = torch.get_rng_state()
    ends, model = Ends(checkpoint), SpanModel(checkpoint, Span(1, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert ends.lm_head is not None and ends.lm_head.weight is ends.input_embeddings.weight  # tied: once in memory
    held = set(model.view_of(Span(2, 3)).base.parameters())
    assert held == set(model.block(2).parameters()) and held < {weight for _, weight in model.named_parameters()}
