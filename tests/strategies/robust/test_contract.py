"""The contract of a strategy, for every robust rule and for combinations that a user may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedgraft.strategies.contract import StrategyContract


class TestKrum(StrategyContract):
    strategy = "krum"


class TestMultiKrum(StrategyContract):
    strategy = "multi-krum"


class TestBulyan(StrategyContract):
    strategy = "bulyan"


class TestMedian(StrategyContract):
    strategy = "median"


class TestTrimmedMean(StrategyContract):
    strategy = "trimmed-mean"


class TestGeometricMedian(StrategyContract):
    strategy = "geometric-median"


class TestFLTrust(StrategyContract):
    strategy = "fltrust"


class TestNormBound(StrategyContract):
    strategy = "norm-bound"


class TestNormBoundOfDW(StrategyContract):
    strategy = "norm-bound"
    options: ClassVar[Mapping[str, Any]] = {"measure": "dW"}


class TestKrumThenFFA(StrategyContract):
    strategy = "krum"
    options: ClassVar[Mapping[str, Any]] = {"then": "ffa", "then_options": {"basis": "random"}}
