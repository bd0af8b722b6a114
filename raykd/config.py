"""Every option of raykd: typed, documented, validated. The only place with defaults.

In: nothing but Python values (raykd/cli.py reads files and overrides). Out: a frozen `Config`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from raykd.cluster_config import RatesConfig, RayConfig, Simulated
from raykd.loss_config import PROCESS_LOSSES, Fraction, LossConfig, Section
from raykd.sample_config import CodeModeConfig, HaltConfig, LatentConfig, RolloutConfig
from raykd.stage_config import InitConfig, QuantizationConfig, StageName
from raykd.tune_config import TuneConfig
from teacher_serving.config import TeacherConfig

WITH_HEADS = frozenset({"halt", "halt_ponder", "self_evaluation", "intermediate_layer"})
"""Losses that train a head or projections of their own."""


class RunConfig(Section):
    """Where a run lives."""

    name: str = Field(default="run", min_length=1, pattern=r"^[\w.\-]+$")
    """Name of the run; its folder is `<dir>/<name>`."""
    dir: str = "runs"
    """Folder of all runs. On a cluster: a path that every node sees."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: student initialisation, order of the prompts, sampling, dropout."""


class OfflineFile(Section):
    """A file of offline examples, and its share in the mixture."""

    path: str
    """JSONL or Parquet: prompts with responses and, perhaps, teacher scores (formats: raykd/data/offline_files.py)."""
    weight: float = Field(default=1.0, gt=0.0, le=1000.0)
    """How often each of its rows comes in an epoch: 2 is twice, 0.1 a tenth of the rows, other ones every epoch."""


class LengthStage(Section):
    """A stage of the length curriculum."""

    until_step: int = Field(ge=1)
    """The stage ends before this optimizer step."""
    max_prompt_tokens: int = Field(ge=1)
    """Longer prompts wait for a later stage."""


