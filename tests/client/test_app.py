"""The site's side of the conversation: what it answers, what it keeps, what it refuses and what it says of that."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedgraft.client import answering, trainer
from fedgraft.client import app as client_app
from fedgraft.client.app import make_client_app
from fedgraft.client.surroundings import Surroundings
from fedgraft.core.adapter import AdapterState
from fedgraft.core.update import PrivacyStatement
from fedgraft.core.wire import NEEDS_STATE, Job, decode_adapter, decode_answer, encode_adapter
from fedgraft.privacy import Event, Ledger, epsilon

_SPEC = importlib.util.spec_from_file_location("conversation", Path(__file__).parents[1] / "conversation.py")
assert _SPEC is not None and _SPEC.loader is not None
_CONVERSATION = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_CONVERSATION)
Conversation = _CONVERSATION.Conversation


@pytest.fixture
def plain(tiny_federation: Any, tmp_path: Path) -> Any:
    return Conversation(tiny_federation.config(), tmp_path / "north")


@pytest.fixture
def private(tiny_federation: Any, tmp_path: Path) -> Any:
    return Conversation(tiny_federation.private(**{"privacy.noise_multiplier": 2.0}), tmp_path / "north")


# A site of its own


def test_a_site_says_who_it_is_and_what_it_holds(plain: Any) -> None:
    answer = plain.hello()
    assert (answer.site, answer.round, answer.error, answer.privacy) == ("north", 1, "", None)
    assert answer.metrics["records"] + answer.metrics["held_out"] == 600
    assert answer.facts["fingerprint"] == plain.model.base.fingerprint
    assert answer.facts["spec"] == plain.state.spec.digest
    assert list(plain.context.state) == []
    assert not (plain.folder / "ledgers").exists(), "without privacy there is no budget to record"


def test_patients_are_counted_where_they_are_the_unit(private: Any, tiny_federation: Any) -> None:
    answer = private.hello()
    patients = {row["patient"] for row in tiny_federation.rows}
    assert 0.7 * len(patients) < answer.metrics["units"] < 0.9 * len(patients)
    assert answer.metrics["units"] < answer.metrics["records"]


def test_a_round_gives_back_the_trained_adapter(plain: Any) -> None:
    answer, content = plain.train()
    assert answer.error == ""
    assert set(answer.metrics) == {"records", "steps", "loss"}
    trained = decode_adapter(content, plain.state.spec, sender="north")
    assert (trained - plain.state).norm() > 0
    counted = plain.evaluate(content=encode_adapter(trained, wire="fp32"))
    assert set(counted.metrics) == {"examples", "correct", "loss_sum"}
    assert counted.metrics["examples"] == plain.hello().metrics["held_out"]


def test_a_private_round_reserves_its_budget_and_says_so(private: Any) -> None:
    for number in (1, 2):
        answer, _ = private.train(number)
        assert answer.error == ""
        assert set(answer.metrics) == {"records", "steps"}
        events = Ledger(private.folder / "ledgers").events()
        assert isinstance(answer.privacy, PrivacyStatement)
        assert answer.privacy.steps == sum(event.steps for event in events) == 3 * number
        assert answer.privacy.epsilon == epsilon(events, 1e-3)
        assert private.evaluate(number).privacy == answer.privacy
        assert private.hello(round=number + 1).privacy == answer.privacy
    entries = Ledger(private.folder / "ledgers").entries()
    assert [(entry.about["run"], entry.about["round"], entry.outcome) for entry in entries] == [
        ("r", 1, "released"),
        ("r", 2, "released"),
    ]


def test_the_budget_is_on_the_disk_before_the_first_step(private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def dies(*args: Any, **more: Any) -> None:
        seen.append(sum(event.steps for event in Ledger(private.folder / "ledgers").events()))
        raise KeyError("dies in its first step")

    monkeypatch.setattr(trainer, "train", dies)
    answer, _ = private.train()
    assert answer.error == "KeyError at the site; the site's own log says more"
    assert seen == [3]
    (entry,) = Ledger(private.folder / "ledgers").entries()
    # The step that broke off counts; those after it never ran.
    assert (entry.steps, entry.taken, entry.outcome) == (3, 1, "failed")


@pytest.mark.parametrize("durable", [True, False])
def test_ledger_and_audit_log_wait_for_the_disk_unless_the_site_s_own_machine_says_otherwise(
    private: Any, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    assert client_app.DEPLOYED.durable, "a real site is not asked"
    surroundings = dataclasses.replace(client_app.DEPLOYED, durable=durable, keeps=False)
    monkeypatch.setattr(_CONVERSATION, "app", make_client_app(surroundings))
    fsync, synced = os.fsync, []

    def noting(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", noting)
    answer, _ = private.train()
    assert answer.error == ""
    (ledger,) = (private.folder / "ledgers").glob("*.jsonl")
    lines = {path.name: len(path.read_bytes().splitlines()) for path in (ledger, private.folder / "audit.jsonl")}
    assert lines == {ledger.name: 2, "audit.jsonl": 2}
    assert {name: synced.count(name) for name in lines} == (lines if durable else dict.fromkeys(lines, 0))
    assert durable or not synced


def test_a_ledger_that_cannot_be_written_stops_the_training(private: Any) -> None:
    (private.folder / "ledgers").write_text("a file where the folder should be")
    answer, content = private.train()
    assert "the ledger cannot be" in answer.error
    assert "adapter" not in content


def test_a_damaged_ledger_stops_the_training(private: Any) -> None:
    private.train()
    (ledger,) = (private.folder / "ledgers").glob("*.jsonl")
    ledger.write_text(ledger.read_text().replace('"steps": 3', '"steps": 1') + ledger.read_text())
    answer, content = private.train(2)
    assert "was changed or lost; the budget spent is unknown, so nothing is trained" in answer.error
    assert "adapter" not in content


def test_evaluation_releases_nothing_where_it_shall_not(tiny_federation: Any, tmp_path: Path) -> None:
    talk = Conversation(tiny_federation.config(**{"evaluate.release": "none"}), tmp_path)
    assert talk.evaluate().metrics == {}


# What it holds


def test_what_it_holds_needs_not_be_sent_again(plain: Any) -> None:
    plain.evaluate()
    held = plain.state.digest
    nothing = encode_adapter(plain.state.only([]), wire="fp32", whole=held, rest=held)
    by_name, one = plain.train(content=nothing)
    whole, two = plain.train()
    assert by_name.error == whole.error == ""
    assert [one[key] for key in ("adapter", "table")] == [two[key] for key in ("adapter", "table")]


def test_a_part_is_put_on_top_of_what_it_holds(plain: Any) -> None:
    plain.evaluate()
    head = [name for name in plain.state if "classifier" in name]
    changed = AdapterState(plain.state.spec, {**plain.state, **{n: plain.state[n] + np.float32(0.5) for n in head}})
    part = encode_adapter(changed.only(head), wire="fp32", whole=changed.digest, rest=plain.state.digest)
    _, one = plain.train(content=part)
    _, two = plain.train(content=encode_adapter(changed, wire="fp32"))
    assert one["adapter"] == two["adapter"]


def test_without_what_it_should_hold_it_asks_for_it(plain: Any) -> None:
    held = plain.state.digest
    nothing = encode_adapter(plain.state.only([]), wire="fp32", whole=held, rest=held)
    answer, content = plain.train(content=nothing)
    assert answer.code == NEEDS_STATE
    assert answer.error == f"the adapter {held[:12]} that the instruction builds on is not held here"
    assert set(content) == {"site"}


def test_asking_spends_no_budget(private: Any) -> None:
    held = private.state.digest
    nothing = encode_adapter(private.state.only([]), wire="fp32", whole=held, rest=held)
    assert private.train(content=nothing)[0].code == NEEDS_STATE
    assert Ledger(private.folder / "ledgers").events() == ()


def test_another_process_of_the_site_goes_on_from_its_memory(plain: Any) -> None:
    """Flower keeps a site's memory, not its process: the decoded adapter of this one is gone in the next."""
    plain.evaluate()
    client = answering.SiteClient(
        Surroundings(client_app.own_name, client_app._own_folder, client_app._own_policy, client_app._own_data)
    )
    held = plain.state.digest
    nothing = encode_adapter(plain.state.only([]), wire="fp32", whole=held, rest=held)
    job = Job("r", 1, "north", plain.config.to_json(), plain.model.base.fingerprint).to_record()
    message = Message(RecordDict({"job": job, **nothing}), dst_node_id=2, message_type="train")
    answer = client.answer("train", message, plain.context).content
    assert decode_answer(answer, "train", "north").error == ""
    assert answer["adapter"] == plain.train()[1]["adapter"]


