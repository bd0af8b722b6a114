"""Every option of a teacher, typed, bounded and explained: the only place with their defaults.

In:  keyword arguments or a mapping (from YAML), told apart by `kind`.
Out: a frozen config of one kind; `TeacherConfig` is the union of them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from teacher_serving.access import HttpAccess, OneOfSeveral, ServedAccess, ServedShare, Strict


class SamplingConfig(Strict):
    """How the teacher writes. Has no effect on text that is only scored."""

    temperature: float = Field(default=0.0, ge=0.0, le=10.0)
    """0 writes greedily. The recorded log-probabilities are those of temperature 1 all the same."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens that holds this much probability; 1 = off."""
    sample_top_k: int = Field(default=0, ge=0)
    """Sample from this many best tokens only; 0 = off. (`top_k` of the teacher is what it records.)"""
    max_tokens: int = Field(default=512, ge=1)
    """Longest completion in tokens; cut shorter where the context ends (finish_reason `length`)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """With the uid it seeds each completion: what is written does not depend on the batch it is in."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a completion, and belong to it. None: the model's own end-of-sequence tokens."""

    @model_validator(mode="after")
    def _greedy_has_nothing_to_cut(self) -> SamplingConfig:
        if self.temperature == 0.0 and (self.top_p < 1.0 or self.sample_top_k > 0):
            raise ValueError(
                f"sampling.temperature is 0 (greedy), so top_p={self.top_p} and sample_top_k={self.sample_top_k} "
                "have no effect; expected top_p=1 and sample_top_k=0, or a temperature above 0"
            )
        return self


class RequestConfig(Strict):
    """What each client of a shared teacher chooses for itself. The rest (weights, dtype) is the same for all."""

    top_k: int = Field(default=64, ge=1, le=256)
    """K: tokens per position whose log-probability is recorded. At most the service's own `top_k`."""
    sampling: SamplingConfig = SamplingConfig()
    """How the teacher writes."""
    max_model_len: int | None = Field(default=None, ge=8)
    """Context in tokens, prompt and completion together. None: the service's; at most that."""

    def context(self, limit: int) -> int:
        """Tokens that a sequence may have where the engine holds `limit`."""
        return limit if self.max_model_len is None else min(limit, self.max_model_len)


class BaseTeacherConfig(Strict):
    """What every teacher has in common: what it writes and records, and the pool of Ray actors that answers prompts."""

    teacher_id: str | None = None
    """Name in the data and in reports. None: the last part of `model`."""
    weight_version: str = "0"
    """Goes into every row; another version is another fingerprint, so cached output is not mixed."""
    sampling: SamplingConfig = SamplingConfig()
    """How the teacher writes."""
    max_retries: int = Field(default=1, ge=0)
    """How often a prompt that came back with nothing is asked again before its row becomes an error row."""
    max_restarts: int = Field(default=3, ge=0)
    """How often in a row an actor of the pool may end (its engine died, its node went) before it has answered anything; then
    the run ends. It is started again without limit where it answers in between."""

    num_replicas: int = Field(default=1, ge=1)
    """Actors (engines) in the pool at the start, and at least."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Actors the pool may grow to. None: `num_replicas`."""
    num_cpus: float = Field(default=1.0, ge=0.0)
    """Logical CPUs of one actor."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts per call of an actor. Small batches keep the teacher's lead short."""
    concurrent_batches: int = Field(default=4, ge=1)
    """Calls an actor answers at once; the engine batches them continuously."""
    node_labels: dict[str, str] | None = None
    """Labels of the nodes that actors run on: {pool: teacher} is `ray start --labels pool=teacher`. None: any node."""

    @property
    def api_key_names(self) -> tuple[str, ...]:
        """Environment variables that hold keys, which its actors need."""
        return ()

    @model_validator(mode="after")
    def _pool_is_possible(self) -> BaseTeacherConfig:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is below num_replicas={self.num_replicas}; expected at least as many"
            )
        return self


class LocalTeacherConfig(BaseTeacherConfig):
    """What every teacher that loads a model itself has in common."""

    model: str
    """Hugging Face folder: config.json, *.safetensors, tokenizer.json."""
    top_k: int = Field(default=64, ge=1, le=256)
    """K: tokens per position whose log-probability is recorded. At most the vocabulary."""
    hidden_layers: tuple[int, ...] = ()
    """Decoder layers, counted from 0, whose output at every token of prompt and completion but the last is recorded in half
    precision (2 bytes x hidden size x layers a token). The last layer's is the state before the final norm. vLLM ships
    them for architectures with its EAGLE-3 interface, from one GPU, and keeps them in its KV cache until then."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; auto takes the one the model was saved in."""
    max_model_len: int | None = Field(default=None, ge=8)
    """Context in tokens, prompt and completion together. None: the model's own limit."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Sequences in the running batch of one engine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where a GPU is to be had (in the Ray cluster for actors, else in this process)."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads that compute. None: `num_cpus`, at least one. No effect on a GPU."""
    num_gpus: float | None = Field(default=None, ge=0.0)
    """GPUs of one actor. None: one (vLLM: tensor_parallel_size) on cuda, none on the CPU."""

    @property
    def tokenizer_folder(self) -> str:
        """Folder of the tokenizer that the token ids belong to."""
        return self.model

    @property
    def request(self) -> RequestConfig:
        """How this teacher answers where a request says nothing else."""
        return RequestConfig(top_k=self.top_k, sampling=self.sampling, max_model_len=self.max_model_len)

    @property
    def num_threads(self) -> int:
        """CPU threads of one engine."""
        return self.threads or max(1, int(self.num_cpus))

    @property
    def gpus_per_actor(self) -> float:
        """GPUs one actor asks for; `device` must be resolved."""
        assert self.device != "auto", "resolve the device first: connect.resolve_device"
        if self.device == "cpu":
            return 0.0
        return float(self._gpus_of_one_engine) if self.num_gpus is None else self.num_gpus

    @property
    def _gpus_of_one_engine(self) -> int:
        return 1

    @model_validator(mode="after")
    def _engine_is_possible(self) -> LocalTeacherConfig:
        if sorted({layer for layer in self.hidden_layers if layer >= 0}) != list(self.hidden_layers):
            raise ValueError(
                f"hidden_layers={list(self.hidden_layers)}; expected layers from 0 on, in rising order, each once"
            )
        if self.device == "cpu" and self.num_gpus:
            raise ValueError(f"device is cpu, yet num_gpus={self.num_gpus}; leave num_gpus out or set device: cuda")
        return self


class RemoteTeacherConfig(BaseTeacherConfig):
    """What every teacher has in common whose model runs elsewhere: an actor is a thin client of it."""

    tokenizer: str
    """Folder with the served model's tokenizer.json: what the token ids mean, the chat template, and (with the model's
    config.json and generation_config.json beside it) where a text ends and how many rows the LM head has."""
    top_k: int = Field(default=20, ge=0, le=256)
    """K: tokens per position whose log-probability is asked for; rows hold as many as the server gives, which may be fewer.
    0: text alone, for losses that look at nothing else (ce_teacher: sequence-level distillation)."""
    max_model_len: int | None = Field(default=None, ge=8)
    """Context in tokens, prompt and completion together. None: what the server says."""
    num_cpus: float = Field(default=0.1, ge=0.0)
    """Logical CPUs of one actor: it waits for the server, and reads what comes."""

    hidden_layers: ClassVar[tuple[int, ...]] = ()
    """Hidden states do not travel this way."""

    @property
    def tokenizer_folder(self) -> str:
        """Folder of the tokenizer that the token ids belong to."""
        return self.tokenizer

    @property
    def gpus_per_actor(self) -> float:
        """GPUs one actor asks for: it computes nothing."""
        return 0.0


class VllmTeacherConfig(LocalTeacherConfig):
    """A teacher in vLLM: continuous batching, paged KV cache; the one for real work."""

    kind: Literal["vllm"] = "vllm"
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens per engine step. Scoring holds 8 bytes x vocabulary for each of them, unseen by vLLM's memory
    profile. None: what 256 MiB of that allow, between 512 and 8192."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of a GPU's memory for weights and KV cache. Leave room: log-probabilities are not in the profile."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """Size of the KV cache. None: on a GPU what gpu_memory_utilization leaves; on the CPU max_num_seqs full
    contexts, at most 2 GiB (but never less than one context)."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs one engine spreads the model over."""
    request_timeout_s: float = Field(default=600.0, gt=0.0)
    """Seconds from a request's admission to the engine until it is given up and its row becomes an error row.
    An engine step that takes a minute longer than this counts as a dead engine."""

    @property
    def _gpus_of_one_engine(self) -> int:
        return self.tensor_parallel_size

    @model_validator(mode="after")
    def _states_come_from_one_gpu(self) -> VllmTeacherConfig:
        if self.hidden_layers and self.tensor_parallel_size > 1:
            raise ValueError(
                f"hidden_layers={list(self.hidden_layers)} with tensor_parallel_size={self.tensor_parallel_size}: vLLM's "
                "states are read in the process that schedules, where only a model on one GPU is; set "
                "tensor_parallel_size: 1 or kind: hf"
            )
        return self

    @model_validator(mode="after")
    def _one_gpu_per_shard(self) -> VllmTeacherConfig:
        if self.tensor_parallel_size > 1 and self.device == "cpu":
            raise ValueError(f"tensor_parallel_size={self.tensor_parallel_size} needs device: cuda, found device: cpu")
        if self.num_gpus is not None and self.tensor_parallel_size > 1 and self.num_gpus != self.tensor_parallel_size:
            raise ValueError(
                f"num_gpus={self.num_gpus} contradicts tensor_parallel_size={self.tensor_parallel_size}; leave num_gpus out"
            )
        return self


