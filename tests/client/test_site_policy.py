"""The policy through the ClientApp: a site refuses what its policy forbids, says which line, and writes it down."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedgraft.client import app as client_app
from fedgraft.client import budget, learning, trainer
from fedgraft.client.resident import resident
from fedgraft.core import records as core_records
from fedgraft.core.errors import UserError
from fedgraft.core.wire import NEEDS_STATE, decode_answer, encode_adapter
from fedgraft.privacy import Ledger, epsilon
from fedgraft.privacy.auditlog import audit_journal
from fedgraft.privacy.ledger import Limit

POLICY = """\
[[dataset]]
name = "letters"
path = {path}
patient_column = "patient"
min_unit = "patient"
min_units = 100
max_epsilon = 3.0       # agreed with the ethics board
max_epsilon_per_year = 2.5
max_delta = 1e-3

[allow]
base_models = ["{fingerprint}"]
methods = ["lora"]
strategies = ["fedit"]
engines = ["exact"]
tensors = ["*.lora_[AB].*", "*classifier*"]

[metrics]
evaluation = "noised"
training_loss = "none"
sizes = "exact"

[require]
dp = true
secret_noise = true
"""


@pytest.fixture
def fingerprint(tiny_federation: Any) -> str:
    return resident(tiny_federation.config()).base.fingerprint


@pytest.fixture
def policy(tiny_federation: Any, fingerprint: str) -> str:
    """The policy of a strict site."""
    return POLICY.replace("{path}", json.dumps(str(tiny_federation.table))).replace("{fingerprint}", fingerprint)


@pytest.fixture
def talk(tiny_federation: Any, tmp_path: Path, conversation: ModuleType, policy: str) -> Callable[..., Any]:
    """``talk(policy, node={...}, **changes)``: a conversation about a job that the policy lets pass, but for them."""

    def begin(text: str | None = policy, *, node: dict[str, Any] | None = None, **changes: Any) -> Any:
        settings = {"privacy.noise_multiplier": 3.0, "evaluate.release": "none", **changes}
        talk = conversation.Conversation(tiny_federation.private(**settings), tmp_path / "north", policy=text)
        talk.context.node_config.update(node or {})
        return talk

    return begin


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file of records that the site has opened."""
    opened: list[Path] = []
    rows = core_records._rows

    def noted(path: Path) -> Any:
        opened.append(path)
        return rows(path)

    monkeypatch.setattr(core_records, "_rows", noted)
    return opened


def line(text: str, beginning: str) -> int:
    (number,) = (n for n, found in enumerate(text.splitlines(), 1) if found.startswith(beginning))
    return number