def test_personal_tensors_stay_and_are_used_again(plain: Any) -> None:
    head = {name for name in plain.state if "classifier" in name}
    local = plain.state.with_spec(plain.state.spec.with_policy("local", lambda t: t.name in head))
    message = encode_adapter(local, wire="fp32")
    sent: list[RecordDict] = []
    for number in (1, 2):
        answer, content = plain.train(number, content=message)
        assert answer.error == ""
        sent.append(content)
        names = {name for name, _ in json.loads(str(content.config_records["table"]["json"]))["tensors"]}
        assert names == set(plain.state) - head
        (kept,) = plain.folder.glob(f"memory/*/{number}/site-local.safetensors")
        own = AdapterState.load(kept)
        assert set(own) == head
        assert not np.array_equal(own[min(head)], plain.state[min(head)])
    # A round that is lost and asked for again begins where it began the first time.
    _, again = plain.train(2, content=message)
    assert sent[1]["adapter"] == again["adapter"]
    # Round 2 began from the head of round 1: from the first head it would have ended elsewhere.
    shutil.rmtree(plain.folder / "memory")
    _, again = plain.train(2, content=message)
    assert sent[1]["adapter"] != again["adapter"]
    counted = plain.evaluate(2, content=message)
    assert counted.error == ""


# What it refuses


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({"site": "south"}, "this is site north, the instruction is for south"),
        (
            {"fingerprint": "0" * 64},
            "site north holds another base model (fingerprint {own}, the run's is 000000000000); give every site the "
            "same files",
        ),
        ({"config": "{}"}, "the server's configuration: `model` is missing"),
        ({"config": "nonsense"}, "the server's configuration: Invalid JSON"),
    ],
)
def test_an_instruction_that_does_not_fit_is_refused_in_one_line(plain: Any, job: dict[str, str], reason: str) -> None:
    answer, content = plain.train(**job)
    assert answer.error.startswith(reason.format(own=plain.model.base.fingerprint[:12]))
    assert answer.error.isprintable()
    assert set(content) == {"site"}
    assert list(plain.context.state) == []


