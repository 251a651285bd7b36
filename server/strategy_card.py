"""What there is to know of one strategy before it is chosen: its rule, what it can do, its options, its traffic."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from ..core.adapter import AdapterSpec
from ..core.errors import UserError
from ..strategies import Aggregator, Training
from ..strategies.aggregator import find_strategy
from ..strategies.compose import secure_sum_refusal
from .traffic import BERT_BASE, SITES, adapter_of, traffic

_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "nothing"}


def row(name: str, cls: type[Aggregator]) -> dict[str, Any]:
    """One strategy as `fedgraft strategies --json` lists it."""
    return {
        "name": name,
        "summary": cls.summary,
        "equation": cls.equation,
        "source": cls.source,
        "capabilities": asdict(cls.capabilities),
        "options": options(cls),
    }


def card(
    name: str, *, model: str = "", method: str = "", rank: int = 8, labels: int = 2, sites: int = SITES
) -> dict[str, Any]:
    """Everything `fedgraft strategies show` prints. Raises :class:`UserError` for an unknown name, model or method."""
    cls = find_strategy(name)
    own = getattr(cls, "contract_spec", None)
    method = method or (own().method if own is not None else "lora")
    spec, size = adapter_of(model, method, rank, labels)
    found = {
        **row(name, cls),
        "description": "\n\n".join(_paragraphs(inspect.getdoc(cls) or "")),
        "works_with": works_with(name, cls),
        "traffic": {"model": model or BERT_BASE, "method": method, "rank": spec.rank, "adapter": spec.parameters},
    }
    found["traffic"] |= _traffic(cls, spec, size, max(sites, getattr(cls, "contract_sites", 0)))
    return found


def _traffic(cls: type[Aggregator], spec: AdapterSpec, size: int, sites: int) -> dict[str, Any]:
    """What is sent with the strategy's own options, or with those of its tests where it cannot do with its own."""
    tried: list[Mapping[str, Any]] = [{}]
    if getattr(cls, "contract_options", {}):
        tried.append(cls.contract_options)  # type: ignore[attr-defined]
    refused = ""
    for given in tried:
        try:
            options = cls.Options.model_validate(dict(given))
            counted = traffic(lambda options=options: cls(options), spec, size, sites)  # type: ignore[misc]
        except ValidationError as error:
            refused = refused or f"strategy_options.{error.errors()[0]['loc'][0]} is needed to count"
        except UserError as error:
            refused = refused or str(error)
        else:
            up, down = list(counted.up), list(counted.down)
            return {"sites": sites, "options": dict(given), "up": up, "down": down, "full_model": counted.model}
    return {"refused": refused}


def _paragraphs(text: str) -> list[str]:
    """Paragraphs on one line each, so that they wrap at the width of whoever reads; references by name alone."""
    plain = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return [" ".join(part.split()) for part in plain.split("\n\n") if part.strip()]


def works_with(name: str, cls: type[Aggregator]) -> dict[str, str]:
    """What a run may combine the strategy with: an empty text if it may, else the reason why not."""
    can = cls.capabilities
    reasons = {
        "differential privacy at the sites": _private(cls),
        "secure sum": secure_sum_refusal(name, can) or "",
        "central privacy": ("" if can.linear_sum else "it is no sum of updates")
        or ("it asks each site twice a round" if can.two_passes else ""),
        "mixed ranks": "" if can.heterogeneous_ranks else "all sites need one rank",
        "server optimiser": ("it makes new factors each round" if can.resets_state else "")
        or ("it changes the base weights too" if can.touches_base else ""),
    }
    return {key: reason.removeprefix(f"strategy `{name}` ") for key, reason in reasons.items()}


def _private(cls: type[Aggregator]) -> str:
    if cls.capabilities.needs_loss:
        return "a site chooses by its training loss, which no noise protects"
    try:
        options = cls.Options.model_validate(dict(getattr(cls, "contract_options", {})))
        rule = cls(options).local(Training(site="", round=1, steps=1, lr=0.1, private=True), {})
    except (UserError, ValidationError):
        return ""
    if rule is not None and rule.personal() is not None:
        return "it trains a second adapter on the same records, for which no budget is set aside"
    return ""


def in_words(capabilities: Mapping[str, bool]) -> list[str]:
    """What a strategy declares, a line each."""
    words = {
        "exact": ("the aggregated dW is the weighted mean of the sites' dW", "the aggregated dW is not the mean dW"),
        "linear_sum": ("needs nothing but the sum of the updates", ""),
        "needs_individual": ("looks at each site's update, and holds them until the round ends", ""),
        "heterogeneous_ranks": ("sites may differ in rank", ""),
        "touches_base": ("changes the base weights, by low-rank offsets that are sent", ""),
        "resets_state": ("gives the adapter new factors each round", ""),
        "two_passes": ("asks each site twice a round", ""),
        "needs_validation": ("scores adapters on the server's own file (server.validation)", ""),
        "needs_loss": ("a site chooses by its training loss", ""),
    }
    lines = [yes if capabilities[flag] else no for flag, (yes, no) in words.items()]
    return [line for line in lines if line]


def options(cls: type[Aggregator]) -> list[dict[str, Any]]:
    """The options of a strategy: name, kind, default, and what its class says of them."""
    said = _described(cls.Options.__doc__ or "")
    found = []
    for name, field in cls.Options.model_fields.items():
        required = field.is_required()
        found.append(
            {
                "name": name,
                "kind": kind_of(field.annotation),
                "required": required,
                "default": None if required else field.get_default(call_default_factory=True),
                "description": field.description or said.get(name, ""),
            }
        )
    return found


def _described(text: str) -> dict[str, str]:
    """From a docstring that says ``name``: what it is; ``other``: what that is."""
    flat = " ".join(text.split())
    marks = list(re.finditer(r"``(\w+)``(?: \([^)]*\))?:\s", flat))
    ends = [*(mark.start() for mark in marks[1:]), len(flat)][: len(marks)]
    return {mark[1]: flat[mark.end() : end].strip().rstrip(".;") for mark, end in zip(marks, ends, strict=True)}


def kind_of(annotation: Any) -> str:
    """A type as a person who writes TOML would call it."""
    if annotation in _KINDS:
        return _KINDS[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(kind_of(part) for part in parts)
    if origin in (list, tuple, set, frozenset):
        inner = [part for part in parts if part is not Ellipsis]
        return f"list of {kind_of(inner[0])}s" if inner else "list"
    if origin is dict or annotation is dict:
        return "section"
    if origin is not None and parts:
        return kind_of(parts[0])  # Annotated
    return getattr(annotation, "__name__", str(annotation))