def test_a_job_within_the_policy_is_done_and_everything_is_written_down(talk: Any, policy: str) -> None:
    site = talk()
    hello = site.hello()
    trained, content = site.train()
    counted = site.evaluate()
    assert [hello.error, trained.error, counted.error] == ["", "", ""]
    allowed, *left = site.log()
    assert (allowed["event"], allowed["dataset"], allowed["run"], allowed["site"]) == (
        "allowed",
        "letters",
        "r",
        "north",
    )
    assert allowed["policy"]["file"] == str(site.folder / "policy.toml")
    assert {entry["job"] for entry in (allowed, *left)} == {site.config.digest()}
    assert [(entry["event"], entry["kind"], entry["round"]) for entry in left] == [
        ("left", "hello", 1),
        ("left", "train", 1),
        ("left", "evaluate", 1),
    ]
    told = left[1]
    table = json.loads(str(content.config_records["table"]["json"]))
    assert told["tensors"] == dict(table["tensors"])
    assert told["metrics"] == dict(trained.metrics)
    assert (told["privacy"]["epsilon"], told["privacy"]["ledger"]) == (trained.privacy.epsilon, trained.privacy.ledger)
    assert told["bytes"] > 4 * sum(int(np.prod(shape)) for shape in told["tensors"].values())
    # The statement's ledger is the last line, and stays so while nothing is spent.
    (file,) = (site.folder / "ledgers").glob("*.jsonl")
    last = json.loads(file.read_text().splitlines()[-1])
    assert last["kind"] == "settle" and last["sha256"] == trained.privacy.ledger == counted.privacy.ledger
    assert trained.privacy.metrics == "none"
    assert Ledger(site.folder / "ledgers").entries()[0].dataset == "letters"
    audit_journal(site.folder / "audit.jsonl").entries()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "more epsilon": ({"privacy.epsilon": 3.5}, "max_epsilon ", "the job asks for privacy.epsilon 3.5"),
    "more delta": ({"privacy.delta": 2e-3}, "max_delta", "the job asks for privacy.delta 0.002"),
    "raw metrics": ({"evaluate.release": "exact_not_private"}, "evaluation", "counts that are exact_not_private"),
    "no privacy": ({"privacy.enabled": False}, "dp", "the job trains without differential privacy"),
    "another strategy": ({"strategy": "ffa"}, "strategies", "the job's strategy is ffa"),
    "another method": ({"method.name": "bitfit"}, "methods", "the job's method is bitfit"),
    "a smaller unit": ({"privacy.unit": "record"}, "min_unit ", "the job protects each record only"),
    "seeded noise": ({"privacy.seeded_noise_not_private": True}, "secret_noise", "the job's noise comes from its seed"),
    "another engine": ({"privacy.engine": "opacus"}, "engines", "the job asks for privacy.engine opacus"),
    "another patient column": ({"data.patient_column": "text"}, "patient_column", "takes the column `text`"),
    "another base model": ({}, "base_models", "the job's base model has the fingerprint "),
    "an unlisted tensor": ({}, "tensors", "the job's adapter would carry the tensor "),
    "too few patients": ({}, "min_units", "there are fewer to train on"),
}
#: Where it is the site that is stricter than the job.
STRICTER = {
    "another base model": ('base_models = ["', 'base_models = ["00'),
    "an unlisted tensor": ('"*.lora_[AB].*"', '"*.lora_B.*"'),
    "too few patients": ("min_units = 100", "min_units = 100000"),
}


#: All at the greeting; to a server that skips it, one of each kind.
_ASKED = [("hello", name) for name in REFUSED] + [
    (kind, name)
    for kind in ("train", "evaluate")
    for name in ("more epsilon", "an unlisted tensor", "too few patients")
]


