"""The tutorial docs/writing-a-method.md, followed to the letter: its files, its package, its contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedgraft import pytest_plugin
from fedgraft.core.config import MethodConfig
from fedgraft.core.errors import UserError
from fedgraft.methods import create_method, methods, registry
from fedgraft.server.method_card import card
from fedgraft.server.traffic import skeleton

PAGE = Path(__file__).resolve().parent.parent / "docs" / "writing-a-method.md"
NAMES = {"pyproject.toml", "red.py", "test_red.py"}


def blocks() -> dict[str, str]:
    """The files of the tutorial, by the name behind the fence."""
    return dict(re.findall(r"```(?:python|toml) (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package of the tutorial, and the folder that it is installed into."""
    pytest.importorskip("setuptools")
    package, target = tmp_path_factory.mktemp("fedgraft-red"), tmp_path_factory.mktemp("site-packages")
    for name, text in blocks().items():
        (package / name).write_text(text, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    done = subprocess.run([*pip, *options, str(package)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return package, target


@pytest.fixture
def installed(tutorial: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tutorial's package, installed as far as this process and its children can tell."""
    package, target = tutorial
    create_method("lora")
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.delitem(sys.modules, "red", raising=False)
    monkeypatch.syspath_prepend(target)
    monkeypatch.setenv("PYTHONPATH", str(target))
    return package


def test_the_tutorial_holds_the_files_that_are_tested() -> None:
    assert set(blocks()) == NAMES
    fences = re.findall(r"^```\S.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == len(NAMES), "a block that no test runs"


def test_the_package_offers_its_method_by_name(installed: Path, lab: Any) -> None:
    assert create_method("red").configure.__module__ == "red"
    assert "red" in [method.name for method in methods()]
    adapter = lab.attach("bert", "sequence-classification", "red")
    assert {tensor.role for tensor in adapter.spec.tensors} == {"scale", "shift", "head"}
    # Two layers of 32, each with a scale and a shift.
    assert sum(tensor.size for tensor in adapter.spec.tensors if tensor.role != "head") == 2 * 2 * 32
    with pytest.raises(UserError, match="unknown method `rde`; did you mean `red`"):
        create_method("rde")


def test_it_is_counted(installed: Path) -> None:
    assert card("red", skeleton(""))["count"]["adapter"] == 12 * 2 * 768


@pytest.mark.parametrize(
    "command", [("test_red.py",), pytest.param(("--fedgraft-method", "red"), marks=pytest.mark.slow)]
)
def test_its_contract_passes(command: tuple[str, ...], installed: Path) -> None:
    # By its module, since what an environment offers as entry points is as old as its installation.
    plugins = ["-p", "no:fedgraft-strategies", "-p", "fedgraft.pytest_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, *command],
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 80  # type: ignore[index]


def test_a_package_whose_method_is_none_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("broken = 3\n")
    folder = tmp_path / "broken-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[fedgraft.methods]\nbroken = broken:broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match="method `broken` of the package broken cannot be loaded: TypeError: broken:broken is not"
    ):
        create_method("broken")
    assert create_method("lora").options_of(MethodConfig()) is not None


@pytest.mark.parametrize(("name", "says"), [("lorra", "unknown method `lorra`; did you mean `lora`?")])
def test_a_mistake_in_asking_for_a_contract_is_one_line(name: str, says: str) -> None:
    with pytest.raises(pytest.UsageError, match=re.escape(says)):
        pytest_plugin._of_methods([name])
    assert list(pytest_plugin._of_methods(["lora", "houlsby"])) == ["Test[lora]", "Test[houlsby]"]
    assert len(pytest_plugin._of_methods(["all"])) == len([m for m in methods() if not m.refused])
