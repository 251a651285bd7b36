"""`fedgraft merge`: runs and PEFT folders in, one folder out that plain PEFT loads; every mistake is a line."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedgraft import cli
from fedgraft.client.composing.embeddings import Profile
from fedgraft.methods.peftfolder import CONFIG, WEIGHTS, read_folder

TASK = "sequence-classification"


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of a mistake."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.count("\n") == 1 and self.err.startswith("fedgraft: "), self.err
        return self.err.removeprefix("fedgraft: ").strip()

    @property
    def object(self) -> dict[str, Any]:
        assert self.code == 0, self
        return json.loads(self.out)


@pytest.fixture
def merge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Said]]:
    """Run `fedgraft merge` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    log = logging.getLogger("fedgraft.site")
    before = (log.propagate, list(log.handlers), logging.getLogger("flwr").level)

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedgraft", "merge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    yield run
    log.propagate, log.handlers[:] = before[:2]
    logging.getLogger("flwr").setLevel(before[2])


@pytest.fixture(scope="module")
def runs(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of other ranks on the same model: ``north``, and ``south`` with privacy."""
    folder = tmp_path_factory.mktemp("runs")
    north = tiny_federation.config(rounds=1, **{"train.local_steps": 20})
    south = tiny_federation.private(rounds=1, **{"method.rank": 2, "seed": 4, "train.local_steps": 8})
    tiny_federation.run(north, folder / "north")
    tiny_federation.run(south, folder / "south")
    return {name: folder / name for name in ("north", "south")}


@pytest.fixture(scope="module")
def few(tiny_federation: Any, tinyfederation: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine records with labels."""
    return tinyfederation.write_csv(tmp_path_factory.mktemp("few") / "few.csv", list(tiny_federation.rows[:9]))


@pytest.fixture
def folder(lab: Any, tmp_path: Path) -> Callable[..., Path]:
    """``folder(name, family="bert", labels=3, **lora)``: a PEFT folder with a shaken LoRA adapter."""

    def make(name: str, family: str = "bert", config: Any = None, **settings: Any) -> Path:
        base = lab.base(family, TASK)
        target = {"bert": ["query", "value"], "gpt2": ["c_attn"]}[family]
        config = config or peft.LoraConfig(**{"r": 2, "target_modules": target, **settings})
        config.task_type, config.modules_to_save = "SEQ_CLS", list(base.head)
        model = peft.get_peft_model(base.model, config)
        torch.manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        return tmp_path / name

    return make


def logits(lab: Any, family: str, folder: Path) -> torch.Tensor:
    """Of plain PEFT on the folder."""
    model = PeftModel.from_pretrained(lab.base(family, TASK).model, str(folder)).eval()
    batch = lab.batch(family, TASK, lab.records(family, TASK, (3, 9, 1, 6)))
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


# What comes out


def test_the_list_names_every_rule_and_option(merge: Callable[..., Said]) -> None:
    said = merge("--list")
    for word in ("uniform", "task-arithmetic", "knots", "density=0.2", "nothing", "lorahub"):
        assert word in said.out
    rows = {row["name"]: row for row in merge("--list", "--json").object}  # type: ignore[union-attr]
    assert rows["ties"]["options"]["density"]["default"] == 0.2 and rows["ties"]["needs"] == []
    assert rows["greedy"]["needs"] == ["score", "labels"]
    assert all("arXiv" in row["source"] and row["equation"] for row in rows.values())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_weighted_mean_is_exact_and_plain_peft_loads_it(
    family: str, merge: Callable[..., Said], folder: Callable[..., Path], lab: Any
) -> None:
    """Against a base model whose weights had the dense mean added by hand."""
    one, two = folder("one", family, r=2, lora_alpha=5), folder("two", family, r=3, use_rslora=True)
    result = merge("uniform", one, two, "--weights", "1,3", "--rank", 5, "--output", "both", "--json").object
    assert result["lost"] < 1e-6 and result["rank"] == 5
    assert [row["weight"] for row in result["adapters"]] == pytest.approx([0.25, 0.75])

    states = [read_folder(path).state for path in (one, two)]
    base = lab.base(family, TASK)
    modules = dict(base.model.named_modules())
    with torch.no_grad():
        for first in states[0].spec.pairs:
            second = next(pair for pair in states[1].spec.pairs if pair.a == first.a)
            dense = 0.25 * states[0].delta(first) + 0.75 * states[1].delta(second)
            layer = modules[first.a.removeprefix("base_model.model.").partition(".lora_A.")[0]]
            layer.weight += torch.tensor(dense.T if first.fan_in_fan_out else dense, dtype=torch.float32)
        for name in (name for name in states[0] if ".modules_to_save." in name):
            place, _, leaf = name.removeprefix("base_model.model.").partition(".modules_to_save.default.")
            value = 0.25 * states[0][name] + 0.75 * states[1][name]
            getattr(modules[place], leaf).copy_(torch.tensor(value))
    batch = lab.batch(family, TASK, lab.records(family, TASK, (3, 9, 1, 6)))
    with torch.no_grad():
        want = base.model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert float((logits(lab, family, Path("both")) - want).abs().max()) <= 1e-5


@pytest.mark.parametrize("rule", ["uniform", "ties", "dare", "knots", "mera", "task-arithmetic"])
def test_one_folder_merges_into_itself(
    rule: str, merge: Callable[..., Said], folder: Callable[..., Path], lab: Any
) -> None:
    one = folder("one", lora_alpha=5)
    merge(rule, one, "--output", "out")
    assert torch.equal(logits(lab, "bert", Path("out")), logits(lab, "bert", one))
    before, after = load_file(one / WEIGHTS), load_file(Path("out") / WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()


def test_runs_merge_by_their_names_and_a_resumed_run_could_start_from_the_result(
    merge: Callable[..., Said], runs: dict[str, Path], tiny_federation: Any, tmp_path: Path
) -> None:
    result = merge("uniform", runs["north"], runs["south"] / "adapter", "--output", "out", "--json").object
    assert [(row["name"], row["rank"]) for row in result["adapters"]] == [("north", 4), ("south", 2)]
    assert result["rank"] == 4 and 0 < result["lost"] < 1
    assert json.loads(Path("out/merge.json").read_text()) == result
    config = tiny_federation.config(rounds=1, start_from=str(tmp_path / "out"), **{"train.local_steps": 1})
    run = tiny_federation.run(config, tmp_path / "next")
    assert run["accuracy"]["before"] is not None


def test_it_says_what_was_lost(merge: Callable[..., Said], runs: dict[str, Path]) -> None:
    said = merge("uniform", runs["north"], runs["south"], "--output", "out")
    assert said.code == 0
    assert "out: 2 adapters as one of rank 4, losing " in said.out
    again = merge("uniform", runs["north"], runs["south"], "--output", "all", "--rank", 6)
    assert "as one of rank 6, exactly" in again.out


def test_explaining_is_a_table_and_a_picture(merge: Callable[..., Said], runs: dict[str, Path]) -> None:
    said = merge("ties", runs["north"], runs["south"], "--weights", "3,1", "--output", "out", "--explain")
    assert said.code == 0
    for word in ("north", "south", "0.750", "0.250", "with the elected sign", "sgn(sum p_k t_k)"):
        assert word in said.out
    picture = Path("out/explain.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 2000
    assert not Path("out/explain.png").samefile(Path("out/merge.json"))
    quiet = merge("ties", runs["north"], runs["south"], "--output", "quiet")
    assert "with the elected sign" not in quiet.out and not Path("quiet/explain.png").exists()


def test_noise_of_privacy_is_warned_of_where_a_run_says_it(merge: Callable[..., Said], runs: dict[str, Path]) -> None:
    assert "warning: rule `ties` keeps the largest" in merge("ties", runs["north"], runs["south"], "--output", "a").out
    assert "warning" not in merge("uniform", runs["north"], runs["south"], "--output", "b").out
    assert "warning" not in merge("ties", runs["north"], "--output", "c").out


def test_options_are_typed(merge: Callable[..., Said], runs: dict[str, Path]) -> None:
    both = (runs["north"], runs["south"])
    result = merge(
        "knots", *both, "--output", "out", "--option", "density=0.5", "--option", "basis=sv", "--json"
    ).object
    assert result["options"] == {"density": 0.5, "scale": 1.0, "trim": "adapter", "merge": "ties", "basis": "sv"}
    seeds = [
        merge("dare", *both, "--output", f"dare-{i}", "--seed", seed, "--json").object
        for i, seed in enumerate((1, 1, 2))
    ]
    weights = [(Path(row["output"]) / WEIGHTS).read_bytes() for row in seeds]
    assert weights[0] == weights[1] != weights[2]


# Records of one's own


def test_a_greedy_soup_takes_what_helps_on_ones_own_records(
    merge: Callable[..., Said], runs: dict[str, Path], few: Path
) -> None:
    result = merge("greedy", runs["north"], runs["south"], "--data", few, "--output", "out", "--json").object
    assert sum(row["weight"] for row in result["adapters"]) == pytest.approx(1.0)
    assert any("best alone" in row["reason"] for row in result["adapters"])
    assert result["notes"][0].startswith("score ")
    assert "a new release about them" in result["notes"][1]


def test_task_arithmetic_chooses_lambda_on_ones_own_records(
    merge: Callable[..., Said], runs: dict[str, Path], few: Path
) -> None:
    both = (runs["north"], runs["south"])
    scored = merge("task-arithmetic", *both, "--data", few, "--output", "a", "--json").object
    assert "the best of 0.1 to 1 by the score" in scored["notes"][0]
    assert "for want of records" in merge("task-arithmetic", *both, "--output", "b", "--json").object["notes"][0]


@pytest.mark.parametrize("rule", ["fisher", "regmean"])
def test_statistics_are_taken_of_ones_own_records(
    rule: str, merge: Callable[..., Said], runs: dict[str, Path], few: Path
) -> None:
    """Fisher wants one rank: twice the same run; the mean of one adapter with itself is that adapter."""
    other = shutil.copytree(runs["north"], Path("copy"))
    result = merge(rule, runs["north"], other, "--data", few, "--output", "out", "--json").object
    assert [row["weight"] for row in result["adapters"]] == pytest.approx([0.5, 0.5], rel=1e-6)
    one, out = (read_folder(path).state for path in (runs["north"], Path("out")))
    for pair in one.spec.pairs:
        np.testing.assert_allclose(out.delta(pair), one.delta(pair), atol=1e-6)


def test_adapters_are_picked_by_the_embeddings_that_they_came_with(
    merge: Callable[..., Said], runs: dict[str, Path], few: Path, tiny_federation: Any
) -> None:
    places = [shutil.copytree(runs[name], Path(name)) for name in ("north", "south")]
    fingerprint = json.loads((places[0] / "run.json").read_text())["model"]["fingerprint"]
    width = 32
    for place, direction in zip(places, (1.0, -1.0), strict=True):
        Profile(direction * np.ones(width) / np.sqrt(width), fingerprint, 100, 100.0).save(place / "adapter")
    said = merge("adaptersoup", *places, "--data", few, "--output", "out", "--option", "threshold=-1", "--json")
    cosines = [float(row["reason"].rsplit(" ", 1)[-1]) for row in said.object["adapters"]]
    assert cosines[0] == pytest.approx(-cosines[1], abs=1e-3)
    assert Path("out", WEIGHTS).is_file()
    with Path("texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["fever pain"], ["burn injury"]])
    said = merge(
        "adaptersoup", *places, "--data", "texts.csv", "--output", "bare", "--option", "threshold=-1", "--json"
    )
    assert len(said.object["adapters"]) == 2  # nobody need have labelled the texts
    assert "no column `label`" in merge("greedy", *places, "--data", "texts.csv", "--output", "no").line
    (places[1] / "adapter" / "embedding.json").unlink()
    assert "comes without an embedding" in merge("adaptersoup", *places, "--data", few, "--output", "no").line


def test_plain_folders_say_their_task_by_model_and_labels(
    merge: Callable[..., Said], folder: Callable[..., Path], few: Path, tiny_model: Any, tinyfederation: Any
) -> None:
    both = (folder("one"), folder("two"))
    want = ("--data", few, "--output", "out")
    assert "say its task: --config FILE, or --model NAME with --labels" in merge("greedy", *both, *want).line
    labels = ",".join(tinyfederation.LABELS)
    said = merge("greedy", *both, *want, "--model", tiny_model("bert"), "--labels", labels, "--json")
    assert said.object["notes"][0].startswith("score ")


def test_a_configuration_can_say_the_task(
    merge: Callable[..., Said], folder: Callable[..., Path], few: Path, tiny_federation: Any
) -> None:
    Path("task.json").write_text(json.dumps(tiny_federation.values()))
    both = (folder("one"), folder("two"))
    said = merge("greedy", *both, "--data", few, "--config", "task.json", "--output", "out", "--json")
    assert said.object["notes"][0].startswith("score ")


def test_records_with_another_label_are_refused(
    merge: Callable[..., Said], runs: dict[str, Path], tmp_path: Path
) -> None:
    with (tmp_path / "odd.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["fever", "class-unicorn"]])
    assert "class-unicorn" in merge("greedy", *runs.values(), "--data", "odd.csv", "--output", "out").line


# Heads, other types, other models


def test_heads_of_other_labels_are_kept_from_the_first_or_left_out(
    merge: Callable[..., Said], runs: dict[str, Path]
) -> None:
    other = shutil.copytree(runs["south"], Path("other"))
    run = json.loads((other / "run.json").read_text())
    both = (runs["north"], other)
    run["config"]["task"]["labels"] = run["config"]["task"]["labels"][::-1]
    (other / "run.json").write_text(json.dumps(run))
    assert "in another order than the first's" in merge("uniform", *both, "--output", "out").line
    run["config"]["task"]["labels"] = ["class-zebra", "class-yak", "class-unicorn"]
    (other / "run.json").write_text(json.dumps(run))
    assert (
        "its labels (such as class-unicorn) are others than the first's"
        in merge("uniform", *both, "--output", "out").line
    )

    merge("uniform", *both, "--heads", "first", "--output", "first")
    heads = {key: tensor for key, tensor in load_file("first/" + WEIGHTS).items() if "lora_" not in key}
    mine = load_file(runs["north"] / "adapter" / WEIGHTS)
    assert heads and all(torch.equal(tensor, mine[key]) for key, tensor in heads.items())
    merge("uniform", *both, "--heads", "none", "--output", "none")
    assert all("lora_" in key for key in load_file("none/" + WEIGHTS))
    assert json.loads(Path("none", CONFIG).read_text())["modules_to_save"] is None


def test_another_type_is_converted_through_its_base_model(
    merge: Callable[..., Said], folder: Callable[..., Path], tiny_model: Any, lab: Any
) -> None:
    one = folder("one")
    two = folder("two", config=peft.LoKrConfig(r=2, target_modules=["key", "query"]))
    assert "its type is LOKR; name its base model with --model" in merge("uniform", one, two, "--output", "out").line
    model = tiny_model("bert")
    said = merge("uniform", one, two, "--model", model, "--rank", 32, "--output", "out", "--force", "", "--json")
    assert said.object["lost"] < 1e-6
    # LoKr alone, at full rank, computes what it did.
    merge("uniform", two, "--model", model, "--rank", 32, "--output", "alone")
    assert float((logits(lab, "bert", Path("alone")) - logits(lab, "bert", two)).abs().max()) <= 1e-4
    small = merge("uniform", one, two, "--model", model, "--output", "small", "--json").object
    assert "made LoRA of 2 with a relative error of" in small["warnings"][0]


def test_another_base_model_is_refused_unless_it_is_named(
    merge: Callable[..., Said], folder: Callable[..., Path]
) -> None:
    one, two = folder("one"), folder("two")
    edit(one, base_model_name_or_path="/models/a")
    edit(two, base_model_name_or_path="/models/b")
    line = merge("uniform", one, two, "--output", "out").line
    assert "adapter two: is for the base model `/models/b`, the first for `/models/a`" in line
    assert "--force '/models/b'" in line
    assert "--force" in merge("uniform", one, two, "--output", "out", "--force", "/models/a").line
    assert merge("uniform", one, two, "--output", "out", "--force", "/models/b").code == 0
    edit(two, base_model_name_or_path="/models/a", revision="v2")
    assert "`/models/a@v2`" in merge("uniform", one, two, "--output", "again").line


def test_fingerprints_of_runs_decide_over_names(merge: Callable[..., Said], runs: dict[str, Path]) -> None:
    other = shutil.copytree(runs["south"], Path("other"))
    edit(other / "adapter", base_model_name_or_path="/elsewhere")
    assert merge("uniform", runs["north"], other, "--output", "same").code == 0
    run = json.loads((other / "run.json").read_text())
    run["model"]["fingerprint"] = "0" * 64
    (other / "run.json").write_text(json.dumps(run))
    assert "is for the base model `/elsewhere`" in merge("uniform", runs["north"], other, "--output", "out").line


def test_another_architecture_is_refused_by_its_layer(merge: Callable[..., Said], folder: Callable[..., Path]) -> None:
    one, two = folder("one"), folder("two", "gpt2")
    names = [str(read_folder(path).base) for path in (one, two)]
    line = merge("uniform", one, two, "--output", "out", "--force", names[1]).line
    assert "adapter two: " in line and "tensor" in line


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say how to merge"),
        (["uniform"], "name the adapter folders to merge"),
        (["uniform", "{one}"], "say where the merged adapter goes: --output DIR"),
        (["uniforn", "{one}", "--output", "out"], "unknown merging rule `uniforn`; did you mean `uniform`?"),
        (["uniform", "nowhere", "--output", "out"], "nowhere: no such folder"),
        (["uniform", "{one}", "{one}", "--output", "out"], "is named twice; give it more weight instead"),
        (["uniform", "{one}", "{two}", "--weights", "1", "--output", "out"], "gives 1 weights for 2 adapters"),
        (["uniform", "{one}", "{two}", "--weights", "1,x", "--output", "out"], "write numbers with commas"),
        (["uniform", "{one}", "{two}", "--weights", "1,-1", "--output", "out"], "adapter two: its weight is -1.0"),
        (["uniform", "{one}", "--rank", "0", "--output", "out"], "the rank of the merged adapter is 0"),
        (["uniform", "{one}", "--heads", "all", "--output", "out"], "--heads all: there are mean, first and none"),
        (["ties", "{one}", "--option", "density", "--output", "out"], "--option density: write key=value"),
        (["ties", "{one}", "--option", "density=2", "--output", "out"], "option `density` of rule `ties`"),
        (["greedy", "{one}", "{two}", "--output", "out"], "rule `greedy` needs a few records of your own: give --data"),
        (["regmean", "{one}", "{two}", "--output", "out"], "rule `regmean` takes statistics of records: give --data"),
        (["uniform", "{one}", "--output", "{two}"], "is not an empty folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], says: str, merge: Callable[..., Said], folder: Callable[..., Path]
) -> None:
    folders = {"one": str(folder("one")), "two": str(folder("two"))}
    assert says in merge(*(part.format(**folders) for part in arguments)).line
    assert not Path("out").exists()
