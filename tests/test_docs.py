"""What the documentation shows works as it is shown."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import fedgraft
from fedgraft.client.policy import TEMPLATE
from fedgraft.core.config import RunConfig, known_keys
from fedgraft.simulations.scenario import load_scenario, named, site_data
from fedgraft.strategies import strategies
from fedgraft.strategies.merging import mergers

ROOT = Path(__file__).parents[1]


def test_the_page_of_the_configuration_is_what_the_code_says():
    spec = importlib.util.spec_from_file_location("configuration_page", ROOT / "docs" / "configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == module.page(), "run `python docs/configuration.py`"
    assert all(f"| `{key}` |" in page for key in known_keys())


def test_every_strategy_and_merging_rule_has_its_place_in_the_documentation():
    built_in = [name for name, cls in strategies().items() if cls.__module__.startswith("fedgraft.")]
    for page, names in (("strategies.md", built_in), ("merging.md", list(mergers()))):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert [name for name in names if f"`{name}`" not in text] == []
        if page == "strategies.md":
            assert f" {len(built_in)} rules by name" in text


SCENARIOS = ROOT / "simulations" / "scenarios"


@pytest.mark.parametrize("name", [*named(), str(ROOT / "examples" / "own-data" / "run.toml")])
def test_every_scenario_loads_and_has_data_for_every_site(name):
    config = load_scenario(name)
    assert isinstance(config, RunConfig)
    assert config.privacy.enabled or "# Without privacy: " in (SCENARIOS / f"{name}.toml").read_text(encoding="utf-8")
    assert set(site_data(config)) == set(config.site_names)


def test_the_policy_that_is_explained_is_the_one_that_is_printed():
    page = (ROOT / "docs" / "site-policy.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert example == TEMPLATE
    (number,) = re.findall(r"line (\d+) \(max_epsilon = 8\)", page)
    assert TEMPLATE.splitlines()[int(number) - 1].startswith("max_epsilon = 8.0 ")


def test_the_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_version_is_one():
    assert f'version = "{fedgraft.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def _tests(path: Path) -> dict[str, str]:
    """The tests of a file as they are written, each with the marks of the whole file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    marks = [ast.unparse(n) for n in tree.body if isinstance(n, ast.Assign) and "pytestmark" in ast.unparse(n)]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: "\n".join([*marks, ast.unparse(node)]) for node in functions}


def test_every_attack_in_the_threat_model_is_tried_by_a_test_that_runs():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[1]) for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 30
    for *_, where, _ in rows:
        file, name = re.fullmatch(r" `(tests/[a-z_/]+\.py)::(test_\w+)` ", where).groups()
        tried = _tests(ROOT / file).get(name)
        assert tried is not None, where
        assert not re.search(r"skip|xfail", tried), where
