"""`triflash bench report`: pictures, one HTML page, and tables between markers, all from JSON."""

from __future__ import annotations

import argparse
import base64
import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from triflash import cli
from triflash.bench import record
from triflash.bench.record import Record

if TYPE_CHECKING:
    from triflash.bench.tables import Table

# Between these, documents hold what the report wrote; NAME is a preset, claims, pictures, or
# picture-NAME.
MARKERS = re.compile(
    r"(<!-- bench:(?P<name>[\w-]+):begin -->\n).*?(<!-- bench:(?P=name):end -->)", re.DOTALL
)


def main(arguments: Sequence[str], prog: str) -> int:
    """Run `triflash bench report` and give the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Make pictures (PNG and SVG) and one HTML page of bench's JSON files, and "
        "rewrite the tables that documents hold between <!-- bench:PRESET:begin --> and "
        "<!-- bench:PRESET:end -->.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON of bench")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("out/bench"), metavar="DIR",
        help="for pictures and the page (default: out/bench)",
    )  # fmt: skip
    parser.add_argument(
        "--documents", nargs="*", type=Path, default=[], metavar="FILE",
        help="Markdown files whose tables to rewrite, such as README.md",
    )  # fmt: skip
    args = cli.parse_known(parser, arguments)
    missing = [str(path) for path in [*args.files, *args.documents] if not path.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    try:
        records = record.load(args.files)
        one_gpu(records)
    except ValueError as error:
        parser.error(str(error))
    try:
        from triflash.bench import pictures
    except ImportError as error:
        parser.error(f"a report needs the optional packages: pip install triflash[bench] ({error})")
    made = pictures.save_all(records, args.output_dir)
    page = args.output_dir / "index.html"
    page.write_text(make_page(records, made), encoding="utf-8")
    for path in [*made, page]:
        print(path)
    for path in args.documents:
        if rewrite(path, records, made):
            print(path)
    return 0


def one_gpu(records: Sequence[Record]) -> None:
    """Raise ValueError if the records are not all of one GPU; their tables would mix them."""
    gpus = sorted({str(r["gpu"]) for r in records})
    if not records:
        raise ValueError("there are no records in these files")
    if len(gpus) > 1:
        raise ValueError(f"the files are of several GPUs, report one at a time: {', '.join(gpus)}")


def rewrite(path: Path, records: Sequence[Record], images: Sequence[Path] = ()) -> bool:
    """Put fresh tables between the document's markers; those without records stay as they are.

    Between those of `pictures` go links to all `images`, of `picture-NAME` to that one.
    """
    before = path.read_text(encoding="utf-8")

    def fresh(match: re.Match[str]) -> str:
        kind, _, wanted = match["name"].partition("-")
        if kind in ("pictures", "picture"):
            chosen = [image for image in images if not wanted or image.stem == wanted]
            text: str | None = _links(chosen, path.parent) or None
        else:
            text = section(match["name"], records)
        return match[0] if text is None else f"{match[1]}{text}\n{match[3]}"

    after = MARKERS.sub(fresh, before)
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


def section(name: str, records: Sequence[Record]) -> str | None:
    """The Markdown between the markers of `name`, None without records for it."""
    from triflash.bench import claims, tables

    if name == "claims":
        return claims.table(records).markdown()
    mine = [r for r in records if r["preset"] == name]
    if not mine:
        return None
    parts = [table.markdown() for table in tables.tables(mine)]
    return "\n\n".join([*parts, f"Measured on {tables.where(mine)}."])


def _links(images: Sequence[Path], folder: Path) -> str:
    return "\n\n".join(
        f"![{image.stem.replace('_', ' ')}]({Path(os.path.relpath(image, folder)).as_posix()})"
        for image in images
    )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d2733; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ccd; }
h3 { margin: 2rem 0 .4rem; font-size: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
.scroll { overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e6ee; }
th { border-bottom: 2px solid #99a; vertical-align: bottom; }
th.case, td.case { text-align: left; }
td b { color: #0b5d1e; } .notes { color: #566; font-size: .85rem; } img { max-width: 100%; }
nav a { margin-right: 1rem; }
"""


def make_page(records: Sequence[Record], images: Sequence[Path]) -> str:
    """One HTML page that needs no other file: `images` are PNGs with an SVG beside each."""
    from triflash.bench import claims, tables
    from triflash.bench.cases import PRESETS

    made_of = sorted({r["preset"] for r in records}, key=[*PRESETS, "custom"].index)
    parts = [
        "<h1>triflash benchmarks</h1>",
        f"<p>{html.escape(tables.where(records))}. {len(records)} records. Every number is made "
        "from them; docs/benchmarks.md says how they are measured.</p>",
        "<nav>",
        *(f'<a href="#{name}">{name}</a>' for name in ["pictures", *made_of, "claims"]),
        "</nav>",
        '<h2 id="pictures">Pictures</h2>',
    ]
    for path in images:
        data = base64.b64encode(path.with_suffix(".svg").read_bytes()).decode()
        alt = path.stem.replace("_", " ")
        parts.append(f'<p><img alt="{alt}" src="data:image/svg+xml;base64,{data}"></p>')
    for name in made_of:
        parts.append(f'<h2 id="{name}">{name}</h2>')
        if name in PRESETS:
            parts.append(f"<p>{html.escape(PRESETS[name].summary)}</p>")
        mine = [r for r in records if r["preset"] == name]
        parts += [_html(table) for table in tables.tables(mine)]
    parts += ['<h2 id="claims">Claims</h2>', _html(claims.table(records))]
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>triflash benchmarks</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        made = []
        for index, cell in enumerate(cells):
            kind = ' class="case"' if index < table.index else ""
            text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(cell))
            made.append(f"<{tag}{kind}>{text}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(row("td", cells) for cells in table.rows)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (
        f'<h3>{html.escape(table.title)}</h3>\n<div class="scroll"><table>\n<thead>'
        f"{row('th', table.columns)}</thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )
