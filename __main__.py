"""`python -m fedgraft`."""

from .cli import main

main()
