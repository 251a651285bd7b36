from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft import cli
from fedgraft.client.composing.commands import embed, route
from fedgraft.client.composing.embeddings import Profile
from fedgraft.client.policy import unrestricted
from fedgraft.client.resident import resident
from fedgraft.core.errors import UserError
from fedgraft.methods.arrow import read_set


@pytest.fixture
def site(tiny_federation: Any, tmp_path: Path) -> Path:
    """A site's folder, whose policy lets a job do what it likes with the table."""
    folder = tmp_path / "north"
    folder.mkdir()
    text = unrestricted().text.replace('"the scenario\'s"', json.dumps(str(tiny_federation.table)))
    (folder / "policy.toml").write_text(text, encoding="utf-8")
    return folder


def job(tiny_federation: Any, tmp_path: Path, **changes: Any) -> tuple[Any, Path]:
    values = tiny_federation.private(**{"privacy.epsilon": 3.0, **changes})
    path = tmp_path / "job.json"
    path.write_text(values.to_json(), encoding="utf-8")
    return values, path


def adapter(config: Any, folder: Path) -> Path:
    model = resident(config)
    return model.adapter.save_peft(folder, model.adapter.read())


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_embedding_is_paid_for_logged_and_laid_beside_the_adapter(
    tiny_federation: Any, tmp_path: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = job(tiny_federation, tmp_path)
    folder = adapter(config, tmp_path / "adapter")
    embed(path, folder, site, "north", texts=0, as_json=True)
    told = said(capsys)
    profile = Profile.load(folder, resident(config).base.fingerprint)
    assert profile.units == told["units"] > 100
    assert 2.8 < profile.epsilon <= 3.0
    (line,) = [json.loads(x) for x in (site / "audit.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (line["event"], line["kind"], line["epsilon"]) == ("released", "embedding", profile.epsilon)
    assert list((site / "ledgers").glob("*.jsonl"))
    with pytest.raises(UserError, match="epsilon"):
        embed(path, folder, site, "north")
    embed(path, folder, site, "north", ["privacy.epsilon=6"], as_json=True)
    assert 3.0 < said(capsys)["epsilon"] <= 6.0


def test_a_policy_that_requires_privacy_refuses_an_exact_embedding(
    tiny_federation: Any, tmp_path: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = job(tiny_federation, tmp_path)
    folder = adapter(config, tmp_path / "adapter")
    off = ["privacy.enabled=false"]
    embed(path, folder, site, "north", off)
    assert "NOT private" in capsys.readouterr().out
    exact = Profile.load(folder)
    assert (exact.noise, exact.epsilon) == (0.0, 0.0)
    assert np.linalg.norm(exact.mean) <= 1.0
    (folder / "embedding.json").unlink()
    policy = site / "policy.toml"
    policy.write_text(policy.read_text(encoding="utf-8").replace("dp = false", "dp = true"), encoding="utf-8")
    with pytest.raises(UserError, match="without differential privacy"):
        embed(path, folder, site, "north", off)
    policy.write_text(policy.read_text(encoding="utf-8").replace("max_epsilon = inf", "max_epsilon = 1.0"))
    with pytest.raises(UserError, match=r"privacy\.epsilon 3"):
        embed(path, folder, site, "north")
    assert not (folder / "embedding.json").exists()


def test_a_site_that_the_run_does_not_have_is_named(tiny_federation: Any, tmp_path: Path, site: Path) -> None:
    config, path = job(tiny_federation, tmp_path)
    folder = adapter(config, tmp_path / "adapter")
    with pytest.raises(UserError, match="has no site `west`; there are east, north, south"):
        embed(path, folder, site, "west")
    with pytest.raises(UserError, match=r"policy\.toml"):
        embed(path, folder, tmp_path / "nowhere", "north")


def test_adapters_are_kept_side_by_side(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config()
    folders = [adapter(config, tmp_path / name) for name in ("a", "b")]
    route(folders, tmp_path / "set", 2, 0.5)
    found, most, temperature = read_set(tmp_path / "set")
    assert (list(found), most, temperature) == (["a", "b"], 2, 0.5)
    with pytest.raises(UserError, match="two or more"):
        route(folders[:1], tmp_path / "set")
    with pytest.raises(UserError, match="two adapters are called a"):
        route([folders[0], adapter(config, tmp_path / "c" / "a")], tmp_path / "set")
    with pytest.raises(UserError, match="must be positive"):
        route(folders, tmp_path / "set", 2, 0.0)


def test_both_are_commands() -> None:
    names = {command.name for command in cli.app.registered_commands}
    assert {"embed", "route"} <= names
