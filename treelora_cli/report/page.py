"""The page: figures with their numbers as tables, readable without a script, by keyboard and by screen reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treelora_cli.report.drawing import STYLE, Drawing, plain
from treelora_cli.report.facts import ReportFacts
from treelora_cli.views.scores import FORMULAS, percent

_TABLE_ROWS = 100
GENERATOR = '<meta name="generator" content="treelora report">'
"""Marks a page as one that a later report may replace."""
_PAGE_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#4b535d;--line:#d8dde3;--link:#0b57b8}
@media (prefers-color-scheme:dark){:root{--ground:#14181d;--ink:#e6e9ed;--soft:#b3bcc7;--line:#333b45;--link:#7db8ff}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);line-height:1.5;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:1060px;margin:0 auto;padding:0 16px}h1{font-size:1.6rem;margin:1.2rem 0 .2rem}
h2{font-size:1.2rem;margin:2rem 0 .6rem;border-top:1px solid var(--line);padding-top:1rem}h3{font-size:1rem;margin:0}
p{margin:.3rem 0}.soft,figcaption,footer{color:var(--soft)}a{color:var(--link)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:8px 20px;margin:1rem 0}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.25rem;font-weight:600;overflow-wrap:anywhere}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;list-style:none}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:24px}
figure{margin:0;min-width:0}figcaption{font-size:.9rem}.scroll{overflow-x:auto;max-width:100%}
.scroll svg{display:block;height:auto;max-width:100%}.wide .scroll svg{max-width:none}
@media (max-width:480px){figure:not(.wide) svg.figure{font-size:13px}}
.wide{grid-column:1/-1}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:3px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td.text{text-align:left}summary{cursor:pointer;padding:6px 0;font-size:.9rem}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-999px}.skip:focus{left:8px}
"""
_WIDE = {"matrix", "tree", "confusion", "routes"}
_SECTIONS = (
    ("scores", "Scores", ("matrix", "overall", "curves", "watch")),
    ("answers", "Answers", ("classes", "routes", "confusion")),
    ("tree-and-search", "Tree and search", ("tree", "pulls", "selections", "counts", "bounds")),
    ("training", "Training", ("loss",)),
    ("cost", "Time and space", ("time", "memory", "disk")),
)


def page(facts: ReportFacts, drawings: Sequence[Drawing]) -> str:
    """Return the whole HTML document."""
    by_name = {one.name: one for one in drawings}
    tables = {"curves": _scores_table(facts), "time": _costs_table(facts), "bounds": _search_table(facts)}
    parts, links = [], []
    for anchor, heading, names in _SECTIONS:
        shown = [by_name[name] for name in names if name in by_name]
        if shown:
            links.append(f'<li><a href="#{anchor}">{heading}</a></li>')
            parts.append(_section(anchor, heading, shown, tables))
    links.append('<li><a href="#settings">Settings and versions</a></li>')
    title = f"treelora: {plain(facts.title)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
        f"<style>{_PAGE_STYLE}{STYLE}</style></head><body>"
        f'<a class="skip" href="#scores">Skip to the scores</a><header><h1>{plain(facts.title)}</h1>'
        f'<p class="soft">{plain(facts.backend)} on {plain(facts.model)}</p>{_summary(facts)}'
        f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav></header>'
        f"<main>{''.join(parts)}{_settings(facts)}</main>"
        f"<footer><p>Written by treelora {plain(facts.written_by)}. {plain(FORMULAS)}</p></footer></body></html>\n"
    )


def _summary(facts: ReportFacts) -> str:
    standing = facts.matrix.standing()
    told = {
        "tasks": f"{len(facts.tasks):,}",
        "OP, percent": percent(standing.overall()),
        "forgetting, points": percent(standing.forgetting()),
        "BWT, points": percent(standing.backward_transfer()),
        "training examples": f"{sum(int(task.record.get('train_examples', 0)) for task in facts.tasks):,}",
        "on disk": f"{facts.project_bytes / 2**20:,.1f} MiB",
    }
    return f"<dl>{''.join(f'<div><dt>{key}</dt><dd>{plain(value)}</dd></div>' for key, value in told.items())}</dl>"


