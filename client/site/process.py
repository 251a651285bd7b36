"""The process of a SuperNode: Flower's own command, which ends with the process that started it.

Else a site whose `fedgraft site start` was killed would go on, and a second one would take part beside it.
"""

from __future__ import annotations

import os

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode.cli import flower_supernode


def main() -> None:
    """`flower-supernode`, watched over."""
    start_parent_process_monitor(os.getppid())
    flower_supernode()


if __name__ == "__main__":
    main()
