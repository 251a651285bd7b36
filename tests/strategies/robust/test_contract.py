"""The contract of a strategy for robust rules with other options than their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedgraft.strategies.contract import StrategyContract


class TestNormBoundOfDW(StrategyContract):
    strategy = "norm-bound"
    options: ClassVar[Mapping[str, Any]] = {"measure": "dW"}


class TestNormBoundBySites(StrategyContract):
    strategy = "norm-bound"
    options: ClassVar[Mapping[str, Any]] = {"cut_by": "sites"}


class TestKrumThenFFA(StrategyContract):
    strategy = "krum"
    options: ClassVar[Mapping[str, Any]] = {"then": "ffa", "then_options": {"basis": "random"}}
