"""Servers that are killed, and sites that are slow, paused, cut off, out of disk or out of time.

In each case the job ends with the right adapter, no budget is lost or spent twice, and who was missing is named.

What is right: the adapter of the in-process engine when the same sites miss the same rounds. The noise is drawn from
the run's seed, so that private runs can be compared too, and the ledgers say what was spent, and how often.
"""

from __future__ import annotations

import errno
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
from flwr.app import Error, Message
from safetensors.numpy import load_file

from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.privacy.ledger import Entry, Ledger
from fedgraft.server.deployed import jobs
from fedgraft.server.deployed.control import Control
from fedgraft.server.rundir import read_metrics, read_run
from fedgraft.simulations import delays
from fedgraft.simulations.fate import Fate, Fates
from fedgraft.simulations.loopback.running import Loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(540)]
Job = Callable[..., RunConfig]
_PATIENCE = 300.0
_LONG = 800
_HOUR = 3600


class Proxy:
    """Passes bytes between a site and the server, until it is cut."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._open: set[socket.socket] = set()
        self._cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        """End every connection, and take none."""
        self._cut = True
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._cut = False

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                if self._cut:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._server))
                self._open |= {near, far}
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            self._open.discard(each)


class Field:
    """A federation of real processes in the middle of a job."""

    def __init__(self, loopback: Loopback, tiny: Any, folder: Path) -> None:
        self.loopback = loopback
        self.config = loopback.config
        self.run = loopback.server.runs / "job"
        self._tiny = tiny
        self._folder = folder

    def state(self, site: str) -> Path:
        return self.loopback.site(site) / "state"

    def processes(self, site: str) -> list[psutil.Process]:
        """What works for a site: `site start`, SuperNode, worker, and what answers."""
        root = psutil.Process(self.loopback.processes[site].pid)
        return [root, *root.children(recursive=True)]

    def entries(self, site: str) -> list[Entry]:
        folder = self.state(site) / "ledgers"
        return list(Ledger(folder).entries()) if folder.is_dir() else []

    def until_training(self, site: str, round: int = 1) -> None:
        """Wait until ``site`` has set its budget of ``round`` aside, which is the moment before its first step."""
        self.until(lambda: any(entry.about["round"] == round for entry in self.entries(site)))

    def until_trained(self, round: int) -> dict[str, Any]:
        """Wait for the line of a round's training, and return it."""
        self.until(lambda: bool(self.lines(round)))
        return self.lines(round)[0]

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not done():
            assert time.monotonic() < deadline, "nothing happened for too long"
            time.sleep(0.1)

    def lines(self, round: int) -> list[dict[str, Any]]:
        if not (self.run / "metrics.jsonl").exists():
            return []
        return [line for line in read_metrics(self.run) if line["kind"] == "train" and line["round"] == round]

    def missing(self) -> dict[int, set[str]]:
        """The sites that each round's training went without."""
        rounds = range(1, self.config.rounds + 1)
        return {number: set(self.lines(number)[0]["missing"]) for number in rounds}

    def require_right(
        self, *, untrained: Mapping[int, Collection[str]], late: Collection[tuple[str, int]] = ()
    ) -> None:
        """The adapter is that of the in-process engine with the same sites missing in the same rounds.

        ``untrained``: those of them that spent nothing either, by round; ``late``: whose result of which round came in
        the next.
        """
        gone = {
            number: {site for site in sites if (site, number) not in late} for number, sites in self.missing().items()
        }

        class Latecomers(Fates):
            def __init__(self, config: RunConfig) -> None:
                super().__init__(config)
                self.none = not late

            def of(self, kind: str, site: str, round: int) -> Fate | None:
                return Fate("late", "no answer in time") if (site, round) in late else None

        def between(site: str, message: Message, give: Callable[[], Message]) -> Message:
            number = int(message.metadata.group_id) if message.metadata.group_id.isdecimal() else 0
            if message.metadata.message_type != "train" or site not in gone[number]:
                return give()
            if site not in untrained.get(number, ()):
                give()
            return Message(Error(2, "gone"), reply_to=message)

        with mock.patch.object(delays, "Fates", Latecomers):
            self._tiny.run(self.config, self._folder / "simulated", between=between)
        paths = (Path(read_run(run)["adapter_path"]) for run in (self.run, self._folder / "simulated"))
        one, two = (load_file(path / "adapter_model.safetensors") for path in paths)
        assert set(one) == set(two) and one
        assert max(float(np.abs(one[key] - two[key]).max()) for key in one) <= 1e-5

    def require_spent_once(self, rounds: Mapping[str, Collection[int]]) -> None:
        """Each site's ledger has one reservation for each of its ``rounds``, with all steps, and no others."""
        for site in self.config.site_names:
            steps = self.config.site(site).local_steps or self.config.train.local_steps  # type: ignore[union-attr]
            found = [(entry.about["round"], entry.part, entry.steps) for entry in self.entries(site)]
            assert found == [(number, "train", steps) for number in sorted(rounds[site])], site


