"""Adapters (LoRA; Hu et al., 2021): which linears of the blocks have one, where its A and B are in a stage's vector, how they begin.

A linear W of a run with RunSpec.lora computes W x + scale * B A x; A and B are trained, everything else stays as it was. They are
called as PEFT calls them, and begin as PEFT's do: A uniform, B zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from swarm.errors import BadRequest, UserError
from swarm.run_spec import LoraSettings, RunSpec
from swarm.training.initial import RandomCheckpoint

# What PEFT takes for parts of experts, where it finds any (utils/transformers_weight_conversion.py there).
_NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True, slots=True)
class Target:
    """A linear that has an adapter: A is [rank, num_inputs], B [num_outputs, rank]."""

    block: int
    path: str
    """Dotted name in the block."""
    name: str
    """In the whole model."""
    num_inputs: int
    num_outputs: int

    @property
    def a_name(self) -> str:
        """Of the tensor A, as PEFT has it."""
        return f"{self.name}.lora_A.weight"

    @property
    def b_name(self) -> str:
        return f"{self.name}.lora_B.weight"


class AdapterLayout:
    """What the vectors of an adapter run hold. Offers what WeightLayout does for others. No weight gets memory."""

    def __init__(self, spec: RunSpec) -> None:
        """Raises UserError if the run's target modules are not linears of its blocks."""
        assert spec.lora is not None
        self.spec, self.lora = spec, spec.lora
        model = RandomCheckpoint(spec.config, spec.seed, spec.name)
        self.config = model.config
        found = find_modules(model)
        check_targets(spec.lora, found)
        names = spec.lora.target_modules
        self.fan_in_fan_out = any(not isinstance(module, nn.Linear) for _, module in found.linears)
        """Whether the family's linears keep their weights transposed (GPT-2's), as PEFT wants to know."""
        self.targets = tuple(target for target, _ in found.linears if _is_named(target.name, names))
        self._blocks = {name: target.block for target in self.targets for name in (target.a_name, target.b_name)}

    def targets_of(self, stage: int) -> list[Target]:
        """Those in the blocks of a stage; the ends have none."""
        if stage == self.spec.ends_stage:
            return []
        return [target for target in self.targets if target.block in self.spec.stages[stage]]

    def shapes(self, stage: int) -> dict[str, tuple[int, int]]:
        """Of the tensors in a stage's vector, in their order: that of StageParameters."""
        rank = self.lora.rank
        found = {}
        for target in self.targets_of(stage):
            found[target.a_name] = rank, target.num_inputs
            found[target.b_name] = target.num_outputs, rank
        return dict(sorted(found.items()))

    def size(self, stage: int) -> int:
        """Values of a stage's vector."""
        return sum(map(math.prod, self.shapes(stage).values()))

    def views(self, stage: int, vector: Tensor) -> dict[str, Tensor]:
        """The tensors in the vector [size] of a stage, by their names in the whole model."""
        shapes = self.shapes(stage)
        pieces = torch.split(vector, list(map(math.prod, shapes.values())))
        return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    def block_of(self, name: str) -> int:
        """Index of the block that has this tensor."""
        return self._blocks[name]

    def check(self, values: Sequence[Tensor]) -> None:
        """Raise BadRequest if these are not the vectors of all stages and the ends."""
        sizes = [self.size(stage) for stage in range(self.spec.num_stages)]
        found = [tuple(vector.shape) for vector in values]
        if found != [(size,) for size in sizes] or any(vector.dtype != torch.float32 for vector in values):
            raise BadRequest(f"the run's stages and ends have float32 vectors of {sizes} values, got {found}")

    def initial(self, stage: int) -> dict[str, Tensor]:
        """The adapters as the run begins with them: the same to the bit everywhere, with every version of torch."""
        tensors = {name: torch.zeros(shape) for name, shape in self.shapes(stage).items()}
        for target in self.targets_of(stage):
            a = tensors[target.a_name]
            # kaiming_uniform_ with a = sqrt(5), which PEFT uses, has this bound.
            a.copy_(_uniform(f"{self.spec.seed}/{target.name}", a.shape, 1 / math.sqrt(target.num_inputs)))
        return tensors


