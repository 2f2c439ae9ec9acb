"""Adapters of a stage are PEFT's on the whole model: which linears, how they begin, what they compute, which gradients they get."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from node.backend.span_model import SpanModel
from node.training.frozen_blocks import FrozenBlocks
from node.training.stage import TrainableStage
from swarm.epoch.messages import Place, Term
from swarm.errors import UserError
from swarm.linears.frozen import FrozenLinear
from swarm.run_spec import FrozenPrecision, LoraSettings, Precision, RunSpec
from swarm.span import Span
from swarm.training.adapters import AdapterLayout, Modules, Target, check_targets, find_linears
from swarm.training.ends_replica import load_ends_parameters
from swarm.training.initial import RandomCheckpoint, initial_digests
from swarm.training.journal import Journal
from swarm.training.parameters import GradientSum
from swarm.training.saved_states import SavedHead, SavedStates
from swarm.training.saved_transfer import Download
from tests.support.models import TINY
from tests.support.one_process_lora import frozen_weight, peft_model, plain_name
from tests.support.one_process_training import whole_model
from tests.support.runs import make_spec

STAGES = (Span(0, 1), Span(1, 4))


def spec_of(family: str = "llama", *, config: dict[str, Any] | None = None, **fields: Any) -> RunSpec:
    whole = AutoConfig.for_model(family, **{**TINY[family], **(config or {})}).to_dict()
    lora = fields.pop("lora", LoraSettings(rank=4, alpha=6.0))
    values: dict[str, Any] = {"config": whole, "stages": STAGES, "seed": 5, "precision": Precision.FP32, **fields}
    spec = make_spec(**{**values, "initial_digests": (), "lora": lora})
    if not lora.target_modules:
        lora = dataclasses.replace(lora, target_modules=find_linears(spec))
    digests = initial_digests(RandomCheckpoint(whole, spec.seed, "tiny"), spec.stages)
    return dataclasses.replace(spec, lora=lora, initial_digests=digests)


def stage_of(spec: RunSpec, stage: int, frozen: FrozenBlocks | None = None) -> TrainableStage:
    return TrainableStage(RandomCheckpoint(spec.config, spec.seed, "tiny"), spec, stage, frozen=frozen)


FAMILIES = {
    "llama": ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
    "gpt2": ("c_attn", "c_fc", "c_proj"),  # Conv1D
    "gpt_neox": ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"),
    "opt": ("fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"),
    "deepseek_v3": ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"),  # experts in one tensor
    "llama4_text": ("k_proj", "o_proj", "q_proj", "v_proj"),  # a router that is a linear and returns two things
    "phi": ("dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_with_adapters_computes_what_peft_does(family: str) -> None:
    """Forward, gradients of the input and of A and B, after B was moved away from zero."""
    spec = spec_of(family)
    assert spec.lora is not None and spec.lora.target_modules == FAMILIES[family]
    torch.manual_seed(0)
    oracle = peft_model(spec, whole_model(spec)).eval()
    stages = [stage_of(spec, stage) for stage in range(len(STAGES))]
    named = {plain_name(name): parameter for name, parameter in oracle.named_parameters()}
    with torch.no_grad():
        for stage in stages:
            values = torch.randn(stage.parameters.size, generator=torch.Generator().manual_seed(1)) * 0.1
            stage.parameters.state.values.copy_(values)
            for name, view in zip(stage.parameters.names, stage.parameters.views(values), strict=True):
                named[name].copy_(view)
    ids = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(2))
    _, *expected = oracle(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    given = oracle(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[0].detach()
    first = stages[0].differentiable(given, range(2))
    assert torch.equal(first.output.detach(), expected[0].detach())
    second = stages[1].differentiable(first.output.detach(), range(2))

    # What the last block returns, before the final norm, only the stage has: its gradient is compared by that of a sum over blocks.
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    gradient = torch.randn(second.output.shape, generator=torch.Generator().manual_seed(3))
    seen: list[torch.Tensor] = []
    blocks = [module for name, module in oracle.named_modules() if name.endswith(".3")]
    hook = blocks[0].register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    oracle(input_ids=ids, use_cache=False)
    hook.remove()
    assert torch.equal(seen[0].detach(), second.output.detach())
    found = dict(zip(trained, torch.autograd.grad(seen[0], list(trained.values()), gradient), strict=True))
    for stage, entry in ((stages[1], second), (stages[0], first)):
        gradient, of_weights = stage.backward(entry, gradient)
        for name, tensor in zip(stage.parameters.names, of_weights, strict=True):
            assert tensor is not None
            torch.testing.assert_close(tensor, found[name], rtol=1e-5, atol=1e-6)


def test_adapters_begin_as_pefts_do_and_the_same_everywhere() -> None:
    spec = spec_of()
    layout = AdapterLayout(spec)
    tensors = layout.initial(1)
    assert [*tensors] == sorted(tensors) and layout.size(1) == sum(t.numel() for t in tensors.values())
    for name, tensor in tensors.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(tensor.shape[1])
            assert float(tensor.abs().max()) <= bound and float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.25)
    # To the bit and for ever: no digest in the rules would tell that another version of something makes others.
    name = "model.layers.2.self_attn.q_proj.lora_A.weight"
    assert tensors[name].flatten()[:3].tolist() == [-0.133171945810318, 0.10100632905960083, -0.1449403166770935]
    assert not torch.equal(tensors[name], tensors["model.layers.3.self_attn.q_proj.lora_A.weight"])
    assert not torch.equal(tensors[name], AdapterLayout(dataclasses.replace(spec, seed=6)).initial(1)[name])
    assert layout.size(spec.ends_stage) == 0 and layout.shapes(spec.ends_stage) == {}


WRONG = {
    "nothing": (LoraSettings(target_modules=("query",)), "'query' is no linear of this model's blocks; there are mlp.down_proj, "),
    "a norm": (LoraSettings(target_modules=("input_layernorm",)), "'input_layernorm' is no linear"),
    "the head": (LoraSettings(target_modules=("lm_head", "q_proj")), "'lm_head' is no linear of this model's blocks"),
    "a part of a name": (LoraSettings(target_modules=("proj",)), "'proj' is no linear"),
    "a large rank": (LoraSettings(rank=17, target_modules=("q_proj", "v_proj")), "lora.rank is 17, but self_attn.v_proj has only 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_adapters_that_fit_nowhere_are_refused_by_name(name: str) -> None:
    lora, sentence = WRONG[name]
    with pytest.raises(UserError) as caught:
        AdapterLayout(make_spec(config=spec_of().config, lora=lora))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_also_outside_of_the_blocks_is_refused() -> None:
    """PEFT would put an adapter there, too."""
    linears = [(Target(0, "k_proj", "model.layers.0.k_proj", 8, 8), torch.nn.Linear(8, 8))]
    lora = LoraSettings(rank=2, target_modules=("k_proj",))
    with pytest.raises(UserError, match=r"'k_proj' is also the name of model\.k_proj"):
        check_targets(lora, Modules(linears, ["model.k_proj"], has_experts=False))


def test_what_peft_takes_for_experts_is_refused() -> None:
    lora = LoraSettings(rank=2, target_modules=("q_b_proj", "down_proj"))
    with pytest.raises(UserError, match="PEFT would put 'down_proj' on the experts"):
        AdapterLayout(make_spec(config=spec_of("deepseek_v3").config, lora=lora))


def test_runs_with_the_same_blocks_share_their_weights_and_leave_them_as_they_are() -> None:
    one = spec_of()
    other = dataclasses.replace(one, seed=9, weights="elsewhere", lora=LoraSettings(rank=2, target_modules=("q_proj",)))
    frozen = FrozenBlocks()
    stages = [stage_of(spec, 1, frozen) for spec in (one, other)]
    served = frozen.for_sessions(other, 1, "cpu", "fp32")
    plain = [dict(model.named_parameters()) for model in (stages[0].model, stages[1].model, served)]
    before = {name: tensor.clone() for name, tensor in plain[2].items()}
    for name, tensor in plain[2].items():
        assert {parameters[name].data_ptr() for parameters in plain} == {tensor.data_ptr()}
        assert not tensor.requires_grad
    assert len(plain[0]) > len(plain[1]) > len(plain[2])
    given = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    alone = stage_of(one, 1)
    unchanged = stages[1].forward(given)
    for stage in (stages[0], alone):
        for step in range(3):
            entry = stage.differentiable(given, range(1))
            _, gradients = stage.backward(entry, torch.ones_like(entry.output))
            assert all(gradient is not None for gradient in gradients)
            total = GradientSum(stage.parameters)
            total.add(gradients)
            stage.parameters.step(total.vector, 1e-2 / (step + 1))
    assert stages[0].parameters.digest() == alone.parameters.digest()
    assert torch.equal(stages[0].forward(given), alone.forward(given))
    assert torch.equal(stages[1].forward(given), unchanged)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain[2].items())
    assert not torch.equal(stages[0].forward(given), served.forward_whole(served.span, given))


def test_frozen_weights_are_held_in_bf16_where_autocast_would_cast_them() -> None:
    """Else every forward would cast them, and every graph hold a copy: autocast keeps casts only of what requires gradients."""
    spec = spec_of(precision=Precision.BF16)
    oracle = peft_model(spec, whole_model(spec)).eval()
    stage = stage_of(spec, 0)
    held = {name: parameter.dtype for name, parameter in stage.model.named_parameters()}
    assert held["layers.0.self_attn.q_proj.weight"] is torch.bfloat16
    assert held["layers.0.input_layernorm.weight"] is torch.float32
    assert held["layers.0.self_attn.q_proj.adapter.a_RI"] is torch.bfloat16
    ids = torch.arange(6)[None]
    with torch.autocast("cpu", torch.bfloat16):
        embedded, after, *_ = oracle(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    entry = stage.differentiable(embedded.detach().float(), range(1))
    assert torch.equal(entry.output.detach().float(), after.detach().float())


def outcome_of(stage: TrainableStage, given: torch.Tensor) -> torch.Tensor:
    """What a microbatch [1, T, H] changes: output and gradients of the input, of A and of B, each of length 1."""
    entry = stage.differentiable(given, range(1))
    of_input, of_weights = stage.backward(entry, torch.ones_like(entry.output))
    named = dict(zip(stage.parameters.names, (tensor for tensor in of_weights if tensor is not None), strict=True))
    kinds = [[named[name] for name in sorted(named) if f".lora_{kind}." in name] for kind in "AB"]
    parts = [entry.output.detach(), of_input, *(torch.cat([tensor.flatten() for tensor in kind]) for kind in kinds)]
    return torch.cat([part.float().flatten() / part.float().norm() for part in parts])


class CodedCheckpoint(RandomCheckpoint):
    """Has the weights that codes stand for."""

    frozen: FrozenPrecision

    def load_blocks(self, span: Span) -> dict[str, torch.Tensor]:
        tensors = super().load_blocks(span)
        return {name: frozen_weight(tensor, self.frozen, self.config.hidden_size) for name, tensor in tensors.items()}


def plain_stage_of(spec: RunSpec) -> TrainableStage:
    """The only stage, of plain modules with the very weights that its quantised linears have."""
    assert spec.lora is not None
    if spec.lora.frozen_precision is None:
        return stage_of(spec, 0)
    source = CodedCheckpoint(spec.config, spec.seed, "tiny")
    source.frozen = spec.lora.frozen_precision
    lora = dataclasses.replace(spec.lora, frozen_precision=None)
    plain = dataclasses.replace(spec, lora=lora, initial_digests=initial_digests(source, spec.stages))
    return TrainableStage(source, plain, 0)


@pytest.mark.parametrize("num_tokens", [7, 90])  # with kernels that read codes, and with widened ones
@pytest.mark.parametrize("precision", Precision)
def test_adapters_over_quantised_blocks_are_trained_as_over_the_weights_that_the_codes_stand_for(
    precision: Precision, num_tokens: int
) -> None:
    """The oracle has these weights in float32, and all of its modules are plain.

    What is left is that quantised linears round inputs, outputs and their gradients to bf16: 2^-9 in each of some ten operations of four
    blocks, which softmax and norms pass on. Found: 0.018 to 0.026 in fp32, to 0.045 under autocast, where int8 is 0.045 to 0.072 away from
    the weights as they were and int4 0.43 or more.
    """
    found, oracles = {}, {}
    given = torch.randn(1, num_tokens, 32, generator=torch.Generator().manual_seed(0))
    for frozen in (None, *FrozenPrecision):
        lora = LoraSettings(rank=4, frozen_precision=frozen)
        spec = spec_of(lora=lora, precision=precision, stages=(Span(0, 4),), config={"initializer_range": 0.2})
        stage = stage_of(spec, 0)
        plain = plain_stage_of(spec)
        for one in (stage, plain):
            state = one.parameters.snapshot()
            state.values.copy_(0.1 * torch.randn(len(state.values), generator=torch.Generator().manual_seed(1)))
            one.parameters.install(state)
        found[frozen], oracles[frozen] = outcome_of(stage, given), outcome_of(plain, given)
    for frozen in FrozenPrecision:
        distances = {other: float((found[frozen] - oracle).norm()) for other, oracle in oracles.items()}
        own = distances.pop(frozen)
        assert own < (0.04 if precision is Precision.FP32 else 0.06)
        assert own < 0.7 * min(distances.values())
    assert torch.equal(found[None], oracles[None])


@pytest.mark.parametrize("frozen_precision", FrozenPrecision)
def test_runs_and_sessions_over_the_same_quantised_blocks_share_them(frozen_precision: FrozenPrecision) -> None:
    """Training in fp32, in bf16, and sessions in that class: what is no linear differs in dtype alone."""
    lora = LoraSettings(rank=4, frozen_precision=frozen_precision)
    specs = [spec_of(lora=lora, precision=precision) for precision in Precision]
    frozen = FrozenBlocks()
    assert frozen.stages_here(specs[1]) == set()
    stages = [stage_of(spec, 1, frozen) for spec in specs]
    assert frozen.stages_here(specs[1]) == {1}
    served = frozen.for_sessions(specs[0], 1, "cpu", frozen_precision.value)
    assert served.dtype is torch.bfloat16 and {tensor.dtype for _, tensor in served.named_parameters()} == {
        torch.bfloat16
    }
    shared = [codes_of(model) for model in (stages[0].model, stages[1].model, served)]
    assert shared[0] and shared[0] == shared[1] == shared[2]
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = served.forward_whole(served.span, hidden.bfloat16()).float()
    for stage in stages:
        assert stage.model.dtype is torch.float32
        torch.testing.assert_close(stage.forward(hidden), expected, rtol=0.02, atol=0.02)  # B is zero


def codes_of(model: SpanModel) -> dict[str, int]:
    """Where the codes of the blocks' linears are."""
    return {
        f"{index}.{name}.{tensor_name}": tensor.data_ptr()
        for index in model.span
        for name, module in model.block(index).named_modules()
        if isinstance(module, FrozenLinear)
        for tensor_name, tensor in module.named_buffers(recurse=False)
    }


def test_a_vector_of_no_values_is_stepped_saved_and_found(tmp_path: Path) -> None:
    """That of the ends of an adapter run."""
    parameters = load_ends_parameters(spec_of())
    assert parameters.size == 0
    parameters.step(torch.zeros(0), 1e-3)
    states = SavedStates(tmp_path, b"r" * 32, 2)
    place = Place(0, b"r" * 32)
    states.save(place, None, parameters.snapshot())
    (found,) = states.found()
    state = states.load(found, parameters)
    parameters.install(state)
    assert (found.num_pieces, state.num_steps) == (0, 1)
    with states.open(found) as opened:
        head = SavedHead.parse(opened.read_head(), b"r" * 32, 2)
    assert Download(head, torch.empty(1, 0)).num_left == 0
    journal = Journal(tmp_path / "journal", b"r" * 32, 2, 0)
    journal.write_sum(place, Term(1, "peer"), 0, torch.zeros(0))
    kept = journal.read_sum(place)
    assert kept is not None and kept.vector.shape == (0,) and kept.square_norm == 0
