"""Reads every file of the package and fails on what the design forbids.

* Imports point one way (``MAY_IMPORT``); nothing imports ``testing``; the command line uses public names only.
* Three dangerous things have one address each (``ADDRESSES``): threads, shields, trio's scheduler seed.
* ``wire`` and ``policy`` import neither trio nor a clock.
* No broad ``except`` that does not raise again.
* No object writes the attributes of another one, but for records (``RECORDS``).
* No lookup of an attribute that may be missing: an interface is a Protocol, and ``isinstance`` asks for it.

``violations`` is a plain function of a path and a text, so that each rule is also shown to fail on a bad file.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
FILES: Final = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "trimig").rglob("*.py"))

_RECORDS: Final = frozenset({"errors", "expected", "owner", "status", "config", "guest", "formats"})
_BASE: Final = _RECORDS | {"monitor"}
_CHANNEL: Final = _BASE | {"wire", "policy"}
_ENGINE: Final = _CHANNEL | {"memory", "channel", "engine"}
_TOOLS: Final = _ENGINE | {"transport", "guests"}
_API: Final = _TOOLS | {"trimig", "api"}

#: What each unit (a subpackage or a module of the top level; ``trimig`` is its ``__init__``) may import, itself aside.
MAY_IMPORT: Final = {
    "errors": frozenset[str](),
    "formats": frozenset[str](),
    "status": frozenset({"errors"}),
    "config": frozenset({"errors", "expected"}),
    "expected": frozenset[str](),
    "owner": frozenset({"errors", "expected"}),
    "guest": frozenset({"errors", "owner"}),
    "monitor": _RECORDS,
    "wire": _BASE,
    "policy": _BASE,
    "memory": _BASE,
    "channel": _CHANNEL,
    "engine": _ENGINE,
    "transport": _CHANNEL | {"channel"},
    "guests": _ENGINE,
    "api": _TOOLS,
    "trimig": _API,
    "portal": _API,
    "stream": _API,
    "qmp": _API,
    "testing": _API | {"portal", "stream", "qmp"},
    "cli": _BASE | {"trimig", "portal", "policy", "wire", "transport", "guests", "stream", "qmp"},
}

#: Dangerous name -> where it may stand.
ADDRESSES: Final = {
    **dict.fromkeys(
        ("threading", "_thread", "concurrent", "to_thread", "from_thread", "start_thread_soon"),
        frozenset({"trimig/channel/offload.py", "trimig/portal/portal.py", "trimig/guests/workload/faults.py"}),
    ),
    "shield": frozenset({"trimig/channel/closing.py", "trimig/engine/guest_calls.py", "trimig/engine/shield.py"}),
    "_ALLOW_DETERMINISTIC_SCHEDULING": frozenset({"trimig/testing/determinism.py"}),
}

#: What the units without I/O and clock may not import.
NOT_SANS_IO: Final = frozenset({"trio", "anyio", "asyncio", "socket", "select", "selectors", "time", "datetime"})
SANS_IO: Final = frozenset({"wire", "policy"})


def unit_of(parts: tuple[str, ...]) -> str:
    """The unit a dotted path below trimig belongs to: ``("trimig", "wire", "decoder")`` is in ``wire``."""
    if parts[1:2] == ("__main__",):
        return "cli"  # python -m trimig
    return parts[1] if len(parts) > 1 else "trimig"


def imported_modules(tree: ast.AST, path: PurePosixPath) -> Iterator[tuple[int, tuple[str, ...], tuple[str, ...]]]:
    """Each import as (line, absolute module path, names taken from it); everywhere in the file, also in functions."""
    package = path.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split(".")), ()
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                module = package[: len(package) - node.level + 1] + module
            yield node.lineno, module, tuple(alias.name for alias in node.names)


def arrows(tree: ast.AST, path: PurePosixPath) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Imports of trimig as (line, unit, dotted path)."""
    for line, module, names in imported_modules(tree, path):
        if module[:1] != ("trimig",):
            continue
        if len(module) == 1 and names:
            # "from trimig import errors" takes the unit, "from trimig import migrate" the top level's name.
            for name in names:
                target = (*module, name) if name in MAY_IMPORT else module
                yield line, unit_of(target), target
        else:
            yield line, unit_of(module), module


