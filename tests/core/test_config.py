from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fedgraft.core.config import RunConfig, config_from_json, known_keys, load_config, parse_config
from fedgraft.core.errors import UserError

MINIMAL = {"model": "package:m/f", "data": {"sites": ["north", "south"]}}
TOML = 'model = "some/model"\n[data]\nsites = ["north", "south"]\n'


def with_values(**values) -> dict:
    return json.loads(json.dumps(MINIMAL | values))


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Defaults and shape


def test_differential_privacy_is_on_by_default():
    privacy = parse_config(MINIMAL).privacy
    assert privacy.enabled and not privacy.seeded_noise_not_private
    assert (privacy.epsilon, privacy.clip, privacy.noise_multiplier) == (8.0, 1.0, 0.0)


def test_sites_are_names_or_sections_in_the_order_of_their_names():
    config = parse_config(with_values(data={"sites": ["south", {"name": "north", "path": "/n.csv"}]}))
    assert config.site_names == ("north", "south")
    assert config.data.sites[0].path == "/n.csv"


@pytest.mark.parametrize("name", ["..", "../east", "a/b", "/etc", ".hidden", "a\\b", "east\n", "", "a b", "é"])
def test_a_site_s_name_is_no_path(name: str) -> None:
    with pytest.raises(UserError, match=r"data.sites"):
        parse_config({"model": "m", "task": {"labels": ["a", "b"]}, "data": {"sites": [name]}})


def test_a_quorum_of_zero_means_all_sites():
    assert parse_config(MINIMAL).quorum == 2
    assert parse_config(with_values(server={"quorum": 1})).quorum == 1


def test_total_steps_are_those_of_all_rounds():
    assert parse_config(with_values(rounds=7, train={"local_steps": 3})).total_steps == 21


def test_a_changed_copy_keeps_nothing_of_what_the_original_came_to():
    config = parse_config(with_values(data={"sites": [{"name": "a", "memory": 8}, {"name": "b", "memory": 2}]}))
    before = (config.to_json(), config.digest(), hash(config), config.site_names, dict(config.ranks), config.site("b"))
    other = config.model_copy(
        update={
            "data": config.data.model_copy(update={"sites": config.data.sites[:1]}),
            "method": config.method.model_copy(update={"rank": 2}),
        }
    )
    assert other.site_names == ("a",) and other.ranks == {"a": 2} and other.site("b") is None
    fresh = config_from_json(other.to_json())
    assert (other, other.digest(), hash(other)) == (fresh, fresh.digest(), hash(fresh))
    after = (config.to_json(), config.digest(), hash(config), config.site_names, dict(config.ranks), config.site("b"))
    assert after == before


