"""A run's weights as a Hugging Face checkpoint, and back.

`WeightLayout` alone knows which tensors of the whole model a stage's vector holds. Tensors are written block by block, under the names
that the family's checkpoints have on the hub: beside the vectors, memory is needed for one block and one file of the checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from swarm.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from swarm.decoder import LIBRARY_ERRORS, build_model, find_blocks
from swarm.errors import BadRequest, UserError
from swarm.run_orders import NO_ORDERS, Orders
from swarm.run_spec import DataKind, DataSpec, LoraSettings, RunSpec
from swarm.run_store import RunStore
from swarm.span import Span
from swarm.terminal import quiet_libraries
from swarm.tokenizer_files import find_tokenizer_files
from swarm.training.initial import RandomCheckpoint, check_initial, open_initial_weights

MAX_SHARD_BYTES = 2 * 2**30
CARD_FILE = "README.md"
MAX_FILES_IN_CARD = 20
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
"""


def write_hf_checkpoint(
    store: RunStore,
    values: Sequence[Tensor],
    out: Path,
    *,
    epoch: int,
    lineage: bytes,
    dtype: torch.dtype = torch.float32,
    orders: Orders = NO_ORDERS,
    loss: float | None = None,
    eval_loss: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder for AutoModelForCausalLM.from_pretrained, with tokenizer and model card; all of it, or nothing.

    values: float32 [size] of each stage and, last, of the ends, in the order of StageParameters. They may be memory-mapped.
    epoch: the number of optimizer steps that made them. orders: of the run's owner, in force there. loss, eval_loss: mean cross entropy per token of training and held-out data.
    Raises UserError if `out` holds anything, the disk is full, dtype cannot hold the values, or a tokenizer file is missing;
    BadRequest if values are not those of the run's stages.
    """
    layout = WeightLayout(store.spec)
    layout.check(values)
    with made_at_once(out) as folder:
        require_space(folder, sum(vector.numel() for vector in values) * dtype.itemsize)
        _write_weights(layout, values, folder, dtype, max_shard_bytes)
        _write_configs(layout, folder, dtype)
        for path in folder.glob("*.safetensors"):  # which that library writes for their owner alone
            shutil.copymode(folder / "config.json", path)
        copy_tokenizer(store, folder)
        card = make_card(store, epoch, lineage, dtype, orders, loss, eval_loss)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def read_hf_checkpoint(spec: RunSpec, folder: Path, stage: int) -> Tensor:
    """The vector of a stage, or of the ends, float32 [size]: to the bit what was written, if that was float32.

    Only this stage's tensors are read. Raises UserError if the folder holds no such model.
    """
    layout = WeightLayout(spec)
    with open_checkpoint(str(folder.absolute()), progress=False) as checkpoint:
        if checkpoint.num_blocks != spec.num_blocks:
            raise UserError(
                f"{folder} has {checkpoint.num_blocks} blocks, the run {spec.num_blocks}: choose a checkpoint of this run"
            )
        is_ends = stage == spec.ends_stage
        tensors = checkpoint.load_ends() if is_ends else checkpoint.load_blocks(spec.stages[stage])
        model = layout.load(stage, tensors, checkpoint.name)
    return torch.cat([model.get_parameter(slot.key).detach().reshape(-1) for slot in layout.slots(stage)])


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter in a stage's vector."""

    key: str
    """In the whole model's state_dict. Parameters that share memory have one slot, under the first of their names."""
    shape: tuple[int, ...]


class WeightLayout:
    """Which tensors of the whole model the vectors of a run hold, and in which order: that of StageParameters. No weight gets memory."""

    def __init__(self, spec: RunSpec) -> None:
        """Raises UserError if no decoder can be made of the run's config."""
        from transformers import AutoModelForCausalLM

        self.spec = spec
        self.config = RandomCheckpoint(spec.config, spec.seed, spec.name).config
        with quiet_libraries(), torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.float32, trust_remote_code=False
            )
        _, blocks = find_blocks(self.model.base_model, spec.num_blocks)
        self.blocks_name = next(name for name, module in self.model.named_modules() if module is blocks)
        self._shapes = {key: tuple(parameter.shape) for key, parameter in self.model.named_parameters()}
        parameters = {key for key, _ in self.model.named_parameters(remove_duplicate=False)}
        self.buffer_keys = frozenset(self.model.state_dict().keys() - parameters)
        """Of what a checkpoint of this family holds beside parameters; not trained."""

    def slots(self, stage: int) -> tuple[Slot, ...]:
        """What the vector of a stage, or of the ends, holds."""
        span = self._span_of(stage)

        def place(key: str) -> tuple[bool, str]:
            block, rest = self._cut(key)
            # By the name that the parameter has in the module of just this stage, as text: block 10 comes before 2.
            name = key if span is None or block is None else f"{block - span.start}.{rest}"
            return len(self._shapes[key]) < 2, name

        return tuple(Slot(key, self._shapes[key]) for key in sorted(self._keys_of(stage, self._shapes), key=place))

    def block_of(self, key: str) -> int | None:
        """Index of the block that has this tensor; None for the ends'."""
        return self._cut(key)[0]

    def size(self, stage: int) -> int:
        """Values of a stage's vector."""
        return sum(prod(slot.shape) for slot in self.slots(stage))

    def views(self, stage: int, vector: Tensor) -> dict[str, Tensor]:
        """The tensors in the vector [size] of a stage."""
        slots = self.slots(stage)
        pieces = torch.split(vector, [prod(slot.shape) for slot in slots])
        return {slot.key: piece.view(slot.shape) for slot, piece in zip(slots, pieces, strict=True)}

    def check(self, values: Sequence[Tensor]) -> None:
        """Raise BadRequest if these are not the vectors of all stages and the ends."""
        sizes = [self.size(stage) for stage in range(self.spec.num_stages)]
        found = [tuple(vector.shape) for vector in values]
        if found != [(size,) for size in sizes] or any(vector.dtype != torch.float32 for vector in values):
            raise BadRequest(f"the run's stages and ends have float32 vectors of {sizes} values, got {found}")

    def parts(self, values: Sequence[Tensor], buffers: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """All tensors: those of each block, then those of the ends."""
        for stage, vector in enumerate(values):
            named = self.views(stage, vector) | {key: buffers[key] for key in self._keys_of(stage, self.buffer_keys)}
            for block in self._span_of(stage) or [None]:
                yield {key: tensor for key, tensor in named.items() if self._cut(key)[0] == block}

    def initial_buffers(self) -> dict[str, Tensor]:
        """What buffer_keys name, as the run began with it. Nothing is read where a family has none."""
        buffers: dict[str, Tensor] = {}
        for stage in range(self.spec.num_stages):
            keys = self._keys_of(stage, self.buffer_keys)
            if keys:
                source, span = open_initial_weights(self.spec), self._span_of(stage)
                tensors = source.load_ends() if span is None else source.load_blocks(span)
                check_initial(self.spec, stage, tensors)
                state = self.load(stage, tensors, source.name).state_dict()
                buffers |= {key: state[key] for key in keys}
        return buffers

    def load(self, stage: int, tensors: dict[str, Tensor], name: str) -> Any:
        """The model of only this stage, or of the ends, float32, from tensors of a checkpoint. It cannot compute."""
        span = self._span_of(stage)
        config = copy.deepcopy(self.config)
        if span is not None:
            config.tie_word_embeddings = False

        def cut(model: nn.Module) -> None:
            if span is None:
                _keep_blocks(model.get_submodule(self.blocks_name), ())
                return
            for step in self.blocks_name.split("."):
                for other, _ in list(model.named_children()):
                    if other != step:
                        setattr(model, other, nn.Identity())
                model = model.get_submodule(step)
            _keep_blocks(model, span)

        return build_model(config, tensors, dtype=torch.float32, cut=cut, name=name)

    def _span_of(self, stage: int) -> Span | None:
        return None if stage == self.spec.ends_stage else self.spec.stages[stage]

    def _keys_of(self, stage: int, keys: Mapping[str, object] | frozenset[str]) -> list[str]:
        """Of those keys of the whole model."""
        blocks = set(self._span_of(stage) or [None])
        return [key for key in keys if self._cut(key)[0] in blocks]

    def _cut(self, key: str) -> tuple[int | None, str]:
        """Index of the block that has this tensor, and the tensor's name there; None for the ends'."""
        if not key.startswith(f"{self.blocks_name}."):
            return None, key
        index, _, rest = key.removeprefix(f"{self.blocks_name}.").partition(".")
        return int(index), rest


def _keep_blocks(blocks: nn.Module, wanted: Sequence[int] | Span) -> None:
    """Let a list of blocks have only these, under the indices that they have."""
    kept = {str(index) for index in wanted}
    for name in blocks._modules.keys() - kept:
        del blocks._modules[name]


# Writing ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """What an error of the disk means for the user: UserError. Those of the network, which are OSErrors, too, pass as they are."""
    try:
        yield
    except (TimeoutError, ConnectionError):
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write {out} ({reason}): free some space on its disk, or choose another folder"
        ) from error


