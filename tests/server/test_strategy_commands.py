"""`fedgraft strategies`: the list, what is shown of one, and the package that a new one begins from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from fedgraft import cli
from fedgraft.server.strategy_card import card, in_words, kind_of, options, row, works_with
from fedgraft.server.strategy_package import write_package
from fedgraft.strategies import Aggregator, Capabilities, Options, strategies
from fedgraft.strategies.aggregator import find_strategy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fedgraft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process, in an empty folder; its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedgraft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


# The list


def test_the_list_has_every_strategy_with_its_flags(fedgraft: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = fedgraft("strategies", "--json")
    rows = json.loads(out)
    assert code == 0 and [entry["name"] for entry in rows] == list(strategies())
    by_name = {entry["name"]: entry for entry in rows}
    for name, cls in strategies().items():
        assert set(by_name[name]) == {"name", "summary", "equation", "source", "capabilities", "options"}
        assert by_name[name]["capabilities"] == vars(cls.capabilities)
        assert [option["name"] for option in by_name[name]["options"]] == list(cls.Options.model_fields)
    table = fedgraft("strategies")[1]
    for name in by_name:
        assert name in table


def test_every_option_of_every_strategy_is_described() -> None:
    missing = [(name, o["name"]) for name, cls in strategies().items() for o in options(cls) if not o["description"]]
    assert missing == []


# One strategy


def test_a_strategy_is_shown_with_its_rule_its_options_and_its_bytes(
    fedgraft: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = fedgraft("strategies", "show", "ffa")
    assert (code, err) == (0, "")
    for text in ("arXiv 2403.12313", "orthonormal | random", "secure sum", "596 kB", "1.19 MB", "438 MB", "round 3"):
        assert text in out, text
    found = json.loads(fedgraft("strategies", "show", "ffa", "--rank", 4, "--labels", 5, "--json")[1])
    factor, head = 24 * 4 * 768 * 4, (5 * 768 + 5) * 4
    assert found["traffic"]["up"] == [factor + head] * 3
    assert found["traffic"]["down"] == [2 * factor + head, factor + head, factor + head]
    assert found["traffic"]["method"] == "lora" and found["traffic"]["rank"] == 4


def test_a_users_model_and_method_are_counted(
    fedgraft: Callable[..., tuple[int, str, str]], tiny_model: Callable[..., str], lab: Any
) -> None:
    folder = tiny_model("gpt2")
    out = fedgraft("strategies", "show", "fedit", "--model", folder, "--method", "ia3", "--labels", 3, "--json")[1]
    spec = lab.attach("gpt2", "sequence-classification", "ia3").spec
    found = json.loads(out)["traffic"]
    assert found["adapter"] == spec.parameters and found["up"] == [4 * spec.parameters] * 3
    assert found["model"] == folder and found["rank"] is None


def test_a_strategy_that_needs_a_method_is_shown_with_it() -> None:
    assert card("fed-sb")["traffic"]["method"] == "lora-sb"
    refused = card("fed-sb", method="lora")["traffic"]
    assert "set method.name=lora-sb" in refused["refused"] and "up" not in refused


def test_options_that_a_count_needs_are_those_of_the_tests() -> None:
    found = card("fltrust")
    assert found["traffic"]["options"] == {"root": "site-01"} and found["traffic"]["up"]


def test_more_sites_make_a_stack_larger() -> None:
    few, many = (card("flora", rank=2, sites=sites)["traffic"]["down"][1] for sites in (2, 6))
    assert many - few == (6 - 2) * 24 * 2 * 2 * 768 * 4


def test_one_of_flowers_strategies_is_shown(fedgraft: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = fedgraft("strategies", "show", "flwr:FedAdam")
    assert (code, err) == (0, "")
    assert "flwr.serverapp.strategy.fedadam.FedAdam" in out and "beta_1" in out and "1.19 MB" in out
    needy = card("flwr:QFedAvg")["traffic"]
    assert needy["refused"] == "strategy_options.client_learning_rate is needed to count"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "fedti"], "fedgraft: unknown strategy `fedti`; did you mean `fedit`?\n"),
        (["show", "fedit", "--method", "loar"], "fedgraft: unknown method `loar`; did you mean `lora`?\n"),
        (["show", "fedit", "--model", "./nowhere"], "fedgraft: model ./nowhere: no such folder\n"),
        (["show", "fedit", "--rank", "0"], "fedgraft: Invalid value for '--rank'"),
        (["show"], "fedgraft: Missing argument 'NAME'"),
        (["shwo"], "fedgraft: No such command 'shwo'"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str, fedgraft: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = fedgraft("strategies", *arguments)
    assert (code, out) == (2, "") and err.startswith(says) and err.count("\n") == 1


def test_what_a_strategy_works_with_is_what_a_run_refuses() -> None:
    """One of each kind; the reasons are those of the composition."""
    expected = {
        "fedit": {"mixed ranks"},
        "fedex": {"secure sum", "central privacy", "mixed ranks", "server optimiser"},
        "flexlora": {"secure sum", "central privacy", "server optimiser"},
        "fedask": {"secure sum", "central privacy", "server optimiser"},
        "ditto": {"differential privacy at the sites", "mixed ranks"},
        "ifca": {"differential privacy at the sites", "secure sum", "central privacy", "mixed ranks"},
    }
    for name, refused in expected.items():
        found = works_with(name, find_strategy(name))
        assert {key for key, reason in found.items() if reason} == refused, name


def test_capabilities_are_said_in_words() -> None:
    plain, full = Capabilities(), Capabilities(**dict.fromkeys(vars(Capabilities()), True))
    assert in_words(vars(plain)) == ["the aggregated dW is not the mean dW"]
    assert len(in_words(vars(full))) == len(vars(full)), "a flag without words"


def test_options_are_described_by_field_or_docstring() -> None:
    class Mixed(Options):
        """``first``: one; ``second`` (of two): the other, of ``first``'s kind. ``third``: last."""

        first: int = 1
        second: float | None = None
        third: Literal["a", "b"] = "a"
        fourth: list[str] = Field(default=["x"], description="by itself")
        fifth: bool

    class Example(Aggregator):
        def add(self, update: Any) -> None: ...

        def result(self) -> Any: ...

    Example.Options = Mixed
    found = {entry["name"]: entry for entry in options(Example)}
    assert [found[name]["description"] for name in ("first", "second", "third", "fourth", "fifth")] == [
        "one",
        "the other, of ``first``'s kind",
        "last",
        "by itself",
        "",
    ]
    kinds = [entry["kind"] for entry in found.values()]
    assert kinds == ["whole number", "number or nothing", "a | b", "list of texts", "true or false"]
    assert found["fifth"]["required"] and not found["first"]["required"] and found["fourth"]["default"] == ["x"]
    assert json.dumps(row("example", Example))
    assert kind_of(dict[str, int]) == "section" and kind_of(tuple[int, ...]) == "list of whole numbers"


