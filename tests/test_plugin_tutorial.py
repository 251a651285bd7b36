"""The tutorial docs/plugins.md, followed to the letter: its files, its package, its contract, its runs."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import fedgraft
from fedgraft import pytest_plugin
from fedgraft.core.errors import UserError
from fedgraft.server.checkpoints import load_last
from fedgraft.server.strategy_card import card
from fedgraft.server.strategy_package import write_package
from fedgraft.simulations import run as runs
from fedgraft.simulations.execution import Execution
from fedgraft.strategies import aggregator, create_aggregator, strategies
from fedgraft.strategies.contract import StrategyContract

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plugins.md"
NAMES = {"pyproject.toml", "and_mask.py", "test_and_mask.py", "anchored.py"}
CHECKS = sorted(name for name in vars(StrategyContract) if name.startswith("test_"))


def blocks() -> dict[str, str]:
    """The files of the tutorial, by the name behind the fence."""
    return dict(re.findall(r"```(?:python|toml) (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


def install(package: Path, target: Path) -> None:
    """As `pip install --no-deps` does, into a folder of the test's own and without a network."""
    pytest.importorskip("setuptools")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    done = subprocess.run([*pip, *options, str(package)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package of the tutorial, and the folder that it is installed into."""
    package, target = tmp_path_factory.mktemp("fedgraft-and-mask"), tmp_path_factory.mktemp("site-packages")
    for name, text in blocks().items():
        (package / name).write_text(text, encoding="utf-8")
    install(package, target)
    return package, target


@pytest.fixture
def installed(tutorial: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tutorial's package, installed as far as this process and its children can tell."""
    package, target = tutorial
    monkeypatch.setattr(aggregator, "_STRATEGIES", dict(aggregator._STRATEGIES))
    monkeypatch.delitem(sys.modules, "and_mask", raising=False)
    monkeypatch.syspath_prepend(target)
    monkeypatch.setenv("PYTHONPATH", str(target))
    return package


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False, env=dict(os.environ)
    )


def test_the_tutorial_holds_the_files_that_are_tested() -> None:
    assert set(blocks()) == NAMES
    code = [line for line in blocks()["and_mask.py"].splitlines() if line.strip()]
    assert len(code) < 25, "a plugin in twenty lines"
    fences = re.findall(r"^```\S.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == len(NAMES), "a block that no test runs"


def test_the_package_offers_its_strategy_by_name(installed: Path) -> None:
    rule = create_aggregator("and-mask", {"agree": 0.9})
    assert type(rule).__module__ == "and_mask" and rule.options.agree == 0.9
    assert "and-mask" in strategies()
    with pytest.raises(UserError, match="did you mean `agree`"):
        create_aggregator("and-mask", {"agre": 0.9})


def test_its_own_test_passes(installed: Path) -> None:
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_and_mask.py", cwd=installed)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 15  # type: ignore[index]


def test_the_contract_runs_without_a_test_file_too(installed: Path, tmp_path: Path) -> None:
    # By its module, since what an environment offers as entry points is as old as its installation.
    plugins = ["-p", "no:fedgraft-strategies", "-p", "fedgraft.pytest_plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--fedgraft-strategy"]
    done = run(*command, "and-mask", "--fedgraft-options", '{"agree": 1.0}', cwd=tmp_path)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("and-msak", "{}", "unknown strategy `and-msak`; did you mean `and-mask`?"),
        ("and-mask", '{"agre": 1}', "has no such option; did you mean `agree`?"),
        ("and-mask", "[1]", r"--fedgraft-options \[1\]: not an object"),
        ("and-mask", "{", "--fedgraft-options {: "),
    ],
)
def test_a_mistake_in_asking_for_a_contract_is_one_line(name: str, options: str, says: str, installed: Path) -> None:
    with pytest.raises(pytest.UsageError, match=says):
        pytest_plugin._classes([name], options)
    assert list(pytest_plugin._classes(["fedit", "and-mask"], "{}")) == ["Test[fedit]", "Test[and-mask]"]
    assert len(pytest_plugin._classes(["all"], "{}")) == len(strategies())


