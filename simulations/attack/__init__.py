"""`fedgraft attack`: what a finished adapter tells of who was in its training data, tried out by shadow adapters."""

from __future__ import annotations
