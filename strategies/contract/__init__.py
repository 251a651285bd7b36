"""The contract of a strategy, for whoever writes one: a toy federation and the tests that every strategy passes.

Needs pytest. In a plugin's test file::

    from fedgraft.strategies.contract import StrategyContract

    class TestMine(StrategyContract):
        strategy = "mine"
"""

from .bench import Bench, BrokenContractError, toy_spec
from .suite import StrategyContract

__all__ = ["Bench", "BrokenContractError", "StrategyContract", "toy_spec"]