# Refusals


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": {"rnak": 4}}, ["unknown key `method.rnak`; did you mean `method.rank`?"]),
        ({"roundz": 4}, ["unknown key `roundz`; did you mean `rounds`?"]),
        ({"epsilon": 4}, ["unknown key `epsilon`; did you mean `privacy.epsilon`?"]),
        ({"lr": 4}, ["unknown key `lr`; did you mean `train.lr`?"]),
        ({"train": {"epsilon": 4}}, ["unknown key `train.epsilon`; did you mean `privacy.epsilon`?"]),
        ({"qqqqqqqq": 4}, ["unknown key `qqqqqqqq`; see docs/configuration.md"]),
        ({"data": {"sites": [{"name": "n", "pth": "x"}]}}, ["`data.sites.0.pth`; did you mean `data.sites.0.path`?"]),
        ({"data": {}}, ["`data.sites` is missing"]),
        ({"data": {"sites": []}}, ["`data.sites`"]),
        ({"data": {"sites": ["a", "a"]}}, ["`data.sites`: two sites have the same name"]),
        ({"data": {"sites": ["../evil"]}}, ["`data.sites.0.name`", "(got '../evil')"]),
        ({"data": {"sites": "north"}}, ["`data.sites`: Input should be a list"]),
        ({"method": "lora"}, ["`method`: Input should be a section (got 'lora')"]),
        ({"strategy_options": 3}, ["`strategy_options`: Input should be a section (got 3)"]),
        ({"task": {"labels": "a,b"}}, ['`task.labels`: Input should be a list, such as ["a", "b"] (got \'a,b\')']),
        ({"task": {"labels": ["a", "b", "a"]}}, ["`task.labels`: the label `a` is listed twice"]),
        ({"method": {"rank": 0}}, ["`method.rank`", "greater than or equal to 1 (got 0)"]),
        ({"method": {"rank": 4.5}}, ["`method.rank`", "(got 4.5)"]),
        ({"method": {"rank": "four"}}, ["`method.rank`", "(got 'four')"]),
        ({"method": {"rank": True}}, ["`method.rank`: Input should be a number (got True)"]),
        ({"privacy": {"clip": True}}, ["`privacy.clip`: Input should be a number (got True)"]),
        ({"privacy": {"epsilon": float("inf")}}, ["`privacy.epsilon`", "finite"]),
        ({"privacy": {"epsilon": float("nan")}}, ["`privacy.epsilon`"]),
        ({"privacy": {"delta": 1.0}}, ["`privacy.delta`", "less than 1"]),
        ({"privacy": {"unit": "ward"}}, ["`privacy.unit`", "'record' or 'patient'"]),
        ({"privacy": {"enabled": "perhaps"}}, ["`privacy.enabled`", "(got 'perhaps')"]),
        ({"seed": -1}, ["`seed`"]),
        ({"seed": 2**63}, ["`seed`"]),
        ({"name": 3}, ["`name`", "valid string (got 3)"]),
        ({"server": {"quorum": 3}}, ["server.quorum is 3 but there are 2 sites"]),
        ({"server": {"sites_per_round": 3}}, ["server.sites_per_round is 3 but there are 2 sites"]),
        (
            {"server": {"sites_per_round": 1}, "central": {"enabled": True}},
            ["server.sites_per_round draws from the seed", "set central.sampling_rate"],
        ),
        ({"train": {"max_grad_norm": -1.0}}, ["`train.max_grad_norm`", "greater than or equal to 0"]),
        ({"strategy_options": {"x": float("inf")}}, ["`strategy_options`", "finite numbers"]),
        ({"strategy_options": {"x": {1, 2}}}, ["`strategy_options`", "finite numbers"]),
        ({"train": {"optimizer": "lion\nx"}}, ["`train.optimizer`", "'sgd' or 'adamw'"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(values, words, refused):
    with refused("run.toml: ", *words):
        parse_config(MINIMAL | values, "run.toml")


@pytest.mark.parametrize("values", [None, 3, [], "model", {"model": "m"}, {"data": MINIMAL["data"]}, {}])
def test_what_is_no_configuration_is_refused(values, refused):
    with refused("configuration: "):
        parse_config(values)


def sections(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += [prefix + name, *sections(info.annotation, f"{prefix}{name}.")]
    return names


def test_known_keys_are_all_leaves_and_no_sections():
    keys = known_keys()
    assert len(set(keys)) == len(keys)
    assert {"model", "seed", "method.rank", "privacy.epsilon", "data.sites", "strategy_options"} <= set(keys)
    assert not set(keys) & set(sections(RunConfig))
    # Every key is really there.
    config = parse_config(MINIMAL)
    for key in keys:
        value = config
        for part in key.split("."):
            value = getattr(value, part)


# Immutability, JSON, digest


@pytest.mark.parametrize("section", ["", *sections(RunConfig)])
def test_a_configuration_does_not_change(section):
    target = parse_config(MINIMAL)
    for part in section.split(".") if section else []:
        target = getattr(target, part)
    name = next(iter(type(target).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(target, name, getattr(target, name))


FULL = with_values(
    seed=2**63 - 1,
    strategy_options={"a": 1, "b": [1.5, {"c": True}], "d": "é\u2028"},
    method={"rank": 4, "alpha": 0.1, "layers": [0, 2], "target_modules": ["query"]},
    task={"labels": ["ja", "näin", "x"]},
    train={"lr": 5e-324},
    privacy={"delta": 1e-9, "unit": "patient"},
    data={"sites": [{"name": "north", "path": "/a b.csv", "rank": 3}, "south"], "alpha": 1e300},
)


@pytest.mark.parametrize("values", [MINIMAL, FULL])
def test_a_configuration_equals_itself_after_json(values):
    config = parse_config(values)
    again = config_from_json(config.to_json())
    assert again == config and again.digest() == config.digest() and again.to_json() == config.to_json()


def test_tuples_in_strategy_options_are_lists_from_the_start():
    config = parse_config(MINIMAL | {"strategy_options": {"x": (1, 2)}})
    assert config.strategy_options == {"x": [1, 2]}
    assert config_from_json(config.to_json()) == config


def test_the_digest_is_that_of_the_content_not_of_the_writing():
    config = parse_config(FULL)
    reordered = dict(reversed(list(FULL.items())))
    for section in ("method", "strategy_options"):
        reordered[section] = dict(reversed(list(FULL[section].items())))
    assert parse_config(reordered).digest() == config.digest()
    assert parse_config(with_values(method={"alpha": 16})).digest() == parse_config(MINIMAL).digest()
    reversed_sites = with_values(data={"sites": ["south", "north"]})
    assert parse_config(reversed_sites).digest() == parse_config(MINIMAL).digest()


def test_the_digest_is_the_same_in_another_process():
    config = parse_config(FULL)
    code = "import sys; from fedgraft.core.config import config_from_json as f; print(f(sys.stdin.read()).digest())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=config.to_json(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONUTF8": "1"},
    )
    assert other.stdout.strip() == config.digest()


def test_every_key_changes_the_digest():
    base = parse_config(MINIMAL)
    digests = {base.digest()}
    tables = (
        *("data.partition_options", "data.sites", "method.options", "simulation.pooled"),
        *("strategy_options", "tensor_policy"),
    )
    keys = [key for key in known_keys() if key not in tables]
    for key in keys:
        *parents, leaf = key.split(".")
        sections = [base]
        for parent in parents:
            sections.append(getattr(sections[-1], parent))
        value = getattr(sections[-1], leaf)
        if isinstance(value, bool):
            other: object = not value
        elif isinstance(value, str):
            other = value + "x"
        elif isinstance(value, tuple):
            other = (1,) if leaf in ("layers", "fractions") else ("x",)
        else:
            other = value + 1
        changed = sections.pop().model_copy(update={leaf: other})
        for parent in reversed(parents):
            changed = sections.pop().model_copy(update={parent: changed})
        digests.add(changed.digest())
    assert len(digests) == len(keys) + 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_configuration_from_the_wire_is_refused_or_whole(data):
    values = json.loads(parse_config(FULL).to_json())
    node = values
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(json_values)
        break
    try:
        config = config_from_json(json.dumps(values), "the server's configuration")
    except UserError as error:
        assert str(error).startswith("the server's configuration: ") and str(error).isprintable()
    else:
        assert config_from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, '{"model": "\\ud800"}', '{"seed": 1' + "0" * 5000 + "}"]
)
def test_text_that_is_no_configuration_is_refused(text, refused):
    with refused("the server's configuration: "):
        config_from_json(text, "the server's configuration")


# Files


def test_a_file_is_read_and_named_after_itself(write):
    config = load_config(write(TOML, "four-hospitals.toml"))
    assert (config.name, config.model, config.site_names) == ("four-hospitals", "some/model", ("north", "south"))
    assert load_config(write('name = "x"\n' + TOML)).name == "x"


def test_the_json_of_a_configuration_is_a_file_too(write):
    config = parse_config(FULL)
    assert load_config(write(config.to_json(), "config.json")) == config.model_copy(update={"name": ""})


def test_relative_paths_are_taken_from_the_files_folder(write, tmp_path):
    for folder in ("deep/models/own", "deep/hub-like"):
        (tmp_path / folder).mkdir(parents=True)
    text = (
        'model = "{model}"\nstart_from = "adapter"\n[data]\npath = "all.csv"\n[[data.sites]]\nname = "north"\n'
        'path = "../n.csv"\nmodel = "./models/own"\n[[data.sites]]\nname = "south"\npath = "/abs/s.csv"\n'
    )
    folder = tmp_path / "deep"
    config = load_config(write(text.format(model="models/own"), "deep/run.toml"))
    assert Path(config.model) == folder / "models" / "own"
    assert Path(config.data.path) == folder / "all.csv"
    assert Path(config.start_from) == folder / "adapter"
    assert Path(config.data.sites[0].path).resolve() == (tmp_path / "n.csv").resolve()
    assert Path(config.data.sites[0].model) == folder / "models" / "own"
    assert config.data.sites[1].path == "/abs/s.csv" and config.data.sites[1].model == ""
    for model, expected in (
        ("./not-there-yet", str(folder / "not-there-yet")),
        ("org/name", "org/name"),
        ("package:numpy/x", "package:numpy/x"),
        ("hub-like", str(folder / "hub-like")),
    ):
        assert load_config(write(text.format(model=model), "deep/run.toml")).model == expected


def test_a_tilde_is_the_home_folder(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load_config(write('model = "m"\n[data]\npath = "~/all.csv"\nsites = ["a"]\n'))
    assert config.data.path == str(tmp_path / "home" / "all.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model = ", ["not valid TOML"]),
        (b"\xff\xfe", ["not valid TOML"]),
        (b"[model]\nx = 1\n", ["`model`"]),
        (b'model = "m"\nmodel = "n"\n', ["not valid TOML"]),
        (b'model = "m"\ndata = 1979-05-27\n', ["`data`"]),
        (b'model = "m"\n[data]\nsites = ["a"]\n[strategy_options]\nx = 1979-05-27\n', ["`strategy_options`"]),
        (b'model = "m"\n[data]\nsites = ["a"]\n[strategy_options]\nx = inf\n', ["`strategy_options`"]),
        (b'model = "m"\n[data]\nsites = ["a"]\n[train]\nlr = inf\n', ["`train.lr`", "finite"]),
    ],
)
def test_a_damaged_file_is_refused_by_name(content, words, tmp_path, refused):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with refused(str(path), *words):
        load_config(path)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", '{"model": 3}'])
