"""How close a model's next-token distribution is to the teacher's, on text that the teacher wrote. Plain torch, no engine.

In:  a model's folder, the held-out prompts, and the teacher's completions with its top-k (TEACHER_OUTPUT_SCHEMA).
Out: per prompt (sum, count) of kl (nats, forward, with a bucket for the mass outside the top-k), top1_agreement, the
     teacher-forced accuracy on tokens of each class (tool_name_tokens, json_argument_tokens and of these argument_key_tokens
     and argument_value_tokens, integration_tokens, claim_tokens), and perplexity (as nats; its exponential is taken after
     averaging).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from raykd.config import StudentConfig
from raykd.data.collate import collate_kd_batch
from raykd.data.examples import Wanted, build_examples
from raykd.data.prompt_rows import load_tokenizer
from raykd.evaluation.metrics import Score
from raykd.evaluation.models import load_judged
from raykd.loss_config import LossConfig
from raykd.losses.combine import combine, loss_counts
from raykd.losses.context import Head
from raykd.student.model import Student
from raykd.types import Batch, Mark, StudentOutput
from raykd.vocabulary import compare_vocabularies, remap_ids

NAMES = {
    "teacher_kl": "kl",
    "teacher_agreement": "top1_agreement",
    "tool_name_accuracy": "tool_name_tokens",
    "json_argument_accuracy": "json_argument_tokens",
    "response_nll": "perplexity",
}
"""Metrics of `combine`, and what they are called here."""

CLASSES = {
    "argument_key_tokens": Mark.ARGUMENT_KEY,
    "argument_value_tokens": Mark.ARGUMENT_VALUE,
    "integration_tokens": Mark.INTEGRATION,
    "claim_tokens": Mark.CLAIM,
}
"""Classes of tokens whose accuracy `combine` does not know."""


def score_by_teacher(
    student: StudentConfig, path: str, teacher: str, prompts: pa.Table, teacher_rows: pa.Table, num_threads: int
) -> list[Score]:
    """Scores of the model in `path`, one per prompt. Runs in a process of its own: it sets the number of torch threads.

    `student` tells how to load a float one (attention), `teacher` is the folder of the teacher's tokenizer; a GPU is used
    where this process sees one. Rows of both tables are in the same order. Raises ValueError for a completion that cannot be
    scored.
    """
    torch.set_num_threads(num_threads)
    disable_progress_bar()
    model = load_judged(student, Path(path))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return score_examples(model, load_tokenizer(teacher), prompts, teacher_rows)


@torch.inference_mode()
def score_examples(
    student: Student, teacher_tokenizer: PreTrainedTokenizerBase, prompts: pa.Table, teacher_rows: pa.Table
) -> list[Score]:
    """Scores of a loaded model, one per prompt; one sequence a forward pass, for intervals need each prompt's own sums.

    Both tables are in the teacher's ids. A student of more tokens is scored on all of its own: what it puts on those that
    the teacher lacks is mass outside the teacher's top-k.
    """
    assert np.array_equal(prompts["uid"].to_numpy(), teacher_rows["uid"].to_numpy()), "rows of prompts and answers differ"
    columns = [name for name in prompts.column_names if name not in teacher_rows.column_names]
    rows = teacher_rows
    for name in columns:
        rows = rows.append_column(name, prompts[name])
    built = build_examples(rows, teacher_tokenizer, Wanted(frozenset({"claim_extraction"})))
    if built.rejected.num_rows:
        raise ValueError(f"a completion of the teacher cannot be scored: {built.rejected['reason'][0].as_py()}")
    examples = remap_ids(built.examples, compare_vocabularies(teacher_tokenizer, student.tokenizer).require())
    config = LossConfig(kd=1.0)
    device = student.head_weight.device
    scores: list[Score] = []
    for index in range(examples.num_rows):
        batch = collate_kd_batch(examples.slice(index, 1), pad_id=0).to(device)
        output = student(batch.input_ids)
        report = combine(
            batch,
            output,
            Head(student.head_weight, student.head_bias, student.num_valid_ids),
            config,
            loss_counts(batch, config),
        )
        values = torch.stack([torch.stack([report.metrics[n].sum, report.metrics[n].count]) for n in NAMES]).tolist()
        right, marks = _predicted(student, batch, output), batch.response_marks
        of_class = [(marks & int(mark)) != 0 for mark in CLASSES.values()]
        values += torch.stack([torch.stack([(right & is_in).sum(), is_in.sum()]) for is_in in of_class]).tolist()
        names = (*NAMES.values(), *CLASSES)
        scores.append({name: (total, count) for name, (total, count) in zip(names, values, strict=True) if count})
    return scores


def _predicted(student: Student, batch: Batch, output: StudentOutput) -> Tensor:
    """Whether each response token [N] is the student's most likely one; ties count."""
    hidden = output.hidden.flatten(0, 1).index_select(0, batch.response_index - 1)
    logits = functional.linear(hidden, student.head_weight, student.head_bias).float()[:, : student.num_valid_ids]
    return logits.gather(1, batch.response_ids[:, None])[:, 0] >= logits.amax(dim=1)
