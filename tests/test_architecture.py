"""The rules that hold the source together: which way imports run, what no file may be called, what no file may do."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "core": 1,
    "methods": 2,
    "privacy": 2,
    "deployment": 2,
    "strategies": 3,
    "client": 4,
    "server": 4,
    "simulations": 5,
    "cli": 6,
    "pytest_plugin": 6,
    "__main__": 7,
}
NAMELESS = {"utils", "util", "helpers", "helper", "misc", "common"}
SERIALISERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MODEL_LIBRARIES = {"torch", "transformers", "peft", "opacus", "safetensors.torch"}


def sources() -> list[Path]:
    rooms = [name for name in FLOORS if (ROOT / name).is_dir()]
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [*files, *sorted(ROOT.glob("*.py"))]


def name_of(path: Path) -> tuple[str, ...]:
    """core/tasks/base.py -> ("core", "tasks", "base"); a package is named by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


@dataclass(frozen=True)
class Import:
    """One name that a file takes in: ``module`` as dotted parts, inside fedgraft (``own``) or outside."""

    own: bool
    module: tuple[str, ...]
    line: int


def imports(tree: ast.Module, path: Path) -> Iterator[Import]:
    package = name_of(path) if path.name == "__init__.py" else name_of(path)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(False, tuple(alias.name.split(".")), node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = tuple((node.module or "").split("."))
            for alias in node.names:
                yield Import(False, (*module, alias.name), node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)]
            module = (*base, *((node.module or "").split(".") if node.module else ()))
            for alias in node.names:
                yield Import(True, (*module, alias.name), node.lineno)


def faults(text: str, path: Path) -> list[str]:
    """What breaks a rule in the source ``text`` of ``path``."""
    tree = ast.parse(text)
    room = name_of(path)[0] if name_of(path) else ""
    found = []
    for entry in imports(tree, path):
        where, dotted = f"{path.relative_to(ROOT)}:{entry.line}", ".".join(entry.module)
        top = entry.module[0] if entry.module else ""
        if not entry.own:
            if top == "fedgraft":
                found.append(f"{where}: absolute import of {dotted}")
            if top in SERIALISERS:
                found.append(f"{where}: {dotted} runs code from what it reads")
            if room == "core" and top == "flwr" and path != ROOT / "core" / "wire.py":
                found.append(f"{where}: core knows Flower in wire.py alone")
            if room == "strategies" and (top in MODEL_LIBRARIES or ".".join(entry.module[:2]) in MODEL_LIBRARIES):
                found.append(f"{where}: strategies work on tensors, not on {top} modules")
        elif top not in FLOORS:
            if entry.module != ("__version__",):
                found.append(f"{where}: imports {dotted}, which stands on no floor")
        elif room not in FLOORS:
            found.append(f"{where}: the root package imports {dotted}")
        elif top != room and FLOORS[top] >= FLOORS[room]:
            found.append(f"{where}: {room} (floor {FLOORS[room]}) imports {dotted} (floor {FLOORS[top]})")
    for node in ast.walk(tree):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assert):
            found.append(f"{where}: an assert statement, which `python -O` leaves out")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.append(f"{where}: {ast.unparse(node)} uses pickle")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(f"{where}: allow_pickle")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_rules(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), path) == []
    assert path.stem not in NAMELESS, "a name that says what the file is about"


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("core/adapter.py", "from ..methods import attach"),
        ("core/adapter.py", "import flwr.app"),
        ("core/tasks/base.py", "from ...privacy.noise import RandomStream"),
        ("methods/lora.py", "from ..privacy import plan"),
        ("privacy/plan.py", "def f():\n    from ..strategies import create_aggregator"),
        ("strategies/averaging.py", "import torch"),
        ("strategies/averaging.py", "from torch import nn"),
        ("strategies/averaging.py", "from safetensors.torch import load_file"),
        ("client/app.py", "from ..server.files import write_text"),
        ("server/rounds.py", "from ..client import trainer"),
        ("server/report/page.py", "from ...simulations.run import simulate"),
        ("server/rounds.py", "from .. import cli"),
        ("server/rounds.py", "from ..nowhere import thing"),
        ("__init__.py", "from .core import adapter"),
        ("cli.py", "from fedgraft.core import adapter"),
        ("cli.py", "import pickle"),
        ("cli.py", "from joblib import load"),
        ("client/app.py", "import torch\ntorch.load('x')"),
        ("client/app.py", "import numpy\nnumpy.load('x', allow_pickle=True)"),
        ("client/app.py", "assert True"),
    ],
)
def test_a_breach_of_each_rule_is_seen(place: str, text: str) -> None:
    assert len(faults(text, ROOT / place)) == 1


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("core/wire.py", "from flwr.app import Array"),
        ("core/tasks/base.py", "from ..adapter import AdapterState"),
        ("server/rounds.py", "from .. import __version__"),
        ("simulations/run.py", "from ..client import app\nfrom ..server import app as other"),
        ("cli.py", "from .simulations.run import simulate"),
        ("__main__.py", "from .cli import main"),
    ],
)
def test_what_is_allowed_is_allowed(place: str, text: str) -> None:
    assert faults(text, ROOT / place) == []


def test_strategies_reach_no_model_library_through_others_either() -> None:
    files = {name_of(path): path for path in sources()}
    seen: set[tuple[str, ...]] = set()
    waiting = [name for name in files if name and name[0] == "strategies"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for entry in imports(ast.parse(files[name].read_text(encoding="utf-8")), files[name]):
            if entry.own:
                module = entry.module if entry.module in files else entry.module[:-1]
                waiting += [parent for end in range(1, len(module) + 1) if (parent := module[:end]) in files]
            else:
                outside = {entry.module[0], ".".join(entry.module[:2])}
                assert not outside & MODEL_LIBRARIES, f"{'.'.join(name)} imports {'.'.join(entry.module)}"
    assert ("core", "adapter") in seen


def test_every_package_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = [path.parent for path in sources() if path.name == "__init__.py"]
    here = {".".join(("fedgraft", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert here == set(settings["packages"])
    # A folder of modules without an __init__.py would be left out of the wheel without a word.
    assert {path.parent for path in sources()} == set(folders)
    for package, patterns in settings["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: no {pattern}"


def test_no_room_is_missing_from_the_floors() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "docs", "examples", "benchmarks"}
    assert rooms == {name for name in FLOORS if (ROOT / name).is_dir()}