@pytest.mark.parametrize(("kind", "name"), _ASKED)
def test_what_the_policy_forbids_is_refused_at_the_site_with_the_line(
    talk: Any, policy: str, read: list[Path], monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.setattr(trainer, "train", lambda *args, **more: pytest.fail("trained all the same"))
    changes, key, reason = REFUSED[name]
    text = policy.replace(*STRICTER.get(name, ("", "")))
    site = talk(text, **changes)
    answer = site.hello() if kind == "hello" else site.train()[0] if kind == "train" else site.evaluate()
    number = line(text, key)
    assert answer.error.startswith(f"the site's policy forbids it, line {number} ({key.strip()} = ")
    assert reason in answer.error
    for private in (str(site.folder), str(site.config.data.path), "ethics board"):
        assert private not in answer.error, "what stands at the site stays there"
    (refused,) = [entry for entry in site.log() if entry["event"] == "refused"]
    assert refused["rule"] == {
        "file": str(site.folder / "policy.toml"),
        "line": number,
        "text": text.splitlines()[number - 1].strip(),
    }
    assert (refused["run"], refused["job"], refused["kind"]) == ("r", site.config.digest(), kind)
    assert refused["why"] == answer.error
    # Before the data are read, where they need not be; before anything is spent in any case.
    assert (read == []) == (name != "too few patients")
    assert not (site.folder / "ledgers").exists()


def test_a_run_that_would_spend_more_than_a_years_budget_is_refused_before_it_begins(talk: Any, policy: str) -> None:
    site = talk(policy, **{"privacy.noise_multiplier": 0.0, "privacy.epsilon": 2.9})
    answer = site.hello()
    number = line(policy, "max_epsilon_per_year")
    assert "all runs of this year on these data would come to epsilon 2.8" in answer.error
    assert f"more than the site's policy allows, line {number} (max_epsilon_per_year = 2.5)" in answer.error
    assert site.log()[-1]["rule"]["line"] == number
    assert not (site.folder / "ledgers").exists()


def test_what_was_spent_in_earlier_years_leaves_this_years_budget_whole(
    talk: Any, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = policy.replace("max_epsilon_per_year = 2.5", "max_epsilon_per_year = 1.5")
    job = {"privacy.noise_multiplier": 0.0, "privacy.epsilon": 1.4, "rounds": 1}
    talk(tight, **job).train()
    # The job's epsilon is that of all runs ever: in the second year it asks for more than one year allows.
    more = {**job, "privacy.epsilon": 1.8}
    assert talk(tight, **more).train(run="same year")[0].error.endswith("or end here")
    later = Ledger.__init__

    def next_year(ledger: Ledger, *args: Any, **values: Any) -> None:
        later(ledger, *args, **{**values, "clock": lambda: datetime.now(UTC) + timedelta(days=366)})

    monkeypatch.setattr(Ledger, "__init__", next_year)
    answer = talk(tight, **{**more, "name": "next"}).train(run="next year")[0]
    assert (answer.error, answer.privacy.epsilon <= 1.8) == ("", True)


@pytest.mark.parametrize("kind", ["hello", "train"])
@pytest.mark.parametrize("key", ["max_epsilon", "max_epsilon_per_year"])
def test_what_all_runs_spend_together_stays_within_the_policy(
    talk: Any, policy: str, monkeypatch: pytest.MonkeyPatch, key: str, kind: str
) -> None:
    """Even a plan that has forgotten what was spent, for a job that promises more than it may."""
    job = {"rounds": 1, "privacy.noise_multiplier": 2.0, "privacy.epsilon": 2.4}
    first = talk(**job)
    assert first.train()[0].error == ""
    ledger = Ledger(first.folder / "ledgers")
    spent = ledger.events()
    once, twice = epsilon(spent, 1e-3), epsilon((*spent, *spent), 1e-3)
    least = f"{(once + twice) / 2:.4f}"
    text = policy.replace(f"{key} = {'3.0' if key == 'max_epsilon' else '2.5'}", f"{key} = {least}")
    second = talk(text, **{**job, "privacy.epsilon": float(least)})
    monkeypatch.setattr(Ledger, "spent", lambda *args: ())
    monkeypatch.setattr(budget, "own_limit", lambda config: Limit(100.0, 1e-3, "the job"))
    answer = second.hello(run="second") if kind == "hello" else second.train(run="second")[0]
    number = line(text, key + " ")
    assert f"more than the site's policy allows, line {number} ({key} = " in answer.error
    assert ledger.events() == spent
    refused = second.log()[-1]
    assert (refused["event"], refused["rule"]["line"]) == ("refused", number)
    # With room for it, it goes on.
    assert talk(policy, **job).train(run="third")[0].error == ""
    assert ledger.events() == (*spent, *spent)


# No policy


@pytest.mark.parametrize("kind", ["hello", "train", "evaluate"])
def test_without_a_policy_nothing_leaves(
    talk: Any, read: list[Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    site = talk(None)
    with caplog.at_level(logging.ERROR, "fedgraft.site"):
        answer = site.hello() if kind == "hello" else site.train()[0] if kind == "train" else site.evaluate()
    assert answer.error == (
        "the site has no policy, so nothing leaves; write one there: fedgraft policy template > policy.toml"
    )
    assert dict(answer.metrics) == {} and read == []
    place = site.folder / "policy.toml"
    assert (
        f"{place}: there is no policy, so nothing leaves; write one: fedgraft policy template > {place}" in caplog.text
    )
    (refused,) = site.log()
    assert (refused["event"], refused["kind"]) == ("refused", kind)
    assert str(place) in refused["why"]


@pytest.mark.parametrize("spoil", [("dp = true", "dp = yes"), ("max_delta", "max_dleta"), ("= 1e-3", '= "small"')])
def test_with_a_broken_policy_nothing_leaves(talk: Any, policy: str, read: list[Path], spoil: tuple[str, str]) -> None:
    site = talk(policy.replace(*spoil))
    for answer in (site.hello(), site.train()[0], site.evaluate()):
        assert answer.error == (
            "the site's policy (policy.toml) is broken, so nothing leaves; fedgraft policy check says where"
        )
    assert read == []
    assert [entry["event"] for entry in site.log()] == ["refused"] * 3
    assert all("the policy is broken" in entry["why"] for entry in site.log())


def test_a_policy_that_breaks_during_a_run_ends_it(talk: Any, policy: str) -> None:
    site = talk()
    assert site.train()[0].error == ""
    (site.folder / "policy.toml").write_text(policy.replace("dp = true", "dp = perhaps"))
    assert "is broken" in site.train(2)[0].error
    (site.folder / "policy.toml").write_text(policy)
    assert site.train(2)[0].error == ""


def test_a_policy_that_is_tightened_during_a_run_holds_at_once(talk: Any, policy: str) -> None:
    site = talk()
    assert site.train()[0].error == ""
    (site.folder / "policy.toml").write_text(policy.replace('methods = ["lora"]', 'methods = ["bitfit"]'))
    assert "the job's method is lora" in site.train(2)[0].error
    assert [entry["event"] for entry in site.log()] == ["allowed", "left", "refused"]


def test_a_policy_may_lie_elsewhere(talk: Any, policy: str, tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(policy.replace('methods = ["lora"]', 'methods = ["bitfit"]'))
    site = talk(node={"policy": str(tmp_path / "rules.toml")})
    assert "the job's method is lora" in site.hello().error
    assert site.log()[-1]["rule"]["file"] == str(tmp_path / "rules.toml")


# Which data


def test_a_job_reads_what_the_policy_names_and_nothing_else(
    talk: Any, read: list[Path], tiny_federation: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("text,label,patient\nsecret,class-yak,p\n")
    sites = [{"name": "north", "path": str(other)}, "south"]
    site = talk(**{"data.sites": sites, "data.path": str(other)})
    assert site.hello().error == ""
    assert read == [tiny_federation.table]


def test_a_node_configuration_that_names_other_data_than_the_policy_is_refused(
    talk: Any, policy: str, read: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "fedgraft.site"):
        answer = talk(node={"data-path": str(tmp_path / "other.csv")}).hello()
    assert answer.error == "its data cannot be used; the site's own log says why"
    assert "which the policy names; a job reads nothing else" in caplog.text
    assert read == []


def test_the_site_chooses_among_several_datasets(talk: Any, policy: str, tiny_federation: Any, tmp_path: Path) -> None:
    second = policy[: policy.index("[allow]")].replace("letters", "scans").replace("records.csv", "nowhere.csv")
    text = second + policy
    assert "no dataset is called" in talk(text).hello().error
    assert talk(text, node={"dataset": "letters"}).hello().error == ""
    assert talk(text, node={"dataset": "scans"}).hello().error == "its data cannot be used; the site's own log says why"
    assert "no dataset is called `other`" in talk(text, node={"dataset": "other"}).hello().error


# Seeded noise in the past


def test_seeded_noise_in_the_past_marks_every_later_statement(talk: Any, policy: str) -> None:
    lax = policy.replace("secret_noise = true", "secret_noise = false")
    site = talk(lax, **{"privacy.seeded_noise_not_private": True})
    assert site.train()[0].privacy.private_noise is False
    later = talk(lax)
    assert later.train(run="later")[0].privacy.private_noise is False
    # And keeps everything in where the policy asks for secret noise.
    strict = talk(policy)
    answer = strict.hello(run="last")
    assert "line 25 (secret_noise = true): noise on these data once came from a seed" in answer.error


# The gate, and the log


def _with(spoil: Callable[[RecordDict], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the answer of a training be changed on its way to the gate."""
    make = learning.encode_answer

    def spoilt(*args: Any, **more: Any) -> RecordDict:
        content = make(*args, **more)
        spoil(content)
        return content

    monkeypatch.setattr(learning, "encode_answer", spoilt)


def _not_finite(content: RecordDict) -> None:
    numbers = content.array_records["adapter"]["float32"].numpy().copy()
    numbers[0] = np.nan
    content["adapter"] = ArrayRecord({"float32": Array(numbers)})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content.update(records=ConfigRecord({"text": "jane doe"})), "undeclared record `records`"),
        (_not_finite, "NaN or infinity"),
        (lambda content: content.pop("privacy"), "the update carries no privacy statement"),
    ],
)
def test_a_defect_behind_the_gate_lets_nothing_out(
    talk: Any, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[RecordDict], None], reason: str
) -> None:
    site = talk()
    _with(spoil, monkeypatch)
    answer, content = site.train()
    assert reason in answer.error
    assert set(content) == {"site"}
    assert [entry["event"] for entry in site.log()] == ["allowed", "refused"]
    assert site.log()[-1]["why"] == answer.error
    # What was trained was spent, whether it left or not.
    assert len(Ledger(site.folder / "ledgers").events()) == 1


def test_what_cannot_be_written_down_does_not_leave(talk: Any) -> None:
    site = talk()
    assert site.hello().error == ""
    log = site.folder / "audit.jsonl"
    content = log.read_text()
    log.write_text(content.replace('"event": "left"', '"event": "lost"'))
    answer, sent = site.train()
    assert set(sent) == {"site"}
    assert answer.error.startswith(
        "audit.jsonl: line 2 was changed or lost; nothing leaves until somebody has seen to it"
    )
    log.unlink()
    log.mkdir()
    answer, sent = site.train()
    assert set(sent) == {"site"}
    assert answer.error == "audit.jsonl: the audit log cannot be written, so nothing leaves: Is a directory"
    log.rmdir()
    assert site.train()[0].error == ""


def test_an_instruction_that_makes_no_sense_is_in_the_log_too(talk: Any) -> None:
    site = talk()
    message = Message(RecordDict({"x": ConfigRecord({"run": "rm"})}), dst_node_id=2, message_type="train")
    answer = decode_answer(client_app.app(message, site.context).content, "train", "north")
    assert answer.error == "the server: undeclared record `x` in the message"
    (refused,) = site.log()
    assert (refused["event"], refused["site"], refused["why"]) == ("refused", "north", answer.error)


def test_a_request_for_the_whole_adapter_is_in_the_log_too(talk: Any) -> None:
    site = talk()
    held = site.state.digest
    nothing = encode_adapter(site.state.only([]), wire="fp32", whole=held, rest=held)
    answer, _ = site.train(content=nothing)
    assert answer.code == NEEDS_STATE
    assert site.log()[-1]["event"] == "refused" and "is not held here" in site.log()[-1]["why"]


def test_the_log_quotes_no_record(talk: Any, policy: str, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text,label,patient\na,jane doe's secret,p\n")
    text = "\n".join(
        f'path = "{tmp_path / "r.csv"}"' if each.startswith("path") else each for each in policy.splitlines()
    )
    site = talk(text)
    site.hello()
    assert site.log()[-1]["why"] == "PrivateError"
    assert "jane" not in (site.folder / "audit.jsonl").read_text()


def test_a_site_without_a_folder_refuses_and_has_nowhere_to_write_it(talk: Any) -> None:
    answer = talk(node={"site-folder": ""}).hello()
    assert answer.error.startswith('site north: give site-folder="FOLDER" in the node configuration')


def test_a_path_at_the_site_is_not_told_to_others(talk: Any) -> None:
    site = talk()
    (site.folder / "ledgers").write_text("a file where the folder should be")
    answer, _ = site.train()
    assert "ledger cannot be" in answer.error and str(site.folder) not in answer.error
    assert str(site.folder) in site.log()[-1]["why"]


def test_a_simulated_site_keeps_to_a_policy_that_lies_in_its_folder(
    tiny_federation: Any, tmp_path: Path, policy: str
) -> None:
    output = tmp_path / "run"
    (output / "sites" / "north").mkdir(parents=True)
    (output / "sites" / "north" / "policy.toml").write_text(policy)
    config = tiny_federation.private(**{"privacy.epsilon": 3.5, "privacy.noise_multiplier": 3.0})
    with pytest.raises(
        UserError, match=r"^site north: the site's policy forbids it, line 7 \(max_epsilon = 3\): the job"
    ):
        tiny_federation.run(config, output)
    logs = {site: (output / "sites" / site / "audit.jsonl").read_text() for site in ("east", "north")}
    assert "allows everything" in json.loads(logs["east"].splitlines()[0])["policy"]["file"]
    assert json.loads(logs["north"].splitlines()[-1])["rule"]["line"] == 7
    assert datetime.fromisoformat(json.loads(logs["north"].splitlines()[-1])["time"]) <= datetime.now(UTC)