@contextlib.contextmanager
def made_at_once(out: Path) -> Iterator[Path]:
    """A new folder, which is at `out` once the block has ended, and gone if that raised.

    UserError if something is there already, and for errors of the disk in the block (disk_errors).
    """
    out = out.resolve()
    with disk_errors(out):
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is there already and is not an empty folder: choose another folder")
        missing = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=".partial-") as beside:
                folder = Path(beside) / "checkpoint"  # the outer one is for its owner alone
                folder.mkdir()
                yield folder
                folder.replace(out)
        except BaseException:
            for created in missing:
                with contextlib.suppress(OSError):
                    created.rmdir()
            raise


def require_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"the checkpoint takes {needed_bytes / 2**30:.2f} GiB, and the disk has {free_bytes / 2**30:.2f} GiB free: "
            "free some space, or choose a folder on another disk"
        )


def _write_weights(
    layout: WeightLayout, values: Sequence[Tensor], folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    # What save_pretrained does, which would first copy the whole model.
    from transformers.core_model_loading import revert_weight_conversion

    shards = _Shards(folder, max_shard_bytes)
    for part in layout.parts(values, layout.initial_buffers()):
        tensors = {}
        for key, tensor in part.items():
            tensors[key] = tensor if key in layout.buffer_keys else tensor.to(dtype)
            if not bool(torch.isfinite(tensors[key]).all()):
                raise UserError(
                    f"{key} holds values that are not finite as {dtype}: choose float32 or bfloat16, or another epoch"
                )
        for name, tensor in revert_weight_conversion(layout.model, tensors).items():
            shards.add(name, tensor.contiguous())
    shards.close()


class _Shards:
    """The safetensors files of a checkpoint, written one after another, and their index if they are several."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._written: list[tuple[Path, list[str]]] = []
        self._total_bytes = self._total_parameters = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._waiting and self._waiting_bytes + tensor.nbytes > self._max_bytes:
            self._write()
        self._waiting[name] = tensor
        self._waiting_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self._total_parameters += tensor.numel()

    def close(self) -> None:
        """Give the files their names, which tell how many there are."""
        self._write()
        if len(self._written) == 1:
            self._written[0][0].replace(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, start=1):
            file = f"model-{number:05d}-of-{len(self._written):05d}.safetensors"
            path.replace(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        totals = {"total_parameters": self._total_parameters, "total_size": self._total_bytes}
        index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        path = self._folder / f"{len(self._written)}.partial"
        save_file(self._waiting, path, metadata={"format": "pt"})
        self._written.append((path, [*self._waiting]))
        self._waiting, self._waiting_bytes = {}, 0


def _write_configs(layout: WeightLayout, folder: Path, dtype: torch.dtype) -> None:
    """config.json as save_pretrained writes it, and generation_config.json with the special tokens that it names."""
    from transformers import GenerationConfig

    config = copy.deepcopy(layout.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(layout.model).__name__]
    found = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Some old configs say -1 for none.
    special = {key: token for key, token in found.items() if not (isinstance(token, int) and token < 0)}
    try:
        for key in config._get_generation_parameters():  # settings of generate(), which save_pretrained refuses in here
            delattr(config, key)
        with quiet_libraries():
            config.save_pretrained(folder)
            GenerationConfig(**special).save_pretrained(folder)
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"transformers cannot write the config of {layout.spec.name} ({reason}): the run's config is at fault, ask its owner"
        ) from error


def copy_tokenizer(store: RunStore, folder: Path) -> None:
    """Only files of names that a tokenizer has: a stranger's rules may call one config.json."""
    known = find_tokenizer_files(store.tokenizer_folder())
    for name in known.keys() & store.spec.tokenizer.keys():
        (folder / name).write_bytes(store.read(store.spec.tokenizer[name]))


# The model card ---------------------------------------------------------------------------------------------------------


def make_card(
    store: RunStore,
    epoch: int,
    lineage: bytes,
    dtype: torch.dtype,
    orders: Orders,
    loss: float | None,
    eval_loss: float | None,
    *,
    library: str = "transformers",
    use: str = _USE,
    base: str | None = None,
) -> str:
    """Markdown behind YAML. Of the rules, which a stranger wrote, only a plain hub id (base, of adapters) gets into the YAML."""
    spec = store.spec
    parts = _parts_of(spec, orders, epoch)
    num_samples = sum(len(epochs) * rules.target_batch for epochs, rules in parts)
    began = f"random, from seed {spec.seed}" if spec.weights == "random" else f"those of {_literal(spec.weights)}"
    facts = {
        "Run": f"`{store.run_id.hex()}`",
        "Epoch": f"{epoch} of {orders.planned_end(spec)}",
        "Lineage": f"`{lineage.hex()}`",
        "Tokens seen": f"{num_samples * spec.sequence_length:,} at most (sequences of {spec.sequence_length:,} tokens, {_batches(parts)})",
        "Loss": None if loss is None else f"{loss:.4f} per token, on the epoch's samples",
        "Loss on held-out data": None if eval_loss is None else f"{eval_loss:.4f} per token",
        "Adapters": None if spec.lora is None else _adapters(spec.lora),
        "Initial weights" if spec.lora is None else "Adapted weights": began,
        "Stored as": str(dtype).removeprefix("torch."),
        "Training data": _all_data(parts),
        "Held-out data": None if spec.held_out is None else _described(spec.held_out),
    }
    lines = [f"- {name}: {fact}" for name, fact in facts.items() if fact is not None]
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            *([] if base is None else [f"base_model: {base}"]),
            "pipeline_tag: text-generation",
            "tags:",
            "- shardswarm",
            "- decentralized-training",
            "---",
            "",
            f"# {_literal(spec.name)}",
            "",
            f"{'A language model' if spec.lora is None else 'Adapters (LoRA) for a language model'} that volunteers trained together "
            "with shardswarm: each of them held some of its layers. "
            "The run's rules are signed by its owner; the run id is their hash.",
            "",
            *lines,
            "",
            "## How to load it",
            "",
            f"```python\n{use}```",
            "",
        ]
    )


