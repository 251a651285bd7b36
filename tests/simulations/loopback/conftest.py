"""A job for three sites, each with a file of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft.core.config import RunConfig, load_config


@pytest.fixture
def job(tiny_federation: Any, tinyfederation: Any, tmp_path: Path) -> Callable[..., RunConfig]:
    """The configuration of ``tiny_federation`` with a file for each site, as it is read from `job.json`."""

    def made(*, private: bool = False, **changes: Any) -> RunConfig:
        sites = []
        for number, name in enumerate(tinyfederation.SITES):
            path = tinyfederation.write_csv(tmp_path / f"{name}.csv", list(tiny_federation.rows[number::3]))
            sites.append({"name": name, "path": str(path)})
        # Every instruction is a process of its own: the fewer, the sooner.
        plain = {"data.path": "", "data.sites": sites, "rounds": 2, "evaluate.every": 0, "server.join_timeout": 600.0}
        changes = {**plain, **changes}
        config = (tiny_federation.private if private else tiny_federation.config)(**changes)
        (tmp_path / "job.json").write_text(json.dumps(json.loads(config.to_json())))
        return load_config(tmp_path / "job.json")

    return made
