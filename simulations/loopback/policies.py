"""The policy of a development site: it allows the one job it was made for, and no more."""

from __future__ import annotations

import glob
import json

from ...core.config import RunConfig
from ...core.errors import UserError


def policy_for(config: RunConfig, site: str) -> str:
    """policy.toml of ``site``, on the data that ``config`` gives it. Raises :class:`UserError` where it gives none."""
    own = config.site(site)
    if own is None or not own.path:
        raise UserError(f"site {site}: give it records of its own: data.sites[].path in the configuration")
    privacy = config.privacy
    epsilon, delta = (privacy.epsilon, privacy.delta) if privacy.enabled else ("inf", 0.5)
    released = config.evaluation_release
    column = config.data.patient_column if privacy.enabled and privacy.unit == "patient" else ""
    return f"""# Made by `fedgraft dev up`: for development on this machine, not for a hospital.
[[dataset]]
name = "development"
path = {json.dumps(own.path)}
patient_column = {json.dumps(column)}
min_unit = "{"patient" if column else "record"}"
min_units = 1
max_epsilon = {epsilon}
max_epsilon_per_year = {epsilon}
max_delta = {delta}

[allow]
base_models = ["*"]
methods = ["{config.method.name}"]
strategies = ["{config.strategy}"]
engines = ["{privacy.engine}"]
tensors = ["*"]
files = {json.dumps([glob.escape(path) for path in (config.method.mask, *config.method.experts) if path])}

[metrics]
evaluation = "{"exact" if released == "exact_not_private" else released}"
training_loss = "{"none" if privacy.enabled else "exact"}"
sizes = "exact"

[require]
dp = {json.dumps(privacy.enabled)}
secret_noise = {json.dumps(privacy.enabled and not privacy.seeded_noise_not_private)}
honest = true
"""
