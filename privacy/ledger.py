"""The site's durable record of budget spent: reserved, and on the disk, before the first noisy step; settled after.

One file for each state of a site's data, named by their fingerprint, in one folder. What was spent on data of one name
adds up over all these files, so that a changed record does not forget the past. A reservation counts whole until a
settlement says how many of its steps were taken: a crash at any moment can only have recorded too much. One that was
never settled may be taken up again by whoever carries on with the very same thing, which then costs nothing more.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from ..core.errors import UserError
from .accounting import Event, epsilon
from .journal import CHAIN, Journal, locked

Part = Literal["train", "held-out"]
Outcome = Literal["released", "failed"]
#: How far back a clock may be set without a word: an entry lies in the wrong year then for no longer than that.
_CLOCK = timedelta(minutes=1)
#: The tolerance of the plan's own promise, so that an epsilon reached exactly is not refused.
_ROUNDING = 1e-9
_LOCK = ".lock"
_RESERVE = {
    *(
        "kind",
        "id",
        "time",
        "part",
        "split",
        "dataset",
        "fingerprint",
        "unit",
        "private_noise",
        "steps",
        "events",
        "independent",
    ),
}
_SETTLE = {"kind", "id", "time", "steps", "outcome"}


@dataclass(frozen=True)
class Limit:
    """No more than ``epsilon`` at ``delta`` on the data, in all or in a calendar year (``year``, UTC).

    ``source``: who says so, for people.
    """

    epsilon: float
    delta: float
    source: str
    year: bool = False
    neighbours: str = "add_remove"
    accountant: str = "pld"


class OverspentError(UserError):
    """A reservation that would break ``limit``; nothing was written."""

    def __init__(self, limit: Limit, total: float, where: str) -> None:
        span = "all runs of this year" if limit.year else "all runs"
        super().__init__(
            f"{where}: {span} on these data would come to epsilon {total:.4g} at delta {limit.delta:g}, more than "
            f"{limit.source}, so nothing is trained; take more noise or fewer steps, or end here"
        )
        self.limit = limit


@dataclass(frozen=True)
class Reservation:
    """Budget set aside: what :meth:`Ledger.settle` takes.

    ``line``: the hash of its line; ``first_step``: training steps that its run had reserved before it.
    """

    id: str
    steps: int
    line: str
    first_step: int = 0


@dataclass(frozen=True)
class Entry:
    """A reservation as the ledger holds it, and what became of it.

    ``independent``: each of its ``steps`` is one step of its event, so that they can be given back one by one;
    ``taken``: steps that were taken, None while nobody said; ``resumed``: how often it was taken up again; ``about``:
    what it was spent on, for people.
    """

    path: Path | None
    line: int
    id: str
    time: datetime
    part: str
    split: str
    dataset: str
    fingerprint: str
    unit: str
    private_noise: bool
    steps: int
    events: tuple[Event, ...]
    independent: bool
    about: Mapping[str, Any]
    taken: int | None = None
    outcome: str = ""
    resumed: int = 0

    @property
    def counted(self) -> tuple[Event, ...]:
        """What it cost: all that was reserved but, of independent steps, those that are known never to have run."""
        if self.taken is None or not self.independent:
            return self.events
        return (replace(self.events[0], steps=self.taken),) if self.taken else ()


class Ledger:
    """What was spent on a site's data; ``folder`` holds its files, ``None`` keeps them in memory (for tests).

    ``fingerprint``: SHA-256 of the data, in hex; it names the file that is written. Where there is one file for good,
    and no data (a server's ledger), that file stands in place of the folder. ``dataset``: the name under which
    the budget adds up; the entries of other names are left out, unless they were made on these very data. Without a
    name everything in the folder counts. ``unit``: the privacy unit (record or patient) that the entries protect; a
    ledger that holds another one is refused: what a record was promised says nothing of a patient. ``durable``: see
    :mod:`fedgraft.privacy.journal`.
    """

    def __init__(
        self,
        folder: str | Path | None,
        fingerprint: str = "",
        *,
        dataset: str = "",
        unit: str = "",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        durable: bool = True,
    ) -> None:
        if fingerprint and not re.fullmatch("[0-9a-f]{16,}", fingerprint):
            raise ValueError("a fingerprint is a SHA-256 in hex")
        self.folder = Path(folder) if folder is not None else None
        self._single = self.folder if self.folder is not None and self.folder.suffix == ".jsonl" else None
        self.fingerprint = fingerprint
        self.dataset = dataset
        self.unit = unit
        self._clock = clock
        self._durable = durable
        self._memory: list[dict[str, Any]] = []
        self._journals: dict[Path, Journal] = {}
        self._counted: tuple[Mapping[Path | None, object], tuple[Entry, ...]] = ({}, ())

    @property
    def path(self) -> Path | None:
        """The file that this ledger writes to."""
        if self.folder is None or self._single is not None:
            return self._single
        return self.folder / f"{self.fingerprint[:16]}.jsonl"

    # What was spent

    def entries(self) -> tuple[Entry, ...]:
        """All that counts, by time. Raises :class:`UserError` when a line was changed or lost, or has another unit."""
        return self._counting(self._lines())

    def events(self) -> tuple[Event, ...]:
        """All events, as if every unit had been in each."""
        return _events(self.entries())

    def spent(self, part: str, split: str, without: str = "") -> tuple[Event, ...]:
        """What a unit in ``part`` of ``split`` may have paid: everything but the other parts of that same split.

        ``without``: the reservation of that name is left out.
        """
        return _events(_paid((entry for entry in self.entries() if entry.id != without), part, split))

    def total(
        self, delta: float, split: str, *, neighbours: str = "add_remove", accountant: str = "pld", year: int = 0
    ) -> float:
        """The epsilon at ``delta`` of the unit that paid most; ``year``: in that calendar year alone.

        Guarantee
        ---------
        Neighbours: as given. Trusted: the site. Under ``split`` a unit is in one part only, so its parts compose in
        parallel (the largest counts); everything else composes in sequence; see :func:`epsilon`.
        """
        return _total(self.entries(), delta, split, neighbours, accountant, year)

    def private_noise(self) -> bool:
        """Whether all noise came from the operating system: seeded noise in the past is no privacy in the present."""
        return all(entry.private_noise for entry in self.entries())

    def training(self, run: str) -> tuple[Entry, ...]:
        """What was ever reserved for the training of ``run``."""
        return tuple(entry for entry in self.entries() if entry.part == "train" and entry.about.get("run") == run)

    def steps_reserved(self, run: str, without: str = "") -> int:
        """Training steps ever reserved in ``run``, whatever became of them; but for the reservation ``without``."""
        return _steps_reserved((entry for entry in self.entries() if entry.id != without), run)

    def unsettled(self, attempt: str) -> Entry | None:
        """The reservation on these very data that says ``attempt`` of itself, and of which nobody said what became."""
        found = (entry for entry in self.entries() if entry.about.get("attempt") == attempt)
        return next((entry for entry in found if not entry.outcome and entry.path == self.path), None)

    def steps_spent(self, part: str, split: str) -> int:
        """Steps that :meth:`spent` stands for: those taken, and those of which nobody said."""
        return sum(e.steps if e.taken is None else e.taken for e in _paid(self.entries(), part, split))

    @property
    def head(self) -> str:
        """The hash of the last line of the file of these data; of the last written one, where they have none yet."""
        lines = self._lines()
        own = [line for line in lines if line.path == self.path]
        last = own[-1] if own else max(reversed(lines), key=lambda line: str(line.values["time"]), default=None)
        return str(last.values.get("sha256", "")) if last is not None else ""

    # Spending

    def reserve(
        self,
        events: Event | tuple[Event, ...],
        *,
        part: Part = "train",
        split: str = "",
        limits: Sequence[Limit] = (),
        private_noise: bool = True,
        steps: int | None = None,
        **about: str | int | float,
    ) -> Reservation:
        """Record that ``events`` are about to be spent; returns once the line is on the disk.

        One event stands for steps with noise of their own, and :meth:`settle` gives back those that never ran; several
        (or none, where what is paid for already pays for these too) count whole. ``steps``: optimiser steps that they
        pay for, where that is not the sum of theirs; ``about``: what it is spent on (run, round), for people.

        Raises :class:`UserError`, with nothing written, when a limit would be broken, the ledger is damaged or cannot
        be written, or the clock is behind the ledger.

        Guarantee
        ---------
        Trusted: the site and its clock. Once all reservations are spent, and whatever other process reserves at the
        same time, :meth:`total` is within every one of ``limits``.
        """
        if taken := (_RESERVE | _SETTLE | set(CHAIN)) & set(about):
            raise ValueError(f"`{min(taken)}` is the ledger's own word")
        if not self.fingerprint and self._single != self.folder:
            raise ValueError("without the fingerprint of the data nothing can be spent on them")
        independent = isinstance(events, Event) and steps in (None, events.steps)
        events = (events,) if isinstance(events, Event) else tuple(events)
        steps = sum(event.steps for event in events) if steps is None else steps
        if steps < 1:
            raise ValueError("there is nothing to reserve")
        with self._alone():
            now = self._clock()
            values: dict[str, Any] = {
                **about,
                "kind": "reserve",
                "id": uuid.uuid4().hex,
                "time": now.astimezone(UTC).isoformat(timespec="milliseconds"),
                "part": part,
                "split": split,
                "dataset": self.dataset,
                "fingerprint": self.fingerprint,
                "unit": self.unit,
                "private_noise": private_noise,
                "steps": steps,
                "events": [event.to_dict() for event in events],
                "independent": independent,
            }
            spent = self._spendable(now)
            self._require_room([*spent, _entry(self.path, 0, values)], split, limits, now)
            before = _steps_reserved(spent, about.get("run"))
            return Reservation(str(values["id"]), int(values["steps"]), self._append(values), before)

    def require_room(
        self, events: Event | tuple[Event, ...], *, part: Part = "train", split: str = "", limits: Sequence[Limit] = ()
    ) -> None:
        """Raise what :meth:`reserve` would raise for ``events``, as far as it can be known without spending them."""
        events = (events,) if isinstance(events, Event) else tuple(events)
        now = self._clock()
        spent = self._spendable(now)
        about = (part, split, self.dataset, self.fingerprint, self.unit)
        asked = Entry(self.path, 0, "", now, *about, True, 1, events, False, {})
        self._require_room([*spent, asked], split, limits, now)

    def settle(self, reservation: Reservation, steps: int, outcome: Outcome) -> str:
        """Say that of ``reservation`` ``steps`` were taken, and whether what came of them may have left.

        Independent steps that never ran are given back. Returns the hash of the line. Raises ValueError for more steps
        than were reserved, and for what was never reserved or is settled already.
        """
        if type(steps) is not int or not 0 <= steps <= reservation.steps:
            raise ValueError(f"{steps} steps taken of {reservation.steps} that were reserved")
        if outcome not in ("released", "failed"):
            raise ValueError(f"the outcome `{outcome}` is neither released nor failed")
        with self._alone():
            self._open(reservation.id, self._counting(self._lines()))
            time = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
            return self._append(
                {"kind": "settle", "id": reservation.id, "time": time, "steps": steps, "outcome": outcome}
            )

    def resume(self, name: str, *, split: str = "", limits: Sequence[Limit] = ()) -> Reservation:
        """Take the unsettled reservation ``name`` up again; returns once the line that says so is on the disk.

        It goes on counting whole, once. Only for whoever knows that nothing of what was done under it has left, or ever
        will, and does the same again; see :mod:`fedgraft.client.attempt`. Raises ValueError for what was never
        reserved here or is settled, and :class:`UserError`, with nothing written, where :meth:`reserve` would for want
        of anything but new budget.
        """
        with self._alone():
            now = self._clock()
            spent = self._spendable(now)
            entry = self._open(name, spent)
            self._require_room(spent, split, limits, now)
            time = now.astimezone(UTC).isoformat(timespec="milliseconds")
            before = _steps_reserved((other for other in spent if other is not entry), entry.about.get("run"))
            return Reservation(name, entry.steps, self._append({"kind": "resume", "id": name, "time": time}), before)

    # Inside

    def _open(self, name: str, entries: Iterable[Entry]) -> Entry:
        """The reservation ``name``, which must be of these very data and not settled."""
        entry = next((entry for entry in entries if entry.id == name), None)
        if entry is None or entry.path != self.path:
            raise ValueError(f"{name} was not reserved here")
        if entry.outcome:
            raise ValueError(f"{name} is settled already")
        return entry

    def _spendable(self, now: datetime) -> tuple[Entry, ...]:
        """:meth:`entries`, for whoever is about to add one: refused while the clock is behind any line."""
        lines = self._lines()
        counting = self._counting(lines)
        for line in lines:
            if _time(line.values) > now + _CLOCK:
                raise UserError(
                    f"{line.path}: line {line.number} was written at {line.values['time']}, which is still to come: "
                    "this machine's clock is behind, so nothing is trained; set it right"
                )
        return counting

    def _require_room(self, entries: Sequence[Entry], split: str, limits: Iterable[Limit], now: datetime) -> None:
        for limit in limits:
            year = now.astimezone(UTC).year if limit.year else 0
            total = _total(entries, limit.delta, split, limit.neighbours, limit.accountant, year)
            if not total <= limit.epsilon * (1 + _ROUNDING):
                raise OverspentError(limit, total, str(self.path or "the ledger"))

    def _counting(self, lines: Sequence[_Line]) -> tuple[Entry, ...]:
        """The reservations of this dataset, each with what followed."""
        # A site asks again and again, and the hash of a file's last line stands for all of them.
        heads = {line.path: line.values.get("sha256") for line in lines}
        if self.folder is None or heads != self._counted[0]:
            self._counted = (heads, self._counted_anew(lines))
        return self._counted[1]

    def _counted_anew(self, lines: Iterable[_Line]) -> tuple[Entry, ...]:
        found: dict[str, Entry] = {}
        for line in lines:
            try:
                if line.values["kind"] == "reserve":
                    entry = _entry(line.path, line.number, line.values)
                    if entry.id in found:
                        raise ValueError("two reservations of one name")
                    found[entry.id] = entry
                else:
                    found[line.values["id"]] = _followed(found[line.values["id"]], line)
            except (ValueError, KeyError, TypeError, OverflowError):
                raise self._damaged(line) from None
        counting = []
        for entry in found.values():
            if self.dataset and entry.dataset not in ("", self.dataset) and entry.fingerprint != self.fingerprint:
                continue
            if self.unit and entry.unit and entry.unit != self.unit:
                raise UserError(
                    f"{entry.path}: line {entry.line} protected each {entry.unit}, this run protects each {self.unit}; "
                    "the two cannot be added up, so nothing is trained: keep to one privacy.unit on the same data"
                )
            counting.append(entry)
        return tuple(sorted(counting, key=lambda entry: entry.time))

    def _lines(self) -> list[_Line]:
        """Every line of every file, in the order of each file."""
        if self.folder is None:
            return [_Line(None, number, values) for number, values in enumerate(self._memory, 1)]
        try:
            # A folder that cannot be read must not look like an empty one.
            found = [self._single] if self._single is not None else self.folder.iterdir()
            paths = sorted(path for path in found if path.suffix == ".jsonl")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.folder}: the ledger cannot be read: {error.strerror or error}") from None
        return [
            _Line(path, number, values)
            for path in paths
            for number, values in enumerate(self._journal(path).entries(), 1)
        ]

    def _journal(self, path: Path) -> Journal:
        if path not in self._journals:
            self._journals[path] = ledger_file(path, durable=self._durable)
        return self._journals[path]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """With no other process in any file of the folder."""
        if self.folder is None or self.path is None:
            yield
            return
        single = self._single
        lock = self.folder / _LOCK if single is None else single.with_name(f".{single.stem}{_LOCK}")
        try:
            with locked(lock, durable=self._durable):
                yield
        except OSError as error:
            raise self._journal(self.path).cannot_write(error) from None

    def _append(self, values: dict[str, Any]) -> str:
        if self.path is None:
            self._memory.append(values)
            return ""
        return str(self._journal(self.path).append(values)["sha256"])

    def _damaged(self, line: _Line) -> UserError:
        return ledger_file(line.path or Path("ledger")).damaged(line.number, "is no entry of a ledger")


def ledger_file(path: Path, *, durable: bool = True) -> Journal:
    """The journal that a ledger's file is."""
    return Journal(
        path,
        name="ledger",
        stop="nothing is trained",
        damage="the budget spent is unknown, so nothing is trained: restore the file from a backup",
        durable=durable,
    )


@dataclass(frozen=True)
class _Line:
    path: Path | None
    number: int
    values: dict[str, Any]


def _entry(path: Path | None, number: int, values: Mapping[str, Any]) -> Entry:
    """Read a reservation. Raises KeyError, ValueError or TypeError when it is none."""
    texts = {key: values[key] for key in ("id", "part", "split", "dataset", "fingerprint", "unit")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("not a text")
    if not all(type(values[key]) is bool for key in ("private_noise", "independent")):
        raise TypeError("neither true nor false")
    if type(values["steps"]) is not int or values["steps"] < 1:
        raise TypeError("not a number of steps")
    events = tuple(Event.from_dict(event) for event in values["events"])
    if values["independent"] and [event.steps for event in events] != [values["steps"]]:
        raise ValueError("not one event of so many steps")
    return Entry(
        path=path,
        line=number,
        time=_time(values),
        private_noise=values["private_noise"],
        steps=values["steps"],
        events=events,
        independent=values["independent"],
        about={key: value for key, value in values.items() if key not in _RESERVE and key not in CHAIN},
        **texts,
    )


def _time(values: Mapping[str, Any]) -> datetime:
    time = datetime.fromisoformat(values["time"])
    if time.tzinfo is None:
        raise ValueError("a time without its zone")
    return time


def _followed(entry: Entry, line: _Line) -> Entry:
    """``entry`` settled, or taken up again. Raises ValueError, KeyError or TypeError when the two do not fit."""
    _time(line.values)
    if line.values["kind"] not in ("settle", "resume") or entry.path != line.path or entry.outcome:
        raise ValueError("nothing that follows this entry")
    if line.values["kind"] == "resume":
        return replace(entry, resumed=entry.resumed + 1)
    steps, outcome = line.values["steps"], line.values["outcome"]
    if type(steps) is not int or not 0 <= steps <= entry.steps or outcome not in ("released", "failed"):
        raise ValueError("not a settlement")
    return replace(entry, taken=steps, outcome=outcome)


def _steps_reserved(entries: Iterable[Entry], run: object) -> int:
    return sum(entry.steps for entry in entries if entry.about.get("run") == run and entry.part == "train")


def _events(entries: Iterable[Entry]) -> tuple[Event, ...]:
    return tuple(event for entry in entries for event in entry.counted)


def _paid(entries: Iterable[Entry], part: str, split: str) -> Iterator[Entry]:
    return (entry for entry in entries if not split or entry.split != split or entry.part == part)


def _total(
    entries: Sequence[Entry], delta: float, split: str, neighbours: str, accountant: str, year: int = 0
) -> float:
    if year:
        entries = [entry for entry in entries if entry.time.astimezone(UTC).year == year]
    parts = {entry.part for entry in entries if split and entry.split == split} or {""}
    return max(epsilon(_events(_paid(entries, part, split)), delta, neighbours, accountant) for part in parts)
