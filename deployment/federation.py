"""`federation.toml`: who takes part, where the server is, and how long certificates last."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from ..core.config import Section
from ..core.errors import UserError

#: A site's name: it becomes a folder, a certificate's subject and a key of the run's configuration.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
#: Who is not a site, but can be named where one can.
ROLES = ("server", "authority")
S = TypeVar("S", bound=Section)
_LABEL = re.compile(r"^(?!-)[A-Za-z0-9-]{1,63}(?<!-)$")


class Server(Section):
    """Where sites reach the server."""

    address: str
    names: tuple[str, ...] = ()
    listen: str = "0.0.0.0"

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError("write HOST:PORT, without https://")
        _require_host(_bare(host))
        return value

    @field_validator("names")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _require_host(name)
        return value

    @field_validator("listen")
    @classmethod
    def _numeric(cls, value: str) -> str:
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            raise ValueError("write an IP address of the server's own, or 0.0.0.0 for all") from None

    @property
    def host(self) -> str:
        return _bare(self.address.rpartition(":")[0])

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


class Certificates(Section):
    """Days that a certificate lasts from its making."""

    authority_days: int = Field(3650, ge=1, le=36500)
    server_days: int = Field(365, ge=1, le=3650)
    site_days: int = Field(365, ge=1, le=3650)


class Site(Section):
    """One who takes part."""

    name: str = Field(pattern=NAME)


class FederationFile(Section):
    """The whole file."""

    name: str = Field(pattern=NAME)
    server: Server
    certificates: Certificates = Certificates()
    site: tuple[Site, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> FederationFile:
        # Names become folders, and some file systems do not tell E from e.
        names = [site.name.casefold() for site in self.site]
        twice = next((name for name in names if names.count(name) > 1), "")
        if twice:
            raise ValueError(f"two sites are called {twice}")
        if taken := next((name for name in names if name in ROLES), ""):
            raise ValueError(f"`{taken}` is no name for a site: it is a role of its own")
        return self

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.site)


def load_federation(path: Path) -> FederationFile:
    """Read and check ``path``. Raises :class:`UserError`: one line that names the file, the key and the mend."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; docs/deployment.md shows a federation.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return read_toml(FederationFile, text, path)


def read_toml(kind: type[S], text: str, path: Path) -> S:
    """``text`` as a ``kind``. Raises :class:`UserError` that names ``path`` and the key."""
    try:
        return kind.model_validate(tomllib.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        said = {"extra_forbidden": "is not a key of it", "missing": "is missing"}.get(
            first["type"], first["msg"].removeprefix("Value error, ")
        )
        raise UserError(f"{path}: {f'`{key}` ' if key else ''}{said}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _require_host(name: str) -> None:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if not name or len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
            raise ValueError(f"`{name}` is neither a host name nor an IP address") from None
