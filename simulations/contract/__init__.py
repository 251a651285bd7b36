"""The contract of a PEFT method, for whoever writes one: tiny models and the tests that every method passes.

In a plugin's test file, where there is pytest::

    from fedgraft.simulations.contract import MethodContract

    class TestMine(MethodContract):
        method = "mine"
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .suite import MethodContract

__all__ = ["MethodContract"]


def __getattr__(name: str) -> Any:
    # The tiny models are of use where there is no pytest.
    if name == "MethodContract":
        from .suite import MethodContract

        return MethodContract
    raise AttributeError(name)
