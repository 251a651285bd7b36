"""The server's side of one secure sum: it carries sealed shares about, adds masked numbers up, and unmasks the sum."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np

from ...core.errors import UserError
from . import keys, shamir
from .masks import add_mask, sign_between
from .messages import Advert, Adverts, Agreement, Agreements, Envelopes, Reveal, Survivors
from .terms import Terms

#: Choices of shares that are tried before a site counts as not to be given back.
_TRIES = 100


class ShortError(UserError):
    """Fewer sites than the threshold are left: the sum cannot be unmasked, by nobody."""


@dataclass(frozen=True)
class Sum:
    """The weighted ``mean`` (n,) of the numbers of ``sites``, whose weights sum to ``weight``.

    No entry of it is off by more than ``error``; what the sum of the numbers is, is ``mean * weight``.
    """

    mean: np.ndarray
    weight: int
    sites: tuple[str, ...]
    error: float


class SecureServer:
    """The server of the secure sum of ``terms``, over ``length`` numbers of each site.

    It holds one running sum of masked numbers. The methods named for a message take one in, with the name of the site
    that it came from, and raise :class:`UserError`, which names the site, for one that is not what the protocol asks
    for: it counts as not sent. The properties are what is to be sent next; each closes the step before, and raises
    :class:`ShortError` where fewer sites than the threshold have taken it.
    """

    def __init__(self, terms: Terms, length: int) -> None:
        self.terms = terms
        self._adverts: dict[str, Advert] = {}
        self._envelopes: dict[str, Envelopes] = {}
        self._total = np.zeros(length + 1, terms.ring.dtype)
        self._masked: set[str] = set()
        self._signatures: dict[str, bytes] = {}
        self._reveals: dict[str, Reveal] = {}

    def advert(self, site: str, advert: Advert) -> None:
        """A site's keys."""
        if advert.site != site or site not in self.terms.sites:
            raise UserError(f"{site}: sent the keys of {advert.site} for the secure sum")
        self._once(site, self._adverts, self.terms.sites)
        self._adverts[site] = advert

    @property
    def adverts(self) -> Adverts:
        """For every site that has sent its keys."""
        self._require_enough(self._adverts, "sent their keys")
        return Adverts(tuple(self._adverts[site] for site in sorted(self._adverts)))

    def shared(self, site: str, envelopes: Envelopes) -> None:
        """A site's sealed shares for the others."""
        self._once(site, self._envelopes, self._adverts)
        if set(envelopes.sealed) != set(self._adverts) - {site}:
            raise UserError(f"{site}: its shares for the secure sum are not for the sites that take part")
        self._envelopes[site] = envelopes

    @property
    def envelopes(self) -> dict[str, Envelopes]:
        """For each site that has shared its secrets, what the others sealed for it."""
        self._require_enough(self._envelopes, "shared their secrets")
        return {
            to: Envelopes({sender: sent.sealed[to] for sender, sent in self._envelopes.items() if sender != to})
            for to in sorted(self._envelopes)
        }

    def masked(self, site: str, entries: np.ndarray) -> None:
        """A site's masked numbers, and its masked weight."""
        self._once(site, self._masked, self._envelopes)
        if entries.shape != self._total.shape or entries.dtype != self._total.dtype:
            raise UserError(
                f"{site}: sent {entries.size} masked entries of {entries.dtype}, expected are {self._total.size} of "
                f"{self._total.dtype}"
            )
        self._total += entries
        self._masked.add(site)

    @property
    def survivors(self) -> Survivors:
        """For the survivors themselves."""
        self._require_enough(self._masked, "sent their numbers")
        return Survivors(tuple(sorted(self._masked)))

    def agreed(self, site: str, agreement: Agreement) -> None:
        """A survivor's signature of the course of the round."""
        self._once(site, self._signatures, self._masked)
        self._signatures[site] = agreement.signature

    @property
    def agreements(self) -> Agreements:
        """For the sites that have signed."""
        self._require_enough(self._signatures, "agreed on the survivors")
        return Agreements(self._signatures)

    def revealed(self, site: str, reveal: Reveal) -> None:
        """A site's shares: of the seeds of all survivors, of the masking keys of all who were lost after sharing."""
        self._once(site, self._reveals, self._signatures)
        if set(reveal.seeds) != self._masked or set(reveal.keys) != self._lost:
            raise UserError(f"{site}: revealed other shares of the secure sum than it was asked for")
        self._reveals[site] = reveal

    def result(self) -> Sum:
        """The sum over the survivors, unmasked.

        Raises :class:`ShortError` below the threshold and :class:`UserError` where shares do not give a secret back.
        """
        self._require_enough(self._reveals, "revealed their shares")
        context = self.terms.context
        total = self._total.copy()
        for site in sorted(self._masked):
            seed = self._whole(site, {name: reveal.seeds[site] for name, reveal in self._reveals.items()}, _committed)
            add_mask(total, keys.seed_key(seed, context, site), -1)
        for lost in sorted(self._lost):
            private = self._whole(lost, {name: reveal.keys[lost] for name, reveal in self._reveals.items()}, _owned)
            own = (lost, self._adverts[lost].masking)
            for site in sorted(self._masked):
                key = keys.mask_key(private, context, own, (site, self._adverts[site].masking))
                add_mask(total, key, -sign_between(site, lost))
        mean, weight = self.terms.ring.decode(total)
        if not len(self._masked) <= weight <= len(self._masked) * self.terms.most_weight:
            raise UserError("the unmasked weights cannot be: a site masked its numbers otherwise than the rest")
        return Sum(mean, weight, tuple(sorted(self._masked)), self.terms.ring.error(len(self._masked), weight))

    # Inside

    @property
    def _lost(self) -> set[str]:
        """Who shared its secrets, so that the others have masks in common with it, and sent no numbers."""
        return set(self._envelopes) - self._masked

    def _once(self, site: str, taken: Collection[str], asked: Collection[str]) -> None:
        if site not in asked:
            raise UserError(f"{site}: was not asked for this step of the secure sum")
        if site in taken:
            raise UserError(f"{site}: took this step of the secure sum before")

    def _require_enough(self, done: Collection[str], what: str) -> None:
        if len(done) < self.terms.threshold:
            raise ShortError(
                f"{len(done)} of {len(self.terms.sites)} sites {what} for the secure sum, which needs "
                f"{self.terms.threshold} (secure_sum.threshold): nothing was unmasked"
            )

    def _whole(self, site: str, shares: Mapping[str, bytes], fits: Callable[[Advert, bytes], bool]) -> bytes:
        """The secret of ``site`` from enough of its ``shares``, by holder; some of them may be false."""
        for holders in islice(combinations(sorted(shares), self.terms.threshold), _TRIES):
            try:
                secret = shamir.combine({self.terms.index(holder): shares[holder] for holder in holders})
            except UserError:
                continue
            if fits(self._adverts[site], secret):
                return secret
        raise UserError(
            f"the shares of the secret of {site} do not give it back: it shared another one, or too many sites "
            "revealed false shares; nothing was unmasked"
        )


def _committed(advert: Advert, seed: bytes) -> bool:
    return hashlib.sha256(seed).digest() == advert.commitment


def _owned(advert: Advert, private: bytes) -> bool:
    return keys.public(private) == advert.masking
