"""A server that lies: each lie is refused by the sites in one line, and no share leaves them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft.core.errors import UserError
from fedgraft.privacy.securesum import Roster, SecureSite, Terms, keys
from fedgraft.privacy.securesum.identity import sign
from fedgraft.privacy.securesum.messages import Adverts, Agreements, Envelopes, Reveal, Survivors
from fedgraft.privacy.securesum.site import Progress

FIVE = ("s00", "s01", "s02", "s03", "s04")


def revealed(circle) -> list[str]:
    """Who has revealed shares."""
    return [site for site, step in circle.seen if step == "reveal"]


def swapped(adverts: Adverts, site: str, **values) -> Adverts:
    return Adverts(tuple(replace(a, **values) if a.site == site else a for a in adverts.adverts))


def test_keys_of_the_servers_own_in_a_sites_place_are_found(circle):
    def lie(site, adverts):
        # The man in the middle: to s00 it is s01.
        return swapped(adverts, "s01", masking=keys.public(keys.fresh())) if site == "s00" else adverts

    one = circle(5)
    with pytest.raises(UserError, match=r"^s01: its keys .* are not signed by it"):
        one.sum(shares=lie)
    assert ("s00", "shares") not in one.seen


def test_keys_that_the_server_signs_itself_are_found(circle):
    one, own = circle(5), Ed25519PrivateKey.generate()

    def lie(site, adverts):
        forged = swapped(adverts, "s01", masking=keys.public(keys.fresh()), signature=b"").adverts[1]
        text = forged.text(one.site("s01")._signing)
        return Adverts((adverts.adverts[0], replace(forged, signature=sign(own, text)), *adverts.adverts[2:]))

    with pytest.raises(UserError, match=r"^s01: its keys .* are not signed by it"):
        one.sum(shares=lie)


def test_keys_of_an_earlier_round_are_found(circle):
    one = circle(5)
    one.sum()
    old = one.server.adverts
    one.round = 2

    def lie(site, adverts):
        return Adverts(tuple(o if o.site == "s01" else a for a, o in zip(adverts.adverts, old.adverts, strict=True)))

    with pytest.raises(UserError, match=r"^s01: .* of another round"):
        one.sum(shares=lie)


def test_a_sites_own_keys_swapped_are_found(circle):
    with pytest.raises(UserError, match="other keys for site s00 than the site's own"):
        circle(5).sum(shares=lambda site, adverts: swapped(adverts, "s00", sealing=bytes(32)))


def test_one_key_for_two_sites_is_found(circle):
    one = circle(5)

    def lie(site, adverts):
        # A site that colludes signs another's keys as its own.
        forged = replace(adverts.adverts[2], masking=adverts.adverts[1].masking)
        text = forged.text(one.site("s02")._signing)
        forged = replace(forged, signature=sign(one.keys["s02"], text))
        return Adverts((*adverts.adverts[:2], forged, *adverts.adverts[3:]))

    with pytest.raises(UserError, match="one key of the secure sum twice"):
        one.sum(shares=lie)


def test_made_up_sites_are_found(circle):
    def lie(site, adverts):
        return Adverts((*adverts.adverts, replace(adverts.adverts[0], site="t00")))

    with pytest.raises(UserError, match="t00, which is not among the sites"):
        circle(5).sum(shares=lie)


def test_a_site_joins_no_sum_with_others_than_its_roster_knows(circle):
    one = circle(3)
    with pytest.raises(UserError, match="site zz is not in this site's roster"):
        one.site("s00", terms=Terms("r", 1, ("s00", "s01", "zz"), 3, 64, 1.0, 1))


def test_terms_that_differ_by_site_are_found(circle):
    # A threshold of three for one site, of four for another.
    one = circle(5, threshold=4)
    other = one.site("s01", terms=replace(one.terms, threshold=3))
    adverts = [one.ask(name, SecureSite.advertise) for name in FIVE if name != "s01"]
    shown = Adverts(tuple(sorted([*adverts, other.advertise()], key=lambda a: a.site)))
    with pytest.raises(UserError, match=r"^s01: its keys .* its configuration differs"):
        one.ask("s00", lambda site: site.share(shown))


def test_rosters_that_differ_by_site_are_found(circle):
    one = circle(4)
    public = {name: key.public_key() for name, key in one.keys.items()}
    other = one.site("s01", roster=Roster({**public, "s03": Ed25519PrivateKey.generate().public_key()}))
    adverts = [one.ask(name, SecureSite.advertise) for name in one.names if name != "s01"]
    shown = Adverts(tuple(sorted([*adverts, other.advertise()], key=lambda a: a.site)))
    with pytest.raises(UserError, match=r"^s01: its keys .* roster"):
        one.ask("s00", lambda site: site.share(shown))


def test_shares_that_were_changed_on_the_way_are_found_before_anything_is_masked(circle):
    def lie(site, envelopes):
        return Envelopes({name: bytes([sealed[0] ^ 1]) + sealed[1:] for name, sealed in envelopes.sealed.items()})

    one = circle(5)
    with pytest.raises(UserError, match=r"^s01: the shares that came in its name are not what it sealed"):
        one.sum(numbers=lie)
    assert ("s00", "numbers") not in one.seen


def test_too_few_masks_are_refused(circle):
    one = circle(5, threshold=4)
    with pytest.raises(UserError, match=r"3 sites share their keys .*, 4 must"):
        one.sum(numbers=lambda site, e: Envelopes({n: e.sealed[n] for n in sorted(e.sealed)[:2]}))


def test_a_site_signs_one_set_of_survivors_alone(circle):
    one = circle(5, threshold=3, lost={"s04": "numbers"})
    one.sum()
    one.round, one.lost = 2, {}
    with pytest.raises(InterruptedError):
        one.sum(until="agreement")
    one.ask("s00", lambda site: site.agree(Survivors(FIVE)))
    with pytest.raises(UserError, match="asked out of turn"):
        one.ask("s00", lambda site: site.agree(Survivors(FIVE[:4])))


def test_two_sets_of_survivors_are_found_before_a_share_leaves(circle):
    one = circle(5, threshold=3)

    def lie(site, survivors):
        # Three are told that all are left, two that s00 is lost: both kinds of shares of s00 would come out.
        return Survivors(FIVE[1:]) if site in ("s03", "s04") else survivors

    with pytest.raises(UserError, match=r"^s03 has not signed the round as site s00 knows it"):
        one.sum(agreement=lie)
    assert revealed(one) == []


def test_with_two_sets_of_survivors_neither_finds_enough_signatures(circle):
    one = circle(5, threshold=3)

    def told(site, survivors):
        return Survivors(FIVE[1:]) if site in ("s03", "s04") else survivors

    def shown(site, agreements):
        same = ("s03", "s04") if site in ("s03", "s04") else ("s00", "s01", "s02")
        return Agreements({name: agreements.signatures[name] for name in same})

    # The larger half may go on, for one set; the smaller is refused.
    with pytest.raises(UserError, match=r"2 sites agree on the survivors .*, 3 must"):
        one.sum(agreement=told, reveal=shown)
    assert revealed(one) == ["s00", "s01", "s02"]
    for name in revealed(one):
        reveal = Reveal.decode(one.seen[name, "reveal"], name)
        assert set(reveal.seeds) == set(FIVE) and not reveal.keys


def test_no_site_ever_gives_both_kinds_of_shares_for_one_site(circle):
    one = circle(5, threshold=3, lost={"s01": "numbers", "s03": "numbers"})
    one.sum()
    for name in revealed(one):
        reveal = Reveal.decode(one.seen[name, "reveal"], name)
        assert set(reveal.seeds) == {"s00", "s02", "s04"}
        assert set(reveal.keys) == {"s01", "s03"}
        with pytest.raises(UserError, match="asked out of turn"):
            one.ask(name, lambda site: site.reveal(Agreements({})))


def test_adapters_that_differ_by_site_are_found(circle):
    # Model inconsistency (Pasquini et al. 2022): all but one are sent an adapter whose change is known.
    one = circle(5, abouts={"s02": b"another adapter"})
    with pytest.raises(UserError, match=r"^s02 has not signed the round as site s00 knows it, its keys, adapter"):
        one.sum()
    assert revealed(one) == []


def test_signatures_that_the_server_makes_up_are_found(circle):
    one = circle(5)
    with pytest.raises(UserError, match=r"^s01 has not signed"):
        one.sum(reveal=lambda site, a: Agreements({**a.signatures, "s01": bytes(64)}))
    assert revealed(one) == []


def test_a_site_that_is_told_it_was_lost_gives_nothing(circle):
    one = circle(5, threshold=3)
    with pytest.raises(UserError, match="says that the numbers of site s00 were lost"):
        one.sum(agreement=lambda site, survivors: Survivors(FIVE[1:]))


def test_survivors_that_shared_no_masks_are_refused(circle):
    one = circle(5, threshold=3, lost={"s04": "shares"})
    with pytest.raises(UserError, match="counts s04 among the survivors"):
        one.sum(agreement=lambda site, survivors: Survivors(FIVE))


def test_an_old_round_is_not_summed_again(circle):
    one = circle(5)
    one.sum()
    one.round = 2
    one.sum()
    one.round = 1
    with pytest.raises(UserError, match="site s00 has gone on to round 2"):
        one.sum()


def test_a_round_is_repeated_for_the_same_survivors_alone(circle):
    one = circle(5, threshold=3, lost={"s04": "numbers"})
    first = one.sum()
    # After a crash of the server: the same sites, the same sum.
    assert (one.sum().mean == first.mean).all()
    # The difference of the two sums would be the numbers of s04.
    one.lost = {}
    with pytest.raises(UserError, match="revealed round 1 for another set of survivors"):
        one.sum()
    assert revealed(one) == []
    one.lost = {"s04": "numbers"}
    assert (one.sum().mean == first.mean).all()


def test_a_round_that_broke_off_before_it_was_unmasked_may_be_repeated_with_others(circle):
    one = circle(5, threshold=3, lost={"s04": "numbers"})
    with pytest.raises(InterruptedError):
        one.sum(until="agreement")
    one.lost = {}
    assert one.sum().sites == FIVE


def test_numbers_are_masked_once_with_the_same_masks(circle):
    one = circle(3)
    with pytest.raises(InterruptedError):
        one.sum(until="agreement")
    with pytest.raises(UserError, match="asked out of turn"):
        one.ask("s00", lambda site: site.mask(Envelopes({}), one.numbers["s01"], 1, b""))


def test_what_a_site_keeps_of_a_round_is_no_secret_any_more_once_it_is_revealed(circle):
    one = circle(3)
    with pytest.raises(InterruptedError):
        one.sum(until="agreement")
    during = Progress.decode(one.progress["s00"], "s00")
    one.sum()
    after = Progress.decode(one.progress["s00"], "s00")
    assert during.seed and during.masking and during.sealing and during.own_shares
    assert not (after.seed or after.masking or after.sealing or after.own_shares or after.envelopes)
    assert Survivors.decode(after.unmasked, "s00").sites == one.names


@pytest.mark.parametrize("spoil", [lambda d: d[:-1], lambda d: d + b"\0\0\0\0", lambda d: b"x" + d, lambda d: b""])
def test_damage_to_what_a_site_keeps_is_found(circle, spoil):
    one = circle(3)
    one.sum()
    with pytest.raises(UserError, match=r"^s00: "):
        Progress.decode(spoil(one.progress["s00"]), "s00")


def test_a_key_that_is_not_the_rosters_is_refused_at_the_site_itself(circle):
    one = circle(3)
    with pytest.raises(UserError, match="site s00: its signing key is not the one"):
        SecureSite(one.terms, "s00", one.keys["s01"], one.roster)


def test_a_key_that_has_one_secret_with_everybody_is_refused():
    with pytest.raises(UserError, match=r"^s01: its key"):
        keys.shared(keys.fresh(), bytes(32), "s01")


def test_flowers_kind_of_node_keys_sign_too(circle):
    one = circle(3)
    one.keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in one.names}
    one.roster = Roster({name: key.public_key() for name, key in one.keys.items()})
    assert one.sum().sites == one.names
    with pytest.raises(UserError, match="not signed by it"):
        one.sum(shares=lambda site, adverts: swapped(adverts, "s01", masking=keys.public(keys.fresh())))
