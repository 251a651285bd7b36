"""`fedgraft policy`: a policy to fill in, and what it would say to a job."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft import __version__, cli
from fedgraft.client.installed import installed_digest
from fedgraft.client.policy import TEMPLATE, Policy, load_policy
from fedgraft.client.resident import resident


@pytest.fixture
def fedgraft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``fedgraft(*arguments)``: the exit code, what was printed, and what was complained."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedgraft", "policy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def job(tiny_federation: Any, tmp_path: Path) -> Callable[..., Path]:
    """``job(**changes)``: the configuration of a private run, in a file."""

    def write(**changes: Any) -> Path:
        private = {"enabled": True, "unit": "patient", "epsilon": 2.0, "delta": 1e-5}
        path = tmp_path / "job.json"
        path.write_text(json.dumps(tiny_federation.values(**{"privacy": private, **changes})))
        return path

    return write


@pytest.fixture
def policy(tiny_federation: Any, tmp_path: Path) -> Path:
    """The template, filled in for the tiny federation."""
    fingerprint = resident(tiny_federation.config()).base.fingerprint
    path = tmp_path / "policy.toml"
    text = TEMPLATE.replace("base_models = []", f'base_models = ["{fingerprint}"]')
    path.write_text(text.replace('"discharge-letters.csv"', json.dumps(str(tiny_federation.table))))
    return path


def test_the_template_is_a_policy(fedgraft: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = fedgraft("template")
    assert (code, out, err) == (0, TEMPLATE, "")
    path = tmp_path / "policy.toml"
    path.write_text(out, encoding="utf-8")
    assert load_policy(path).require.dp


def test_a_valid_policy_is_summed_up(fedgraft: Callable[..., Any], policy: Path, tiny_federation: Any) -> None:
    code, out, err = fedgraft("check", policy)
    assert (code, err) == (0, "")
    assert f"{policy}: valid (SHA-256 {load_policy(policy).digest[:16]})" in out
    assert f"discharge-letters: {tiny_federation.table}; each patient, at least 200; epsilon 8 in all, 4 a year" in out
    assert "dp: required" in out


def test_what_a_summary_should_not_pass_over(fedgraft: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(TEMPLATE.replace("dp = true", "dp = false"))
    _, out, _ = fedgraft("check", path)
    assert "discharge-letters.csv (NOT THERE)" in out
    assert "base_models: NONE, so every job is refused" in out
    assert "dp: NOT required" in out


@pytest.mark.parametrize("text", ["", "[allow", TEMPLATE.replace("max_delta", "max_dleta")])
def test_a_broken_policy_is_one_line_and_exit_code_2(fedgraft: Callable[..., Any], tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    code, out, err = fedgraft("check", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"fedgraft: {path}: the policy is broken, so nothing leaves: ")


def test_a_job_that_the_policy_lets_pass_is_said_to_pass(
    fedgraft: Callable[..., Any], policy: Path, job: Callable[..., Path]
) -> None:
    path = job()
    for more in ((), ("--site", "south")):
        assert fedgraft("check", policy, "--job", path, *more) == (0, f"{path}: {policy} lets it train\n", "")


def test_everything_that_forbids_a_job_is_listed_by_line(
    fedgraft: Callable[..., Any], policy: Path, job: Callable[..., Path]
) -> None:
    policy.write_text(policy.read_text().replace('"*.lora_[AB].*"', '"*.lora_B.*"'))
    path = job(**{"privacy.epsilon": 9.0, "train.lr": 0.2})
    code, out, err = fedgraft("check", policy, "--job", path)
    assert code == 2
    assert err == f"fedgraft: {path}: {policy} forbids it in 2 places\n"
    numbers = [int(line.split(":")[1]) for line in out.splitlines()]
    texts = policy.read_text().splitlines()
    assert [texts[number - 1].split()[0] for number in numbers] == ["max_epsilon", "tensors"]


def test_what_a_strategy_freezes_need_not_be_allowed_to_leave(
    fedgraft: Callable[..., Any], policy: Path, job: Callable[..., Path]
) -> None:
    policy.write_text(policy.read_text().replace('"*.lora_[AB].*"', '"*.lora_B.*"'))
    assert fedgraft("check", policy, "--job", job(strategy="ffa"))[0] == 0
    assert fedgraft("check", policy, "--job", job(strategy="fedit"))[0] == 2


def test_a_site_that_is_not_in_the_job_is_one_line(
    fedgraft: Callable[..., Any], policy: Path, job: Callable[..., Path]
) -> None:
    path = job()
    code, _, err = fedgraft("check", policy, "--job", path, "--site", "west")
    assert (code, err) == (2, f"fedgraft: {path}: has no site `west`; there are east, north, south\n")


def test_the_lines_that_pin_what_is_installed_are_lines_of_a_policy(fedgraft: Callable[..., Any]) -> None:
    code, out, _ = fedgraft("code")
    assert code == 0
    text = TEMPLATE.replace('version = ""', out.splitlines()[0]).replace('sha256 = ""', out.splitlines()[1])
    pinned = Policy(text, "/srv/policy.toml").code
    assert (pinned.version, pinned.sha256) == (__version__, installed_digest())
