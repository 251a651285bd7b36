"""A real site in a secure sum: its own key and roster, what it keeps, what it does not do for a server that lies."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict

from fedgraft.client.app import DEPLOYED, make_client_app
from fedgraft.client.securing import Identity, SecureSums
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.core.vector import flat
from fedgraft.core.wire import Job, decode_adapter, decode_masked, decode_secure, encode_adapter, encode_secure
from fedgraft.privacy.securesum import Roster, SecureServer, SecureSite, Terms
from fedgraft.privacy.securesum.messages import Advert, Agreement, Envelopes, Reveal
from fedgraft.privacy.securesum.site import Progress

SITES = ("east", "north", "south")


class Round:
    """A round of run ``r`` in which ``north`` is a real site; the other two are played with numbers of ones."""

    def __init__(self, conversation: Any, keys: dict[str, Ed25519PrivateKey], number: int = 1) -> None:
        self.site, self.number = conversation, number
        terms = Terms.of(conversation.config, "r", number)
        roster = Roster({name: key.public_key() for name, key in keys.items()})
        self.names = conversation.state.spec.select("share")
        length = sum(conversation.state.spec.by_name[name].size for name in self.names)
        self.server = SecureServer(terms, length)
        self.others = {name: SecureSite(terms, name, keys[name], roster) for name in SITES if name != "north"}
        self.ones = np.ones(length)

    def ask(self, kind: str, message: bytes | None = None) -> RecordDict:
        content = RecordDict({})
        if message is not None:
            content = encode_secure(message)
        if kind == "train":
            content = RecordDict({**content, **encode_adapter(self.site.state, wire="fp32")})
        return self.site.say(kind if kind == "train" else f"query.{kind}", self.number, content)

    def to_keys(self) -> Round:
        self.server.advert("north", Advert.decode(decode_secure(self.ask("keys"), "north"), "north"))
        for name, other in self.others.items():
            self.server.advert(name, other.advertise())
        return self

    def to_shares(self) -> Round:
        adverts = self.to_keys().server.adverts
        reply = decode_secure(self.ask("shares", adverts.encode()), "north")
        self.server.shared("north", Envelopes.decode(reply, "north"))
        for name, other in self.others.items():
            self.server.shared(name, other.share(adverts))
        self.envelopes = self.server.envelopes
        return self

    def train(self) -> RecordDict:
        return self.ask("train", self.envelopes["north"].encode())


def error(content: RecordDict) -> str:
    return str(content["site"]["error"])


@pytest.fixture
def keys() -> dict[str, Ed25519PrivateKey]:
    return {name: Ed25519PrivateKey.generate() for name in SITES}


def provisioned(folder: Path, keys: dict[str, Ed25519PrivateKey]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = keys["north"].private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    (folder / "signing.key").write_bytes(text)
    lines = [
        f'{name} = "{key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode()}"'
        for name, key in keys.items()
    ]
    (folder / "roster.toml").write_text("\n".join(["[sites]", *lines]), encoding="utf-8")


@pytest.fixture
def north(conversation: Any, tiny_federation: Any, tmp_path: Path, keys: dict[str, Ed25519PrivateKey]) -> Any:
    """``north(config)``: a real site with its key and roster."""

    def site(config: RunConfig | None = None, **more: Any) -> Any:
        provisioned(tmp_path / "north", keys)
        plain = tiny_federation.config(**{"secure_sum.enabled": True})
        return conversation.Conversation(config or plain, tmp_path / "north", **more)

    return site


def test_a_site_plays_its_part_and_the_sum_is_right(north: Any, keys: Any, tiny_federation: Any) -> None:
    one = Round(site := north(), keys).to_shares()
    content = one.train()
    assert error(content) == "" and set(content) == {"site", "metrics", "masked"}
    assert not (site.folder / "answers").exists(), "what was masked once is never sent a second time"
    one.server.masked("north", decode_masked(content, "north"))
    for name, other in one.others.items():
        # They must say the same of what they trained, which only a site knows: the real one keeps it.
        kept = Progress.decode(next((site.folder / "secure-sum").glob("[0-9a-f]*")).read_bytes(), "north")
        one.server.masked(name, other.mask(one.envelopes[name], one.ones, 10, b""))
        other.progress = Progress(**{**vars(other.progress), "about": kept.about})
    survivors = one.server.survivors
    reply = one.ask("agree", survivors.encode())
    one.server.agreed("north", Agreement.decode(decode_secure(reply, "north"), "north"))
    for name, other in one.others.items():
        one.server.agreed(name, other.agree(survivors))
    agreements = one.server.agreements
    reply = one.ask("reveal", agreements.encode())
    one.server.revealed("north", Reveal.decode(decode_secure(reply, "north"), "north"))
    for name, other in one.others.items():
        one.server.revealed(name, other.reveal(agreements))
    found = one.server.result()
    # What the same site sends in the open.
    twin = type(site)(tiny_federation.config(), site.folder)
    answer, plain = twin.train(content=encode_adapter(site.state, wire="fp32"))
    trained = decode_adapter(plain, site.state.spec, sender="north", names=one.names)
    own = flat(trained, one.names) - flat(site.state, one.names)
    weight = answer.metrics["records"]
    assert found.weight == weight + 20
    assert np.abs(found.mean - (weight * own + 20.0) / (weight + 20)).max() <= found.error
    kept = Progress.decode(next((site.folder / "secure-sum").glob("[0-9a-f]*")).read_bytes(), "north")
    assert kept.stage == "revealed" and not kept.seed and not kept.masking


def test_what_it_keeps_is_for_its_own_eyes_and_outlives_the_process(
    north: Any, keys: Any, conversation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Round(site := north(), keys).to_shares()
    (kept,) = (site.folder / "secure-sum").glob("[0-9a-f]*")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    monkeypatch.setattr(conversation, "app", make_client_app(DEPLOYED))
    assert error(one.train()) == ""
    monkeypatch.setattr(conversation, "app", make_client_app(DEPLOYED))
    # Once under these masks, also for a process that remembers nothing else.
    assert "asked out of turn" in error(one.train())


def test_it_tells_no_sizes_on_joining(north: Any) -> None:
    answer = north().hello()
    assert answer.error == "" and not answer.metrics and set(answer.facts) == {"spec", "fingerprint"}


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: (folder / "signing.key").unlink(), "its data cannot be used; the site's own log says why"),
        (lambda folder: (folder / "roster.toml").unlink(), "its data cannot be used; the site's own log says why"),
        (lambda folder: (folder / "roster.toml").write_text("[sites]\n"), "site east is not in this site's roster"),
    ],
)
def test_without_its_key_or_a_whole_roster_it_says_so_before_anything_is_trained(
    north: Any, spoil: Any, why: str
) -> None:
    site = north()
    spoil(site.folder)
    assert why in site.hello().error


def test_a_server_that_leaves_steps_out_gets_no_training_and_no_budget_is_spent(
    north: Any, keys: Any, tiny_federation: Any
) -> None:
    site = north(tiny_federation.private(**{"secure_sum.enabled": True}))
    one = Round(site, keys).to_keys()
    for message in (None, b"", Envelopes({}).encode(), Envelopes({"east": bytes(82), "south": bytes(82)}).encode()):
        assert error(one.ask("train", message)) != ""
    one = Round(site, keys).to_shares()
    short = Envelopes({"east": one.envelopes["north"].sealed["east"]})
    assert "2 sites share their keys" in error(one.ask("train", short.encode()))
    swapped = dict(zip(("east", "south"), reversed(one.envelopes["north"].sealed.values()), strict=True))
    assert "not what it sealed" in error(one.ask("train", Envelopes(swapped).encode()))
    assert not list(site.folder.glob("ledgers/*.jsonl")), "nothing was trained"
    assert error(one.train()) == ""
    assert len(list(site.folder.glob("ledgers/*.jsonl"))) == 1


def test_a_second_answer_in_the_open_is_not_given(north: Any, tiny_federation: Any) -> None:
    site = north(tiny_federation.config(**{"secure_sum.enabled": True, "strategy": "fedask"}))
    content = site.say("query.refine", 1, encode_adapter(site.state, wire="fp32"))
    assert "would be in the open" in error(content) and set(content) == {"site"}


@pytest.mark.parametrize("kind", ["keys", "shares", "agree", "reveal"])
def test_a_run_without_a_secure_sum_has_none_of_its_steps(north: Any, tiny_federation: Any, kind: str) -> None:
    site = north(tiny_federation.config())
    assert "the run has no secure sum" in error(site.say(f"query.{kind}", 1, encode_secure(b"")))


@pytest.mark.parametrize("kind", ["shares", "agree", "reveal"])
def test_bytes_that_are_no_message_are_refused(north: Any, keys: Any, kind: str) -> None:
    one = Round(north(), keys).to_keys()
    for message in (b"", b"\xff" * 40, None):
        said = error(one.ask(kind, message))
        assert said.startswith("the server: ") or "out of turn" in said


def test_an_old_round_is_refused_also_by_a_new_process(north: Any, keys: Any) -> None:
    site = north()
    Round(site, keys, 2).to_keys()
    assert "has gone on to round 2" in error(Round(site, keys, 1).ask("keys"))


def test_a_policy_that_demands_it_refuses_a_job_without_it(
    conversation: Any, tiny_federation: Any, tmp_path: Path
) -> None:
    text = conversation.open_policy(tiny_federation.table).replace(
        "honest = false", "honest = false\nsecure_sum = true"
    )
    site = conversation.Conversation(tiny_federation.config(), tmp_path / "north", policy=text)
    said = site.hello().error
    assert "secure_sum = true" in said and "sends each update in the open (secure_sum.enabled = false)" in said
    refused = [line for line in site.log() if line["event"] == "refused"]
    assert refused[-1]["rule"]["text"] == "secure_sum = true"


def test_the_audit_log_tells_each_step_and_no_weight(north: Any, keys: Any) -> None:
    one = Round(site := north(), keys).to_shares()
    one.train()
    lines = [line for line in site.log() if line["event"] == "left"]
    assert [line["kind"] for line in lines] == ["keys", "shares", "train"]
    entries = one.ones.size + 1
    assert lines[-1]["masked"] == {"entries": entries, "dtype": "uint64"}
    assert lines[-1]["metrics"] == {"steps": 3}
    text = json.dumps(lines)
    assert "records" not in text


def test_damage_to_what_it_keeps_stops_the_run_here(north: Any, keys: Any) -> None:
    one = Round(site := north(), keys).to_shares()
    (kept,) = (site.folder / "secure-sum").glob("[0-9a-f]*")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert "cut off" in error(one.train())


@pytest.mark.parametrize("folder", [True, False])
def test_of_two_processes_at_one_stage_the_first_alone_answers(
    tmp_path: Path, tiny_federation: Any, keys: Any, folder: bool
) -> None:
    # A server that asks both at once to sign, each for another set of survivors, would have two signatures.
    config = tiny_federation.config(**{"secure_sum.enabled": True})
    roster = Roster({name: key.public_key() for name, key in keys.items()})
    who, job = Identity(keys["north"], roster), Job("r", 1, "north", config.to_json(), "")
    sums, place = SecureSums(durable=True), tmp_path if folder else None
    first, second = (sums.open(job, config, "north", place, who) for _ in range(2))
    sums.answer("keys", first, RecordDict({}), place)
    with pytest.raises(UserError, match="has gone on with the secure sum in another process"):
        sums.answer("keys", second, RecordDict({}), place)
    third = sums.open(job, config, "north", place, who)
    assert third.progress == first.progress
    sums.answer("keys", third, RecordDict({}), place)
