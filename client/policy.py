"""What a site lets out: a file on its own disk that no job can override, read anew for every instruction.

A key that is unknown or missing, or a value of another kind, makes the whole policy broken, and then nothing leaves.
Every refusal names the line that forbids.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from .. import __version__
from ..core.config import RunConfig, Section
from ..core.errors import PrivateError, UserError
from ..privacy.ledger import Limit
from .installed import installed_digest

Release = Literal["none", "noised", "exact"]
_MORE: tuple[str, ...] = ("none", "noised", "exact")
_UNITS = ("record", "patient")
#: How the names of strategies begin that are classes for Flower; with a second colon the class is of any module.
_MODULE = "flwr:"

TEMPLATE = """\
# What this site lets out. fedgraft reads this file before it answers anything: without it, or with a mistake in it,
# nothing leaves. No job can override a line; it can only ask for less. Every decision is written to audit.jsonl in
# the site's folder.

[[dataset]]                    # one such block for each set of data; a job can read nothing else
name = "discharge-letters"     # what is spent adds up under this name, also when the file changes
path = "discharge-letters.csv" # seen from this file's folder
patient_column = "patient"     # the column that tells whose record it is
min_unit = "patient"           # who is protected: each "patient", with all records, or at least each "record"
min_units = 200                # with fewer of those to train on, nothing is trained
max_epsilon = 8.0              # the most that all runs together may ever spend (one unit more or less, at max_delta)
max_epsilon_per_year = 4.0     # the most in a calendar year (UTC)
max_delta = 1e-5               # the chance that the promise does not hold; well below 1 / patients

[allow]                        # what is not listed is refused; * stands for any text
base_models = []               # fingerprints (SHA-256); a refusal says that of the job's model
methods = ["lora", "rslora"]   # see `fedgraft methods`
strategies = ["fedit", "ffa"]  # see `fedgraft strategies`; one of any module, "flwr:MODULE:CLASS", no * alone allows
engines = ["exact"]            # who computes gradients: exact (fedgraft's own), opacus
tensors = ["*.lora_[AB].*", "*classifier*", "*score*"] # the trained tensors that may leave, by name
files = []                     # what a job may have the site open beside the data: method.mask, method.experts

[metrics]                      # what else may leave: "none", "noised" (the ledger pays), "exact"
evaluation = "noised"          # counts over people who were held out
training_loss = "none"         # "none" or "exact"
sizes = "exact"                # numbers of records and units, which weigh the site in the average: "none" or "exact"

[require]
dp = true                      # false: updates may leave without differential privacy, without any bound
secret_noise = true            # false: noise may come from a seed, which protects nobody
honest = true                  # false: a job may have sites send what they did not learn (simulated attackers)
secure_sum = false             # true: the server must see no update of this site alone, but the sum of at least three

