"""Initial weights from a seed: each block's follow from the seed and its index alone, so a node makes only those of its stage."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from swarm.checkpoint import Checkpoint, digest_tensors, open_checkpoint
from swarm.decoder import BlockSource, find_blocks, refuse_unfit
from swarm.errors import SwarmError, UserError
from swarm.model_spec import MAX_BLOCKS, MAX_HIDDEN_SIZE
from swarm.run_spec import RunSpec
from swarm.span import Span
from swarm.terminal import quiet_libraries

MAX_EXPERTS = 2**17
# What a config may say of how its model is to be computed, or was stored: it may name code to download.
_HOW_TO_COMPUTE = {
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}


class RandomCheckpoint:
    """A checkpoint that no file holds. All tensors are float32, under the names that the model's own state_dict gives them."""

    def __init__(self, config: Mapping[str, Any], seed: int, name: str) -> None:
        """config: what config.json holds, perhaps a stranger's. Raises UserError if no decoder can be made of it."""
        self.name = name
        self._seed = seed
        from transformers import AutoModelForCausalLM

        try:
            with quiet_libraries(), torch.device("meta"):
                self.config = _config_of(config, name)
                self._model = AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.float32, trust_remote_code=False
                )
                self.num_blocks = int(self.config.num_hidden_layers)
                _, self._blocks = find_blocks(self._model.base_model, self.num_blocks)
        except SwarmError:
            raise
        except Exception as error:  # a config can break a model's constructor in any way
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"transformers cannot make a model of the config of {name} ({type(error).__name__}: {reason}): correct the config"
            ) from error
        self._prefix = next(name for name, module in self._model.named_modules() if module is self._blocks)

    def load_blocks(self, span: Span) -> dict[str, Tensor]:
        """Tensors of the blocks in `span`. UserError if there are no such blocks, or this machine has no memory for one."""
        if span.end > self.num_blocks:
            raise UserError(f"{self.name} has blocks 0:{self.num_blocks}, not {span}: choose blocks among them")
        tensors: dict[str, Tensor] = {}
        for index in span:
            values = self._initialised(self._blocks[index], f"block {index}")
            tensors |= {f"{self._prefix}.{index}.{key}": tensor for key, tensor in values.items()}
        return tensors

    def load_ends(self) -> dict[str, Tensor]:
        """Tensors that belong to no block."""
        children: dict[str, Any] = self._blocks._modules
        blocks = dict(children)
        children.update(dict.fromkeys(blocks))  # not copied, not initialised
        try:
            return self._initialised(self._model, "ends")
        finally:
            children.update(blocks)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules by their names in the whole model, without memory."""
        return self._model.named_modules()  # type: ignore[no-any-return]

    def cut(self, name: str) -> tuple[int | None, str]:
        """Index of the block that a module is in, and its name there; None for what is in no block."""
        if not name.startswith(f"{self._prefix}."):
            return None, name
        index, _, rest = name.removeprefix(f"{self._prefix}.").partition(".")
        return int(index), rest

    def _initialised(self, module: nn.Module, what: str) -> dict[str, Tensor]:
        num_bytes = 4 * sum(parameter.numel() for parameter in module.parameters())
        available = psutil.virtual_memory().available
        if num_bytes > available:
            raise UserError(
                f"{what} of {self.name} has {num_bytes / 2**30:.1f} GiB of weights, and {available / 2**30:.1f} GiB of memory "
                "are free: choose a machine with more"
            )
        digest = hashlib.sha256(f"shardswarm weights 1/{self._seed}/{what}".encode()).digest()
        tied = (
            set(getattr(self._model, "all_tied_weights_keys", None) or {}) if self.config.tie_word_embeddings else set()
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_libraries():
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            # Children first, as transformers does it: a parent may set a child's weights otherwise.
            real = _materialised(module).apply(self._model._init_weights)
        return {key: value for key, value in real.state_dict().items() if key not in tied}


def _config_of(given: Mapping[str, Any], name: str) -> Any:
    """The transformers config. UserError for models that are no decoders, cannot be cut, or are absurdly large."""
    from transformers import AutoConfig

    kind = given.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"the config of {name} does not say what it is a config of: add model_type, such as llama")
    ignored = {key for key in given if key.startswith("_")} | _HOW_TO_COMPUTE | {"model_type"}
    config = AutoConfig.for_model(kind, **{key: value for key, value in given.items() if key not in ignored})
    refuse_unfit(config, name)
    num_blocks, hidden_size = int(config.num_hidden_layers), int(config.hidden_size)
    if not (0 < num_blocks <= MAX_BLOCKS and 0 < hidden_size <= MAX_HIDDEN_SIZE):
        raise UserError(
            f"{name} is to have {num_blocks} blocks of hidden size {hidden_size}: choose 1 to {MAX_BLOCKS} blocks, and a size of at most {MAX_HIDDEN_SIZE}"
        )
    num_experts = [
        value for key, value in config.to_dict().items() if key.endswith("_experts") and isinstance(value, int)
    ]
    if num_blocks * max(num_experts, default=0) > MAX_EXPERTS:
        raise UserError(f"{name} is to have {max(num_experts)} experts per block: choose at most {MAX_EXPERTS} in all")
    return config


def _materialised(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device with memory of its own, all zero; shared parameters stay shared."""
    memo: dict[int, Any] = {}
    for tensor in {*module.parameters(), *module.buffers()}:
        fresh = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        memo[id(tensor)] = nn.Parameter(fresh) if isinstance(tensor, nn.Parameter) else fresh
    return copy.deepcopy(module, memo)


def open_initial_weights(spec: RunSpec) -> BlockSource:
    """Where the run's weights began. What is loaded must be compared with the spec's digests (check_initial)."""
    if spec.weights == "random":
        return RandomCheckpoint(spec.config, spec.seed, spec.name)
    checkpoint: Checkpoint = open_checkpoint(spec.weights)
    return checkpoint


def stage_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Digest of a stage's initial weights as float32. 16 bytes."""
    return digest_tensors({key: tensor.float().contiguous() for key, tensor in tensors.items()})


def initial_digests(source: BlockSource, stages: Sequence[Span]) -> tuple[bytes, ...]:
    """For RunSpec.initial_digests: of each stage and, last, of the ends."""
    return (*(stage_digest(source.load_blocks(span)) for span in stages), stage_digest(source.load_ends()))


def check_initial(spec: RunSpec, stage: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError if these are not the weights that the run began with."""
    digest = stage_digest(tensors)
    if spec.initial_digests and digest != spec.initial_digests[stage]:
        what = "the ends" if stage == spec.ends_stage else f"stage {stage}"
        raise UserError(
            f"the initial weights of {what} made here have digest {digest.hex()}, the run's {spec.initial_digests[stage].hex()}: "
            "another version of torch or transformers, or another checkpoint; wait for a replica to download them from"
        )
