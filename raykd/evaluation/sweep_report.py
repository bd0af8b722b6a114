"""The report of a sweep: the trials in a table, which options mattered, and the best config, ready to run.

In:  the trials' records, the config they vary, what the teacher did.
Out: `report/sweep.md`, `report/sweep.json`, `report/best.yaml`, `report/parallel-coordinates.svg`, `report/importance.svg`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from rich.table import Table

from raykd.config import Config
from raykd.evaluation.report import STYLE, svg_of
from raykd.evaluation.sweep_records import TeacherPass, TrialRecord, best_trial, format_value
from raykd.tune_config import TuneConfig


def importances(records: Sequence[TrialRecord]) -> dict[str, float]:
    """Share of the variance of the metric's rank that each option explains alone, largest first; empty below 3 trials.

    Numbers: squared rank correlation (Spearman). Other values: the share between groups of equal values (eta squared).
    Options interact and shares of few trials are chance: a reading aid, no test.
    """
    valued = [record for record in records if record.value is not None]
    if len(valued) < 3:
        return {}
    metric = _ranks([record.value for record in valued])
    shares: dict[str, float] = {}
    for path in valued[0].settings:
        values = [record.settings[path] for record in valued]
        shares[path] = _explained(_ranks(values) if _is_numeric(values) else _group_means(values, metric), metric)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _ranks(values: Sequence[Any]) -> np.ndarray:
    """Float [N], equal values with their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _group_means(values: Sequence[Any], metric: np.ndarray) -> np.ndarray:
    texts = np.array([str(value) for value in values])
    return np.array([metric[texts == text].mean() for text in texts])


def _explained(prediction: np.ndarray, metric: np.ndarray) -> float:
    """Squared correlation; 0 where either does not vary."""
    if not prediction.std() or not metric.std():
        return 0.0
    return float(np.corrcoef(prediction, metric)[0, 1] ** 2)


# --- files ----------------------------------------------------------------------------------------------------------------


