"""`python -m raykd.export --from RUN_OR_CHECKPOINT --out FOLDER [--format bf16|float32|int8] [--heads keep|drop] [--check]`.

In:  a run folder (its newest checkpoint), a checkpoint, or a plain Hugging Face folder; for INT8 `quantization.key=value`.
Out: a Hugging Face folder that `vllm serve FOLDER` takes: weights, tokenizer and chat template, heads, README.md with the
     evaluation of the run, manifest.json with size and sha256 of every file. It is there as a whole or not at all.

A checkpoint of stage qat becomes INT8 with the settings and the precision that it was trained with. A float one becomes what
its config names, or with --format int8 is quantised as it is, in that precision too. --check serves the folder and hands it
out only if it is served as trained.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import yaml
from pydantic import ValidationError
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from raykd.cli import ConfigError, exit_code, start_ray
from raykd.code_version import code_version
from raykd.config import Config, StudentConfig
from raykd.evaluation.model_card import Card, model_card
from raykd.evaluation.models import weight_bytes
from raykd.evaluation.prompts import load_judged_prompts
from raykd.evaluation.results import RESULTS_FILE, load_results
from raykd.evaluation.serving import BLACKWELL, GREEDY_TOKENS, ServingError, check_serving
from raykd.evaluation.serving_report import ServingReport, gates_for
from raykd.stage_config import QuantizationConfig
from raykd.student.int8_files import export_int8, int8_names, int8_section, is_int8, weight_files
from raykd.student.model import Student, count_parameters, load_student, on_meta
from raykd.student.quantization import int8_layers
from raykd.training.checkpoint import (
    HEADS,
    MANIFEST,
    STUDENT,
    find_checkpoint,
    list_files,
    read_state,
    sha256,
    trained_quantization,
    verify_student,
    write_json,
)
from raykd.vocabulary import compare_vocabularies, remap_ids
from teacher_serving.config import VllmTeacherConfig
from teacher_serving.identity import context_limit, describe, read_model_config

logger = logging.getLogger("raykd.export")  # started with -m, __name__ is __main__

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
ACTING = ("ignore", "symmetric_activations", "activation_grid", "activation_shards")
"""Options of `quantization` that have an effect without training."""
CHECKED_SEQUENCES, CHECKED_TOKENS = 32, 256
PACKAGES = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Source:
    """What is exported."""

    model: Path  # Hugging Face folder with float weights
    checkpoint: Path | None
    config: Config | None  # of the run; None for a plain folder
    step: int = 0
    quantization: QuantizationConfig | None = None  # that it was trained with; None: in float

    @property
    def run(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.parent.parent

    @property
    def heads(self) -> Path | None:
        file = (self.checkpoint or self.model) / HEADS
        return file if file.is_file() else None


@dataclass(frozen=True)
class Target:
    """What it becomes."""

    folder: Path
    format: str  # bf16 | float32 | int8
    dtype: torch.dtype  # of everything that is not INT8
    quantization: QuantizationConfig | None  # None: float
    keep_heads: bool

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def main(argv: Sequence[str] | None = None) -> None:
    """Check everything that can be checked first, then write, check the served model and publish."""
    args, overrides = _parse(argv)
    source = find_source(args.source)
    target = find_target(source, args.out, args.format, overrides, keep_heads=args.heads == "keep")
    export(source, target, check=args.check)
    print(f"{target.folder}: {target.format}, vllm serve {target.folder}")


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not exist")
    parser.add_argument("--format", choices=("bf16", "float32", "int8"))
    parser.add_argument("--heads", choices=("keep", "drop"), default="keep")
    parser.add_argument("--check", action="store_true", help="serve it with vLLM and compare with the training arithmetic")
    args, rest = parser.parse_known_args(argv)
    overrides = {}
    for word in rest:
        key, equals, text = word.partition("=")
        section, _, name = key.partition(".")
        if not equals or section != "quantization":
            parser.error(f"unrecognised argument: {word} (overrides are quantization.key=value)")
        if name not in ACTING:
            raise ConfigError(f"{key}: found no such option of an export, expected quantization.{' | '.join(ACTING)}")
        overrides[name] = yaml.safe_load(text)
    return args, overrides


def find_source(path: Path) -> Source:
    """The checkpoint or model that `path` means, verified. Errors: ConfigError, CheckpointError."""
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        verify_student(checkpoint)
        state = read_state(checkpoint)
        config = Config.model_validate(state["config"])
        return Source(checkpoint / STUDENT, checkpoint, config, state["step"], trained_quantization(state))
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"--from {path}: found neither checkpoints nor a config.json, expected a run folder, a checkpoint or a Hugging "
            "Face model folder"
        )
    if read_model_config(path).get("quantization_config"):
        raise ConfigError(f"--from {path}: it is quantised already; export from the float weights that it was made of")
    return Source(path, None, None)


def find_target(source: Source, folder: Path, form: str | None, overrides: dict[str, Any], *, keep_heads: bool) -> Target:
    """What to write, from what the source was trained as. Errors: ConfigError, ValueError of the policy."""
    if folder.exists():
        raise ConfigError(f"--out {folder}: it exists already and nothing is overwritten; choose another or remove it")
    saved = read_model_config(source.model).get("dtype") or "float32"
    own = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    form = form or ("int8" if source.quantization else own.get(saved))
    if form is None:
        raise ConfigError(f"{source.model} is saved in {saved}, expected bfloat16 or float32: choose a --format")
    if form != "int8":
        if overrides:
            raise ConfigError(
                f"quantization.{min(overrides)} has no effect with --format {form}; leave it out, or export int8"
            )
        return Target(folder, form, DTYPES[form], None, keep_heads)
    trained = source.quantization
    quantization = _quantization((trained.model_dump() if trained else {}) | overrides)
    if trained is not None and quantization != trained:
        logger.warning("the student was trained with %s: with other settings it is not served as trained", trained)
    precision = source.config.train.precision if source.config is not None else saved  # what its float weights went through
    int8_layers(on_meta(AutoConfig.from_pretrained(source.model)), quantization)
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= BLACKWELL:
        logger.warning("vLLM has no INT8 kernels for the GPU of this machine (Blackwell): serve the folder elsewhere")
    return Target(folder, form, DTYPES[own.get(precision, "float32")], quantization, keep_heads)


def _quantization(values: dict[str, Any]) -> QuantizationConfig:
    try:
        return QuantizationConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"quantization.{first['loc'][0]}: found {first['input']!r}: {first['msg']}") from error


def export(source: Source, target: Target, *, check: bool) -> None:
    """Write the folder beside its place, check it if asked to, then move it there. Errors: ServingError beyond the gates."""
    temporary = target.folder.with_name(f".writing-{target.folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_model(source, target, temporary)
        serving = _check(source, target, temporary) if check else None
        _describe(source, target, temporary, serving)
        os.rename(temporary, target.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(source: Source, target: Target, folder: Path) -> None:
    attention = source.config.student.attention if source.config is not None else "sdpa"
    student: Student = load_student(StudentConfig(model=str(source.model), attention=attention), seed=0)
    if target.quantization is not None:
        export_int8(student.model, folder, target.quantization, dtype=target.dtype)
    else:
        nn.Module.to(student.model, target.dtype)
        student.model.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    if target.keep_heads and source.heads is not None:
        shutil.copyfile(source.heads, folder / HEADS)
        _write_index(folder)


def _write_index(folder: Path) -> None:
    """Servers load every *.safetensors that is there, unless an index says which: heads are no part of the model."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    (file,) = weight_files(folder)
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
    write_json(index, {"metadata": {"total_size": file.stat().st_size}, "weight_map": dict.fromkeys(names, file.name)})


