"""What every PEFT method promises on every model family that it fits, checked on tiny models."""

from __future__ import annotations

import atexit
import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...core.adapter import AdapterState
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...methods import AttachedAdapter, Method, create_method
from ...privacy.clipping import create_engine
from ...privacy.noise import RandomStream
from ...strategies.contract import BrokenContractError
from . import tinymodels
from .lab import IMAGE, LENGTHS, LM, TEXT, Lab

#: The model families and tasks on which a method is tried.
CASES: tuple[tuple[str, str], ...] = (
    ("bert", TEXT),
    ("roberta", TEXT),
    ("gpt2", TEXT),
    ("llama", TEXT),
    ("t5", TEXT),
    ("vit", IMAGE),
    ("gpt2", LM),
    ("llama", LM),
)
#: Attention does not see the bias of its keys (softmax is blind to a constant), so no output hangs on it.
BLIND = ("key.bias", "k_proj.bias")
_STEPS = 20
_SHAKE = 0.1


@cache
def laboratory() -> Lab:
    """One for the whole process: each tiny model is built once."""
    scratch = tempfile.TemporaryDirectory(prefix="fedgraft-contract-")
    atexit.register(scratch.cleanup)

    @cache
    def folder(family: str, task: str) -> str:
        path = Path(scratch.name, f"{family}-{task}")
        path.mkdir()
        tinymodels.build(path, family, task)
        return str(path)

    def text(words: int, seed: int) -> str:
        at = torch.randint(len(tinymodels.WORDS), (words,), generator=torch.Generator().manual_seed(seed))
        return " ".join(tinymodels.WORDS[i] for i in at)

    return Lab(folder, text)


def require(kept: bool, what: str) -> None:
    """Raise :class:`BrokenContractError` with ``what`` the method does not keep."""
    if not kept:
        raise BrokenContractError(what)