def find_linears(spec: RunSpec) -> tuple[str, ...]:
    """Target modules that are all linears of the blocks, but for those smaller than the rank. Raises UserError if there are none."""
    assert spec.lora is not None
    found = find_modules(RandomCheckpoint(spec.config, spec.seed, spec.name))
    paths, left_out = set(), list(found.others)
    for path in {target.path for target, _ in found.linears}:
        linears = [target for target, _ in found.linears if target.path == path]
        smallest = min(min(target.num_inputs, target.num_outputs) for target in linears)
        if smallest < spec.lora.rank or found.is_experts(path):
            left_out += [target.name for target in linears]
        else:
            paths.add(path)
    # As people write them, if that names nothing else.
    short = sorted({path.rpartition(".")[2] for path in paths})
    names = tuple(sorted(paths) if any(_is_named(name, short) for name in left_out) else short)
    check_targets(dataclasses.replace(spec.lora, target_modules=names), found)
    return names


@dataclass(frozen=True, slots=True)
class Modules:
    """What a model is made of."""

    linears: Sequence[tuple[Target, nn.Module]]
    """Of the blocks."""
    others: Sequence[str]
    """Names of all other modules."""
    has_experts: bool
    """Whether blocks have weights of several experts in one tensor."""

    def is_experts(self, name: str) -> bool:
        """Whether PEFT would put an adapter of this name on such a tensor."""
        return self.has_experts and name.rpartition(".")[2] in _NAMES_OF_EXPERTS


def find_modules(model: RandomCheckpoint) -> Modules:
    linears, others, has_experts = [], [], False
    for name, module in model.modules():
        block, path = model.cut(name)
        sizes = _sizes(module)
        if block is None or sizes is None:
            others.append(name)
        else:
            linears.append((Target(block, path, name, *sizes), module))
        if block is not None:
            has_experts |= any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    return Modules(linears, others, has_experts)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Number of inputs and outputs of a linear; None: it is none."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if not isinstance(module, nn.Linear):
        return None
    sizes = module.in_features, module.out_features
    if type(module) is not nn.Linear:  # a router, say, which returns something else
        output = module(torch.empty(1, 1, sizes[0], device="meta"))
        return sizes if isinstance(output, Tensor) and output.shape == (1, 1, sizes[1]) else None
    return sizes


def check_targets(lora: LoraSettings, found: Modules) -> None:
    """Raise UserError unless every name is that of linears of the blocks, of nothing else, and the rank makes them smaller."""
    names = lora.target_modules
    paths = {target.path for target, _ in found.linears if not found.is_experts(target.path)}
    there = ", ".join(sorted(paths)[:30]) or "none that an adapter fits on"
    for name in names or [""]:
        if not any(_is_named(target.name, [name]) for target, _ in found.linears):
            raise UserError(
                f"lora.target_modules: {name!r} is no linear of this model's blocks; there are {there}: name some of these"
            )
        if found.is_experts(name):
            raise UserError(
                f"lora.target_modules: PEFT would put {name!r} on the experts of this model, which cannot be adapted here; "
                f"there are {there}: name some of these"
            )
        outside = next((other for other in found.others if _is_named(other, [name])), None)
        if outside is not None:
            raise UserError(
                f"lora.target_modules: {name!r} is also the name of {outside}, which is no linear of a block; there are {there}: "
                "write more of the name"
            )
    for target, _ in found.linears:
        size = min(target.num_inputs, target.num_outputs)
        if lora.rank > size and _is_named(target.name, names):
            raise UserError(
                f"lora.rank is {lora.rank}, but {target.path} has only {size} inputs or outputs: make the rank smaller, or leave "
                f"{target.path} out of lora.target_modules"
            )


def _is_named(name: str, names: Sequence[str]) -> bool:
    """As PEFT understands target_modules."""
    return any(name == one or name.endswith(f".{one}") for one in names)


def _uniform(seed: str, shape: Sequence[int], bound: float) -> Tensor:
    """float32, uniform in [-bound, bound), with 24 random bits each."""
    stream = hashlib.shake_128(f"shardswarm adapter 1/{seed}".encode()).digest(4 * math.prod(shape))
    values = (np.frombuffer(stream, "<u4") >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return torch.from_numpy(values * np.float32(bound)).view(*shape)
