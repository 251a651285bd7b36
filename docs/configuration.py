"""Write docs/configuration.md from the configuration itself: every key, its default, what it means.

python docs/configuration.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedgraft.core.config import RunConfig, Section

_HEAD = """# Configuration

A run is one TOML file; `--set key=value` changes a key, as often as you like. An unknown key is refused with the
nearest right one.
This page is written by `python docs/configuration.py`.

"""


def _default(value: Any) -> str:
    if value is None or repr(value) == "PydanticUndefined":
        return "required"
    return f"`{value!r}`".replace("'", '"').replace("()", "[]").replace("False", "false").replace("True", "true")


def _type(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) else str(kind)
    if text.startswith("typing.Literal"):
        return text.removeprefix("typing.Literal[").rstrip("]").replace("'", "").replace(", ", " or ")
    if text.startswith("tuple["):
        return "list"
    return "table" if text.startswith("dict[") else text


def rows(model: type[Section], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += rows(kind, f"{prefix}{name}.")
        else:
            default = "`{}`" if info.default_factory else _default(info.default)
            found.append(f"| `{prefix}{name}` | {_type(kind)} | {default} | {info.description or ''} |")
    return found


def page() -> str:
    from fedgraft.core.config import SiteConfig

    table = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows(RunConfig)]
    sites = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows(SiteConfig)]
    return (
        _HEAD
        + "\n".join(table)
        + "\n\nAn entry of `data.sites` is a name, or a table `[[data.sites]]`:\n\n"
        + "\n".join(sites)
        + "\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
