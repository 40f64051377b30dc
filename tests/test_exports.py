"""The public names: importable, in one place, documented, and what the README says of them.

Public is what :mod:`trimig` and the packages of ``PLACES`` export as ``X as X``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

import trimig
from trimig import guest

ROOT: Final = Path(__file__).resolve().parent.parent
#: Packages with public names beside the top level.
PLACES: Final = ("trimig.wire", "trimig.guests", "trimig.memory", "trimig.testing", "trimig.config")
#: Modules that stand in no package and are public as a whole: types of the interfaces, and the table of statuses.
MODULES: Final = ("trimig.guest", "trimig.status", "trimig.errors", "trimig.monitor.monitor")

#: Names that the top level takes from a public package on purpose: what every caller needs.
TWICE: Final = {
    "trimig.guests": {"AppGuest", "Device", "LazyAppGuest", "ParkedGuest", "ProcessGuest", "WorkloadGuest"},
    "trimig.config": {"Capabilities", "Config", "GiB", "KiB", "MiB", "Parameters", "PeerProfile", "parse_size"},
}


def exported(name: str) -> set[str]:
    """What a package exports, by its source: ``from .x import Y as Y``."""
    tree = ast.parse(Path(str(importlib.import_module(name).__file__)).read_text(encoding="utf-8"))
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if alias.asname == alias.name
    }


def every_module() -> list[str]:
    """All modules of the package."""
    return ["trimig", *(m.name for m in pkgutil.walk_packages(trimig.__path__, "trimig.") if "__main__" not in m.name)]


PUBLIC: Final = [(place, name) for place in ("trimig", *PLACES) for name in sorted(exported(place))]


def test_the_top_level_lists_its_names() -> None:
    """Nothing else is public there: no helper, no name of another library."""
    assert set(trimig.__all__) == exported("trimig") | {"__version__"}
    assert {
        name for name, thing in vars(trimig).items() if not name.startswith("_") and not inspect.ismodule(thing)
    } == (exported("trimig"))


@pytest.mark.parametrize(("place", "name"), PUBLIC)
def test_public_name_can_be_imported(place: str, name: str) -> None:
    assert not name.startswith("_")
    assert getattr(importlib.import_module(place), name) is not None


@pytest.mark.parametrize("place", ["trimig", *PLACES])
def test_imports_of_a_package_are_exports(place: str) -> None:
    """What is imported without "as" would be public by accident, or a mistake."""
    path = Path(str(importlib.import_module(place).__file__))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert [alias.name for alias in node.names if alias.asname != alias.name] == []


def test_each_name_is_in_one_public_place() -> None:
    """Or in two on purpose."""
    top = exported("trimig")
    for place in PLACES:
        assert exported(place) & top == TWICE.get(place, set()) & top, place
        for other in PLACES:
            if place != other:
                assert not exported(place) & exported(other), (place, other)


@pytest.mark.parametrize("name", every_module())
def test_module_says_what_it_is_for(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip()


@pytest.mark.parametrize(("place", "name"), PUBLIC)
def test_public_class_prints_with_a_place_that_exists(place: str, name: str) -> None:
    found = getattr(importlib.import_module(place), name)
    if inspect.isclass(found) or inspect.isfunction(found):
        home = importlib.import_module(found.__module__)
        assert found.__module__.startswith("trimig.")
        assert "._" not in found.__module__
        assert getattr(home, found.__qualname__) is found


# -- documentation -------------------------------------------------------------------------------------------------


def objects() -> Iterator[tuple[str, Any]]:
    """Every public function and class, and their public methods, by dotted name; each once."""
    seen: set[int] = set()
    found: list[tuple[str, Any]] = [(f"{p}.{n}", getattr(importlib.import_module(p), n)) for p, n in PUBLIC]
    for module in map(importlib.import_module, MODULES):
        found += [(f"{module.__name__}.{n}", o) for n, o in vars(module).items() if not n.startswith("_")]
    for dotted, thing in found:
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if id(thing) in seen or not thing.__module__.startswith("trimig"):
            continue
        seen.add(id(thing))
        yield dotted, thing
        if inspect.isclass(thing):
            for name, member in vars(thing).items():
                inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if not name.startswith("_") and inspect.isfunction(inner):
                    yield f"{dotted}.{name}", inner


OBJECTS: Final = dict(objects())
#: What is implemented by classes that need not inherit from it; the rules of a method are said there.
INTERFACES: Final = (guest.Guest, guest.OpaqueGuest, guest.RamBlock, guest.DirtyTracker, guest.DeviceProtocol)


def texts(dotted: str) -> str:
    """The docstring of something, and those of what it overrides or implements."""
    thing = OBJECTS[dotted]
    found = [inspect.getdoc(thing) or ""]
    owner, _, name = dotted.rpartition(".")
    cls = OBJECTS.get(owner)
    if inspect.isclass(cls):
        for base in (*cls.__mro__[1:], *INTERFACES):
            member = base.__dict__.get(name)
            inner = member.fget if isinstance(member, property) else member
            # Only ours and trio's interfaces: `object` has docstrings for everything.
            if inner is not None and base.__module__.startswith(("trimig", "trio")):
                found.append(inspect.getdoc(inner) or "")
    return "\n".join(found)


@pytest.mark.parametrize("dotted", sorted(OBJECTS))
def test_public_thing_is_documented(dotted: str) -> None:
    assert texts(dotted).strip()


COROUTINES: Final = sorted(dotted for dotted, thing in OBJECTS.items() if inspect.iscoroutinefunction(thing))


@pytest.mark.parametrize("dotted", COROUTINES)
def test_public_coroutine_says_what_a_cancellation_leaves(dotted: str) -> None:
    """What has and has not happened; an implementation may leave it to its interface."""
    assert "**Cancellation" in texts(dotted)


def test_something_was_looked_at() -> None:
    assert {"trimig.migrate", "trimig.receive", "trimig.Monitor.wait_status", "trimig.Guest.pause"} <= set(COROUTINES)
    assert len(OBJECTS) > 200


@pytest.mark.parametrize("function", [trimig.migrate, trimig.receive, trimig.HandoverUncertain.settle])
def test_main_calls_list_their_errors(function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function) or ""
    assert "Raises:" in text
    assert re.search(r"\*\*Cancellation:\*\* \S+", text)


# -- pages ---------------------------------------------------------------------------------------------------------

PAGES: Final = {
    path.name: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *(ROOT / "trimig" / "docs").rglob("*.md")]
}


def resolve(dotted: str) -> object:
    """What a dotted name stands for; AttributeError if there is no such thing."""
    found: object = trimig
    for part in dotted.split(".")[1:]:
        if isinstance(found, ModuleType) and not hasattr(found, part):
            try:
                found = importlib.import_module(f"{found.__name__}.{part}")
            except ModuleNotFoundError:
                raise AttributeError(dotted) from None
        else:
            found = getattr(found, part)
    return found


def test_names_on_the_pages_exist() -> None:
    names = {name for text in PAGES.values() for name in re.findall(r"\btrimig(?:\.[A-Za-z_]\w*)+", text)}
    assert {"trimig.migrate", "trimig.receive", "trimig.Monitor"} <= names
    for dotted in sorted(names):
        resolve(dotted)


def test_code_on_the_pages_can_be_compiled() -> None:
    blocks = [block for text in PAGES.values() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) > 10
    for block in blocks:
        compile(block, "page", "exec")


def test_missing_name_would_be_noticed() -> None:
    with pytest.raises(AttributeError):
        resolve("trimig.teleport")
    with pytest.raises(AttributeError):
        resolve("trimig.Monitor.teleport")


def test_version_is_that_of_the_project() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    assert trimig.__version__ in (declared.group(1), "0+unknown")
