"""Any decoder can be cut: ends and spans of random tiny models of many families compute what the whole model does.

Tolerance: 1e-5 of the largest logit, in fp32. Cutting changes no operation, so a whole forward is equal to the bit or nearly; but
matrix products of one token and of twenty add up in another order, and four blocks and the head make some 1e-6 of that.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from node.backend.span_model import SpanModel
from swarm.checkpoint import open_checkpoint
from swarm.ends import Ends
from swarm.errors import BadRequest, UserError
from swarm.span import Span
from tests.support.models import NUM_BLOCKS, TINY, save_tiny

TOLERANCE = 1e-5
NUM_TOKENS = 20  # more than two windows of the families whose attention slides
SHARDS = {Span(0, 1): [Span(0, 1)], Span(1, 4): [Span(1, 3), Span(3, 4)]}
WHOLE_SHARD = {Span(0, 4): [Span(0, 2), Span(2, 4)]}
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
}
DYNAMIC_ROTATIONS = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
CASES = {**{family: (family, dict[str, Any]()) for family in sorted(TINY)}, **VARIANTS}


class Cut:
    """A model cut into ends and shards, each of which serves some hops."""

    def __init__(self, path: Path, shards: dict[Span, list[Span]], dtype: torch.dtype = torch.float32) -> None:
        checkpoint = open_checkpoint(str(path), progress=False)
        self.ends = Ends(checkpoint, dtype=dtype)
        models = {span: SpanModel(checkpoint, span, dtype=dtype) for span in shards}
        self.hops = [(models[span], hop) for span, hops in shards.items() for hop in hops]

    def session(self) -> Session:
        return Session(self)


class Session:
    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.caches = [model.new_cache(hop) for model, hop in cut.hops]

    @torch.inference_mode()
    def step(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for new tokens; mask: bool over all tokens so far."""
        past = self.caches[0].num_tokens
        hidden = self.cut.ends.embed(ids, position=past, mask=mask)
        new_mask = None if mask is None else mask[:, past:]
        for (model, _), cache in zip(self.cut.hops, self.caches, strict=True):
            hidden = model.forward(hidden, cache, mask=new_mask)
        return self.cut.ends.logits(hidden)

    def rewind(self, position: int) -> None:
        for cache in self.caches:
            cache.rewind(position)

    def reorder(self, *rows: int) -> None:
        for cache in self.caches:
            cache.reorder(torch.tensor(rows))


class Subject:
    """One family: the model whole and cut in two ways, and tokens for both."""

    def __init__(self, name: str, folder: Path) -> None:
        family, options = CASES[name]
        self.path = save_tiny(family, folder, **options)
        self.whole: Any = AutoModelForCausalLM.from_pretrained(self.path).eval()
        self.takes_positions = "position_ids" in inspect.signature(self.whole.forward).parameters
        self.cut, self.cut_by_hops = Cut(self.path, SHARDS), Cut(self.path, WHOLE_SHARD)
        self.ids = torch.randint(3, 250, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))


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


def distance(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


@torch.inference_mode()
def test_forward_prefill_and_decode_equal_the_whole_model(subject: Subject) -> None:
    ids, expected = subject.ids, subject.whole(subject.ids).logits
    for cut in (subject.cut, subject.cut_by_hops):
        assert distance(cut.session().step(ids), expected) < TOLERANCE
        session = cut.session()
        steps = [session.step(ids[:, a:b]) for a, b in [(0, 11), *((p, p + 1) for p in range(11, NUM_TOKENS))]]
        assert distance(torch.cat(steps, 1), expected) < TOLERANCE


@torch.inference_mode()
def test_padded_rows_equal_the_whole_model(subject: Subject) -> None:
    ids, mask = subject.ids, torch.ones_like(subject.ids, dtype=torch.bool)
    mask[0, :7] = False
    options = {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)} if subject.takes_positions else {}
    expected = subject.whole(ids, attention_mask=mask.long(), **options).logits[mask]
    assert distance(subject.cut.session().step(ids, mask)[mask], expected) < TOLERANCE
    session = subject.cut_by_hops.session()
    pieces = [session.step(ids[:, a:b], mask[:, :b]) for a, b in [(0, 9), (9, 10), (10, NUM_TOKENS)]]
    assert distance(torch.cat(pieces, 1)[mask], expected) < TOLERANCE
    session.rewind(8)
    session.reorder(1, 0)
    ids, mask = torch.cat([ids[[1, 0], :8], ids[:, 8:]], 1), mask[[1, 0]]
    options = {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)} if subject.takes_positions else {}
    expected = subject.whole(ids, attention_mask=mask.long(), **options).logits[:, 8:]
    assert distance(session.step(ids[:, 8:], mask), expected) < TOLERANCE


PADDINGS = {"none": slice(0), "left": slice(0, 7), "right": slice(15, NUM_TOKENS)}


def gradient_through(ends: Ends, hops: list[tuple[SpanModel, Span]], embeds: Tensor, mask: Tensor | None) -> Any:
    """(loss, logits, gradient w.r.t. embeds) through the hops, each differentiated alone, as nodes do it."""
    given = embeds.clone().requires_grad_()
    embedded = ends.embed_whole(given, mask=mask)
    passed, kept = embedded.detach(), []
    for model, hop in hops:
        start, output, num_bytes = model.differentiable(hop, passed, mask=mask)
        assert num_bytes >= output.nbytes + start.nbytes
        kept.append((start, output))
        passed = output.detach()
    last = passed.requires_grad_()
    logits = ends.logits(last)
    loss = loss_of(logits, mask)
    (gradient,) = torch.autograd.grad(loss, last)
    for start, output in reversed(kept):
        (gradient,) = torch.autograd.grad(output, start, gradient)
    (gradient,) = torch.autograd.grad(embedded, given, gradient) if embedded is not given else (gradient,)
    return loss, logits, gradient


