"""Methods of the surveys in whole runs: sites side by side in one pass learn what each learns alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedgraft.simulations import run as runs
from fedgraft.simulations.execution import Execution

#: Options for tiny models. What is shared by layers, noted for others or read instead of called is where passes of
#: several sites could go wrong.
OPTIONS: dict[str, dict[str, Any]] = {
    "compacter": {},
    "pasta": {},
    "unipelt": {"width": 8},
    "pfeiffer": {"width": 8},
    "adapterdrop": {"skip": 1},
    "residual-adapter": {"width": 8},
    "parallel-adapter": {"width": 8, "beside": "both"},
    "tiny-attention": {},
    "sparse-adapter": {"width": 16},
    "propetl": {"width": 8},
    "hyperformer++": {"width": 4, "embedding": 6, "hidden": 8},
    "moelora": {"experts": 2, "embedding": 4},
    "mam": {"width": 8},
    "autopeft": {"serial": 4, "parallel": 8},
    "s4": {"width": 8, "groups": ["AL", "APB", "PBL", "AL"]},
    "propetl-lora": {},
    "kernel-wise": {"share": 2},
    "ladder-side": {"reduction": 4, "heads": 2},
    "attention-fusion": {},
}
FAST = [("pasta", False), ("compacter", True)]


@pytest.mark.parametrize(
    ("method", "private"),
    [
        pytest.param(method, private, marks=[] if (method, private) in FAST else [pytest.mark.slow])
        for method in OPTIONS
        for private in (False, True)
    ],
)
def test_sites_in_one_pass_learn_what_they_learn_alone(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path, method: str, private: bool
) -> None:
    make = tiny_federation.private if private else tiny_federation.config
    more: dict[str, Any] = {"privacy.seeded_noise_not_private": True} if private else {}
    config = make(
        **{
            "method.name": method,
            "method.options": OPTIONS[method],
            "method.virtual_tokens": 3,
            "rounds": 2,
            "train.batch_size": 8,
            **more,
        }
    )
    learnt = []
    for cohort in (1, 3):
        runs.simulate(config, tmp_path / str(cohort), execution=Execution(cohort=cohort, threads=1))
        learnt.append(load_file(tmp_path / str(cohort) / "adapter" / "adapter_model.safetensors"))
    alone, together = learnt
    for name, tensor in alone.items():
        # Libraries may sum small products in another order; what is wrong is off by far more.
        assert float((together[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name
    losses = [line["loss"] for line in tinyfederation.metrics(tmp_path / "1", "evaluate")]
    assert losses[-1] < losses[0]
