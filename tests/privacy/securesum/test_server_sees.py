"""Every byte that the server holds: nothing tells one site's numbers from chance, until they are all added up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedgraft.privacy.securesum import keys, shamir
from fedgraft.privacy.securesum.masks import add_mask, sign_between
from fedgraft.privacy.securesum.messages import Envelopes, Reveal

#: A fair draw fails once in ten thousand; here are fewer than 200 of them, drawn anew in each run of the tests.
LEAST = 1e-7


def entries(circle, site: str) -> np.ndarray:
    return np.frombuffer(circle.seen[site, "numbers"], circle.terms.ring.dtype).copy()


def seeds(circle) -> dict[str, bytes]:
    """What the server learns in the end: the seeds of all survivors, from the shares that it holds."""
    reveals = {n: Reveal.decode(data, n) for (n, step), data in circle.seen.items() if step == "reveal"}
    holders = sorted(reveals)[: circle.terms.threshold]
    return {
        site: shamir.combine({circle.terms.index(h): reveals[h].seeds[site] for h in holders})
        for site in reveals[holders[0]].seeds
    }


@pytest.mark.parametrize("bits", [32, 64])
def test_what_a_site_sends_looks_drawn_evenly_though_all_its_numbers_are_alike(circle, unevenness, bits):
    one = circle(5, bits=bits, length=20_000)
    one.numbers = {name: np.full(one.length, 0.25) for name in one.names}
    one.sum()
    for name in one.names:
        assert unevenness(one.seen[name, "numbers"]) > LEAST
    # The test has power: the same numbers before the masks, and the unmasked sum, do not look so.
    plain = one.terms.ring.encode(one.numbers["s00"], one.weights["s00"])
    assert unevenness(plain.tobytes()) < LEAST
    assert np.unique(one.sum().mean).size == 1


def test_with_every_seed_that_it_learns_single_updates_and_partial_sums_still_look_drawn_evenly(circle, unevenness):
    one = circle(4, threshold=3, length=20_000)
    one.numbers = {name: np.full(one.length, 0.25) for name in one.names}
    found = one.sum()
    known = seeds(one)
    bare = {name: entries(one, name) for name in one.names}
    for name, total in bare.items():
        add_mask(total, keys.seed_key(known[name], one.terms.context, name), -1)
    for size in (1, 2, 3):
        for some in itertools.combinations(one.names, size):
            assert unevenness(np.sum([bare[name] for name in some], axis=0, dtype=np.uint64).tobytes()) > LEAST
    whole = np.sum([bare[name] for name in one.names], axis=0, dtype=np.uint64)
    assert np.array_equal(one.terms.ring.decode(whole)[0], found.mean)


def test_numbers_that_come_late_from_a_site_that_was_counted_as_lost_stay_hidden(circle, unevenness):
    one = circle(5, threshold=3, length=20_000)
    one.numbers = {name: np.full(one.length, 0.25) for name in one.names}
    with pytest.raises(InterruptedError):
        one.sum(until="agreement")
    late = entries(one, "s04")
    # The same course again, in which the server pretends that they never came.
    server = one.server
    server._masked.discard("s04")
    server._total -= late
    for name in server.survivors.sites:
        server.agreed(name, one.ask(name, lambda site: site.agree(server.survivors)))
    for name in server.survivors.sites:
        server.revealed(name, one.ask(name, lambda site: site.reveal(server.agreements)))
    assert server.result().sites == ("s00", "s01", "s02", "s03")
    holders = sorted(server._reveals)[:3]
    private = shamir.combine({one.terms.index(h): server._reveals[h].keys["s04"] for h in holders})
    adverts = {advert.site: advert for advert in server.adverts.adverts}
    assert keys.public(private) == adverts["s04"].masking
    # Every mask that it has in common with others can be taken off: its own is left.
    own = ("s04", adverts["s04"].masking)
    for name in ("s00", "s01", "s02", "s03"):
        key = keys.mask_key(private, one.terms.context, own, (name, adverts[name].masking))
        add_mask(late, key, -sign_between("s04", name))
    assert unevenness(late.tobytes()) > LEAST


def test_no_secret_and_no_number_lies_in_the_open_in_anything_that_the_server_got(circle, unevenness):
    one = circle(5, threshold=3, lost={"s03": "numbers"})
    private = {}

    def noted(site, message):
        # What the sites hold when they mask, which the server must not.
        progress = one.site(site).progress
        private[site] = (progress.sealing, progress.masking, progress.seed, progress.own_shares)
        return message

    one.sum(numbers=noted)
    everything = b"".join(one.seen.values())
    assert len(private) == 5 - 1
    for site, (sealing, masking, seed, own) in private.items():
        assert sealing not in everything and masking not in everything and seed not in everything
        # Of its own shares a survivor gives that of its seed, never that of its masking key.
        assert own[: shamir.SHARE] not in everything
        assert own[shamir.SHARE :] in everything
        plain = one.terms.ring.encode(one.numbers[site], one.weights[site])
        for at in range(plain.size - 1):
            assert plain[at : at + 1].tobytes() not in one.seen[site, "numbers"]
    sealed = b"".join(
        text
        for (site, step), data in one.seen.items()
        if step == "shares"
        for text in Envelopes.decode(data, site).sealed.values()
    )
    assert unevenness(sealed) > LEAST


def test_equal_numbers_are_masked_differently_by_every_site_and_in_every_round(circle):
    one = circle(3)
    one.numbers = {name: np.ones(one.length) for name in one.names}
    one.weights = dict.fromkeys(one.names, 1)
    one.sum()
    first = {name: one.seen[name, "numbers"] for name in one.names}
    one.round = 2
    one.sum()
    texts = [*first.values(), *(one.seen[name, "numbers"] for name in one.names)]
    words = np.concatenate([np.frombuffer(text, np.uint64) for text in texts])
    assert np.unique(words).size == words.size
