"""The oracle of training: the whole model in one process, plain transformers and torch, on the samples of a run's epochs."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from swarm.run_orders import NO_ORDERS, Orders
from swarm.run_spec import DataSpec, Precision, RunSpec
from swarm.run_store import RunStore
from swarm.span import Span
from swarm.training.data import SampleSource
from swarm.training.initial import RandomCheckpoint
from swarm.training.manifest import Manifest


@dataclass
class Outcome:
    losses: list[float]
    """Mean over each epoch's loss tokens, before its step."""
    weights: dict[str, Tensor]
    """By name, at the end."""


def samples_of_run(store: RunStore, folder: Path, data: DataSpec | None = None) -> SampleSource:
    """data: other than the run began with."""
    spec, data = store.spec, data or store.spec.data
    manifest = Manifest.from_bytes(store.manifest(data), data.manifest_digest)
    return SampleSource(data, manifest, folder, store.tokenizer(), spec.sequence_length, spec.seed)


def whole_model(spec: RunSpec) -> Any:
    """The transformers model with the run's initial weights, float32."""
    if spec.weights != "random":
        return AutoModelForCausalLM.from_pretrained(spec.weights, dtype=torch.float32).train()
    source = RandomCheckpoint(spec.config, spec.seed, spec.name)
    weights = {**source.load_ends(), **source.load_blocks(Span(0, source.num_blocks))}
    kind = type(source._model)
    return kind.from_pretrained(None, config=source.config, state_dict=weights, dtype=torch.float32).train()


def train_in_one_process(
    spec: RunSpec, source: Any, *, wrong: str = "", orders: Orders = NO_ORDERS, others: dict[bytes, Any] | None = None
) -> Outcome:
    """orders: of the run's owner. others: sources of the data that they name, by digest. wrong: a planted bug: "dropped" or "doubled" microbatch, or "unweighted" mean of two replicas' means."""
    model = whole_model(spec)
    if spec.lora is not None:
        from tests.support.one_process_lora import peft_model, plain_name

        model = peft_model(spec, model)
        named = {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        named = dict(model.named_parameters())
    model.eval()  # no dropout
    settings = spec.optimizer
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )
    losses = []
    waiting: deque[list[Tensor]] = deque()
    for epoch in range(spec.num_epochs):
        first = orders.first_sample(spec, epoch)
        rules = orders.spec_at(spec, epoch)
        used = (others or {}).get(rules.data.manifest_digest, source)
        gradients, loss = _gradients(rules, model, named, used, epoch, first, wrong)
        losses.append(loss)
        waiting.append(gradients)
        # With a delay of one epoch this gradient waits, and the one before is applied; the last is applied at the end.
        if len(waiting) > spec.delay:
            _step(orders.spec_at(spec, epoch - spec.delay), optimizer, named, waiting.popleft(), epoch - spec.delay)
    for late, gradients in enumerate(waiting):
        _step(spec, optimizer, named, gradients, spec.num_epochs - len(waiting) + late)
    return Outcome(losses, {name: parameter.detach().clone() for name, parameter in named.items()})


def _gradients(
    spec: RunSpec, model: Any, named: dict[str, Any], source: Any, epoch: int, first: int, wrong: str
) -> tuple[list[Tensor], float]:
    """The mean gradient over the epoch's loss tokens."""
    sums = [[torch.zeros_like(p) for p in named.values()] for _ in range(2)]
    tokens = [0, 0]
    loss_sum = 0.0
    starts = list(range(0, spec.target_batch, spec.microbatch))
    if wrong == "dropped" and epoch == 1:
        starts = starts[:-1]
    if wrong == "doubled" and epoch == 1:
        starts = [*starts, starts[0]]
    for number, start in enumerate(starts):
        count = min(spec.microbatch, spec.target_batch - start)
        batch = source.batch(first + start, count)
        bf16 = torch.autocast("cpu", torch.bfloat16) if spec.precision is Precision.BF16 else contextlib.nullcontext()
        with bf16:
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        half = number % 3 == 0  # unequal halves
        for total, gradient in zip(sums[half], found, strict=True):
            if gradient is not None:
                total.add_(gradient)
        tokens[half] += batch.num_loss_tokens
        loss_sum += float(loss.detach())
    if wrong == "unweighted":
        mean = [0.5 * (a / tokens[0] + b / tokens[1]) for a, b in zip(*sums, strict=True)]
    else:
        mean = [(a + b) / sum(tokens) for a, b in zip(*sums, strict=True)]
    return mean, loss_sum / sum(tokens)


def _step(spec: RunSpec, optimizer: Any, named: dict[str, Any], gradients: list[Tensor], epoch: int) -> None:
    for parameter, gradient in zip(named.values(), gradients, strict=True):
        parameter.grad = gradient.clone()
    if spec.optimizer.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(named.values(), spec.optimizer.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = spec.optimizer.lr_at(epoch, spec.num_epochs)
    optimizer.step()
    optimizer.zero_grad()