def _section(anchor: str, heading: str, drawings: Sequence[Drawing], tables: Mapping[str, str]) -> str:
    figures = []
    for one in drawings:
        wide = ' class="wide"' if one.name in _WIDE else ""
        scroll = f'<div class="scroll" tabindex="0" role="group" aria-label="{plain(one.title)}, scrolls sideways">'
        figures.append(
            f"<figure{wide}><h3>{plain(one.title)}</h3>{scroll}{one.svg()}</div>"
            f"<figcaption>{plain(one.description)}</figcaption>{tables.get(one.name, '')}</figure>"
        )
    return f'<section id="{anchor}"><h2>{heading}</h2><div class="figures">{"".join(figures)}</div></section>'


def table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], total: int | None = None) -> str:
    """Return a table that opens on demand; ``total`` says of how many rows these are some."""
    head = "".join(f'<th scope="col">{plain(one)}</th>' for one in columns)
    body = "".join(
        f'<tr><th scope="row">{plain(row[0])}</th>{"".join(f"<td>{plain(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    some = "" if total is None or total == len(rows) else f" (the last {len(rows)} of {total})"
    return (
        f'<details><summary>{plain(heading)}{some}</summary><div class="scroll" tabindex="0" role="group"'
        f' aria-label="{plain(heading)}, scrolls sideways"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _scores_table(facts: ReportFacts) -> str:
    standing = facts.matrix.standing()
    rows = []
    for task, learned, now in zip(facts.tasks, standing.learned, standing.now, strict=True):
        change = "-" if learned is None or now is None else f"{100 * (now - learned):+.1f}"
        told = [str(task.labels), f"{task.record.get('train_examples', 0):,}", str(task.record.get("nearest") or "-")]
        rows.append([task.name, *told, percent(learned), percent(now), change])
    columns = ["task", "labels", "examples", "nearest", "when learned", "now", "change"]
    return table("Scores of each task", columns, rows[-_TABLE_ROWS:], len(rows))


def _search_table(facts: ReportFacts) -> str:
    if facts.pulls is None or not facts.pulls.arms:
        return ""
    rows = [
        [
            facts.pulls.tasks[arm.task],
            f"{arm.pulls[0]:,}",
            f"{arm.pulls[-1]:,}",
            f"{arm.mean:.3f}",
            f"{arm.bounds[-1]:.3f}",
        ]
        for arm in facts.pulls.arms
    ]
    columns = ["earlier task", "pulls after the first step", "pulls in the end", "mean distance", "bound in the end"]
    return table("Pulls and bounds", columns, rows)


def _costs_table(facts: ReportFacts) -> str:
    phases = list(dict.fromkeys(phase for task in facts.tasks for phase in task.seconds))
    rows = [
        [
            task.name,
            *(f"{task.seconds[phase]:.1f}" if phase in task.seconds else "-" for phase in phases),
            str(task.record.get("steps", "-")),
            "-" if task.peak_bytes is None else f"{task.peak_bytes / 2**20:,.0f}",
            f"{task.disk_bytes / 1024:,.1f}",
        ]
        for task in facts.tasks
    ]
    columns = ["task", *(f"{phase}, s" for phase in phases), "steps", "peak MiB", "KiB"]
    return table("Time and space of each task", columns, rows[-_TABLE_ROWS:], len(rows))


def _settings(facts: ReportFacts) -> str:
    last = facts.tasks[-1].record
    flat: list[list[str]] = []
    for key, value in dict(last.get("settings") or {}).items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        flat += [[f"{key}.{inner}".rstrip("."), str(one)] for inner, one in nested if one not in (None, {}, [])]
    told = {"device": last.get("device"), "arithmetic of steps": last.get("precision"), **(last.get("versions") or {})}
    versions = [[str(key), str(value)] for key, value in told.items() if value is not None]
    return (
        f'<section id="settings"><h2>Settings and versions</h2><p class="soft">As the last task,'
        f" {plain(facts.tasks[-1].name)}, was learned.</p>"
        f"{table('Settings', ['setting', 'value'], flat)}{table('Versions', ['what', 'value'], versions)}</section>"
    )