def write_sweep_report(folder: Path, tune: TuneConfig, records: Sequence[TrialRecord], teacher: TeacherPass) -> None:
    """Write table and figures; `write_best` writes the config."""
    folder.mkdir(parents=True, exist_ok=True)
    best = best_trial(records, tune.mode)
    facts = {
        "metric": tune.metric,
        "mode": tune.mode,
        "best": best.number if best else None,
        "teacher": asdict(teacher) | {"tokens_in_trials": sum(record.teacher_tokens for record in records)},
        "importance": importances(records),
        "trials": [asdict(record) for record in records],
    }
    (folder / "sweep.json").write_text(json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8")
    figures = {"parallel-coordinates": draw_trials(records, tune), "importance": draw_importance(records)}
    drawn = {name: svg_of(figure) for name, figure in figures.items() if figure is not None}
    for name, svg in drawn.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    lines = ["# Sweep", teacher_line(teacher, records), markdown_table(records, tune)]
    lines += [f"![{name}]({name}.svg)" for name in drawn]
    (folder / "sweep.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def write_best(file: Path, config: Config, record: TrialRecord, tune: TuneConfig) -> None:
    """The best trial's options as a file for --config. `config`: the run with its settings, as it should be repeated."""
    note = f"# trial {record.number}: {tune.metric} = {record.value:.6g} after {record.step} steps"
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
    file.write_text(f"{note}\n{text}", encoding="utf-8")


def teacher_line(teacher: TeacherPass, records: Sequence[TrialRecord]) -> str:
    """What the teacher did, in one sentence."""
    in_trials = sum(record.teacher_tokens for record in records)
    return (
        f"The teacher answered {teacher.rows} prompts with {teacher.tokens} tokens, once for {len(records)} trials "
        f"({teacher.cached_rows} answers were in the cache before); in the trials it wrote {in_trials} tokens."
    )


def by_rank(records: Sequence[TrialRecord], mode: str) -> list[TrialRecord]:
    """Best first; trials that ran to their end before the others, those without a value last."""
    sign = 1 if mode == "min" else -1
    return sorted(records, key=lambda r: (r.value is None, r.state != "done", sign * (r.value or 0.0), r.number))


def table_rows(records: Sequence[TrialRecord], tune: TuneConfig) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of all trials."""
    header = ["trial", tune.metric, "step", "state", "starts", *tune.space]
    rows = []
    for record in by_rank(records, tune.mode):
        value = "–" if record.value is None else f"{record.value:.5g}"
        state = f"{record.state}: {record.message}" if record.message else record.state
        settings = [format_value(record.settings[path]) for path in tune.space]
        rows.append([str(record.number), value, str(record.step), state, str(record.attempts), *settings])
    return header, rows


def print_table(records: Sequence[TrialRecord], tune: TuneConfig) -> Table:
    """All trials, best first."""
    header, rows = table_rows(records, tune)
    table = Table(*header, title=f"trials, {'lowest' if tune.mode == 'min' else 'highest'} {tune.metric} first")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(records: Sequence[TrialRecord], tune: TuneConfig) -> str:
    """All trials, best first."""
    header, rows = table_rows(records, tune)
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# --- figures --------------------------------------------------------------------------------------------------------------


def draw_trials(records: Sequence[TrialRecord], tune: TuneConfig) -> Figure | None:
    """Parallel coordinates: an axis for every option and one for the metric, a line for every trial with a value."""
    valued = [record for record in by_rank(records, tune.mode) if record.value is not None]
    if not valued:
        return None
    columns = {path: [record.settings[path] for record in valued] for path in tune.space}
    columns[tune.metric] = [record.value for record in valued]
    logarithmic = {path for path, distribution in tune.space.items() if "loguniform" in distribution}
    places = [_places(values, log=name in logarithmic) for name, values in columns.items()]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.6 + 1.7 * len(columns), 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["left", "bottom"]].set_visible(False)
        colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(valued)))  # best first: dark
        for number in reversed(range(len(valued))):
            heights = [place[number] for place, _ in places]
            style = "-" if valued[number].state == "done" else ":"
            axes.plot(range(len(columns)), heights, style, color=colours[number], linewidth=2.6 if number == 0 else 1.2)
        for x, (_, ticks) in enumerate(places):
            axes.axvline(x, color="#8a93a3", linewidth=0.8)
            for height, text in ticks:
                axes.text(x + 0.03, height, text, fontsize=8, va="center")
        axes.set_xticks(range(len(columns)), list(columns), fontsize=8)
        axes.set_yticks([])
        axes.set_xlim(-0.2, len(columns) - 0.4)
        axes.set_title("trials, the best in bold, those stopped early dotted")
    return figure


def _places(values: Sequence[Any], *, log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Height in [0, 1] of each value on its axis, and height and text of the axis's labels."""
    if _is_numeric(values) and len(set(values)) > 4:
        scaled = [math.log(value) if log else float(value) for value in values]
        low, high = min(scaled), max(scaled)
        marks = [low, (low + high) / 2, high]
        heights = [(value - low) / (high - low) for value in scaled]
        return heights, [
            (place, f"{math.exp(mark) if log else mark:.3g}") for place, mark in zip((0.0, 0.5, 1.0), marks, strict=True)
        ]
    different = list(dict.fromkeys(map(format_value, sorted(values) if _is_numeric(values) else values)))
    height = {text: place / max(len(different) - 1, 1) for place, text in enumerate(different)}
    return [height[format_value(value)] for value in values], [(place, text) for text, place in height.items()]


def draw_importance(records: Sequence[TrialRecord]) -> Figure | None:
    """A bar for every option; None where there are too few trials to say."""
    shares = importances(records)
    if not shares:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.2 + 0.4 * len(shares)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(list(shares)[::-1], list(shares.values())[::-1], color="#2f5fd0")
        axes.set_xlim(0, 1)
        axes.set_title("share of the metric's variance (ranks) that an option explains alone")
    return figure
