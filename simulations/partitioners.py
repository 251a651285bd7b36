"""The partitioners of `flwr-datasets`, by the names `flwr:NAME` and with their own options, over whole patients."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from ..core.config import Section
from ..core.errors import UserError, one_line

PREFIX = "flwr:"
#: What fedgraft deals by itself.
OWN = ("iid", "dirichlet")


class Options(Section):
    """Options of a partitioner, called as `flwr-datasets` calls them."""


class Dirichlet(Options):
    alpha: float | tuple[float, ...] | None = Field(None, description="of each site; without it data.alpha")
    min_partition_size: int = Field(1, ge=0, description="drawn anew until every site has so many")
    self_balancing: bool = Field(False, description="a site that has its fair share gets no more")


class InnerDirichlet(Options):
    partition_sizes: tuple[int, ...] = Field((), description="of each site; without them all alike")
    alpha: float | tuple[float, ...] | None = Field(None, description="of each class; without it data.alpha")


class Pathological(Options):
    num_classes_per_partition: int = Field(ge=1, description="classes that a site has")
    class_assignment_mode: Literal["random", "deterministic", "first-deterministic"] = Field(
        "random", description="which classes"
    )


class Shard(Options):
    num_shards_per_partition: int | None = Field(None, ge=1, description="blocks of the sorted labels that a site gets")
    shard_size: int | None = Field(None, ge=1, description="patients or records in a block")
    keep_incomplete_shard: bool = Field(False, description="deal the last, smaller block too")


class Distribution(Options):
    distribution_array: tuple[tuple[float, ...], ...] = Field(description="a row a class, a column a site that has it")
    num_unique_labels_per_partition: int = Field(ge=1, description="classes that a site has")
    preassigned_num_samples_per_label: int = Field(0, ge=0, description="so many of each first")
    rescale: bool = Field(True, description="scale the rows to all records of the class")


class Size(Options):
    partition_sizes: tuple[int, ...] = Field(
        description="patients or records of each site, in the order of their names"
    )


class NaturalId(Options):
    partition_by: str = Field(min_length=1, description="the column of the table that says whose a record is")


class GroupedNaturalId(NaturalId):
    group_size: int = Field(ge=1, description="ids that a site has")
    mode: Literal["allow-smaller", "allow-bigger", "drop-reminder", "strict"] = Field(
        "allow-smaller", description="what becomes of the ids that are left over"
    )
    sort_unique_ids: bool = Field(False, description="neighbouring ids at one site")


class Continuous(Options):
    partition_by: str = Field(min_length=1, description="a column of numbers")
    strictness: float = Field(ge=0, le=1, description="0: by chance; 1: in the order of the column")


@dataclass(frozen=True)
class Kind:
    """A class of `flwr_datasets.partitioner`; which of the things that only a deal knows it takes."""

    name: str
    options: type[Options]
    takes: tuple[Literal["sites", "labels", "seed"], ...]


_DRAWN: tuple[Literal["sites", "labels", "seed"], ...] = ("sites", "labels", "seed")
KINDS: dict[str, Kind] = {
    "iid": Kind("IidPartitioner", Options, ("sites",)),
    "linear": Kind("LinearPartitioner", Options, ("sites",)),
    "square": Kind("SquarePartitioner", Options, ("sites",)),
    "exponential": Kind("ExponentialPartitioner", Options, ("sites",)),
    "size": Kind("SizePartitioner", Size, ()),
    "dirichlet": Kind("DirichletPartitioner", Dirichlet, _DRAWN),
    "inner-dirichlet": Kind("InnerDirichletPartitioner", InnerDirichlet, ("labels", "seed")),
    "pathological": Kind("PathologicalPartitioner", Pathological, _DRAWN),
    "shard": Kind("ShardPartitioner", Shard, _DRAWN),
    "distribution": Kind("DistributionPartitioner", Distribution, _DRAWN),
    "natural-id": Kind("NaturalIdPartitioner", NaturalId, ()),
    "grouped-natural-id": Kind("GroupedNaturalIdPartitioner", GroupedNaturalId, ()),
    "continuous": Kind("ContinuousPartitioner", Continuous, ("sites", "seed")),
}
_VERTICAL = ("vertical-even", "vertical-size")


def partitions() -> tuple[str, ...]:
    """Everything that `data.partition` may be."""
    return (*OWN, *(PREFIX + name for name in KINDS))


def check_partition(name: str, options: Mapping[str, Any]) -> Options | None:
    """The typed options of the partition ``name``; None for fedgraft's own, which have none.

    Raises :class:`UserError` with one line that names the key and the nearest right name.
    """
    if name in OWN:
        if options:
            raise UserError(
                f"data.partition_options: `{name}` has none; data.alpha and data.sizes say how skewed the sites are"
            )
        return None
    bare = name.removeprefix(PREFIX)
    if bare in _VERTICAL:
        raise UserError(
            f"data.partition `{name}` deals columns of a table, and a site here has whole records; choose one of "
            f"{', '.join(partitions())}"
        )
    if not name.startswith(PREFIX) or bare not in KINDS:
        raise UserError(f"data.partition `{name}` is unknown; {_nearest(PREFIX + bare, name, partitions())}")
    made = KINDS[bare].options
    try:
        return made.model_validate_json(json.dumps(options))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("data.partition_options", *(str(part) for part in first["loc"])))
        if first["type"] == "extra_forbidden":
            known = tuple(made.model_fields)
            told = _nearest(str(first["loc"][-1]), "", known) if known else "it has none"
            raise UserError(f"{key}: `{name}` has no such option; {told}") from None
        told = "is missing" if first["type"] == "missing" else first["msg"]
        raise UserError(f"{key}: {told} (data.partition `{name}`)") from None


def _nearest(guess: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(guess, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}"


def partition(
    name: str,
    options: Options,
    *,
    sites: int,
    labels: np.ndarray,
    alpha: float,
    column: Callable[[str], Sequence[Any]],
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Indices of the units that each site gets, ascending, one array a site.

    ``labels``: the label of each unit (a patient, or a record where none are named); ``column``: a column of the table
    by its name, one value a unit; ``alpha``: of the Dirichlet laws where ``options`` say nothing. Some partitioners
    leave units out, as their own documentation says. Raises :class:`UserError` in one line.
    """
    kind = KINDS[name.removeprefix(PREFIX)]
    try:
        datasets = importlib.import_module("datasets")
        module = importlib.import_module("flwr_datasets.partitioner")
    except ImportError:
        raise UserError(f"data.partition `{name}` needs flwr-datasets: pip install 'fedgraft[partition]'") from None
    given = {key: _plain(value) for key, value in options.model_dump().items()}
    if "alpha" in given:
        given["alpha"] = alpha if given["alpha"] is None else given["alpha"]
    if kind.name == "InnerDirichletPartitioner":
        given["partition_sizes"] = given["partition_sizes"] or [len(labels) // sites] * sites
    if kind.name == "DistributionPartitioner":
        given["distribution_array"] = np.array(given["distribution_array"], dtype=np.float64)
    units: dict[str, Any] = {"unit": np.arange(len(labels))}
    if "labels" in kind.takes:
        # Numbered without gaps, as some of the partitioners count on.
        units["label"], given["partition_by"] = np.unique(labels, return_inverse=True)[1], "label"
    elif "partition_by" in given:
        units["column"], given["partition_by"] = list(column(given["partition_by"])), "column"
    if "sites" in kind.takes:
        given["num_partitions"] = sites
    if "seed" in kind.takes:
        given["seed"] = int(rng.integers(2**31))
    # Several of them deal the units in the order in which they stand.
    order = rng.permutation(len(labels))
    try:
        # One of them draws a progress bar.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            dealer = getattr(module, kind.name)(**given)
            dealer.dataset = datasets.Dataset.from_dict(
                {key: np.asarray(values)[order] for key, values in units.items()}
            )
            count = dealer.num_partitions
            if count != sites:
                raise UserError(
                    f"data.partition `{name}` makes {count} sites of these records, data.sites has {sites}; set "
                    f"data.sites = {count}"
                )
            return [np.sort(np.asarray(dealer.load_partition(site)["unit"], dtype=np.int64)) for site in range(sites)]
    except UserError:
        raise
    except Exception as error:
        # The library raises what comes to hand: ValueError, TypeError, KeyError, AssertionError.
        said = one_line(error).removeprefix("ValueError: ")[:300]
        raise UserError(f"data.partition_options: `{name}` cannot deal these records: {said}") from None


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
