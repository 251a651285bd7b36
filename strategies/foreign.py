"""Flower's strategies, and a user's own ones for Flower, as they are: `strategy = "flwr:FedAdam"`."""

from __future__ import annotations

import importlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, get_args, get_type_hints

import flwr.serverapp.strategy as flower
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity
from pydantic import ConfigDict, create_model

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.errors import UserError, one_line
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options

PREFIX = "flwr:"
_PLAIN = (bool, int, float, str)
#: What a fedgraft site is told in other ways, or needs not be told.
_TOLD = {"server-round"}
_FIRST_NODE = 2
#: How often a strategy may look for nodes before it is taken to wait for some that never come.
_LOOKS = 6
_MEMORY = "foreign"
_MEMORY_SPEC = AdapterSpec(
    "foreign-strategy", (TensorSpec("rounds", (1,), dtype="float64", policy="freeze", parameter=False),)
)


class Foreign(Aggregator):
    """Any ``flwr.serverapp.strategy.Strategy``: it picks the sites of a round, and makes one state of their answers.

    Its keyword arguments are the ``strategy_options``. Each round it is asked to configure the training (it may pick
    sites), and to aggregate one message a site: the shared tensors by name, and as metrics the number of records (under
    the strategy's ``weighted_by_key``) and what else the site declared. Refused: a strategy that tells the sites
    something (FedProx and its ``proximal-mu``: a fedgraft site would not heed it) or sends them other arrays.

    What is not right about Flower's own for adapters: they average A and B apart, so the mean of dW is missed; Krum and
    its kin measure distances on the factors, which a rotation of the factors changes; sums run in the tensors' float32,
    where a small site beside a large one is rounded away; every update is held until the round ends; and FedAdam
    corrects the bias of its moments for one round more than there was. The sites of a round are drawn from Python's
    global ``random``, so a fraction below 1 makes a run that cannot be repeated.

    A strategy's own state (moments) is in no checkpoint. A run whose strategy holds nothing but plain settings goes on
    as it was; any other is refused when it is resumed, and must be begun anew.
    """

    foreign: ClassVar[type[Strategy]]
    capabilities = Capabilities(needs_individual=True)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        given = self.options.model_dump(exclude_unset=True)
        self._strategy: Strategy = self._safely("cannot be made", lambda: self.foreign(**given))
        self._fresh = dict(vars(self._strategy))
        self._rounds = 0
        self._state: AdapterState | None = None
        self._configured = False
        self._answers: list[tuple[AdapterState, dict[str, float]]] = []

    def start_round(self, state: AdapterState) -> None:
        self._state, self._configured, self._answers = state, False, []

    def asked(self, sites: Sequence[str]) -> Sequence[str]:
        """The sites that the strategy picks."""
        for key in ("min_available_nodes", "min_train_nodes"):
            least = getattr(self._strategy, key, 0)
            if isinstance(least, int) and least > len(sites):
                raise UserError(
                    f"strategy `{self.name}` waits for {least} sites, the run has {len(sites)}; set "
                    f"strategy_options.{key}"
                )
        nodes = {site: _FIRST_NODE + number for number, site in enumerate(sorted(sites))}
        messages = self._configure(nodes.values())
        picked = {message.metadata.dst_node_id for message in messages}
        return [site for site in sites if nodes[site] in picked]

    def add(self, update: Update) -> None:
        if self._state is None:
            raise UserError(f"{update.site}: sent an update before the round began")
        if not (update.weight > 0 and np.isfinite(update.weight)):
            raise UserError(f"the weight of an update is {update.weight}; it must be a positive number")
        # Names, shapes and types are those that the site was sent.
        spec = self._state.spec
        AdapterState(spec, dict(update.state), names=spec.select("share")).require_finite()
        if update.state.spec.pairs != spec.pairs:
            raise UserError(
                f"{update.site}: scales or lays out its low-rank factors differently; set method.alpha alike"
            )
        key = str(getattr(self._strategy, "weighted_by_key", "num-examples"))
        metrics = {**update.metrics, key: float(update.weight)}
        loss = getattr(self._strategy, "train_loss_key", None)
        if isinstance(loss, str) and "loss" in update.metrics:
            metrics[loss] = update.metrics["loss"]
        self._answers.append((update.state, metrics))

    def result(self) -> AdapterState:
        state = self._state
        answers, self._answers = self._answers, []
        if state is None or not answers:
            raise UserError("no update arrived: there is nothing to aggregate")
        if not self._configured:
            self._configure(range(_FIRST_NODE, _FIRST_NODE + len(answers)))
        # Flower averages metrics too, and gives up where a site declared fewer than the others.
        common = set.intersection(*(set(metrics) for _, metrics in answers))
        replies = [
            self._reply(number, update, {key: value for key, value in metrics.items() if key in common})
            for number, (update, metrics) in enumerate(answers)
        ]
        arrays, _ = self._safely("failed", lambda: self._strategy.aggregate_train(self.round, replies))
        self._rounds += 1
        if arrays is None:
            raise UserError(
                f"strategy `{self.name}` made nothing of {len(replies)} updates: it needs more sites, or other options"
            )
        names = state.spec.select("share")
        made = {name: array.numpy() for name, array in arrays.items()}
        made = {name: a.astype(state[name].dtype) if name in state else a for name, a in made.items()}
        try:
            return AdapterState(state.spec, made, names=names).require_finite()
        except UserError as error:
            raise UserError(f"strategy `{self.name}` returned no adapter: {error}") from None

    def memory(self) -> Mapping[str, AdapterState]:
        """A mark that a state was lost, where there may be one."""
        now = vars(self._strategy)
        kept = all(_settled(value) and value is self._fresh.get(key, self) for key, value in now.items())
        if kept or not self._rounds:
            return {}
        return {_MEMORY: AdapterState(_MEMORY_SPEC, {"rounds": np.array([float(self._rounds)])})}

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        """Raises :class:`UserError` where the strategy's state was lost with the process that held it."""
        if _MEMORY in memory:
            raise UserError(
                f"strategy `{self.name}` keeps a state of its own, which no checkpoint holds, so the run cannot be "
                "resumed; begin anew, from its last adapter with start_from"
            )

    def _configure(self, nodes: Iterable[int]) -> list[Message]:
        """Have the strategy begin the round; what it would send is what fedgraft's own instructions say, or refused."""
        state = self._state
        if state is None:
            raise UserError("no round has begun")
        arrays = _record(state.only(state.spec.select("share")))
        before = {name: array.data for name, array in arrays.items()}
        grid = _Roll(self.name, nodes)
        _ensure_identity()
        messages = self._safely(
            "failed", lambda: list(self._strategy.configure_train(self.round, arrays, ConfigRecord(), grid))
        )
        for content in {id(message.content): message.content for message in messages}.values():
            for config in content.config_records.values():
                if told := sorted(set(config) - _TOLD):
                    raise UserError(
                        f"strategy `{self.name}` tells the sites a `{told[0]}`, which a fedgraft site does not heed; "
                        "see `fedgraft strategies` for one that does the same"
                    )
            for sent in content.array_records.values():
                if {name: array.data for name, array in sent.items()} != before:
                    raise UserError(f"strategy `{self.name}` sends the sites other arrays than the global adapter's")
        self._configured = True
        return messages

    def _reply(self, number: int, state: AdapterState, metrics: Mapping[str, float]) -> Message:
        # Flower takes the sender from the running task; these are as if of the sites.
        metadata = Metadata(
            run_id=1,
            message_id=f"{self.round}-{number}",
            src_node_id=_FIRST_NODE + number,
            dst_node_id=1,
            reply_to_message_id=f"to-{self.round}-{number}",
            group_id=str(self.round),
            created_at=time.time(),
            ttl=1.0,
            message_type="train",
        )
        key = str(getattr(self._strategy, "arrayrecord_key", "arrays"))
        content = RecordDict({key: _record(state), "metrics": MetricRecord(dict(metrics))})
        return Message(content=content, metadata=metadata)  # type: ignore[call-overload]

    def _safely(self, what: str, call: Callable[[], Any]) -> Any:
        """Foreign code may fail in any way: whatever it raises is one line that names it."""
        log = logging.getLogger("flwr")
        level = log.level
        try:
            # What Flower tells of every round, fedgraft tells in its own way.
            log.setLevel(logging.ERROR)
            return call()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"strategy `{self.name}` {what}: {one_line(error)}") from None
        finally:
            log.setLevel(level)


