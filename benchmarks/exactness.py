"""How exact clipping is: every method and every tuner of PEFT on every model family, against a loop over examples.

    python benchmarks/exactness.py          writes benchmarks/results/exactness.json and prints a table

Each case: tiny models (those of the tests), float64, five records of uneven length, a bound that cuts some of them.
Error is the norm of the difference to the sum of single, clipped gradients (plain PyTorch, one unpadded record at a
time) over the norm of that sum. A case is exact at 1e-9 or better, refused with the line shown, or not PEFT's offer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fedgraft.core.errors import UserError
from fedgraft.privacy.clipping import ExactGradients
from fedgraft.privacy.noise import RandomStream
from fedgraft.simulations.contract import tinymodels

RESULTS = Path(__file__).parent / "results" / "exactness.json"
BOUND = 1e-9
FAMILIES = ("bert", "roberta", "gpt2", "llama", "t5", "vit")


def of_the_tests(name: str) -> ModuleType:
    """A module that lies beside the tests, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tests" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"tests/{name}.py is not there: run this from a checkout")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def laboratory(scratch: Path) -> Any:
    lab = of_the_tests("lab")
    built: dict[tuple[str, str], str] = {}

    def folder(family: str, task: str) -> str:
        if (family, task) not in built:
            path = scratch / f"{family}-{task}"
            path.mkdir()
            tinymodels.build(path, family, task)
            built[family, task] = str(path)
        return built[family, task]

    def text(words: int, seed: int) -> str:
        at = torch.randint(len(tinymodels.WORDS), (words,), generator=torch.Generator().manual_seed(seed))
        return " ".join(tinymodels.WORDS[i] for i in at)

    return lab.Lab(folder, text)


def measured(lab: Any, model: nn.Module, case: tuple[str, str]) -> dict[str, Any]:
    """Error of one case, or why there is none."""
    trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if all(".modules_to_save." in name for name in trainables):
        return {"unfit": "nothing but the head trains"}
    records = lab.records(*case, lab.lengths)
    try:
        losses = (lab.losses(model, lab.batch(*case, [record])).sum() for record in records)
        rows = lab.gradients(list(trainables.values()), losses)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {"unfit": str(error).splitlines()[0][:160]}
    norms = rows.norm(dim=1)
    clip = float(norms[norms > 0].median())
    want = lab.clipped(rows, clip)
    try:
        with ExactGradients(model, trainables, clip) as engine:
            engine.expect(len(records))
            engine.add(lab.losses(model, lab.batch(*case, records)))
            engine.release(0.0, 1.0, RandomStream.seeded_not_private("exactness"))
            got = lab.flat(trainables)
    except UserError as error:
        return {"refused": str(error)}
    result: dict[str, Any] = {"error": float((got - want).norm() / want.norm())}
    if engine.one_by_one:
        result["one_by_one"] = sorted(set(engine.one_by_one.values()))[0]
    return result


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        lab, tuners = laboratory(Path(scratch)), of_the_tests("tuners")

        def add(kind: str, name: str, family: str, task: str, make: Callable[[], tuple[nn.Module, Any]]) -> None:
            entry = {"kind": kind, "name": name, "family": family, "task": task}
            try:
                model, case = make()
            except tuners.UnfitError as error:
                cases.append({**entry, "unfit": str(error).splitlines()[0][:160]})
                return
            cases.append({**entry, "task": case[1], **measured(lab, model, case)})

        for family, task, method in sys.modules["lab"].CASES:
            case = (family, task, method)
            add("method", method, family, task, lambda case=case: (lab.double(case).model, case[:2]))
        for name in tuners.TUNERS:
            for family in FAMILIES:
                add("tuner", name, family, "", lambda name=name, family=family: tuners.build(lab, name, family))
    exact = [case for case in cases if "error" in case]
    worst = max(case["error"] for case in exact)
    summary = {
        "bound": BOUND,
        "exact": len(exact),
        "worst_error": worst,
        "refused": sum("refused" in case for case in cases),
        "not_offered_by_peft": sum("unfit" in case for case in cases),
        "torch": torch.__version__,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"summary": summary, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    show(cases)
    print(json.dumps(summary, indent=1))
    if worst > BOUND:
        raise SystemExit(f"an error above {BOUND:g}")


def show(cases: list[dict[str, Any]]) -> None:
    """One line a method or tuner, one column a family: the error, `refused`, or a dash where PEFT has none."""
    print(f"{'':22}" + "".join(f"{family:>10}" for family in FAMILIES))
    for kind in ("method", "tuner"):
        for name in dict.fromkeys(case["name"] for case in cases if case["kind"] == kind):
            line = f"{name:22}"
            for family in FAMILIES:
                own = [case for case in cases if (case["kind"], case["name"], case["family"]) == (kind, name, family)]
                errors = [case["error"] for case in own if "error" in case]
                refused = any("refused" in case for case in own)
                line += f"{max(errors):10.0e}" if errors else f"{'refused' if refused else '-':>10}"
            print(line)
    for line in dict.fromkeys(f"{case['name']}: {case['refused']}" for case in cases if "refused" in case):
        print(line)


if __name__ == "__main__":
    main()
