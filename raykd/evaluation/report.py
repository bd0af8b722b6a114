"""The report of a run: curves, metrics, examples, in Markdown and in one self-contained HTML file.

In:  what the run left: config.yaml, metrics.jsonl, rejected.jsonl, report/results.json, report/completions.jsonl.
Out: `report/report.md` with `report/figures/*.svg`, and `report/report.html`. What is missing is said to be missing.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raykd.evaluation.metrics import Gold
from raykd.evaluation.page import (
    KIND_METRICS,
    RunRecord,
    headline_figures,
    identity_rows,
    message_text,
    render_page,
    verdict,
)
from raykd.evaluation.prompts import EvaluationError
from raykd.evaluation.results import (
    COMPLETIONS_FILE,
    METRICS,
    RESULTS_FILE,
    TEACHER,
    Results,
    fact_rows,
    format_estimate,
    load_completions,
    load_results,
    speed_note,
    tier_rows,
)
from raykd.tracing import METRICS_FILE, read_metrics

LOSSES = ("kd", "ce_teacher", "ce_truth", "tool_name", "json_argument", "integration_copy")
HEAD_METRICS = {
    "halting, AUC": "halt_auc",
    "halting, calibration error": "halt_ece",
    "halting, Brier score": "halt_brier",
    "halting, right decisions": "halt_accuracy",
    "self-evaluation, correlation": "self_evaluation_correlation",
    "self-evaluation, calibration error": "self_evaluation_ece",
}
"""What training logs of the heads at each validation, and its words in the figure."""
COLOURS = ("#2f5fd0", "#d9572b", "#2b9a66", "#b03fc0", "#b8860b", "#5c6678")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a93a3",
    "axes.grid": True,
    "grid.color": "#e6e9ef",
    "lines.linewidth": 1.8,
    "legend.fontsize": 9,
    "svg.hashsalt": "raykd",  # the same data gives the same file
}


def write_report(run: Path, num_examples: int) -> Path:
    """Write both reports from what is there; returns the path of the HTML file.

    Raises EvaluationError where the run left nothing that could be shown.
    """
    record = read_run(run, num_examples)
    if not record.metrics and record.results is None:
        raise EvaluationError(f"{run} has neither {METRICS_FILE} nor report/{RESULTS_FILE}: train or evaluate first")
    folder = run / "report"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    figures = {title: svg_of(figure) for title, figure in draw_figures(record.metrics).items()}
    for title, svg in figures.items():
        (folder / "figures" / _file_name(title)).write_text(svg, encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(record, figures), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render_page(record, figures), encoding="utf-8")
    return page


def read_run(run: Path, num_examples: int) -> RunRecord:
    """Read what the run left."""
    metrics, config, rejected = run / METRICS_FILE, run / "config.yaml", run / "rejected.jsonl"
    folder = run / "report"
    return RunRecord(
        name=run.name,
        config_text=config.read_text(encoding="utf-8") if config.is_file() else "",
        metrics=read_metrics(metrics) if metrics.is_file() else [],
        results=load_results(folder) if (folder / RESULTS_FILE).is_file() else None,
        examples=choose_examples(load_completions(folder), num_examples) if (folder / COMPLETIONS_FILE).is_file() else [],
        rejected=_count_reasons(rejected) if rejected.is_file() else {},
    )


def choose_examples(rows: Sequence[dict[str, Any]], num_examples: int) -> list[dict[str, Any]]:
    """The first rows of every kind in turn: a fixed choice, whatever the models did."""
    by_kind: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    turns = zip_longest(*by_kind.values())
    return [row for turn in turns for row in turn if row is not None][:num_examples]


def _count_reasons(path: Path) -> dict[str, int]:
    with path.open(encoding="utf-8") as file:
        return dict(Counter(json.loads(line)["reason"] for line in file))


# --- figures --------------------------------------------------------------------------------------------------------------


def draw_figures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The curves of a run by title; a figure without a single value is left out."""
    if not metrics:
        return {}
    names = [name for name in LOSSES if any(f"loss/{name}" in entry for entry in metrics)]
    losses = {name: (f"loss/{name}", f"validation/loss/{name}") for name in names}
    accuracies = {"tool names": "tool_name", "arguments": "json_argument", "all tokens": "response"}
    pairs = {words: (f"accuracy/{key}", f"validation/accuracy/{key}") for words, key in accuracies.items()}
    kl = {"KL(teacher || student)": ("teacher_kl", "validation/teacher_kl")}
    heads = {words: ("", f"validation/{key}") for words, key in HEAD_METRICS.items()}
    speeds = {"teacher": "speed/teacher_tokens_per_s", "student": "speed/student_tokens_per_s"}
    waits = {"trainer waits for the teacher": "wait/teacher_s", "teacher waits for the trainer": "wait/trainer_s"}
    figures = {
        "Losses": _by_step(metrics, "Losses, nats a token", losses, log=True),
        "KL to the teacher": _by_step(metrics, "KL to the teacher, nats a token", kl, log=True),
        "Accuracy": _by_step(metrics, "Share of tokens predicted", pairs, log=False),
        "Heads": _by_step(metrics, "Halt and self-evaluation heads", heads, log=False),
        "Throughput": _by_time(metrics, "Throughput, tokens a second", speeds),
        "Waits": _by_time(metrics, "Waits, seconds a step", waits | {"whole step": "seconds"}),
        "Learning rate": _by_step(metrics, "Learning rate", {"learning rate": ("learning_rate", "")}, log=False),
        "Gradient norm": _by_step(metrics, "Gradient norm before clipping", {"norm": ("grad_norm", "")}, log=False),
    }
    return {title: figure for title, figure in figures.items() if figure.axes[0].lines}


