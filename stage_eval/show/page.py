"""The frame of a report: one HTML file with its style and figures inside, nothing fetched from anywhere.

Everything that comes from data goes through `text`, which escapes it. Light and dark follow the reader's system.
"""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from stage_eval.show.theme import DARK, LIGHT, Plot, css_variables, to_svg

STYLE = """
:root { color-scheme: light dark; %(light)s --page: #f6f4ee; --accent: #9a6408; --line: #e0dcd1;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { %(dark)s --page: #121417; --accent: #e9b04c; --line: #2d3137; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%%; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 var(--sans); }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
header { margin-bottom: 28px; }
.kicker { color: var(--accent); font-weight: 600; font-size: 13px; letter-spacing: .08em; text-transform: uppercase; }
h1 { font-size: 30px; line-height: 1.2; margin: 6px 0 8px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 14px; letter-spacing: -.005em; }
p { margin: 0 0 12px; max-width: 72ch; }
.lead { color: var(--muted); margin: 0; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(4, minmax(0, 1fr)); }
.card, figure, .panel { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px 12px; min-width: 0; }
.card dt { color: var(--muted); font-size: 13px; }
.card dd { margin: 2px 0 0; font-size: 26px; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.2; }
.card dd small { display: block; font-size: 12.5px; font-weight: 400; color: var(--muted); margin-top: 3px;
  overflow-wrap: anywhere; }
.card.key { border-color: var(--accent); }
.remark { border-left: 3px solid var(--accent); padding-left: 10px; margin-top: 14px; }
.columns { display: grid; gap: 16px; grid-template-columns: repeat(2, minmax(0, 1fr)); align-items: start; }
figure { margin: 0; padding: 16px 16px 12px; min-width: 0; }
figure h3 { font-size: 15px; margin: 0 0 8px; }
figure svg { display: block; width: 100%%; height: auto; overflow: visible; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.45; margin-top: 8px; }
.panel { overflow-x: auto; }
table { border-collapse: collapse; width: 100%%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 600; font-size: 13px; white-space: nowrap; }
.num { text-align: right; white-space: nowrap; }
.best { color: var(--good); font-weight: 650; }
.interval { color: var(--muted); font-size: 12.5px; }
code, .hash { font-family: var(--mono); font-size: .88em; overflow-wrap: anywhere; }
a { color: var(--accent); }
.chain { display: grid; gap: 26px; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); list-style: none;
  padding: 0; margin: 0; }
.chain li { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px;
  position: relative; font-size: 14px; min-width: 0; }
.chain li:not(:last-child)::after { content: "\\2192"; position: absolute; right: -20px; top: 50%%;
  transform: translateY(-50%%); color: var(--muted); }
.chain b { display: block; margin-bottom: 2px; }
.chain .hash { display: block; color: var(--muted); }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--muted); font-size: 14px; padding: 4px 0; }
details .panel { margin-top: 8px; }
pre { margin: 0; padding: 14px 16px; font: 13px/1.5 var(--mono); overflow-x: auto; }
footer { margin-top: 48px; color: var(--muted); font-size: 13px; }
@media (max-width: 720px) {
  main { padding: 24px 14px 40px; }
  h1 { font-size: 24px; }
  h2 { margin-top: 34px; }
  .columns { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .card dd { font-size: 22px; }
  figure { padding: 12px; }
  .chain { grid-template-columns: minmax(0, 1fr); }
  .chain li:not(:last-child)::after { content: "\\2193"; right: auto; left: 50%%; top: auto; bottom: -24px;
    transform: none; }
  th, td { padding: 7px 10px; }
}
@media print { body { background: #fff; } .card, figure, .panel { break-inside: avoid; } }
"""


def page(title: str, kicker: str, lead: str, sections: Iterable[str], footer: str) -> str:
    """A whole HTML document; `title`, `kicker`, `lead` and `footer` are plain text, `sections` are HTML."""
    style = STYLE % {"light": css_variables(LIGHT), "dark": css_variables(DARK)}
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n<style>{style}</style>\n'
        "</head>\n<body>\n<main>\n"
        f'<header><div class="kicker">{text(kicker)}</div><h1>{text(title)}</h1>'
        f'<p class="lead">{text(lead)}</p></header>\n'
        + "\n".join(sections)
        + f"\n<footer>{text(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """`value` as HTML text."""
    return html.escape(str(value))


def section(heading: str, *parts: str) -> str:
    """A headed section of HTML parts."""
    return f"<section><h2>{text(heading)}</h2>{''.join(parts)}</section>"


def paragraph(value: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{text(value)}</p>"


def remark(value: str) -> str:
    """A sentence of plain text that a reader must not miss."""
    return f'<p class="remark">{text(value)}</p>'


def cards(items: Sequence[tuple[str, str, str]], key: int | None = None) -> str:
    """Headline figures: (label, value, remark); the card at index `key` is marked."""
    parts = []
    for index, (label, value, remark) in enumerate(items):
        small = f"<small>{text(remark)}</small>" if remark else ""
        mark = " key" if index == key else ""
        parts.append(f'<div class="card{mark}"><dt>{text(label)}</dt><dd>{text(value)}{small}</dd></div>')
    return f'<dl class="cards" style="margin:0">{"".join(parts)}</dl>'


def figures(plots: Iterable[Plot]) -> str:
    """The plots as figures with headings and captions."""
    return columns(*map(figure, plots))


def figure(plot: Plot) -> str:
    """One plot with its heading and caption."""
    svg = to_svg(plot).replace("<svg", f'<svg role="img" aria-label="{text(plot.title)}"', 1)
    return f"<figure><h3>{text(plot.title)}</h3>{svg}<figcaption>{text(plot.caption)}</figcaption></figure>"


def columns(*parts: str) -> str:
    """Parts side by side in two columns, one below the other on a phone."""
    return f'<div class="columns">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """A table whose cells are HTML (use `text`), numbers to the right from column `numeric_from` on."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="num">{value}</{tag}>' if index >= numeric_from else f"<{tag}>{value}</{tag}>"
            for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="panel"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def chain(links: Sequence[tuple[str, str, str]]) -> str:
    """Provenance: (what, description, hash) joined by arrows."""
    parts = [
        f'<li><b>{text(what)}</b>{text(description)}<span class="hash">{text(digest)}</span></li>'
        for what, description, digest in links
    ]
    return f'<ol class="chain">{"".join(parts)}</ol>'


def folded(summary: str, content: str) -> str:
    """HTML behind a disclosure triangle."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def folded_json(summary: str, content: Any) -> str:
    """JSON behind a disclosure triangle."""
    body = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    return folded(summary, f'<div class="panel"><pre>{text(body)}</pre></div>')
