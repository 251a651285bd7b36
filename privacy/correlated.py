"""Noise that cancels over steps, for sites that cannot sample, or that sample in turns: a banded square root.

What an optimiser does with noisy gradients is to add them up. Noise rows C^-1 z with C lower-triangular and banded
(``bands`` diagonals) sum to less than independent ones, because later rows take back part of earlier ones. What is
released is as good as C G + z, so that privacy hangs on the columns of C alone: they have norm 1 at most, and columns
``bands`` or more steps apart do not overlap.

C is the Toeplitz matrix of the first ``bands`` coefficients of (1 - x)^(-1/2), scaled to norm 1 (Kalinin and Lampert
2024, arXiv:2405.13763, "BSR"; the mechanism: Denisov et al. 2022, Choquette-Choo et al. 2023, arXiv:2306.08153). It
needs no optimisation and does not hang on the number of steps, so that a run may be made longer.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path

import numpy as np
import torch

from ..core.errors import UserError
from .noise import RandomStream

_KEY_BYTES = 32


def square_root_bands(bands: int) -> np.ndarray:
    """The first column of C, shape (bands,): of norm 1, positive and falling, so that C^-1 is stable."""
    if bands < 1:
        raise ValueError(f"{bands} bands make no matrix")
    index = np.arange(1, bands)
    column = np.concatenate([[1.0], np.cumprod((2 * index - 1) / (2 * index))])
    return column / np.linalg.norm(column)


def inverse_column(bands: int, steps: int) -> np.ndarray:
    """The first column of C^-1, shape (steps,): the weights with which a row of noise sums the draws before it."""
    column = square_root_bands(bands)
    inverse = np.zeros(steps)
    for step in range(steps):
        before = inverse[max(0, step - bands + 1) : step][::-1]
        inverse[step] = (float(step == 0) - column[1 : 1 + len(before)] @ before) / column[0]
    return inverse


def prefix_error(bands: int, steps: int) -> tuple[float, float]:
    """Variance of the sum of the first t noise rows, per coordinate, for z of variance 1: (largest, mean) over t.

    Both are for one participation of norm 1. Independent noise (bands = 1) has (steps, (steps + 1) / 2).
    """
    variance = np.cumsum(np.cumsum(inverse_column(bands, steps)) ** 2)
    return float(variance.max()), float(variance.mean())


class CorrelatedNoise:
    """Row after row of C^-1 z, drawn from ``key`` alone: the row of step t is the same in every process.

    z of step t is an AES-CTR stream keyed by HMAC-SHA256(``key``, t). The last ``bands`` - 1 rows are kept, in float64;
    a new object draws them anew, from step 0 on, so keep one from round to round where there are many steps.

    Guarantee
    ---------
    Neighbours: data sets that differ by one unit whose steps are ``bands`` or more apart. Trusted: the site alone,
    which keeps ``key`` to itself. Let S_t be the sum of clipped gradients of step t over the clip; it may follow from
    all that was released before. Releasing S_t + z * row_t for t = 0, 1, ... is post-processing of C S + z N(0, I)
    (adaptive steps: Denisov et al. 2022, theorem 2.1). A unit that takes part in k such steps moves C S by at most
    sqrt(k): columns of C that far apart share no row, and each has norm 1 at most. So it costs as much as k
    unsampled Gaussian steps of noise multiplier z. Step t's row must serve one gradient only: a step is handed out
    once, and after it later steps only.
    """

    def __init__(self, key: bytes, bands: int) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a noise key has {_KEY_BYTES} bytes, not {len(key)}")
        self.bands = bands
        self._key = key
        self._column = square_root_bands(bands)
        self._past: list[np.ndarray] = []  # rows of the steps before `_next`, the latest last
        self._next = 0
        self._handed = -1

    def at(self, step: int) -> StepNoise:
        """The noise of ``step``, counted from 0 over the whole run. Raises ValueError for a step handed out before."""
        if step <= self._handed:
            raise ValueError(f"the noise of step {step} has been handed out; noise serves one gradient only")
        self._handed = step
        return StepNoise(self, step)

    def _row(self, step: int, size: int) -> np.ndarray:
        if self._past and len(self._past[-1]) != size:
            raise ValueError(f"noise for {size} numbers, where step {self._next - 1} had {len(self._past[-1])}")
        for at in range(self._next if self.bands > 1 else step, step + 1):
            draw = RandomStream(hmac.digest(self._key, f"noise of step {at}".encode(), "sha256")).normal(size)
            for distance, row in enumerate(reversed(self._past), 1):
                draw -= self._column[distance] * row
            draw /= self._column[0]
            self._past = [*self._past, draw][-(self.bands - 1) :] if self.bands > 1 else []
        self._next = step + 1
        return draw


class StepNoise:
    """The noise of one step, to be drawn once."""

    def __init__(self, source: CorrelatedNoise, step: int) -> None:
        self._source: CorrelatedNoise | None = source
        self._step = step

    def normal_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """The step's row in the shape, dtype and device of ``tensor``, which holds all that trains."""
        source, self._source = self._source, None
        if source is None:
            raise ValueError(f"the noise of step {self._step} has been drawn; noise serves one gradient only")
        row = torch.from_numpy(source._row(self._step, tensor.numel()))
        return row.to(tensor.device, tensor.dtype).reshape(tensor.shape)


