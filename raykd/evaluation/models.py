"""The models that are judged: their folders, what lies beside these, and how plain torch loads them.

In:  a folder as training, `raykd.export` or anybody else left it.
Out: `ModelFiles`; a `Student` with its heads. Raises EvaluationError before anything loads where a model cannot be judged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raykd.config import Config, StudentConfig
from raykd.data.curriculum import latent_ids
from raykd.data.prompt_rows import load_tokenizer
from raykd.evaluation.prompts import EvaluationError
from raykd.evaluation.results import TEACHER, UNTRAINED
from raykd.sample_config import LatentConfig
from raykd.stage_config import QuantizationConfig
from raykd.student.heads import heads_in, make_heads
from raykd.student.int8_files import OWN_SECTION, export_int8, is_int8, load_int8_reference, weight_files
from raykd.student.latent import LatentSpans
from raykd.student.model import Student, load_student
from raykd.vocabulary import VocabularyMatch, compare_vocabularies, student_tokenizer
from teacher_serving.identity import read_model_config


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk, and what is known of how it was trained."""

    folder: Path  # a Hugging Face folder, float or INT8, that vLLM serves as it is
    heads: Path | None = None  # safetensors of its halt and self-evaluation head; None: it has none
    quantization: QuantizationConfig | None = None  # it was trained as INT8, of which the folder has the float weights
    precision: str = "float32"  # of the forward pass that it was trained with
    latent: LatentConfig | None = None  # the curriculum of its thoughts; None: it has none


def check_model(config: Config, name: str, files: ModelFiles) -> None:
    """Raise EvaluationError (ValueError where vocabularies differ) for what cannot be judged; reads small files only."""
    folder = files.folder
    if name in (TEACHER, UNTRAINED):
        raise EvaluationError(f"a model is named {name!r}: that name is taken; choose another")
    if not (folder / "config.json").is_file() or not weight_files(folder):
        raise EvaluationError(
            f"model {name!r}: found no Hugging Face model in {folder}, expected config.json and model*.safetensors, or a "
            "run or checkpoint of raykd.train; train the student first, or correct the path"
        )
    written = read_model_config(folder)
    form = written.get("quantization_config")
    if form is not None and not (is_int8(folder) and OWN_SECTION in written):
        raise EvaluationError(
            f"model {name!r}: {folder} is quantised by {form.get('quant_method')} in the form {form.get('format')}; "
            "expected float weights, or INT8 as python -m raykd.export writes it; judge one of these"
        )
    match_vocabulary(config, folder)


def match_vocabulary(config: Config, folder: Path) -> VocabularyMatch:
    """What a model's vocabulary has to do with the teacher's. Raises ValueError where it is different."""
    return compare_vocabularies(load_tokenizer(config.teacher.tokenizer_folder), student_tokenizer(folder, ())).require()


def weight_bytes(folder: Path) -> int:
    """Size of a model's weights on disk, without its heads."""
    return sum(path.stat().st_size for path in weight_files(folder))


def load_judged(student: StudentConfig, folder: Path) -> Student:
    """The model in a folder as it is saved, without heads, on the CPU; in INT8 with the arithmetic that is served.

    `student` tells how a float model is loaded (attention).
    """
    if is_int8(folder):
        model = load_int8_reference(folder)
        return Student(model, AutoTokenizer.from_pretrained(folder), model.dtype).eval()
    as_saved = {"model": str(folder), "tokenizer": None, "random_weights": False, "layers": None, "new_tokens": {}}
    return load_student(student.model_copy(update=as_saved), seed=0).eval()


def load_with_heads(student: StudentConfig, files: ModelFiles) -> Student:
    """As `load_judged`, with halt and self-evaluation head and with its thoughts. Raises ValueError for other heads."""
    model = load_judged(student, files.folder)
    assert files.heads is not None, f"{files.folder} has no heads"
    found = heads_of(files)
    tensors = {name: value for name, value in load_file(files.heads).items() if name.partition(".")[0] in found}
    model.heads = make_heads(model.hidden_size, dict.fromkeys(found, 1.0))
    model.heads.load_state_dict(tensors, strict=True)
    if files.latent is not None:
        ids, last = latent_ids(model.tokenizer, files.latent), files.latent.stages[-1]
        loops = files.latent.loops if files.latent.mode == "continuous" else 0
        model.latent = LatentSpans(ids.begin, ids.slot, num_slots=last.steps * last.slots, loops=loops)
    return model.eval()


def heads_of(files: ModelFiles) -> set[str]:
    """Which of the halt and the self-evaluation head a model has."""
    return heads_in(files.heads)


# --- models that are made for the occasion: Ray tasks ---------------------------------------------------------------------


def make_untrained(student: StudentConfig, seed: int, folder: Path) -> ModelFiles:
    """Save the student as training started from it."""
    disable_progress_bar()
    load_student(student, seed).save(folder)
    return ModelFiles(folder)


def make_int8(student: StudentConfig, files: ModelFiles, folder: Path) -> ModelFiles:
    """Save what a student of stage qat computes with: the INT8 codes of its weights, as training rounded them."""
    disable_progress_bar()
    assert files.quantization is not None, f"{files.folder} was trained in float"
    model = load_judged(student, files.folder)
    export_int8(model.model, folder, files.quantization, dtype=getattr(torch, files.precision))
    model.tokenizer.save_pretrained(folder)
    return replace(files, folder=folder, quantization=None)
