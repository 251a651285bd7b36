"""A round that is asked for again is answered with the very same bytes, and costs nobody anything."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as PackedRecordDict
from typer.testing import CliRunner

from fedgraft.cli import app
from fedgraft.client import app as client_app
from fedgraft.client import keptanswers
from fedgraft.core.adapter import AdapterState
from fedgraft.core.wire import encode_adapter
from fedgraft.privacy import Ledger

Talk = Callable[..., Any]


@pytest.fixture
def talk(tiny_federation: Any, tmp_path: Path, conversation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """A conversation with a site whose process has just been started."""

    given: list[AdapterState] = []

    def begin(**changes: Any) -> Any:
        monkeypatch.setattr(conversation, "app", client_app.make_client_app(client_app.DEPLOYED))
        config = tiny_federation.private(**{"evaluate.release": "noised", **changes})
        site = conversation.Conversation(config, tmp_path / "north")
        # The model of this process holds what was trained last; the server asks about the adapter that it asked about.
        site.state = (given or [site.state])[0]
        given.append(site.state)
        return site

    return begin


def _bytes(content: RecordDict) -> bytes:
    return recorddict_to_proto(content).SerializeToString(deterministic=True)


def _ledger(site: Any) -> list[bytes]:
    return [path.read_bytes() for path in sorted((site.folder / "ledgers").glob("*.jsonl"))]


def _parts(site: Any) -> list[str]:
    return [entry.part for entry in Ledger(site.folder / "ledgers").entries()]


def _moved(site: Any) -> RecordDict:
    """Another global adapter than the site's first."""
    state = AdapterState(site.state.spec, {name: array + np.float32(0.01) for name, array in site.state.items()})
    return encode_adapter(state, wire="fp32")


def test_a_training_that_is_asked_for_again_is_the_same_to_the_bit_and_unpaid(talk: Talk) -> None:
    site = talk()
    site.hello()
    first, sent = site.train()
    paid = _ledger(site)
    again, repeated = site.train()
    assert first.error == again.error == "" and _bytes(sent) == _bytes(repeated)
    assert _ledger(site) == paid and _parts(site) == ["train"]
    assert [entry.get("repeated") for entry in site.log()[-2:]] == [None, True]


def test_noised_counts_that_are_asked_for_again_are_the_same_and_unpaid(talk: Talk) -> None:
    site = talk()
    site.hello()
    first = site.evaluate()
    paid = _ledger(site)
    assert site.evaluate() == first and first.error == "" and first.metrics["correct"] % 1, "they are noised"
    assert _ledger(site) == paid and _parts(site) == ["held-out"]


def test_a_site_that_was_restarted_still_knows_its_answers(talk: Talk) -> None:
    first, sent = talk().train()
    site = talk()
    paid = _ledger(site)
    hello = site.hello()
    again, repeated = site.train()
    assert first.error == hello.error == again.error == "" and _bytes(sent) == _bytes(repeated)
    assert _ledger(site) == paid


def test_a_run_that_goes_on_has_room_for_all_rounds_but_those_that_were_paid(talk: Talk) -> None:
    """Asked for its last round again, a site whose budget is spent to the end does not refuse."""
    exhausting = {"rounds": 2, "evaluate.release": "none", "privacy.noise_multiplier": 0.78}
    site = talk(**exhausting)
    for number in (1, 2):
        assert site.train(number)[0].error == ""
    paid = _ledger(site)
    site = talk(**exhausting)
    assert site.hello(round=2).error == ""
    assert site.train(2)[0].error == "" and _ledger(site) == paid
    (site.folder / "answers").rename(site.folder / "lost")
    assert "epsilon" in site.hello(round=2).error, "it would have to pay"


@pytest.mark.parametrize("what", ["adapter", "run", "configuration", "data"])
def test_what_differs_is_trained_and_paid_anew(talk: Talk, tiny_federation: Any, tmp_path: Path, what: str) -> None:
    changes: dict[str, Any] = {"rounds": 6, "privacy.noise_multiplier": 4.0, "evaluate.release": "none"}
    table = tmp_path / "records.csv"
    table.write_bytes(tiny_federation.table.read_bytes())
    site = talk(**changes, **{"data.path": str(table)})
    _, sent = site.train()
    if what == "configuration":
        site = talk(**changes, **{"data.path": str(table), "train.lr": 0.05})
    if what == "data":
        table.write_text("\n".join(table.read_text().splitlines()[:-5]) + "\n")
        site = talk(**changes, **{"data.path": str(table)})
    content = _moved(site) if what == "adapter" else None
    again, other = site.train(content=content, **({"run": "s"} if what == "run" else {}))
    assert again.error == "" and _bytes(sent) != _bytes(other)
    assert _parts(site) == ["train", "train"] and "repeated" not in site.log()[-1]


def test_more_rounds_for_a_run_change_no_answer_that_was_given(talk: Talk) -> None:
    _, sent = talk(rounds=3, **{"privacy.noise_multiplier": 4.0, "evaluate.release": "none"}).train()
    site = talk(rounds=5, **{"privacy.noise_multiplier": 4.0, "evaluate.release": "none"})
    assert _bytes(site.train()[1]) == _bytes(sent) and _parts(site) == ["train"]


def test_what_is_left_of_a_run_has_the_noise_that_it_would_have_had(talk: Talk, tmp_path: Path) -> None:
    events = []
    for faulty in (False, True):
        site = talk()
        for number in (1, 2, 3):
            assert site.train(number)[0].error == ""
            if faulty:
                assert site.hello(round=number).error == "" and site.train(number)[0].error == ""
        events.append(Ledger(site.folder / "ledgers").events())
        site.folder.rename(tmp_path / f"faulty-{faulty}")
    assert events[0] == events[1] and len(events[0]) == 3


