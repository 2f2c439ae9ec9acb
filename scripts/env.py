"""Makes the repository's .venv and keeps it up to date. Standard library only: it runs before anything is installed.

    env.py is-ready [EXTRA...]    exit 0 when .venv has the package with these extras (20 ms, takes no lock)
    env.py install  [EXTRA...]    make it so

How an environment is known to be good: `.venv/stamp.json` is written last, atomically, and removed before pip starts.
`.venv/installing` exists while pip runs; when it is found by somebody who holds the lock, pip was killed half-way, and
half-written packages cannot be told from whole ones: the environment is made anew (downloads come from pip's cache).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "stamp.json"
INSTALLING = VENV / "installing"
LOG = VENV / "install.log"

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# (download, disk) in GB, measured with torch 2.13 on Linux x86-64; the CUDA build brings its libraries with it.
TORCH_CPU_GB = (0.2, 0.8)
TORCH_DEFAULT_GB = (0.1, 0.5) if sys.platform == "darwin" else (3.0, 7.5)
OTHERS_GB = (0.2, 0.8)
FINETUNE_GB = (0.1, 0.3)

NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|name resolution|Max retries exceeded|ConnectTimeout|ReadTimeout|ProxyError"
    r"|Cannot connect to proxy|Network is unreachable|Connection refused|nodename nor servname|after connection broken"
)
NOISE = re.compile(r"Location .* is ignored|^\s*$")


class SetupError(Exception):
    """The environment cannot be made; the message says what the user can do."""


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in ("is-ready", "install"):
        print(__doc__, file=sys.stderr)
        return 2
    command, extras = arguments[0], frozenset(arguments[1:])
    if command == "is-ready":
        return 0 if is_ready(extras) else 1
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, exit_on_signal)
    try:
        install(extras)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot make {VENV}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to start over", file=sys.stderr)
        return 130
    return 0


def exit_on_signal(signum: int, _frame: object) -> NoReturn:
    sys.exit(128 + signum)  # unwinds through run_pip, which stops pip


def is_ready(extras: frozenset[str]) -> bool:
    """Asked of the environment's own Python: by being answered at all, it shows that this Python works."""
    stamp = read_stamp()
    wanted = fingerprint(sys.implementation.cache_tag)
    return all(stamp.get(key) == value for key, value in wanted.items()) and extras <= set(stamp["extras"])


