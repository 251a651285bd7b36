"""What a deployment of real processes refuses: one line for people, a line in the audit log, and nothing is spent."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.supercore.fab import Fab
from safetensors.torch import load_file, save_file

from fedgraft.core.config import RunConfig, load_config
from fedgraft.core.errors import UserError
from fedgraft.deployment import certificates
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.processes import end
from fedgraft.privacy import Ledger
from fedgraft.privacy.auditlog import audit_journal
from fedgraft.server.deployed import jobs
from fedgraft.server.deployed.control import Control
from fedgraft.server.rundir import read_run
from fedgraft.simulations.loopback.running import Loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
_PATIENCE = 200.0
Made = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def made(tiny_federation: Any, tinyfederation: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``made(sites, **changes)``: a private job for sites with a file each, as it is read from `job.json`."""
    folder = tmp_path_factory.mktemp("job")

    def make(sites: tuple[dict[str, str], ...] = ({}, {}, {}), **changes: Any) -> RunConfig:
        entries = []
        for number, (name, more) in enumerate(zip(tinyfederation.SITES, sites, strict=False)):
            path = tinyfederation.write_csv(folder / f"{name}.csv", list(tiny_federation.rows[number::3]))
            entries.append({"name": name, "path": str(path), **more})
        plain = {"data.path": "", "data.sites": entries, "rounds": 1, "evaluate.every": 0, "evaluate.release": "none"}
        config = tiny_federation.private(**{**plain, "server.join_timeout": 60.0, **changes})
        (folder / "job.json").write_text(json.dumps(json.loads(config.to_json())))
        return load_config(folder / "job.json")

    return make


@pytest.fixture(scope="module")
def loopback(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """Three sites that allow epsilon 2 and no counts, and their server."""
    found = Loopback(tmp_path_factory.mktemp("refusals") / "dev", made())
    found.provision()
    with found.running(print):
        yield found


def _log(folder: Path) -> list[dict[str, Any]]:
    return audit_journal(folder / "audit.jsonl").entries()


def _site_log(loopback: Loopback, site: str) -> list[dict[str, Any]]:
    return _log(loopback.site(site) / "state")


def _failed(loopback: Loopback, config: RunConfig, name: str, bundle: Fab | None = None) -> tuple[str, str]:
    """Submit a job that must fail; its run and error as run.json has them."""
    kit, control = loopback.server, Control(loopback.server)
    try:
        if bundle is None:
            jobs.submit(kit, control, config, name)
        else:
            control.submit(bundle, {"output": name})
        with pytest.raises(UserError, match=f"{name}: failed"):
            jobs.require_completed(kit, control, name)
    finally:
        control.close()
    run = read_run(kit.runs / name)
    assert run["status"] == "failed" and "\n" not in run["error"]
    return str(run["run"]), str(run["error"])


def _require_kept_back(loopback: Loopback, run: str, said: str) -> None:
    """Each site has written down what it refused of ``run``, has answered nothing else, and has spent nothing."""
    for site in loopback.config.site_names:
        fresh = [line for line in _site_log(loopback, site) if line.get("run") == run]
        assert fresh and {line["event"] for line in fresh} == {"refused"}
        assert all(said in line["why"] and "\n" not in line["why"] for line in fresh)
        assert Ledger(loopback.site(site) / "state" / "ledgers").entries() == ()


# Jobs


def test_a_bundle_with_code_is_refused_by_every_site_and_never_run(
    loopback: Loopback, made: Made, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    with zipfile.ZipFile(io.BytesIO(jobs.bundle(made()).content)) as archive:
        settings = archive.read("pyproject.toml")
    evil = f"open({str(mark)!r}, 'w').close()\n".encode()
    content, _ = build_fab_from_files({"pyproject.toml": settings, "evil.py": evil})
    run, error = _failed(loopback, made(), "code", Fab(hashlib.sha256(content).hexdigest(), content, {}))
    assert "holds evil.py, and a site takes configuration only" in error
    _require_kept_back(loopback, run, "holds evil.py")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("epsilon", {"privacy.epsilon": 2.5}, "max_epsilon = 2"),
        ("counts", {"evaluate.release": "exact_not_private"}, 'evaluation = "none"'),
    ],
)
def test_a_job_beyond_the_policy_is_refused_with_its_line(
    loopback: Loopback, made: Made, name: str, changes: dict[str, Any], rule: str
) -> None:
    run, error = _failed(loopback, made(**changes), name)
    assert f"({rule})" in error and "the site's policy forbids it, line" in error
    _require_kept_back(loopback, run, rule)
    line = next(line for line in _site_log(loopback, "east") if line.get("run") == run)
    policy = (loopback.site("east") / "policy.toml").read_text().splitlines()
    assert policy[line["rule"]["line"] - 1] == line["rule"]["text"]
    submitted = [line for line in _log(loopback.server.state) if line["event"] == "submitted"]
    assert submitted[-1]["run"] == name


