"""A federation of two sites, provisioned and signed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedgraft.client.site.keys import make_key
from fedgraft.deployment.authority import Authority

TEXT = """\
name = "oncology"
[server]
address = "fed.example.org:9092"
names = ["10.0.0.7"]
[[site]]
name = "east"
[[site]]
name = "north"
"""


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., Authority]:
    """Found the federation of a text in ``tmp_path/kits``."""

    def _found(text: str = TEXT, kits: str = "kits") -> Authority:
        source = tmp_path / "federation.toml"
        source.write_text(text)
        return Authority.create(source, tmp_path / kits)

    return _found


@pytest.fixture
def authority(found: Callable[..., Authority]) -> Authority:
    return found()


@pytest.fixture
def signed(authority: Authority) -> Authority:
    """The same, with the keys of both sites made and signed."""
    for name in authority.federation.sites:
        make_key(authority.kits / "sites" / name)
        authority.sign(authority.kits / "sites" / name / "site.csr")
    return authority
