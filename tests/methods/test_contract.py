"""Every method of the catalogue keeps the contract, on every model family that it fits."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

from fedgraft.core.errors import UserError
from fedgraft.methods import Method, create_method, methods
from fedgraft.simulations.contract.suite import contract_of

#: Methods that need more than a model to attach to; their own tests hold them to the contract.
APART = {"adapterfusion", "attempt", "full", "spot", "fish", "child-tuning-d", "sam", "lt-sft", "lora-prune"} | {
    "s-bitfit",
    "u-bitfit",
}


class OnFewFamilies:
    """Each method on one family, those of our own layers on two, and on all in the slow tests."""

    def pytest_generate_tests(self: Any, metafunc: pytest.Metafunc) -> None:
        if "case" not in metafunc.fixturenames:
            return
        cases = self.fitting()
        start = zlib.crc32(self.method.encode())
        quick = (
            {cases[0], cases[start % len(cases)]} if create_method(self.method).parts else {cases[start % len(cases)]}
        )
        parameters = [
            pytest.param(case, id="-".join(case), marks=[] if case in quick else [pytest.mark.slow]) for case in cases
        ]
        metafunc.parametrize("case", parameters, indirect=True)


globals().update(
    {f"Test[{m.name}]": contract_of(m, OnFewFamilies) for m in methods() if not m.refused and m.name not in APART}
)


@pytest.mark.parametrize("method", [m for m in methods() if m.refused], ids=lambda method: method.name)
def test_what_cannot_be_right_is_refused_with_its_reason(method: Method, lab: Any) -> None:
    with pytest.raises(UserError, match="cannot be trained here: ") as refusal:
        lab.attach("bert", "sequence-classification", method.name)
    assert "\n" not in str(refusal.value)
