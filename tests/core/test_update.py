from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.update import PrivacyStatement, Update

STATE = AdapterState(AdapterSpec("m", (TensorSpec("a", (1,)),)), {"a": np.ones(1, "f4")})


def test_an_update_promises_nothing_unless_it_says_so():
    update = Update("north", STATE, 3.0)
    assert update.privacy == PrivacyStatement(enabled=False) and update.metrics == {}


def test_updates_and_statements_do_not_change():
    for target, name in ((Update("north", STATE, 3.0), "weight"), (PrivacyStatement(True), "epsilon")):
        with pytest.raises(FrozenInstanceError):
            setattr(target, name, 0.0)


def test_a_statement_is_made_of_what_a_record_of_flower_can_hold():
    assert {type(value) for value in asdict(PrivacyStatement(True)).values()} == {bool, str, float, int}
