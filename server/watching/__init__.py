"""The coordinator's side of watching: where a run is, from its files, as a page, as metrics, and in other tools."""
