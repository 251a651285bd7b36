"""Draw what `make demo` shows, from a run directory, as docs/images/demo.svg.

python docs/picture.py runs/hospitals-icd10-...
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from fedgraft.server.rundir import read_metrics, read_run
from fedgraft.simulations.display import closing_lines, final_table, phase_line


def main(folder: Path) -> None:
    run = read_run(folder)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print("$ make demo", style="bold")
    for line in read_metrics(folder):
        console.print(phase_line(line, run["config"]["rounds"]), highlight=False)
    console.print(final_table(run))
    for line in closing_lines({**run, "adapter_path": "runs/.../adapter", "report_path": "runs/.../report.html"}):
        console.print(line, highlight=False)
    target = Path(__file__).parent / "images" / "demo.svg"
    target.parent.mkdir(exist_ok=True)
    # The drawing must not fetch a font from anywhere.
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="make demo"), flags=re.DOTALL)
    target.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
