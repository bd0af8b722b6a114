"""The HTML report: one file that needs nothing else. Everything that comes from data is escaped.

In:  a `RunRecord` and the figures as SVG. Out: HTML text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from raykd.evaluation.highlight import CLASSES, highlight
from raykd.evaluation.metrics import Gold, score_completion
from raykd.evaluation.results import METRICS, TEACHER, Results, fact_rows, format_estimate, speed_note, tier_rows

KIND_METRICS = ("call_decision", "exact_call", "argument_f1", "integration_recall")
"""What is shown for every kind of prompt."""

STYLE = """
:root { --ink: #1c2330; --soft: #5c6678; --line: #dfe3ea; --paper: #fff; --wash: #f5f7fa; --accent: #2f5fd0; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: var(--ink);
  background: var(--wash); margin: 0; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 12px; }
p.lead, .soft { color: var(--soft); } p.lead { margin: 0 0 24px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; margin: 0 0 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; }
.cards .card { margin: 0; } .big { font-size: 26px; font-weight: 650; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; white-space: normal; }
tbody tr:last-child td { border-bottom: 0; } td .range { color: var(--soft); font-size: 12px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 16px; }
.figures .card { margin: 0; padding: 10px; } .figures img { width: 100%; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 12px; margin-top: 10px; }
.turn { font-size: 13.5px; } .role { color: var(--soft); font-size: 12px; text-transform: uppercase; letter-spacing: .04em; }
pre { font: 12.5px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--wash); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px;
  margin: 4px 0 0; }
.tag { display: inline-block; border-radius: 20px; padding: 0 9px; font-size: 12px; background: #e9edf5;
  color: var(--soft); }
