"""A site's side of one secure sum: it lets out its numbers under masks, and its part of the masks to one set only."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np

from ...core.errors import UserError
from . import keys, shamir
from .identity import Roster, SigningKey, sign
from .masks import add_mask, sign_between
from .messages import Advert, Adverts, Agreement, Agreements, Envelopes, Reveal, Survivors, agreed
from .parts import pack, unpack
from .terms import Terms

_STAGES = (b"opened", b"shared", b"masked", b"agreed", b"revealed")
_SERVER = "the server"


@dataclass(frozen=True)
class Progress:
    """What a site must not lose between two messages of a round, nor tell: its secrets, and how far it has come."""

    run: str
    round: int
    stage: str
    sealing: bytes = b""
    masking: bytes = b""
    seed: bytes = b""
    adverts: bytes = b""
    own_shares: bytes = b""
    envelopes: bytes = b""
    about: bytes = b""
    survivors: bytes = b""
    #: For whom the round was unmasked before.
    unmasked: bytes = b""

    def encode(self) -> bytes:
        values = [getattr(self, name) for name in _BYTES]
        return pack(b"progress", self.run.encode(), str(self.round).encode(), self.stage.encode(), *values)

    @classmethod
    def decode(cls, data: bytes, sender: str) -> Progress:
        parts = unpack(data, sender, most=4 + len(_BYTES))
        if len(parts) != 4 + len(_BYTES) or parts[0] != b"progress" or parts[3] not in _STAGES:
            raise UserError(f"{sender}: what was kept of a secure sum is damaged; the run cannot go on at this site")
        return cls(parts[1].decode(), int(parts[2]), parts[3].decode(), *parts[4:])


_BYTES = tuple(each.name for each in fields(Progress) if each.name not in ("run", "round", "stage"))


@dataclass
class SecureSite:
    """``site``, which signs with ``key`` and knows the others by ``roster``, in the secure sum of ``terms``.

    ``before``: the :attr:`progress` that this site kept of the run, of this round or an earlier one; None where there
    is none. Keep :attr:`progress` safe before the answer of any method leaves: it is what makes the guarantee outlive
    the process.

    Guarantee
    ---------
    Against a server that lies in every way, with up to :attr:`~.terms.Terms.colluders` sites: of this site's numbers
    it learns nothing but their sum with those of all honest sites of one set of survivors, of ``threshold`` sites or
    more. A round that was unmasked is unmasked again for the same survivors alone, and one before it is not. Each
    method raises :class:`UserError`, and reveals nothing, for what an honest server does not send.
    """

    terms: Terms
    site: str
    key: SigningKey
    roster: Roster
    before: Progress | None = None
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        known = self.roster.digest(self.terms.sites)
        if self.site not in self.terms.sites:
            raise UserError(f"site {self.site} is not among those of the secure sum")
        if not self.roster.owns(self.site, self.key):
            raise UserError(f"site {self.site}: its signing key is not the one that its roster has for it")
        self._context = self.terms.context
        # Signatures are bound to the sites' keys too: all must know each other by the same.
        self._signing = pack(self._context, known)
        before = self.before
        if before is not None and before.run == self.terms.run and before.round > self.terms.round:
            raise UserError(
                f"site {self.site} has gone on to round {before.round}: round {self.terms.round} is not summed again; "
                "start a new run from the last adapter (start_from)"
            )
        if before is not None and (before.run, before.round) == (self.terms.run, self.terms.round):
            self.progress = before
        else:
            self.progress = Progress(self.terms.run, self.terms.round, "")

    # The five answers

    def advertise(self) -> Advert:
        """Open the round, or open it anew: fresh keys, signed."""
        sealing, masking, seed = keys.fresh(), keys.fresh(), secrets.token_bytes(keys.KEY)
        self.progress = Progress(
            *(self.terms.run, self.terms.round, "opened", sealing, masking, seed), unmasked=self.progress.unmasked
        )
        advert = Advert(self.site, keys.public(sealing), keys.public(masking), hashlib.sha256(seed).digest())
        return replace(advert, signature=sign(self.key, advert.text(self._signing)))

    def share(self, adverts: Adverts) -> Envelopes:
        """Check who takes part, and give each of them a share of this site's secrets, sealed."""
        self._require("opened", "its keys")
        known = self._known(adverts)
        own = known.get(self.site)
        mine = (keys.public(self.progress.sealing), keys.public(self.progress.masking))
        if own is None or (own.sealing, own.masking) != mine:
            raise UserError(f"{_SERVER} shows other keys for site {self.site} than the site's own; nothing is sent")
        for advert in known.values():
            if not self.roster.signed(advert.site, advert.signature, advert.text(self._signing)):
                raise UserError(
                    f"{advert.site}: its keys of the secure sum are not signed by it for this round, these terms and "
                    "this roster: they were put in by another, are of another round, or its configuration differs"
                )
        taken = [key for advert in known.values() for key in (advert.sealing, advert.masking)]
        if len(set(taken)) < len(taken):
            raise UserError(f"{_SERVER} shows one key of the secure sum twice; nothing is sent")
        shares = self._shares()
        sealed = {
            name: keys.seal(
                self.progress.sealing, self._context, (self.site, own.sealing), (name, other.sealing), shares[name]
            )
            for name, other in known.items()
            if name != self.site
        }
        self.progress = replace(self.progress, stage="shared", adverts=adverts.encode(), own_shares=shares[self.site])
        return Envelopes(sealed)

    def admit(self, envelopes: Envelopes) -> Progress:
        """Check all that :meth:`mask` checks but the numbers: before they are computed, which may cost much."""
        self._require("shared", "its shares")
        known = self._known(Adverts.decode(self.progress.adverts, _SERVER))
        strangers = set(envelopes.sealed) - (set(known) - {self.site})
        if strangers:
            raise UserError(f"{_SERVER} sends shares from {min(strangers)}, which takes no part in the secure sum")
        self._require_enough(len(envelopes.sealed) + 1, "share their keys")
        progress = replace(self.progress, stage="masked", envelopes=envelopes.encode())
        self._opened(progress, known)
        return progress

    def mask(self, envelopes: Envelopes, numbers: np.ndarray, weight: int, about: bytes) -> np.ndarray:
        """``numbers`` (n,) under ``weight`` as n + 1 masked entries of the ring.

        ``envelopes``: from the sites that masks are shared with; ``about``: a digest of what the numbers were computed
        from, on which all survivors must agree.
        """
        progress = replace(self.admit(envelopes), about=pack(about, str(numbers.size).encode()))
        known = self._known(Adverts.decode(self.progress.adverts, _SERVER))
        total = self.terms.ring.encode(numbers, weight)
        add_mask(total, keys.seed_key(self.progress.seed, self._context, self.site), +1)
        own = (self.site, known[self.site].masking)
        for name in envelopes.sealed:
            key = keys.mask_key(self.progress.masking, self._context, own, (name, known[name].masking))
            add_mask(total, key, sign_between(self.site, name))
        self.progress = progress
        return total

    def agree(self, survivors: Survivors) -> Agreement:
        """Sign the set of survivors: one set, once."""
        self._require("masked", "its numbers")
        names = survivors.sites
        strangers = set(names) - {self.site, *self._sealed}
        if strangers:
            raise UserError(f"{_SERVER} counts {min(strangers)} among the survivors, which shared no masks")
        if self.site not in names:
            raise UserError(f"{_SERVER} says that the numbers of site {self.site} were lost; nothing is revealed")
        self._require_enough(len(names), "are left")
        if self.progress.unmasked not in (b"", survivors.encode()):
            raise UserError(
                f"site {self.site} has revealed round {self.terms.round} for another set of survivors; nothing more is "
                "revealed. Start a new run from the last adapter (start_from)"
            )
        self.progress = replace(self.progress, stage="agreed", survivors=survivors.encode())
        return Agreement(sign(self.key, self._agreed(survivors)))

    def reveal(self, agreements: Agreements) -> Reveal:
        """The shares that unmask the sum, after so many sites have signed what this one has."""
        self._require("agreed", "its signature")
        survivors = Survivors.decode(self.progress.survivors, _SERVER)
        text = self._agreed(survivors)
        for name, signature in agreements.signatures.items():
            if name not in survivors.sites or not self.roster.signed(name, signature, text):
                raise UserError(
                    f"{name} has not signed the round as site {self.site} knows it, its keys, adapter and survivors: "
                    "the server tells the sites different things; nothing is revealed"
                )
        self._require_enough(len(agreements.signatures), "agree on the survivors")
        held = self._opened(self.progress, self._known(Adverts.decode(self.progress.adverts, _SERVER)))
        seeds = {name: held[name][1] for name in survivors.sites}
        lost = {name: held[name][0] for name in held if name not in survivors.sites}
        # The secrets are of no more use; that the round was revealed, and for whom, must be remembered.
        self.progress = Progress(self.terms.run, self.terms.round, "revealed", unmasked=self.progress.survivors)
        return Reveal(seeds, lost)

    # Inside

    @property
    def _sealed(self) -> Mapping[str, bytes]:
        return Envelopes.decode(self.progress.envelopes, _SERVER).sealed

    def _require(self, stage: str, what: str) -> None:
        if self.progress.stage != stage:
            raise UserError(
                f"site {self.site} was asked out of turn in the secure sum of round {self.terms.round}: the step after "
                f"{what} comes once, and it is at `{self.progress.stage or 'nothing'}`"
            )

    def _require_enough(self, count: int, what: str) -> None:
        if count < self.terms.threshold:
            raise UserError(
                f"{count} sites {what} in the secure sum, {self.terms.threshold} must (secure_sum.threshold); nothing "
                "is revealed"
            )

    def _known(self, adverts: Adverts) -> dict[str, Advert]:
        known = {advert.site: advert for advert in adverts.adverts}
        strangers = set(known) - set(self.terms.sites)
        if strangers:
            raise UserError(f"{_SERVER} shows keys of {min(strangers)}, which is not among the sites of the secure sum")
        self._require_enough(len(known), "sent keys")
        return known

    def _shares(self) -> dict[str, bytes]:
        """For every site of the terms, its share of the masking key and of the seed."""
        parts = [
            shamir.split(secret, self.terms.threshold, self.terms.indices)
            for secret in (self.progress.masking, self.progress.seed)
        ]
        return {name: b"".join(part[self.terms.index(name)] for part in parts) for name in self.terms.sites}

    def _opened(self, progress: Progress, known: Mapping[str, Advert]) -> dict[str, tuple[bytes, bytes]]:
        """By site, its shares (of the masking key, of the seed) that this site holds."""
        own = (self.site, known[self.site].sealing)
        held = {self.site: progress.own_shares}
        for name, sealed in Envelopes.decode(progress.envelopes, _SERVER).sealed.items():
            held[name] = keys.unseal(progress.sealing, self._context, own, (name, known[name].sealing), sealed)
        return {name: (text[: shamir.SHARE], text[shamir.SHARE :]) for name, text in held.items()}

    def _agreed(self, survivors: Survivors) -> bytes:
        adverts = hashlib.sha256(self.progress.adverts).digest()
        masking = sorted({self.site, *self._sealed})
        return agreed(self._signing, adverts, masking, self.progress.about, survivors.sites)