@pytest.fixture
def field(job: Job, tiny_federation: Any, tmp_path: Path) -> Callable[..., Any]:
    """A provisioned federation, whose policies let seeded noise pass."""

    def made(**changes: Any) -> Field:
        seeded = {"privacy.seeded_noise_not_private": True, "privacy.epsilon": 8.0, "rounds": 2}
        config = job(private=True, **{**seeded, **changes})
        loopback = Loopback(tmp_path / "dev", config)
        loopback.provision()
        return Field(loopback, tiny_federation, tmp_path)

    return made


def _kill(loopback: Loopback, who: str) -> None:
    """SIGKILL what serves: the ServerApp of the job, the SuperLink, or `fedgraft server start` itself."""
    root = psutil.Process(loopback.processes["server"].pid)
    if who == "server":
        root.kill()
        loopback.processes.pop("server").wait()
        return
    (victim,) = (each for each in root.children(recursive=True) if any(who in part for part in each.cmdline()[:4]))
    victim.kill()


def _slow(config_of: Job, site: str, **changes: Any) -> dict[str, Any]:
    """Changes by which ``site`` trains for long."""
    sites = [{"name": each.name, "path": each.path} for each in config_of().data.sites]
    return {
        "data.sites": [{**each, "local_steps": _LONG} if each["name"] == site else each for each in sites],
        **changes,
    }


@contextmanager
def _at_work(field: Field) -> Iterator[Callable[[], None]]:
    """The federation up, and the job submitted; gives what waits for its end."""
    loopback = field.loopback
    with loopback.running(print):
        control = Control(loopback.server)
        jobs.submit(loopback.server, control, field.config, "job")
        yield lambda: jobs.require_completed(loopback.server, control, "job")
        control.close()


@pytest.mark.parametrize("who", ["flwr-serverapp", "deployed.superlink", "server"])
def test_a_server_that_is_killed_in_the_middle_of_a_round_goes_on_and_no_site_pays_twice(
    field: Callable[..., Field], job: Job, who: str
) -> None:
    found = field(**_slow(job, "east"))
    with _at_work(found) as finish:
        found.until_training("east")
        _kill(found.loopback, who)
        if who == "server":
            found.loopback._start("server", "server", found.loopback.kits / "server")
        finish()
        said = (found.loopback.folder / "logs" / "server.log").read_text()
    assert "job: what ran it has died; it goes on from round 1" in said and "Traceback" not in said
    assert read_run(found.run)["status"] == "finished" and len(read_run(found.run)["resumed"]) == 1
    assert found.missing() == {1: set(), 2: set()}
    found.require_spent_once({"east": [1, 2], "north": [1, 2], "south": [1, 2]})
    found.require_right(untrained={})


def test_a_site_that_is_paused_for_a_minute_is_waited_for_or_named(field: Callable[..., Field], job: Job) -> None:
    found = field(**_slow(job, "east", **{"server.quorum": 2, "server.round_timeout": 200.0}))
    with _at_work(found) as finish:
        found.until_training("east")
        paused = found.processes("east")
        for process in paused:
            process.suspend()
        time.sleep(60)
        for process in paused:
            process.resume()
        finish()
        # Flower takes a site for lost a minute after its last sign of life; a round does not wait for one.
        online = Control(found.loopback.server)
        found.until(lambda: found.loopback._online(online))
        more = found.config.model_copy(update={"rounds": 3})
        spent = [entry.about["round"] for entry in found.entries("east")]
        found.require_right(untrained={number: ["east"] for number in (1, 2) if number not in spent})
        jobs.submit(found.loopback.server, online, more, resume="job")
        jobs.require_completed(found.loopback.server, online, "job")
        online.close()
    assert {reason for number in (1, 2) for reason in found.lines(number)[0]["missing"].values()} <= {
        "the connection to it was lost",
        "not connected",
    }
    assert spent == sorted(set(spent)) and spent[0] == 1
    assert found.lines(3)[0]["missing"] == {}, "it takes part again"


