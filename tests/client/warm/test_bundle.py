"""What an app bundle may hold: configuration, and nothing that could be run."""

from __future__ import annotations

import io
import zipfile

import pytest

from fedgraft.client.policy import TEMPLATE, Policy, PolicyError
from fedgraft.client.warm.bundle import bundle_hash, require_configuration
from fedgraft.core.errors import UserError

PLAIN = {"pyproject.toml": "[project]", ".info/CONTENT": "pyproject.toml,0,0", "README.md": "x", "job.toml": "seed = 1"}


def bundle(**more: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {**PLAIN, **{name.replace("__", "/"): text for name, text in more.items()}}.items():
            archive.writestr(name, text)
    return content.getvalue()


def policy(bundles: str = "[]") -> Policy:
    return Policy(TEMPLATE.replace("bundles = []", f"bundles = {bundles}"), "/srv/policy.toml")


def test_configuration_alone_passes() -> None:
    require_configuration(bundle(), policy())


@pytest.mark.parametrize(
    "name",
    [
        "client.py",
        "src__app.py",
        "lib.so",
        "x.pyc",
        "run.sh",
        "weights.pkl",
        "Makefile",
        "pyproject.toml.py",
        "a.TOML~",
    ],
)
def test_whatever_else_is_refused_and_named_with_the_line_that_forbids(name: str) -> None:
    content = bundle(**{name: "import os"})
    with pytest.raises(PolicyError) as refused:
        require_configuration(content, policy())
    text = str(refused.value)
    assert name.replace("__", "/") in text and bundle_hash(content) in text
    assert refused.value.rule.text.startswith("bundles = []") and f"line {refused.value.rule.line} " in text


def test_a_bundle_whose_hash_the_policy_lists_may_hold_code() -> None:
    content, other = bundle(**{"client.py": "x = 1"}), bundle(**{"client.py": "x = 2"})
    require_configuration(content, policy(f'["{bundle_hash(content)}"]'))
    with pytest.raises(PolicyError):
        require_configuration(other, policy(f'["{bundle_hash(content)}"]'))


@pytest.mark.parametrize("content", [b"", b"nonsense", bundle()[:-30], b"PK\x05\x06" + b"\xff" * 18])
def test_what_is_no_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match="the app bundle cannot be read"):
        require_configuration(content, policy())


def test_a_bundle_of_very_many_files_is_refused() -> None:
    with pytest.raises(UserError, match="holds 2004 files"):
        require_configuration(bundle(**{f"{number}.toml": "" for number in range(2000)}), policy())
