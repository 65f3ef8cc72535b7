"""The looks of report.html: style, a sort for its tables, and the few elements it is made of.

One file, no network: the content security policy allows the page's own style and its one script (by its hash) and
nothing else, so even a name that slipped through the escaping could neither run nor load anything. Without scripts the
page is complete; with them, a click on a heading sorts.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from quant.checkpoint.summary import plain

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --page: #ffffff; --card: #f4f6f9; --line: #d8dee6;
  --warn: #8a5a00; --warned: #fff4dc; --bar: #4c8dd633; --link: #2563b0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --page: #14181e; --card: #1d232c;
  --line: #39424e; --warn: #f0c674; --warned: #2e2715; --bar: #4c8dd655; --link: #7fb2f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p { margin: .4rem 0 }
.soft, figcaption { color: var(--soft) }
code, pre { font: 13px/1.45 ui-monospace, Menlo, monospace }
code { overflow-wrap: anywhere }
pre { background: var(--card); padding: .7rem .9rem; border-radius: 8px; overflow-x: auto }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .6rem; margin: 1.1rem 0 }
.card { background: var(--card); border-radius: 10px; padding: .7rem .9rem }
.card b { display: block; font-size: 1.35rem; line-height: 1.35; font-variant-numeric: tabular-nums }
.card span { display: block; color: var(--soft); font-size: .85rem; line-height: 1.35 }
.notes { background: var(--warned); border-left: 4px solid var(--warn); border-radius: 8px; padding: .5rem 1rem }
.notes b { color: var(--warn) }
.wide { overflow-x: auto }
figure { margin: .4rem 0 1.4rem }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto }
table { border-collapse: collapse; font-size: .87rem; width: 100% }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); white-space: nowrap }
th, td { padding: .28rem .6rem .28rem 0; vertical-align: top }
td { border-bottom: 1px solid var(--line) }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td.name { min-width: 11rem }
td.note { min-width: 14rem }
.bar { background: linear-gradient(to right, var(--bar) var(--w), transparent var(--w)); padding-left: .4rem }
details { margin: .5rem 0 }
summary { cursor: pointer; color: var(--link) }
th.s { cursor: pointer }
th.s:hover { color: var(--ink) }
"""

SORT = """
for (const table of document.querySelectorAll("table.sort")) [...table.tHead.rows[0].cells].forEach((head, column) => {
  let up = false;
  head.classList.add("s");
  head.title = "sort";
  head.onclick = () => {
    const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const compare = (a, b) => (a - b) || String(a).localeCompare(b, "en", {numeric: true});
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b)));
    up = !up;
    table.tBodies[0].append(...(up ? rows : rows.reverse()));
  };
});
"""


@dataclass(frozen=True)
class Cell:
    """A table's cell. `key`: the number it sorts by, for columns of numbers; `bar`: 0 to 1, drawn behind it."""

    text: str
    key: float | None = None
    bar: float | None = None
    name: bool = False

    def html(self) -> str:
        kinds = ["n"] * (self.key is not None) + ["bar"] * (self.bar is not None) + ["name"] * self.name
        opening = f' class="{" ".join(kinds)}"' if kinds else ""
        opening += f' data-v="{self.key!r}"' if self.key is not None else ""
        opening += f' style="--w:{100 * self.bar:.0f}%"' if self.bar is not None else ""
        return f"<td{opening}>{code(self.text) if self.name else text(self.text)}</td>"


def text(value: object) -> str:
    """Untrusted text, escaped and shortened."""
    return escape(plain(value))


def code(value: object) -> str:
    return f"<code>{text(value)}</code>"


def table(headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A heading that starts with `>` stands over a column of numbers."""
    head = "".join(f'<th class="n">{text(h[1:])}</th>' if h[0] == ">" else f"<th>{text(h)}</th>" for h in headings)
    body = "\n".join("<tr>" + "".join(cell.html() for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="sort"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def card(value: str, label: str, detail: str = "") -> str:
    more = f"<span>{text(detail)}</span>" if detail else ""
    return f'<div class="card"><span>{text(label)}</span><b>{text(value)}</b>{more}</div>'


def figure(svg: str, caption: str) -> str:
    return f'<figure><div class="wide">{svg}</div><figcaption>{text(caption)}</figcaption></figure>'


def details(label: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{text(label)}</summary>{content}</details>"


def document(title: str, body: str) -> str:
    """The whole page around escaped `body`."""
    allowed = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n<script>{SORT}</script>\n"
        "</body></html>\n"
    )