def fingerprint(cache_tag: str) -> dict[str, str]:
    """What an installed environment depends on. The settings of the linters do not count."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    relevant = {"build-system": pyproject["build-system"], "project": pyproject["project"]}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
    # An environment holds absolute paths: after the folder was moved it must be made anew.
    return {"project": digest, "python": cache_tag, "machine": os.uname().machine, "root": str(ROOT)}


def read_stamp() -> dict[str, Any]:
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and isinstance(stamp.get("extras"), list) else {}


def install(extras: frozenset[str]) -> None:
    lock = take_lock()
    try:
        # Somebody else may have finished it while we waited.
        if PYTHON.exists() and subprocess.call([PYTHON, "-I", "-S", __file__, "is-ready", *extras]) == 0:
            return
        stamp = read_stamp()
        extras |= set(stamp.get("extras", ()))  # `scripts/demo` does not take away what `scripts/test` needs
        usable = is_usable(stamp)
        torch = torch_requirement()
        if not usable:
            make_venv()
        index = None
        if torch_version_installed(torch) is None:
            source, index, gigabytes = choose_torch(torch, lock)
            announce(source, gigabytes, extras)
        else:
            print("Updating .venv ...", file=sys.stderr)
        STAMP.unlink(missing_ok=True)
        INSTALLING.touch()
        if index is not None:
            run_pip(["install", "--no-deps", "--index-url", index, torch], lock)
        target = f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT)
        run_pip(["install", torch, "--editable", target], lock)
        cache_tag = venv_output("import sys; print(sys.implementation.cache_tag)")
        partial = STAMP.with_suffix(".partial")
        partial.write_text(json.dumps({**fingerprint(cache_tag), "extras": sorted(extras)}), encoding="utf-8")
        INSTALLING.unlink()
        partial.replace(STAMP)
    finally:
        os.close(lock)


def take_lock() -> int:
    """One installation at a time. The lock is on the folder itself: no file to leave behind, and .venv may vanish.

    pip inherits the descriptor, so that a pip that outlives us (kill -9) keeps the lock until it is done.
    """
    lock = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process is preparing .venv; waiting for it ...", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def is_usable(stamp: dict[str, Any]) -> bool:
    """Can pip install on top of what is there? A .venv that somebody made by hand can be used too."""
    if not PYTHON.exists() or INSTALLING.exists() or stamp.get("root", str(ROOT)) != str(ROOT):
        return False
    try:
        version = venv_output("import pip, sys, os; print(*sys.version_info[:2], os.uname().machine)")
    except (SetupError, OSError):
        return False
    return version in {f"3 {minor} {os.uname().machine}" for minor in (11, 12, 13)}


def make_venv() -> None:
    if VENV.is_symlink():
        VENV.unlink()
    elif VENV.exists():
        print(f"{VENV} is unfinished, damaged or from another place: making it anew", file=sys.stderr)
        shutil.rmtree(VENV)
    VENV.mkdir()
    INSTALLING.touch()
    made = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        reason = (made.stdout + made.stderr).strip().splitlines() or ["no output"]
        if "No space left" in made.stdout + made.stderr:
            raise SetupError(f"the disk that holds {ROOT} is full: free about 2 GB and run this again")
        raise SetupError(f"`{sys.executable} -m venv` failed (Debian, Ubuntu: apt install python3-venv): {reason[-1]}")


def torch_requirement() -> str:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    requirements: list[str] = pyproject["project"]["dependencies"]
    return next(requirement for requirement in requirements if re.match(r"torch\b", requirement))


def torch_version_installed(requirement: str) -> str | None:
    try:
        version = venv_output("from importlib.metadata import version; print(version('torch'))")
    except SetupError:
        return None
    return newest_allowed([version], requirement)


def choose_torch(requirement: str, lock: int) -> tuple[str, str | None, tuple[float, float]]:
    """Which build: (name for the user, index to take it from or None for pip's own, (download, disk) in GB).

    `pip install --dry-run` would tell as well, but before pip 23.3 it downloads the wheel to do so.
    """
    if sys.platform != "linux":
        return "torch", None, TORCH_DEFAULT_GB
    if has_nvidia_gpu():
        return "torch with CUDA (NVIDIA GPU found)", None, TORCH_DEFAULT_GB
    listing = subprocess.run(
        [PYTHON, "-m", "pip", "index", "versions", "torch", "--retries", "1", "--timeout", "10"],
        env=pip_environment(), capture_output=True, text=True, check=False, pass_fds=(lock,),
    ).stdout  # fmt: skip
    versions = re.search(r"Available versions: (.*)", listing)
    configured = newest_allowed(versions.group(1).split(", "), requirement) if versions else None
    if configured is not None and configured.endswith("+cpu"):
        return f"torch {configured}", None, TORCH_CPU_GB
    try:
        with urllib.request.urlopen(f"{TORCH_CPU_INDEX}/torch/", timeout=3):
            return "torch, the CPU build (no NVIDIA GPU found)", TORCH_CPU_INDEX, TORCH_CPU_GB
    except (OSError, ValueError):
        return "torch with CUDA (the index of CPU builds does not answer)", None, TORCH_DEFAULT_GB


def has_nvidia_gpu() -> bool:
    if any(re.fullmatch(r"nvidia\d+", entry) for entry in os.listdir("/dev")):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        return "GPU " in subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


def newest_allowed(versions: Sequence[str], requirement: str) -> str | None:
    """The newest of `versions` that `requirement` (name and specifiers) allows, judged by pip's own rules."""
    code = (
        "import sys; from pip._vendor.packaging.requirements import Requirement as R;"
        "from pip._vendor.packaging.version import Version as V;"
        "print(max(R(sys.argv[1]).specifier.filter(sys.argv[2:]), key=V, default=''))"
    )
    return venv_output(code, requirement, *versions) or None


def announce(source: str, torch_gb: tuple[float, float], extras: frozenset[str]) -> None:
    """Say what will come before it comes, and refuse at once when it cannot fit."""
    finetune_gb = FINETUNE_GB if "finetune" in extras else (0.0, 0.0)
    others, disk = OTHERS_GB[0] + finetune_gb[0], torch_gb[1] + OTHERS_GB[1] + finetune_gb[1]
    print(
        f"First run: installing into .venv. To download, unless pip has it cached: {source}, about {torch_gb[0]:.1f} GB;\n"
        f"everything else, about {others:.1f} GB; and on first use the demo's model, 93 MB. On disk: {disk:.1f} GB.",
        file=sys.stderr,
    )
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < disk:
        raise SetupError(
            f"not enough disk: {disk:.1f} GB needed (plus up to {torch_gb[0] + others:.1f} GB in pip's cache), "
            f"{free:.1f} GB free where {ROOT} is"
        )


def run_pip(arguments: Sequence[str], lock: int) -> None:
    """Run pip with its output in LOG; on a terminal show one line that tells what it is at."""
    with open(LOG, "ab", buffering=0) as log:
        log.write(f"\n$ pip {' '.join(arguments)}\n".encode())
        begin = log.tell()
        pip = subprocess.Popen(
            [PYTHON, "-m", "pip", "--no-input", *arguments, "--progress-bar", "off"],
            cwd=ROOT, env=pip_environment(), pass_fds=(lock,),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            follow(pip, log)
            code = pip.wait()
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
            show("")
    if code == 0:
        return
    output = LOG.read_bytes()[begin:].decode(errors="replace")
    if "No space left on device" in output:
        raise SetupError(
            "the disk is full (the repository's, the temporary or pip's cache folder): free some and rerun"
        )
    if code > 0:
        INSTALLING.unlink(missing_ok=True)  # pip gave up by itself: what is installed is whole and can be kept
    if NO_NETWORK.search(output):
        raise SetupError(
            f"no network: the package index could not be reached; when it can, run this again (log: {LOG})"
        )
    for line in [line for line in output.splitlines() if not NOISE.search(line)][-15:]:
        print(f"  pip: {line}", file=sys.stderr)
    raise SetupError(f"pip could not install the packages: its last lines are above, all of them in {LOG}")


def pip_environment() -> dict[str, str]:
    ignored = ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
    kept = {key: value for key, value in os.environ.items() if key not in ignored}
    return kept | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def follow(pip: subprocess.Popen[bytes], log: Any) -> None:
    assert pip.stdout is not None
    start = time.monotonic()
    activity, pending = "starting pip", b""
    with selectors.DefaultSelector() as selector:
        selector.register(pip.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.5):
                chunk = os.read(pip.stdout.fileno(), 65536)
                if not chunk:
                    return
                log.write(chunk)
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    activity = activity_of(line.decode(errors="replace")) or activity
            show(f"  {activity} ({time.monotonic() - start:.0f} s)")


def activity_of(line: str) -> str | None:
    if match := re.match(r"\s*Downloading (?:\S*/)?(\S+?)-\d\S* \(([^)]+)\)", line):
        return f"downloading {match[1]}, {match[2]}"
    if match := re.match(r"Collecting ([\w.-]+)", line):
        return f"resolving {match[1]}"
    if line.startswith("Installing collected packages"):
        return "installing (about half a minute)"
    return None


def show(text: str) -> None:
    """Replace the status line of the terminal, if there is one."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def venv_output(code: str, *arguments: str) -> str:
    done = subprocess.run([PYTHON, "-I", "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"{PYTHON} does not work: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
