"""The trainable weights of a stage (or of the ends), AdamW over them, and their sum of gradients: flat float32 vectors.

One vector for each makes averaging, digests, state transfer and the optimizer's step a matter of a few calls, and lets bit-equal
replicas stay so: everything is element-wise, in one order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swarm.errors import BadRequest
from swarm.run_spec import OptimizerSettings, RunSpec


@dataclass(slots=True)
class StageState:
    """What a replica hands to another: all float32 [size], and the number of steps that AdamW has taken."""

    values: Tensor
    first_moments: Tensor
    second_moments: Tensor
    num_steps: int
    previous: Tensor | None = None
    """The values before the last step, in runs with delay."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        tensors = self.values, self.first_moments, self.second_moments
        return tensors if self.previous is None else (*tensors, self.previous)

    def digest(self) -> bytes:
        """Of everything. 32 bytes."""
        hasher = hashlib.sha256(f"shardswarm state 1/{self.num_steps}/{self.values.numel()}".encode())
        for tensor in self.tensors:
            hasher.update(_bytes(tensor))
        return hasher.digest()


def num_vectors_of(spec: RunSpec) -> int:
    """Tensors of a StageState: weights, two moments, and in runs with delay the weights before the last step."""
    return 4 if spec.delay else 3


class StageParameters:
    """Parameters of modules, whose values are one vector: first those with weight decay, then the others, each by name.

    Modules compute with views into it, or with copies: where they are on another device, in bf16, or a step behind.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings, *, is_delayed: bool = False
    ) -> None:
        """is_delayed: the values before the last step are kept, and the modules compute with either (show)."""
        unique = dict(sorted({id(parameter): (name, parameter) for name, parameter in named}.values()))
        decayed = [name for name, parameter in unique.items() if parameter.ndim >= 2]
        plain = [name for name, parameter in unique.items() if parameter.ndim < 2]
        self.names = (*decayed, *plain)
        self.parameters = [unique[name] for name in self.names]
        self._shapes = [parameter.shape for parameter in self.parameters]
        self.size = sum(parameter.numel() for parameter in self.parameters)
        values = torch.empty(self.size)
        for view, parameter in zip(self.views(values), self.parameters, strict=True):
            view.copy_(parameter.detach())
            parameter.requires_grad_(True)
        num_decayed = sum(unique[name].numel() for name in decayed)
        self._halves = (slice(0, num_decayed), slice(num_decayed, self.size))
        self._settings, self._is_delayed = settings, is_delayed
        self._shown: Tensor | None = None
        previous = values.clone() if is_delayed else None
        self.state = StageState(values, torch.zeros(self.size), torch.zeros(self.size), 0, previous)
        self._optimizer = self._make_optimizer()
        self.hold(range(len(self.parameters)), torch.float32)
        self.version = 0
        """How often the modules' weights have changed: what was computed with others does not fit."""

    def hold(self, indices: Iterable[int], dtype: torch.dtype) -> None:
        """Let the modules hold these parameters in a dtype; gradients of them have it too. What is not float32 is a copy."""
        views = self.views(self.state.values)
        for index in indices:
            parameter, view = self.parameters[index], views[index]
            is_shared = dtype == view.dtype and parameter.device == view.device and not self._is_delayed
            parameter.data = view if is_shared else view.to(parameter.device, dtype, copy=True)

    def show(self, *, previous: bool) -> None:
        """Let the modules compute with the values before the last step, or as they are. Without delay: always as they are."""
        if self.state.previous is None:
            return
        wanted = self.state.previous if previous else self.state.values
        if self._shown is not wanted:
            self._refresh(wanted)
            self._shown = wanted

    def _refresh(self, values: Tensor) -> None:
        """Let the modules compute with these values, as they are now.

        Graphs that were made before are to be thrown away: fused AdamW lets autograd notice nothing.
        """
        places = zip(self.parameters, self.views(values), strict=True)
        copies = [(parameter, view) for parameter, view in places if parameter.data_ptr() != view.data_ptr()]
        if copies:
            targets, views = zip(*copies, strict=True)
            torch._foreach_copy_([target.data for target in targets], list(views))
        torch.autograd.graph.increment_version(self.parameters)
        self.version += 1

    def _make_optimizer(self) -> torch.optim.AdamW:
        settings, state = self._settings, self.state
        groups = [
            {"params": [nn.Parameter(state.values[half])], "weight_decay": decay}
            for half, decay in zip(self._halves, (settings.weight_decay, 0.0), strict=True)
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
        )
        for group, half in zip(optimizer.param_groups, self._halves, strict=True):
            optimizer.state[group["params"][0]] = {
                "step": torch.tensor(float(state.num_steps)),
                "exp_avg": state.first_moments[half],
                "exp_avg_sq": state.second_moments[half],
            }
        return optimizer

    def views(self, flat: Tensor) -> list[Tensor]:
        """A vector [size] cut into the parameters' shapes."""
        pieces = torch.split(flat, [shape.numel() for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def step(self, mean_gradient: Tensor, lr: float) -> None:
        """One step of AdamW, in place; the gradient [size] is clipped already. Graphs that were made before end here."""
        if self.state.previous is not None:
            self.state.previous.copy_(self.state.values)
        for group, half in zip(self._optimizer.param_groups, self._halves, strict=True):
            group["lr"] = lr
            group["params"][0].grad = mean_gradient[half]
        self._optimizer.step()
        for group in self._optimizer.param_groups:
            group["params"][0].grad = None
        self.state.num_steps += 1
        self._shown = None
        self._refresh(self.state.values)

    def install(self, state: StageState) -> None:
        """Take over another replica's state; the modules get its weights. BadRequest if it does not fit or is not finite."""
        if any(tensor.shape != (self.size,) or tensor.dtype != torch.float32 for tensor in state.tensors):
            raise BadRequest(f"the state is of {state.values.numel()} parameters, this stage has {self.size}")
        if not all(math.isfinite(float(tensor.abs().sum(dtype=torch.float64))) for tensor in state.tensors):
            raise BadRequest("the state holds NaN or infinite values")
        if state.num_steps < 0 or bool((state.second_moments < 0).any()):
            raise BadRequest("the state has a negative number of steps or negative second moments")
        if len(state.tensors) != len(self.state.tensors):
            raise BadRequest("the state is of a run with another delay")
        for own, other in zip(self.state.tensors, state.tensors, strict=True):
            own.copy_(other)
        self.state.num_steps = state.num_steps
        self._optimizer = self._make_optimizer()
        self._shown = None
        self._refresh(self.state.values)

    def snapshot(self) -> StageState:
        """A copy of the state."""
        state = self.state
        values, first, second, *previous = (tensor.clone() for tensor in state.tensors)
        return StageState(values, first, second, state.num_steps, *previous)

    def empty_state(self, num_steps: int) -> StageState:
        """Memory for a state that fits."""
        values, first, second, *previous = (torch.empty(self.size) for _ in self.state.tensors)
        return StageState(values, first, second, num_steps, *previous)

    def digest(self) -> bytes:
        """Of the weights alone: their names, shapes and values. 32 bytes."""
        layout = [(name, *shape) for name, shape in zip(self.names, self._shapes, strict=True)]
        hasher = hashlib.sha256(f"shardswarm weights 1/{layout}".encode())
        hasher.update(_bytes(self.state.values))
        return hasher.digest()


class GradientSum:
    """The sum of gradients of a ledger, float32 [size]."""

    def __init__(self, parameters: StageParameters) -> None:
        self.vector = torch.zeros(parameters.size)
        self._views = parameters.views(self.vector)

    def clear(self) -> None:
        self.vector.zero_()

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients in the parameters' shapes; None: zero. They must be finite (are_finite)."""
        for view, addend in zip(self._views, gradients, strict=True):
            if addend is not None:
                view.add_(addend.to(view.device))  # bf16 is cast as it is added: a copy takes as long as the sum


def are_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether none of them holds NaN or infinity."""
    present = [gradient for gradient in gradients if gradient is not None]
    norms = torch._foreach_norm(present) if present else []
    return all(math.isfinite(float(norm)) for norm in norms) or all(bool(torch.isfinite(g).all()) for g in present)


def gradient_digest(vector: Tensor) -> bytes:
    """Digest of a sum of gradients [size], for the vote. 32 bytes."""
    return hashlib.sha256(_bytes(vector)).digest()


def square_norm(vector: Tensor) -> float:
    """Sum of squares, in float64: the same on every machine but for the order of additions."""
    # In pieces that stay in the cache: torch would first make a float64 copy of it all.
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in torch.split(vector, 2**20)]
    return math.fsum(float(norm) ** 2 for norm in norms)


def _bytes(vector: Tensor) -> Any:
    return vector.contiguous().numpy().data
