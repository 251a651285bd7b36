"""Which methods the tests of adapters and of privacy take, and on which models."""

from __future__ import annotations

import pytest

from fedgraft.simulations.contract.lab import IMAGE, LENGTHS, LM, TEXT, Case, Lab

__all__ = ["LENGTHS", "Case", "Lab"]

_ALL = ("bitfit", "dora", "ia3", "ln", "lora", "lora-sb", "prefix", "prompt", "ravan", "rslora")
_LORA = ("lora", "rslora", "dora", "lora-sb", "ravan")
#: Which methods fit which (family, task).
FITS: dict[tuple[str, str], tuple[str, ...]] = {
    ("bert", TEXT): _ALL,
    ("roberta", TEXT): _ALL,
    ("gpt2", TEXT): tuple(m for m in _ALL if m != "prompt"),
    ("llama", TEXT): tuple(m for m in _ALL if m not in ("prompt", "bitfit")),
    ("t5", TEXT): (*_LORA, "ia3", "ln"),
    ("vit", IMAGE): (*_LORA, "bitfit", "ia3", "ln"),
    ("gpt2", LM): _ALL,
    ("llama", LM): tuple(m for m in _ALL if m != "bitfit"),
}
CASES = [(family, task, method) for (family, task), methods in FITS.items() for method in methods]
UNFIT = [(family, task, method) for (family, task), fit in FITS.items() for method in _ALL if method not in fit]
#: The methods that Opacus has exact per-sample gradients for.
HOOKED = ("lora", "rslora", "lora-sb", "bitfit", "ln", "prefix")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Arguments ``fitting`` and ``unfitting``: each (family, task, method) that does; ``hooked``: those for Opacus."""
    for name, cases in (
        ("fitting", CASES),
        ("unfitting", UNFIT),
        ("hooked", [case for case in CASES if case[2] in HOOKED]),
    ):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases, ids=["-".join(case) for case in cases])
