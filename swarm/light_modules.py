"""Light modules: modules and packages of other libraries whose code runs when something of theirs is asked for, not on import.

`import hivemind.p2p` runs `hivemind/__init__.py`, which imports averagers, experts, optimizers, torch and scipy. Of a package that was
handed to `lighten`, only the submodule that is asked for is imported: the package is there with its path, and runs its code, in its
own namespace and under a lock, the first time that somebody looks up a name which it does not have yet. So nobody can tell the
difference but by time and memory. Modules that are found in another way than on a path (in a zip) are imported as ever.

Knows no library. Which modules, and what of theirs is found where: swarm/p2p/__init__.py and swarm/light_start.py.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Home = str | Callable[[], object]
"""Where a name is found without running the code of its module: another module that has it, or what makes it."""


def lighten(
    name: str,
    homes: Mapping[str, Home] | None = None,
    *,
    alone: Collection[str] | None = None,
    beforehand: Callable[[], object] | None = None,
    afterwards: Callable[[], object] | None = None,
) -> None:
    """From now on import this module or package without its code. One that was imported or lightened before stays as it is.

    homes: the names in it for which its code need not run.
    alone: the submodules that do without its code, which runs before any other of them is imported. None: all do.
    beforehand: to be called when it is imported. afterwards: when its code has run, if it ever does.
    """
    _finder.postponed.setdefault(name, _Postponed(homes or {}, alone, beforehand, afterwards))
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def run_in_full(name: str) -> Any:
    """The module, whose code has run by now."""
    module = importlib.import_module(name)
    if isinstance(module, _LightModule):
        module.__postponed__.run(module)
    return sys.modules[name]


def has_run(name: str) -> bool:
    """Whether the code of this module has run to its end."""
    module = sys.modules.get(name)
    return module is not None and (not isinstance(module, _LightModule) or module.__postponed__.is_done)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.postponed: dict[str, _Postponed] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if target is not None:  # somebody reloads a module, for its code to run
            return None
        if name in self.postponed:
            spec = PathFinder.find_spec(name, path)
            if spec is None or spec.loader is None:
                return None
            spec.loader = _LightLoader(spec.loader, self.postponed[name])
            return spec
        package, _, child = name.rpartition(".")
        parent = sys.modules.get(package)
        if isinstance(parent, _LightModule) and parent.__postponed__.is_due:
            alone = parent.__postponed__.alone
            # What is no file may be known to the package's code.
            if (alone is not None and child not in alone) or PathFinder.find_spec(name, path) is None:
                parent.__postponed__.run(parent)
                if name in sys.modules:  # by now; the import system would load it again, by the module's own spec
                    present = sys.modules[name]
                    present.__spec__ = ModuleSpec(name, _Present(present))
                    return present.__spec__
        return None


class _Present(Loader):
    """Hands out a module that was imported while it was looked for."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _LightLoader(Loader):
    """Makes the module, and leaves it to `_Postponed` to run its code."""

    def __init__(self, loader: Loader, postponed: _Postponed) -> None:
        self._loader, self._postponed = loader, postponed

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        module.__dict__["__postponed__"] = self._postponed
        module.__class__ = _LightModule
        if self._postponed.beforehand is not None:
            self._postponed.beforehand()

    def __getattr__(self, name: str) -> Any:  # what loaders of files offer besides
        return getattr(self._loader, name)


class _Postponed:
    """What is still to be done for one module."""

    def __init__(
        self,
        homes: Mapping[str, Home],
        alone: Collection[str] | None,
        beforehand: Callable[[], object] | None,
        afterwards: Callable[[], object] | None,
    ) -> None:
        self.homes, self.alone, self.beforehand = homes, alone, beforehand
        self._afterwards = afterwards
        self._lock = threading.RLock()  # the module's code asks for names while it runs
        self._is_running = self.is_done = False

    @property
    def is_due(self) -> bool:
        return not (self._is_running or self.is_done)

    def run(self, module: ModuleType) -> bool:
        """Run the module's code, unless that is done. False while it is under way in this very thread."""
        with self._lock:
            if self._is_running:
                return False
            if not self.is_done:
                self._is_running = True
                try:
                    module.__loader__.exec_module(module)  # type: ignore[union-attr]
                    self.is_done = True
                finally:
                    self._is_running = False
                if self._afterwards is not None:
                    self._afterwards()
        return True


class _LightModule(ModuleType):
    """A module whose code may not have run yet."""

    __postponed__: _Postponed

    def __getattr__(self, name: str) -> Any:  # only of what is not there
        home = self.__postponed__.homes.get(name)
        if home is not None and self.__postponed__.is_due:
            return self.__dict__.setdefault(
                name, home() if callable(home) else getattr(importlib.import_module(home), name)
            )
        # A submodule that is being imported becomes an attribute when that is done; the import system finds it by itself. And it asks
        # whether a module is a package, which all packages know at once.
        is_for_imports = name == "__path__" or f"{self.__name__}.{name}" in sys.modules
        if not is_for_imports and self.__postponed__.run(self):
            current = sys.modules[self.__name__]
            if current is not self:  # some put another module in their own place
                return getattr(current, name)
            if name in self.__dict__:
                return self.__dict__[name]
            if "__getattr__" in self.__dict__:
                return self.__dict__["__getattr__"](name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


_finder = _Finder()