class DataConfig(Section):
    """From the user's files to examples."""

    prompts: str | None = None
    """Training prompts: a JSONL or Parquet file, a folder of either, or a Hugging Face dataset saved to disk.
    Rows have `messages` (and `tools`) in the OpenAI form, or `prompt`."""
    offline: tuple[OfflineFile, ...] = ()
    """Files of rows that hold their responses already. Beside `prompts`, every optimizer step takes rows of both in the
    ratio of their numbers in an epoch. Without `prompts` no teacher is started; `teacher.model` still names the folder
    whose tokenizer the token ids belong to, and `teacher.hidden_layers` the layers whose states the rows hold."""
    held_out: str | None = None
    """For validation, never trained on: prompts in the formats of `prompts`, answered by the teacher like those; without
    `prompts` one file in the formats of `offline`. None: no validation."""
    max_held_out: int = Field(default=256, ge=1)
    """At most this many held-out prompts are used for validation while training."""
    completions: Literal["teacher", "recorded"] = "teacher"
    """teacher: the teacher writes the next assistant turn. recorded: the conversation's own assistant turns are
    supervised and the teacher scores them."""
    on_long_prompt: Literal["reject", "truncate_left"] = "reject"
    """What to do with a prompt that does not fit the teacher's context beside the completion. Both are counted."""
    max_rejected_fraction: Fraction = 0.01
    """The run fails when a larger share of the rows is unusable; each is kept in rejected.jsonl with its reason."""
    shuffle: bool = True
    """Draw a new order of prompts and offline rows for every epoch (from run.seed)."""
    length_stages: tuple[LengthStage, ...] = ()
    """Short prompts first: in each stage only those come that are short enough, after the last one all the others. Every
    prompt still comes once in an epoch; a stage ends early when it has no more. The order is that of the stream, which
    `fixed_order` makes exact."""
    fixed_order: bool = False
    """Deliver examples in exactly that order, whichever teacher is done first. Slower; for reproducible runs."""
    max_lead_tokens: int = Field(default=1_000_000, ge=1)
    """How far the teachers may run ahead of the trainer, in completion tokens; so may the reading of offline files."""
    num_extractors: int = Field(default=1, ge=1)
    """Actors that turn teacher output into examples, and as many that read offline files."""
    extractor_cpus: float = Field(default=0.25, gt=0)
    """Logical CPUs of one of these actors."""
    teacher_cache: str | None = None
    """Folder where the teacher's output is kept and looked up (matched by prompt and teacher fingerprint), so that later
    epochs and runs cost no teacher time. None: `teacher_cache/` in the run folder."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.prompts and not self.offline:
            raise ValueError("data.prompts and data.offline: found neither, expected one of the two or both")
        of_prompts = {
            "completions=recorded": self.completions == "recorded",
            "on_long_prompt=truncate_left": self.on_long_prompt == "truncate_left",
            "length_stages": bool(self.length_stages),
            f"teacher_cache={self.teacher_cache}": self.teacher_cache is not None,
        }
        limits = [(stage.until_step, stage.max_prompt_tokens) for stage in self.length_stages]
        if any(later[0] <= earlier[0] or later[1] <= earlier[1] for earlier, later in pairwise(limits)):
            raise ValueError(
                f"data.length_stages have (until_step, max_prompt_tokens) {limits}; expected both to rise in each stage"
            )
        for name, is_set in of_prompts.items():
            if is_set and not self.prompts:
                raise ValueError(
                    f"data.{name} without data.prompts: it has no effect on data.offline, whose rows hold their responses; "
                    "leave it out, or name prompts"
                )
        return self


class StudentConfig(Section):
    """The model that learns."""

    model: str
    """Hugging Face folder of the student (or, with `random_weights`, a folder or file with its config.json)."""
    random_weights: bool = False
    """Start from random weights (seed: run.seed) instead of the folder's."""
    layers: tuple[int, ...] | None = None
    """Keep only these decoder layers of `model`, in this order: a student cut out of a larger model, such as the teacher."""
    tokenizer: str | None = None
    """Folder of the tokenizer. None: `model`. It must have all tokens of the teacher and split text alike; it may have more
    special tokens, and other ids."""
    new_tokens: dict[str, str] = Field(default={})
    """Tokens to add where the tokenizer lacks them, each with a description whose rows its own starts from ("": the mean of
    all), such as {"<bot>": "start of thought"}. They are special, but for the envelopes of calls (<tool_call>,
    </tool_call>, <tool_response>, </tool_response>). Texts are split into the teacher's tokens: a new one is learnt where
    `latent.stages`, or offline rows in the student's ids (raykd/data/offline_files.py), write it."""
    stand_in: bool = False
    """Random weights of hardly any width in the place of the model's; vocabulary, positions and number of layers stay."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""

    @property
    def tokenizer_folder(self) -> str:
        """Folder of the tokenizer, without the new tokens."""
        return self.tokenizer or self.model


class TrainConfig(Section):
    """The optimisation."""

    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the heads and projections. None: learning_rate."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the prompts. Epochs after the first read the teacher's cached output."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps, also in the middle of an epoch. None: all epochs."""
    num_workers: int = Field(default=1, ge=1)
    """Data-parallel train workers."""
    min_workers: int | None = Field(default=None, ge=1)
    """Elastic: where a node goes the run goes on with the workers that still find room, at least so many, and grows again up
    to num_workers when nodes come; each time from the newest checkpoint. None: always num_workers."""
    use_gpu: bool = False
    """One GPU per worker (nccl) instead of CPUs (gloo)."""
    parallel_strategy: Literal["ddp", "fsdp"] = "ddp"
    """What each worker holds of the student. ddp: all of it. fsdp: its share of weights, gradients and Adam moments (FSDP2),
    for a student that does not fit one GPU; layers are gathered as they are needed, at the cost of communication. No effect
    on the result."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """Logical CPUs reserved per worker."""
    node_labels: dict[str, str] | None = None
    """Labels of the nodes that workers run on: {pool: trainer} is `ray start --labels pool=trainer`. None: any node."""
    threads_per_worker: int = Field(default=1, ge=1)
    """torch threads of a worker."""
    sequences_per_step: int = Field(default=32, ge=1)
    """Sequences of one optimizer step, over all workers and micro-batches; the two of a pair count as one."""
    max_tokens_per_micro_batch: int = Field(default=16_384, ge=1)
    """Padded tokens of one forward pass; a step is split into as many micro-batches as it takes. No effect on the result."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    min_learning_rate_fraction: Fraction = 0.1
    """Share of the peak that cosine and linear end at."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay; not applied to vectors (norms, biases)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the forward pass; weights and optimizer stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    log_every: int = Field(default=10, ge=1)
    """Steps between log entries."""
    validate_every: int = Field(default=100, ge=1)
    """Steps between validations on the held-out prompts (also at the end)."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints (also at the end)."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest so many checkpoints are kept."""
    max_skipped_steps: int = Field(default=3, ge=1)
    """A step whose loss is not finite is skipped; after so many in a row the run stops."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts of the workers from the last checkpoint before the run gives up."""