def test_an_undeclared_record_in_an_instruction_is_refused(plain: Any) -> None:
    content = encode_adapter(plain.state, wire="fp32")
    content["code"] = ConfigRecord({"run": "rm"})
    answer, _ = plain.train(content=content)
    assert answer.error == "the server: undeclared record `code` in the message"


def test_an_adapter_with_a_number_that_is_none_is_refused(plain: Any) -> None:
    content = encode_adapter(plain.state, wire="fp32")
    numbers = content.array_records["adapter"]["float32"].numpy().copy()
    numbers[0] = np.inf
    from flwr.app import Array, ArrayRecord

    content["adapter"] = ArrayRecord({"float32": Array(numbers)})
    # A state that no test before has sent, so that none is remembered.
    answer, _ = plain.train(content=_renamed(content, "f" * 64))
    assert "holds NaN or infinity" in answer.error


def _renamed(content: RecordDict, state: str) -> RecordDict:
    table = json.loads(str(content.config_records["table"]["json"]))
    content["table"] = ConfigRecord({"json": json.dumps({**table, "state": state})})
    return content


def test_a_site_of_another_rank_says_so_at_hello(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config(**{"data.sites": [{"name": "north", "rank": 2}, "south"]})
    talk = Conversation(config, tmp_path)
    assert talk.hello().facts["spec"] != talk.state.spec.digest
    answer, _ = talk.train()
    assert "rank 4 against rank 2; set method.rank alike everywhere" in answer.error


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (
            {"site": None},
            'the node configuration names no site: give site="NAME" or a partition-id below 3',
        ),
        ({"site": None, "partition-id": 3}, "the node configuration names no site"),
        ({"site": None, "partition-id": -1}, "the node configuration names no site"),
        ({"site": None, "partition-id": "one"}, "the node configuration names no site"),
        (
            {"site-folder": None},
            'site north: give site-folder="FOLDER" in the node configuration; the ledger lies there',
        ),
        ({"data-path": "/nowhere.csv"}, "its data cannot be used; the site's own log says why"),
    ],
)
def test_a_node_that_is_not_set_up_says_what_is_missing(
    tiny_federation: Any, tmp_path: Path, node: dict[str, Any], reason: str
) -> None:
    config = tiny_federation.private(**{"privacy.noise_multiplier": 2.0})
    answer = Conversation(config, tmp_path, **node).hello()
    assert answer.error.startswith(reason)


