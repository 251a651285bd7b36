"""What the tests of `core` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from fedgraft.core.errors import UserError

Refused = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="session")
def refused() -> Refused:
    """``with refused("north", "tensor a"): ...`` expects a UserError of one printable line that holds those words."""

    @contextmanager
    def check(*words: str) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            yield
        text = str(caught.value)
        assert text and text.isprintable() and len(text) <= 1100, text
        for word in words:
            assert word in text, text

    return check
