"""The pytest plugin: `pytest --fedgraft-strategy NAME` runs the contract of a strategy without a test file.

`--fedgraft-method NAME` runs that of a PEFT method.

It sits in every pytest of an environment that has fedgraft, so it loads nothing before it is asked for something.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fedgraft")
    group.addoption(
        "--fedgraft-strategy",
        action="append",
        default=[],
        metavar="NAME",
        help="run the contract of this strategy (`all`: of every one) instead of collecting tests; may be repeated",
    )
    group.addoption(
        "--fedgraft-method",
        action="append",
        default=[],
        metavar="NAME",
        help="run the contract of this PEFT method (`all`: of every one) instead of collecting tests; may be repeated",
    )
    group.addoption(
        "--fedgraft-options", default="{}", metavar="JSON", help="options of the strategy for --fedgraft-strategy"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> object:
    """The contracts of the strategies and methods that were named, in place of what would have been collected."""
    names = session.config.getoption("--fedgraft-strategy")
    methods = session.config.getoption("--fedgraft-method")
    if not names and not methods:
        return None
    module = _Contracts.from_parent(session, path=Path(__file__), nodeid="contract")
    module.classes = _of_methods(methods)
    if names:
        module.classes |= _classes(names, session.config.getoption("--fedgraft-options"))
    session.items = list(session.genitems(module))
    hook = session.config.hook
    hook.pytest_collection_modifyitems(session=session, config=session.config, items=session.items)
    session.testscollected = len(session.items)
    hook.pytest_collection_finish(session=session)
    return True


class _Contracts(pytest.Module):
    """A test module that is in no file: one class a strategy."""

    classes: dict[str, type]

    def _getobj(self) -> ModuleType:
        module = ModuleType("fedgraft_contracts")
        vars(module).update(self.classes)
        return module


def _classes(names: list[str], options: str) -> dict[str, type]:
    from .core.errors import UserError
    from .strategies.aggregator import create_aggregator, find_strategy, strategies
    from .strategies.contract import StrategyContract

    try:
        given = json.loads(options)
        if not isinstance(given, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise pytest.UsageError(f"--fedgraft-options {options}: {error}") from None
    found: dict[str, type] = {}
    try:
        for name in [*strategies()] if "all" in names else names:
            values: dict[str, Any] = {"strategy": name, "options": given}
            # An unknown name or option is one line, not a failure of every check.
            create_aggregator(name, {**getattr(find_strategy(name), "contract_options", {}), **given})
            found[f"Test[{name}]"] = type(f"Test[{name}]", (StrategyContract,), values)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    return found


def _of_methods(names: list[str]) -> dict[str, type]:
    if not names:
        return {}
    from .core.errors import UserError
    from .methods import create_method, methods
    from .simulations.contract.suite import contract_of

    try:
        chosen = [m for m in methods() if not m.refused] if "all" in names else [create_method(name) for name in names]
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    refused = next((method for method in chosen if method.refused), None)
    if refused is not None:
        raise pytest.UsageError(f"method {refused.name} cannot be trained: {refused.refused}")
    return {f"Test[{method.name}]": contract_of(method) for method in chosen}
