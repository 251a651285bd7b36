"""The package that a new strategy begins from."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from string import Template

from ..core.errors import UserError
from ..strategies import strategies
from .files import write_folder

_TEMPLATE = Path(__file__).with_name("template")
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_package(name: str, folder: Path) -> Path:
    """Write a package ``fedgraft-NAME`` into ``folder``: a strategy, its test, a README; returns its folder.

    Raises :class:`UserError` for a name that cannot be one or is taken, and where there is something already.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"`{name}` cannot be a strategy's name; take small letters, digits and single hyphens: my-mean")
    offered = {entry.name for entry in entry_points(group="fedgraft.strategies")}
    if name in offered or name in strategies():
        raise UserError(f"there is a strategy `{name}` already; choose another name")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it, or choose another --folder")
    made = folder / f"fedgraft-{name}"
    if made.exists():
        raise UserError(f"{made}: is there already; choose another name or --folder")
    words = name.split("-")
    module = "_".join(("fedgraft", *words))
    names = {"name": name, "module": module, "cls": "".join(word.capitalize() for word in words)}
    write_folder(made, lambda inside: _fill(inside, names))
    return made


def _fill(folder: Path, names: dict[str, str]) -> None:
    for path in sorted(_TEMPLATE.glob("*.txt")):
        target = folder / Template(path.stem).substitute(names)
        target.write_text(Template(path.read_text(encoding="utf-8")).substitute(names), encoding="utf-8")
