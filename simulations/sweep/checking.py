"""Whether a run could begin, told before any run of a sweep does."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from ...client.job import own_version
from ...core.config import RunConfig
from ...privacy.plan import PrivacyPlan
from ...server.rounds import Federation
from ...server.rundir import RunDirectory
from ..app import make_simulated_client
from ..engines.inprocess import InProcessGrid
from ..run import require_runnable
from ..scenario import site_data


def require_startable(config: RunConfig, *, rehearse: bool) -> None:
    """Refuse what would stop the run of ``config`` before its first step.

    Configuration, strategy and options, every site's data and privacy plan; with ``rehearse`` also what takes a loaded
    base model to know: the sites are asked to join, in a folder that is thrown away. Raises :class:`UserError`.
    """
    require_runnable(config)
    if config.privacy.enabled and config.rounds:
        for site, data in site_data(config).items():
            own = own_version(config, site)
            units, _ = data.train.units(by_patient=own.privacy.unit == "patient" and data.train.patients is not None)
            PrivacyPlan.for_run(own, len(units), own.total_steps)
    if rehearse:
        with TemporaryDirectory(prefix="fedgraft-") as place:
            folder = Path(place) / "run"
            grid = InProcessGrid(make_simulated_client(folder), len(config.site_names))
            with RunDirectory.create(folder) as rundir:
                Federation(grid, config, rundir, engine="inprocess", resume=False).rehearse()