def _axes(title: str, x_label: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(x_label)
    return figure, axes


def _by_step(metrics: Sequence[Mapping[str, Any]], title: str, pairs: Mapping[str, tuple[str, str]], *, log: bool) -> Figure:
    """One colour per pair (training, validation): training as a line, validation dashed with dots."""
    figure, axes = _axes(title, "optimizer step")
    lowest = []
    for colour, (words, (training, validation)) in zip(COLOURS, pairs.items(), strict=False):
        for key, style, suffix in ((training, "-", ""), (validation, "o--", ", held out")):
            steps, values = _series(metrics, "step", key)
            if steps:
                few = len(steps) == 1 and style == "-"
                axes.plot(steps, values, "o" if few else style, color=colour, label=words + suffix, markersize=3.5)
                lowest.append(min(values))
    _finish(axes, log=log and bool(lowest) and min(lowest) > 0)
    return figure


def _by_time(metrics: Sequence[Mapping[str, Any]], title: str, lines: Mapping[str, str]) -> Figure:
    """Over minutes of training. The pause between a run and its resumption is left out of the clock."""
    figure, axes = _axes(title, "minutes of training")
    clock = _training_minutes(metrics)
    for colour, (words, key) in zip(COLOURS, lines.items(), strict=False):
        points = [(minute, entry[key]) for minute, entry in zip(clock, metrics, strict=True) if entry.get(key) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), "o-" if len(points) == 1 else "-", color=colour, label=words, markersize=3.5
            )
    _finish(axes, log=False)
    axes.set_ylim(bottom=0)
    return figure


