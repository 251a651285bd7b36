"""What a sweep leaves for people: `table.md`, three pictures, and all of it in one self-contained `report.html`."""

from __future__ import annotations

from pathlib import Path

from ...server.files import write_text
from ...server.report import elements as el
from .plots import PICTURES, as_element, as_file
from .results import Results
from .table import Cell, cells, markdown, notes

_INTERVALS = "Bars: the 95 % interval of the last round, where there are three seeds or more."
_CAPTIONS = {
    "accuracy-epsilon": f"The mean over the seeds after the last round; smaller ε protects more. {_INTERVALS}",
    "accuracy-bytes": f"Training messages of a site, one point a round; level lines send no adapter. {_INTERVALS}",
    "curves": f"The mean over the seeds. {_INTERVALS}",
}


def write(results: Results, folder: Path) -> Path:
    """Write table, pictures and page into ``folder``; returns the page. Raises :class:`UserError`."""
    write_text(folder / "table.md", markdown(results))
    figures = []
    for name, (title, draw) in PICTURES.items():
        figure = draw(results)
        if figure is None:
            (folder / f"{name}.svg").unlink(missing_ok=True)
            figures.append(el.no_figure(title, "There is nothing to draw yet.", "wide"))
            continue
        write_text(folder / f"{name}.svg", as_file(figure))
        figures.append(el.figure(as_element(figure, name), title, _CAPTIONS[name], "wide"))
    path = folder / "report.html"
    write_text(path, _page(results, figures))
    return path


def _page(results: Results, figures: list[str]) -> str:
    title = el.text(results.name or "sweep")
    done = sum(row["status"] == "finished" for row in results.rows)
    titles, lines = cells(results)
    table = el.table([el.text(head) for head in titles], ([_cell(cell) for cell in line] for line in lines), "sites")
    header = (
        f'<header><p class="over">fedgraft sweep</p><h1>{title}</h1>'
        f'<p class="summary">{el.plural(done, "finished run")} of {len(results.rows)}, over '
        f"{el.text(', '.join(results.keys) or 'seeds alone')}.</p></header>"
    )
    sections = (
        header,
        el.section("Results", table + _notes(results)),
        el.section("Pictures", f'<div class="charts">{"".join(figures)}</div>'),
        el.section("Runs", _runs(results)),
    )
    return el.document(f"{title}: fedgraft sweep", sections)


def _cell(cell: Cell) -> str:
    return f"<b>{el.text(cell.text)}</b>" if cell.best else el.text(cell.text)


def _notes(results: Results) -> str:
    return f"<ul>{''.join(f'<li>{el.text(note)}</li>' for note in notes(results))}</ul>"


def _runs(results: Results) -> str:
    rows = [
        (
            el.text(Path(row["path"]).name),
            el.text(row["status"]),
            el.percent(row["accuracy"]),
            f"<code>{el.text((row['digest'] or '–')[:16])}</code>",
            el.text(row["error"]),
        )
        for row in results.rows
    ]
    return el.table(("run", "status", "accuracy", "digest of the adapter", "why not"), rows, "plain")