class HfTeacherConfig(LocalTeacherConfig):
    """A teacher in plain transformers: slow, no moving parts; for debugging and as the reference of the tests."""

    kind: Literal["hf"] = "hf"


class HttpTeacherConfig(HttpAccess, RemoteTeacherConfig):
    """A teacher behind an OpenAI-compatible endpoint (`/v1/completions`), such as a stock `vllm serve`."""


class ServedTeacherConfig(ServedAccess, RemoteTeacherConfig):
    """A shared teacher: an engine of raykd that runs as a service (python -m teacher_serving.serve)."""

    top_k: int = Field(default=64, ge=1, le=256)
    """K: tokens per position whose log-probability is recorded; at most what the service gives."""
    max_model_len: int | None = Field(default=None, ge=8)
    """Context in tokens, prompt and completion together; at most the service's. None: that."""

    @property
    def request(self) -> RequestConfig:
        """How the service is to answer."""
        return RequestConfig(top_k=self.top_k, sampling=self.sampling, max_model_len=self.max_model_len)

    @model_validator(mode="after")
    def _version_is_the_services(self) -> ServedTeacherConfig:
        if self.weight_version != "0":
            raise ValueError(
                f"weight_version={self.weight_version} with kind: served has no effect: the service's own config has it"
            )
        return self


class SeveralTeachersConfig(RemoteTeacherConfig):
    """Several teachers of one vocabulary, each of which answers its part of the prompts: those whose `teacher_id` names it,
    and its share of those that name none. What is written and recorded, and the pool of actors, is the same for all."""

    kind: Literal["several"] = "several"
    teachers: dict[Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")], OneOfSeveral] = Field(min_length=2)
    """By the name that prompts ask for them with, and that is their `teacher_id` in the data: where each one is."""

    @property
    def weights(self) -> dict[str, float]:
        """Share of each among the prompts that name no teacher."""
        return {name: one.weight for name, one in self.teachers.items()}

    @property
    def api_key_names(self) -> tuple[str, ...]:
        """Environment variables that hold keys."""
        return tuple(dict.fromkeys(key for one in self.teachers.values() for key in one.api_key_names))

    def config_of(self, name: str) -> HttpTeacherConfig | ServedTeacherConfig:
        """The teacher of this name as one alone."""
        one = self.teachers[name]
        kind = ServedTeacherConfig if isinstance(one, ServedShare) else HttpTeacherConfig
        common = self.model_dump(include=set(RemoteTeacherConfig.model_fields) - {"max_retries"})
        return kind.model_validate(common | one.model_dump(exclude={"weight"}) | {"teacher_id": name})

    @model_validator(mode="after")
    def _each_is_possible(self) -> SeveralTeachersConfig:
        for name in self.teachers:
            try:
                self.config_of(name)
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, problem["loc"]))
                raise ValueError(f"teachers.{name}: {where}{': ' if where else ''}{problem['msg']}") from None
        if not any(self.weights.values()):
            raise ValueError(f"weights of teachers {self.weights}: expected one above 0 at least")
        if self.max_retries != BaseTeacherConfig.model_fields["max_retries"].default:
            raise ValueError(f"max_retries={self.max_retries} with kind: several has no effect: each teacher has its own")
        return self


class SimulatedTeacherConfig(LocalTeacherConfig):
    """No model at all: the time and the payload of one, for trying out a run's data path on a small machine."""

    kind: Literal["simulated"] = "simulated"
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    tokens_per_s: float = Field(default=2000.0, gt=0.0, allow_inf_nan=False)
    """Completion tokens that one engine writes (or scores) a second while `max_num_seqs` sequences run, each at an even
    share."""
    response_tokens: int = Field(default=256, ge=1)
    """Mean length of what is written, before `sampling.max_tokens` cuts it."""


TeacherConfig = Annotated[
    VllmTeacherConfig
    | HfTeacherConfig
    | HttpTeacherConfig
    | ServedTeacherConfig
    | SeveralTeachersConfig
    | SimulatedTeacherConfig,
    Field(discriminator="kind"),
]
