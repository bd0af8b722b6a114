"""The README.md of an exported student: where it comes from, how to serve it, what was measured.

In:  `Card`, all of it known when the rest of the folder is written. Out: Markdown with the Hub's front matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raykd.evaluation.results import METRICS, Results, format_estimate
from raykd.evaluation.serving_report import ServingReport


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    name: str
    format: str  # bf16 | float32 | int8
    origin: str  # a sentence: the run, stage and step, or the folder
    num_parameters: int
    weight_bytes: int
    heads: bool
    int8: dict[str, Any] | None  # OWN_SECTION of config.json, and num_layers
    results: Results | None
    serving: ServingReport | None


def model_card(card: Card) -> str:
    """The text of README.md."""
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [raykd, distillation, tool-use]\n---",
        f"# {card.name}",
        f"{card.origin} {card.num_parameters:,} parameters, {card.weight_bytes / 1e6:.1f} MB of weights ({card.format}).",
        f"```\nvllm serve {card.name}\n```",
    ]
    if card.heads:
        parts.append(
            "`heads.safetensors` holds the heads that were trained beside the model (raykd/student/heads.py). Servers pass "
            "over it: it is not in the index of the weights."
        )
    if card.int8 is not None:
        parts += ["## INT8", _int8(card.int8)]
    if card.serving is not None:
        parts += ["## Served as trained", _serving(card.serving)]
    if card.results is not None:
        parts += ["## Evaluation", _evaluation(card.results)]
    return "\n\n".join(parts) + "\n"


def _int8(section: dict[str, Any]) -> str:
    shards, grid = section["activation_shards"], section["activation_grid"]
    return "\n".join(
        [
            f"- {section['num_layers']} linear layers W8A8: int8 weights with a scale per output row, int8 activations with "
            "a scale per token found on the fly. Embeddings, norms and the layers in `ignore` of config.json are "
            f"{section['forward_dtype']}. Form: compressed-tensors `int-quantized`.",
            f"- Rounded as vLLM's {grid.upper()} kernels do it with tensor_parallel_size={shards}; served with another size "
            "it is another model, since every shard has its own scale.",
            "- GPUs: Turing to Hopper. vLLM has no INT8 kernels for Blackwell (compute capability 10 and above).",
            "- Leave the KV cache in float: on the CPU vLLM takes `--kv-cache-dtype int8_per_token_head` without a warning "
            "and gives wrong output.",
            "- transformers load the folder, but round activations on another grid, which costs up to some hundredths of a "
            "nat a token. `raykd.student.int8_files.load_int8_reference` is exact.",
        ]
    )


def _serving(report: ServingReport) -> str:
    rows = [
        ("tokens", f"{report.num_tokens:,}"),
        ("difference of log-probabilities, mean", f"{report.mean:.2g}"),
        ("99th percentile", f"{report.p99:.2g}"),
        ("maximum", f"{report.max:.2g}"),
        ("difference of the mean likelihood", f"{report.nll_difference:+.1g}"),
        ("greedy tokens that are the reference's", f"{report.greedy_agreement:.2%}"),
        *([("what two engines differ by anyway, mean", f"{report.floor.mean:.2g}")] if report.floor else []),
    ]
    kernels = f" INT8 kernels: {', '.join(report.kernels)}." if report.kernels else ""
    return f"vLLM beside the arithmetic of training, {report.dtype}, nats a token.{kernels}\n\n" + _table(["", ""], rows)


def _evaluation(results: Results) -> str:
    rows = []
    for metric, words in METRICS.items():
        cells = [model.metrics.get(metric) for model in results.models.values()]
        if any(cells):
            rows.append((words, *("–" if cell is None else format_estimate(metric, cell) for cell in cells)))
    text = f"{results.data['num_prompts']} held-out prompts, greedy, 95 % intervals; `student` is the run's."
    return f"{text}\n\n" + _table(["", *results.models], rows)


def _table(head: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
