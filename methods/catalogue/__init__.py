"""The methods, one concept a file; each file is found by being here, and registers what it holds."""