# A new one


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package("my-mean", tmp_path)


def test_a_new_strategy_is_a_package_with_its_test(package: Path) -> None:
    assert sorted(path.name for path in package.iterdir()) == [
        "README.md",
        "fedgraft_my_mean.py",
        "pyproject.toml",
        "test_fedgraft_my_mean.py",
    ]
    code = (package / "fedgraft_my_mean.py").read_text()
    assert len([line for line in code.splitlines() if line.strip()]) < 25
    assert "$" not in "".join(path.read_text() for path in package.iterdir())
    lint = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", package],
        capture_output=True,
        text=True,
        check=False,
    )
    assert lint.returncode == 0, lint.stdout


def test_it_passes_its_own_test_as_it_is(package: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


def test_nothing_is_written_over(package: Path, fedgraft: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (package / "fedgraft_my_mean.py").write_text("mine")
    code, out, err = fedgraft("strategies", "new", "my-mean")
    assert (code, out) == (2, "")
    assert err == "fedgraft: fedgraft-my-mean: is there already; choose another name or --folder\n"
    assert (package / "fedgraft_my_mean.py").read_text() == "mine"
    code, out, _ = fedgraft("strategies", "new", "other", "--folder", tmp_path)
    assert code == 0 and f"{tmp_path}/fedgraft-other" in out and "python -m pytest" in out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ffa", "there is a strategy `ffa` already"),
        ("My_Mean", "cannot be a strategy's name"),
        ("../up", "cannot be a strategy's name"),
        ("", "cannot be a strategy's name"),
        ("1st", "cannot be a strategy's name"),
        ("a--b", "cannot be a strategy's name"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(
    name: str, says: str, fedgraft: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = fedgraft("strategies", "new", name)
    assert code == 2 and says in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(fedgraft: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = fedgraft("strategies", "new", "mine", "--folder", "nowhere")
    assert code == 2 and err == "fedgraft: nowhere: no such folder; make it, or choose another --folder\n"