[code]                         # what runs here: this site's own installation, never what a job brings
version = ""                   # the fedgraft that must be installed; "": any
sha256 = ""                    # the hash of its files, which `fedgraft policy code` prints; "": any
bundles = []                   # hashes of app bundles that may hold code, which is not run here all the same
"""

_UNRESTRICTED = """\
[[dataset]]
name = "simulated"
path = "the scenario's"
patient_column = ""
min_unit = "record"
min_units = 1
max_epsilon = inf
max_epsilon_per_year = inf
max_delta = 0.999999999
[allow]
base_models = ["*"]
methods = ["*"]
strategies = ["*", "flwr:*"]
engines = ["*"]
tensors = ["*"]
files = ["*"]
[metrics]
evaluation = "exact"
training_loss = "exact"
sizes = "exact"
[require]
dp = false
secret_noise = false
honest = false
"""


class Dataset(Section):
    """One set of data at the site, and its budget."""

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    patient_column: str
    min_unit: Literal["record", "patient"]
    min_units: int = Field(ge=1)
    max_epsilon: float = Field(gt=0, allow_inf_nan=True)
    max_epsilon_per_year: float = Field(gt=0, allow_inf_nan=True)
    max_delta: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _named(self) -> Dataset:
        if self.min_unit == "patient" and not self.patient_column:
            raise ValueError('min_unit = "patient" needs the patient_column that tells whose record it is')
        return self


class Allow(Section):
    """Whatever a job may choose."""

    base_models: tuple[str, ...]
    methods: tuple[str, ...]
    strategies: tuple[str, ...]
    engines: tuple[str, ...]
    tensors: tuple[str, ...]
    files: tuple[str, ...] = ()


class Metrics(Section):
    """What may leave beside the adapter, and how."""

    evaluation: Release
    training_loss: Literal["none", "exact"]
    sizes: Literal["none", "exact"]


class Require(Section):
    """Protections that a job must have; all but ``secure_sum`` unless the policy says otherwise."""

    dp: bool = True
    secret_noise: bool = True
    honest: bool = True
    secure_sum: bool = False


class Code(Section):
    """What must be installed for anything to leave, and the app bundles that may hold more than configuration."""

    version: str = ""
    sha256: str = Field("", pattern="^([0-9a-f]{64})?$")
    bundles: tuple[str, ...] = ()


class _File(Section):
    dataset: tuple[Dataset, ...] = Field(min_length=1)
    allow: Allow
    metrics: Metrics
    require: Require = Require()
    code: Code = Code()

    @model_validator(mode="after")
    def _distinct(self) -> _File:
        names = [dataset.name for dataset in self.dataset]
        if len(set(names)) < len(names):
            raise ValueError("two datasets have the same name")
        return self


@dataclass(frozen=True)
class Rule:
    """A statement of a policy: its file, its line there (0 where it is a default), and its text."""

    file: str
    line: int
    text: str
    shown: str

    def __str__(self) -> str:
        return f"line {self.line} ({self.shown})" if self.line else f"the default {self.shown}"

    @property
    def record(self) -> dict[str, str | int]:
        """As the audit log has it."""
        return {"file": self.file, "line": self.line, "text": self.text}


class PolicyError(UserError):
    """A job asks for what ``rule`` forbids. The text may be sent: it names no file of the site."""

    def __init__(self, why: str, rule: Rule) -> None:
        super().__init__(f"the site's policy forbids it, {rule}: {why}")
        self.rule = rule


class NoPolicyError(PrivateError):
    """There is no policy, or a broken one: nothing leaves. The text is for the site; ``sent`` is what others hear."""

    def __init__(self, text: str, sent: str) -> None:
        super().__init__(text)
        self.sent = sent


class Policy:
    """A site's policy as it is in ``text``; ``file`` is where it lies, for people.

    Raises :class:`NoPolicyError`, with the line and the mend, when the text is not a whole and valid policy.
    """

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.text = text
        self._found: dict[tuple[str | int, ...], tuple[int, int]] = {}
        try:
            self._values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise _broken(file, f"not valid TOML: {error}") from None
        try:
            # Strict: a text is no number here, and 1 is not true.
            self._rules = _File.model_validate(_tuples(self._values), strict=True)
        except ValidationError as error:
            # A key that is misspelt is missing too; it is the one to tell.
            first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
            raise _broken(file, _explain(first, self._line(*first["loc"]))) from None

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        return self._rules.dataset

    @property
    def allow(self) -> Allow:
        return self._rules.allow

    @property
    def metrics(self) -> Metrics:
        return self._rules.metrics

    @property
    def require(self) -> Require:
        return self._rules.require

    @property
    def code(self) -> Code:
        return self._rules.code

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def data_path(self, dataset: Dataset) -> Path:
        """Where the data lie; a relative path starts at the policy's own folder."""
        return Path(self.file).parent / dataset.path

    def rule(self, *key: str | int) -> Rule:
        """The statement that sets ``key``, such as ``("dataset", 0, "max_epsilon")``."""
        value: Any = self._rules
        for part in key:
            value = value[part] if isinstance(part, int) else getattr(value, part)
        name = str(key[-1])
        shown = name if name in ("dataset", "path") else f"{name} = {_toml(value)}"
        start, end = self._lines(key)
        # The default of a key that is not there has no line.
        text = " ".join(line.strip() for line in self.text.split("\n")[start - 1 : end]) if start else shown
        return Rule(self.file, start, text, shown)

    # What a job may not do

    def dataset_of(self, config: RunConfig, site: str, chosen: str = "") -> Dataset:
        """The dataset that a job trains on: ``chosen`` by the site, else what the job names, else the only one.

        Raises :class:`PolicyError`.
        """
        entry = config.site(site)
        asked = chosen or (entry.dataset if entry is not None else "")
        if not asked and len(self.datasets) == 1:
            return self.datasets[0]
        for dataset in self.datasets:
            if dataset.name == asked:
                return dataset
        mend = 'the site gives dataset="NAME" in its node configuration, or the job in its entry of data.sites'
        raise PolicyError(f"no dataset is called `{asked}`; {mend}", self.rule("dataset"))

    def objections(self, config: RunConfig, fingerprint: str, dataset: Dataset) -> Iterator[PolicyError]:
        """Everything that forbids the job ``config`` with the base model ``fingerprint``, before anything is read."""
        privacy, at = config.privacy, self.datasets.index(dataset)

        def no(why: str, *key: str | int) -> PolicyError:
            return PolicyError(why, self.rule(*key))

        if self.code.version not in ("", __version__):
            yield no(f"fedgraft {__version__} is installed at the site", "code", "version")
        if self.code.sha256 and self.code.sha256 != installed_digest():
            yield no(f"the fedgraft installed at the site has the hash {installed_digest()}", "code", "sha256")
        if self.require.dp and not privacy.enabled:
            yield no("the job trains without differential privacy (privacy.enabled = false)", "require", "dp")
        if privacy.enabled:
            # What a year allows hangs on what was spent before it: the ledger holds that limit.
            if privacy.epsilon > dataset.max_epsilon:
                yield no(f"the job asks for privacy.epsilon {privacy.epsilon:g}", "dataset", at, "max_epsilon")
            if privacy.delta > dataset.max_delta:
                yield no(f"the job asks for privacy.delta {privacy.delta:g}", "dataset", at, "max_delta")
            if _UNITS.index(privacy.unit) < _UNITS.index(dataset.min_unit):
                yield no(f"the job protects each {privacy.unit} only (privacy.unit)", "dataset", at, "min_unit")
            if self.require.secret_noise and privacy.seeded_noise_not_private:
                yield no("the job's noise comes from its seed", "require", "secret_noise")
            if not _listed(privacy.engine, self.allow.engines):
                yield no(f"the job asks for privacy.engine {privacy.engine}", "allow", "engines")
        if self.require.secure_sum and not config.secure_sum.enabled:
            yield no("the job sends each update in the open (secure_sum.enabled = false)", "require", "secure_sum")
        attacker = next((s.name for s in config.data.sites if s.attack), "") if self.require.honest else ""
        if attacker:
            yield no(f"the job has site {attacker} attack (data.sites[].attack)", "require", "honest")
        if dataset.patient_column and config.data.patient_column != dataset.patient_column:
            yield no(
                f"the job takes the column `{config.data.patient_column}` for the patient (data.patient_column)",
                *("dataset", at, "patient_column"),
            )
        if not _listed(fingerprint, self.allow.base_models):
            yield no(f"the job's base model has the fingerprint {fingerprint}", "allow", "base_models")
        if not _listed(config.method.name, self.allow.methods):
            yield no(f"the job's method is {config.method.name}", "allow", "methods")
        for key, path in (("mask", config.method.mask), *(("experts", path) for path in config.method.experts)):
            # Whether a file is there, and what is wrong with it, is told in a refusal. `..` must not leave a folder.
            if path and not _listed(os.path.normpath(path), self.allow.files):
                yield no(f"the job has the site open {path} (method.{key})", "allow", "files")
        # A strategy of somebody's own module is code: a pattern for all names does not stand for it.
        own = config.strategy.startswith(_MODULE) and config.strategy.count(":") > 1
        if not _listed(config.strategy, [p for p in self.allow.strategies if p.startswith(_MODULE) or not own]):
            yield no(f"the job's strategy is {config.strategy}", "allow", "strategies")
        if exceeds(config.evaluation_release, self.metrics.evaluation):
            yield no(
                f"the job asks for evaluation counts that are {config.evaluation_release} (evaluate.release)",
                *("metrics", "evaluation"),
            )
        if not privacy.enabled and self.metrics.training_loss == "none":
            yield no("without differential privacy the training loss would leave", "metrics", "training_loss")
        if self.metrics.sizes == "none":
            yield no("every answer tells how many records and units there are", "metrics", "sizes")

    def admit(self, config: RunConfig, fingerprint: str, dataset: Dataset) -> None:
        """Raise the first of :meth:`objections`."""
        for objection in self.objections(config, fingerprint, dataset):
            raise objection

    def require_tensors(self, names: Iterable[str]) -> None:
        """Raise :class:`PolicyError` for the first tensor that may not leave."""
        for name in names:
            if not _listed(name, self.allow.tensors):
                raise PolicyError(f"the job's adapter would carry the tensor {name} out", self.rule("allow", "tensors"))

    def require_units(self, records: int, patients: int, dataset: Dataset) -> None:
        """Raise :class:`PolicyError` for too few of the policy's units to train on; it does not say how many."""
        if (patients if dataset.min_unit == "patient" else records) < dataset.min_units:
            at = self.datasets.index(dataset)
            raise PolicyError("there are fewer to train on", self.rule("dataset", at, "min_units"))

    def limits(self, dataset: Dataset) -> dict[Limit, Rule]:
        """What may be spent on ``dataset``, for the ledger: adding or removing one unit, by the tight accountant."""
        at = self.datasets.index(dataset)
        found = {}
        for key in ("max_epsilon", "max_epsilon_per_year"):
            if math.isfinite(most := getattr(dataset, key)):
                rule = self.rule("dataset", at, key)
                source = f"the site's policy allows, {rule}"
                found[Limit(most, dataset.max_delta, source, year=key != "max_epsilon")] = rule
        return found

    # Lines

    def _line(self, *key: str | int) -> int:
        """The line of ``key``, or of what encloses it where it is not there."""
        for end in range(len(key), 0, -1):
            if start := self._lines(key[:end])[0]:
                return start
        return 0

    def _lines(self, key: tuple[str | int, ...]) -> tuple[int, int]:
        """First and last line of the statement that sets ``key``, from 1; (0, 0) where there is none."""
        if key not in self._found:
            self._found[key] = self._search(key)
        return self._found[key]

    def _search(self, key: tuple[str | int, ...]) -> tuple[int, int]:
        # A file of TOML cut off after a whole statement is TOML too: the statement lies between the last cut without
        # the key and the first with it.
        lines, whole = self.text.split("\n"), 0
        for number in range(1, len(lines) + 1):
            try:
                values: Any = tomllib.loads("\n".join(lines[:number]))
            except ValueError:
                continue
            try:
                for part in key:
                    values = values[part]
            except (KeyError, IndexError, TypeError):
                whole = number
                continue
            return whole + 1, number
        return 0, 0


