"""The currency of a federation: what adapter tensors are (`AdapterSpec`) and their values (`AdapterState`).

Both are immutable. Values are read-only NumPy arrays in float32 or float64, so that every rule above this file is
plain array arithmetic without a model, a device or Flower.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .errors import NonFiniteError, UserError

Policy = Literal["share", "freeze", "local", "receive"]
Averaging = Literal["linear", "product", "nonlinear"]
_DTYPES: Mapping[str, np.dtype[Any]] = {"float32": np.dtype("float32"), "float64": np.dtype("float64")}
_METADATA = "fedgraft"


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of an adapter.

    ``averaging`` says what the mean of two sites' tensors means for the model's function: ``linear`` (the mean of
    the effects), ``product`` (one factor of a product: mean(B) mean(A) is not mean(B A)) or ``nonlinear``.
    ``policy``: ``share`` is trained and exchanged, ``freeze`` is equal everywhere and not trained, ``local`` is
    trained and never leaves the site, ``receive`` is taken from the server, trained and not sent back.
    ``parameter`` false: no parameter of the model but what accompanies the adapter, such as a control variate (then
    ``share`` says that it is sent back, ``freeze`` that it only comes down).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    role: str = "weight"
    averaging: Averaging = "nonlinear"
    policy: Policy = "share"
    parameter: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a tensor is called {self.name!r}")
        object.__setattr__(self, "shape", tuple(self.shape))
        if not all(type(n) is int and n >= 0 for n in self.shape):
            raise ValueError(f"tensor {self.name}: {self.shape} is not a shape")
        choices = {"dtype": _DTYPES, "averaging": get_args(Averaging), "policy": get_args(Policy)}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"tensor {self.name}: {key} {getattr(self, key)} is not one of {', '.join(allowed)}")

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def title(self) -> bytes:
        """What a digest says before the tensor's numbers."""
        return f"{self.name}|{list(self.shape)}|{self.dtype}|".encode()


@dataclass(frozen=True)
class LowRankPair:
    """A and B of one low-rank update: dW = scaling * B A, with A (r, n) and B (m, r), for W (m, n).

    ``fan_in_fan_out`` marks layers that store W transposed (GPT-2's ``Conv1D``): the stored update is dW^T.
    """

    a: str
    b: str
    scaling: float
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", float(self.scaling))


