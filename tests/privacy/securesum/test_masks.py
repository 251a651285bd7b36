"""Masks: the published keystream of AES-CTR, added without a wrong turn at the end of a block, and cancelling."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedgraft.privacy.securesum import keys
from fedgraft.privacy.securesum.masks import add_mask, sign_between

KEY = bytes(range(32))


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("size", [0, 1, 3, 8191, 8192, 8193, 16384, 16385, 50_001])
def test_the_mask_is_the_keystream_whatever_the_length(dtype, size):
    # AES-256 block by block in ECB on the counter: what CTR is.
    total = np.zeros(size, dtype)
    add_mask(total, KEY, +1)
    blocks = -(-total.nbytes // 16)
    counters = b"".join(number.to_bytes(16, "big") for number in range(blocks))
    stream = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor().update(counters)
    assert total.tobytes() == stream[: total.nbytes]


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_adding_wraps_and_taking_off_undoes_it(dtype):
    rng = np.random.default_rng(0)
    before = np.frombuffer(rng.bytes(80_008), dtype).copy()
    total, stream = before.copy(), np.zeros_like(before)
    add_mask(stream, KEY, +1)
    add_mask(total, KEY, +1)
    modulus = 2 ** (8 * before.itemsize)
    naive = [(int(a) + int(b)) % modulus for a, b in zip(before[:500], stream[:500], strict=True)]
    assert total[:500].tolist() == naive
    add_mask(total, KEY, -1)
    assert np.array_equal(total, before)


def test_two_sites_derive_one_key_and_opposite_signs():
    a, b = keys.fresh(), keys.fresh()
    one, other = ("a", keys.public(a)), ("b", keys.public(b))
    assert keys.mask_key(a, b"context", one, other) == keys.mask_key(b, b"context", other, one)
    assert sign_between("a", "b") == -sign_between("b", "a")


def test_a_key_is_bound_to_context_names_and_public_keys():
    a, b, c = keys.fresh(), keys.fresh(), keys.fresh()
    pa, pb, pc = keys.public(a), keys.public(b), keys.public(c)
    found = {
        keys.mask_key(a, b"round 1", ("a", pa), ("b", pb)),
        keys.mask_key(a, b"round 2", ("a", pa), ("b", pb)),
        keys.mask_key(a, b"round 1", ("x", pa), ("b", pb)),
        keys.mask_key(a, b"round 1", ("a", pa), ("x", pb)),
        keys.mask_key(a, b"round 1", ("a", pc), ("b", pb)),
        keys.mask_key(a, b"round 1", ("a", pa), ("c", pc)),
        keys.seed_key(a, b"round 1", "a"),
    }
    assert len(found) == 7


def test_what_is_sealed_opens_for_the_one_it_is_for_and_no_other():
    a, b, c = keys.fresh(), keys.fresh(), keys.fresh()
    names = {key: (name, keys.public(key)) for key, name in ((a, "a"), (b, "b"), (c, "c"))}
    sealed = keys.seal(a, b"context", names[a], names[b], b"share")
    assert keys.unseal(b, b"context", names[b], names[a], sealed) == b"share"
    for key, context, sender in ((c, b"context", a), (b, b"another", a), (b, b"context", c)):
        with pytest.raises(Exception, match="not what it sealed"):
            keys.unseal(key, context, names[key], names[sender], sealed)
    # The other direction has another key: what comes back cannot be what was sent.
    with pytest.raises(Exception, match="not what it sealed"):
        keys.unseal(a, b"context", names[a], names[b], sealed)
