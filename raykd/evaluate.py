"""`python -m raykd.evaluate --config a.yaml … key=value … [--models name=folder …] [--report-only]`: judge a run.

In:  the run's config; the newest checkpoint of its run folder; held-out prompts with gold; further models, each a run folder
     (its newest checkpoint), a checkpoint, an export of raykd.export (bfloat16 or INT8), or any Hugging Face folder.
Out: a table (teacher, student, untrained student, and further models by name), `<run>/report/results.json`,
     `report.md` and `report.html`. With --report-only nothing is judged: the report is written from what the run left.

A checkpoint of stage qat is judged as the INT8 model that it was trained as.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from raykd.cli import ConfigError, exit_code, parse, run_folder, start_ray
from raykd.evaluation.models import ModelFiles
from raykd.evaluation.prompts import EvaluationError
from raykd.evaluation.report import write_report
from raykd.evaluation.results import METRICS, Results, fact_rows, format_estimate, speed_note
from raykd.evaluation.runner import evaluate
from raykd.sample_config import LatentConfig
from raykd.tracing import quiet_ray
from raykd.training.checkpoint import (
    HEADS,
    STUDENT,
    find_checkpoint,
    latest_checkpoint,
    read_state,
    trained_quantization,
    verify_student,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Judge the run, print the table, write the report."""
    models, rest = _split_models(sys.argv[1:] if argv is None else argv)
    config, args = parse(rest, __doc__ or "", "--report-only")
    run = run_folder(config)
    folder = run / "report"
    if args.report_only:
        if not run.is_dir():
            raise ConfigError(f"--report-only: found no run in {run}; check run.dir and run.name")
    else:
        quiet_ray()
        found = {"student": _newest_student(run)} | {name: find_model(path) for name, path in models.items()}
        start_ray(config)
        print_results(evaluate(config, found, folder))
    path = write_report(run, config.evaluate.num_examples)
    Console().print(f"Report: {path}", soft_wrap=True)


def _split_models(argv: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """Take `--models name=folder …` out of the command line; the words' order is free, so overrides may follow."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", action="extend", default=[])
    args, rest = parser.parse_known_args(argv)
    models = {}
    for word in args.models:
        name, equals, folder = word.partition("=")
        if "." in name and equals:  # a config override: names of models have no dot
            rest.append(word)
            continue
        if not (name and equals and folder):
            raise ConfigError(f"--models: found {word!r}, expected name=folder")
        if name == "student" or name in models:
            raise ConfigError(f"--models: the name {name!r} is taken; choose another")
        models[name] = Path(folder)
    return models, rest


def _newest_student(run: Path) -> ModelFiles:
    if latest_checkpoint(run) is None:
        raise EvaluationError(f"found no checkpoint in {run / 'checkpoints'}: train first, or check run.dir and run.name")
    return find_model(run)


def find_model(path: Path) -> ModelFiles:
    """What a path holds: the newest checkpoint of a run, a checkpoint, or a Hugging Face folder (`check_model` looks at it).

    Errors: CheckpointError for a damaged checkpoint.
    """
    checkpoint = find_checkpoint(path)
    folder = path if checkpoint is None else checkpoint / STUDENT
    heads = folder / HEADS if checkpoint is None else checkpoint / HEADS
    files = ModelFiles(folder, heads if heads.is_file() else None)
    if checkpoint is None:
        return files
    verify_student(checkpoint)
    state = read_state(checkpoint)
    trained = state["config"]
    latent = LatentConfig.model_validate(trained.get("latent", {}))
    return replace(
        files,
        quantization=trained_quantization(state),
        precision=trained["train"]["precision"],
        latent=latent if latent.stages else None,
    )


def print_results(results: Results) -> None:
    """The metrics of every model with their 95 % intervals, and what share of the teacher the students reach."""
    data = results.data
    table = Table(title=f"{data['num_prompts']} held-out prompts, greedy, 95 % intervals", title_justify="left")
    table.add_column("")
    for name, model in results.models.items():
        table.add_column(f"{name}\n{model.num_parameters:,} parameters", justify="right")
    for metric, words in METRICS.items():
        cells = [model.metrics.get(metric) for model in results.models.values()]
        if any(cells):
            table.add_row(words, *("–" if cell is None else format_estimate(metric, cell) for cell in cells))
    table.add_section()
    ratios = [model.ratios.get("exact_call") for model in results.models.values()]
    if any(ratios):
        row = ("–" if ratio is None else format_estimate("exact_call", ratio) for ratio in ratios)
        table.add_row("exact calls, share of the teacher's", *row)
    table.add_section()
    for words, cells in fact_rows(results):
        table.add_row(words, *cells)
    table.caption, table.caption_justify = speed_note(results), "left"
    console = Console()
    if not console.is_terminal:
        # A file or a log has no width; the default would break every cell.
        console.width = max(140, 64 + 27 * len(results.models))
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