@dataclass(frozen=True)
class AdapterSpec:
    """What the tensors of an adapter are: order, shapes, meaning, and which A belongs to which B."""

    method: str
    tensors: tuple[TensorSpec, ...]
    pairs: tuple[LowRankPair, ...] = ()
    rank: int | None = None
    alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError("two tensors of an adapter have the same name")
        if not isinstance(self.method, str) or not (self.rank is None or type(self.rank) is int):
            raise ValueError(f"method {self.method!r} of rank {self.rank!r}")
        known = set(names)
        for pair in self.pairs:
            if pair.a not in known or pair.b not in known:
                raise ValueError(f"the pair {pair.a}, {pair.b} names a tensor that the adapter does not have")
        # As JSON gives them back: a description must equal itself after a file or the wire (16 and 16.0 differ there).
        options = json.loads(json.dumps(dict(self.options)))
        object.__setattr__(self, "options", MappingProxyType(options))
        object.__setattr__(self, "alpha", None if self.alpha is None else float(self.alpha))

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        return MappingProxyType({tensor.name: tensor for tensor in self.tensors})

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors of the model together."""
        return sum(tensor.size for tensor in self.tensors if tensor.parameter)

    @cached_property
    def bare(self) -> AdapterSpec:
        """The adapter as the method made it: every tensor shared, and nothing beside them."""
        own = tuple(replace(t, policy="share") for t in self.tensors if t.parameter)
        return self if own == self.tensors else replace(self, tensors=own)

    @cached_property
    def extras(self) -> tuple[TensorSpec, ...]:
        """What accompanies the adapter, in order."""
        return tuple(tensor for tensor in self.tensors if not tensor.parameter)

    def with_extras(self, extras: Iterable[TensorSpec]) -> AdapterSpec:
        """A copy whose adapter is accompanied by exactly ``extras``, after its own tensors."""
        own = tuple(tensor for tensor in self.tensors if tensor.parameter)
        beside = (replace(extra, parameter=False, averaging="nonlinear") for extra in extras)
        return replace(self, tensors=(*own, *beside))

    def with_rank(self, rank: int) -> AdapterSpec:
        """The same adapter at another rank: the factors' shapes, and their scaling by the same rule.

        Raises :class:`UserError` where a tensor other than the factors hangs on the rank.
        """
        if rank == self.rank or not self.pairs:
            return self
        if self.rank is None or self.options.get("common_rank"):
            raise UserError(f"method {self.method} cannot mix ranks; give all sites one rank")
        power = 0.5 if self.options.get("scaling") == "sqrt" else 1.0
        factor = (self.rank / rank) ** power
        shapes = {pair.a: (rank, self.by_name[pair.a].shape[1]) for pair in self.pairs}
        shapes |= {pair.b: (self.by_name[pair.b].shape[0], rank) for pair in self.pairs}
        return replace(
            self,
            rank=rank,
            tensors=tuple(replace(t, shape=shapes.get(t.name, t.shape)) for t in self.tensors),
            pairs=tuple(replace(pair, scaling=pair.scaling * factor) for pair in self.pairs),
        )

    def with_offset(self, ranks: Mapping[str, int]) -> AdapterSpec:
        """A copy with a low-rank change of the base weights; ``ranks`` maps a pair's ``a`` to the rank of its change.

        The change of pair p is the product ``offset_b(p) @ offset_a(p)``, (m, R) @ (R, n), in the layout and without
        the scaling of dW. Other extras stay; a pair that is not named has no change.
        """
        others = [tensor for tensor in self.extras if tensor.role != "offset"]
        offsets = []
        for pair in self.pairs:
            if rank := ranks.get(pair.a, 0):
                (_, n), (m, _) = self.by_name[pair.a].shape, self.by_name[pair.b].shape
                for name, shape in ((offset_a(pair), (rank, n)), (offset_b(pair), (m, rank))):
                    dtype = self.by_name[pair.b].dtype
                    offsets.append(TensorSpec(name, shape, dtype, "offset", policy="freeze", parameter=False))
        return self.with_extras((*others, *offsets))

    def with_policy(self, policy: Policy, where: Callable[[TensorSpec], bool]) -> AdapterSpec:
        """A copy in which every tensor that satisfies ``where`` has ``policy``."""
        return replace(self, tensors=tuple(replace(t, policy=policy) if where(t) else t for t in self.tensors))

    def select(self, *policies: Policy) -> tuple[str, ...]:
        """Names of the tensors with one of ``policies``, in order."""
        return tuple(tensor.name for tensor in self.tensors if tensor.policy in policies)

    def to_json(self) -> str:
        values = {key: getattr(self, key) for key in ("method", "rank", "alpha")}
        values |= {
            "options": dict(self.options),
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "pairs": [asdict(pair) for pair in self.pairs],
        }
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> AdapterSpec:
        try:
            values = json.loads(text)
            return cls(
                method=values["method"],
                rank=values["rank"],
                alpha=values["alpha"],
                options=values["options"],
                tensors=tuple(TensorSpec(**tensor) for tensor in values["tensors"]),
                pairs=tuple(LowRankPair(**pair) for pair in values["pairs"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"not an adapter description: {error!r}") from None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the description, first 16 hex digits: equal on both ends or nothing is exchanged."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def offset_a(pair: LowRankPair) -> str:
    """The name of the right factor of a change of the base weights (see :meth:`AdapterSpec.with_offset`)."""
    return f"{pair.a}.offset"


def offset_b(pair: LowRankPair) -> str:
    """The name of the left factor."""
    return f"{pair.b}.offset"


def explain_shape(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    """Why two shapes of a tensor differ, in the words of the person who can mend it."""
    text = f"tensor {name} has shape {list(got)}, expected {list(want)}"
    factor = re.search(r"lora_(A|B)\.", name)
    if factor and len(got) == len(want) == 2:
        axis = 0 if factor[1] == "A" else 1
        if got[axis] != want[axis] and got[1 - axis] == want[1 - axis]:
            return f"{text}: rank {got[axis]} against rank {want[axis]}; set method.rank alike everywhere"
    return text


class AdapterState(Mapping[str, np.ndarray]):
    """Named tensors in the order of their spec, read-only.

    Arguments: ``spec``; ``tensors``: an array for exactly the names of the spec (or for ``names``, a subset, such as
    those that a site may send). Raises :class:`UserError` that names the tensor when a name is missing or unknown,
    or a shape or dtype differs.
    """

    __slots__ = ("_digest", "_finite", "_tensors", "spec")
    # A NumPy scalar on the left of `*` leaves the product to this class.
    __array_ufunc__ = None

    def __init__(
        self, spec: AdapterSpec, tensors: Mapping[str, np.ndarray], *, names: Iterable[str] | None = None
    ) -> None:
        order = spec.names if names is None else tuple(names)
        unknown = sorted(set(tensors) - set(order))
        if unknown:
            raise UserError(f"unknown tensor {unknown[0]}" + (f" and {len(unknown) - 1} more" if unknown[1:] else ""))
        held: dict[str, np.ndarray] = {}
        for name in order:
            want = spec.by_name[name]
            if name not in tensors:
                raise UserError(f"tensor {name} is missing")
            array = np.asarray(tensors[name])
            if array.shape != want.shape:
                raise UserError(explain_shape(name, array.shape, want.shape))
            native = _DTYPES[want.dtype]
            if array.dtype != native and array.dtype.name != want.dtype:
                raise UserError(f"tensor {name} is {array.dtype.name}, expected {want.dtype}")
            if array.dtype != native or _changeable(array):
                array = array.astype(native)
                array.flags.writeable = False
            held[name] = array
        self.spec = spec
        self._tensors = held
        self._digest: str | None = None
        self._finite = False

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"AdapterState({self.spec.method}, {len(self)} tensors, {self.digest[:12]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterState) and self.spec == other.spec and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes, dtypes and little-endian bytes, in order."""
        if self._digest is None:
            total = hashlib.sha256()
            for name, array in self._tensors.items():
                total.update(self.spec.by_name[name].title)
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                total.update(np.ascontiguousarray(little).reshape(-1).data)
            self._digest = total.hexdigest()
        return self._digest

    @property
    def parameters(self) -> int:
        return sum(array.size for array in self.values())

    def only(self, names: Iterable[str]) -> AdapterState:
        """The sub-state of ``names`` (in the order of the spec)."""
        keep = set(names)
        order = [name for name in self if name in keep]
        return AdapterState(self.spec, {name: self[name] for name in order}, names=order)

    def filled_from(self, other: AdapterState) -> AdapterState:
        """A full state: these tensors, and ``other``'s for the names that are missing here."""
        return AdapterState(self.spec, {**{n: other[n] for n in self.spec.names if n in other}, **self})

    def with_spec(self, spec: AdapterSpec) -> AdapterState:
        """The same tensors under another description (such as changed policies)."""
        return AdapterState(spec, dict(self), names=tuple(self))

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> AdapterState:
        """Apply ``function`` to each tensor; the dtype of the spec is kept."""
        return AdapterState(
            self.spec,
            {name: np.asarray(function(array)).astype(array.dtype) for name, array in self.items()},
            names=tuple(self),
        )

    def _require_alike(self, other: AdapterState) -> None:
        if tuple(self) != tuple(other):
            odd = min(set(self) ^ set(other), default="the order")
            raise UserError(f"two adapters differ in their tensors: {odd}")
        for name in self:
            if self[name].shape != other[name].shape:
                raise UserError(explain_shape(name, other[name].shape, self[name].shape))

    def _combine(self, other: AdapterState, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> AdapterState:
        self._require_alike(other)
        return AdapterState(
            self.spec,
            {name: function(self[name], other[name]).astype(self[name].dtype) for name in self},
            names=tuple(self),
        )

    def __add__(self, other: AdapterState) -> AdapterState:
        return self._combine(other, np.add)

    def __sub__(self, other: AdapterState) -> AdapterState:
        return self._combine(other, np.subtract)

    def __mul__(self, factor: float) -> AdapterState:
        # A plain float would be rounded to the tensors' dtype before the product.
        return self.map(lambda array: array * np.float64(factor))

    __rmul__ = __mul__

    def dot(self, other: AdapterState) -> float:
        """Inner product over all tensors, accumulated in float64."""
        self._require_alike(other)
        return float(sum(np.vdot(self[n].astype(np.float64), other[n].astype(np.float64)) for n in self))

    def norm(self) -> float:
        """L2 norm over all tensors."""
        return float(np.sqrt(self.dot(self)))

    def require_finite(self) -> AdapterState:
        """Return self, or raise :class:`NonFiniteError` that names the first tensor with NaN or infinity."""
        if not self._finite:
            for name, array in self._tensors.items():
                if not np.isfinite(array).all():
                    raise NonFiniteError(f"tensor {name} holds NaN or infinity")
            self._finite = True
        return self

    def delta(self, pair: LowRankPair) -> np.ndarray:
        """The dense update scaling * B A of one pair, shape (m, n), in float64. For tests and small models.

        With what was added to the base weights, where the adapter carries such an offset.
        """
        dense = pair.scaling * (self[pair.b].astype(np.float64) @ self[pair.a].astype(np.float64))
        if offset_a(pair) in self:
            dense = dense + self[offset_b(pair)].astype(np.float64) @ self[offset_a(pair)].astype(np.float64)
        return dense

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the spec travels in its metadata."""
        description = self.spec.to_json()
        save_file(
            {name: np.asarray(array, order="C") for name, array in self.items()},
            Path(path),
            # One entry: safetensors writes several in no fixed order, and equal states shall be equal files.
            metadata={_METADATA: json.dumps({"spec": description, "checksum": self._checksum(description)})},
        )

    def _checksum(self, description: str) -> str:
        """SHA-256 over what the tensors are and what they hold."""
        return hashlib.sha256(f"{description}|{self.digest}".encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> AdapterState:
        """Read what :meth:`save` wrote. Raises :class:`UserError` that names the file when it is not whole."""
        path = Path(path)
        try:
            with safe_open(path, framework="np") as file:
                metadata = (file.metadata() or {}).get(_METADATA)
                if metadata is None:
                    raise UserError("a safetensors file, but not one of fedgraft's")
                values = json.loads(metadata)
                description, checksum = values["spec"], values["checksum"]
                spec = AdapterSpec.from_json(description)
                held = set(file.keys())
                names = [name for name in spec.names if name in held]
                state = cls(spec, {name: file.get_tensor(name) for name in held}, names=names)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: not a whole safetensors file: {error}") from None
        if state._checksum(description) != checksum:
            raise UserError(f"{path}: the content does not match its checksum")
        return state


def _changeable(array: np.ndarray) -> bool:
    """Whether somebody can still write to the memory of ``array``, through it or through the array it is a view of."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return True
        base = base.base
    return False
