"""Light packages: packages of other libraries whose own code (`__init__.py`) runs when something of it is asked for, not before.

`import hivemind.p2p` runs `hivemind/__init__.py`, which imports averagers, experts, optimizers, torch and scipy. Of a package that was
handed to `lighten`, only the submodule that is asked for is imported: the package is there with its path, and runs its own code, in
its own module and under a lock, the first time that somebody looks up a name which it does not have yet. So nobody can tell the
difference but by time and memory. Where packages are found in another way than on a path (in a zip), they are imported as ever.

Knows no library. Which packages, and what of them is found where: swarm/p2p/__init__.py and swarm/light_start.py.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Home = str | Callable[[], object]
"""Where a name of a package is found without the package's own code: a module that has it, or what makes it."""


def lighten(
    package: str,
    homes: Mapping[str, Home] | None = None,
    *,
    beforehand: Callable[[], object] | None = None,
    afterwards: Callable[[], object] | None = None,
) -> None:
    """From now on import this package without its own code. One that was imported or lightened before stays as it is.

    homes: the names in it for which its own code need not run.
    beforehand: to be called when the package is imported. afterwards: when its own code has run, if it ever does.
    """
    _finder.postponed.setdefault(package, _Postponed(homes or {}, beforehand, afterwards))
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def run_in_full(package: str) -> Any:
    """The package, whose own code has run by now."""
    module = importlib.import_module(package)
    if isinstance(module, _LightPackage):
        module.__postponed__.run(module)
    return sys.modules[package]


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.postponed: dict[str, _Postponed] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if target is not None:  # somebody reloads a module, for its code to run
            return None
        if name in self.postponed:
            spec = PathFinder.find_spec(name, path)
            if spec is None or spec.loader is None or spec.submodule_search_locations is None:
                return None
            spec.loader = _LightLoader(spec.loader, self.postponed[name])
            return spec
        parent = sys.modules.get(name.rpartition(".")[0])
        if isinstance(parent, _LightPackage) and parent.__postponed__.is_due and not PathFinder.find_spec(name, path):
            parent.__postponed__.run(parent)  # it may know of modules that are no files
        return None


class _LightLoader(Loader):
    """Makes the package, and leaves it to `_Postponed` to run its code."""

    def __init__(self, loader: Loader, postponed: _Postponed) -> None:
        self._loader, self._postponed = loader, postponed

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        module.__dict__["__postponed__"] = self._postponed
        module.__class__ = _LightPackage
        if self._postponed.beforehand is not None:
            self._postponed.beforehand()

    def __getattr__(self, name: str) -> Any:  # what loaders of files offer besides
        return getattr(self._loader, name)


class _Postponed:
    """What is still to be done for one package."""

    def __init__(
        self,
        homes: Mapping[str, Home],
        beforehand: Callable[[], object] | None,
        afterwards: Callable[[], object] | None,
    ) -> None:
        self.homes, self.beforehand = homes, beforehand
        self._afterwards = afterwards
        self._lock = threading.RLock()  # the package's own code asks for names while it runs
        self._is_running = self._is_done = False

    @property
    def is_due(self) -> bool:
        return not (self._is_running or self._is_done)

    def run(self, package: ModuleType) -> bool:
        """Run the package's own code, unless that is done. False while it is under way in this very thread."""
        with self._lock:
            if self._is_running:
                return False
            if not self._is_done:
                self._is_running = True
                try:
                    package.__loader__.exec_module(package)  # type: ignore[union-attr]
                    self._is_done = True
                finally:
                    self._is_running = False
                if self._afterwards is not None:
                    self._afterwards()
        return True


class _LightPackage(ModuleType):
    """A package whose own code may not have run yet."""

    __postponed__: _Postponed

    def __getattr__(self, name: str) -> Any:  # only of what is not there
        home = self.__postponed__.homes.get(name)
        if home is not None and self.__postponed__.is_due:
            return self.__dict__.setdefault(
                name, home() if callable(home) else getattr(importlib.import_module(home), name)
            )
        # A submodule that is being imported becomes an attribute when that is done; the import system finds it by itself.
        if f"{self.__name__}.{name}" not in sys.modules and self.__postponed__.run(self):
            current = sys.modules[self.__name__]
            if current is not self:  # some packages put another module in their own place
                return getattr(current, name)
            if name in self.__dict__:
                return self.__dict__[name]
            if "__getattr__" in self.__dict__:
                return self.__dict__["__getattr__"](name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


_finder = _Finder()