class EvaluateConfig(Section):
    """Judging teacher, student and untrained student on held-out prompts."""

    max_prompts: int = Field(default=500, ge=1)
    """At most this many prompts of data.held_out."""
    max_tokens: int = Field(default=256, ge=1)
    """Completion tokens per prompt."""
    num_bootstrap: int = Field(default=1000, ge=1)
    """Resamples of the 95 % confidence intervals."""
    num_examples: int = Field(default=10, ge=0)
    """Decoded examples in the report."""
    num_timed: int = Field(default=20, ge=0)
    """Prompts that are asked alone, one after the other: time to the first token and to the first valid call; 0: none."""
    refinements: str | None = None
    """File of rows that hold their responses, such as conversations with judged drafts (raykd/data/refinement.py): halt and
    self-evaluation heads are judged on them, at most on max_prompts. None: on such rows of data.held_out."""
    max_refined: int = Field(default=32, ge=0)
    """Refinements of it that the student writes anew, halting by its head; 0: none."""


class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl, which is always written."""

    progress_bar: bool = True
    """One line with steps, ETA, throughput, waits and losses."""
    tensorboard: bool = True
    """Write TensorBoard files into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project; None: off. Without an account set WANDB_MODE=offline."""


class Config(Section):
    """The whole run."""

    stage: StageName = "kd"
    """What the run is for (raykd/training/stages.py): kd distils; process goes on with the losses on tool calls; answer
    learns the answers after tool results; qat trains the INT8 student."""
    run: RunConfig = RunConfig()
    init: InitConfig = InitConfig()
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
    latent: LatentConfig = LatentConfig()
    halt: HaltConfig = HaltConfig()
    code_mode: CodeModeConfig = CodeModeConfig()
    rollouts: RolloutConfig = RolloutConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()
    simulate: Simulated | None = None
    """Put timed stand-ins in the place of models, so that the run's data path runs on any machine: the teacher, the step, or
    both (raykd/training/simulated.py). None: the run is real."""
    rates: RatesConfig = RatesConfig()
    tune: TuneConfig | None = None
    """A sweep over options of this run; for raykd.tune alone."""

    def simulates(self, part: Simulated) -> bool:
        """Whether a stand-in takes the place of this part."""
        return self.simulate in (part, "both")

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        losses, quantization = self.loss.weights, self.quantization
        if self.stage != "qat" and (given := _differing(quantization)):
            raise ValueError(
                f"quantization.{min(given)} with stage={self.stage} has no effect: only stage=qat trains in INT8; leave it "
                "out, or set stage=qat"
            )
        if self.stage == "process" and not losses.keys() & set(PROCESS_LOSSES):
            raise ValueError(
                f"stage=process with the losses {', '.join(losses)}: none is on tool use; set one of "
                f"{', '.join(PROCESS_LOSSES)} above 0 in loss"
            )
        if self.stage == "answer" and (self.data.offline or not self.data.prompts):
            raise ValueError(
                "stage=answer with data.offline, or without data.prompts: the answers are selected from conversations; give "
                "those in data.prompts (data.completions=recorded to learn their own answers) and leave data.offline out"
            )
        if self.stage == "qat" and quantization.start_step >= (self.train.max_steps or 2**62):
            raise ValueError(
                f"quantization.start_step={quantization.start_step} with train.max_steps={self.train.max_steps}: no step "
                "would be made in INT8; lower start_step"
            )
        return self

    @model_validator(mode="after")
    def _check_fsdp(self) -> Self:
        workers, latent, smoothing = self.train.num_workers, self.latent, self.quantization.smoothing
        refused = {
            f"train.num_workers={workers}: there is nobody to share the student with": workers == 1,
            "latent.mode=continuous: workers would make different numbers of passes": latent.mode == "continuous",
            f"quantization.smoothing={smoothing:g}: weights are folded in whole, which no worker has": smoothing > 0,
        }
        if found := [what for what, is_so in refused.items() if is_so and self.train.parallel_strategy == "fsdp"]:
            raise ValueError(f"train.parallel_strategy=fsdp with {found[0]}; change that, or set parallel_strategy=ddp")
        return self

    @model_validator(mode="after")
    def _check_teacher(self) -> Self:
        losses, loss = self.loss.weights, self.loss
        full = "kd" in losses and loss.kd_support == "full"
        argmax = "ce_teacher" in losses and loss.ce_teacher_target == "argmax"
        needs_scores = {f"loss.kd={loss.kd:g}": "kd" in losses and not full, "loss.ce_teacher_target=argmax": argmax}
        needs_states = {
            f"loss.intermediate_layer={loss.intermediate_layer:g}": "intermediate_layer" in losses,
            "loss.kd_support=full": full,
        }
        for name, needed in needs_scores.items():
            if needed and not self.teacher.top_k and not self.data.offline:
                raise ValueError(
                    f"{name} and teacher.top_k=0: the teacher gives its text alone, no log-probabilities; learn the text "
                    "(loss.kd=0, loss.ce_teacher above 0: sequence-level distillation), or set top_k above 0"
                )
        for name, needed in needs_states.items():
            if needed and not self.teacher.hidden_layers:
                raise ValueError(
                    f"{name} with teacher.hidden_layers=[]: the loss compares with hidden states that the teacher does not "
                    "ship; name its layers in teacher.hidden_layers (full needs the last one), or those of the offline rows"
                )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        losses, data = self.loss.weights, self.data
        if self.simulates("teacher") and not data.prompts:
            raise ValueError(
                f"simulate={self.simulate} without data.prompts: no teacher is asked; set simulate=step, or name prompts"
            )
        sampled_ce = "ce_teacher" in losses and self.loss.ce_teacher_target == "sampled"
        if "ce_truth" in losses and data.completions == "teacher" and not data.offline:
            raise ValueError(
                f"loss.ce_truth={losses['ce_truth']} with data.completions=teacher: there is no recorded text to learn; "
                "set data.completions=recorded or loss.ce_truth=0 (ce_teacher is the loss on the teacher's text)"
            )
        if sampled_ce and data.completions == "recorded" and not data.offline:
            raise ValueError(
                f"loss.ce_teacher={losses['ce_teacher']} with data.completions=recorded: the teacher writes nothing; use "
                "loss.ce_truth, or loss.ce_teacher_target=argmax"
            )
        if "policy_gradient" in losses and not self.rollouts.prompts_per_step:
            raise ValueError(
                f"loss.policy_gradient={losses['policy_gradient']} with rollouts.prompts_per_step=0: there is nothing to "
                "reward; set rollouts.prompts_per_step above 0"
            )
        if self.rollouts.prompts_per_step and not losses.keys() & {"policy_gradient", "length_aware"}:
            raise ValueError(
                f"rollouts.prompts_per_step={self.rollouts.prompts_per_step} without loss.policy_gradient and "
                "loss.length_aware: no other loss looks at the student's own answers; set one above 0, or prompts_per_step=0"
            )
        if self.train.head_learning_rate and not losses.keys() & WITH_HEADS:
            raise ValueError(
                f"train.head_learning_rate={self.train.head_learning_rate} without a loss that has a head; expected one of "
                f"{sorted(WITH_HEADS)} above 0 in loss, or no head_learning_rate"
            )
        slots = max((stage.steps * stage.slots for stage in self.latent.stages), default=0)
        if self.rollouts.prompts_per_step and self.latent.mode == "continuous" and self.latent.loops < slots:
            raise ValueError(
                f"latent.loops={self.latent.loops} with spans of {slots} slots and rollouts: answers are sampled with every "
                f"slot filled in its turn, and trained on with {self.latent.loops} passes; set latent.loops={slots}, or "
                "rollouts.prompts_per_step=0"
            )
        if self.latent.stages and not ("ce_truth" in losses or sampled_ce):
            raise ValueError(
                "latent.stages without a cross-entropy: the teacher has no scores for latent.begin and latent.end, so that "
                "nothing would teach the student to write them; set loss.ce_teacher (with ce_teacher_target=sampled), or "
                "loss.ce_truth with recorded text, above 0"
            )
        if self.train.sequences_per_step < self.train.num_workers:
            raise ValueError(
                f"train.sequences_per_step={self.train.sequences_per_step} is below train.num_workers="
                f"{self.train.num_workers}: every worker needs at least one sequence per step"
            )
        if self.train.min_workers is not None and self.train.min_workers >= self.train.num_workers:
            raise ValueError(
                f"train.min_workers={self.train.min_workers} with train.num_workers={self.train.num_workers}: an elastic "
                "run has between min_workers and num_workers of them; set fewer, or leave min_workers out"
            )
        if self.data.max_lead_tokens < self.train.sequences_per_step:
            raise ValueError(
                f"data.max_lead_tokens={self.data.max_lead_tokens} is below train.sequences_per_step="
                f"{self.train.sequences_per_step}: the first step could never be filled"
            )
        return self


def _differing(section: Section) -> set[str]:
    """Names of the options that are not at their defaults."""
    return {name for name, option in type(section).model_fields.items() if getattr(section, name) != option.default}
