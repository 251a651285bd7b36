from __future__ import annotations

import math
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedgraft.core.basemodel import BaseModel
from fedgraft.core.config import TaskConfig
from fedgraft.core.errors import PrivateError
from fedgraft.core.tasks import Task, create_task
from fedgraft.core.tasks.base import pad_tokens, padding_id

LABELS = ("a", "b", "c")
CLASSIFIERS = ("bert", "roberta", "gpt2", "llama", "t5")
LANGUAGE_MODELS = ("gpt2", "llama")
#: Lengths from none to more than max_length tokens, in no order.
LENGTHS = (3, 9, 1, 30, 0, 5, 5)
MAX_LENGTH = 12


@pytest.fixture(scope="module")
def prepared(tiny_model):
    """``prepared(family, name)``: a task and its tiny base model, loaded once."""
    made: dict[tuple[str, str], tuple[Task, BaseModel]] = {}

    def prepare(family: str, name: str) -> tuple[Task, BaseModel]:
        if (family, name) not in made:
            config = TaskConfig(name=name, labels=() if name == "causal-lm" else LABELS, max_length=MAX_LENGTH)
            task = create_task(config)
            made[family, name] = task, task.load(tiny_model(family, name), config, 0)
        return made[family, name]

    return prepare


@pytest.fixture(scope="module")
def texts(tiny_text) -> list[str]:
    return [tiny_text(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def labels() -> list[int]:
    return [i % 3 for i in range(len(LENGTHS))]


def naive_cross_entropy(logits: torch.Tensor, target: int) -> float:
    """-log softmax(logits)[target], in float64, one number at a time."""
    numbers = [float(x) for x in logits.double()]
    largest = max(numbers)
    return largest + math.log(math.fsum(math.exp(x - largest) for x in numbers)) - numbers[target]


def alone(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits of one text, without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0]


# Classification of texts


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_each_text_has_the_loss_that_it_has_alone(family, prepared, texts, labels):
    task, base = prepared(family, "sequence-classification")
    examples = task.encode(texts, labels, base.processor)
    with torch.no_grad():
        losses = task.losses(base.model, task.collate(examples, base.processor))
    assert losses.shape == (len(texts),)
    for loss, example, label in zip(losses, examples, labels, strict=True):
        assert example["label"] == label
        assert float(loss) == pytest.approx(naive_cross_entropy(alone(base.model, example["ids"]), label), abs=1e-5)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_loss_of_a_text_does_not_depend_on_its_company(family, prepared, texts, labels):
    task, base = prepared(family, "sequence-classification")
    examples = task.encode(texts, labels, base.processor)

    def losses(chosen: list[int]) -> list[float]:
        with torch.no_grad():
            return task.losses(base.model, task.collate([examples[i] for i in chosen], base.processor)).tolist()

    full = losses(list(range(len(texts))))
    for chosen in ([0], [6, 0], [2, 4, 0, 3], [3, 3]):
        assert losses(chosen) == pytest.approx([full[i] for i in chosen], abs=1e-5)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_counts_of_texts_add_up_over_batches(family, prepared, texts, labels):
    task, base = prepared(family, "sequence-classification")
    examples = task.encode(texts, labels, base.processor)

    def counts(chosen: list) -> dict[str, float]:
        with torch.no_grad():
            rows = task.counts(base.model, task.collate(chosen, base.processor))
            return {key: float(values.double().sum()) for key, values in rows.items()}

    whole, parts = counts(examples), [counts(examples[:2]), counts(examples[2:6]), counts(examples[6:])]
    best = [int(alone(base.model, example["ids"]).argmax()) for example in examples]
    assert whole["examples"] == len(texts)
    assert whole["correct"] == sum(guess == label for guess, label in zip(best, labels, strict=True))
    naive = math.fsum(naive_cross_entropy(alone(base.model, e["ids"]), e["label"]) for e in examples)
    assert whole["loss_sum"] == pytest.approx(naive, abs=1e-4)
    for key in ("examples", "correct"):
        assert sum(part[key] for part in parts) == whole[key]
    assert sum(part["loss_sum"] for part in parts) == pytest.approx(whole["loss_sum"], abs=1e-4)


def test_all_labels_right_and_all_wrong(prepared, texts):
    task, base = prepared("bert", "sequence-classification")
    examples = task.encode(texts, None, base.processor)
    best = [int(alone(base.model, example["ids"]).argmax()) for example in examples]
    for shift, correct in ((0, len(texts)), (1, 0)):
        examples = task.encode(texts, [(label + shift) % 3 for label in best], base.processor)
        assert task.counts(base.model, task.collate(examples, base.processor))["correct"].sum() == correct


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_long_text_keeps_its_end_marks(family, prepared, tiny_text):
    task, base = prepared(family, "sequence-classification")
    long, short = (task.encode([tiny_text(n, 0)], [0], base.processor)[0]["ids"] for n in (50, 1))
    assert len(long) == MAX_LENGTH
    special = len(short) - 1
    if family in ("bert", "roberta", "t5"):
        assert special and long[-1] == short[-1]
    if family in ("bert", "roberta", "llama"):
        assert long[0] == short[0]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_no_texts_are_no_examples(family, prepared):
    task, base = prepared(family, "sequence-classification")
    assert task.encode([], [], base.processor) == []
    assert all(example["length"] >= 1 for example in task.encode(["", " "], [0, 1], base.processor))


def test_labels_and_texts_must_be_as_many(prepared):
    task, base = prepared("bert", "sequence-classification")
    with pytest.raises(ValueError, match="zip"):
        task.encode(["fever", "pain"], [0], base.processor)


@pytest.mark.parametrize(
    ("family", "limit"), [("bert", 64), ("roberta", 64), ("gpt2", 64), ("t5", None), ("llama", None)]
)
def test_a_text_longer_than_the_models_positions_is_refused(family, limit, tiny_model, tiny_text, refused):
    def run(max_length: int) -> float:
        config = TaskConfig(labels=LABELS, max_length=max_length)
        task = create_task(config)
        base = task.load(tiny_model(family), config, 0)
        examples = task.encode([tiny_text(200, 0)], [0], base.processor)
        assert examples[0]["length"] == max_length
        return float(task.losses(base.model, task.collate(examples, base.processor)))

    assert math.isfinite(run(64))
    if limit is None:
        assert math.isfinite(run(65))
    else:
        with refused(f"task.max_length is 65, but the model takes {limit} tokens"):
            run(65)


def test_a_tokenizer_of_another_model_is_refused(tinymodels, tmp_path, refused):
    tinymodels.build(tmp_path, "bert", "sequence-classification")
    tokenizer = tinymodels.tokenizer("bert")
    words = tinymodels.WORDS
    tinymodels.WORDS = (*words, *(f"word{i}" for i in range(50)))
    try:
        tinymodels.tokenizer("bert").save_pretrained(tmp_path)
    finally:
        tinymodels.WORDS = words
    config = TaskConfig(labels=LABELS)
    with refused(f"the tokenizer knows {len(tokenizer) + 50} tokens, the model {len(tokenizer)}"):
        create_task(config).load(str(tmp_path), config, 0)


# Padding


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=6), st.booleans())
def test_padding_is_on_the_right_and_masked(rows, padded):
    tokenizer = SimpleNamespace(pad_token_id=77 if padded else None, eos_token_id=88)
    batch = pad_tokens([{"ids": row, "length": len(row)} for row in rows], tokenizer)
    longest = max(map(len, rows))
    fill = 77 if padded else 88
    assert batch["input_ids"].tolist() == [row + [fill] * (longest - len(row)) for row in rows]
    assert batch["attention_mask"].tolist() == [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize(
    ("pad", "eos", "expected"), [(5, 6, 5), (0, 6, 0), (None, 6, 6), (None, 0, 0), (None, None, 0)]
)
def test_the_padding_token(pad, eos, expected):
    assert padding_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == expected


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_model_knows_the_token_that_pads(family, prepared):
    _, base = prepared(family, "sequence-classification")
    assert base.model.config.pad_token_id == padding_id(base.processor)


# Language modelling


def naive_token_losses(model: torch.nn.Module, ids: list[int]) -> list[float]:
    logits = alone(model, ids)
    return [naive_cross_entropy(logits[at], ids[at + 1]) for at in range(len(ids) - 1)]


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_texts_loss_is_the_mean_over_its_own_tokens(family, prepared, texts):
    task, base = prepared(family, "causal-lm")
    examples = task.encode(texts, None, base.processor)
    with torch.no_grad():
        losses = task.losses(base.model, task.collate(examples, base.processor))
    assert losses.shape == (len(texts),)
    for loss, example in zip(losses, examples, strict=True):
        tokens = naive_token_losses(base.model, example["ids"])
        assert float(loss) == pytest.approx(math.fsum(tokens) / len(tokens), abs=1e-5)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_texts_loss_does_not_depend_on_the_other_rows(family, prepared, tiny_text):
    task, base = prepared(family, "causal-lm")

    def batch(*others: str) -> dict[str, torch.Tensor]:
        return task.collate(task.encode([tiny_text(5, 0), *others], None, base.processor), base.processor)

    batches = [batch(), batch(tiny_text(2, 1)), batch(tiny_text(11, 2), tiny_text(1, 3))]
    with torch.no_grad():
        losses = [float(task.losses(base.model, one)[0]) for one in batches]
        usual = [float(base.model(**one, labels=one["input_ids"]).loss) for one in batches]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    # The batch loss of transformers would move: it is the mean over everybody's tokens.
    assert abs(usual[1] - usual[0]) > 1e-2 and abs(usual[2] - usual[0]) > 1e-2


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_no_gradient_of_a_texts_loss_reaches_another_text(family, prepared, texts):
    task, base = prepared(family, "causal-lm")
    batch = task.collate(task.encode(texts, None, base.processor), base.processor)
    inputs = base.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)

    def model(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        return base.model(inputs_embeds=inputs, attention_mask=attention_mask)

    for row in (0, 3):
        (gradient,) = torch.autograd.grad(task.losses(model, batch)[row], inputs)
        touched = gradient.abs().amax(dim=(1, 2))
        assert touched[row] > 0
        assert float(touched.sum() - touched[row]) == 0.0
        # Nor a padded place of its own row.
        assert float((gradient[row] * (1 - batch["attention_mask"][row]).unsqueeze(-1)).abs().sum()) == 0.0


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_counts_of_tokens_add_up_over_batches(family, prepared, texts):
    task, base = prepared(family, "causal-lm")
    examples = task.encode(texts, None, base.processor)

    def counts(chosen: list) -> dict[str, float]:
        with torch.no_grad():
            rows = task.counts(base.model, task.collate(chosen, base.processor))
            return {key: float(values.double().sum()) for key, values in rows.items()}

    whole, parts = counts(examples), [counts(examples[:1]), counts(examples[1:5]), counts(examples[5:])]
    rows = [example["ids"] for example in examples]
    guesses = [alone(base.model, ids).argmax(-1).tolist() for ids in rows]
    hits = sum(
        g == t for guess, ids in zip(guesses, rows, strict=True) for g, t in zip(guess[:-1], ids[1:], strict=True)
    )
    assert whole["examples"] == sum(len(ids) - 1 for ids in rows)
    assert whole["correct"] == hits
    naive = math.fsum(loss for ids in rows for loss in naive_token_losses(base.model, ids))
    assert whole["loss_sum"] == pytest.approx(naive, rel=1e-5)
    for key in ("examples", "correct"):
        assert sum(part[key] for part in parts) == whole[key]
    assert sum(part["loss_sum"] for part in parts) == pytest.approx(whole["loss_sum"], rel=1e-5)


def test_a_model_that_repeats_its_input_is_right_where_a_text_repeats_itself(prepared):
    task, _ = prepared("gpt2", "causal-lm")

    def repeats(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 10).float())

    batch = {
        "input_ids": torch.tensor([[4, 4, 4, 5, 0], [7, 8, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
    }
    right, wrong = (math.log(math.e + 9) - score for score in (1, 0))
    rows = {key: values.tolist() for key, values in task.counts(repeats, batch).items()}
    assert rows == {
        "examples": [3, 2],
        "correct": [2, 1],
        "loss_sum": pytest.approx([2 * right + wrong, right + wrong], abs=1e-5),
    }
    expected = [(2 * right + wrong) / 3, (right + wrong) / 2]
    assert task.losses(repeats, batch).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_virtual_tokens_before_the_text_are_not_predicted(family, prepared, texts):
    task, base = prepared(family, "causal-lm")
    batch = task.collate(task.encode(texts, None, base.processor), base.processor)

    def prompted(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        logits = base.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return SimpleNamespace(logits=torch.cat([torch.full_like(logits[:, :4], 50.0), logits], dim=1))

    with torch.no_grad():
        assert torch.equal(task.losses(prompted, batch), task.losses(base.model, batch))
        one, other = (task.counts(model, batch) for model in (prompted, base.model))
        assert all(torch.equal(one[key], other[key]) for key in ("examples", "correct", "loss_sum"))


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_every_text_has_a_token_to_predict(family, prepared):
    task, base = prepared(family, "causal-lm")
    examples = task.encode(["", "fever", "fever pain"], None, base.processor)
    assert [example["length"] for example in examples] == ([2, 2, 2] if family == "gpt2" else [2, 2, 3])
    assert task.encode([], None, base.processor) == []
    assert torch.isfinite(task.losses(base.model, task.collate(examples, base.processor))).all()


# Images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """PNG files of several sizes and kinds: grey, colour, with transparency, with a palette, 16 bits deep."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = []
    for i, (mode, size) in enumerate([("L", (16, 16)), ("RGB", (40, 10)), ("RGBA", (7, 9)), ("P", (16, 30))]):
        noise = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        paths.append(str(folder / f"{i}.png"))
        noise.convert(mode).save(paths[-1])
    deep = generator.integers(0, 65536, (16, 16)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return [*paths, str(folder / "deep.png")]


def test_each_image_has_the_loss_that_it_has_alone(prepared, pictures):
    task, base = prepared("vit", "image-classification")
    labels = [0, 1, 2, 0, 1]
    examples = task.encode(pictures, labels, base.processor)
    batch = task.collate(examples, base.processor)
    assert batch["pixel_values"].shape == (5, 3, 16, 16) and batch["labels"].tolist() == labels
    with torch.no_grad():
        losses = task.losses(base.model, batch)
        counts = task.counts(base.model, batch)
        naive, correct = [], 0
        for path, label in zip(pictures, labels, strict=True):
            pixels = task.collate(task.encode([path], [label], base.processor), base.processor)["pixel_values"]
            logits = base.model(pixel_values=pixels).logits[0]
            naive.append(naive_cross_entropy(logits, label))
            correct += int(logits.argmax()) == label
    assert losses.tolist() == pytest.approx(naive, abs=1e-5)
    assert len({round(loss, 3) for loss in naive}) == 5
    assert counts["examples"].tolist() == [1] * 5 and counts["correct"].sum() == correct
    assert counts["loss_sum"].tolist() == pytest.approx(naive, abs=1e-5)


def test_pixels_are_scaled_and_centred(prepared, pictures):
    task, base = prepared("vit", "image-classification")
    pixels = task.collate(task.encode(pictures[:1], [0], base.processor), base.processor)["pixel_values"][0]
    grey = np.asarray(Image.open(pictures[0])).astype(np.float64)
    expected = np.stack([(grey / 255 - 0.5) / 0.5] * 3)
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.int32)])
def test_a_16_bit_image_is_scaled_not_cut_off(kind, dtype, prepared, tmp_path):
    task, base = prepared("vit", "image-classification")
    deep = (np.arange(256).reshape(16, 16) * 256 + 128).astype(dtype)
    Image.fromarray(deep).save(tmp_path / f"deep.{kind}")
    Image.fromarray((deep // 256).astype(np.uint8)).save(tmp_path / "shallow.png")
    examples = task.encode([str(tmp_path / f"deep.{kind}"), str(tmp_path / "shallow.png")], [0, 0], base.processor)
    pixels = task.collate(examples, base.processor)["pixel_values"]
    assert len(pixels[1].unique()) == 256
    assert torch.equal(pixels[0], pixels[1])


def test_images_in_memory_are_taken_as_files_are(prepared, pictures):
    task, base = prepared("vit", "image-classification")
    opened = [Image.open(path) for path in pictures]
    one, two = (task.collate(task.encode(x, None, base.processor), base.processor) for x in (pictures, opened))
    assert torch.equal(one["pixel_values"], two["pixel_values"])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "not an image that can be read"),
        (lambda path: path.write_bytes(b""), "not an image that can be read"),
        (lambda path: path.write_text("GIF89a"), "not an image that can be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "not an image that can be read"),
        (lambda path: flip(path, 12), "not an image that can be read"),
        (lambda path: flip(path, 40), "not an image that can be read"),
        (lambda path: claim(path, 60_000), "not an image that can be read"),
        (lambda path: Image.fromarray(np.zeros((4, 4), "f4")).save(path, "TIFF"), "floating-point"),
        (lambda path: Image.fromarray(np.full((4, 4), 70000, "i4")).save(path, "TIFF"), "do not fit into 16 bits"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(spoil, words, prepared, tmp_path, refused):
    task, base = prepared("vit", "image-classification")
    path = tmp_path / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    spoil(path)
    examples = task.encode([str(path)], [0], base.processor)
    with refused(str(path), words):
        task.collate(examples, base.processor)
    with pytest.raises(PrivateError):
        task.collate(examples, base.processor)


def claim(path, size: int) -> None:
    """Let the header of a small PNG claim so many pixels that reading it would fill the memory."""
    raw = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", size, size) + raw[24:29]
    path.write_bytes(raw[:12] + header + struct.pack(">I", zlib.crc32(header)) + raw[33:])


def flip(path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x41
    path.write_bytes(bytes(raw))


# Names


def test_an_unknown_task_is_refused_with_the_known_ones(refused):
    with refused("unknown task `regression`", "causal-lm, image-classification, sequence-classification"):
        create_task(TaskConfig(name="regression"))


@pytest.mark.parametrize(
    ("family", "name"),
    [("vit", "sequence-classification"), ("bert", "image-classification"), ("t5", "causal-lm")],
)
def test_a_model_of_another_kind_is_refused(family, name, tiny_model, refused):
    config = TaskConfig(name=name, labels=() if name == "causal-lm" else LABELS)
    with refused(f"model {tiny_model(family)}"):
        create_task(config).load(tiny_model(family), config, 0)


@pytest.mark.parametrize(
    ("name", "kind", "labelled", "peft"),
    [
        ("sequence-classification", "text", True, "SEQ_CLS"),
        ("causal-lm", "text", False, "CAUSAL_LM"),
        ("image-classification", "image", True, ""),
    ],
)
def test_what_a_task_says_of_itself(name, kind, labelled, peft):
    task = create_task(TaskConfig(name=name))
    assert (task.name, task.input_kind, task.labelled, task.peft_type) == (name, kind, labelled, peft)
