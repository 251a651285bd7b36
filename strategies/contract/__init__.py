"""The contract of a strategy, for whoever writes one: a toy federation and the tests that every strategy passes.

In a plugin's test file, where there is pytest::

    from fedgraft.strategies.contract import StrategyContract

    class TestMine(StrategyContract):
        strategy = "mine"
"""

from typing import TYPE_CHECKING, Any

from .bench import Bench, BrokenContractError, toy_spec

if TYPE_CHECKING:
    from .suite import StrategyContract

__all__ = ["Bench", "BrokenContractError", "StrategyContract", "toy_spec"]


def __getattr__(name: str) -> Any:
    # The toy federation is of use where there is no pytest.
    if name == "StrategyContract":
        from .suite import StrategyContract

        return StrategyContract
    raise AttributeError(name)
