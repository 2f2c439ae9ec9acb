"""Modules whose code runs when something of theirs is asked for: nobody can tell, but by when it runs."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from swarm.light_modules import has_run, lighten, run_in_full

Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Make]:
    """make({"__init__": code, "part": code}) is the name of a package with these modules, each of which notes in RAN that it runs."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"package_of_{abs(hash(request.node.nodeid))}"

    def make_package(modules: Mapping[str, str]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for module, code in modules.items():
            note = "import builtins\nbuiltins.RAN.append(__name__.partition('.')[2] or 'package')\n"
            (folder / f"{module}.py").write_text(note + code.replace("PACKAGE", name))
        importlib.invalidate_caches()
        return name

    monkeypatch.setattr("builtins.RAN", [], raising=False)
    yield make_package
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def ran() -> list[str]:
    names: list[str] = importlib.import_module("builtins").RAN  # type: ignore[attr-defined]
    return names


def import_(name: str) -> Any:
    return importlib.import_module(name)


def test_a_submodule_is_imported_without_the_code_of_its_package(make: Make) -> None:
    name = make({"__init__": "from PACKAGE import other", "part": "value = 1", "other": ""})
    lighten(name)
    assert import_(f"{name}.part").value == 1
    assert import_(name).part.value == 1
    assert ran() == ["part"] and not has_run(name)


def test_a_name_that_is_not_there_makes_the_code_run_once(make: Make) -> None:
    name = make({"__init__": "from PACKAGE.part import value\ntwice = 2 * value", "part": "value = 1"})
    lighten(name)
    package = import_(name)
    assert (package.twice, package.value, package.part.value) == (2, 1, 1)
    assert ran() == ["package", "part"] and has_run(name)
    with pytest.raises(AttributeError, match="has no attribute 'thrice'"):
        package.thrice  # noqa: B018
    assert run_in_full(name) is package and ran() == ["package", "part"]


def test_from_import_asks_for_names_and_for_submodules(make: Make) -> None:
    name = make({"__init__": "value = 1", "part": ""})
    lighten(name)
    scope: dict[str, Any] = {}
    exec(f"from {name} import part, value", scope)
    assert scope["value"] == 1 and scope["part"] is sys.modules[f"{name}.part"]


def test_star_import_gets_what_the_code_offers(make: Make) -> None:
    name = make({"__init__": "value = 1\n_hidden = 2"})
    lighten(name)
    scope: dict[str, Any] = {}
    exec(f"from {name} import *", scope)
    assert scope["value"] == 1 and "_hidden" not in scope


def test_names_with_another_home_need_no_code(make: Make) -> None:
    name = make({"__init__": "value = 3\nmade = 4", "part": "value = 1"})
    lighten(name, {"value": f"{name}.part", "made": lambda: 2})
    package = import_(name)
    assert (package.value, package.made) == (1, 2) and ran() == ["part"]
    run_in_full(name)
    assert (package.value, package.made) == (3, 4), "now they are the package's own"


def test_submodules_that_need_the_code_get_it_first(make: Make) -> None:
    name = make({"__init__": "ready = True", "needy": "import PACKAGE\nassert 'ready' in vars(PACKAGE)", "free": ""})
    lighten(name, alone={"free"})
    import_(f"{name}.free")
    assert ran() == ["free"]
    import_(f"{name}.needy")
    assert ran() == ["free", "package", "needy"]


def test_code_that_imports_its_own_submodules_sees_a_package_under_way(make: Make) -> None:
    name = make(
        {"__init__": "from PACKAGE import part\nlate = 1", "part": "import PACKAGE\nsaw = hasattr(PACKAGE, 'late')"}
    )
    lighten(name)
    assert import_(name).late == 1
    assert import_(f"{name}.part").saw is False


def test_a_submodule_that_the_code_imports_is_imported_once(make: Make) -> None:
    name = make({"__init__": "from PACKAGE import part", "part": ""})
    lighten(name, alone=())
    part = import_(f"{name}.part")
    assert ran() == ["package", "part"]
    assert part is sys.modules[f"{name}.part"] is import_(name).part and part.__spec__.origin == part.__file__


def test_a_package_that_puts_another_module_in_its_place(make: Make) -> None:
    replacement = "import sys, types\nlazy = types.ModuleType(__name__)\nlazy.value = 1\nlazy.__path__ = __path__\nsys.modules[__name__] = lazy"
    name = make({"__init__": replacement})
    lighten(name)
    before = import_(name)
    assert before.value == 1 and run_in_full(name) is sys.modules[name] is not before
    assert before.value == 1, "also for those who had imported it before"


def test_a_module_that_makes_its_names_itself(make: Make) -> None:
    name = make(
        {"__init__": "def __getattr__(name):\n    if name == 'made':\n        return 1\n    raise AttributeError(name)"}
    )
    lighten(name)
    assert import_(name).made == 1 and import_(name).made == 1
    with pytest.raises(AttributeError):
        import_(name).other  # noqa: B018


def test_code_that_makes_modules_which_are_no_files(make: Make) -> None:
    name = make(
        {"__init__": "import sys, types\nsys.modules[__name__ + '.made'] = types.ModuleType(__name__ + '.made')"}
    )
    lighten(name)
    with pytest.raises(ModuleNotFoundError):
        import_(f"{name}.nowhere")
    assert ran() == ["package"]
    assert import_(f"{name}.made").__name__ == f"{name}.made"


def test_a_single_module_can_be_light(make: Make) -> None:
    name = make({"__init__": "", "part": "value = 1", "user": "from PACKAGE.part import free"})
    lighten(f"{name}.part", {"free": lambda: 0})
    assert import_(f"{name}.user").free == 0 and ran() == ["package", "user"]
    assert import_(f"{name}.part").value == 1 and ran()[-1] == "part"


def test_an_error_of_the_code_is_raised_each_time(make: Make) -> None:
    name = make({"__init__": "import PACKAGE.nowhere"})
    lighten(name)
    package = import_(name)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="nowhere"):
            package.value  # noqa: B018
    assert not has_run(name)


def test_what_was_imported_before_stays_as_it_is(make: Make) -> None:
    name = make({"__init__": "value = 1"})
    package = import_(name)
    lighten(name)
    assert import_(name) is package and type(package) is ModuleType and has_run(name)


def test_a_reload_runs_the_code(make: Make) -> None:
    name = make({"__init__": "value = 1"})
    lighten(name)
    assert importlib.reload(import_(name)).value == 1 and ran() == ["package"]


def test_threads_that_ask_at_once_wait_for_one_run(make: Make) -> None:
    name = make({"__init__": "import time\nfirst = 1\ntime.sleep(0.05)\nlast = 2"})
    lighten(name)
    package, found = import_(name), []
    threads = [threading.Thread(target=lambda: found.append(package.last)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 8 and ran() == ["package"]


def test_what_is_to_be_done_beforehand_and_afterwards(make: Make) -> None:
    name, done = make({"__init__": "value = 1"}), list[str]()
    lighten(name, beforehand=lambda: done.append("before"), afterwards=lambda: done.append("after"))
    assert done == []
    package = import_(name)
    assert done == ["before"]
    assert package.value == 1 and done == ["before", "after"]


def test_the_module_looks_like_any_other(make: Make) -> None:
    name = make({"__init__": '"""About it."""\nvalue = 1'})
    lighten(name)
    package = import_(name)
    spec = importlib.util.find_spec(name)
    assert spec is package.__spec__ and package.__loader__ is spec.loader
    assert Path(package.__file__).name == "__init__.py" and package.__path__ and package.__name__ == name
    assert "value = 1" in spec.loader.get_source(name)
