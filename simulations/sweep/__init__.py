"""Sweeps: the same federation under many settings and seeds, baselines beside it, and runs compared."""