def test_a_damaged_json_file_is_refused_by_name(text, write, refused):
    path = write(text, "run.json")
    with refused(str(path)):
        load_config(path, ["seed=1"])


def test_a_missing_file_and_a_folder_are_refused(tmp_path, refused):
    with refused(str(tmp_path / "none.toml"), "no such configuration file"):
        load_config(tmp_path / "none.toml")
    with refused(str(tmp_path), "is a folder"):
        load_config(tmp_path)


# --set


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("rounds=3", "rounds", 3),
        (" train.lr = 0.5 ", "train.lr", 0.5),
        ("train.lr=.5", "train.lr", 0.5),
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("privacy.enabled=false", "privacy.enabled", False),
        ("privacy.enabled=False", "privacy.enabled", False),
        ("strategy=ffa-lora", "strategy", "ffa-lora"),
        ('strategy="ffa-lora"', "strategy", "ffa-lora"),
        ('task.labels=["a", "b"]', "task.labels", ("a", "b")),
        ("method.layers=[0, 1]", "method.layers", (0, 1)),
        ("strategy_options.beta=0.9", "strategy_options", {"beta": 0.9}),
        ("strategy_options.deep.x=[1]", "strategy_options", {"deep": {"x": [1]}}),
        ("strategy_options={beta = 1}", "strategy_options", {"beta": 1}),
        ("name=a=b", "name", "a=b"),
        ("data.path=", "data.path", ""),
        ("method.rank=4 # small", "method.rank", 4),
        ('data.sites=["west"]', "data.sites", None),
    ],
)
def test_an_override_is_toml_or_a_bare_word(assignment, key, value, write):
    config = load_config(write(TOML), [assignment])
    for part in key.split("."):
        config = getattr(config, part)
    if value is None:
        assert [site.name for site in config] == ["west"]
    else:
        assert config == value and type(config) is type(value)