class MethodContract:
    """Subclass it in a test file, and name the ``method``.

    ``settings``: other values of ``[method]`` than the tiny ones of :meth:`Lab.attach`, such as ``options``;
    ``unfit``: what the method refuses, a family or ``family/task``, with a part of what it says; ``lr``: the learning
    rate at which its loss must fall in twenty steps of Adam; ``inert``: parts of the names of tensors without an effect
    of their own in a fresh adapter that was shaken, and so without a gradient.
    """

    method: ClassVar[str] = ""
    settings: ClassVar[Mapping[str, Any]] = {}
    unfit: ClassVar[Mapping[str, str]] = {}
    cases: ClassVar[tuple[tuple[str, str], ...]] = CASES
    lr: ClassVar[float] = 1e-2
    inert: ClassVar[tuple[str, ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """The argument ``case``: every (family, task) that the method fits."""
        if "case" in metafunc.fixturenames:
            cases = self.fitting()
            metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases], indirect=True)

    @pytest.fixture
    def case(self, request: pytest.FixtureRequest) -> tuple[str, str]:
        """A (family, task) that the method fits."""
        found: tuple[str, str] = request.param
        return found

    # --- what it is -------------------------------------------------------------------------------------------------

    def test_it_says_what_it_is(self) -> None:
        """A summary, an equation, a source, and what averaging and privacy do to it."""
        method = create_method(self.method)
        for key in ("summary", "source", "equation", "federates", "privacy"):
            require(bool(getattr(method, key)), f"{self.method} has no `{key}`")
            require("\n" not in getattr(method, key), f"`{key}` of {self.method} is more than a line")
        # The defaults of its options are values that they take.
        method.options_of(MethodConfig(name=self.method))

    def test_an_option_that_it_does_not_have_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"method\.options\.no_such_option: "):
            create_method(self.method).options_of(MethodConfig(name=self.method, options={"no_such_option": 1}))

    def test_it_refuses_the_models_that_it_does_not_fit(self) -> None:
        """In one line that says the mend."""
        for family, task in self.cases:
            part = self.unfit.get(family) or self.unfit.get(f"{family}/{task}")
            if part is None:
                continue
            with pytest.raises(UserError) as refusal:
                self._attach((family, task))
            text = str(refusal.value)
            require(part in text, f"{family}, {task}: {text}")
            require("\n" not in text and len(text) < 300, f"{family}, {task}: not one line: {text}")
            mend = ("choose", "set ", "leave", "name them", "lower")
            require(any(word in text for word in mend), f"{family}, {task}: does not say what to do: {text}")

    def test_alpha_scales_it_if_it_says_so(self) -> None:
        """On the first model that it fits: another ``method.alpha`` is another effect, or the method has none."""
        lab, case = laboratory(), self.fitting()[0]
        batch, found = lab.batch(*case, lab.records(*case, LENGTHS)), []
        for alpha in (8.0, 32.0):
            adapter = lab.attach(*case, self.method, **{**self.settings_for(case), "alpha": alpha})
            lab.shaken(adapter, seed=1, by=_SHAKE)
            with torch.no_grad():
                found.append(lab.losses(adapter.model, batch))
        scales = float((found[0] - found[1]).abs().max()) > 1e-6
        says = create_method(self.method).scaled
        require(scales == says, f"`uses_alpha` is {says}, and alpha {'changes' if scales else 'does not change'} it")

    # --- its tensors ------------------------------------------------------------------------------------------------

    def test_it_describes_exactly_what_trains(self, case: tuple[str, str]) -> None:
        adapter = self._attach(case)
        raw = {name: p for name, p in adapter.model.named_parameters() if p.requires_grad}
        require(adapter.spec.select("share") == tuple(raw), "the description is not of the parameters that train")
        require(bool({t.role for t in adapter.spec.tensors} - {"head"}), "nothing trains but the head")
        heads = {name for name in raw if ".modules_to_save." in name}
        told = {t.name for t in adapter.spec.tensors if t.role == "head"}
        require(heads == told, f"the head is {sorted(heads)}, described as {sorted(told)}")
        require(bool(heads) == (case[1] != LM), "the task's head does not train")
        require(all(t.dtype == "float32" for t in adapter.spec.tensors), "a tensor is not float32")
        require(not any(module.training for module in adapter.model.modules()), "a module is in training mode")

    def test_a_fresh_adapter_leaves_the_base_weights_as_they_are(self, case: tuple[str, str]) -> None:
        base = laboratory().base(*case)
        before = {_hash(tensor): name for name, tensor in base.model.state_dict().items()}
        after = {_hash(tensor) for tensor in self._attach(case).model.state_dict().values()}
        missing = sorted(name for digest, name in before.items() if digest not in after)
        require(not missing, f"base weight {missing[0] if missing else ''} is not what it was")

    def test_it_trains_and_nothing_else_moves(self, case: tuple[str, str]) -> None:
        adapter = self._attach(case)
        before, frozen = adapter.read(), _frozen(adapter)
        first, last = self._train(adapter, case)
        require(last < 0.97 * first, f"the loss went from {first:.4f} to {last:.4f} in {_STEPS} steps")
        require(_frozen(adapter) == frozen, "something moved that does not train")
        after = adapter.read()
        for name in adapter.spec.select("freeze"):
            require(np.array_equal(before[name], after[name]), f"{name} is frozen, and moved")
        still = [n for n in adapter.spec.select("share") if np.array_equal(before[n], after[n])]
        still = [n for n in still if not n.endswith(BLIND) and not any(part in n for part in self.inert)]
        require(not still, f"{still[0] if still else ''} did not train")

    def test_a_receiver_computes_what_the_sender_computes(self, case: tuple[str, str]) -> None:
        """A receiver drawn from another seed has the exchanged tensors, and needs no more."""
        lab = laboratory()
        sender, receiver = self._attach(case, seed=1), self._attach(case, seed=2)
        require(receiver.spec.digest == sender.spec.digest, "another seed makes another description")
        self._train(sender, case, steps=3)
        batch = lab.batch(*case, lab.records(*case, LENGTHS))
        with torch.no_grad():
            receiver.write(AdapterState(receiver.spec, dict(lab.shaken(sender, by=_SHAKE))))
            sent, received = lab.losses(sender.model, batch), lab.losses(receiver.model, batch)
        off = float((sent - received).abs().max())
        require(off <= 1e-6, f"sender and receiver are {off:.2g} apart")

    def test_every_tensor_has_an_effect(self, case: tuple[str, str]) -> None:
        lab = laboratory()
        adapter = self._attach(case)
        batch = lab.batch(*case, lab.records(*case, LENGTHS))
        state = lab.shaken(adapter, by=_SHAKE)
        random, dead = np.random.default_rng(7), []
        with torch.no_grad():
            base = lab.losses(adapter.model, batch)
            for name in state:
                moved = state[name] + random.standard_normal(state[name].shape).astype("float32")
                adapter.write(AdapterState(state.spec, {**state, name: moved}))
                if float((lab.losses(adapter.model, batch) - base).abs().max()) < 1e-5:
                    dead.append(name)
        dead = [name for name in dead if not name.endswith(BLIND) and not any(part in name for part in self.inert)]
        require(not dead, f"{dead[0] if dead else ''} has no effect")

    def test_averaging_does_what_its_tensors_say(self, case: tuple[str, str]) -> None:
        """The mean of two states is the mean of their effects for tensors that are linear, and not for the others."""
        lab = laboratory()
        adapter = self._attach(case)
        one = lab.shaken(adapter, seed=1, by=_SHAKE)
        kinds: dict[bool, set[str]] = {True: set(), False: set()}
        for tensor in adapter.spec.tensors:
            if tensor.role not in ("head", "prompt") and tensor.policy == "share":
                kinds[tensor.averaging == "linear"].add(tensor.name)
        adapter.model.double()
        with self._watched(adapter, case, kinds[True] | kinds[False]) as effects:
            for linear, names in kinds.items():
                if not names:
                    continue
                other = {n: one[n] + _noise(n, one[n].shape) if n in names else one[n] for n in one}
                middle = {n: ((one[n] + other[n].astype("float32")) / 2) for n in one}
                states = (one, other, middle)
                first, second, mean = (effects(AdapterState(adapter.spec, _single(state))) for state in states)
                off = max(_apart(m, (f + s) / 2) for f, s, m in zip(first, second, mean, strict=True))
                if linear:
                    require(off <= 1e-5, f"linear tensors, whose mean is {off:.2g} off the mean of their effects")
                else:
                    require(off > 1e-5, "tensors are called other than linear, and are linear")

    def test_layers_that_run_a_second_time_change_no_gradient(self, case: tuple[str, str]) -> None:
        """As `train.gradient_checkpointing` has them; or the method says that it does not allow it."""
        if not create_method(self.method).recomputes:
            pytest.skip(f"{self.method} is refused with train.gradient_checkpointing")
        lab = laboratory()
        adapter = self._attach(case)
        lab.shaken(adapter, by=_SHAKE)
        adapter.model.double()
        parameters = list(adapter.trainables().values())
        batch = lab.batch(*case, lab.records(*case, LENGTHS))
        (plain,) = lab.gradients(parameters, [lab.losses(adapter.model, batch).sum()])
        runs = lab.checkpointed(adapter, reentrant=False)
        (again,) = lab.gradients(parameters, [lab.losses(adapter.model, batch).sum()])
        require(bool(runs), "no layer was run")
        off = float((again - plain).norm())
        require(off <= 1e-9 * float(plain.norm()), f"the gradient is {off:.2g} off where layers run a second time")

    # --- folders and merging ----------------------------------------------------------------------------------------

    def test_what_is_saved_is_what_is_loaded(self, case: tuple[str, str], tmp_path: Path) -> None:
        """By fedgraft and by PEFT itself."""
        lab = laboratory()
        adapter, fresh = self._attach(case, seed=1), self._attach(case, seed=2)
        state = lab.shaken(adapter, by=_SHAKE)
        folder = adapter.save_peft(tmp_path / "adapter", state)
        loaded = fresh.load_peft(folder)
        batch = lab.batch(*case, lab.records(*case, LENGTHS))
        with torch.no_grad():
            adapter.write(state)
            want = lab.losses(adapter.model, batch)
            off = float((lab.losses(fresh.model, batch) - want).abs().max())
            # A folder may hold products of what is exchanged, rounded to float32.
            require(off <= 1e-5, f"the loaded adapter is {off:.2g} off")
            fresh.write(loaded)
            off = float((lab.losses(fresh.model, batch) - want).abs().max())
            require(off <= 1e-5, f"what was read of the loaded adapter is {off:.2g} off")
            if not (folder / "adapter_config.json").is_file():
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain = PeftModel.from_pretrained(lab.base(*case).model, str(folder)).eval()
            off = float((lab.losses(plain, batch) - want).abs().max())
        require(off <= 1e-5, f"PEFT itself loads an adapter that is {off:.2g} off")

    def test_merged_it_computes_what_it_did(self, case: tuple[str, str]) -> None:
        lab = laboratory()
        adapter = self._attach(case)
        lab.shaken(adapter, by=_SHAKE)
        adapter.model.double()
        batch = lab.batch(*case, lab.records(*case, LENGTHS))
        with torch.no_grad():
            want = lab.losses(adapter.model, batch)
            if not create_method(self.method).merges:
                with pytest.raises(UserError, match="cannot be merged"):
                    adapter.merge()
                return
            try:
                merged = adapter.merge()
            except UserError as error:
                require("bias" in str(error), f"it says that it merges, and does not: {error}")
                return
            off = float((lab.losses(merged, batch) - want).abs().max())
        require(off <= 1e-5, f"merged it is {off:.2g} off")

    # --- privacy ----------------------------------------------------------------------------------------------------

    def test_a_records_loss_does_not_hang_on_its_neighbours(self, case: tuple[str, str]) -> None:
        """Without this no clipping bounds one person's influence."""
        lab = laboratory()
        adapter = self._attach(case)
        lab.shaken(adapter, by=_SHAKE)
        adapter.model.double()
        records = lab.records(*case, LENGTHS)
        with torch.no_grad():
            together = lab.losses(adapter.model, lab.batch(*case, records))
            alone = torch.cat([lab.losses(adapter.model, lab.batch(*case, [record])) for record in records])
        off = float((together - alone).abs().max())
        if create_method(self.method).dp == "exact":
            require(off < 1e-9, f"beside others a record's loss is {off:.2g} off")

    def test_its_clipped_sum_is_that_of_single_records(self, case: tuple[str, str]) -> None:
        lab, whole = laboratory(), (*case, self.method)
        adapter = self._attach(case)
        lab.shaken(adapter, by=_SHAKE)
        adapter.model.double()
        records = lab.records(*case, LENGTHS)
        if create_method(self.method).dp != "exact":
            with pytest.raises(UserError):
                lab.summed(adapter, whole, [records], 1.0)
            return
        rows = lab.rows(adapter, whole, records)
        clip = float(rows.norm(dim=1).median())
        with create_engine("exact", adapter.model, adapter.trainables(), clip) as engine:
            lab.add(engine, adapter, whole, records)
            engine.release(0.0, 1.0, RandomStream.seeded_not_private("contract"))
            lab.close(lab.flat(adapter.trainables()), lab.clipped(rows, clip))

    def settings_for(self, case: tuple[str, str]) -> dict[str, Any]:
        """The values of ``[method]`` for a model, where they hang on it."""
        return dict(self.settings)

    @classmethod
    def fitting(cls) -> list[tuple[str, str]]:
        """The (family, task) pairs that the method is tried on."""
        return [case for case in cls.cases if case[0] not in cls.unfit and "/".join(case) not in cls.unfit]

    # --- inside -----------------------------------------------------------------------------------------------------

    def _attach(self, case: tuple[str, str], seed: int = 1) -> AttachedAdapter:
        return laboratory().attach(*case, self.method, seed=seed, **self.settings_for(case))

    def _config(self) -> MethodConfig:
        return MethodConfig(name=self.method, **{"rank": 4, "alpha": 8.0, "virtual_tokens": 3, **self.settings})

    def _train(self, adapter: AttachedAdapter, case: tuple[str, str], steps: int = _STEPS) -> tuple[float, float]:
        """Some steps on one batch, with what the method does between them; the mean loss before and after."""
        lab = laboratory()
        batch = lab.batch(*case, lab.records(*case, LENGTHS))
        optimizer = torch.optim.AdamW(adapter.trainables().values(), lr=self.lr, weight_decay=0.0)
        with torch.no_grad():
            first = float(lab.losses(adapter.model, batch).mean())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            own = adapter.steps(adapter, self._config(), first=0, total=steps)
            for step in range(steps):
                own.before(step)
                optimizer.zero_grad(set_to_none=True)
                lab.losses(adapter.model, batch).mean().backward()
                own.gradients(step)
                optimizer.step()
                own.after(step)
            own.close()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            return first, float(lab.losses(adapter.model, batch).mean())

    @contextmanager
    def _watched(
        self, adapter: AttachedAdapter, case: tuple[str, str], names: set[str]
    ) -> Iterator[Callable[[AdapterState], list[torch.Tensor]]]:
        """A function that gives what each adapted module computes, under a state, of what it was first given."""
        lab, modules = laboratory(), dict(adapter.model.named_modules())
        # A layer that is run again would append its keys and values to the cache.
        for module in adapter.model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = False
        owners = {path: modules[path] for path in dict.fromkeys(_owner(name, modules) for name in names)}
        given: dict[str, tuple[Any, Any]] = {}
        hooks = [
            module.register_forward_pre_hook(_note(given, path), with_kwargs=True) for path, module in owners.items()
        ]
        with torch.no_grad():
            lab.losses(adapter.model, lab.batch(*case, lab.records(*case, LENGTHS)))
        for hook in hooks:
            hook.remove()

        def effects(state: AdapterState) -> list[torch.Tensor]:
            adapter.write(state)
            with torch.no_grad():
                return [_first(owners[path](*args, **kwargs)) for path, (args, kwargs) in given.items()]

        yield effects