def loss_of(logits: Tensor, mask: Tensor | None) -> Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    return (logits * weights)[mask if mask is not None else ...].mean()


@pytest.mark.parametrize("padding", PADDINGS)
def test_loss_and_gradients_equal_the_whole_model(subject: Subject, padding: str) -> None:
    embeds = subject.whole.get_input_embeddings()(subject.ids).detach()
    mask = None
    if padding != "none":
        mask = torch.ones_like(subject.ids, dtype=torch.bool)
        mask[0, PADDINGS[padding]] = False
    given = embeds.clone().requires_grad_()
    expected = subject.whole(inputs_embeds=given, attention_mask=None if mask is None else mask.long()).logits
    loss = loss_of(expected, mask)
    loss.backward()
    assert given.grad is not None
    real = mask if mask is not None else torch.ones_like(subject.ids, dtype=torch.bool)
    for cut in (subject.cut, subject.cut_by_hops):
        own_loss, logits, gradient = gradient_through(cut.ends, cut.hops, embeds, mask)
        assert float((own_loss - loss).detach().abs() / loss.detach().abs()) < TOLERANCE * 10
        assert distance(logits[real], expected[real]) < TOLERANCE
        assert distance(gradient, given.grad) < TOLERANCE


def test_two_blocks_swapped_give_other_gradients(subject: Subject) -> None:
    """What the test above is worth: it must see that two blocks changed places."""
    embeds = subject.whole.get_input_embeddings()(subject.ids).detach()
    (first, _), (model, _), *_ = subject.cut.hops
    order = [(first, Span(0, 1)), (model, Span(2, 3)), (model, Span(1, 2)), (model, Span(3, 4))]
    _, logits, gradient = gradient_through(subject.cut.ends, subject.cut.hops, embeds, None)
    _, other_logits, other_gradient = gradient_through(subject.cut.ends, order, embeds, None)
    assert distance(other_logits, logits) > 100 * TOLERANCE
    assert distance(other_gradient, gradient) > 100 * TOLERANCE


@torch.inference_mode()
def test_rewinding_and_reordering_leave_no_trace(subject: Subject) -> None:
    ids, session = subject.ids, subject.cut.session()
    session.step(ids[:, :15])
    session.rewind(12)  # longer than the window of families whose attention slides
    session.reorder(1, 1)
    chosen = torch.cat([ids[[1, 1], :12], ids[:, 12:]], dim=1)
    assert distance(session.step(chosen[:, 12:]), subject.whole(chosen).logits[:, 12:]) < TOLERANCE
    session.rewind(0)
    assert distance(session.step(ids), subject.whole(ids).logits) < TOLERANCE


@torch.inference_mode()
def test_sessions_on_one_shard_do_not_disturb_each_other(subject: Subject) -> None:
    ids, cut = subject.ids, subject.cut_by_hops
    expected = [subject.whole(ids[:1]).logits, subject.whole(ids[1:, :14]).logits]
    one, other = cut.session(), cut.session()
    first = [one.step(ids[:1, :10])]
    second = [other.step(ids[1:, :5])]
    for position in range(5, 14):
        first.append(one.step(ids[:1, position + 5 : position + 6]))
        second.append(other.step(ids[1:, position : position + 1]))
    first.append(one.step(ids[:1, 19:]))
    assert distance(torch.cat(first, 1), expected[0]) < TOLERANCE
    assert distance(torch.cat(second, 1), expected[1]) < TOLERANCE


@torch.inference_mode()
def test_swapped_blocks_would_be_noticed(subject: Subject) -> None:
    """Else the tests above would prove nothing."""
    cut = Cut.__new__(Cut)
    cut.ends = subject.cut.ends
    first, middle, last = subject.cut.hops
    cut.hops = [first, last, middle]
    assert distance(cut.session().step(subject.ids), subject.whole(subject.ids).logits) > 100 * TOLERANCE


def test_gradients_pass_through_the_ends(subject: Subject) -> None:
    ends = subject.cut.ends
    embeds = ends.input_embeddings(subject.ids).detach().requires_grad_()
    ends.embed(None, inputs_embeds=embeds).square().sum().backward()
    hidden = torch.randn(2, 3, ends.hidden_size, requires_grad=True)
    ends.logits(hidden).square().sum().backward()
    for leaf in (embeds, hidden):
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and float(leaf.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": NUM_BLOCKS}, "recurrent state"),
        ("jamba", {}, "recurrent state"),
        ("falcon_h1", {}, "recurrent state"),
        ("llama", {**TINY["llama"], "rope_parameters": DYNAMIC_ROTATIONS}, "change each other's results"),
        ("openai-gpt", {"n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4}, "do not keep keys and values"),
        ("bert", {}, "cannot be served in spans"),
        ("bart", {"d_model": 32, "encoder_layers": NUM_BLOCKS, "decoder_layers": NUM_BLOCKS}, "at a given position"),
    ],
)
def test_families_that_cannot_be_cut_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any], reason: str
) -> None:
    monkeypatch.setitem(
        TINY, family, {"vocab_size": TINY["llama"]["vocab_size"], **options} if options else TINY["llama"]
    )
    checkpoint = open_checkpoint(str(save_tiny(family, tmp_path)), progress=False)
    with pytest.raises(UserError, match=reason):
        _ = Ends(checkpoint), SpanModel(checkpoint, Span(0, 1))


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
    model.forward(torch.zeros(1, 1, model.hidden_size), model.new_cache(Span(2, 3)))
    held = {parameter for view in model._views.values() for parameter in view.base.parameters()}
    assert held == set(model._base.parameters())  # a part of the span shares its weights