def test_a_straggler_beyond_the_deadline_is_named_and_the_others_go_on(field: Callable[..., Field], job: Job) -> None:
    changes = _slow(job, "east", **{"server.quorum": 2, "server.round_timeout": 15.0})
    changes["data.sites"][0]["local_steps"] = 20 * _LONG
    found = field(**changes)
    with _at_work(found) as finish:
        finish()
    for number in (1, 2):
        (line,) = found.lines(number)
        # Flower may say so first.
        assert line["missing"]["east"] in ("no answer in 15 s", "no answer in time")
        assert line["faults"] == {"east": "late"}
        assert line["seconds"] < 40
    assert "east answered in 0 of 2 rounds (2 late)" in read_run(found.run)["warnings"]
    # It was still at the first round, whose steps are all counted; the second may have been set aside since.
    spent = [entry.about["round"] for entry in found.entries("east")]
    assert spent in ([1], [1, 2])
    found.require_right(untrained={1: ["east"], 2: ["east"]})


def test_a_result_that_comes_late_counts_in_the_next_round_where_that_is_the_policy(
    field: Callable[..., Field], job: Job
) -> None:
    changes = {"server.quorum": 2, "server.round_timeout": 45.0, "server.late": "staleness", "rounds": 3}
    found = field(**_slow(job, "east", **changes))
    with _at_work(found) as finish:
        found.until_training("east")
        paused = found.processes("east")
        for process in paused:
            process.suspend()
        first = found.until_trained(1)
        for process in paused:
            process.resume()
        second = found.until_trained(2)
        finish()
    assert first["faults"] == {"east": "late"} and "late" not in first
    (late,) = second["late"]
    assert (late["site"], late["round"], late["age"], late["why"]) == ("east", 1, 1, "")
    assert late["privacy"]["steps"] == _LONG
    assert found.missing() == {1: {"east"}, 2: set(), 3: set()} and "late" not in found.lines(3)[0]
    assert read_run(found.run)["sites"]["east"]["late"] == {"1": 1}
    found.require_spent_once({"east": [1, 2, 3], "north": [1, 2, 3], "south": [1, 2, 3]})
    found.require_right(untrained={}, late=[("east", 1)])


def test_a_site_whose_connection_is_cut_while_it_trains_answers_all_the_same(
    field: Callable[..., Field], job: Job
) -> None:
    found = field(**_slow(job, "east"))
    server = found.loopback.server.settings.server
    proxy = Proxy(server.port)
    settings = found.loopback.site("east") / "site.toml"
    settings.write_text(settings.read_text().replace(server.address, f"127.0.0.1:{proxy.port}"))
    with _at_work(found) as finish:
        found.until_training("east")
        proxy.cut()
        time.sleep(20)
        assert not found.lines(1), "it was cut off before it could answer"
        proxy.mend()
        finish()
    proxy.close()
    assert found.missing() == {1: set(), 2: set()}
    found.require_spent_once({"east": [1, 2], "north": [1, 2], "south": [1, 2]})
    found.require_right(untrained={})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Puts a disk of one MiB under a folder."""
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path) -> Path:
    """A file of all that is left on the disk of ``folder``."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return path


def test_a_site_whose_disk_is_full_spends_nothing_and_sends_nothing(
    field: Callable[..., Field], job: Job, small_disk: Callable[[Path], None]
) -> None:
    found = field(**_slow(job, "east", rounds=3, **{"server.quorum": 2}))
    state = found.state("east")
    small_disk(state)
    loopback = found.loopback
    with loopback.running(print):
        control = Control(loopback.server)
        jobs.submit(loopback.server, control, found.config, "job")
        found.until(
            lambda: "hello" in (state / "audit.jsonl").read_text() if (state / "audit.jsonl").exists() else False
        )
        filler = _fill(state)
        first = found.until_trained(1)
        filler.unlink()
        found.until_training("east", 2)
        filler = _fill(state)
        second = found.until_trained(2)
        filler.unlink()
        jobs.require_completed(loopback.server, control, "job")
        control.close()
    assert "No space left on device" in first["missing"]["east"], first
    assert "No space left on device" in second["missing"]["east"], second
    assert found.missing()[3] == set()
    found.require_spent_once({"east": [2, 3], "north": [1, 2, 3], "south": [1, 2, 3]})
    found.require_right(untrained={1: ["east"]})


