"""The conformance checks of test_conformance.py that are about what goes in and how it is judged: 3, 11, 12 and 14."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from raykd.cli import ConfigError, load_config, load_configs
from raykd.data.collate import collate_kd_batch
from raykd.data.curriculum import LatentIds, curriculum_rng, rewrite
from raykd.data.dataset import KDDataset
from raykd.data.examples import Wanted, build_examples, decode_spans, example_from_row
from raykd.data.readers import DataError
from raykd.evaluate import main as evaluate
from raykd.evaluation.metrics import Gold, score_completion
from raykd.evaluation.prompts import EvaluationError
from raykd.loss_config import LossConfig
from raykd.losses.combine import combine, loss_counts
from raykd.losses.context import Head
from raykd.sample_config import LatentStage
from raykd.types import Example, Mark, StudentOutput
from tests.data.test_examples import table
from tests.data.test_mask_properties import ids_of, made_tokenizer

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


# --- 3 alignment ----------------------------------------------------------------------------------------------------------

TURN = """Step 1: Paris is 21.5 degrees.
Step 2: zwei Anrufe 🙂.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Köln", "days": [3]}}
</tool_call>
<tool_call>
{"name": "set_alarm", "arguments": {"at": "6:30"}}
</tool_call>
It will be 21.5 degrees in Paris."""


def example_of(tokenizer: Any, text: str, end: int | None = None) -> Example:
    messages = [{"role": "tool", "content": '{"temperature": 21.5, "city": "Paris"}'}]
    rows = table([(ids_of(tokenizer, text)[:end], messages, None)])
    return example_from_row(build_examples(rows, tokenizer, Wanted(frozenset({"claim_extraction"}))).examples, 0)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "sentencepiece"])
def test_conformance_03_alignment_what_every_mask_covers_decodes_to_its_span(kind):
    tokenizer = copy.deepcopy(made_tokenizer(kind))
    whole = example_of(tokenizer, TURN)
    tokenizer.add_tokens(["<bot>", "<slot>", "<eot>"])
    ids = LatentIds(*(tokenizer.get_vocab()[token] for token in ("<bot>", "<slot>", "<eot>")))
    latent = rewrite(whole, LatentStage(steps=2, slots=1, probability=1.0), ids, curriculum_rng(0, 1, 0), tokenizer)
    assert latent is not whole
    wanted = {
        Mark.TOOL_NAME: ["get_weather", "set_alarm"],
        Mark.ARGUMENT_KEY: ["city", "days", "at"],
        Mark.ARGUMENT_VALUE: ["Köln", "3", "6:30"],
        Mark.INTEGRATION: ["21.5", "Paris"],
        Mark.CLAIM: ["It will be 21.5 degrees in Paris."],
    }
    for example in (whole, latent):
        found = decode_spans(example, tokenizer)
        for mark, spans in wanted.items():
            for part, text in zip(spans, found[mark][-len(spans) :], strict=True):
                assert part in text
                assert len(text) <= len(part) + 12  # the other characters of the first and the last token
    assert decode_spans(latent, tokenizer)[Mark.LATENT] == ["<slot><slot>"]
    cut = example_of(tokenizer, TURN, end=np.flatnonzero(whole.marks & Mark.ARGUMENT_VALUE)[-1] - 2)
    assert (cut.num_calls, cut.num_truncated_calls) == (2, 1)
    assert (cut.marks == whole.marks[: len(cut.marks)]).all()


@pytest.mark.parametrize("name", ["ce_teacher", "tool_name", "json_argument", "integration_copy", "claim_extraction"])
def test_conformance_03_alignment_a_student_that_knows_the_next_token_has_no_loss(name, demo_tokenizer):
    """Every mask picks the logits of the position before its token: one further left or right would know nothing."""
    batch = collate_kd_batch([example_of(demo_tokenizer, TURN)], pad_id=0)
    config = LossConfig.model_validate({"kd": 0.0, name: 1.0, "claim_ce_share": 1.0})
    words = torch.nn.functional.normalize(torch.randn(len(demo_tokenizer), 128, generator=torch.Generator().manual_seed(0)))
    for shift, low, high in ((0, 0.0, 1e-3), (1, 1.0, math.inf), (-1, 1.0, math.inf)):
        hidden = words[batch.input_ids.roll(shift - 1, dims=1)]
        report = combine(batch, StudentOutput(hidden), Head(60 * words), config, loss_counts(batch, config))
        assert report.parts[name].count > 0
        assert low <= report.total.item() <= high, shift


# --- 11 bad data, 12 config, 14 evaluators --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": ', "malformed JSON"),
        ('["x"]', "found a JSON list"),
        ('{"teacher_text": "x"}', "neither `prompt` nor `messages`"),
        ('{"prompt": "x"}', "no `teacher_text`"),
        ('{"prompt": "x", "teacher_text": 3}', "`teacher_text`"),
        ('{"prompt": "x", "teacher_text": "y", "topk_ids": [[1]], "topk_logprobs": [[-1.0], [-1.0]]}', "topk_ids"),
        ('{"prompt": "x", "teacher_text": "y", "integration_mask": [1, 0, 1, 1, 1, 1, 1]}', "integration_mask"),
    ],
)
def test_conformance_11_bad_data_is_reported_with_its_line_and_reason_and_strict_fails(
    line, reason, tmp_path, demo_tokenizer
):
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "a", "teacher_text": "b"}'
    path.write_text(f"{good}\n{line}\n{good.replace('a', 'c', 1)}\n")
    dataset = KDDataset([path], demo_tokenizer, max_rejected_fraction=0.5)
    assert len(list(dataset)) == 2
    [rejected] = dataset.rejected
    assert rejected.line == 2
    assert reason in rejected.reason
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        list(KDDataset([path], demo_tokenizer, strict=True, max_rejected_fraction=0.5))


def test_conformance_11_bad_data_a_header_of_another_file_or_vocabulary_fails(tmp_path, demo_tokenizer):
    path = tmp_path / "rows.jsonl"
    row = '{"prompt": "a", "teacher_text": "b"}\n'
    path.write_text(json.dumps({"__header__": {"vocabulary_fingerprint": "v1"}}) + "\n" + row)
    with pytest.raises(DataError, match="vocabulary v1, expected v2"):
        KDDataset([path], demo_tokenizer, vocabulary_fingerprint="v2")
    path.write_text(json.dumps({"__header__": {"dataset_sha256": "0" * 64}}) + "\n" + row)
    with pytest.raises(DataError, match="the file was changed after it was written"):
        KDDataset([path], demo_tokenizer)


MINIMAL = ["teacher.kind=hf", "teacher.model=t", "student.model=s", "data.prompts=p.jsonl"]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.warm_up=3", r"train\.warm_up: no such option"),
        ("losses.kd=1", r"losses: no such option"),
        ("train.sequences_per_step=many", r"train\.sequences_per_step"),
        ("train.betas=0.9", r"train\.betas"),
        ("loss.kd_temperature=2", r"kd_temperature=2.*topk_tail"),
        ("loss.kd_support=full", r"kd_support=full.*hidden_layers=\[\]"),
        ("loss.ce_truth=1", r"ce_truth=1.*completions=teacher"),
        ("loss={kd: 0}", "every loss weight is 0"),
    ],
)
def test_conformance_12_config_that_is_unknown_mistyped_or_contradictory_fails_before_anything_starts(override, reason):
    load_config([], MINIMAL)
    with pytest.raises(ConfigError, match=f"(?s){reason}"):
        load_config([], [*MINIMAL, override])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_conformance_12_config_every_shipped_file_is_valid(path):
    """On its own, or laid over the demo's where it leaves out what a run cannot do without."""
    content = yaml.safe_load(path.read_text())
    whole = all("model" in content.get(part, {}) for part in ("teacher", "student")) and "data" in content
    configs = load_configs([path] if whole else [CONFIGS[0].parent / "demo.yaml", path])
    assert all(config.loss.weights for config in configs)