_Parts: TypeAlias = Sequence[tuple[range, RunSpec]]
"""Epochs, and the rules that held in them."""


def _parts_of(spec: RunSpec, orders: Orders, end: int) -> _Parts:
    """The epochs before `end`, cut where the owner has amended the rules; at least one part."""
    starts = [0, *(one.epoch for one in orders.amendments if one.epoch < end)]
    spans = itertools.starmap(range, zip(starts, [*starts[1:], end], strict=True))
    return [(epochs, orders.spec_at(spec, epochs.start)) for epochs in spans]


def _batches(parts: _Parts) -> str:
    merged = _merged([(epochs, f"{rules.target_batch:,} per epoch") for epochs, rules in parts])
    return ", ".join(f"{what}{when}" for what, when in merged)


def _all_data(parts: _Parts) -> str:
    return "; ".join(f"{what}{when}" for what, when in _merged([(one, _described(rules.data)) for one, rules in parts]))


def _merged(parts: Sequence[tuple[range, str]]) -> list[tuple[str, str]]:
    """What was so, and when: "" if it was so all the time."""
    groups = [(what, [epochs for epochs, _ in same]) for what, same in itertools.groupby(parts, key=lambda one: one[1])]
    if len(groups) == 1:
        return [(groups[0][0], "")]
    return [(what, f" in epochs {same[0].start} to {same[-1].stop - 1}") for what, same in groups]


def _adapters(lora: LoraSettings) -> str:
    names = ", ".join(_literal(name) for name in lora.target_modules)
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {names}"


def _described(data: DataSpec) -> str:
    """What the rules say of data, as Markdown in one line."""
    if data.kind is DataKind.OWN:
        return "text of each trainer's own, which never left it"
    names = [_literal(name) for name in data.files[:MAX_FILES_IN_CARD]]
    if len(data.files) > len(names):
        names.append(f"{len(data.files) - len(names)} more")
    source = f"{_literal(data.source)}: " if data.source else ""
    return f"{source}{', '.join(names)} ({data.kind}, {data.num_samples:,} samples, manifest `{data.manifest_digest.hex()}`)"


def _literal(text: str) -> str:
    """Printable text as Markdown that shows it as it is: no markup, HTML, entity or link."""
    return _PUNCTUATION.sub(r"\\\1", text)