def test_a_site_is_named_by_its_place_in_the_list(tiny_federation: Any, tmp_path: Path) -> None:
    for number, name in enumerate(("east", "north", "south")):
        talk = Conversation(tiny_federation.config(), tmp_path, **{"site": None, "partition-id": number})
        assert talk.hello().site == name


def test_a_mistake_in_the_data_is_logged_at_the_site_and_not_sent(
    tiny_federation: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "r.csv").write_text("text,label,patient\na,jane doe's secret,p\n")
    talk = Conversation(tiny_federation.config(), tmp_path, **{"data-path": str(tmp_path / "r.csv")})
    with caplog.at_level(logging.ERROR, "fedgraft.site"):
        answer = talk.hello()
    assert answer.error == "its data cannot be used; the site's own log says why"
    assert "record 1 has the label `jane doe's secret`" in caplog.text


def test_records_without_patients_are_refused_where_the_patient_is_the_unit(
    tiny_federation: Any, tmp_path: Path
) -> None:
    (tmp_path / "r.csv").write_text("text,label\na,class-yak\nb,class-yak\n")
    config = tiny_federation.private()
    answer = Conversation(config, tmp_path, **{"data-path": str(tmp_path / "r.csv")}).hello()
    assert answer.error == "its data cannot be used; the site's own log says why"


def test_a_method_without_exact_gradients_is_refused_before_anything_is_spent(
    tiny_federation: Any, tmp_path: Path
) -> None:
    config = tiny_federation.private(
        **{"method.name": "dora", "privacy.engine": "opacus", "privacy.noise_multiplier": 2.0}
    )
    answer = Conversation(config, tmp_path).hello()
    assert "has no exact per-sample gradient" in answer.error
    assert not (tmp_path / "ledgers").exists()


def test_noise_that_cannot_keep_the_promise_is_refused_before_anything_is_spent(
    tiny_federation: Any, tmp_path: Path
) -> None:
    config = tiny_federation.private(**{"privacy.noise_multiplier": 0.3})
    answer = Conversation(config, tmp_path).hello()
    assert "more than privacy.epsilon 2; raise privacy.noise_multiplier" in answer.error
    assert not (tmp_path / "ledgers").exists()


# What a private round takes along


def test_noised_counts_are_paid_for_by_the_held_out_alone(tiny_federation: Any, tmp_path: Path) -> None:
    settings = {"evaluate.release": "noised", "evaluate.epsilon": 1.0, "privacy.epsilon": 2.0}
    talk = Conversation(tiny_federation.private(**settings), tmp_path / "north")
    assert talk.train()[0].error == ""
    assert talk.hello(round=2).error == ""
    trained = talk.hello(round=2).privacy
    counts = [talk.evaluate(number) for number in (0, 1, 2, 3)]
    assert all(0 <= each.metrics["correct"] <= each.metrics["examples"] for each in counts)
    assert len({(each.metrics["correct"], each.metrics["loss_sum"]) for each in counts}) == 4, (
        "every release has noise of its own"
    )
    ledger = Ledger(tmp_path / "north" / "ledgers")
    parts = {part: [e for e in ledger.entries() if e.part == part] for part in ("train", "held-out")}
    assert (len(parts["train"]), len(parts["held-out"])) == (1, 4)
    told = counts[-1].privacy
    assert trained is not None and told is not None and told.metrics == "noised" and told.steps == trained.steps == 3
    evaluated = epsilon(tuple(event for entry in parts["held-out"] for event in entry.events), 1e-3)
    assert 0.9 < evaluated <= 1.0
    # In parallel, not in sequence: nobody is both.
    assert told.epsilon == pytest.approx(max(trained.epsilon, evaluated), rel=1e-9)
    # A fifth was not planned for; the fourth again is no new one.
    assert talk.evaluate(3) == counts[-1]
    moved = AdapterState(talk.state.spec, {name: array + np.float32(0.01) for name, array in talk.state.items()})
    assert "evaluation: " in talk.evaluate(3, encode_adapter(moved, wire="fp32")).error


