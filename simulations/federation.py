"""Every site's data of a simulation, each made when it is asked for: memory does not grow with the number of sites."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from ..client.data import SiteData
from ..core.config import RunConfig
from ..core.errors import UserError
from .shift import mislabelled, noise_of, shift_of, shifted

#: So many sites' data stay in memory.
_KEEP = 64


class Federation(Mapping[str, SiteData]):
    """Sites by name, with their own way of writing or seeing (`data.shift`) and their own errors (`data.label_noise`).

    ``dealt``: a site's records by its number, before these. Inputs look different in both parts, as they do at such a
    site; labels are wrong in the training part alone, so that a score tells what was learned.
    """

    def __init__(self, config: RunConfig, dealt: Callable[[int], SiteData]) -> None:
        self._config = config
        self._dealt = dealt
        self._numbers = {site: number for number, site in enumerate(config.site_names)}
        self._kept: OrderedDict[str, SiteData] = OrderedDict()

    def __getitem__(self, site: str) -> SiteData:
        """Raises :class:`UserError` that names the site, or its file."""
        if site not in self._kept:
            self._kept[site] = self._made(site)
            while len(self._kept) > _KEEP:
                self._kept.popitem(last=False)
        return self._kept[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def _made(self, site: str) -> SiteData:
        number, seed = self._numbers[site], self._config.seed
        data = self._dealt(number)
        if not len(data.held_out):
            raise UserError(f"site {site} has no held-out records; give it more data or raise data.test_fraction")
        own = self._config.data.sites[number]
        noise, shift = noise_of(self._config.data, own), shift_of(self._config.data, own, seed)
        if noise is not None:
            data = replace(data, train=mislabelled(data.train, noise, len(self._config.task.labels), seed, site))
        if shift is not None:
            train, held_out = (shifted(part, shift, seed, site) for part in (data.train, data.held_out))
            data = replace(data, train=train, held_out=held_out)
        return data
