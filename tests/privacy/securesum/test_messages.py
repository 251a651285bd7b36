"""Messages: what is encoded comes back, and everything else is refused in one line that names the sender."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.core.errors import UserError
from fedgraft.privacy.securesum.messages import (
    SEALED,
    Advert,
    Adverts,
    Agreement,
    Agreements,
    Envelopes,
    Reveal,
    Survivors,
)
from fedgraft.privacy.securesum.parts import pack, unpack
from fedgraft.privacy.securesum.shamir import SHARE

ADVERT = Advert("east", b"a" * 32, b"b" * 32, b"c" * 32, b"signature")
MESSAGES = [
    ADVERT,
    Adverts((ADVERT, Advert("west", b"d" * 32, b"e" * 32, b"f" * 32, b"another"))),
    Envelopes({"east": b"x" * SEALED, "west": b"y" * SEALED}),
    Survivors(("east", "north", "west")),
    Agreement(b"signature"),
    Agreements({"east": b"one", "west": b"two"}),
    Reveal({"east": b"s" * SHARE}, {"west": b"k" * SHARE}),
]
KINDS = [type(message) for message in MESSAGES]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message):
    assert type(message).decode(message.encode(), "east") == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_no_message_can_be_taken_for_another(message):
    for kind in KINDS:
        if kind is not type(message):
            with pytest.raises(UserError, match=r"^east: "):
                kind.decode(message.encode(), "east")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_that_is_cut_off_or_longer_is_refused(message):
    data = message.encode()
    for end in range(len(data)):
        with pytest.raises(UserError, match=r"^east: "):
            type(message).decode(data[:end], "east")
    for more in (b"\0", bytes(4), pack(b"x")):
        with pytest.raises(UserError, match=r"^east: "):
            type(message).decode(data + more, "east")


def test_any_bytes_give_a_message_or_one_line():
    draw, passed = random.Random(3), 0
    for _ in range(20_000):
        message = draw.choice(MESSAGES)
        data = bytearray(message.encode())
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            found = type(message).decode(bytes(data), "east")
        except UserError as error:
            assert str(error).startswith("east: ")
        else:
            passed += 1
            assert found.encode() == bytes(data), "two texts for one message"
    assert passed > 100


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_a_list_of_parts_has_bytes_of_its_own(parts):
    assert unpack(pack(*parts), "east", most=10) == parts


@pytest.mark.parametrize(
    "data",
    [
        pack(b"survivors", pack(b"west", b"east")),
        pack(b"survivors", pack(b"east", b"east")),
        pack(b"survivors", pack(b"")),
        pack(b"survivors", pack(b"\xff\xfe")),
        pack(b"survivors", pack(b"e" * 201)),
        pack(b"survivors", pack(*(f"{n:05d}".encode() for n in range(1001)))),
        b"\xff\xff\xff\xff",
    ],
)
def test_names_that_cannot_be_are_refused(data):
    with pytest.raises(UserError, match=r"^the server: "):
        Survivors.decode(data, "the server")


def test_a_signature_that_is_no_signature_is_too_long():
    with pytest.raises(UserError, match="too long"):
        Agreement.decode(Agreement(bytes(201)).encode(), "east")


def test_lengths_are_checked():
    with pytest.raises(UserError, match="99 bytes, not 82"):
        Envelopes.decode(Envelopes({"west": bytes(99)}).encode(), "east")
    with pytest.raises(UserError, match="not 33"):
        Reveal.decode(Reveal({"west": bytes(32)}, {}).encode(), "east")
    with pytest.raises(UserError, match="not 32"):
        Advert.decode(pack(b"advert", b"east", bytes(31), bytes(32), bytes(32), b""), "east")
