"""federation.toml: what is accepted, and one line for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft.core.errors import UserError
from fedgraft.deployment.federation import load_federation

GOOD = 'name = "oncology"\n[server]\naddress = "fed.example.org:9092"\n[[site]]\nname = "east"\n'


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("fed.example.org:9092", "fed.example.org", 9092), ("10.0.0.7:443", "10.0.0.7", 443), ("[::1]:9092", "::1", 9092)],
)
def test_an_address_is_a_host_and_a_port(tmp_path: Path, address: str, host: str, port: int) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(GOOD.replace("fed.example.org:9092", address))
    server = load_federation(path).server
    assert (server.host, server.port) == (host, port)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "not valid TOML"),
        ("", "`name` is missing"),
        (GOOD + "[extra]\n", "`extra` is not a key of it"),
        (GOOD.replace("fed.example.org:9092", "https://fed.example.org"), "`server.address` write HOST:PORT"),
        (GOOD.replace(":9092", ":99999"), "`server.address` write HOST:PORT"),
        (GOOD.replace("fed.example.org", "fed example"), "neither a host name nor an IP address"),
        (GOOD.replace("fed.example.org", "fed..org"), "neither a host name nor an IP address"),
        (GOOD.replace('"east"', '"../east"'), "`site.0.name`"),
        (GOOD.replace('"east"', '""'), "`site.0.name`"),
        (GOOD + '[[site]]\nname = "EAST"\n', "two sites are called east"),
        (GOOD + '[[site]]\nname = "Server"\n', "`server` is no name for a site"),
        (GOOD.replace("fed.example.org", "fed.example.org\\n"), "neither a host name nor an IP address"),
        (GOOD.split("[[site]]")[0], "`site` is missing"),
        (GOOD + "[certificates]\nsite_days = 0\n", "`certificates.site_days`"),
        (GOOD.replace("[[site]]", 'listen = "everywhere"\n[[site]]'), "`server.listen` write an IP address"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_federation(path)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_federation(tmp_path / "federation.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary.toml: cannot be read"):
        load_federation(tmp_path / "binary.toml")