def _training_minutes(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """When each entry was made, in minutes of training: steps since the entry before times their mean seconds."""
    minutes, clock, last_step = [], 0.0, 0
    for entry in metrics:
        clock += (entry["step"] - last_step) * (entry.get("seconds") or 0.0) / 60
        last_step = entry["step"]
        minutes.append(clock)
    return minutes


def _series(metrics: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    points = [(entry[x], entry[y]) for entry in metrics if entry.get(y) is not None]
    return [point[0] for point in points], [point[1] for point in points]


def _finish(axes: Axes, *, log: bool) -> None:
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if high < 10 * low else "")
    if len(axes.lines) > 4:
        assert isinstance(axes.figure, Figure), "one figure holds one plot"
        axes.figure.legend(loc="outside lower center", ncols=3, frameon=False)
    elif len(axes.lines) > 1:
        axes.legend(frameon=False)


def svg_of(figure: Figure) -> str:
    """The figure as SVG text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _file_name(title: str) -> str:
    return title.lower().replace(" ", "-") + ".svg"


# --- Markdown -------------------------------------------------------------------------------------------------------------


def render_markdown(record: RunRecord, figures: Mapping[str, str]) -> str:
    """The report as Markdown; figures are linked."""
    parts = [f"# {_text(record.name)}", _list(headline_figures(record))]
    parts += _markdown_results(record.results)
    parts.append("## Training")
    parts += [f"![{title}](figures/{_file_name(title)})" for title in figures] or ["No metrics.jsonl in this run."]
    if record.examples:
        parts.append("## Examples")
        parts += [_markdown_example(row) for row in record.examples]
    parts.append("## Rows not used")
    parts.append(
        _table(["reason", "rows"], [[_text(r), str(n)] for r, n in record.rejected.items()]) if record.rejected else "None."
    )
    if record.results is not None:
        parts.append("## What was judged")
        parts.append(_table(["", "fingerprint"], [[_text(a), _text(b)] for a, b in identity_rows(record.results)]))
    if record.config_text:
        parts += ["## Configuration", _fenced(record.config_text, "yaml")]
    return "\n\n".join(parts) + "\n"


def _markdown_results(results: Results | None) -> list[str]:
    if results is None:
        return ["## Held-out prompts", "Not evaluated yet."]
    models = results.models
    header = ["", *(f"{_text(name)} ({model.num_parameters:,} parameters)" for name, model in models.items())]
    rows = [
        [_text(words), *(_cell(metric, model.metrics.get(metric)) for model in models.values())]
        for metric, words in METRICS.items()
        if any(metric in model.metrics for model in models.values())
    ]
    rows.append(
        ["exact calls, share of the teacher's", *(_cell("exact_call", m.ratios.get("exact_call")) for m in models.values())]
    )
    rows += [[_text(words), *cells] for words, cells in fact_rows(results)]
    kinds = [
        [f"{_text(kind)}: {_text(METRICS[metric])}", *(_cell(metric, m.by_kind[kind].get(metric)) for m in models.values())]
        for kind in models[TEACHER].by_kind
        for metric in KIND_METRICS
        if any(metric in m.by_kind[kind] for m in models.values())
    ]
    parts = [
        f"## {results.data['num_prompts']} held-out prompts",
        "Greedy decoding through one engine; in brackets 95 % bootstrap intervals over prompts.",
        _table(header, rows),
    ]
    parts += [_text(note)] if (note := speed_note(results)) else []
    parts += ["### By kind of prompt", _table(["", *map(_text, models)], kinds)] if kinds else []
    tiers = [[_text(words), *(_cell(*cell) for cell in cells)] for words, cells in tier_rows(results)]
    return parts + (["### Halting by CAWS tier", _table(["", *map(_text, models)], tiers)] if tiers else [])


def _markdown_example(row: Mapping[str, Any]) -> str:
    gold = Gold(row["gold_calls"], row["gold_values"])
    tools = ", ".join(tool.get("function", tool)["name"] for tool in row["tools"])
    parts = [f"**{_text(row['key'])}** {_text(row['kind'] or '')}, tools offered: {_text(tools or 'none')}"]
    parts.append(_fenced("\n".join(f"{m['role']}: {message_text(m)}" for m in row["messages"])))
    words = {True: " (right)", False: " (wrong)", None: ""}
    for name, text in row["completions"].items():
        parts.append(f"{_text(name)}{words[verdict(text, row, gold)]}:\n\n{_fenced(text or '(nothing)')}")
    return "\n\n".join(parts)


def _cell(metric: str, estimate: Any) -> str:
    return "–" if estimate is None else format_estimate(metric, estimate)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _list(items: Mapping[str, str]) -> str:
    return "\n".join(f"* {_text(value)} {_text(name)}" for name, value in items.items())


def _text(text: str) -> str:
    """Text in which Markdown and HTML mean nothing."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