def seeded_key_not_private(*parts: object) -> bytes:
    """A key that depends on ``parts`` alone (seed, site). NOT private."""
    return hashlib.sha256("|".join(map(repr, parts)).encode()).digest()


def site_key(
    path: str | Path, *, bands: int, slots: int, first_step: int, trained: str = "", resumed: bool = False
) -> bytes:
    """The secret noise key of a run, kept in the file ``path`` on the site's own disk.

    ``trained``: a name for the tensors that train, whose noise it is. ``first_step``: how many steps of this run the
    ledger held before those that were just reserved: call it after the reservation, so that of two processes only one
    makes the key. ``resumed``: that reservation was taken up again, and who died over it may have made the key. Returns
    once the key is on the disk. Raises :class:`UserError` where the key of a run that has begun is lost or belongs to
    another plan (other noise would no longer cancel, and an epoch that was paid for as one would be two), and where
    there is one though the ledger knows nothing of it: it may have served, on other data or under a ledger that is
    lost.
    """
    path = Path(path)
    plan: dict[str, int | str] = {"bands": bands, "slots": slots, "trained": trained}
    try:
        if first_step == 0 and not (resumed and path.exists()):
            return _create(path, plan)
        kept = json.loads(path.read_text(encoding="utf-8"))
        key = bytes.fromhex(kept.pop("key"))
        if len(key) != _KEY_BYTES:
            raise ValueError("not a key")
    except FileExistsError:
        raise UserError(
            f"{path}: there is a noise key of this run, but no step of it in the ledger; noise must not serve twice, "
            "so it cannot begin again; begin a new run"
        ) from None
    except FileNotFoundError:
        raise UserError(
            f"{path}: the noise key of a run that has taken {first_step} steps is lost, so it cannot go on; begin a "
            "new run"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: holds no noise key, so the run cannot go on; begin a new run") from None
    except OSError as error:
        raise UserError(f"{path}: the noise key cannot be kept: {error.strerror or error}") from None
    if kept.get("trained") != trained and {**kept, "trained": trained} == plan:
        raise UserError(
            f"{path}: other tensors train than when the run was begun, and noise that is correlated over steps is of "
            "the same ones throughout; set privacy.bands = 1"
        )
    if kept != plan:
        raise UserError(
            f"{path}: the run was begun with {kept.get('bands')} bands over {kept.get('slots')} steps an epoch, not "
            f"{bands} over {slots}; begin a new run, or give back the settings and data"
        )
    return key


def _create(path: Path, plan: dict[str, int | str]) -> bytes:
    """A fresh key in a new file. Raises FileExistsError where there is one."""
    key = os.urandom(_KEY_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A crash that leaves half a file leaves a run that does not go on.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "w", encoding="utf-8") as opened:
        json.dump({**plan, "key": key.hex()}, opened)
        opened.flush()
        os.fsync(opened.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return key
