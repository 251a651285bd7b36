"""`fedgraft methods`: the list, one of them, and the masks of the sparse ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedgraft.core.errors import UserError
from fedgraft.methods import create_method, methods, pruning
from fedgraft.methods.importance import load_kept, load_mask
from fedgraft.server.method_card import count, count_of, options
from fedgraft.server.method_commands import app, short, size_of
from fedgraft.server.traffic import skeleton


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_list_names_every_method_and_what_privacy_does_to_it() -> None:
    rows = json.loads(said("--json"))
    assert [row["name"] for row in rows] == [method.name for method in methods()]
    assert {"name", "kind", "equation", "federates", "privacy", "dp", "merges", "refused"} <= set(rows[0])
    table = said()
    assert all(method.name in table for method in methods())


def test_with_a_model_the_list_counts_what_trains_there(tiny_model: Any) -> None:
    rows = {row["name"]: row["count"] for row in json.loads(said("--json", "--model", tiny_model("gpt2")))}
    # A (4 default 8, 32) and B (96, 8) on c_attn in two layers.
    assert rows["lora"] == {"adapter": 2 * 8 * (32 + 96), "head": 2 * 32, "frozen": 0}
    assert rows["lora-sb"] == {"adapter": 2 * 8 * 8, "head": 2 * 32, "frozen": 2 * 8 * (32 + 96)}
    assert "choose prefix" in rows["prompt"]["refused"]


def test_the_list_can_be_of_one_kind() -> None:
    rows = json.loads(said("--json", "--kind", "prompt"))
    assert {row["kind"] for row in rows} == {"prompt"} and {"prefix", "prompt"} <= {row["name"] for row in rows}
    with pytest.raises(UserError, match="no method is of the kind `nothing`; there are adapter, "):
        said("--kind", "nothing")


def test_one_method_is_shown_with_its_equation_options_and_count() -> None:
    text = said("show", "houlsby")
    for part in ("h <- h + U act(D h + b) + c", "2,379,264 numbers", "arXiv 1902.00751", "width", "stays beside"):
        assert part in text
    found = json.loads(said("show", "lora", "--rank", "4", "--json"))
    assert found["count"]["adapter"] == 12 * 2 * 4 * 2 * 768
    assert found["accepts"][:2] == ["rank", "alpha"]


def test_a_method_that_is_refused_has_a_reason_and_nothing_to_set() -> None:
    text = said("show", "warp")
    assert "cannot be trained: its classes are words for a mask" in text
    assert "merges" not in text and "takes" not in text


def test_a_name_that_is_none_is_one_line() -> None:
    with pytest.raises(UserError, match="unknown method `lorra`; did you mean `lora`"):
        said("show", "lorra")


def test_a_model_that_does_not_fit_is_said(tiny_model: Any) -> None:
    assert "has no biases" in " ".join(said("show", "bitfit", "--model", tiny_model("t5")).split())


def test_a_mask_is_made_of_a_file_that_everyone_may_see(tiny_federation: Any, tmp_path: Path) -> None:
    job, public = tmp_path / "job.toml", tmp_path / "public.csv"
    lines = Path(tiny_federation.table).read_text().splitlines()
    public.write_text("\n".join(lines[:9]) + "\n")
    config = tiny_federation.config()
    labels = ", ".join(json.dumps(label) for label in config.task.labels)
    job.write_text(
        f'model = "{tiny_federation.model}"\n[task]\nname = "{config.task.name}"\nlabels = [{labels}]\n'
        f'[data]\npath = "{tiny_federation.table}"\nsites = ["a", "b"]\n'
    )
    output = tmp_path / "mask.safetensors"
    text = said("mask", "fish", str(job), "--data", str(public), "--keep", "0.01", "-o", str(output))
    mask = load_mask(str(output))
    total = sum(len(places) for places in mask.values())
    linears = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert total == round(0.01 * linears)
    assert f"{total:,} weights in {len(mask)} layers, chosen by 8 records" in text
    with pytest.raises(UserError, match="set it above 0"):
        said("mask", "fish", str(job), "--data", str(public), "--keep", "0", "-o", str(output))
    with pytest.raises(UserError, match="method lora takes no mask; choose fish"):
        said("mask", "lora", str(job), "--data", str(public), "-o", str(output))


def test_heads_and_channels_that_stay_are_chosen_by_the_same_command(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "_STEPS", 20)
    job, public, config = tmp_path / "job.toml", tmp_path / "public.csv", tiny_federation.config()
    public.write_text("\n".join(Path(tiny_federation.table).read_text().splitlines()[:9]) + "\n")
    labels = ", ".join(json.dumps(label) for label in config.task.labels)
    job.write_text(
        f'model = "{tiny_federation.model}"\n[task]\nname = "{config.task.name}"\nlabels = [{labels}]\n'
        f'[data]\npath = "{tiny_federation.table}"\nsites = ["a", "b"]\n'
    )
    output = tmp_path / "mask.safetensors"
    text = said("mask", "lora-prune", str(job), "--data", str(public), "-o", str(output))
    # Half of 32 rows in four layers of an attention, and of 64 channels in two, in each of two transformer layers.
    assert {len(rows) for rows in load_kept(str(output)).values()} == {16, 32}
    assert "256 rows and columns that stay in 12 layers, chosen by 8 records" in text


def test_the_parts_of_a_count_are_told_apart() -> None:
    found = count(create_method("lora-sb"), skeleton(""), rank=4, alpha=8.0)
    assert (found.adapter, found.frozen, found.head) == (24 * 16, 24 * 8 * 768, 2 * 768 + 2)
    assert found.trained == found.adapter + found.head and found.shared == 4 * found.trained
    assert found.linear and found.once == 4 * found.frozen
    assert not count(create_method("lora"), skeleton("")).linear


def test_every_option_says_what_it_is() -> None:
    for method in methods():
        for option in options(method):
            assert option["description"], f"{method.name}: {option['name']}"


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1000, "1 k"), (2_379_264, "2.38 M")])
def test_numbers_are_short(number: int, text: str) -> None:
    assert short(number) == text
    assert size_of(number).split()[0] == text.split()[0]


def test_a_description_is_counted_by_what_becomes_of_its_tensors(lab: Any) -> None:
    spec = lab.attach("bert", "sequence-classification", "ravan").spec
    found = count_of(spec)
    assert found.adapter + found.head + found.frozen == spec.parameters
