"""Draw what `fedgraft top` shows now, of a kit or a run directory, as docs/images/NAME.svg.

python docs/watching.py top kits/server
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from fedgraft.cli import page_of


def main(name: str, folder: Path) -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(page_of(folder)())
    target = Path(__file__).parent / "images" / f"{name}.svg"
    # The drawing must not fetch a font from anywhere.
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="fedgraft top"), flags=re.DOTALL)
    target.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
