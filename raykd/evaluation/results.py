"""From scores per prompt to what is reported: metrics with intervals, ratios to the teacher, fingerprints of everything.

In:  the scores of each model on the same prompts.
Out: `Results`, and the same as JSON: `results.json` in the report folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raykd.config import Config
from raykd.evaluation.metrics import Estimate, Score, compare, estimate, resample
from raykd.evaluation.prompts import EvaluationError, JudgedPrompts

RESULTS_FILE = "results.json"
COMPLETIONS_FILE = "completions.jsonl"
TEACHER = "teacher"

METRICS = {
    "call_decision": "call or no call is right",
    "over_calls": "calls where none is needed (less is better)",
    "hallucinated_calls": "calls per prompt that needs none (less is better)",
    "missed_calls": "misses a call (less is better)",
    "json_validity": "calls are valid JSON",
    "schema_validity": "calls fit an offered tool's schema",
    "tool_name": "tool names",
    "call_count": "number of calls",
    "exact_call": "exact calls",
    "argument_f1": "argument F1",
    "integration_precision": "integration precision",
    "integration_recall": "integration recall",
    "kl": "KL(teacher || model), nats a token (less is better)",
    "top1_agreement": "most likely token is the teacher's",
    "tool_name_tokens": "tool-name tokens predicted",
    "json_argument_tokens": "argument tokens predicted",
    "perplexity": "perplexity of the teacher's text (less is better)",
}
"""Every metric that is reported, in this order, and how a table calls it."""

NOT_SHARES = ("kl", "perplexity", "hallucinated_calls")
"""Metrics that are no shares between 0 and 1."""


@dataclass(frozen=True)
class ModelResult:
    """One judged model."""

    path: str
    fingerprint: str
    num_parameters: int
    metrics: dict[str, Estimate]
    by_kind: dict[str, dict[str, Estimate]]
    ratios: dict[str, Estimate]  # to the teacher's metrics; empty for the teacher


@dataclass(frozen=True)
class Results:
    """What `results.json` holds."""

    models: dict[str, ModelResult]
    data: dict[str, Any]
    code: dict[str, Any]
    settings: dict[str, Any]


@dataclass
class Judged:
    """One model on its way to a `ModelResult`: its identity, what it wrote, and its scores by prompt."""

    path: str
    fingerprint: str
    num_parameters: int
    texts: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


def summarise(judged: Mapping[str, Judged], prompts: JudgedPrompts, config: Config) -> Results:
    """Metrics of every model over all prompts and by kind; the bootstrap draws the same prompts for all of them."""
    weights = resample(len(prompts.prompts), config.evaluate.num_bootstrap, config.run.seed)
    kinds = sorted({prompt.kind for prompt in prompts.prompts if prompt.kind is not None})
    models = {}
    for name, model in judged.items():
        by_kind = {
            kind: [score if prompt.kind == kind else {} for score, prompt in zip(model.scores, prompts.prompts, strict=True)]
            for kind in kinds
        }
        ratios = {} if name == TEACHER else {m: compare(model.scores, judged[TEACHER].scores, m, weights) for m in METRICS}
        models[name] = ModelResult(
            path=model.path,
            fingerprint=model.fingerprint,
            num_parameters=model.num_parameters,
            metrics=_estimates(model.scores, weights),
            by_kind={kind: _estimates(scores, weights) for kind, scores in by_kind.items()},
            ratios={metric: ratio for metric, ratio in ratios.items() if ratio is not None},
        )
    data = {
        "path": prompts.path,
        "sha256": prompts.sha256,
        "num_rows": prompts.num_rows,
        "num_prompts": len(prompts.prompts),
        "rejected": prompts.rejected,
    }
    settings = {"seed": config.run.seed, **config.evaluate.model_dump(), "decoding": "greedy"}
    return Results(models, data, code_identity(), settings)


def _estimates(scores: Sequence[Score], weights: Any) -> dict[str, Estimate]:
    found = {metric: estimate(scores, metric, weights) for metric in METRICS}
    if (nll := found["perplexity"]) is not None:  # scores hold nats; the exponential keeps the order of the quantiles
        found["perplexity"] = Estimate(_exp(nll.value), _exp(nll.low), _exp(nll.high), nll.num_prompts)
    return {metric: value for metric, value in found.items() if value is not None}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # the largest power that is still a number


def code_identity() -> dict[str, Any]:
    """Version and hash of this code, and the versions of what it runs on."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("raykd/**/*.py"), *root.glob("teacher_serving/**/*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    names = {package.lower() for package in importlib.metadata.packages_distributions().get("vllm", [])}
    names |= {"torch", "transformers", "ray"}
    return {"fingerprint": digest.hexdigest()[:32], "packages": {n: importlib.metadata.version(n) for n in sorted(names)}}


def format_estimate(metric: str, estimate: Estimate) -> str:
    """An estimate with its interval, as a table shows it.

    >>> format_estimate("exact_call", Estimate(0.9512, 0.93, 0.97, 200))
    '95.1 % (93.0–97.0)'
    >>> format_estimate("kl", Estimate(0.0512, 0.04, 0.06, 200))
    '0.0512 (0.0400–0.0600)'
    """
    value, low, high = estimate.value, estimate.low, estimate.high
    if metric in NOT_SHARES:
        return f"{_number(value)} ({_number(low)}–{_number(high)})"
    return f"{100 * value:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


# --- on disk --------------------------------------------------------------------------------------------------------------


def save_results(results: Results, judged: Mapping[str, Judged], prompts: JudgedPrompts, folder: Path) -> None:
    """Write results.json and completions.jsonl (every prompt with what each model wrote)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "key": prompt.key,
            "kind": prompt.kind,
            "messages": prompt.messages,
            "tools": prompt.tools,
            "gold_calls": prompt.gold.calls,
            "gold_values": prompt.gold.values,
            "completions": {name: model.texts[index] for name, model in judged.items()},
        }
        for index, prompt in enumerate(prompts.prompts)
    ]
    _replace(folder / COMPLETIONS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _replace(folder / RESULTS_FILE, json.dumps(asdict(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def load_results(folder: Path) -> Results:
    """Read results.json back. Raises EvaluationError where there is none."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise EvaluationError(f"found no {path}: evaluate the run first (python -m raykd.evaluate --config …)")
    content = json.loads(path.read_text(encoding="utf-8"))
    models = {
        name: ModelResult(
            **{
                **model,
                "metrics": _read_estimates(model["metrics"]),
                "by_kind": {kind: _read_estimates(metrics) for kind, metrics in model["by_kind"].items()},
                "ratios": _read_estimates(model["ratios"]),
            }
        )
        for name, model in content["models"].items()
    }
    return Results(models, content["data"], content["code"], content["settings"])


def load_completions(folder: Path) -> list[dict[str, Any]]:
    """The rows of completions.jsonl."""
    with (folder / COMPLETIONS_FILE).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _read_estimates(content: Mapping[str, Any]) -> dict[str, Estimate]:
    return {metric: Estimate(**value) for metric, value in content.items()}
