"""Methods are found by name, and say what they are."""

from __future__ import annotations

import pytest

from fedgraft.core.errors import UserError
from fedgraft.methods import create_method, methods


def test_all_methods_are_registered_and_described() -> None:
    found = methods()
    names = [method.name for method in found]
    assert names == sorted(set(names))
    assert {"lora", "dora", "ia3", "bitfit", "prefix", "houlsby"} <= set(names)
    for method in found:
        assert method.summary and method.source
        assert create_method(method.name) is method


@pytest.mark.parametrize(
    ("name", "meant"),
    [("loar", "lora"), ("LoRA", "lora"), ("rs-lora", "rslora"), ("bit-fit", "bitfit"), ("ia-3", "ia3")],
)
def test_an_unknown_method_suggests_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(UserError) as refusal:
        create_method(name)
    assert str(refusal.value) == f"unknown method `{name}`; did you mean `{meant}`?"


def test_a_method_like_no_other_sends_to_the_list() -> None:
    with pytest.raises(UserError, match="unknown method `zzz`; `fedgraft methods` lists all there are"):
        create_method("zzz")