def _faked(ahead: str, file: Path | None = None) -> dict[str, str]:
    """Surroundings in which the clock is ``ahead``, or as ``file`` says from moment to moment."""
    libfaketime = pytest.importorskip("libfaketime")
    library = Path(libfaketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    if not library.is_file():
        pytest.skip("libfaketime was not built here")
    told = {"FAKETIME_TIMESTAMP_FILE": str(file)} if file is not None else {"FAKETIME": ahead}
    return {"LD_PRELOAD": str(library), "DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1", **told}


@contextmanager
def _surroundings(values: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in values.items():
            patch.setenv(key, value)
        yield


def test_a_site_whose_clock_is_off_by_an_hour_is_told_so_before_it_takes_part(field: Callable[..., Field]) -> None:
    found = field(**{"server.quorum": 2, "server.join_timeout": 10.0})
    loopback = found.loopback
    try:
        loopback._start("server", "server", loopback.kits / "server")
        loopback._wait("the server", lambda: loopback._said("server", "serving "))
        for ahead, said in (("+1h", "s ahead of that of 127.0.0.1"), ("-1h", "ca.crt: is not valid before")):
            with _surroundings(_faked(ahead)):
                loopback._start("east", "site", loopback.site("east"))
            assert loopback.processes.pop("east").wait(60) == 2
            words = (loopback.folder / "logs" / "east.log").read_text().strip().splitlines()
            assert len(words) == 1 and said in words[0]
            assert words[0].endswith(("; set it (NTP)", "; set this machine's clock"))
        for name in ("north", "south"):
            loopback._start(name, "site", loopback.site(name))
        control = Control(loopback.server)
        found.until(lambda: {n.name for n in control.nodes() if n.status == "online"} == {"north", "south"})
        jobs.submit(loopback.server, control, found.config, "job")
        jobs.require_completed(loopback.server, control, "job")
        control.close()
    finally:
        loopback.end()
    assert found.missing() == {1: {"east"}, 2: {"east"}}
    assert found.lines(1)[0]["missing"] == {"east": "not connected"}
    found.require_spent_once({"east": [], "north": [1, 2], "south": [1, 2]})
    found.require_right(untrained={1: ["east"], 2: ["east"]})


def test_a_server_whose_clock_is_off_by_an_hour_is_found_by_every_site(field: Callable[..., Field]) -> None:
    found = field()
    with _surroundings(_faked("+1h")):
        found.loopback._start("server", "server", found.loopback.kits / "server")
    try:
        found.loopback._wait("the server", lambda: found.loopback._said("server", "serving "))
        with pytest.raises(
            UserError, match=r"east ended: this machine's clock is 3[56]\d\d s behind that of 127.0.0.1"
        ):
            found.loopback._start("east", "site", found.loopback.site("east"))
            found.loopback._wait("east", lambda: False)
    finally:
        found.loopback.end()


def test_a_clock_that_jumps_by_an_hour_while_a_site_trains_costs_no_budget(
    field: Callable[..., Field], job: Job, tmp_path: Path
) -> None:
    found = field(**_slow(job, "east", rounds=3, **{"server.quorum": 2, "server.round_timeout": 120.0}))
    loopback, clock = found.loopback, tmp_path / "clock"
    clock.write_text("+0\n")
    try:
        loopback._start("server", "server", loopback.kits / "server")
        loopback._wait("the server", lambda: loopback._said("server", "serving "))
        with _surroundings(_faked("", clock)):
            loopback._start("east", "site", loopback.site("east"))
        for name in ("north", "south"):
            loopback._start(name, "site", loopback.site(name))
        control = Control(loopback.server)
        loopback._wait("the sites", lambda: loopback._online(control))
        jobs.submit(loopback.server, control, found.config, "job")
        found.until_training("east")
        clock.write_text(f"+{_HOUR}\n")
        jobs.require_completed(loopback.server, control, "job")
        control.close()
    finally:
        loopback.end()
    said = (loopback.folder / "logs" / "east.log").read_text()
    assert (
        re.search(r"clock is 36\d\d s ahead of that of 127.0.0.1:\d+; set it \(NTP\)\n$", said)
        and "Traceback" not in said
    )
    spent = [entry.about["round"] for entry in found.entries("east")]
    assert spent == sorted(set(spent)) and spent[0] == 1
    gone = found.missing()
    assert all(sites <= {"east"} for sites in gone.values())
    found.require_right(untrained={number: ["east"] for number in gone if number not in spent})
