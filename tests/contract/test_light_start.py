"""What our programs leave out of hivemind, torch and transformers stays left out, and the layout that this relies on is there.

A new version of one of them that fails here imports more than before, or has moved something: see swarm/p2p/__init__.py and
swarm/light_start.py.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from tests.support.models import save_tiny
from tests.support.probes import run_python
from tests.support.processes import LocalSwarm, Process, stop_all

LEFT_OUT_OF_HIVEMIND = {"hivemind", "hivemind.averaging", "hivemind.dht", "hivemind.moe", "hivemind.utils"}
LEFT_OUT_OF_MODELS = {
    "scipy.optimize",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers",
    "transformers.audio_utils",
    "transformers.models",
    "transformers.processing_utils",
}
HEAVY = {"numpy", "pydantic", "scipy", "torch", "transformers"}
# One of our programs, which says at its end which modules are there in full.
PROGRAM = """
import atexit, importlib, sys
from swarm.light_modules import has_run
atexit.register(lambda: print("\\nMODULES", *filter(has_run, list(sys.modules)), file=sys.stderr))
importlib.import_module(sys.argv.pop(1)).main()
"""


def modules_of(log: str) -> set[str]:
    """The modules that a program had at its end."""
    (line,) = (line for line in log.splitlines() if line.startswith("MODULES "))
    return set(line.split()[1:])


def test_our_programs_leave_it_out(tmp_path: Path):
    bootstrap = Process(
        [sys.executable, "-c", PROGRAM, "bootstrap.cli", "--identity", str(tmp_path / "identity")], tmp_path / "log"
    )
    swarm = LocalSwarm(tmp_path, bootstrap)
    try:
        model, peers = save_tiny("llama", tmp_path / "tiny"), ("--initial-peers", bootstrap.address)
        node = Process(
            [sys.executable, "-c", PROGRAM, "node.cli", "run", "--model", str(model), *peers], tmp_path / "node.log"
        )
        swarm.processes.append(node)
        node.ready()
        client = run_python("-c", PROGRAM, "swarm.cli", "generate", "a", "--model", str(model), *peers)
        status = run_python("-c", PROGRAM, "swarm.cli", "status", *peers)
    finally:
        stop_all([*swarm.processes, bootstrap])
    assert (client.code, status.code) == (0, 0), (client.err, status.err)
    for log in (node.log, client.err):
        assert {"torch", "transformers.modeling_utils", "hivemind.dht.node"} <= modules_of(log)
        assert modules_of(log) & (LEFT_OUT_OF_HIVEMIND | LEFT_OUT_OF_MODELS) == set()
    for log in (bootstrap.log, status.err):
        assert "hivemind.dht.node" in modules_of(log)
        assert modules_of(log) & (LEFT_OUT_OF_HIVEMIND | HEAVY) == set()


NAMES = """
from swarm.light_start import leave_out
leave_out()
import importlib, swarm.p2p
from swarm.light_modules import _finder, has_run, run_in_full
light = {}
for name, postponed in _finder.postponed.items():
    module = importlib.import_module(name)
    light[name] = {home: getattr(module, home) for home, where in postponed.homes.items() if isinstance(where, str)}
    for child in postponed.alone or ():
        importlib.import_module(f"{name}.{child}")
assert not any(map(has_run, light.keys() - {"transformers.distributed"})), [*filter(has_run, light)]
for name, values in light.items():
    for home, value in values.items():
        assert value is getattr(run_in_full(name), home), (name, home)
"""


def test_each_name_is_the_one_that_the_whole_module_has():
    assert version("hivemind") == "1.1.12" and version("transformers").startswith("5.23.")
    assert run_python("-c", NAMES).err == ""


WHOLE = """
import swarm.p2p.directory, sys
assert "hivemind.moe" not in sys.modules
import hivemind, hivemind.moe
from hivemind import DHT, Optimizer
assert hivemind.__version__ == "1.1.12" and hivemind.moe.Server is hivemind.Server and hivemind.dht.DHT is DHT
assert hivemind.utils.MPFuture.__module__ == "hivemind.utils.mpfuture"
assert hivemind.dht.node.DHTNode is swarm.p2p.directory.DHTNode
"""


def test_who_uses_hivemind_beside_us_has_all_of_it():
    assert run_python("-c", WHOLE).err == ""


# The same in whole libraries and in light ones: what the compiler was kept from, it leaves alone; what it was told of, it knows.
COMPILER = """
import sys
if sys.argv[1] == "light":
    from swarm.light_start import leave_out
    leave_out()
import torch, transformers
from transformers import LlamaForCausalLM, set_seed
light = "torch._dynamo.eval_frame" not in sys.modules
seen = []

@torch.compiler.disable
def kept(x):
    seen.append(torch.compiler.is_compiling())
    return x + 1

@torch.compiler.disable(recursive=False)
def also_kept(x):
    seen.append(torch.compiler.is_compiling())
    return x + 1

def compiled(x):
    seen.append(torch.compiler.is_compiling())
    return also_kept(kept(x)) * 2

optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
optimizer.step()
print(light, kept(torch.ones(1)).item(), kept.__name__, end=" ")
light = "torch._dynamo.eval_frame" not in sys.modules
result = torch.compile(compiled, backend="eager")(torch.ones(1)).item()
from torch._dynamo.trace_rules import _allowed_callable_ids
from transformers.integrations import finegrained_fp8
allowed = [f for f in vars(finegrained_fp8).values() if id(f) in _allowed_callable_ids]
set_seed(3)
first = torch.rand(1).item()
torch.manual_seed(3)
print(light, result, seen, len(allowed) > 0, first == torch.rand(1).item())
"""


def test_the_compiler_works_when_somebody_needs_it_after_all():
    whole, light = (run_python("-W", "ignore", "-c", COMPILER, kind) for kind in ("whole", "light"))
    assert light.code == 0, light.err[-3000:]
    assert light.out.split()[0] == light.out.split()[3] == "True", "an optimizer and a model needed no compiler"
    assert light.out.replace("True 2.0 kept True", "False 2.0 kept False") == whole.out, (light, whole)
    assert "[False, True, False, False]" in light.out
