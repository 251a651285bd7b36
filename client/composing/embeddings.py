"""What texts are about, as vectors of the frozen base encoder, and their mean under differential privacy.

An adapter travels with that mean, so that others can tell whether it was trained for texts like theirs without seeing
any of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.config import PrivacyConfig, RunConfig
from ...core.errors import UserError
from ...core.tasks import Example
from ...privacy.accounting import Event, calibrate_noise, epsilon
from ...privacy.ledger import Ledger, Limit
from ...privacy.noise import RandomStream
from ..resident import Resident
from ..trainer import autocast, by_length, to_device

#: The file beside an adapter's PEFT folder contents.
FILE = "embedding.json"
#: How many texts tell what a site's are like (Chronopoulou et al. 2023).
TEXTS = 100


def embed(model: Resident, examples: Sequence[Example], config: RunConfig) -> np.ndarray:
    """One vector of length one for each of ``examples``, (n, d), in their order. They must not leave the site as such.

    The mean of the last hidden states over an example's own tokens, of the base model as it came: no adapter takes
    part, so that all sites' vectors can be compared.
    """
    network: Any = model.adapter.model.get_base_model()
    body: Any = network.base_model
    if getattr(network.config, "is_encoder_decoder", False):
        body = body.get_encoder()
    numbered = [{**example, "at": at} for at, example in enumerate(examples)]
    rows: np.ndarray | None = None
    with torch.inference_mode(), autocast(config.train, model.device), model.adapter.model.disable_adapter():
        for batch in by_length(numbered, range(len(numbered)), config.evaluate.batch_size):
            tensors = to_device(model.task.collate(batch, model.base.processor), model.device)
            tensors.pop("labels", None)
            hidden = body(**tensors).last_hidden_state.double()
            if "attention_mask" in tensors:
                mask = tensors["attention_mask"].unsqueeze(-1)
                mean = (hidden * mask).sum(1) / mask.sum(1)
            else:
                mean = hidden.mean(1)
            vectors = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
            if rows is None:
                rows = np.zeros((len(examples), vectors.shape[1]))
            rows[[example["at"] for example in batch]] = vectors
    if rows is None:
        raise UserError("there are no texts to embed")
    return rows


@dataclass(frozen=True)
class Profile:
    """The mean of a site's text vectors, and what it cost.

    ``noise``: the standard deviation of the noise on each number of ``mean``; ``units``: privacy units at the site,
    taken as public; ``texts``: how many of them were taken on average; ``fingerprint``: of the base model;
    ``epsilon``, ``delta``: of this release with all that the same units had paid before; 0 where nothing is promised.
    """

    mean: np.ndarray
    fingerprint: str
    units: int
    texts: float
    noise: float = 0.0
    epsilon: float = 0.0
    delta: float = 0.0

    def save(self, folder: str | Path) -> Path:
        """Write it as ``embedding.json`` into an adapter's folder."""
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {"mean": self.mean.tolist()}
        path = Path(folder) / FILE
        path.write_text(json.dumps(values) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str = "") -> Profile:
        """Read what :meth:`save` wrote. Raises :class:`UserError`; also when it is of another base model."""
        path = Path(folder) / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            profile = cls(**{**values, "mean": np.array(values["mean"], dtype=np.float64)})
            whole = profile.mean.ndim == 1 and profile.mean.size and np.isfinite(profile.mean).all()
            if not whole or not np.isfinite(float(profile.noise)):
                raise ValueError("not finite numbers")
        except FileNotFoundError:
            raise UserError(f"{folder}: the adapter comes without an embedding: it has no {FILE}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if fingerprint and profile.fingerprint != fingerprint:
            raise UserError(
                f"{path}: made by another base model ({profile.fingerprint[:12]}); make it anew with this one"
            )
        return profile


def plain_profile(rows: np.ndarray, fingerprint: str, texts: int = TEXTS, seed: int = 0) -> Profile:
    """The exact mean over up to ``texts`` of the vectors. NOT private."""
    chosen = np.random.default_rng([seed, 21]).permutation(len(rows))[:texts]
    return Profile(rows[chosen].mean(axis=0), fingerprint, len(rows), len(chosen))


def profile_event(units: int, privacy: PrivacyConfig, spent: tuple[Event, ...] = (), texts: int = 0) -> Event:
    """What a private profile costs: the least noise that keeps ``privacy.epsilon`` together with what was ``spent``.

    ``texts``: how many units are sampled on average; 0: all, which gives the most accurate mean. Raises
    :class:`UserError` when no noise keeps the budget.
    """
    if units < 1:
        raise UserError("there are no texts to embed")
    rate = min(1.0, texts / units) if texts else 1.0
    noise = calibrate_noise(
        privacy.epsilon, privacy.delta, rate, 1, spent, neighbours=privacy.neighbours, accountant=privacy.accountant
    )
    return Event(noise, rate, 1)


def noised_mean(rows: np.ndarray, groups: Sequence[np.ndarray], event: Event, stream: RandomStream) -> np.ndarray:
    """The mean vector over the privacy units, noised.

    ``rows``: a vector for each record; ``groups``: the records of each unit.

    Guarantee
    ---------
    Neighbours: as the event is accounted, one unit; the number of units is public. Each unit takes part with
    probability ``event.sampling_rate`` and gives the mean of its records' vectors, cut to norm 1; the sum gets Gaussian
    noise of std ``event.noise_multiplier`` on every coordinate. Dividing by the expected number is post-processing.
    """
    total = np.zeros(rows.shape[1])
    drawn = stream.uniform(len(groups)) < event.sampling_rate
    for taken, group in zip(drawn.tolist(), groups, strict=True):
        if taken:
            own = rows[group].mean(axis=0)
            if not np.isfinite(own).all():
                own = np.zeros_like(own)
            total += own / max(1.0, float(np.linalg.norm(own)))
    total += event.noise_multiplier * stream.normal(total.size)
    return total / (event.sampling_rate * len(groups))


def private_profile(
    rows: np.ndarray,
    groups: Sequence[np.ndarray],
    config: RunConfig,
    fingerprint: str,
    ledger: Ledger,
    *,
    split: str = "",
    limits: Sequence[Limit] = (),
    texts: int = 0,
) -> Profile:
    """A profile of training records that the site's ``ledger`` pays for, within ``privacy.epsilon`` and ``limits``.

    Guarantee
    ---------
    Whatever the ledger holds of these units, with this release, is within ``privacy.epsilon`` at ``privacy.delta``; see
    :func:`noised_mean`. The budget is on the disk before a vector is drawn.
    """
    privacy = config.privacy
    if not privacy.enabled:
        raise UserError("a private embedding needs privacy.enabled, whose budget pays for it")
    spent = ledger.spent("train", split)
    event = profile_event(len(groups), privacy, spent, texts)
    own = Limit(
        privacy.epsilon,
        privacy.delta,
        f"privacy.epsilon {privacy.epsilon:g}",
        neighbours=privacy.neighbours,
        accountant=privacy.accountant,
    )
    seeded = privacy.seeded_noise_not_private
    reserved = ledger.reserve(
        event, part="train", split=split, limits=(own, *limits), private_noise=not seeded, run="embedding"
    )
    stream = RandomStream.seeded_not_private(config.seed, "embedding") if seeded else RandomStream.from_os()
    mean = noised_mean(rows, groups, event, stream)
    ledger.settle(reserved, 1, "released")
    expected = event.sampling_rate * len(groups)
    return Profile(
        mean,
        fingerprint,
        len(groups),
        expected,
        event.noise_multiplier / expected,
        epsilon((*spent, event), privacy.delta, privacy.neighbours, privacy.accountant),
        privacy.delta,
    )