class _Roll(Grid):
    """The sites of the run, as the nodes of a grid on which nothing can be sent."""

    def __init__(self, name: str, nodes: Iterable[int]) -> None:
        self._name, self._nodes, self._looks = name, list(nodes), 0

    def get_node_ids(self) -> Iterable[int]:
        self._looks += 1
        if self._looks > _LOOKS:
            raise UserError(f"strategy `{self._name}` waits for more than the {len(self._nodes)} sites of the run")
        return list(self._nodes)

    def set_run(self, run: Any) -> None:
        raise UserError(f"strategy `{self._name}` wants to change the run")

    @property
    def run(self) -> Any:
        raise UserError(f"strategy `{self._name}` asks about the run, which fedgraft leads")

    def create_message(self, *args: Any, **more: Any) -> Message:
        return Message(*args, **more)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise UserError(f"strategy `{self._name}` sends messages of its own, which fedgraft's sites do not know")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise UserError(f"strategy `{self._name}` asks for messages of its own")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        raise UserError(f"strategy `{self._name}` sends messages of its own, which fedgraft's sites do not know")


def _ensure_identity() -> None:
    """Flower's messages ask for the identity of the running task, which is set only where Flower or a grid runs."""
    try:
        _ = TaskIdentity.run_id
    except RuntimeError:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def _record(state: AdapterState) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in state.items()})


