"""Working on records that everyone may see, with the model, the task and the training of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.config import RunConfig, parse_config
from ..core.errors import UserError

#: The one place of such a work.
PUBLIC = "public"
_COLUMNS = ("text_column", "label_column", "image_column", "patient_column", "test_fraction")


def public_config(job: RunConfig, steps: int = 1, *, with_method: bool = True) -> RunConfig:
    """The training of ``job``, for ``steps`` steps at one place and without privacy: its records are public."""
    values = job.model_dump(mode="json")
    kept = ("name", "seed", "model", "task", *(("method",) if with_method else ()))
    made: dict[str, Any] = {key: values[key] for key in kept}
    made["train"] = {**values["train"], "local_steps": steps}
    made["data"] = {**{key: values["data"][key] for key in _COLUMNS}, "sites": [PUBLIC]}
    made["evaluate"] = {"batch_size": values["evaluate"]["batch_size"]}
    return parse_config({**made, "rounds": 1, "privacy": {"enabled": False}}, "the job")


def require_public(job: RunConfig, data: Path) -> None:
    """Raise :class:`UserError` where ``data`` is what a site of ``job`` trains on: no ledger would count the work."""
    own = [job.data.path, *(site.path for site in job.data.sites)]
    if any(path and Path(path).resolve() == data.resolve() for path in own):
        raise UserError(
            f"{data}: holds records of the job's sites, and what is made of them would cost epsilon that no ledger "
            "counts; give records that everyone may see"
        )
