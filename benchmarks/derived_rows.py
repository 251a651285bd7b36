"""A private step by how many numbers of derived tensors' rows go through their graphs at once (`derived._AT_ONCE`).

    python benchmarks/derived_rows.py           writes benchmarks/results/derived_rows.json and prints a line a method
    python benchmarks/derived_rows.py --quick   fewer repetitions, nothing written

MiniLM, 32 texts of 12 words, one thread. The steps with each limit run in turn on the same batch and trainables; the
median CPU time of each over that without a limit is compared.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from dp_cost import LABELS, base_model, batch, in_turn, private

from fedgraft.core.basemodel import BaseModel
from fedgraft.core.config import MethodConfig, TaskConfig
from fedgraft.core.tasks import create_task
from fedgraft.methods import attach
from fedgraft.privacy.engine import derived

RESULTS = Path(__file__).parent / "results" / "derived_rows.json"
METHODS = ("said", "glora", "waveft", "frod", "loha", "vblora")
LIMITS = {"2^17": 2**17, "2^19": 2**19, "2^21": 2**21, "2^23": 2**23, "none": 2**62}
WORDS = 12


def compared(method: str, repeats: int) -> dict[str, float]:
    """Median seconds of a private step with each limit."""
    task = create_task(TaskConfig(name="sequence-classification", labels=[str(n) for n in range(LABELS)]))
    described = BaseModel(base_model("minilm").requires_grad_(False), None, "", ("classifier",), 0, 0)
    network = attach(described, MethodConfig(name=method), task, seed=0).model.eval()
    trainables = {name: p for name, p in network.named_parameters() if p.requires_grad}
    data = {key: value[:, :WORDS] if value.dim() == 2 else value for key, value in batch().items()}
    with private("exact", network, trainables, data) as step:

        def limited(limit: int) -> Callable[[], None]:
            def run() -> None:
                derived._AT_ONCE = limit
                step()

            return run

        return in_turn({name: limited(limit) for name, limit in LIMITS.items()}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; nothing is written")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    repeats = 2 if given.quick else 5
    found = {}
    for method in METHODS:
        seconds = compared(method, repeats)
        ratios = {name: round(value / seconds["none"], 3) for name, value in seconds.items()}
        found[method] = {"seconds without": round(seconds["none"], 3), "over that": ratios}
        print(method, json.dumps(found[method]), flush=True)
    if not given.quick:
        machine = {"threads": 1, "torch": torch.__version__, "repeats": repeats}
        RESULTS.write_text(json.dumps({"machine": machine, "methods": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
