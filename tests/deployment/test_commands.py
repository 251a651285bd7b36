"""`fedgraft provision` and `fedgraft site init`, as people type them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedgraft import cli
from fedgraft.deployment.authority import Authority


@pytest.fixture
def type_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedgraft", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return run


def test_from_a_file_to_a_signed_site(type_in: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    text = 'name = "x"\n[server]\naddress = "127.0.0.1:9092"\n[[site]]\nname = "east"\n'
    (tmp_path / "federation.toml").write_text(text)
    code, out, _ = type_in("provision", "federation.toml", "--output", "kits")
    assert code == 0 and "authority: " in out and "has sent no key" in out and "expires" in out
    anchor = next(line.split()[-1] for line in out.splitlines() if "authority: " in line)
    code, out, _ = type_in("site", "init", "--kit", "kits/sites/east")
    fingerprint = next(line.split()[-1] for line in out.splitlines() if "read to the coordinator" in line)
    assert code == 0 and len(fingerprint) == 71
    code, out, _ = type_in("provision", "sign", "kits/sites/east/site.csr")
    assert code == 0 and "NOT COMPARED" in out and fingerprint in out
    code, out, _ = type_in("provision", "sign", "kits/sites/east/site.csr", "--fingerprint", fingerprint)
    assert code == 0 and "NOT COMPARED" not in out
    assert type_in("provision", "rotate", "server")[0] == 0
    code, told, _ = type_in("provision", "rotate", "authority")
    assert code == 0 and "the keys of east" in told and told.split()[1] != anchor
    assert type_in("provision", "rotate", "east")[0] == 0
    assert "awaits a new key" in type_in("provision", "status")[1]
    assert type_in("provision", "revoke", "east")[0] == 0
    assert Authority(tmp_path / "kits").sites["east"].state == "revoked"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("provision", "nothing.toml"), "nothing.toml: no such file"),
        (("provision", "sign", "nothing.csr"), "kits: holds no federation"),
        (("provision", "revoke", "east"), "kits: holds no federation"),
        (("site", "init"), "site.toml: the site's settings is missing"),
    ],
)
def test_a_mistake_is_one_line(type_in: Callable[..., tuple[int, str, str]], words: tuple[str, ...], said: str) -> None:
    code, out, err = type_in(*words)
    assert (code, out) == (2, "") and err.startswith("fedgraft: ") and err.count("\n") == 1 and said in err