def _settled(value: object) -> bool:
    """Whether ``value`` is a plain setting, which cannot change in place."""
    return value is None or isinstance(value, _PLAIN) or inspect.isroutine(value)


@cache
def foreign(name: str) -> type[Foreign]:
    """The aggregator class of ``name``: ``flwr:CLASS`` of Flower's own, or ``flwr:package.module:CLASS``.

    Raises :class:`UserError` when there is no such class, or it is no strategy of Flower's Message API.
    """
    path = name.removeprefix(PREFIX)
    module, _, attribute = path.rpartition(":")
    if not module:
        cls = getattr(flower, attribute, None) if attribute in flower.__all__ else None
        if cls is None:
            known = ", ".join(n for n in flower.__all__ if _is_strategy(getattr(flower, n)))
            raise UserError(f"unknown strategy `{name}`; Flower has {known}; your own is {PREFIX}package.module:Class")
    else:
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a user's module may fail in any way
            raise UserError(f"strategy `{name}` cannot be loaded: {one_line(error)}") from None
    if not _is_strategy(cls):
        raise UserError(f"strategy `{name}` is no strategy of flwr.serverapp.strategy (Flower's Message API)")
    text = inspect.getdoc(cls) or cls.__name__
    return type(
        cls.__name__,
        (Foreign,),
        {
            "name": name,
            "summary": text.splitlines()[0].rstrip("."),
            "source": f"{cls.__module__}.{cls.__qualname__}",
            "foreign": cls,
            "Options": _options(name, cls),
            "__doc__": Foreign.__doc__,
        },
    )


def _is_strategy(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, Strategy) and not inspect.isabstract(cls)


def _options(name: str, cls: type[Strategy]) -> type[Options]:
    """The keyword arguments of ``cls`` that a configuration can hold: numbers, texts, true and false."""
    try:
        kinds = get_type_hints(cls.__init__)
    except Exception:  # annotations of a user's module may name anything
        kinds = {}
    fields: dict[str, Any] = {}
    extra = False
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = True
            continue
        kind = kinds.get(parameter.name, Any)
        required = parameter.default is parameter.empty
        if not _holds(kind):
            if required:
                raise UserError(f"strategy `{name}` needs a `{parameter.name}`, which no configuration can hold")
            continue
        fields[parameter.name] = (kind, ... if required else parameter.default)
    made = create_model(f"{cls.__name__}Options", __base__=Options, **fields)
    if extra:
        made.model_config = ConfigDict(extra="allow", frozen=True)
        made.model_rebuild(force=True)
    return made


def _holds(kind: Any) -> bool:
    """Whether a configuration can hold a value of ``kind``; one that is not annotated may be anything."""
    return kind is Any or kind in _PLAIN or any(part in _PLAIN for part in get_args(kind))
