"""`fedgraft scenarios`: what there is, what is in it, and what each site would get."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedgraft import cli
from fedgraft.core.errors import UserError
from fedgraft.simulations.preview.picture import draw
from fedgraft.simulations.preview.tally import Tally, tally
from fedgraft.simulations.scenario import named, scenario_path, site_data

Command = Callable[..., str]


@pytest.fixture
def fedgraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command and returns what it said; a user's mistake is its one line."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["fedgraft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return said.out if ended.value.code == 0 else said.err

    return run


@pytest.fixture
def scenario(tiny_federation: Any, tmp_path: Path) -> Path:
    path = tmp_path / "three.json"
    changes = {"data.alpha": 1.0, "data.sites": ["east", {"name": "north", "attack": "sign-flip"}, "south"]}
    noise = {"data.label_noise": {"kind": "symmetric", "rate": 0.1}, "data.shift": {"kind": "typos", "strength": 0.9}}
    path.write_text(json.dumps(tiny_federation.values(**changes, **noise)))
    return path


def test_every_scenario_is_listed_with_what_it_shows(fedgraft: Command) -> None:
    said = fedgraft("scenarios")
    rows = json.loads(fedgraft("scenarios", "--json"))
    assert [row["name"] for row in rows] == named()
    for row in rows:
        assert row["name"] in said
        assert len(row["about"]) > 30
        assert not row["about"].endswith(".")
    many = next(row for row in rows if row["name"] == "hospitals-many")
    assert (many["sites"], many["epsilon"]) == (1000, None)


def test_a_scenario_is_shown_as_it_is_written(fedgraft: Command) -> None:
    assert fedgraft("scenarios", "show", "digits-shift") == scenario_path("digits-shift").read_text(encoding="utf-8")
    assert "did you mean `digits-shift`?" in fedgraft("scenarios", "show", "digit-shift")


def test_a_preview_counts_what_a_run_would_train_on(fedgraft: Command, scenario: Path, tiny_federation: Any) -> None:
    from fedgraft.simulations.scenario import load_scenario

    config = load_scenario(str(scenario))
    found = json.loads(fedgraft("scenarios", "preview", scenario, "--json"))["sites"]
    for name, site in site_data(config).items():
        labels = np.bincount(site.train.labels, minlength=3).tolist()  # type: ignore[arg-type]
        assert list(found[name]["train"].values()) == labels
        assert list(found[name]["train"]) == list(config.task.labels)
        assert found[name]["held_out"] == len(site.held_out)
        assert found[name]["patients"] == len(set(site.train.patients or ()))
        assert "10 % wrong labels, symmetric" in found[name]["differs"]
        assert "typos +0." in found[name]["differs"]
    assert "attack sign-flip" in found["north"]["differs"]
    said = fedgraft("scenarios", "preview", scenario)
    total = sum(len(site.train) for site in site_data(config).values())
    assert f"3 sites, {total} training records" in said
    assert all(name in said for name in ("east", "north", "south", "class-zebra"))


def test_of_many_sites_the_largest_and_the_smallest_are_shown(fedgraft: Command, scenario: Path) -> None:
    said = fedgraft("scenarios", "preview", scenario, "--set", "data.sites=50", "--set", 'data.sizes={law="power"}')
    assert sum(line.strip().startswith("site-") for line in said.splitlines()) == 20
    assert "…" in said


def test_a_preview_fails_as_the_run_would(fedgraft: Command, scenario: Path) -> None:
    assert fedgraft("scenarios", "preview", scenario, "--set", "data.partition=idd") == (
        "fedgraft: data.partition `idd` is unknown; did you mean `iid`?\n"
    )
    assert "a picture ends in .png, .svg, .pdf" in fedgraft("scenarios", "preview", scenario, "--output", "x.txt")


def test_the_skew_is_the_distance_between_the_mixes() -> None:
    def skew(*counts: list[int]) -> float:
        table = np.array(counts)
        return Tally(("a", "b"), ("x", "y"), table, np.ones(2), None, ("", "")).skew

    assert skew([5, 5], [20, 20]) == 0
    assert skew([10, 0], [0, 10]) == 0.5
    assert skew([8, 2], [2, 8]) == pytest.approx(0.3)


@pytest.mark.parametrize("sites", [3, 60])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_picture_is_drawn_and_always_the_same(sites: int, kind: str, tiny_federation: Any, tmp_path: Path) -> None:
    found = tally(tiny_federation.config(**{"data.sites": sites, "data.sizes": {"law": "power", "exponent": 0.5}}))
    paths = [tmp_path / f"{number}.{kind}" for number in range(2)]
    for path in paths:
        draw(found, "records", path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    if kind == "png":
        colours = np.unique(np.asarray(Image.open(paths[0]).convert("RGB")).reshape(-1, 3), axis=0)
        blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)
        assert {blue, orange, green} <= set(map(tuple, colours.tolist()))
    else:
        text = paths[0].read_text()
        assert text.count("class-") >= 3 or "<use" in text


def test_a_picture_that_cannot_be_written_is_one_line(tiny_federation: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        draw(tally(tiny_federation.config()), "records", tmp_path / "nowhere" / "p.png")