def _check_imports(tree: ast.AST, path: PurePosixPath) -> Iterator[str]:
    module = path.with_suffix("").parts
    me = unit_of(module[:-1] if module[-1] == "__init__" else module)
    if me not in MAY_IMPORT:
        yield f"1: {me} is not in the table of units"
        return
    for line, unit, target in arrows(tree, path):
        dotted = ".".join(target)
        if unit != me and unit not in MAY_IMPORT[me]:
            yield f"{line}: {me} imports {dotted}"
        elif me == "cli" and unit != me and len(target) > 2:
            yield f"{line}: cli imports from the inside of a package: {dotted}"
    if me == "cli":
        for line, taken, names in imported_modules(tree, path):
            if taken[:1] == ("trimig",) and taken[:2] != ("trimig", "cli"):
                yield from (f"{line}: cli imports the private name {name}" for name in names if name.startswith("_"))
    if me in SANS_IO:
        for line, taken, _names in imported_modules(tree, path):
            if taken and taken[0] in NOT_SANS_IO:
                yield f"{line}: {me} imports {taken[0]}"


def _names(node: ast.AST) -> Iterator[str]:
    """The dangerous names that *node* itself could bring, and a string that is just one (as for setattr)."""
    match node:
        case ast.Attribute(attr="shield", ctx=ast.Load()) | ast.Name(id="shield"):
            return  # a shield is made by setting it; the engine's function of that name may be called
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.Constant(value=str(name)):
            yield name
        case ast.Import(names=aliases):
            yield from (part for alias in aliases for part in alias.name.split("."))
        case ast.ImportFrom(names=aliases, module=module):
            yield from (alias.name for alias in aliases if alias.name != "shield")
            yield from (part for part in (module or "").split(".") if part != "shield")


def _check_addresses(tree: ast.AST, path: PurePosixPath) -> Iterator[str]:
    for node in ast.walk(tree):
        for name in _names(node):
            allowed = ADDRESSES.get(name)
            if allowed is not None and path.as_posix() not in allowed:
                yield f"{getattr(node, 'lineno', 1)}: {name} belongs into {' or '.join(sorted(allowed))} only"


def _broad(node: ast.expr | None) -> str | None:
    """The broad class among those an ``except`` or ``suppress`` names, if any."""
    if node is None:
        return "BaseException"
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in ("Exception", "BaseException"):
            return part.id
    return None


#: May keep an exception for later: an attempt unwinds in shields before it raises it.
KEEPS_EXCEPTIONS: Final = "trimig/engine/outcome.py"
#: May catch whatever a stranger's function raises, and goes on without that function.
CALLS_STRANGERS: Final = "trimig/monitor/listeners.py"


def _check_excepts(tree: ast.AST, path: PurePosixPath) -> Iterator[str]:
    if path.as_posix() in (KEEPS_EXCEPTIONS, CALLS_STRANGERS):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and (broad := _broad(node.type)) is not None:
            last = node.body[-1]
            again = isinstance(last, ast.Raise) and last.exc is None
            # A foreign error may be turned into one of ours; a cancellation (BaseException) never.
            turned = isinstance(last, ast.Raise) and last.cause is not None and broad == "Exception"
            if not again and not turned:
                yield f"{node.lineno}: broad except that does not end in raise"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress") and any(map(_broad, node.args)):
            yield f"{node.lineno}: suppress of everything"