@lru_cache(maxsize=1)
def unrestricted() -> Policy:
    """The policy of a simulated site, which has nobody to protect: everything may leave."""
    return Policy(_UNRESTRICTED, "the simulation's policy, which allows everything")


@lru_cache(maxsize=16)
def _parsed(text: str, file: str) -> Policy:
    return Policy(text, file)


def load_policy(path: Path) -> Policy:
    """The policy at ``path``. Raises :class:`NoPolicyError` with the mend."""
    try:
        return _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    except FileNotFoundError:
        raise NoPolicyError(
            f"{path}: there is no policy, so nothing leaves; write one: fedgraft policy template > {path}",
            f"the site has no policy, so nothing leaves; write one there: fedgraft policy template > {path.name}",
        ) from None
    except (OSError, UnicodeError) as error:
        raise _broken(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _broken(file: str, why: str) -> NoPolicyError:
    return NoPolicyError(
        f"{file}: the policy is broken, so nothing leaves: {why}; see fedgraft policy template",
        f"the site's policy ({Path(file).name}) is broken, so nothing leaves; fedgraft policy check says where",
    )


def _explain(error: Any, line: int) -> str:
    key = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in error["loc"])
    where = f"line {line}: " if line else ""
    if error["type"] == "extra_forbidden":
        return f"{where}unknown key `{key}`"
    if error["type"] == "missing":
        return f"{where}`{key}` is missing"
    message = error["msg"].removeprefix("Value error, ").replace("tuple", "list")
    return f"{where}{f'`{key}`: ' if key else ''}{message}"


def exceeds(release: str, allowed: Release) -> bool:
    """Whether counts released as ``release`` (see ``evaluate.release``) tell more than ``allowed``."""
    return _MORE.index(release.removesuffix("_not_private")) > _MORE.index(allowed)


def _tuples(value: Any) -> Any:
    """``value`` with every list as a tuple, which is what strict validation takes for one."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _listed(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _toml(value: object) -> str:
    """``value`` as a person would write it, not too long to be sent."""
    if isinstance(value, float):
        return f"{value:g}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:196]} ..."