@pytest.mark.parametrize("sampler", ["cyclic", "poisson"])
def test_correlated_noise_goes_on_in_another_process(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    config = tiny_federation.private(**{"privacy.sampler": sampler, "privacy.bands": 4, "privacy.epsilon": 50.0})
    units = int(Conversation(config, tmp_path / "north").hello().metrics["units"])

    def another_process() -> Any:
        """Knows nothing but what lies in its folder."""
        monkeypatch.setattr(_CONVERSATION, "app", make_client_app(client_app.DEPLOYED))
        return Conversation(config, tmp_path / "north")

    told = []
    for number in (1, 2, 3):
        answer, _ = another_process().train(number)
        assert answer.error == ""
        assert answer.privacy is not None
        told.append(answer.privacy)
    (key,) = (tmp_path / "north" / "noise").iterdir()
    assert key.stat().st_mode & 0o077 == 0
    assert [each.steps for each in told] == [3, 6, 9]
    if sampler == "poisson":
        # Nine steps begin three blocks of four: the epsilon is that of three steps at four times the rate.
        event = Event(told[-1].noise_multiplier, 4 * 16 / units, 3)
        assert told[-1].epsilon == pytest.approx(epsilon((event,), 1e-3), rel=1e-6)
    key.unlink()
    answer, content = another_process().train(3)
    assert "the noise key of a run that has taken 9 steps is lost" in answer.error and "adapter" not in content


@pytest.mark.parametrize("begun", [{"sampler": "cyclic"}, {"sampler": "cyclic", "bands": 4}, {"bands": 4}], ids=str)
@pytest.mark.parametrize("changes", [{"train.batch_size": 32}, {"privacy.bands": 2}, {"seed": 4}], ids=str)
def test_a_run_whose_turns_change_on_the_way_goes_no_further(
    tiny_federation: Any, tmp_path: Path, begun: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Else a patient whose turn in an epoch was paid for and is over would have another in it, for nothing."""
    settings = {f"privacy.{key}": value for key, value in begun.items()}
    settings |= {"privacy.noise_multiplier": 2.0, "privacy.epsilon": 500.0, "train.local_steps": 1}
    talk = Conversation(tiny_federation.private(**settings), tmp_path / "north")
    assert talk.train(1)[0].error == ""
    ledger = Ledger(tmp_path / "north" / "ledgers")
    (paid,) = ledger.events()
    answer, content = talk.train(2, config=tiny_federation.private(**{**settings, **changes}).to_json())
    assert "run r was begun under other settings or data" in answer.error and set(content) == {"site"}
    assert ledger.events() == (paid,)
    # A run may become longer, and the turns of its epoch are paid for.
    assert talk.train(2, config=tiny_federation.private(**settings, rounds=9, name="x").to_json())[0].error == ""
    assert ledger.events() == (paid,)


def test_the_name_of_a_run_reaches_no_other_folder(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.private(**{"privacy.sampler": "cyclic", "privacy.bands": 2, "privacy.epsilon": 50.0})
    answer, _ = Conversation(config, tmp_path / "north").train(run="../../escaped")
    assert answer.error == ""
    assert len(list((tmp_path / "north" / "noise").iterdir())) == 1
    assert not list(tmp_path.glob("*escaped*"))


def test_a_bound_that_adapts_is_kept_from_round_to_round(tiny_federation: Any, tmp_path: Path) -> None:
    settings = {"privacy.clip_quantile": 0.5, "privacy.clip": 1e-3, "privacy.clip_rate": 1.0, "privacy.epsilon": 20.0}
    talk = Conversation(tiny_federation.private(**settings), tmp_path / "north")
    bounds = []
    for number in (1, 2):
        assert talk.train(number)[0].error == ""
        bounds.append(talk.context.state.config_records["clip"]["clip"])
    # All are above the first bound, so each of three steps multiplies it by exp(1/2) but for noise.
    assert bounds[0] > 2e-3
    assert bounds[1] > 1.5 * bounds[0]
    # Another run begins with its own.
    assert talk.train(1, run="other")[0].error == ""
    assert talk.context.state.config_records["clip"]["clip"] < bounds[1]
