"""A site's policy: what is one, which line forbids what, and that a broken one allows nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedgraft.client.policy import TEMPLATE, NoPolicyError, Policy, PolicyError, load_policy, unrestricted
from fedgraft.core.config import RunConfig, load_config
from fedgraft.core.errors import PrivateError
from fedgraft.privacy.ledger import Limit

FINGERPRINT = "ab" * 32
FULL = TEMPLATE.replace("base_models = []", f'base_models = ["{FINGERPRINT}"]')


def line(text: str, beginning: str) -> int:
    """The number of the line that begins so."""
    (number,) = (n for n, found in enumerate(text.splitlines(), 1) if found.startswith(beginning))
    return number


@pytest.fixture
def job(tiny_federation: Any) -> Any:
    """``job(**changes)``: a configuration that the template lets pass, but for the changes."""

    def make(**changes: Any) -> RunConfig:
        strict = {"privacy.epsilon": 4.0, "privacy.delta": 1e-5, "evaluate.release": "noised"}
        return tiny_federation.private(**{**strict, **changes})

    return make


def objections(job: RunConfig, text: str = FULL, fingerprint: str = FINGERPRINT) -> list[PolicyError]:
    policy = Policy(text, "/srv/site/policy.toml")
    return list(policy.objections(job, fingerprint, policy.dataset_of(job, "north")))


# What forbids what


def test_a_job_that_asks_for_no_more_than_is_allowed_passes(job: Any) -> None:
    assert objections(job()) == []
    stricter = {"privacy.epsilon": 0.1, "privacy.delta": 1e-9, "evaluate.release": "none", "method.name": "rslora"}
    assert objections(job(**stricter)) == []


FORBIDDEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "no privacy": ({"privacy.enabled": False, "evaluate.release": "none"}, "dp", "without differential privacy"),
    "more epsilon than ever": ({"privacy.epsilon": 8.5}, "max_epsilon ", "privacy.epsilon 8.5"),
    "more delta": ({"privacy.delta": 1e-4}, "max_delta", "privacy.delta 0.0001"),
    "a smaller unit": ({"privacy.unit": "record"}, "min_unit ", "protects each record only"),
    "another patient column": ({"data.patient_column": "text"}, "patient_column", "the column `text`"),
    "seeded noise": ({"privacy.seeded_noise_not_private": True}, "secret_noise", "noise comes from its seed"),
    "another engine": ({"privacy.engine": "opacus"}, "engines", "privacy.engine opacus"),
    "another method": ({"method.name": "bitfit"}, "methods", "method is bitfit"),
    "a file of the site": ({"method.mask": "/data/mask"}, "files", "open /data/mask (method.mask)"),
    "a folder of the site": ({"method.experts": ["/data/adapter"]}, "files", "open /data/adapter (method.experts)"),
    "another strategy": ({"strategy": "krum"}, "strategies", "strategy is krum"),
    "raw metrics": ({"evaluate.release": "exact_not_private"}, "evaluation", "counts that are exact_not_private"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_not_allowed_is_refused_with_the_line_that_forbids_it(job: Any, name: str) -> None:
    changes, key, reason = FORBIDDEN[name]
    found = objections(job(**changes))
    number = line(FULL, key)
    (objection,) = [each for each in found if each.rule.line == number]
    assert reason in str(objection)
    assert str(objection).startswith(f"the site's policy forbids it, line {number} ({key.strip()} = ")
    assert objection.rule.text == FULL.splitlines()[number - 1].strip()
    assert objection.rule.file == "/srv/site/policy.toml" and "/srv" not in str(objection)


def test_a_listed_folder_is_not_left_by_its_parent(job: Any) -> None:
    text = FULL.replace("files = []", 'files = ["/srv/masks/*"]')
    assert objections(job(**{"method.mask": "/srv/masks/fish.safetensors"}), text) == []
    (objection,) = objections(job(**{"method.mask": "/srv/masks/../ledger.safetensors"}), text)
    assert objection.rule.line == line(text, "files")


def test_a_policy_that_says_nothing_of_files_opens_none(job: Any) -> None:
    text = "\n".join(row for row in FULL.splitlines() if not row.startswith("files"))
    (objection,) = objections(job(**{"method.mask": "/srv/mask.safetensors"}), text)
    assert str(objection).startswith("the site's policy forbids it, the default files = []: ")


def test_another_base_model_is_refused_and_its_fingerprint_told(job: Any) -> None:
    (objection,) = objections(job(), fingerprint="cd" * 32)
    assert objection.rule.line == line(FULL, "base_models")
    assert f"fingerprint {'cd' * 32}" in str(objection)


def test_the_template_allows_no_model_before_somebody_has_written_one_into_it(job: Any) -> None:
    (objection,) = objections(job(), TEMPLATE)
    assert "(base_models = [])" in str(objection)


def test_a_training_loss_leaves_where_the_policy_says_so(job: Any) -> None:
    open_handed = FULL.replace("dp = true", "dp = false")
    plain = job(**{"privacy.enabled": False, "evaluate.release": "none"})
    (objection,) = objections(plain, open_handed)
    assert objection.rule.line == line(FULL, "training_loss")
    assert objections(plain, open_handed.replace('training_loss = "none"', 'training_loss = "exact"')) == []


def test_sizes_that_may_not_leave_stop_every_job(job: Any) -> None:
    (objection,) = objections(job(), FULL.replace('sizes = "exact"', 'sizes = "none"'))
    assert "every answer tells how many" in str(objection)


@pytest.mark.parametrize(
    ("allowed", "passing"),
    [("none", {"none"}), ("noised", {"none", "noised"}), ("exact", {"none", "noised", "exact_not_private"})],
)
def test_counts_leave_as_exactly_as_allowed_and_no_more(job: Any, allowed: str, passing: set[str]) -> None:
    text = FULL.replace('evaluation = "noised"', f'evaluation = "{allowed}"')
    releases = ("none", "noised", "exact_not_private")
    assert {each for each in releases if not objections(job(**{"evaluate.release": each}), text)} == passing


def test_every_objection_is_listed_and_the_first_is_raised(job: Any) -> None:
    bad = job(**{"privacy.epsilon": 9.0, "strategy": "krum"})
    found = objections(bad)
    assert len(found) == 2
    policy = Policy(FULL, "policy.toml")
    with pytest.raises(PolicyError) as refusal:
        policy.admit(bad, FINGERPRINT, policy.datasets[0])
    assert str(refusal.value) == str(found[0])


def test_a_tensor_that_is_not_listed_is_refused_by_name() -> None:
    policy = Policy(FULL, "policy.toml")
    policy.require_tensors(["base_model.model.x.query.lora_A.default.weight", "base_model.model.classifier.weight"])
    with pytest.raises(
        PolicyError, match=r"line \d+ \(tensors = .*would carry the tensor base_model.model.norm.bias out"
    ):
        policy.require_tensors(["base_model.model.x.lora_B.default.weight", "base_model.model.norm.bias"])


def test_too_few_patients_are_refused_without_telling_how_many_there_are() -> None:
    policy = Policy(FULL, "policy.toml")
    policy.require_units(5000, 200, policy.datasets[0])
    with pytest.raises(PolicyError) as refusal:
        policy.require_units(5000, 137, policy.datasets[0])
    assert "137" not in str(refusal.value)
    assert refusal.value.rule.line == line(FULL, "min_units")
    records = Policy(FULL.replace('min_unit = "patient"', 'min_unit = "record"'), "policy.toml")
    records.require_units(200, 0, records.datasets[0])


def test_the_ledger_is_told_the_limits_in_all_and_for_the_year() -> None:
    policy = Policy(FULL, "policy.toml")
    total, year = policy.limits(policy.datasets[0]).items()
    assert total[0] == Limit(8.0, 1e-5, total[0].source)
    assert year[0] == Limit(4.0, 1e-5, year[0].source, year=True)
    assert (total[1].line, year[1].line) == (line(FULL, "max_epsilon "), line(FULL, "max_epsilon_per_year"))
    assert total[0].source == f"the site's policy allows, line {total[1].line} (max_epsilon = 8)"


def test_a_simulated_site_lets_everything_out_openly(job: Any) -> None:
    policy = unrestricted()
    for changes in ({}, *(changes for changes, _, _ in FORBIDDEN.values())):
        assert list(policy.objections(job(**changes), "x", policy.datasets[0])) == []
    policy.require_tensors(["anything"])
    policy.require_units(1, 0, policy.datasets[0])
    assert policy.limits(policy.datasets[0]) == {}
    assert "allows everything" in policy.file


# Which dataset


TWO = FULL.replace(
    "[allow]", FULL[FULL.index("[[dataset]]") : FULL.index("[allow]")].replace("letters", "scans") + "[allow]", 1
)


def test_one_of_several_datasets_is_named_by_the_site_or_else_by_the_job(job: Any) -> None:
    policy = Policy(TWO, "/srv/policy.toml")
    names = ["discharge-letters", "discharge-scans"]
    assert [dataset.name for dataset in policy.datasets] == names
    asks = job(**{"data.sites": [{"name": "north", "dataset": names[1]}, "south"], "data.path": ""})
    assert policy.dataset_of(asks, "north").name == names[1]
    assert policy.dataset_of(asks, "north", names[0]).name == names[0]
    for config, chosen in ((asks, "other"), (job(), "")):
        with pytest.raises(PolicyError, match=f"no dataset is called `{chosen}`; the site gives dataset="):
            policy.dataset_of(config, "north", chosen)
    assert policy.data_path(policy.datasets[1]) == Path("/srv/discharge-scans.csv")


def test_a_job_that_names_another_dataset_than_the_only_one_does_not_get_that(job: Any) -> None:
    policy = Policy(FULL, "/srv/policy.toml")
    assert policy.dataset_of(job(), "north").name == "discharge-letters"
    with pytest.raises(PolicyError, match="no dataset is called `scans`"):
        policy.dataset_of(job(**{"data.sites": [{"name": "north", "dataset": "scans"}]}), "north")


def test_the_name_of_a_dataset_survives_the_file_of_the_configuration(job: Any, tmp_path: Path) -> None:
    values = json.loads(job().to_json())
    values["data"] = {"sites": [{"name": "north", "dataset": "discharge-scans"}]}
    (tmp_path / "job.json").write_text(json.dumps(values))
    config = load_config(tmp_path / "job.json")
    assert Policy(TWO, "/srv/policy.toml").dataset_of(config, "north").name == "discharge-scans"


def test_a_rule_is_that_of_the_dataset_which_is_used(job: Any) -> None:
    text = TWO.replace("max_delta = 1e-5 ", "max_delta = 1e-6 ", 1)
    policy = Policy(text, "policy.toml")
    first, second = policy.datasets
    (objection,) = policy.objections(job(), FINGERPRINT, first)
    assert objection.rule.line == line(text, "max_delta = 1e-6")
    assert not list(policy.objections(job(), FINGERPRINT, second))
    assert policy.rule("dataset", 1, "max_delta").line == line(text, "max_delta = 1e-5")


def test_a_path_elsewhere_stays_where_it_is() -> None:
    policy = Policy(FULL.replace('"discharge-letters.csv"', '"/data/letters.csv"'), "/srv/policy.toml")
    assert policy.data_path(policy.datasets[0]) == Path("/data/letters.csv")


# Lines


def test_a_rule_over_several_lines_begins_where_it_begins() -> None:
    text = FULL.replace('methods = ["lora", "rslora"]', 'methods = [\n  "lora", # fine\n  "rslora",\n]')
    rule = Policy(text, "policy.toml").rule("allow", "methods")
    assert rule.line == line(text, "methods = [")
    assert rule.text.startswith('methods = [ "lora", # fine "rslora", ]')
    assert rule.shown == 'methods = ["lora", "rslora"]'


@pytest.mark.parametrize(
    "written",
    ["[allow]\n  methods = ['*']", 'allow.methods = ["*"]\n[allow]', '[ "allow" ]\n"methods" = ["*"]'],
)
def test_a_line_is_found_however_it_is_written(written: str) -> None:
    """TOML knows many ways to say the same; a text in quotes that looks like a rule is none."""
    rest = FULL.replace('methods = ["lora", "rslora"]   # see `fedgraft methods`\n', "")
    text = "# '''\n" + rest.replace("[[dataset]]", "", 1)  # the dataset follows as an array
    body = text[text.index("name =") : text.index("[allow]")]
    after = text[text.index("[allow]") :].removeprefix(text[text.index("[allow]") :].split("\n")[0] + "\n")
    decoy = body.replace('"discharge-letters"', '"""\nmethods = [] in a text"""')
    top, _, inner = written.partition("\n") if written.startswith("allow.") else ("", "", written)
    whole = f"{top}\n[[dataset]]\n{decoy}\n{inner}\n{after}"
    if written.startswith("allow."):
        # A table that dotted keys have made cannot be opened again: its other keys are dotted too.
        keys = "\n".join(f"allow.{each}" for each in after[: after.index("[metrics]")].splitlines() if "=" in each)
        whole = f"{top}\n{keys}\n[[dataset]]\n{decoy}\n{after[after.index('[metrics]') :]}"
    policy = Policy(whole, "policy.toml")
    number = policy.rule("allow", "methods").line
    assert whole.split("\n")[number - 1] in written


def test_a_default_has_no_line() -> None:
    policy = Policy(FULL[: FULL.index("[require]")], "policy.toml")
    assert policy.require.dp and policy.require.secret_noise
    rule = policy.rule("require", "dp")
    assert (rule.line, str(rule)) == (0, "the default dp = true")


# Broken


BROKEN: dict[str, tuple[str, str]] = {
    "no TOML": (FULL.replace("[allow]", "[allow"), "not valid TOML"),
    "empty": ("", "`dataset` is missing"),
    "unknown key": (FULL.replace("max_delta", "max_dleta"), "line 13: unknown key `dataset.1.max_dleta`"),
    "unknown section": (FULL + "[extra]\nx = 1\n", "line 38: unknown key `extra`"),
    "missing key": (FULL.replace('engines = ["exact"]', ""), "line 15: `allow.engines` is missing"),
    "missing section": (FULL.replace("[metrics]", "[metricks]"), "unknown key `metricks`"),
    "text for a number": (FULL.replace("= 8.0", '= "8"'), "line 11: `dataset.1.max_epsilon`: Input should be a valid"),
    "number for a list": (FULL.replace("base_models = [", "base_models = 1 # ["), "line 16: `allow.base_models`"),
    "one for true": (FULL.replace("dp = true", "dp = 1"), "line 29: `require.dp`: Input should be a valid boolean"),
    "true for a number": (FULL.replace("= 200", "= true"), "line 10: `dataset.1.min_units`"),
    "part of a patient": (FULL.replace("= 200", "= 1.5"), "line 10: `dataset.1.min_units`"),
    "nothing": (FULL.replace("= 200", "= 0"), "line 10: `dataset.1.min_units`"),
    "another unit": (FULL.replace('min_unit = "patient"', 'min_unit = "visit"'), "line 9: `dataset.1.min_unit`"),
    "no epsilon": (FULL.replace("= 8.0", "= nan"), "line 11: `dataset.1.max_epsilon`"),
    "a delta that promises nothing": (FULL.replace("1e-5", "1.0"), "line 13: `dataset.1.max_delta`"),
    "patients without a column": (FULL.replace('column = "patient"', 'column = ""'), "needs the patient_column"),
    "metrics": (FULL.replace('evaluation = "noised"', 'evaluation = "all"'), "line 24: `metrics.evaluation`"),
    "two of one name": (TWO.replace("discharge-scans", "discharge-letters"), "two datasets have the same name"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_policy_is_no_policy_and_says_where(name: str, tmp_path: Path) -> None:
    text, reason = BROKEN[name]
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(NoPolicyError) as refusal:
        load_policy(path)
    said = str(refusal.value)
    assert said.startswith(f"{path}: the policy is broken, so nothing leaves: ")
    assert reason in said and said.endswith("; see fedgraft policy template")
    assert isinstance(refusal.value, PrivateError), "what stands in a policy is the site's own affair"
    assert (
        refusal.value.sent
        == "the site's policy (policy.toml) is broken, so nothing leaves; fedgraft policy check says where"
    )


def test_a_policy_that_is_not_there_is_one_line_with_the_mend(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(NoPolicyError) as refusal:
        load_policy(path)
    assert str(refusal.value) == (
        f"{path}: there is no policy, so nothing leaves; write one: fedgraft policy template > {path}"
    )
    assert str(tmp_path) not in refusal.value.sent and "policy template > policy.toml" in refusal.value.sent


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_no_policy(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "policy.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(NoPolicyError, match="the policy is broken, so nothing leaves: cannot be read: "):
        load_policy(path)


def test_a_policy_is_read_anew_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(FULL, encoding="utf-8")
    first = load_policy(path)
    path.write_text(FULL.replace("= 8.0", "= 3.0"), encoding="utf-8-sig")  # as Windows' Notepad begins a file
    second = load_policy(path)
    assert (first.datasets[0].max_epsilon, second.datasets[0].max_epsilon) == (8.0, 3.0)
    assert first.digest != second.digest
    assert second.rule("dataset", 0, "max_epsilon").line == line(FULL, "max_epsilon ")
