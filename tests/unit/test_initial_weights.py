"""Random initial weights: each block's follow from the seed and its index, and together they are the family's own model.

Tolerance of the comparison with the whole model: 1e-5, because it multiplies matrices of another size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from node.backend.span_model import SpanModel
from swarm.ends import Ends
from swarm.errors import UserError
from swarm.span import Span
from swarm.training.initial import RandomCheckpoint, check_initial, initial_digests
from tests.support.models import NUM_BLOCKS, TINY, VOCAB_SIZE
from tests.support.runs import make_spec

ALL = Span(0, NUM_BLOCKS)
STAGES = (Span(0, 1), Span(1, NUM_BLOCKS))
CASES = [(family, tied) for family in ("llama", "gpt2") for tied in (True, False)] + [
    (family, None) for family in ("qwen3", "gemma2", "mixtral", "llama4_text")
]


def config_of(family: str, tied: bool | None = None) -> dict[str, Any]:
    options = {} if tied is None else {"tie_word_embeddings": tied}
    described: dict[str, Any] = AutoConfig.for_model(family, **{**TINY[family], **options}).to_dict()
    return described


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_stages_and_ends_are_the_whole_model(family: str, tied: bool | None) -> None:
    source = RandomCheckpoint(config_of(family, tied), 3, family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = AutoModelForCausalLM.from_config(source.config).eval()
    named = dict(whole.named_parameters())
    weights = {**source.load_blocks(ALL), **source.load_ends()}
    assert weights.keys() == named.keys() and all(tensor.dtype == torch.float32 for tensor in weights.values())
    with torch.no_grad():
        for name, tensor in weights.items():
            # As this family initialises it: gpt2, for one, scales some matrices by the number of blocks.
            own = named[name]
            chance = 10 * float(own.std(correction=0)) / own.numel() ** 0.5
            assert abs(float(tensor.mean() - own.mean())) <= chance, name
            assert abs(float(tensor.std(correction=0) - own.std(correction=0))) <= chance, name
            own.copy_(tensor)
        ids = torch.arange(20)[None] * 7 % VOCAB_SIZE
        ends = Ends(source)
        hidden = ends.embed(ids)
        for span in STAGES:
            hidden = SpanModel(source, span).forward_whole(span, hidden)
        expected = whole(ids).logits
        assert float((ends.logits(hidden) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_block_follows_from_the_seed_and_its_index_alone_and_nothing_else_gets_memory() -> None:
    source = RandomCheckpoint(config_of("llama"), 3, "llama")
    alone = source.load_blocks(Span(2, 3))
    assert all(key.startswith("model.layers.2.") for key in alone)
    state = torch.get_rng_state()
    together = RandomCheckpoint(config_of("llama"), 3, "other name").load_blocks(ALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, together[key]) for key, tensor in alone.items())
    assert all(parameter.is_meta for parameter in source._model.parameters())
    digests = {
        *initial_digests(source, [Span(index, index + 1) for index in ALL]),
        *initial_digests(RandomCheckpoint(config_of("llama"), 4, "llama"), [ALL]),
    }
    assert len(digests) == NUM_BLOCKS + 3
    with pytest.raises(UserError, match="has blocks 0:4, not 3:5"):
        source.load_blocks(Span(3, 5))


def test_another_process_makes_the_same_weights() -> None:
    families = ("gpt2", "mixtral")
    program = (
        "import json, sys; from swarm.span import Span; from swarm.training.initial import *\n"
        "for config in json.load(sys.stdin):\n"
        "    print(*(d.hex() for d in initial_digests(RandomCheckpoint(config, 9, 'x'), [Span(0, 1), Span(1, 4)])))"
    )
    configs = [config_of(family) for family in families]
    other = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(configs), capture_output=True, text=True, check=True
    )
    mine = [initial_digests(RandomCheckpoint(config, 9, "y"), STAGES) for config in configs]
    assert other.stdout.split() == [digest.hex() for digests in mine for digest in digests]


def test_weights_that_a_run_did_not_begin_with_are_refused() -> None:
    source = RandomCheckpoint(config_of("llama"), 3, "llama")
    spec = make_spec(config=config_of("llama"), stages=STAGES, initial_digests=initial_digests(source, STAGES))
    for stage, span in enumerate(STAGES):
        check_initial(spec, stage, source.load_blocks(span))
    check_initial(spec, spec.ends_stage, source.load_ends())
    with pytest.raises(UserError, match="stage 0 made here"):
        check_initial(spec, 0, RandomCheckpoint(config_of("llama"), 4, "llama").load_blocks(STAGES[0]))
    with pytest.raises(UserError, match="the ends made here"):
        check_initial(spec, spec.ends_stage, RandomCheckpoint(config_of("llama"), 4, "llama").load_ends())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": None}, "does not say what it is a config of"),
        ({"model_type": "no_such_model"}, "Unrecognized model"),
        ({"model_type": "t5"}, "T5Config"),
        ({"hidden_size": "many"}, "expected int"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "no_such_function"}, "no_such_function"),
        ({"get_text_config": 7}, "not callable"),
        ({"num_hidden_layers": 0}, "0 blocks"),
        ({"num_hidden_layers": 10**9}, "1000000000 blocks"),
        ({"hidden_size": 2**40}, "hidden size 1099511627776"),
        ({"num_local_experts": 10**9}, "1000000000 experts"),
        ({"vocab_size": 2**62}, "overflow"),
    ],
)
def test_a_config_of_which_no_model_can_be_made_is_refused(changes: dict[str, Any], reason: str) -> None:
    family = "mixtral" if "num_local_experts" in changes else "llama"
    with pytest.raises(UserError, match=reason):
        RandomCheckpoint({**config_of(family), **changes}, 0, "a model")


def test_a_block_that_does_not_fit_into_memory_is_not_begun() -> None:
    source = RandomCheckpoint({**config_of("llama"), "intermediate_size": 2**40}, 0, "a model")
    with pytest.raises(UserError, match=r"block 1 of a model has .* GiB of weights"):
        source.load_blocks(Span(1, 2))


def test_a_config_cannot_choose_the_code_that_computes_it() -> None:
    """The first two make transformers fetch and run a kernel from the hub, where the package for that is installed."""
    changes = {
        "attn_implementation": "somebody/kernel",
        "_attn_implementation": "somebody/kernel",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "auto_map": {"AutoModelForCausalLM": "code.Model"},
        "dtype": "float16",
    }
    source = RandomCheckpoint({**config_of("llama"), **changes}, 3, "llama")
    assert source.config._attn_implementation == "sdpa"
    assert initial_digests(source, [ALL]) == initial_digests(RandomCheckpoint(config_of("llama"), 3, "llama"), [ALL])