def _note(given: dict[str, tuple[Any, Any]], path: str) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.setdefault(path, (args, kwargs))

    return note


def _owner(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The path of the innermost layer of a tuner above a tensor, or else of the module that holds it."""
    parts = name.split(".")
    for length in reversed(range(1, len(parts))):
        path = ".".join(parts[:length])
        if isinstance(modules.get(path), BaseTunerLayer):
            return path
    return ".".join(parts[:-1])


def _first(value: Any) -> torch.Tensor:
    while not isinstance(value, torch.Tensor):
        value = value[0]
    return value


def _single(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array).astype("float32") for name, array in state.items()}


def _noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    drawn: np.ndarray = np.random.default_rng(seed).standard_normal(shape) * 0.3
    return drawn.astype("float32")


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the size of what is computed."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def _hash(tensor: torch.Tensor) -> str:
    array = tensor.detach().contiguous().numpy()
    return hashlib.sha256(f"{array.shape}{array.dtype}".encode() + array.tobytes()).hexdigest()


def _frozen(adapter: AttachedAdapter) -> dict[str, str]:
    trained = set(adapter.trainables())
    held = [*adapter.model.named_parameters(), *adapter.model.named_buffers()]
    return {name: _hash(tensor) for name, tensor in held if name not in trained}


def contract_of(method: Method, *bases: type) -> type[MethodContract]:
    """The class of tests of ``method``, with what it says itself of how it is tried; ``bases`` go before the suite."""
    return type(f"Test[{method.name}]", (*bases, MethodContract), {"method": method.name, **method.contract})