def test_conformance_14_evaluators_without_model_or_data_are_an_error(tmp_path, tiny_model_path):
    common = ["--config", "teacher.kind=hf", f"teacher.model={tiny_model_path}", f"student.model={tiny_model_path}"]
    with pytest.raises(EvaluationError, match="found no checkpoint"):
        evaluate([*common, "data.prompts=none", f"run.dir={tmp_path}", "run.name=none"])


@pytest.mark.parametrize("answer", ["", "I would rather not.", '{"name": "f"'])
def test_conformance_14_evaluators_a_model_that_abstains_scores_0(answer):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    gold = Gold(calls=[{"name": "f", "arguments": {"x": 1}}], values=[21.5])
    results = [{"role": "tool", "content": '{"t": 21.5}'}]
    score = score_completion(answer, results, tools, gold)
    assert {"call_decision", "json_validity", "schema_validity", "tool_name", "exact_call", "integration_recall"} <= set(
        score
    )
    assert [name for name, (total, _) in score.items() if total > 0] == ["missed_calls"]
    assert all(count > 0 for name, (_, count) in score.items() if name != "integration_precision")
    right = score_completion(json.dumps(gold.calls[0]), results, tools, gold) if gold.calls else {}
    assert right["exact_call"] == (1.0, 1.0)