def test_another_base_model_at_a_site_is_refused_there(loopback: Loopback, made: Made, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(made().model, other)
    (weights,) = other.glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    run, error = _failed(loopback, made(({"model": str(other)}, {}, {})), "model")
    assert "east" in error and "fingerprint" in error
    line = [line for line in _site_log(loopback, "east") if line.get("run") == run][-1]
    assert line["event"] == "refused" and "fingerprint" in line["why"]
    assert Ledger(loopback.site("east") / "state" / "ledgers").entries() == ()


def test_a_site_that_the_job_leaves_out_is_asked_for_nothing(loopback: Loopback, made: Made) -> None:
    kit, control = loopback.server, Control(loopback.server)
    _, number = jobs.submit(kit, control, made(({}, {})), "two")
    jobs.require_completed(kit, control, "two")
    said = "".join(control.logs(number, follow=True))
    control.close()
    assert said.count("site south is connected, and rests: data.sites does not list it") == 1 and "INFO" not in said
    run = read_run(kit.runs / "two")["run"]
    assert all(line.get("run") != run for line in _site_log(loopback, "south"))
    assert [line["event"] for line in _site_log(loopback, "north") if line.get("run") == run][-1] == "left"


# Keys and servers: last, since these sites take part no more


def test_an_expired_and_a_revoked_site_are_turned_away_and_a_plaintext_server_hears_no_word(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(loopback.kits)
    with monkeypatch.context() as earlier:
        # A certificate that lasts some seconds more.
        at = certificates.now() - timedelta(days=authority.federation.certificates.site_days) + timedelta(seconds=15)
        earlier.setattr(certificates, "now", lambda: at)
        authority.sign(loopback.site("north") / "site.csr")
    authority.revoke("south")
    for site in ("north", "south"):
        loopback.processes[site].wait(_PATIENCE)
        said = (loopback.folder / "logs" / f"{site}.log").read_text()
        # Flower says it in two ways, by what the site was about to do.
        assert "revoked or expired; ask the coordinator" in said and "Traceback" not in said
        line = _site_log(loopback, site)[-1]
        assert (line["event"], line["kind"]) == ("refused", "start") and "revoked or expired" in line["why"]
    log = _log(loopback.server.state)
    assert {(line["site"], line["why"]) for line in log if line["event"] == "unregistered"} == {
        ("north", "its certificate has ended"),
        ("south", "its key is not on the roster"),
    }
    turned_away = {line["key"] for line in log if line["event"] == "refused"}
    registered = {line["site"]: line["key"] for line in log if line["event"] == "registered"}
    assert turned_away == {registered["north"], registered["south"]}

    loopback._start("north", "site", loopback.site("north"))
    assert loopback.processes["north"].wait(_PATIENCE) == 2
    assert "site.crt: expired on" in (loopback.folder / "logs" / "north.log").read_text()
    assert "site.crt: expired on" in _site_log(loopback, "north")[-1]["why"]

    # Another one takes the server's place, without TLS.
    end(loopback.processes.pop("server"), patiently=True)
    with _plaintext(loopback.server.settings.server.port) as heard:
        deadline = time.monotonic() + _PATIENCE
        while not heard and time.monotonic() < deadline:
            time.sleep(0.2)
        running = loopback.processes.pop("east")
        assert heard, "the site that was connected tries again"
        end(running, patiently=True)
        loopback._start("east", "site", loopback.site("east"))
        assert loopback.processes["east"].wait(_PATIENCE) == 2
    assert "speaks no TLS, so nothing is sent there" in _site_log(loopback, "east")[-1]["why"]
    for sent in heard:
        assert sent[:2] in (b"\x16\x03", b""), "the beginning of TLS and nothing else"
        assert b"HTTP" not in sent and b"east" not in sent


@contextmanager
def _plaintext(port: int) -> Iterator[list[bytes]]:
    """A server without TLS; what it heard, connection by connection."""
    heard: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", port))
    listener.settimeout(0.2)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                heard.append(connection.recv(1 << 16))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield heard
    finally:
        over.set()
        thread.join()
        listener.close()
