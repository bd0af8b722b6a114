"""Students in parts: two processes with FSDP train as two with DDP do, and their checkpoints are anybody's."""

from __future__ import annotations

import dataclasses
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from raykd.config import Config
from raykd.data.examples import examples_to_table
from raykd.data.pairs import numbered, rejected_half
from raykd.losses.context import LossContext, TeacherTop
from raykd.student.generation import generate
from raykd.student.quantization import Int8Linear
from raykd.training.checkpoint import OPTIMIZER, SHARDS, CheckpointError, latest_checkpoint, verify
from raykd.training.loop import fit
from raykd.training.ranks import Ranks
from raykd.training.sharding import reshard, whole_tensors
from raykd.training.trainer import Trainer, make_trainer
from tests.losses.test_all_losses import BOT, EOS, EOT, EVERYTHING, PAIRS, TEACHER_H, V, make_examples
from tests.training.tiny_run import VOCAB, make_config, make_feed, make_pairs, make_rows

TRAIN = {"num_workers": 2, "learning_rate": 1e-4, "max_grad_norm": 0.5, "validate_every": 2}
FSDP = {"parallel_strategy": "fsdp"}
PROMPTS = [np.array(ids, np.int32) for ids in ([3, 4, 5], [7], [9, 9, 1, 2])]


def trainer_of(config: Config, folder: Path, ranks: Ranks) -> Trainer:
    """A trainer whose losses find all that any of them needs; `every_loss` says what."""
    torch.manual_seed(2)
    context = LossContext(
        eos_id=EOS,
        bot_id=BOT,
        eot_id=EOT,
        opening_ids=torch.tensor([5, 6, 7]),
        layer_pairs=PAIRS,
        num_teacher_layers=2,
        teacher_top=TeacherTop(nn.LayerNorm(TEACHER_H), torch.randn(V, TEACHER_H), None),
    )
    needs_layers = "intermediate_layer" in config.loss.weights
    return make_trainer(
        config,
        folder,
        num_steps=3,
        teacher={"fingerprint": "f"},
        ranks=ranks,
        context=context if needs_layers else LossContext(),
        projections=dict.fromkeys(PAIRS, (32, TEACHER_H)) if needs_layers else {},
    )


def every_loss(student: Path, **train) -> Config:
    return make_config(
        student,
        teacher={"hidden_layers": [0, 1]},
        loss=EVERYTHING.model_dump(),
        data={"prompts": "none", "offline": [{"path": "pairs.jsonl"}]},
        rollouts={"prompts_per_step": 2},
        train={"max_tokens_per_micro_batch": 26, "sequences_per_step": 4} | TRAIN | train,
    )


def rows_for_every_loss(rank: int) -> list[pa.Table]:
    """Rows of three steps. The ranks have different numbers of micro-batches, and the second has none in the last step."""
    one, two, three, preferred, other = make_examples()
    held_out = dataclasses.replace(one, uid=900, held_out=True)
    tables = [[held_out]] if rank == 0 else []
    for step in range(3 if rank == 0 else 2):
        pair = numbered((preferred, rejected_half(other)), 50 + step)
        own = [dataclasses.replace(e, uid=e.uid + 100 * step) for e in ((one,) if rank == 0 else (two, three))]
        tables.append([*own, *pair] if rank == 0 else own)
    return [examples_to_table(examples) for examples in tables]


def train(trainer: Trainer, tables: list[pa.Table], steps: int | None = None) -> dict[int, dict[str, float]]:
    """Train on the rows that are not in the trainer's ledger, up to step `steps`; returns what was logged."""
    logged: dict[int, dict[str, float]] = {}

    def log(step, metrics):
        logged[step] = logged.get(step, {}) | metrics

    stop: Callable[[], bool] = lambda: trainer.progress.step == steps  # noqa: E731
    fit(trainer, make_feed(trainer, tables), log=log, stop=stop, before_step=lambda step: None)
    return logged


# --- what the two processes do --------------------------------------------------------------------------------------------