.tag.right { background: #dff3e4; color: #1c6b34; } .tag.wrong { background: #fbe3e1; color: #99281f; }
.name { background: #ffd9a8; } .structure { background: #e6e9ef; }
.key { background: #cfe3ff; } .value { background: #d3f2d8; }
.integration { box-shadow: inset 0 -2px 0 #b03fc0; background: #f6dcf9; }
.name, .structure, .key, .value, .integration { border-radius: 3px; }
.legend span { padding: 1px 7px; margin-right: 8px; font-size: 12.5px; }
details summary { cursor: pointer; font-weight: 600; }
code { font: 12.5px ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind, as far as it is there."""

    name: str
    config_text: str  # config.yaml as it stands; "" without
    metrics: list[dict[str, Any]]  # raykd.tracing.read_metrics
    results: Results | None
    examples: list[dict[str, Any]]  # rows of completions.jsonl
    rejected: dict[str, int]  # number of rows by reason


def render_page(record: RunRecord, figures: Mapping[str, str]) -> str:
    """The whole page; `figures` are SVG by title."""
    sections = [
        _headline(record),
        _results(record.results),
        _figures(figures),
        _examples(record),
        _rejected(record.rejected),
        _identity(record),
    ]
    title = f"raykd report: {escape(record.name)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def headline_figures(record: RunRecord) -> dict[str, str]:
    """The few numbers that a reader looks for first, as text by name."""
    figures = {}
    student = record.results.models.get("student") if record.results else None
    if student is not None:
        if "exact_call" in student.ratios:
            ratio = student.ratios["exact_call"]
            figures["of the teacher's exact calls"] = f"{100 * ratio.value:.1f} %"
        if "exact_call" in student.metrics:
            figures["exact calls of the student"] = f"{100 * student.metrics['exact_call'].value:.1f} %"
        if "kl" in student.metrics:
            figures["nats a token from the teacher (KL)"] = f"{student.metrics['kl'].value:.4f}"
        teacher = record.results.models[TEACHER] if record.results else student
        figures["parameters, student / teacher"] = f"{student.num_parameters / teacher.num_parameters:.2f}"
    if record.metrics:
        last = record.metrics[-1]
        figures["optimizer steps"] = f"{last['step']:,}"
        if tokens := next((entry["response_tokens"] for entry in reversed(record.metrics) if "response_tokens" in entry), 0):
            figures["response tokens trained on"] = f"{tokens:,.0f}"
    return figures


def _headline(record: RunRecord) -> str:
    cards = "".join(
        f'<div class="card"><div class="big">{escape(value)}</div><div class="soft">{escape(name)}</div></div>'
        for name, value in headline_figures(record).items()
    )
    return (
        f"<h1>{escape(record.name)}</h1>"
        f'<p class="lead">Knowledge distillation of a tool-using language model.</p><div class="cards">{cards}</div>\n'
    )


def _estimate(metric: str, estimate: Any) -> str:
    if estimate is None:
        return "–"
    value, _, interval = format_estimate(metric, estimate).partition(" (")
    return f'{value} <span class="range">({interval}</span>'


def _results(results: Results | None) -> str:
    if results is None:
        return "<h2>Held-out prompts</h2><p>Not evaluated yet.</p>"
    names = list(results.models)
    rows = [
        [escape(words), *(_estimate(metric, results.models[name].metrics.get(metric)) for name in names)]
        for metric, words in METRICS.items()
        if any(metric in results.models[name].metrics for name in names)
    ]
    ratios = [results.models[name].ratios.get("exact_call") for name in names]
    if any(ratios):
        rows.append(["<b>exact calls, share of the teacher's</b>", *(_estimate("exact_call", r) for r in ratios)])
    rows += [[escape(words), *map(escape, cells)] for words, cells in fact_rows(results)]
    note = speed_note(results)
    header = [
        "",
        *(f"{escape(n)}<br><span class=soft>{results.models[n].num_parameters:,} parameters</span>" for n in names),
    ]
    return (
        f"<h2>{results.data['num_prompts']} held-out prompts</h2>"
        '<p class="soft">Greedy decoding through one engine; in brackets 95 % bootstrap intervals over prompts.</p>'
        + table(header, rows)
        + (f'<p class="soft">{escape(note)}</p>' if note else "")
        + _by_kind(results)
        + _by_tier(results)
    )


def _by_kind(results: Results) -> str:
    kinds = list(results.models[TEACHER].by_kind)
    rows = []
    for kind in kinds:
        for metric in KIND_METRICS:
            cells = [model.by_kind[kind].get(metric) for model in results.models.values()]
            if any(cells):
                label = f"{escape(kind)}: {escape(METRICS[metric])}"
                rows.append([label, *(_estimate(metric, cell) for cell in cells)])
    if not rows:
        return ""
    return "<h2>By kind of prompt</h2>" + table(["", *map(escape, results.models)], rows)


def _by_tier(results: Results) -> str:
    rows = [[escape(words), *(_estimate(*cell) for cell in cells)] for words, cells in tier_rows(results)]
    return "<h2>Halting by CAWS tier</h2>" + table(["", *map(escape, results.models)], rows) if rows else ""


def _figures(figures: Mapping[str, str]) -> str:
    if not figures:
        return "<h2>Training</h2><p>No metrics.jsonl in this run.</p>"
    cards = "".join(
        f'<div class="card"><img alt="{escape(title)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(svg.encode()).decode()}"></div>'
        for title, svg in figures.items()
    )
    return f'<h2>Training</h2><div class="figures">{cards}</div>\n'


def _examples(record: RunRecord) -> str:
    if not record.examples:
        return ""
    legend = "".join(f'<span class="{name}">{escape(words)}</span>' for name, words in CLASSES.items())
    cards = "".join(_example(row) for row in record.examples)
    return f'<h2>Examples</h2><p class="legend">{legend}</p>{cards}'


def _example(row: Mapping[str, Any]) -> str:
    gold = Gold(row["gold_calls"], row["gold_values"])
    tools = ", ".join(tool.get("function", tool)["name"] for tool in row["tools"])
    turns = "".join(
        f'<div class="turn"><span class="role">{escape(message["role"])}</span> {escape(message_text(message))}</div>'
        for message in row["messages"]
    )
    columns = ""
    for name, text in row["completions"].items():
        shown = highlight(text, row["messages"], row["tools"]) if text else '<span class="soft">(nothing)</span>'
        columns += f"<div><b>{escape(name)}</b> {_verdict(text, row, gold)}<pre>{shown}</pre></div>"
    kind = f'<span class="tag">{escape(row["kind"])}</span>' if row["kind"] else ""
    return (
        f'<div class="card"><div class="soft">{escape(row["key"])} {kind} tools offered: {escape(tools or "none")}</div>'
        f'{turns}<div class="pair">{columns}</div></div>\n'
    )


def message_text(message: Mapping[str, Any]) -> str:
    """A message as one text: its content and its calls."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return " ".join(filter(None, [message.get("content") or "", *calls]))


def verdict(text: str, row: Mapping[str, Any], gold: Gold) -> bool | None:
    """Are the calls exactly those needed (none, where none is)? None where the data does not say."""
    score = score_completion(text, row["messages"], row["tools"], gold)
    metric = "exact_call" if gold.calls else "call_decision"
    return bool(score[metric][0]) if metric in score else None


def _verdict(text: str, row: Mapping[str, Any], gold: Gold) -> str:
    right = verdict(text, row, gold)
    if right is None:
        return ""
    words = ("calls right" if right else "calls wrong") if gold.calls else ("no call: right" if right else "a call: wrong")
    return f'<span class="tag {"right" if right else "wrong"}">{words}</span>'


def _rejected(rejected: Mapping[str, int]) -> str:
    if not rejected:
        return "<h2>Rows not used</h2><p>None.</p>"
    rows = [[escape(reason), f"{count:,}"] for reason, count in sorted(rejected.items(), key=lambda item: -item[1])]
    return "<h2>Rows not used</h2>" + table(["reason", "rows"], rows)


def identity_rows(results: Results) -> list[tuple[str, str]]:
    """Fingerprints of models, data and code, as (what, which)."""
    models = [(f"{name}: {model.path}", model.fingerprint) for name, model in results.models.items()]
    packages = [(f"package {name}", version) for name, version in results.code["packages"].items()]
    data = [(f"held-out prompts: {results.data['path']}", f"sha256 {results.data['sha256']}")]
    if refinements := results.data.get("refinements"):
        data.append((f"drafts that heads are judged on: {refinements['path']}", f"sha256 {refinements['sha256']}"))
    settings = [(f"evaluate.{name}", str(value)) for name, value in results.settings.items()]
    return [*models, *data, ("code", results.code["fingerprint"]), *packages, *settings]


def _identity(record: RunRecord) -> str:
    html = ""
    if record.results is not None:
        rows = [[escape(what), f"<code>{escape(which)}</code>"] for what, which in identity_rows(record.results)]
        html += "<h2>What was judged</h2>" + table(["", "fingerprint"], rows)
    if record.config_text:
        html += (
            '<h2>Configuration</h2><div class="card"><details><summary>resolved config.yaml</summary>'
            f"<pre>{escape(record.config_text)}</pre></details></div>"
        )
    return html
