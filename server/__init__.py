"""What runs at the server: rounds, checkpoints and resume, the run directory, the report."""
