"""From scores per prompt to what is reported: metrics with intervals, ratios to the teacher, fingerprints of everything.

In:  the scores of each model on the same prompts.
Out: `Results`, and the same as JSON: `results.json` in the report folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raykd.code_version import code_version
from raykd.config import Config
from raykd.evaluation.metrics import EARLY_TOKENS, Estimate, Score, compare, estimate, estimate_median, resample
from raykd.evaluation.prompts import EvaluationError, JudgedPrompts

RESULTS_FILE = "results.json"
COMPLETIONS_FILE = "completions.jsonl"
TEACHER = "teacher"
UNTRAINED = "untrained"

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
    "early_calls": f"first valid call within {EARLY_TOKENS} tokens",
    "first_call_tokens": "tokens to the first valid call, median (less is better)",
    "code_mode_adoption": "tools called through code, where that pays",
    "integration_precision": "integration precision",
    "integration_recall": "integration recall",
    "caws_compliance": "CAWS compliance",
    "caws_structure": "CAWS structure, where the teacher wrote such a document",
    "claim_score": "claims, beside the teacher's",
    "kl": "KL(teacher || model), nats a token (less is better)",
    "top1_agreement": "most likely token is the teacher's",
    "tool_name_tokens": "tool-name tokens predicted",
    "json_argument_tokens": "argument tokens predicted",
    "argument_key_tokens": "argument keys' tokens predicted",
    "argument_value_tokens": "argument values' tokens predicted",
    "integration_tokens": "reused values' tokens predicted",
    "claim_tokens": "claims' tokens predicted",
    "perplexity": "perplexity of the teacher's text (less is better)",
    "halt_auc": "halting: AUC",
    "halt_ece": "halting: calibration error (less is better)",
    "halt_brier": "halting: Brier score (less is better)",
    "halt_accuracy": "halting: right decisions",
    "halt_loops": "loops of recorded drafts, halted by the head",
    "halt_oracle_loops": "loops of recorded drafts, halted by the targets",
    "halt_quality_lost": "judge's score lost by halting by the head (less is better)",
    "refine_loops": "loops of its own drafts, halted by the head",
    "self_evaluation_correlation": "self-evaluation: correlation",
    "self_evaluation_ece": "self-evaluation: calibration error (less is better)",
}
"""Every metric that is reported, in this order, and how a table calls it."""

MEDIANS = ("first_call_tokens",)
"""Metrics that are medians, perhaps infinite, where the others are ratios of sums."""

NOT_SHARES = (
    *("hallucinated_calls", "first_call_tokens", "caws_compliance", "caws_structure", "claim_score", "kl", "perplexity"),
    *("halt_auc", "halt_ece", "halt_brier", "halt_loops", "halt_oracle_loops", "halt_quality_lost", "refine_loops"),
    *("self_evaluation_correlation", "self_evaluation_ece"),
)
"""Metrics that a table does not show in per cent."""

FACTS = {
    "weight_bytes": "weights on disk, MB",
    "tokens_per_s": "tokens a second, all prompts at once",
    "first_token_s": "time to the first token, ms: median / 95th percentile",
    "first_call_s": "time to the first valid call, ms: median / 95th percentile",
}
"""What is measured of a model once and not by prompt, and how a table calls it: `timing.py`, and the size of its files."""


@dataclass(frozen=True)
class ModelResult:
    """One judged model."""

    path: str
    fingerprint: str
    num_parameters: int
    metrics: dict[str, Estimate]
    by_kind: dict[str, dict[str, Estimate]]
    ratios: dict[str, Estimate]  # to the teacher's metrics; empty for the teacher
    by_tier: dict[str, dict[str, Estimate]] = field(default_factory=dict)  # metrics of halting by CAWS tier
    facts: dict[str, float] = field(default_factory=dict)  # FACTS, and <name>_p95 of times
    machine: str = ""  # that the facts were measured on


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
    of_heads: dict[str, Estimate] = field(default_factory=dict)  # metrics that are not by prompt
    by_tier: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    machine: str = ""


def summarise(
    judged: Mapping[str, Judged], prompts: JudgedPrompts, config: Config, refinements: Mapping[str, Any] | None = None
) -> Results:
    """Metrics of every model over all prompts and by kind; the bootstrap draws the same prompts for all of them.

    `refinements`: what heads were judged on (`HeadRows.source`).
    """
    weights = resample(len(prompts.prompts), config.evaluate.num_bootstrap, config.run.seed)
    kinds = sorted({prompt.kind for prompt in prompts.prompts if prompt.kind is not None})
    models = {}
    for name, model in judged.items():
        by_kind = {
            kind: [score if prompt.kind == kind else {} for score, prompt in zip(model.scores, prompts.prompts, strict=True)]
            for kind in kinds
        }
        compared = [] if name == TEACHER else [metric for metric in METRICS if metric not in MEDIANS]
        ratios = {metric: compare(model.scores, judged[TEACHER].scores, metric, weights) for metric in compared}
        models[name] = ModelResult(
            path=model.path,
            fingerprint=model.fingerprint,
            num_parameters=model.num_parameters,
            metrics=_estimates(model.scores, weights) | model.of_heads,
            by_kind={kind: _estimates(scores, weights) for kind, scores in by_kind.items()},
            ratios={metric: ratio for metric, ratio in ratios.items() if ratio is not None},
            by_tier=model.by_tier,
            facts=model.facts,
            machine=model.machine,
        )
    data = {
        "path": prompts.path,
        "sha256": prompts.sha256,
        "num_rows": prompts.num_rows,
        "num_prompts": len(prompts.prompts),
        "rejected": prompts.rejected,
        "refinements": refinements,
    }
    settings = {"seed": config.run.seed, **config.evaluate.model_dump(), "decoding": "greedy"}
    return Results(models, data, code_identity(), settings)


def _estimates(scores: Sequence[Score], weights: Any) -> dict[str, Estimate]:
    found = {metric: (estimate_median if metric in MEDIANS else estimate)(scores, metric, weights) for metric in METRICS}
    if (nll := found["perplexity"]) is not None:  # scores hold nats; the exponential keeps the order of the quantiles
        found["perplexity"] = Estimate(_exp(nll.value), _exp(nll.low), _exp(nll.high), nll.num_prompts)
    return {metric: value for metric, value in found.items() if value is not None}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # the largest power that is still a number


def code_identity() -> dict[str, Any]:
    """Version and hash of this code, and the versions of what it runs on."""
    names = {package.lower() for package in importlib.metadata.packages_distributions().get("vllm", [])}
    names |= {"torch", "transformers", "ray"}
    return {"fingerprint": code_version(), "packages": {n: importlib.metadata.version(n) for n in sorted(names)}}


def format_estimate(metric: str, estimate: Estimate) -> str:
    """An estimate with its interval, as a table shows it.

    >>> format_estimate("exact_call", Estimate(0.9512, 0.93, 0.97, 200))
    '95.1 % (93.0–97.0)'
    >>> format_estimate("kl", Estimate(0.0512, 0.04, 0.06, 200))
    '0.0512 (0.0400–0.0600)'
    >>> format_estimate("first_call_tokens", Estimate(31.0, 29.0, math.inf, 200))
    '31 (29–∞)'
    """
    value, low, high = estimate.value, estimate.low, estimate.high
    if metric in MEDIANS:
        return f"{value:g} ({low:g}–{high:g})".replace("inf", "∞")
    if metric in NOT_SHARES:
        return f"{_number(value)} ({_number(low)}–{_number(high)})"
    return f"{100 * value:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def format_facts(model: ModelResult) -> dict[str, str]:
    """The facts of a model that were measured, as a table shows them.

    >>> facts = {"weight_bytes": 1.25e6, "first_token_s": 0.0121, "first_token_s_p95": math.inf}
    >>> format_facts(ModelResult("m", "", 1, {}, {}, {}, facts=facts))
    {'weight_bytes': '1.2', 'first_token_s': '12.1 / ∞'}
    """
    units = {"weight_bytes": 1e-6, "tokens_per_s": 1.0, "first_token_s": 1e3, "first_call_s": 1e3}
    cells = {}
    for name in FACTS:
        values = [model.facts[key] * units[name] for key in (name, f"{name}_p95") if key in model.facts]
        if values:
            cells[name] = " / ".join("∞" if math.isinf(value) else f"{value:,.1f}" for value in values)
    return cells


def fact_rows(results: Results) -> list[tuple[str, list[str]]]:
    """Rows of a table with the facts, as (words, a cell for each model); a fact that no model has is left out."""
    facts = [format_facts(model) for model in results.models.values()]
    known = [name for name in FACTS if any(name in cells for cells in facts)]
    return [(FACTS[name], [cells.get(name, "–") for cells in facts]) for name in known]


def speed_note(results: Results) -> str | None:
    """Whose speed a table shows."""
    machines = sorted({model.machine for model in results.models.values() if model.machine})
    return f"Tokens a second and times are those of one engine on this machine: {', '.join(machines)}." if machines else None


def tier_rows(results: Results) -> list[tuple[str, list[tuple[str, Estimate | None]]]]:
    """Rows of a table with the metrics of halting by CAWS tier, as (words, (metric, estimate) for each model)."""
    models = results.models.values()
    tiers = sorted({tier for model in models for tier in model.by_tier})
    return [
        (f"{tier}: {words}", [(metric, model.by_tier.get(tier, {}).get(metric)) for model in models])
        for tier in tiers
        for metric, words in METRICS.items()
        if any(metric in model.by_tier.get(tier, {}) for model in models)
    ]


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
    content = _infinite_to_null(asdict(results))
    _replace(folder / RESULTS_FILE, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _infinite_to_null(value: Any) -> Any:
    """JSON knows no infinity: in numbers of models null stands for it, such as the time of a call that never came."""
    if isinstance(value, Mapping):
        return {key: _infinite_to_null(inner) for key, inner in value.items()}
    return None if value == math.inf else value


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
                "by_tier": {tier: _read_estimates(metrics) for tier, metrics in model.get("by_tier", {}).items()},
                "ratios": _read_estimates(model["ratios"]),
                "facts": _read_numbers(model.get("facts", {})),
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
    return {metric: Estimate(**_read_numbers(value)) for metric, value in content.items()}


def _read_numbers(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.inf if value is None else value for name, value in content.items()}