def violations(path: str, source: str) -> list[str]:
    """What is wrong with a file of the package, one line each; *path* begins with ``trimig/``."""
    tree = ast.parse(source)
    where = PurePosixPath(path)
    found = [*_check_imports(tree, where), *_check_addresses(tree, where), *_check_excepts(tree, where)]
    return [f"{path}:{line}" for line in sorted(set(found))]


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_rules(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_table_of_units_has_no_cycle() -> None:
    """Whatever may import another unit is not importable from there."""
    reach = {unit: set(direct) for unit, direct in MAY_IMPORT.items()}
    for unit, direct in MAY_IMPORT.items():
        assert {other for other in direct if other != unit and unit in reach[other]} == set(), unit
        assert "testing" not in direct
        assert "cli" not in direct


BAD: Final = [
    ("trimig/wire/x.py", "from ..engine import source", "wire imports trimig.engine"),
    ("trimig/wire/x.py", "def f():\n    import trimig.memory.block", "2: wire imports trimig.memory.block"),
    ("trimig/wire/__init__.py", "from ..policy import rate", "wire imports trimig.policy"),
    ("trimig/errors.py", "from .status import Status", "errors imports trimig.status"),
    ("trimig/errors.py", "from . import status", "errors imports trimig.status"),
    ("trimig/engine/x.py", "from ..transport import tcp", "engine imports trimig.transport"),
    ("trimig/engine/x.py", "import trimig", "engine imports trimig"),
    ("trimig/engine/x.py", "from trimig import migrate", "engine imports trimig"),
    ("trimig/guests/x.py", "from ..testing.link import VirtualLink", "guests imports trimig.testing"),
    ("trimig/__init__.py", "from .testing import sweep", "trimig imports trimig.testing"),
    ("trimig/api.py", "from .cli import main", "api imports trimig.cli"),
    ("trimig/cli/x.py", "from ..engine import source", "cli imports trimig.engine"),
    ("trimig/cli/x.py", "from ..guests.app import AppGuest", "inside of a package: trimig.guests.app"),
    ("trimig/cli/x.py", "from ..guests import _x", "the private name _x"),
    ("trimig/new/x.py", "", "new is not in the table"),
    ("trimig/wire/x.py", "import trio", "wire imports trio"),
    ("trimig/policy/x.py", "from time import monotonic", "policy imports time"),
    ("trimig/engine/x.py", "import threading", "threading belongs into"),
    ("trimig/engine/x.py", "from concurrent.futures import ThreadPoolExecutor", "concurrent belongs into"),
    ("trimig/memory/x.py", "import trio\ntrio.to_thread.run_sync(f)", "2: to_thread belongs into"),
    ("trimig/memory/x.py", "from trio import from_thread", "from_thread belongs into"),
    ("trimig/engine/x.py", "trio.CancelScope(shield=True)", "shield belongs into"),
    ("trimig/engine/x.py", "scope.shield = True", "shield belongs into"),
    ("trimig/engine/x.py", "trio.CancelScope(**{'shield': True})", "shield belongs into"),
    ("trimig/guests/x.py", "setattr(scope, 'shield', True)", "shield belongs into"),
    ("trimig/testing/x.py", "core._ALLOW_DETERMINISTIC_SCHEDULING = True", "_ALLOW_DETERMINISTIC_SCHEDULING belongs"),
    ("trimig/testing/x.py", "f('_ALLOW_DETERMINISTIC_SCHEDULING')", "_ALLOW_DETERMINISTIC_SCHEDULING belongs"),
    ("trimig/engine/x.py", "try: pass\nexcept: pass", "broad except"),
    ("trimig/engine/x.py", "try: pass\nexcept Exception: pass", "broad except"),
    ("trimig/engine/x.py", "try: pass\nexcept (OSError, BaseException): log()", "broad except"),
    ("trimig/engine/x.py", "try: pass\nexcept BaseException as e: raise X from e", "broad except"),
    ("trimig/engine/x.py", "try: pass\nexcept* Exception: pass", "broad except"),
    ("trimig/engine/x.py", "with contextlib.suppress(Exception): pass", "suppress of everything"),
]


@pytest.mark.parametrize(("path", "source", "message"), BAD)
def test_guard_catches_a_bad_file(path: str, source: str, message: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert message in found[0]


GOOD: Final = [
    ("trimig/engine/x.py", "from ..wire import Decoder\nfrom . import channel\nfrom trimig import errors"),
    ("trimig/__init__.py", "from .api import migrate as migrate\nfrom .guests import AppGuest as AppGuest"),
    ("trimig/cli/x.py", "import trimig\nfrom trimig.guests import ParkedGuest\nfrom ._show import _table"),
    ("trimig/channel/offload.py", "import trio\ntrio.to_thread.run_sync(f)"),
    ("trimig/channel/closing.py", "trio.move_on_after(1, shield=True)"),
    ("trimig/engine/source/__init__.py", "from . import shield\nshield.shield(nursery, 5)"),
    ("trimig/engine/source/__init__.py", "from .shield import shield\nshield(nursery, 5)\nassert scope.shield"),
    ("trimig/testing/determinism.py", "core._ALLOW_DETERMINISTIC_SCHEDULING = True"),
    ("trimig/engine/x.py", "try: pass\nexcept BaseException:\n    undo()\n    raise"),
    ("trimig/engine/x.py", "try: pass\nexcept Exception as exc: raise GuestFailed() from exc"),
    ("trimig/wire/x.py", '"""About time, trio and every shield."""\nimport struct'),
]


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_guard_lets_a_good_file_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


# -- attributes of other objects -----------------------------------------------------------------------------------------

#: Attributes of objects of Python, trio, ctypes and OpenSSL.
FOREIGN: Final = frozenset(
    {
        "__cause__", "args", "argtypes", "restype", "propagate", "deadline", "shield",
        "check_hostname", "minimum_version", "num_tickets", "options", "verify_flags", "verify_mode",
    }
)  # fmt: skip
#: (Where, names of the variable or attribute): the record that has the name there. Other objects write its attributes.
RECORDS: Final = {
    ("trimig/", ("counters", "c")): "trimig.monitor.statistics.Counters",
    ("trimig/engine/source/", ("out",)): "trimig.engine.source.outgoing.Outgoing",
    ("trimig/engine/destination/", ("into",)): "trimig.engine.destination.incoming.Incoming",
    ("trimig/engine/ram/xbzrle.py", ("figures", "f")): "trimig.engine.ram.xbzrle.XbzrleFigures",
    ("trimig/engine/ram/compress.py", ("figures",)): "trimig.engine.ram.compress.CompressionFigures",
    ("trimig/engine/ram/compress.py", ("piece",)): "trimig.engine.ram.compress._Piece",
    ("trimig/engine/ram/receiver.py", ("target",)): "trimig.engine.ram.placement.Target",
    ("trimig/wire/sections/ram.py", ("state",)): "trimig.wire.pages.state.PageState",
    ("trimig/wire/decoder.py", ("pages",)): "trimig.wire.pages.state.PageState",
    ("trimig/channel/lobby.py", ("visitor", "waiting")): "trimig.channel.lobby._Visitor",
    ("trimig/stream/export.py", ("copy",)): "trimig.stream.export._BlockCopy",
    ("trimig/stream/inspect.py", ("report",)): "trimig.stream.report.StreamReport",
    ("trimig/stream/inspect.py", ("device",)): "trimig.stream.report.DeviceInfo",
    ("trimig/stream/inspect.py", ("open", "counted")): "trimig.stream.report.SectionInfo",
    ("trimig/stream/inspect.py", ("blocks", "seen")): "trimig.stream.report.BlockInfo",
    ("trimig/cli/remote/dry_run.py", ("seen",)): "trimig.cli.remote.dry_run._Measurement",
}  # fmt: skip
#: Properties with a setter, which checks the value.
SETTERS: Final = frozenset({("guest", "uuid")})


def _made_here(function: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    """The variables of a class method that hold a new object of the class."""
    if not any(isinstance(d, ast.Name) and d.id == "classmethod" for d in function.decorator_list):
        return frozenset()
    return frozenset(
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "cls"
        for target in node.targets
        if isinstance(target, ast.Name)
    )  # fmt: skip


def _receiver(node: ast.expr) -> str:
    """The last name of an expression: ``out`` of ``self._out``, ``blocks`` of ``self.blocks[name]``."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.lstrip("_")
        case ast.Subscript(value=inner) | ast.Call(func=inner):
            return _receiver(inner)
    return ""


def foreign_writes(path: str, source: str) -> list[str]:
    """The lines that write an attribute of another object."""
    allowed = {name for (where, names), _ in RECORDS.items() if path.startswith(where) for name in names}
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    own = {id(inner): _made_here(function) for function in functions for inner in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store | ast.Del):
            continue
        receiver = _receiver(node.value)
        if isinstance(node.value, ast.Name) and node.value.id in {"self", "cls", *own.get(id(node), ())}:
            continue
        if node.attr in FOREIGN or (receiver, node.attr) in SETTERS:
            continue
        if receiver not in allowed:
            found.append(f"{node.lineno}: {ast.unparse(node)} belongs to another object")
    return found


@pytest.mark.parametrize("path", FILES)
def test_no_object_writes_the_attributes_of_another_one(path: str) -> None:
    assert foreign_writes(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("dotted", sorted(set(RECORDS.values())))
def test_record_exists(dotted: str) -> None:
    module, _, name = dotted.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


WRITES: Final = [
    ("trimig/x.py", "monitor.status = 1", True),
    ("trimig/x.py", "self.monitor.status = 1", True),
    ("trimig/x.py", "self.a, other.b = 1, 2", True),
    ("trimig/x.py", "other.count += 1", True),
    ("trimig/x.py", "del other.count", True),
    ("trimig/x.py", "others[0].count: int = 1", True),
    ("trimig/x.py", "for other.name in names: pass", True),
    ("trimig/channel/x.py", "into.prepared = True", True),
    ("trimig/x.py", "def f():\n    guest = cls()\n    guest._run_state = 'paused'", True),
    ("trimig/x.py", "self.count = 1", False),
    ("trimig/x.py", "monitor.counters.normal += 1", False),
    ("trimig/engine/destination/x.py", "self._into.prepared = True", False),
    ("trimig/x.py", "scope.deadline = 1", False),
    ("trimig/x.py", "guest.uuid = uuid", False),
    ("trimig/x.py", "@classmethod\ndef f(cls):\n    guest = cls()\n    guest._run_state = 'paused'", False),
]


@pytest.mark.parametrize(("path", "source", "bad"), WRITES)
def test_write_to_another_object_is_noticed(path: str, source: str, bad: bool) -> None:
    assert bool(foreign_writes(path, source)) is bad


# -- attributes that may be missing --------------------------------------------------------------------------------------

#: Functions that a C library may lack; what a subclass declares; the data of a type hint.
LOOKUPS: Final = frozenset({"trimig/guests/parked/newfile.py", "trimig/guests/device.py", "trimig/config/types.py"})


def lookups(source: str) -> list[str]:
    """The lines that ask for an attribute by a literal name, which may be missing."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id, len(node.args)) in {("hasattr", 2), ("getattr", 3)}
        and isinstance(node.args[1], ast.Constant)
    ]


@pytest.mark.parametrize("path", [path for path in FILES if path not in LOOKUPS])
def test_an_interface_is_asked_for_by_its_protocol(path: str) -> None:
    assert lookups((ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("hasattr(guest, 'uuid')", True),
        ("getattr(guest, 'uuid', None)", True),
        ("getattr(self, name)", False),
        ("getattr(module, name, None)", False),
        ("isinstance(guest, IdentifiedGuest)", False),
    ],
)
def test_such_a_lookup_is_noticed(source: str, bad: bool) -> None:
    assert bool(lookups(source)) is bad
