"""The hash of what is installed: every file of code counts, and nothing that is never installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import fedgraft
from fedgraft.client import policy
from fedgraft.client.installed import digest_of, installed_digest
from fedgraft.client.policy import TEMPLATE, Policy, PolicyError


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name in ("__init__.py", "cli.py", "core/__init__.py", "core/a.py", "core/words.txt", "tests/test_a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "core/a.py").write_text("evil()"),
        lambda root: (root / "core/new.py").write_text(""),
        lambda root: (root / "core/a.py").unlink(),
        lambda root: (root / "core/a.py").rename(root / "core/b.py"),
        lambda root: (root / "core/words.txt").write_text("other"),
        lambda root: (root / "cli.py").write_text("evil()"),
    ],
)
def test_every_change_of_the_code_changes_the_hash(package: Path, change: Callable[[Path], object]) -> None:
    before = digest_of(package)
    change(package)
    assert digest_of(package) != before


def test_what_is_never_installed_does_not_count(package: Path) -> None:
    before = digest_of(package)
    (package / "tests/test_a.py").write_text("other")
    (package / "core/__pycache__").mkdir()
    (package / "core/__pycache__/a.cpython-311.pyc").write_bytes(b"x")
    (package / "pyproject.toml").write_text("x")
    assert digest_of(package) == before


def test_this_installation_has_a_hash_that_stays() -> None:
    assert installed_digest() == installed_digest() and len(installed_digest()) == 64


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('version = "9.9"', "is installed at the site"),
        (f'sha256 = "{"ab" * 32}"', "installed at the site has the hash"),
    ],
)
def test_a_job_is_refused_where_the_policy_pins_another_installation(
    tiny_federation: object, line: str, why: str
) -> None:
    key = line.split(" ")[0]
    rules = Policy(TEMPLATE.replace(f'{key} = ""', line), "/srv/policy.toml")
    with pytest.raises(PolicyError, match=why) as refused:
        rules.admit(tiny_federation.config(), "", rules.datasets[0])  # type: ignore[attr-defined]
    assert refused.value.rule.text.startswith(line)


def test_a_job_is_let_in_where_the_policy_pins_this_installation(tiny_federation: object) -> None:
    pinned = TEMPLATE.replace('version = ""', f'version = "{fedgraft.__version__}"')
    rules = Policy(pinned.replace('sha256 = ""', f'sha256 = "{installed_digest()}"'), "/srv/policy.toml")
    found = rules.objections(tiny_federation.config(), "", rules.datasets[0])  # type: ignore[attr-defined]
    assert not [objection for objection in found if objection.rule.shown.startswith(("version", "sha256"))]


def test_the_hash_of_a_pin_is_one() -> None:
    with pytest.raises(policy.NoPolicyError, match="sha256"):
        Policy(TEMPLATE.replace('sha256 = ""', 'sha256 = "abc"'), "/srv/policy.toml")