# --- card and manifest ----------------------------------------------------------------------------------------------------


def _describe(source: Source, target: Target, folder: Path, serving: ServingReport | None) -> None:
    int8 = int8_section(folder) | {"num_layers": len(int8_names(folder))} if is_int8(folder) else None
    has_results = source.run is not None and (source.run / "report" / RESULTS_FILE).is_file()
    card = Card(
        name=target.folder.name,
        format=target.format,
        origin=_origin(source, target),
        num_parameters=count_parameters(AutoConfig.from_pretrained(source.model)),
        weight_bytes=weight_bytes(folder),
        heads=(folder / HEADS).exists(),
        int8=int8,
        results=load_results(source.run / "report") if has_results and source.run is not None else None,
        serving=serving,
    )
    (folder / "README.md").write_text(model_card(card), encoding="utf-8")
    checkpoint = source.checkpoint
    manifest = {
        "format": target.format,
        "dtype": target.dtype_name,
        "int8": int8,
        "source": f"{source.run.name}/{checkpoint.name}" if source.run and checkpoint else source.model.name,
        "checkpoint_sha256": None if checkpoint is None else sha256(checkpoint / MANIFEST),
        "serving": None if serving is None else asdict(serving),
        "code": code_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "files": list_files(folder),
    }
    write_json(folder / MANIFEST, manifest)


def _origin(source: Source, target: Target) -> str:
    if source.config is None or source.run is None:
        made = f"From {source.model.name}"
    else:
        made = f"Distilled by run {source.config.run.name}, stage {source.config.stage}, step {source.step:,}"
    if target.quantization is None:
        return f"{made}."
    return f"{made}, trained in INT8." if source.quantization else f"{made}, quantised after training."


# --- is it served as trained? ---------------------------------------------------------------------------------------------


def _check(source: Source, target: Target, folder: Path) -> ServingReport:
    _start_ray(source.config)
    sequences = _sequences(source)
    engine = VllmTeacherConfig(
        model=str(folder),
        dtype=target.dtype_name,  # pyright: ignore[reportArgumentType]  (one of its choices)
        max_model_len=max(map(len, sequences)) + GREEDY_TOKENS,
        max_num_seqs=CHECKED_SEQUENCES,
        tensor_parallel_size=target.quantization.activation_shards if target.quantization else 1,
    )
    report = check_serving(engine, sequences, float_folder=source.model)
    logger.info("served against trained: mean %.2g, p99 %.2g nats", report.mean, report.p99)
    if problems := report.problems(gates_for(report)):
        raise ServingError(
            f"{target.folder} is not served as trained, so it is not handed out: {'; '.join(problems)}. Export it without "
            "--check to look into it"
        )
    return report


def _start_ray(config: Config | None) -> None:
    if config is not None:
        start_ray(config)
    elif not ray.is_initialized():
        ray.init(num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False, logging_level=logging.WARNING)


def _sequences(source: Source) -> list[np.ndarray]:
    """The held-out prompts of the run, else the text of this file's package, in the student's ids."""
    tokenizer = AutoTokenizer.from_pretrained(source.model)
    limit = context_limit(source.model)  # 0: not said
    longest = min(CHECKED_TOKENS, limit - GREEDY_TOKENS - 1) if limit else CHECKED_TOKENS
    config = source.config
    if config is not None and config.data.prompts and config.data.held_out and Path(config.data.held_out).exists():
        prompts = load_judged_prompts(config, describe(config.teacher)).table().slice(0, CHECKED_SEQUENCES)
        match = compare_vocabularies(AutoTokenizer.from_pretrained(config.teacher.tokenizer_folder), tokenizer).require()
        rows = [row.values.to_numpy() for row in remap_ids(prompts.select(["uid", "prompt_ids"]), match)["prompt_ids"]]
        return [row[:longest] for row in rows if len(row) > 1]
    text = "".join(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py")))
    ids = np.array(tokenizer(text[: 16 * CHECKED_SEQUENCES * longest], verbose=False)["input_ids"])
    return [ids[start : start + longest] for start in range(0, longest * CHECKED_SEQUENCES, longest) if len(ids) > start + 1]


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
