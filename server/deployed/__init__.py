"""The coordinator's side of a deployment: the SuperLink, whom it knows, and the jobs it runs."""