def work(rank: int, folder: Path, student: Path, untied: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    ranks = Ranks.of_process_group()
    found: dict[str, object] = {}
    for strategy in ("ddp", "fsdp"):
        options = {"parallel_strategy": strategy}
        found |= {f"{strategy}/{name}": value for name, value in every_loss_at_once(folder, student, options, ranks).items()}
        qat = qat_config(untied, gradient_checkpointing=True, **options)
        found |= {f"{strategy}/qat/{name}": value for name, value in in_int8(folder / f"{strategy}-qat", qat, ranks).items()}
        half = make_config(student, train=TRAIN | options | {"precision": "bfloat16"})
        logged = train(trainer_of(half, folder / f"{strategy}-half", ranks), [make_rows(16, seed=rank + 1)], 2)
        found[f"{strategy}/half/losses"] = [logged[step]["loss/total"] for step in (1, 2)]
    found |= interrupted(folder, student, ranks)
    found |= switched(folder, student, ranks)
    found["full disk"] = out_of_room(folder, student, ranks)
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


def every_loss_at_once(folder: Path, student: Path, options: dict, ranks: Ranks) -> dict[str, object]:
    """Three steps with a validation and a checkpoint in between, then answers; weights after the first and the last."""
    run = folder / options["parallel_strategy"]
    trainer = trainer_of(every_loss(student, **options, checkpoint_every=1, keep_checkpoints=3), run, ranks)
    found: dict[str, object] = {"logged": train(trainer, rows_for_every_loss(ranks.rank))}
    reshard(trainer.student)
    parameters = list(trainer.student.parameters())
    shares = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    assert trainer.reference is not None
    frozen = [p.to_local() if isinstance(p, DTensor) else p for p in trainer.reference.parameters()]
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    found["shares"] = [sum(p.numel() for p in shares), sum(p.numel() for p in frozen)]
    found["moments"] = sum((m.to_local() if isinstance(m, DTensor) else m).numel() for m in moments)
    found["weights"] = whole_tensors(trainer.student, keep=True)
    with trainer.whole_student():  # one rank has more to say than the other
        answers = generate(
            trainer.student, PROMPTS[ranks.rank :], max_tokens=3 + ranks.rank, temperature=0, seed=0, eos_ids=[EOS]
        )
    found["answers"] = [(answer.ids.tolist(), answer.logprobs) for answer in answers]
    found["after"] = whole_tensors(trainer.student, keep=True)
    return found


def qat_config(student: Path, **train) -> Config:
    return make_config(
        student,
        stage="qat",
        loss={"self_kd": 1.0, "code_mode_preference": 0.5},
        data={"prompts": "none", "offline": [{"path": "pairs.jsonl"}]},
        train=TRAIN | {"max_tokens_per_micro_batch": 24} | train,
    )


def in_int8(run: Path, config: Config, ranks: Ranks) -> dict[str, object]:
    """Two steps against the frozen student; only one rank has pairs that it is to compare."""
    trainer = trainer_of(config, run, ranks)
    rows = make_rows(8, seed=ranks.rank + 1)
    tables = [pa.concat_tables([make_pairs(2, seed=7), rows.slice(0, 6)]) if ranks.rank == 0 else rows]
    logged = train(trainer, tables)
    int8 = [module for module in trainer.student.modules() if isinstance(module, Int8Linear)]
    assert len(int8) == 14
    assert all(module.quantized for module in int8)
    return {"logged": logged, "weights": whole_tensors(trainer.student, keep=True)}


def interrupted(folder: Path, student: Path, ranks: Ranks) -> dict[str, object]:
    """A run that is stopped after its second step goes on in another trainer: weights and moments as without the break."""
    config = every_loss(dropout_student(student, folder / f"dropout-{ranks.rank}"), **FSDP)
    rows = rows_for_every_loss(ranks.rank)
    whole = trainer_of(config, folder / "whole", ranks)
    train(whole, rows)
    train(trainer_of(config, folder / "parts", ranks), rows, 2)
    dist.barrier(ranks.group)  # until the first rank has written the checkpoint
    again = trainer_of(config, folder / "parts", ranks)
    assert again.progress.step == 2
    train(again, rows[-1:] if ranks.rank == 0 else [])
    same = True
    for one, other in zip(whole.student.parameters(), again.student.parameters(), strict=True):
        same &= torch.equal(local(one), local(other))
        same &= all(
            torch.equal(local(value), local(again.optimizer.state[other][key]))
            for key, value in whole.optimizer.state[one].items()
        )
    return {"resumed bit by bit": same, "steps": [whole.progress.step, again.progress.step]}


def switched(folder: Path, student: Path, ranks: Ranks) -> dict[str, object]:
    """What DDP began FSDP ends, from the checkpoint of the second step."""
    if ranks.rank == 0:
        shutil.copytree(folder / "ddp", folder / "switched")
        shutil.rmtree(folder / "switched" / "checkpoints" / "checkpoint-3")
    dist.barrier(ranks.group)
    trainer = trainer_of(every_loss(student, **FSDP), folder / "switched", ranks)
    assert trainer.progress.step == 2
    train(trainer, rows_for_every_loss(ranks.rank)[-1:] if ranks.rank == 0 else [])
    return {"switched/weights": whole_tensors(trainer.student, keep=True)}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dropout_student(student: Path, folder: Path) -> Path:
    """The same with attention dropout: random states matter."""
    shutil.copytree(student, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"attention_dropout": 0.0', '"attention_dropout": 0.2'))
    assert text != (folder / "config.json").read_text()
    return folder


def out_of_room(folder: Path, student: Path, ranks: Ranks) -> list[str]:
    """A worker whose share cannot be written: what every one of them says, and the checkpoints afterwards."""
    trainer = trainer_of(make_config(student, train=TRAIN | FSDP), folder / "full", ranks)
    train(trainer, [make_rows(8, seed=ranks.rank + 1)])
    trainer.progress.step += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    with pytest.raises(CheckpointError) as error:
        trainer.save()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return [str(error.value), *(path.name for path in (folder / "full" / "checkpoints").iterdir())]


# --- and what came of it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untied_path(student_path, tmp_path_factory) -> Path:
    """The student with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "student"
    shutil.copytree(student_path, folder)
    model = AutoModelForCausalLM.from_pretrained(student_path)
    config = model.config
    config.tie_word_embeddings = False
    untied = Qwen3ForCausalLM(config)
    untied.load_state_dict(model.state_dict())
    untied.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(student_path, untied_path, tmp_path_factory) -> Path:
    """Where two processes have worked."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (folder, student_path, untied_path), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict:
    """What the first of them saw."""
    return torch.load(folder / "found-0.pt", weights_only=False)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def assert_same_metrics(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    for step, metrics in expected.items():
        assert metrics.keys() == found[step].keys()
        for name, value in metrics.items():
            if not name.startswith(("speed", "wait", "seconds")):
                assert found[step][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, name)


def saved(run: Path, step: int) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"checkpoint-{step}" / "student", dtype="float32")
    return dict(model.state_dict())


def test_after_one_step_and_after_three_the_weights_are_those_of_ddp(found, folder):
    """All losses and heads, tied embeddings, clipped gradients, micro-batches; a rank runs dry."""
    steps = found["ddp/logged"]
    assert all(steps[step]["grad_norm"] > 0.5 for step in (1, 2, 3)), "gradients are clipped"
    assert largest_difference(saved(folder / "fsdp", 1), saved(folder / "ddp", 1)) <= 1e-6
    assert largest_difference(found["fsdp/weights"], found["ddp/weights"]) <= 1e-6
    assert sum(name.startswith("heads.") for name in found["fsdp/weights"]) == 8
    assert_same_metrics(found["fsdp/logged"], steps)


def test_a_worker_holds_half_of_weights_moments_and_frozen_student(found, folder):
    weights, frozen = found["ddp/shares"]
    shares = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]
    assert sum(share["fsdp/shares"][0] for share in shares) == weights
    for share in shares:
        assert share["fsdp/shares"][0] == pytest.approx(weights / 2, rel=0.01)
        assert share["fsdp/moments"] == share["fsdp/shares"][0]
        embedding_and_norm = VOCAB * 32 + 32
        assert share["fsdp/shares"][1] == pytest.approx((frozen - embedding_and_norm) / 2 + embedding_and_norm, rel=0.01)


def test_each_worker_writes_answers_of_its_own_and_training_could_go_on(found, folder):
    for rank in range(2):
        own = torch.load(folder / f"found-{rank}.pt", weights_only=False)
        for (ids, logprobs), (expected, expected_logprobs) in zip(own["fsdp/answers"], own["ddp/answers"], strict=True):
            assert ids == expected
            np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
        assert len(own["fsdp/answers"]) == 3 - rank
    assert largest_difference(found["fsdp/after"], found["fsdp/weights"]) == 0


def test_in_int8_against_the_frozen_student_the_weights_are_those_of_ddp(found):
    assert largest_difference(found["fsdp/qat/weights"], found["ddp/qat/weights"]) <= 1e-6
    assert_same_metrics(found["fsdp/qat/logged"], found["ddp/qat/logged"])
    assert found["ddp/qat/logged"][1]["count/code_mode_preference/pair"] == 2


def test_in_bfloat16_the_losses_are_nearly_those_of_ddp(found):
    assert found["fsdp/half/losses"] == pytest.approx(found["ddp/half/losses"], rel=2e-3)


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(folder):
    for rank in range(2):
        own = torch.load(folder / f"found-{rank}.pt", weights_only=False)
        assert own["steps"] == [3, 3]
        assert own["resumed bit by bit"]


def test_the_students_folder_is_what_one_worker_would_write(found, folder):
    checkpoint = latest_checkpoint(folder / "fsdp")
    assert checkpoint is not None
    verify(checkpoint)
    assert not (checkpoint / OPTIMIZER).exists()
    assert len(list((checkpoint / SHARDS).glob("shard-*.safetensors"))) == 2
    loaded = saved(folder / "fsdp", 3)
    assert all(torch.equal(value, found["fsdp/weights"][f"model.{name}"]) for name, value in loaded.items())
    names = [{path.name: path.stat().st_size for path in (folder / run).glob("checkpoints/checkpoint-3/student/*")}
             for run in ("fsdp", "ddp")]  # fmt: skip
    assert names[0] == names[1]


def test_one_worker_goes_on_from_the_shares_of_two_and_fsdp_from_ddp(found, folder, student_path, tmp_path):
    of_two = {}
    for strategy in ("ddp", "fsdp"):
        run = tmp_path / strategy
        shutil.copytree(folder / strategy, run)
        shutil.rmtree(run / "checkpoints" / "checkpoint-3")
        trainer = trainer_of(every_loss(student_path), run, Ranks())
        assert trainer.progress.step == 2
        of_two[strategy] = trainer
    for one, other in zip(of_two["ddp"].student.parameters(), of_two["fsdp"].student.parameters(), strict=True):
        for key, value in of_two["ddp"].optimizer.state[one].items():
            torch.testing.assert_close(value, of_two["fsdp"].optimizer.state[other][key], rtol=1e-4, atol=1e-8)
    trainer = of_two["fsdp"]
    train(trainer, rows_for_every_loss(0)[-1:])
    ended = {name: value.detach() for name, value in trainer.student.state_dict().items()}
    assert trainer.progress.step == 3
    assert largest_difference(ended, found["fsdp/weights"]) <= 1e-6
    assert largest_difference(found["switched/weights"], found["ddp/weights"]) <= 1e-6


def test_a_share_that_cannot_be_written_is_an_error_on_all_workers_and_leaves_the_checkpoint_before(folder):
    for rank in range(2):
        message, *left = torch.load(folder / f"found-{rank}.pt", weights_only=False)["full disk"]
        assert "checkpoint-3 cannot be written: [Errno 27] File too large" in message
        assert "checkpoint-2 is as it was: make room and go on with --resume" in message
        assert left == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"num_workers": 1}}, r"parallel_strategy=fsdp with train.num_workers=1: there is nobody to share"),
        (
            {"latent": {"mode": "continuous", "stages": [{"steps": 1, "slots": 1, "probability": 1}]}},
            "fsdp with latent.mode=continuous: workers would make different numbers of passes; change that, or set",
        ),
        (
            {"stage": "qat", "quantization": {"smoothing": 0.5}, "loss": {"self_kd": 1}},
            "fsdp with quantization.smoothing=0.5: weights are folded in whole",
        ),
    ],
)
def test_what_needs_the_whole_student_is_refused_before_anything_loads(student_path, sections, message):
    options = {"train": {"num_workers": 2} | FSDP | sections.pop("train", {})} | sections
    with pytest.raises(ValidationError, match=message):
        make_config(student_path, **options)
