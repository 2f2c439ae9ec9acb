"""Checkpoint: the tensors of a model by block, read from safetensors only when asked for.

    open_checkpoint("smollm2-135m")          -> Checkpoint
        .config .num_blocks .spec            what the model is
        .load_blocks(span) .load_ends()      tensors under their names in the checkpoint, memory-mapped
        .block_digests(span)                 what those tensors must hash to

Nothing is ever unpickled, and no code from a checkpoint is run. Where the files come from: swarm/sources.py.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from swarm.cache import CacheEntry, Sidecar, cache_root, list_cache, prune_cache
from swarm.errors import ModelNotFound, SwarmError, UserError
from swarm.model_spec import ModelSpec, config_digest
from swarm.sources import ALIASES, Located, locate
from swarm.span import Span
from swarm.tensor_files import StoredTensor, digest_tensors, read_header, read_index, read_tensors
from swarm.terminal import ProgressBar, quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALIASES", "CacheEntry", "Checkpoint", "digest_tensors", "list_cache", "open_checkpoint", "prune_cache"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
    }
)
NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")

Loaded = TypeVar("Loaded")


def open_checkpoint(
    model: str,
    *,
    prefer_sources: Sequence[str] = (),
    cache_dir: Path | None = None,
    progress: bool | None = None,
) -> Checkpoint:
    """The checkpoint that the user calls `model`: a folder, a .gguf file, a hub id, or an alias such as smollm2-135m.

    prefer_sources: sources of an alias that the swarm serves; if one is known, only such a one will do.
    progress: draw bars on stderr; None means if it is a terminal.
    Raises ModelNotFound, or another UserError (full disk, damaged file), within about 10 s when the network is away.
    """
    return Checkpoint(
        locate(model, prefer_sources=prefer_sources, cache_dir=cache_dir, progress=progress), cache_dir, progress
    )


class Checkpoint:
    """One checkpoint. Cheap to make; each property does its reading (and downloading) when it is first asked for.

    Holds a lease on a converted model in the cache until `close` (or until it is garbage).
    """

    def __init__(self, located: Located, cache_dir: Path | None = None, progress: bool | None = None) -> None:
        self.name = located.name
        self.source = located.source
        self._located = located
        self._files = located.files
        self._progress = progress
        self._sidecar = Sidecar(cache_root(cache_dir), located.source)
        self._headers: dict[Path, dict[str, StoredTensor]] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the cache remove this model. Tensors that were loaded stay valid."""
        if self._located.lease is not None:
            self._located.lease.release()

    @cached_property
    def config(self) -> Any:
        """The transformers PreTrainedConfig. Raises UserError if there is none that can be used."""
        folder = self._files.fetch("config.json").parent
        from transformers import AutoConfig

        from swarm.decoder import text_config

        config = self._from_transformers(
            lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), "config.json"
        )
        text = text_config(config, self.name)
        if getattr(config, "is_encoder_decoder", False) or not getattr(text, "num_hidden_layers", None):
            raise UserError(
                f"{self.name} ({config.model_type}) is not a decoder with blocks: choose a causal language model"
            )
        return config

    @property
    def folder(self) -> Path:
        """A folder with the config and tokenizer files, fetched if need be; the weights in it may be missing."""
        return self._files.folder()

    @property
    def num_blocks(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @cached_property
    def config_digest(self) -> bytes:
        """Digest of config.json as it is stored, apart from volatile keys."""
        try:
            described = json.loads(self._files.fetch("config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read config.json of {self.source}: {error}; copy or download it again") from error
        if not isinstance(described, dict):
            raise UserError(f"config.json of {self.source} is not a JSON object: copy or download it again")
        return config_digest(described)

    @cached_property
    def spec(self) -> ModelSpec:
        """Identity of the model. Reads the ends once to digest them; later starts find the digest in the cache."""
        (ends_digest,) = self._digests({"ends": self.end_keys})
        hidden_size = int(self.config.get_text_config().hidden_size)
        return ModelSpec(self.name, self.source, self.num_blocks, hidden_size, self.config_digest, ends_digest)

    @cached_property
    def block_keys(self) -> tuple[tuple[str, ...], ...]:
        """Names of the tensors of each block, sorted. Raises UserError if a block has none."""
        return _find_block_keys(list(self._weight_map), self.num_blocks, self._meta_block_names, self.source)

    @cached_property
    def end_keys(self) -> tuple[str, ...]:
        """Names of all other tensors, sorted; without those of extra blocks that transformers does not run."""
        in_blocks = {key for keys in self.block_keys for key in keys}
        stem = _stem(self.block_keys[0][0], 0)
        extra = re.compile(re.escape(stem) + r"\d+\.")
        return tuple(sorted(key for key in self._weight_map if key not in in_blocks and not extra.match(key)))

    def load_blocks(self, span: Span) -> dict[str, Tensor]:
        """Tensors of the blocks in `span`, by their names in the checkpoint, as stored, on the CPU.

        They are memory-mapped: pages are read when used. No other tensor is read, no other file fetched.
        """
        return self._load(key for block in self._blocks_of(span) for key in self.block_keys[block])

    def load_ends(self) -> dict[str, Tensor]:
        """Tensors that belong to no block, by their names in the checkpoint."""
        return self._load(self.end_keys)

    def digest_blocks(self, span: Span, tensors: Mapping[str, Tensor]) -> list[bytes]:
        """Digest of each block in `span` from tensors that load_blocks returned: what a node really loaded."""
        return [
            digest_tensors({key: tensors[key] for key in self.block_keys[block]}) for block in self._blocks_of(span)
        ]

    def block_digests(self, span: Span) -> list[bytes]:
        """Digest of each block in `span` as stored in the source; remembered while the files do not change."""
        return self._digests({f"block {block}": self.block_keys[block] for block in self._blocks_of(span)})

    def expected_digests(self) -> list[bytes] | None:
        """Digests of all blocks if all their files are on this disk, else None: nothing is downloaded for this."""
        if not self._has_weight_map() or any(
            self._files.local(name) is None for name in set(self._weight_map.values())
        ):
            return None
        return self.block_digests(Span(0, self.num_blocks))

    def block_bytes(self, span: Span, bytes_per_parameter: float) -> int:
        """Size of the blocks in `span` at a given precision; reads headers, or the config where files are not here yet."""
        keys = [key for block in self._blocks_of(span) for key in self.block_keys[block]]
        if any(self._files.local(self._weight_map[key]) is None for key in keys):
            return int(sum(self._meta_block_sizes[block] for block in span) * bytes_per_parameter)
        return int(sum(prod(self._stored(key).shape) for key in keys) * bytes_per_parameter)

    def tokenizer(self) -> Any:
        """The transformers tokenizer. Raises ModelNotFound if the checkpoint has none."""
        if not self._files.names() & TOKENIZER_FILES:
            raise ModelNotFound(
                f"{self.source} has no tokenizer.json: copy the model's tokenizer files next to its config"
            )
        folder = self._files.folder()
        from transformers import AutoTokenizer

        return self._from_transformers(
            lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False), "tokenizer"
        )

    def generation_config(self) -> Any | None:
        """The transformers GenerationConfig, or None if the checkpoint has none."""
        if "generation_config.json" not in self._files.names():
            return None
        folder = self._files.fetch("generation_config.json").parent
        from transformers import GenerationConfig

        return self._from_transformers(lambda: GenerationConfig.from_pretrained(folder), "generation_config.json")

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """File of each tensor."""
        names = self._files.names()
        if SINGLE_FILE in names:
            return dict.fromkeys(self._header(SINGLE_FILE), SINGLE_FILE)
        if INDEX_FILE in names:
            return read_index(self._files.fetch(INDEX_FILE))
        pickled = sorted(name for name in names if name.endswith(PICKLED_SUFFIXES))
        if pickled:
            raise UserError(
                f"{self.source} holds its weights only in {pickled[0]}, a pickle, which can run any code and is never "
                "opened: convert it to safetensors, or choose a copy that has model.safetensors"
            )
        raise ModelNotFound(f"{self.source} has no {SINGLE_FILE} and no {INDEX_FILE}: copy the weights there")

    def _has_weight_map(self) -> bool:
        return SINGLE_FILE not in self._files.names() or self._files.local(SINGLE_FILE) is not None

    def _header(self, name: str) -> dict[str, StoredTensor]:
        path = self._files.fetch(name)
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]

    def _stored(self, key: str) -> StoredTensor:
        name = self._weight_map[key]
        try:
            return self._header(name)[key]
        except KeyError:
            raise UserError(
                f"{INDEX_FILE} of {self.source} says that {key} is in {name}, which lacks it: download the checkpoint again"
            ) from None

    def _load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        keys_of: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            keys_of[self._weight_map[key]].append(key)
        tensors: dict[str, Tensor] = {}
        for name, wanted in sorted(keys_of.items()):
            for key in wanted:
                self._stored(key)
            tensors.update(read_tensors(self._files.fetch(name), wanted))
        return tensors

    def _digests(self, groups: Mapping[str, Sequence[str]]) -> list[bytes]:
        """Digest of each named group of tensors, from the sidecar where the files are as they were."""
        files = {
            group: [self._files.fetch(name) for name in sorted({self._weight_map[key] for key in keys})]
            for group, keys in groups.items()
        }
        known = {group: self._sidecar.get(group, files[group]) for group in groups}
        unknown = [group for group, digest in known.items() if digest is None]
        total = sum(self._stored(key).num_bytes for group in unknown for key in groups[group])
        fresh: dict[str, bytes] = {}
        with ProgressBar(f"checking {self.name}", total, wanted=self._progress) as bar:
            for group in unknown:
                fresh[group] = digest_tensors(self._load(groups[group]))
                bar.advance(sum(self._stored(key).num_bytes for key in groups[group]))
        if fresh:
            self._sidecar.put({group: (files[group], digest) for group, digest in fresh.items()})
        return [digest if (digest := known[group]) is not None else fresh[group] for group in groups]

    def _blocks_of(self, span: Span) -> Span:
        if span.end > self.num_blocks:
            raise UserError(f"{self.name} has blocks 0:{self.num_blocks}, not {span}: choose blocks among them")
        return span

    @cached_property
    def _meta_blocks(self) -> tuple[list[str], list[int]]:
        """Where the model keeps its blocks (with and without the base model's prefix), and each block's parameters."""
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM

        def build() -> Any:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)

        model = self._from_transformers(build, "config.json")
        prefix = str(model.base_model_prefix)
        for name, module in model.base_model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_blocks and name.count(".") <= 1:
                sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in module]
                return [f"{prefix}.{name}.", f"{name}."], sizes
        raise UserError(
            f"{self.name} ({self.config.model_type}) has no list of {self.num_blocks} blocks: choose another model"
        )

    def _meta_block_names(self) -> list[str]:
        return self._meta_blocks[0]

    @property
    def _meta_block_sizes(self) -> list[int]:
        return self._meta_blocks[1]

    def _from_transformers(self, load: Callable[[], Loaded], what: str) -> Loaded:
        """Whatever transformers raises over a file it cannot use, as one line."""
        try:
            with quiet_libraries():
                return load()
        except SwarmError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            if "trust_remote_code" in str(error):
                reason = "it needs code that comes with the checkpoint, which is never run; choose another model"
            raise UserError(f"cannot use the {what} of {self.source}: {reason}") from error


