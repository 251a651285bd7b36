"""Rules that bound what a few lying sites can do to the global adapter, each in front of another strategy."""

from . import coordinatewise, fltrust, geometric_median, krum, norm_bound

__all__ = ["coordinatewise", "fltrust", "geometric_median", "krum", "norm_bound"]