def test_the_last_override_wins_over_the_file(write):
    path = write("rounds = 9\n" + TOML)
    assert load_config(path).rounds == 9
    assert load_config(path, ["rounds=2", "rounds=4"]).rounds == 4


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("rounds", ["--set rounds: write it as key=value"]),
        ("=3", ["write it as key=value"]),
        ("train.learning_rate=3", ["unknown key `train.learning_rate`; did you mean"]),
        ("round=3", ["unknown key `round`; did you mean `rounds`?"]),
        ("method=3", ["unknown key `method`"]),
        ("data.sites.0.path=x", ["unknown key `data.sites.0.path`"]),
        ("rounds=three", ["`rounds`", "(got 'three')"]),
        ("rounds=true", ["`rounds`: Input should be a number"]),
        ("rounds=2\nseed = 3", ["`rounds`"]),
        ("task.labels=a,b", ["`task.labels`: Input should be a list"]),
        ("rounds=1979-05-27", ["`rounds`"]),
        ("rounds=1979-99-27", ["`rounds`"]),
        ("strategy_options.x=" + "[" * 5000, []),
    ],
)
def test_a_bad_override_is_refused(assignment, words, write, refused):
    path = write(TOML)
    if not words:
        # Not a TOML value, so it is taken as the text that it is.
        assert load_config(path, [assignment]).strategy_options["x"] == "[" * 5000
        return
    with refused(*words):
        load_config(path, [assignment])


def test_an_override_into_what_is_no_section_is_refused(write, refused):
    with refused("`method` is not a section"):
        load_config(write('method = "lora"\n' + TOML), ["method.rank=4"])


def test_a_path_typed_on_the_command_line_is_relative_to_where_one_stands(write, tmp_path, monkeypatch):
    path = write(TOML, "configs/run.toml")
    here = tmp_path / "here"
    (here / "model").mkdir(parents=True)
    (here / "all.csv").touch()
    monkeypatch.chdir(here)
    config = load_config(path, ["model=model", "data.path=all.csv"])
    assert config.model == str(here / "model") and config.data.path == str(here / "all.csv")
    elsewhere = load_config(path, ["data.path=not-there.csv"])
    assert elsewhere.data.path == str(tmp_path / "configs" / "not-there.csv")
    assert load_config(path, ["data.path="]).data.path == ""
    assert load_config(path, [f"model={'x' * 5000}"]).model == "x" * 5000


def test_fp16_is_refused_where_gradients_are_clipped(refused):
    with refused("train.precision fp16", "bf16 or fp32"):
        parse_config(with_values(train={"precision": "fp16"}))
    values = with_values(train={"precision": "fp16"}, privacy={"enabled": False})
    assert parse_config(values).train.precision == "fp16"
