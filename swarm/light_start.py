"""Light start: what our own programs leave out of torch and transformers: a compiler, distributed tensors, the names of all families.

For command lines, before they import anything heavy, and never for the library: the process of somebody who imports swarm is theirs.
Nothing that our programs do is any different for it:

- modules run their code late (swarm/light_modules.py): torch's compiler; two packages of transformers, which read all of its 2,000
  files for names that we import from where they are; its handling of images and sound, of which models take the name of a type;
- functions are marked for the compiler, and kept from it, when that is really imported; nothing can be compiled before;
- functions that are seldom called are imported when they are: of scipy the one that transformers imports for models that find objects;
- transformers is told that there is no torch.distributed. It asks once, remembers, and goes without, as on machines that have none: our
  models are on one device each.

tests/contract/test_light_start.py holds what this relies on.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from swarm.light_modules import has_run, lighten, run_in_full

_COMPILER = "torch._dynamo"
_TRANSFORMERS = {
    "AttentionInterface": "transformers.modeling_utils",
    "AttentionMaskInterface": "transformers.masking_utils",
    "AutoConfig": "transformers.models.auto.configuration_auto",
    "AutoModelForCausalLM": "transformers.models.auto.modeling_auto",
    "AutoModelForSequenceClassification": "transformers.models.auto.modeling_auto",
    "AutoTokenizer": "transformers.models.auto.tokenization_auto",
    "Cache": "transformers.cache_utils",
    "DynamicCache": "transformers.cache_utils",
    "GenerationConfig": "transformers.generation.configuration_utils",
    "GenerationMixin": "transformers.generation.utils",
    "PreTrainedConfig": "transformers.configuration_utils",
    "PreTrainedModel": "transformers.modeling_utils",
    "PreTrainedTokenizerFast": "transformers.tokenization_utils_tokenizers",
    "PretrainedConfig": "transformers.configuration_utils",
    "TextStreamer": "transformers.generation.streamers",
}
_marks: list[tuple[str, Callable[..., Any]]] = []


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import what is large in this context: without looking for garbage, of which there is none yet, which takes a quarter of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what was imported stays
        if collects:
            gc.enable()


def leave_out() -> None:
    """Leave all that out of this process. To be called before torch and transformers are imported; imports neither."""
    lighten(
        "scipy.optimize",
        {"linear_sum_assignment": lambda: _when_called("scipy.optimize", "linear_sum_assignment")},
        alone=(),
    )
    decorators = {name: functools.partial(_marker, name) for name in ("allow_in_graph", "assume_constant_result")}
    lighten(
        _COMPILER,
        {**decorators, "disable": lambda: _disable, "graph_break": lambda: _break_no_graph},
        alone={"_trace_wrapped_higher_order_op"},
        afterwards=_mark_now,
    )
    lighten(
        "transformers",
        {
            **_TRANSFORMERS,
            "__version__": _transformers_version,
            "initialization": lambda: importlib.import_module("transformers.initialization"),
            "set_seed": lambda: _when_called("transformers.trainer_utils", "set_seed"),
        },
    )
    lighten("transformers.models")
    lighten("transformers.processing_utils", {"Unpack": "typing"})
    lighten("transformers.distributed", beforehand=_hide_distributed_tensors)


def _transformers_version() -> str:
    from importlib.metadata import version  # 20 ms, which --help has no use for

    return version("transformers")


def _hide_distributed_tensors() -> None:
    import torch
    from transformers.utils import import_utils

    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        import_utils.is_torch_distributed_available()  # which keeps its answer
    finally:
        torch.distributed.is_available = is_available


def _when_called(module: str, name: str) -> Callable[..., Any]:
    """In the place of a function: imports it when it is called."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(run_in_full(module), name)(*args, **options)

    return call


def _marker(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """In the place of a decorator of the compiler's that only takes note of functions."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        _marks.append((name, function))
        return function

    return mark


def _mark_now() -> None:
    for name, function in _marks:
        getattr(sys.modules[_COMPILER], name)(function)


def _break_no_graph(*_: Any, **__: Any) -> None:
    """In the place of the compiler's `graph_break`, which optimizers call in each step: it does nothing but when it is compiled."""


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    """In the place of the compiler's `disable`, which keeps it from compiling a function: while there is no compiler, nothing does."""
    if function is None:
        return functools.partial(_disable, recursive=recursive, **options)
    if not inspect.isroutine(function):
        return run_in_full(_COMPILER).disable(function, recursive, **options)
    disabled = functools.cache(lambda: sys.modules[_COMPILER].disable(function, recursive, **options))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled()(*args, **kwargs) if has_run(_COMPILER) else function(*args, **kwargs)

    return call