def test_counts_of_other_personal_tensors_are_paid_anew(talk: Talk) -> None:
    site = talk()
    head = {name for name in site.state if "classifier" in name}
    local = site.state.with_spec(site.state.spec.with_policy("local", lambda t: t.name in head))
    content = encode_adapter(local, wire="fp32")
    first = site.evaluate(1, content)
    assert site.train(1, content)[0].error == ""
    # The adapter of the server is the same; the site's own head is not.
    assert site.evaluate(1, content).metrics != first.metrics
    assert _parts(site) == ["held-out", "train", "held-out"]


def test_the_audit_log_of_a_repeated_answer_stands_its_check(talk: Talk) -> None:
    site = talk()
    for number in (1, 2, 1):
        assert site.train(number)[0].error == ""
    assert site.log()[-1]["repeated"] is True
    result = CliRunner().invoke(app, ["privacy", "ledger", "verify", str(site.folder)])
    assert result.exit_code == 0, result.output


def test_a_kept_answer_passes_the_gate_once_more(talk: Talk) -> None:
    site = talk()
    site.train()
    (path,) = (site.folder / "answers").glob("*/train-1")
    head, _, body = path.read_bytes().partition(b"\n")
    content = recorddict_from_proto(PackedRecordDict.FromString(body))
    content["metrics"]["loss"] = 0.5
    body = _bytes(content)
    path.write_bytes(json.dumps([*json.loads(head)[:2], hashlib.sha256(body).hexdigest()]).encode() + b"\n" + body)
    refused, content = site.train()
    assert refused.error == "the site's gate held its answer back: it tells a training loss, which no noise protects"
    assert set(content) == {"site"} and _parts(site) == ["train"]


def test_a_kept_answer_stays_where_the_policy_has_changed(talk: Talk) -> None:
    site = talk()
    site.train()
    policy = site.folder / "policy.toml"
    policy.write_text(policy.read_text().replace('tensors = ["*"]', 'tensors = ["*lora_A*"]'))
    refused, content = site.train()
    assert "tensors" in refused.error and set(content) == {"site"}


def test_a_damaged_answer_is_none(talk: Talk) -> None:
    site = talk(**{"privacy.noise_multiplier": 4.0, "evaluate.release": "none"})
    _, sent = site.train()
    (path,) = (site.folder / "answers").glob("*/train-1")
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    kept = path.read_bytes()
    for damaged in (kept[:-1], kept[:-1] + bytes([kept[-1] ^ 1]), b"", b"[]\n", b"{}", b"1\n"):
        path.write_bytes(damaged)
        answer, content = site.train()
        assert answer.error == "" and _bytes(content) != _bytes(sent)
    assert _parts(site) == ["train"] * 7


def test_what_cannot_be_kept_costs_nothing_and_does_not_leave(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    site = talk()
    with monkeypatch.context() as patch:
        patch.setattr(keptanswers.os, "posix_fallocate", full)
        refused, content = site.train()
    assert "train-1: cannot be written: No space left on device" in refused.error and set(content) == {"site"}
    assert _parts(site) == [], "it was found before anything was paid"
    with monkeypatch.context() as patch:
        patch.setattr(keptanswers, "write", full)
        refused, content = site.train()
    assert "does not leave" in refused.error and set(content) == {"site"}


def test_a_disk_without_room_is_found_before_anything_is_paid(talk: Talk) -> None:
    site, before = talk(), resource.getrlimit(resource.RLIMIT_FSIZE)
    site.hello()
    # No file can be longer than the logs need.
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, before[1]))
    try:
        refused, content = site.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "train-1: cannot be written: File too large; an answer that the site cannot keep" in refused.error
    assert set(content) == {"site"} and _parts(site) == [] and site.log()[-1]["event"] == "refused"
    assert site.train()[0].error == "" and _parts(site) == ["train"]


def test_only_the_last_rounds_of_the_last_runs_are_kept(talk: Talk) -> None:
    changes = {"rounds": 9, "privacy.noise_multiplier": 12.0, "evaluate.release": "none"}
    site = talk(**changes)
    for number in range(1, 5):
        assert site.train(number)[0].error == ""
    assert sorted(path.name for path in (site.folder / "answers").glob("*/*")) == ["train-3", "train-4"]
    for run in "abcd":
        assert site.train(1, run=run)[0].error == ""
    assert len(list((site.folder / "answers").iterdir())) == 4


def test_a_run_without_privacy_keeps_nothing(talk: Talk) -> None:
    site = talk(**{"privacy.enabled": False, "evaluate.release": "auto"})
    assert site.train()[0].error == "" and not (site.folder / "answers").exists()


def test_simulated_sites_keep_nothing(tiny_federation: Any, tmp_path: Path) -> None:
    tiny_federation.run(tiny_federation.private(rounds=1), tmp_path / "run")
    assert list(tmp_path.glob("run/sites/*/ledgers/*.jsonl")) and not list(tmp_path.rglob("answers"))
    assert client_app.DEPLOYED.keeps


def test_the_name_of_a_run_is_no_path(talk: Talk, tmp_path: Path) -> None:
    site = talk()
    assert site.train(run="../../evil")[0].error == ""
    assert not list(tmp_path.glob("**/*evil*")) and len(list((site.folder / "answers").glob("*/train-1"))) == 1
    assert json.loads((next((site.folder / "answers").glob("*/train-1"))).read_bytes().partition(b"\n")[0])
