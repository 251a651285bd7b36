"""`fedgraft audit`: from a configuration or a run to one signed report, as JSON and as a page."""

from __future__ import annotations
