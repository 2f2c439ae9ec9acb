"""Turns a GGUF file into a safetensors directory that transformers loads without knowing where it came from.

De-quantising and names are transformers' own (`load_gguf_checkpoint`); what is written is float32, exactly as it came out.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from swarm.cache import require_space
from swarm.errors import SwarmError, UserError
from swarm.terminal import ProgressBar, quiet_libraries

# Goes into the cache key: raise it when the same file would be converted differently.
CONVERSION = 1
CHUNK_BYTES = 1 << 22
# llama.cpp's pre-tokenizers that split off every digit and then split as GPT-2 does; transformers 5.23 leaves the digits.
SINGLE_DIGIT_PRE_TOKENIZERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})


def file_sha256(path: Path, progress: bool | None = None) -> str:
    """sha256 of a file, in hex."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file, ProgressBar(f"reading {path.name}", path.stat().st_size, wanted=progress) as bar:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
            bar.advance(len(chunk))
    return hasher.hexdigest()


def cache_key(sha256: str) -> str:
    return f"gguf-{sha256[:32]}-v{CONVERSION}"


def check_gguf(path: Path) -> None:
    """Raise UserError unless the file begins like a GGUF of a version that can be read."""
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) < 8 or start[:4] != b"GGUF":
        raise UserError(f"{path} is not a GGUF file (it does not begin with GGUF): download it again")
    version = struct.unpack("<I", start[4:])[0]
    if version not in (2, 3):
        raise UserError(f"{path} is GGUF version {version}; versions 2 and 3 can be read: convert it again")


def convert_gguf(path: Path, folder: Path, progress: bool | None = None) -> None:
    """Write config, tokenizer, generation config and model.safetensors of the GGUF at `path` into `folder`.

    Needs memory for the whole model in float32. Raises UserError when the file is damaged or its architecture unknown.
    """
    try:
        with quiet_libraries(), ProgressBar(f"converting {path.name}", 100, unit="%", wanted=progress) as bar:
            _convert(path, folder, bar)
    except (SwarmError, OSError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot convert {path}: {reason[:200]}; use a complete GGUF file of an architecture that transformers reads"
        ) from error


def _convert(path: Path, folder: Path, bar: ProgressBar) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    bar.reach(25)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    require_space(folder.parent, size * 1.02, f"converting {path.name}")
    tensors = _dequantise(path, model, bar)
    wrong = [name for name, tensor in tensors.items() if shapes.get(name) != tuple(tensor.shape)]
    missing = sorted(set(shapes) - set(tensors) - tied)
    if wrong or missing:
        raise UserError(
            f"cannot convert {path}: tensor {(wrong + missing)[0]!r} of {config.model_type} is missing or misshapen; "
            "use a safetensors copy of this model"
        )
    bar.reach(75)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    bar.reach(90)
    _write_config(folder, config, type(model).__name__)
    generation = GenerationConfig.from_model_config(config)
    generation.save_pretrained(str(folder))
    _convert_tokenizer(path, folder, config)
    bar.reach(100)


def _dequantise(path: Path, model: Any, bar: ProgressBar) -> dict[str, Any]:
    """float32 tensors by their names in the model; the bar goes from 25 to 70."""
    import transformers.modeling_gguf_pytorch_utils as loader

    def count(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        listed = list(tensors)
        for index, tensor in enumerate(listed):
            bar.reach(30 + 40 * index / len(listed))
            yield tensor

    bar_of_theirs, loader.tqdm = loader.tqdm, count  # their bar ignores every switch that silences bars
    try:
        tensors: dict[str, Any] = loader.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)[
            "tensors"
        ]
    finally:
        loader.tqdm = bar_of_theirs
    if not tensors:
        raise UserError(f"cannot convert {path}: transformers does not read this architecture; use safetensors")
    return tensors


def _write_config(folder: Path, config: Any, architecture: str) -> None:
    """config.json without the path that the model came from: it must be equal on every machine."""
    described = json.loads(config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "_model_name_or_path", "name_or_path", "ignore"):
        described.pop(key, None)
    described["architectures"] = [architecture]
    described["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def _convert_tokenizer(path: Path, folder: Path, config: Any) -> None:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.reader import read_gguf_metadata

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    metadata, _ = read_gguf_metadata(str(path))
    if metadata.get("tokenizer.ggml.pre") in SINGLE_DIGIT_PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    tokenizer.save_pretrained(str(folder))
    settings_path = folder / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text())
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    settings_path.write_text(json.dumps(settings, indent=2) + "\n")