def _find_block_keys(
    keys: Sequence[str], num_blocks: int, meta_names: Callable[[], list[str]], source: str
) -> tuple[tuple[str, ...], ...]:
    """Keys of each block: those under the one stem ("model.layers.") that has every index from 0 to num_blocks - 1.

    Only when none or several do, the model is built without memory to see which of them the blocks are.
    """
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in keys:
        if match := NUMBERED.search(key):
            found[key[: match.start(1)]][int(match[1])].append(key)
    complete = [stem for stem, blocks in found.items() if all(index in blocks for index in range(num_blocks))]
    if len(complete) != 1:
        full, relative = meta_names()  # raises if the model has no such list of blocks
        ranks = [
            [stem for stem in complete if fits(stem)]
            for fits in (full.__eq__, relative.__eq__, lambda s: s.endswith("." + relative))
        ]
        complete = next((stems for stems in ranks if len(stems) == 1), complete)
    if len(complete) != 1:
        why = "several sets of blocks" if complete else f"not all of its {num_blocks} blocks"
        raise UserError(f"{source} has {why} in its weights: copy or download the whole checkpoint, or choose another")
    blocks = found[complete[0]]
    return tuple(tuple(sorted(blocks[index])) for index in range(num_blocks))


def _stem(key: str, block: int) -> str:
    match = NUMBERED.search(key)
    assert match is not None and int(match[1]) == block
    return key[: match.start(1)]
