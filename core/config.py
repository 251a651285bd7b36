"""The typed run configuration: a TOML file, ``--set key=value`` overrides, and nothing that is not declared here.

One :class:`RunConfig` describes a whole run. It is immutable, it round-trips through JSON (the server sends it to the
sites) and its digest identifies it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from .errors import UserError

TensorPolicy = Literal["share", "local", "freeze", "odd", "even"]


class Section(BaseModel):
    """A part of the configuration: immutable, and without undeclared keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("Input should be a number")
        return value

    def to_json(self) -> str:
        return self.model_dump_json()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copied = super().model_copy(update=update, deep=deep)
        # What the original came to, and has kept, says nothing of a changed copy.
        for kept in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[kept]
        return copied


def _as_json(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` as they will arrive at a site, where they must mean the same."""
    try:
        return json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError):
        raise ValueError("values are finite numbers, texts, true or false, or lists or sections of these") from None


class MethodConfig(Section):
    """Which PEFT method, and how large."""

    name: str = Field("lora", description="a method of `fedgraft methods`")
    rank: int = Field(8, ge=1, description="LoRA rank r")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha; the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the LoRA factors")
    target_modules: tuple[str, ...] = Field(
        (), fail_fast=True, description="module names; empty: the method's default for the model"
    )
    layers: tuple[int, ...] = Field((), fail_fast=True, description="layer indices to adapt; empty: all (LoRA family)")
    virtual_tokens: int = Field(20, ge=1, description="length of a prefix or prompt")
    init: Literal["", "svd", "orthonormal"] = Field(
        "", description="A (and a frozen B) from the base weight's singular vectors, or drawn; empty: the method's own"
    )
    heads: int = Field(0, ge=0, description="heads of ravan; 0: four")
    experts: tuple[str, ...] = Field(
        (), fail_fast=True, description="PEFT folders of the adapters that adapterfusion attends over"
    )
    mask: str = Field("", description="file that names the weights to train or keep, from `fedgraft methods mask`")
    options: dict[str, Any] = Field(
        default_factory=dict, description="options of the method's own, see `fedgraft methods show NAME`"
    )

    @field_validator("options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        return _as_json(options)


class TaskConfig(Section):
    """What is learned, and what an example looks like."""

    name: str = Field("sequence-classification", description="or causal-lm, image-classification")
    labels: tuple[str, ...] = Field(
        (), fail_fast=True, description="the label set, in order; empty: the data source's own"
    )
    max_length: int = Field(64, ge=2, description="tokens kept of a text")

    @field_validator("labels")
    @classmethod
    def _unique(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        twice = [label for i, label in enumerate(labels) if label in labels[:i]]
        if twice:
            raise ValueError(f"the label `{twice[0]}` is listed twice")
        return labels


class TrainConfig(Section):
    """The local optimiser of a site."""

    local_steps: int = Field(6, ge=1, description="optimiser steps a site takes in a round")
    batch_size: int = Field(
        32, ge=1, description="logical batch; under DP the expected Poisson batch, in privacy units"
    )
    micro_batch: int = Field(64, ge=1, description="examples in one forward pass (gradient accumulation)")
    lr: float = Field(0.1, gt=0, description="learning rate")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="starts afresh every round")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD only")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty (SGD), decoupled (AdamW)")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="over all steps of the run")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up, at the start of the run")
    max_grad_norm: float = Field(0.0, ge=0, description="clip the batch gradient; without DP only; 0: do not")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast of the forward pass")
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    base_dropout: bool = Field(False, description="keep the base model's own dropout active while training")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")


class PrivacyConfig(Section):
    """The promise to the people in the data. On unless switched off by name."""

    enabled: bool = Field(True, description="false: nothing is promised, and the report says so")
    epsilon: float = Field(8.0, gt=0, description="budget of each site for the whole run")
    delta: float = Field(1e-5, gt=0, lt=1, description="below 1 / units of every site")
    unit: Literal["record", "patient"] = Field("record", description="whose data the promise protects")
    neighbours: Literal["add_remove", "replace_one"] = Field(
        "add_remove", description="data sets to be told apart: one unit more or less, or one replaced"
    )
    records_per_patient: int = Field(1, ge=1, description="most records that a sampled patient gives a step")
    patient_gradient: Literal["mean", "sum"] = Field(
        "mean", description="what of a patient's records is clipped, once: the mean of their gradients, or the sum"
    )
    sampler: Literal["poisson", "truncated_poisson", "cyclic"] = Field(
        "poisson", description="how a step's units are drawn; cyclic: in turn, for sites that cannot sample"
    )
    max_batch: int = Field(0, ge=0, description="most units a step, for truncated_poisson")
    bands: int = Field(1, ge=1, description="correlated noise over so many steps (banded matrix); 1: independent")
    clip: float = Field(1.0, gt=0, description="L2 bound C on one unit's gradient; with clip_quantile the first one")
    clip_quantile: float = Field(0.0, ge=0, lt=1, description="adapt C to this quantile of the norms; 0: C is fixed")
    clip_rate: float = Field(0.2, gt=0, description="how fast C adapts")
    noise_multiplier: float = Field(0.0, ge=0, description="noise std over clip; 0: the least that keeps epsilon")
    engine: Literal["exact", "opacus"] = Field(
        "exact", description="who computes per-sample gradients: fedgraft, or Opacus where it is right"
    )
    accountant: Literal["pld", "rdp"] = Field("pld", description="pld is tight; rdp is looser, never below the truth")
    seeded_noise_not_private: bool = Field(False, description="noise and sampling from `seed`: for tests, NOT private")


class CentralConfig(Section):
    """Client-level privacy that the server adds: whether a site took part at all. Off unless asked for."""

    enabled: bool = Field(False, description="noise the aggregate; the server is trusted for this one")
    epsilon: float = Field(8.0, gt=0, description="budget of the whole run, for a site's whole contribution")
    delta: float = Field(1e-3, gt=0, lt=1, description="below 1 / sites")
    clip: float = Field(1.0, gt=0, description="L2 bound on one site's change; with clip_quantile the first one")
    clip_quantile: float = Field(0.0, ge=0, lt=1, description="adapt the bound to this quantile; 0: it is fixed")
    clip_rate: float = Field(0.2, gt=0, description="how fast the bound adapts")
    noise_multiplier: float = Field(0.0, ge=0, description="noise std over clip; 0: the least that keeps epsilon")
    sampling_rate: float = Field(1.0, gt=0, le=1, description="chance of each site to be asked in a round")
    seeded_noise_not_private: bool = Field(False, description="noise and sampling from `seed`: for tests, NOT private")


class SecureSumConfig(Section):
    """A sum of the sites' updates of which the server learns nothing but the sum. Off unless asked for."""

    enabled: bool = Field(False, description="mask every update; the masks cancel in the sum, see docs/secure-sum.md")
    threshold: int = Field(
        0, ge=0, description="sites that must be left in a round, or nothing is unmasked; 0: more than two thirds"
    )
    bits: Literal[32, 64] = Field(64, description="of a number on the wire; 32: half the bytes, and less exact")
    range: float = Field(8.0, gt=0, description="the most that a number changes by in a round; more counts as that")
    most_records: int = Field(
        1 << 20, ge=1, description="the largest weight of a site; the nearer the weights are, the more exact the sum"
    )


class ServerConfig(Section):
    """Rounds and the wire."""

    quorum: int = Field(0, ge=0, description="sites that must answer in a round; 0: all")
    sites_per_round: int = Field(
        0, ge=0, description="sites that train in a round, drawn anew each round from `seed`; 0: all"
    )
    round_timeout: float = Field(3600.0, gt=0, description="seconds to wait for a round's answers")
    late: Literal["drop", "staleness"] = Field(
        "drop", description="a result that comes after its round: dropped, or counted in a later one, less by its age"
    )
    staleness_exponent: float = Field(
        0.5, ge=0, le=10, description="a of server.late staleness: a result t rounds late weighs (1 + t)^-a as much"
    )
    max_staleness: int = Field(
        2, ge=1, description="most rounds that a result may be late under server.late staleness; then it is dropped"
    )
    join_timeout: float = Field(120.0, gt=0, description="seconds to wait for the sites to appear")
    wire_dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="dtype of the tensors on the wire")
    upload: Literal["plain", "int8", "topk"] = Field(
        "plain", description="what a site sends: its tensors, or its change rounded by chance to int8, or its largest"
    )
    top_fraction: float = Field(0.1, gt=0, le=1, description="share of the numbers that topk sends")
    entropy_coding: bool = Field(False, description="compress messages losslessly where that makes them smaller")
    optimizer: Literal["avg", "momentum", "adam", "yogi", "adagrad"] = Field(
        "avg", description="what the server does with the aggregated change; avg: takes it as it is"
    )
    lr: float = Field(1.0, gt=0, description="learning rate of server.optimizer")
    momentum: float = Field(0.9, ge=0, lt=1, description="of server.optimizer: momentum, or Adam's and Yogi's beta 1")
    beta2: float = Field(0.99, ge=0, lt=1, description="of server.optimizer: Adam's and Yogi's beta 2")
    tau: float = Field(1e-3, gt=0, description="of server.optimizer: what keeps the adaptive ones from dividing by 0")
    validation: str = Field("", description="CSV, JSONL or Parquet file of the server's own, to score adapters on")
    keep_checkpoints: int = Field(3, ge=1, description="how many of the last rounds' checkpoints stay")

    @property
    def most_late(self) -> int:
        """Rounds that a result may be late and still count; 0: it may not."""
        return self.max_staleness if self.late == "staleness" else 0


class EvaluateConfig(Section):
    """Local evaluation on each site's held-out records."""

    every: int = Field(1, ge=0, description="evaluate after every n-th round; 0: only before and after the run")
    batch_size: int = Field(128, ge=1, description="examples in one forward pass")
    release: Literal["auto", "noised", "exact_not_private", "none"] = Field(
        "auto",
        description="counts over held-out records: noised and paid for (auto: under DP), exact (auto: without), none",
    )
    epsilon: float = Field(0.0, ge=0, description="budget of a held-out unit for all evaluations; 0: privacy.epsilon")


#: What a shift may be, for texts and for images, and which of them have an opposite.
TEXT_SHIFTS = ("abbreviations", "dialect", "typos", "capitals")
IMAGE_SHIFTS = ("rotate", "contrast", "brightness", "blur", "noise", "invert")
TWO_WAY_SHIFTS = ("rotate", "contrast", "brightness")


class ShiftConfig(Section):
    """Inputs that look different at a site: its scanner, its way of writing."""

    kind: Literal[
        "",
        "none",
        "abbreviations",
        "dialect",
        "typos",
        "capitals",
        "rotate",
        "contrast",
        "brightness",
        "blur",
        "noise",
        "invert",
    ] = Field("", description="what differs, see docs/scenarios.md; none: nothing, also where others differ")
    strength: float = Field(
        0.0, ge=-1, le=1, description="of `data.shift`: the most, each site's is drawn; of a site: its own"
    )

    @model_validator(mode="after")
    def _possible(self) -> ShiftConfig:
        if self.strength and self.kind in ("", "none"):
            raise ValueError(
                f"strength {self.strength:g} of what? set kind to one of {', '.join(TEXT_SHIFTS + IMAGE_SHIFTS)}"
            )
        if self.strength < 0 and self.kind not in TWO_WAY_SHIFTS:
            raise ValueError(
                f"`{self.kind}` has no opposite: strength is 0 to 1; only {', '.join(TWO_WAY_SHIFTS)} go both ways"
            )
        return self


class LabelNoiseConfig(Section):
    """Training labels that are wrong. Held-out records keep the right ones."""

    kind: Literal["", "none", "symmetric", "asymmetric"] = Field(
        "", description="to any other class alike, or to the next one; none: all right, also where others err"
    )
    rate: float = Field(0.0, ge=0, le=1, description="share of the training records with a wrong label")

    @model_validator(mode="after")
    def _possible(self) -> LabelNoiseConfig:
        if self.rate and self.kind in ("", "none"):
            raise ValueError(f'rate {self.rate:g} of what? set kind to "symmetric" or "asymmetric"')
        return self


class SizesConfig(Section):
    """How unequal the sites are, for the partitions iid and dirichlet."""

    law: Literal["", "equal", "power", "lognormal", "fractions"] = Field(
        "",
        description="sizes fall as k^-exponent, or are drawn log-normal, or are given; empty: as the partition has it",
    )
    exponent: float = Field(1.0, gt=0, description="of the power law; the largest site is drawn, not the first")
    sigma: float = Field(1.0, gt=0, description="of the log-normal law")
    fractions: tuple[float, ...] = Field(
        (), fail_fast=True, description="each site's share of the records, in the order of their names"
    )
    minimum: int = Field(
        2, ge=1, description="patients (records, where none are named) that a site is dealt at least, for training"
    )

    @model_validator(mode="after")
    def _possible(self) -> SizesConfig:
        if (self.law == "fractions") != bool(self.fractions):
            raise ValueError('law = "fractions" and the list fractions go together')
        if self.fractions and (min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6):
            raise ValueError(f"fractions are above 0 and sum to 1, these to {sum(self.fractions):g}")
        if not self.law and self.minimum != type(self).model_fields["minimum"].default:
            raise ValueError('minimum needs a law; law = "equal" makes sites of one size')
        return self


class SiteConfig(Section):
    """One site: its name and, when the data lie in one file a site, the path."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    path: str = ""
    dataset: str = Field("", description="real sites only: the name of a dataset in its policy, where that has several")
    model: str = Field("", description="another base model than the run's; refused by the fingerprint check")
    rank: int = Field(0, ge=0, description="a rank below method.rank, for strategies that mix ranks; 0: the same")
    memory: float = Field(
        0.0, ge=0, description="GiB for training; with no rank given, the rank follows from it, see docs/strategies.md"
    )
    local_steps: int = Field(0, ge=0, description="another number of steps than train.local_steps; 0: the same")
    attack: str = Field(
        "",
        pattern=r"^(|scale:-?\d+(\.\d+)?|sign-flip(:\d+(\.\d+)?)?|random(:\d+(\.\d+)?)?|nan|backdoor:.+)$",
        description="simulations only: what it sends for its change: scale:10, sign-flip:5, random:10, nan, or "
        "backdoor:LABEL, see docs/faults.md",
    )
    shift: ShiftConfig = Field(ShiftConfig(), description="simulations only: in place of `data.shift`")
    label_noise: LabelNoiseConfig = Field(
        LabelNoiseConfig(), description="simulations only: in place of `data.label_noise`"
    )
    joins: int = Field(1, ge=1, description="simulations only: first round that it is there")
    leaves: int = Field(0, ge=0, description="simulations only: first round that it is gone for good; 0: never")
    crashes: tuple[int, ...] = Field(
        (),
        fail_fast=True,
        description="simulations only: rounds in which its process dies in the middle of the training",
    )
    straggler: bool = Field(False, description="simulations only: every training of it is late")
    speed: float = Field(
        0.0, ge=0, description="simulations only: steps in the time of one; 0: drawn with simulation.speed_spread"
    )
    uplink: float = Field(0.0, ge=0, description="simulations only: Mbit/s; 0: as simulation.uplink says")
    downlink: float = Field(0.0, ge=0, description="simulations only: Mbit/s; 0: as simulation.downlink says")

    @field_validator("crashes", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @model_validator(mode="after")
    def _in_order(self) -> SiteConfig:
        if self.leaves and self.leaves <= self.joins:
            raise ValueError(f"leaves = {self.leaves} is not after joins = {self.joins}")
        if any(number < 1 for number in self.crashes):
            raise ValueError("crashes lists rounds, which begin with 1")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_simulated(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Every instruction carries the entries of all sites: of thousands, most have no fate of their own.
        values: dict[str, Any] = plain(self)
        fields = type(self).model_fields
        return {
            key: value
            for key, value in values.items()
            if key not in (*SEEN, *FATES) or getattr(self, key) != fields[key].default
        }

    @property
    def simulated(self) -> tuple[str, ...]:
        """The keys that are set and that only a simulation obeys."""
        fields = type(self).model_fields
        return tuple(key for key in ("attack", *SEEN, *FATES) if getattr(self, key) != fields[key].default)


#: What a simulation makes of a site's records: keys of :class:`SiteConfig`.
SEEN = ("shift", "label_noise")
#: What happens to a site, or how fast it is: keys of :class:`SiteConfig` that only a simulation obeys.
FATES = ("joins", "leaves", "crashes", "straggler", "speed", "uplink", "downlink")


class BackdoorConfig(Section):
    """What the attackers with `attack = "backdoor:LABEL"` do."""

    trigger: str = Field("cf", min_length=1, description="what they put before a text to have it called LABEL")
    patch: float = Field(0.2, gt=0, le=1, description="the same for an image: a white corner, of its shorter side")
    fraction: float = Field(0.5, gt=0, le=1, description="share of their training records that they stamp and relabel")
    boost: float = Field(
        0.0, ge=0, description="what they scale their change by; 0: sites / server.lr, which puts theirs in its place"
    )


class SimulationConfig(Section):
    """Faults, speeds and attackers of simulated sites, and a virtual clock. A deployment refuses them."""

    baseline: Literal["", "none", "local", "central", "full"] = Field(
        "", description="what runs in the federation's place, to compare it with; see docs/sweeps.md"
    )
    pooled: tuple[SiteConfig, ...] = Field(
        (),
        fail_fast=True,
        description="the sites whose records the one site has together, in the baselines central and full",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the rounds in which a site is away")
    availability: Literal["bernoulli", "markov", "daily"] = Field(
        "bernoulli", description="each round by itself, in outages, or by the time of the day, which differs by site"
    )
    period: float = Field(0.0, ge=0, description="rounds: of an outage on average (markov), of a day (daily)")
    seconds_per_step: float = Field(0.0, ge=0, description="virtual seconds that a local step takes at speed 1")
    seconds_per_evaluation: float = Field(0.0, ge=0, description="the same for a local evaluation")
    speed_spread: float = Field(0.0, ge=0, description="speeds are drawn log-normal around 1 with this sigma")
    uplink: float = Field(0.0, ge=0, description="Mbit/s from a site to the server; 0: takes no time")
    downlink: float = Field(0.0, ge=0, description="Mbit/s from the server to a site; 0: takes no time")
    link_spread: float = Field(0.0, ge=0, description="links are drawn log-normal around those with this sigma")
    latency: float = Field(0.0, ge=0, description="virtual seconds that any message takes, beside its bytes")
    deadline: float = Field(
        0.0, ge=0, description="virtual seconds that the server waits for answers; 0: server.round_timeout"
    )
    backdoor: BackdoorConfig = BackdoorConfig()

    @model_validator(mode="after")
    def _possible(self) -> SimulationConfig:
        if self.pooled and self.baseline not in ("central", "full"):
            raise ValueError("simulation.pooled is written by the baselines central and full; leave it out")
        away = self.dropout
        if self.availability == "bernoulli" and self.period:
            raise ValueError('simulation.period is for simulation.availability "markov" or "daily"')
        if self.availability == "markov" and (self.period < 1 or self.period < away / (1 - away)):
            raise ValueError(
                f"simulation.period {self.period:g} is too short for outages that make up {away:g} of all rounds; give "
                f"{max(1.0, away / (1 - away)):.3g} rounds or more"
            )
        if self.availability == "daily" and (self.period < 2 or away > 0.5):
            raise ValueError(
                "simulation.availability daily needs a simulation.period of 2 rounds or more and a simulation.dropout "
                "of 0.5 or less: at noon nobody is away"
            )
        return self


#: More than a machine holds, and a slip of the finger reaches.
_MOST_SITES = 1_000_000


class DataConfig(Section):
    """Where the records come from and how a simulation deals them to the sites."""

    source: str = Field("files", description="files, or a built-in source such as icd10")
    path: str = Field("", description="one CSV, JSONL, Parquet file or image folder that is dealt to the sites")
    sites: tuple[SiteConfig, ...] = Field(
        min_length=1,
        fail_fast=True,
        description="names, or tables `[[data.sites]]`, or how many (site-01, site-02, ...)",
    )
    partition: str = Field(
        "dirichlet",
        description="how one table is dealt to the sites: iid, dirichlet, or flwr:NAME of flwr-datasets, see "
        "docs/scenarios.md",
    )
    partition_options: dict[str, Any] = Field(default_factory=dict, description="options of a flwr:NAME partition")
    sizes: SizesConfig = SizesConfig()
    shift: ShiftConfig = ShiftConfig()
    label_noise: LabelNoiseConfig = LabelNoiseConfig()
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small: more skew")
    text_column: str = Field("text", description="column of the text")
    label_column: str = Field("label", description="column of the label")
    image_column: str = Field("image", description="column of the image file, relative to the table")
    patient_column: str = Field("patient", description="column of the patient key, for patient-level privacy")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="held out by patient where there is a patient column")
    max_per_class: int = Field(0, ge=0, description="training records kept of a class; 0: all")
    test_per_class: int = Field(0, ge=0, description="held-out records kept of a class; 0: all")

    @field_validator("sites", mode="before")
    @classmethod
    def _names_are_sites(cls, value: Any, info: ValidationInfo) -> Any:
        # A job lists its sites: one number in it would have whoever reads it make room for a million.
        if isinstance(value, int) and not isinstance(value, bool) and info.mode != "json":
            if not 1 <= value <= _MOST_SITES:
                raise ValueError(f"{value} sites: 1 to {_MOST_SITES:,} can be")
            return [{"name": f"site-{number:0{len(str(value))}d}"} for number in range(1, value + 1)]
        if isinstance(value, list | tuple):
            if len(value) > _MOST_SITES:
                raise ValueError(f"{len(value)} sites: 1 to {_MOST_SITES:,} can be")
            return [{"name": site} if isinstance(site, str) else site for site in value]
        return value

    @field_validator("partition_options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        return _as_json(options)

    @field_validator("sites")
    @classmethod
    def _unique(cls, sites: tuple[SiteConfig, ...]) -> tuple[SiteConfig, ...]:
        names = [site.name for site in sites]
        if len(set(names)) != len(names):
            raise ValueError("two sites have the same name")
        return tuple(sorted(sites, key=lambda site: site.name))


class RunConfig(Section):
    """A whole run."""

    name: str = Field("", description="what to call the run; empty: the configuration's file name")
    seed: int = Field(0, ge=0, lt=2**63)
    rounds: int = Field(5, ge=0, description="rounds of training and aggregation; 0: the start is evaluated")
    strategy: str = Field("fedit", description="a strategy of `fedgraft strategies`")
    strategy_options: dict[str, Any] = Field(default_factory=dict, description="options of the strategy")
    tensor_policy: dict[str, TensorPolicy] = Field(
        default_factory=dict,
        description="by pattern of the tensor's name: share, local, freeze, or odd, even (share in those rounds only)",
    )
    model: str = Field(description="package:NAME/FOLDER, builtin:NAME, a local folder, or a hub name")
    start_from: str = Field("", description="a PEFT adapter folder to start from; empty: a fresh adapter")
    method: MethodConfig = MethodConfig()
    task: TaskConfig = TaskConfig()
    train: TrainConfig = TrainConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    central: CentralConfig = CentralConfig()
    secure_sum: SecureSumConfig = SecureSumConfig()
    server: ServerConfig = ServerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    simulation: SimulationConfig = SimulationConfig()
    data: DataConfig

    @field_validator("strategy_options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        return _as_json(options)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.server.quorum > len(self.data.sites):
            raise ValueError(f"server.quorum is {self.server.quorum} but there are {len(self.data.sites)} sites")
        if self.server.sites_per_round > len(self.data.sites):
            raise ValueError(
                f"server.sites_per_round is {self.server.sites_per_round} but there are {len(self.data.sites)} sites"
            )
        if self.server.sites_per_round and self.central.enabled:
            raise ValueError(
                "server.sites_per_round draws from the seed, which central privacy must not; set "
                "central.sampling_rate instead"
            )
        fault = self._fault()
        if fault and not self.server.quorum:
            raise ValueError(
                f"{fault} lets sites miss rounds, and server.quorum 0 demands all of them; set server.quorum to the "
                "answers that make a round count, such as 1"
            )
        if self.server.late == "staleness" and self.server.quorum in (0, len(self.data.sites)):
            raise ValueError(
                'server.late "staleness" is for rounds that go on without a site, and server.quorum demands all of '
                "them; set server.quorum to fewer"
            )
        if any(site.attack == "nan" for site in self.data.sites) and (
            self.server.upload == "int8" or self.server.entropy_coding
        ):
            raise ValueError(
                'data.sites[].attack "nan": whole numbers and coded ones have no NaN; set server.upload = "plain" and '
                "server.entropy_coding = false"
            )
        if self.privacy.enabled and self.train.precision == "fp16":
            raise ValueError(
                "train.precision fp16 needs loss scaling, which would rescale the clipping; use bf16 or fp32"
            )
        if self.server.upload != "plain" and self.server.wire_dtype != "fp32":
            raise ValueError(
                f'server.upload "{self.server.upload}" sends changes of the adapter exactly as it was sent; '
                'set server.wire_dtype = "fp32"'
            )
        privacy = self.privacy
        if self.evaluate.release == "noised" and not privacy.enabled:
            raise ValueError('evaluate.release "noised" needs privacy.enabled, whose budget pays for it')
        if self.evaluate.epsilon > privacy.epsilon:
            raise ValueError(
                f"evaluate.epsilon {self.evaluate.epsilon:g} is above privacy.epsilon {privacy.epsilon:g}, which is "
                "promised to everybody"
            )
        if privacy.records_per_patient > 1 and privacy.unit != "patient":
            raise ValueError('privacy.records_per_patient needs privacy.unit = "patient"')
        if privacy.records_per_patient > self.train.micro_batch:
            raise ValueError(
                f"privacy.records_per_patient is {privacy.records_per_patient}, more than train.micro_batch "
                f"{self.train.micro_batch}: a patient's records are clipped together, so make micro_batch as large"
            )
        if (privacy.sampler == "truncated_poisson") != bool(privacy.max_batch):
            raise ValueError('privacy.max_batch and privacy.sampler = "truncated_poisson" go together')
        if privacy.max_batch and privacy.max_batch < self.train.batch_size:
            raise ValueError(
                f"privacy.max_batch {privacy.max_batch} is below train.batch_size {self.train.batch_size}, the "
                "expected batch; give a larger one"
            )
        return self

    def _fault(self) -> str:
        """A key that has sites miss rounds, or an empty text."""
        for key in ("dropout", "deadline"):
            if getattr(self.simulation, key):
                return f"simulation.{key}"
        for site in self.data.sites:
            for key in site.simulated:
                if key in ("joins", "leaves", "crashes", "straggler") or site.attack == "nan":
                    return f"data.sites[].{key} of {site.name}"
        return ""

    @cached_property
    def simulated(self) -> tuple[str, ...]:
        """The keys that are set and that only a simulation obeys."""
        plain = SimulationConfig()
        changed = [key for key in SimulationConfig.model_fields if getattr(self.simulation, key) != getattr(plain, key)]
        own = dict.fromkeys(key for site in self.data.sites for key in site.simulated)
        seen = [key for key in SEEN if getattr(self.data, key).kind]
        return (
            *(f"simulation.{key}" for key in changed),
            *(f"data.{key}" for key in seen),
            *(f"data.sites[].{key}" for key in own),
        )

    @property
    def evaluation_release(self) -> Literal["noised", "exact_not_private", "none"]:
        """What ``evaluate.release`` comes to in this run."""
        if self.evaluate.release == "auto":
            return "noised" if self.privacy.enabled else "exact_not_private"
        return self.evaluate.release

    # Thousands of sites make a long text, which is asked for with every message.
    @cached_property
    def _json(self) -> str:
        return self.model_dump_json()

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @cached_property
    def _sites(self) -> Mapping[str, SiteConfig]:
        return {site.name: site for site in self.data.sites}

    def to_json(self) -> str:
        return self._json

    def __hash__(self) -> int:
        return hash(self._json)

    @cached_property
    def site_names(self) -> tuple[str, ...]:
        return tuple(self._sites)

    def site(self, name: str) -> SiteConfig | None:
        """What is written for the site called ``name``; None where there is no such site."""
        return self._sites.get(name)

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """The rank of every site: its own, else by its memory, else the run's.

        A site with memory M and no rank has method.rank M / max M, rounded down to a power of two, and at least 1.
        """
        most = max((site.memory for site in self.data.sites), default=0.0)
        found = {}
        for site in self.data.sites:
            rank = site.rank or self.method.rank
            if site.memory and not site.rank and site.memory < most:
                rank = 2 ** max(0, math.floor(math.log2(self.method.rank * site.memory / most)))
            found[site.name] = rank
        return found

    @property
    def quorum(self) -> int:
        return self.server.quorum or len(self.data.sites)

    @property
    def total_steps(self) -> int:
        """Optimiser steps a site takes in the whole run."""
        return self.rounds * self.train.local_steps

    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return self._digest


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration, sections expanded."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _nearest(key: str) -> str:
    keys = known_keys()
    site = re.match(r"data\.sites\.\d+\.", key)
    if site:
        keys = [site[0] + name for name in SiteConfig.model_fields]
    leaf = key.rsplit(".", 1)[-1]
    match = [full for full in keys if full.rsplit(".", 1)[-1] == leaf]
    # The two promises have the same keys, and the site's own is the one that people mean.
    match = [full for full in match if f"privacy.{leaf}" not in match or full == f"privacy.{leaf}"]
    if len(match) != 1:
        match = difflib.get_close_matches(key, keys, n=1, cutoff=0.5) or match[:1]
    return f"; did you mean `{match[0]}`?" if match else "; see docs/configuration.md for the keys"


#: What pydantic says of Python, said of TOML.
_WORDS = {
    "tuple_type": 'Input should be a list, such as ["a", "b"]',
    "dict_type": "Input should be a section",
    "model_type": "Input should be a section",
    "model_attributes_type": "Input should be a section",
}


def _explain(error: ValidationError, where: str) -> UserError:
    # Of all of them, since pydantic gives no other way to the first: without what would make each large.
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UserError(f"{where}: unknown key `{key}`{_nearest(key)}")
    if first["type"] == "missing":
        return UserError(f"{where}: `{key}` is missing")
    message = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    value = first.get("input")
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool) else ""
    return UserError(f"{where}: {f'`{key}`: ' if key else ''}{message}{shown}")


def parse_config(values: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """Check a nested mapping. Raises :class:`UserError` with one line that names the key."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from None


@lru_cache(maxsize=2)
def _read(text: str) -> RunConfig:
    # Every message carries the text, and each site of a process reads it.
    return RunConfig.model_validate_json(text)


def config_from_json(text: str, where: str = "configuration") -> RunConfig:
    """The inverse of :meth:`RunConfig.to_json`, strict."""
    try:
        return _read(text)
    except ValidationError as error:
        raise _explain(error, where) from None


def _override(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {assignment}: write it as key=value")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    value = parsed["value"] if len(parsed) == 1 else text.strip()
    if (
        key in ("model", "data.path", "start_from", "server.validation", "method.mask")
        and isinstance(value, str)
        and _exists(value)
    ):
        value = str(Path(_home(value)).resolve())  # what a person types is relative to where they stand
    *parents, leaf = key.split(".")
    if parents[:1] == ["tensor_policy"]:
        parents, leaf = ["tensor_policy"], key.partition(".")[2]  # a pattern may hold dots
    free = (["strategy_options"], ["tensor_policy"], ["data", "partition_options"], ["method", "options"])
    section = isinstance(value, dict) and any(known.startswith(f"{key}.") for known in known_keys())
    if key not in known_keys() and not section and parents[:1] not in free and parents[:2] not in free:
        raise UserError(f"--set {assignment}: unknown key `{key}`{_nearest(key)}")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {assignment}: `{parent}` is not a section")
        node = child
    node[leaf] = value


def _home(path: str) -> str:
    # Path.expanduser raises where the home of a `~name` is not known.
    return os.path.expanduser(path)  # noqa: PTH111


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(_home(path)).exists()
    except (OSError, ValueError):
        return False  # too long for a path


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a TOML (or JSON) file, apply ``key=value`` overrides (values in TOML; bare words are strings), check it.

    Relative ``data.path``, ``data.sites[].path`` and ``./`` model folders are taken from the file's own folder.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a configuration file") from None
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UserError(f"{path}: not valid {kind}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no sections and keys")
    for assignment in overrides:
        _override(values, assignment)
    values.setdefault("name", path.stem)
    return _anchor(parse_config(values, str(path)), path.resolve().parent)


def _anchor(config: RunConfig, folder: Path) -> RunConfig:
    def absolute(text: str) -> str:
        return str(folder / _home(text)) if text else text

    sites = tuple(
        site.model_copy(update={"path": absolute(site.path), "model": _model_path(site.model, folder)})
        for site in config.data.sites
    )
    data = config.data.model_copy(update={"path": absolute(config.data.path), "sites": sites})
    return config.model_copy(
        update={
            "data": data,
            "model": _model_path(config.model, folder),
            "start_from": absolute(config.start_from),
            "method": config.method.model_copy(
                update={
                    "experts": tuple(map(absolute, config.method.experts)),
                    "mask": absolute(config.method.mask),
                }
            ),
            "server": config.server.model_copy(update={"validation": absolute(config.server.validation)}),
        }
    )


def _model_path(model: str, folder: Path) -> str:
    """A relative folder becomes absolute; package: and builtin: references and hub names stay as they are."""
    named = model.startswith(("package:", "builtin:"))
    beside = model and not named and _exists(str(folder / model)) and (folder / model).is_dir()
    if beside or model.startswith(("./", "../")):
        return str((folder / model).resolve())
    return model
