"""Every method of the catalogue keeps the contract, on every model family that it fits."""

from __future__ import annotations

import zlib

import pytest

from fedgraft.methods import methods
from fedgraft.simulations.contract.suite import MethodContract, contract_of

#: Methods that need more than a model to attach to; their own tests hold them to the contract.
APART = {"adapterfusion", "full", "fish", "child-tuning-d", "sam", "lt-sft"}

globals().update({f"Test[{m.name}]": contract_of(m) for m in methods() if not m.refused and m.name not in APART})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each method on two families, and on all in the slow tests."""
    cls = metafunc.cls
    if cls is None or not issubclass(cls, MethodContract) or "case" not in metafunc.fixturenames:
        return
    cases = cls.fitting()
    start = zlib.crc32(cls.method.encode())
    quick = {cases[0], cases[1 + start % (len(cases) - 1)]} if len(cases) > 1 else set(cases)
    parameters = [
        pytest.param(case, id="-".join(case), marks=[] if case in quick else [pytest.mark.slow]) for case in cases
    ]
    metafunc.parametrize("case", parameters, indirect=True)


@pytest.mark.parametrize("method", [m for m in methods() if m.refused], ids=lambda method: method.name)
def test_what_cannot_be_right_is_refused_with_its_reason(method, lab) -> None:
    from fedgraft.core.errors import UserError

    with pytest.raises(UserError, match="cannot be trained here: ") as refusal:
        lab.attach("bert", "sequence-classification", method.name)
    assert "\n" not in str(refusal.value)