def test_the_plugin_of_pytest_is_offered() -> None:
    settings = tomllib.loads((PAGE.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    (offered,) = settings["project"]["entry-points"]["pytest11"].values()
    assert hasattr(importlib.import_module(offered), "pytest_addoption")


def test_it_is_shown(installed: Path) -> None:
    found = card("and-mask")
    assert found["options"] == [
        {
            "name": "agree",
            "kind": "number",
            "required": False,
            "default": 0.6,
            "description": "how far the signs must agree; 0: not at all, 1: all sites in one direction",
        }
    ]
    assert found["traffic"]["up"] == [1185800] * 3


def test_it_runs(installed: Path, tiny_federation: Any, tmp_path: Path) -> None:
    """With agreement of nobody it is FedIT; else numbers stay where the sites disagree."""
    adapters = {}
    for name, changes in {
        "fedit": {"strategy": "fedit"},
        "all": {"strategy": "and-mask", "strategy_options": {"agree": 0.0}},
        "some": {"strategy": "and-mask", "strategy_options": {"agree": 0.9}},
    }.items():
        result = tiny_federation.run(tiny_federation.config(rounds=2, **changes), tmp_path / name)
        assert result["status"] == "finished" and result["strategy"]["name"] == changes["strategy"]
        adapters[name] = load_last(tmp_path / name / "checkpoints").state
    assert adapters["all"] == adapters["fedit"]
    assert adapters["some"] != adapters["fedit"]


@pytest.mark.slow
def test_it_runs_on_flowers_engine_with_the_same_result(installed: Path, tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config(strategy="and-mask", rounds=2)
    digests = {}
    for engine in ("inprocess", "flower"):
        result = runs.simulate(config, tmp_path / engine, execution=Execution(engine))  # type: ignore[arg-type]
        assert (result["status"], result["engine"]) == ("finished", engine)
        digests[engine] = result["digest"]
    assert digests["inprocess"] == digests["flower"]


@pytest.fixture
def anchored(monkeypatch: pytest.MonkeyPatch) -> type[aggregator.Aggregator]:
    monkeypatch.setattr(aggregator, "_STRATEGIES", dict(aggregator._STRATEGIES))
    space: dict[str, Any] = {"__name__": "anchored"}
    exec(compile(blocks()["anchored.py"], "docs/plugins.md", "exec"), space)
    return space["Anchored"]


@pytest.mark.parametrize("check", CHECKS)
def test_the_second_example_keeps_the_contract(check: str, anchored: type[aggregator.Aggregator]) -> None:
    contract = type("Contract", (StrategyContract,), {"strategy": anchored, "tensor": staticmethod(torch.tensor)})()
    getattr(contract, check)()


def test_the_second_example_is_fedprox(
    anchored: type[aggregator.Aggregator], tiny_federation: Any, tmp_path: Path
) -> None:
    digests = []
    for strategy, options in (("anchored", {"pull": 0.3}), ("fedprox", {"mu": 0.3})):
        config = tiny_federation.config(strategy=strategy, strategy_options=options, rounds=2)
        digests.append(tiny_federation.run(config, tmp_path / strategy)["digest"])
    assert digests[0] == digests[1]


def test_a_package_from_the_template_is_installed_and_runs(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregator, "_STRATEGIES", dict(aggregator._STRATEGIES))
    target = tmp_path / "site-packages"
    install(write_package("my-mean", tmp_path), target)
    monkeypatch.syspath_prepend(target)
    adapters = {}
    for name, options in (("my-mean", {"power": 1.0}), ("fedit", {})):
        config = tiny_federation.config(strategy=name, strategy_options=options, rounds=1)
        tiny_federation.run(config, tmp_path / name)
        adapters[name] = load_last(tmp_path / name / "checkpoints").state
    assert adapters["my-mean"] == adapters["fedit"]


def test_the_decorator_is_at_hand_from_the_package_itself() -> None:
    assert fedgraft.strategy is aggregator.strategy
    with pytest.raises(AttributeError, match="has no attribute 'strategi'"):
        fedgraft.strategi  # noqa: B018
