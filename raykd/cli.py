"""From a command line to a run: `--config a.yaml b.yaml key=value …` -> Config, run folder, logging, Ray.

In: argv, YAML files. Out: a validated `Config`; the run folder with its config.yaml; a connected Ray.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ray
import yaml
from pydantic import ValidationError

from raykd.config import Config, RunConfig
from raykd.config_errors import explain, origin_of
from teacher_serving.yaml_config import ConfigError, flatten, merge, merge_overrides, nested, read_files

logger = logging.getLogger(__name__)

PATH_KEYS = (
    "run.dir",
    "init.from",
    "data.prompts",
    "data.held_out",
    "data.teacher_cache",
    "evaluate.refinements",
    "student.model",
    "student.tokenizer",
    "teacher.model",
    "teacher.tokenizer",
)
"""Options that name files. Workers run in other folders, so relative paths that exist are made absolute once, here."""

OF_THE_FIRST_STAGE = ("run.name=", "init.")
"""Overrides that mean the whole of a pipeline, not each of its stages: its name, and what its first stage goes on from."""

WRITTEN = ("run.dir", "data.teacher_cache", "init.from")
"""Those of them that a run makes, or a run before it: made absolute also where nothing is there yet."""

CHANGEABLE_ON_RESUME = (
    "ray.",
    "tracking.",
    "evaluate.",
    "train.log_every",
    "train.validate_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_failures",
    "train.max_skipped_steps",
    "train.parallel_strategy",
    "teacher.num_replicas",
    "teacher.budget.",
    "teacher.max_retries",
    "teacher.request_timeout_s",
    "teacher.address",
    "teacher.app",
    "teacher.api_key_env",
    "teacher.connections",
    "teacher.requests_per_s",
    "teacher.tokens_per_s",
    "tune.num_trials",
    "tune.max_",
)
"""Options (and prefixes of options) that do not change what is learned."""

CONFIG_FILE = "config.yaml"
"""The resolved config, in the run folder."""


class Words(NamedTuple):
    """What a command line names: files, and overrides of the form key=value."""

    files: list[str]
    overrides: list[str]


def parse(argv: Sequence[str] | None, description: str, *flags: str) -> tuple[Config, argparse.Namespace]:
    """Read `--config FILE … key=value …` and the command's own boolean `flags` (such as "--plan").

    Files merge deeply from left to right, lists replace, then `a.b=value` is parsed as YAML. Errors: ConfigError naming
    the file, the dotted path and the nearest valid name.
    """
    words, args = parse_words(argv, description, *flags)
    config = without_tune(load_config(*words))
    if config.simulate is not None:
        raise ConfigError(f"simulate={config.simulate}: stand-ins are for raykd.train alone; leave it out (simulate=null)")
    return config, args


def without_tune(config: Config) -> Config:
    """The config as it is, for every command but raykd.tune. Errors: ConfigError where it has a `tune` section."""
    if config.tune is not None:
        raise ConfigError("tune: a sweep has no effect in this command; run it with raykd.tune, or leave the section out")
    return config


def parse_words(
    argv: Sequence[str] | None, description: str, *flags: str, short: Mapping[str, str] = MappingProxyType({})
) -> tuple[Words, argparse.Namespace]:
    """What stands on the command line, unread. `short`: the config option that `--option VALUE` is short for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        nargs="+",
        required=True,
        metavar="FILE|key=value",
        help="YAML files, merged from left to right, then overrides",
    )
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    for option, path in short.items():
        parser.add_argument(option, metavar="VALUE", help=f"the same as {path}=VALUE")
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if "=" not in word or word.startswith("-")]
    if unknown:
        parser.error(f"unrecognised arguments: {' '.join(unknown)}")
    words = [*args.config, *rest]
    files = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    given = {path: getattr(args, option.removeprefix("--")) for option, path in short.items()}
    overrides += [f"{path}={value}" for path, value in given.items() if value is not None]
    return Words(files, overrides), args


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Merge YAML files and `a.b=value` overrides into a validated Config. Errors: ConfigError."""
    configs = load_configs(files, overrides)
    if len(configs) > 1:
        raise ConfigError(f"{', '.join(map(str, files))}: a pipeline of {len(configs)} stages; only raykd.train runs one")
    return configs[0]


def load_configs(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[Config]:
    """The config of every stage of a pipeline, in order; one where the files name no `pipeline`.

    `pipeline` is a list of what each stage has on top of the rest of the files. A stage's run is called
    `<run.name>-<stage>`, and all but the first go on from the run before, unless they say otherwise. Errors: ConfigError.
    """
    merged, origins = read_files(files)
    stages = merged.pop("pipeline", None)
    merge_overrides(merged, overrides, origins)
    if stages is None:
        return [_validated(merged, origins)]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"{origin_of('pipeline', origins)}: pipeline is no list of stages, expected `- {{stage: kd, …}}`")
    configs: list[Config] = []
    for number, stage in enumerate(stages, 1):
        own, own_origins = copy.deepcopy(merged), dict(origins)
        name = f"{merged.get('run', {}).get('name', RunConfig().name)}-{stage.get('stage', 'kd')}"
        before = {"init": {"from": str(run_folder(configs[-1])), "mode": "stage"}} if configs else {}
        merge(own, {"run": {"name": name}} | before, own_origins, "pipeline")
        merge(own, stage, own_origins, f"{origin_of('pipeline', origins)}, stage {number} of the pipeline")
        merge_overrides(own, [word for word in overrides if not word.startswith(OF_THE_FIRST_STAGE)], own_origins)
        configs.append(_validated(own, own_origins))
    names = [config.run.name for config in configs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"pipeline: two stages have the run.name {twice[0]!r}; give each a name of its own")
    return configs


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values at some dotted paths, validated anew. Errors: ConfigError."""
    merged = config.model_dump()
    for path, value in values.items():
        merge(merged, nested(path, value), {}, "")
    return _validated(merged, {})


def _validated(merged: dict[str, Any], origins: dict[str, str]) -> Config:
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(item, origins) for item in error.errors())) from error
    return _with_absolute_paths(config)


def _with_absolute_paths(config: Config) -> Config:
    values = config.model_dump()
    for key in PATH_KEYS:
        section, name = key.split(".")
        value = values[section].get(name) if key != "teacher.model" or values[section]["kind"] != "http" else None
        if value is not None and (key in WRITTEN or Path(value).exists()):
            values[section][name] = str(Path(value).absolute())
    for file in values["data"]["offline"]:
        if Path(file["path"]).exists():
            file["path"] = str(Path(file["path"]).absolute())
    return Config.model_validate(values)


def run_folder(config: Config) -> Path:
    """Folder of the run: `<run.dir>/<run.name>`."""
    return Path(config.run.dir) / config.run.name


def open_run(config: Config, *, resume: bool = False) -> Path:
    """Make the run folder and save the resolved config in it, or continue in an existing one.

    Errors: those of `check_run_folder`.
    """
    check_run_folder(config, resume=resume)
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / CONFIG_FILE
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    temporary = saved.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, saved)
    return folder


def check_run_folder(config: Config, *, resume: bool) -> None:
    """The run can begin in its folder, or go on there.

    Errors: ConfigError when the folder holds a run and `resume` is off, when there is nothing to resume, or when the
    run was started with other options that change what is learned.
    """
    folder = run_folder(config)
    if resume:
        check_same_run(config)
    elif (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"{folder} already holds a run: continue it with --resume, or choose another run.name, or remove the folder"
        )


def check_same_run(config: Config) -> None:
    """The run folder holds a run with these options, as far as they change what is learned. Errors: ConfigError."""
    folder = run_folder(config)
    saved = folder / CONFIG_FILE
    if not saved.exists():
        raise ConfigError(f"--resume: found no {saved}; start the run without --resume, or check run.dir and run.name")
    differences = _differences(load_config([saved]), config)
    if differences:
        listed = "\n".join(f"  {key}: the run has {old!r}, now {new!r}" for key, (old, new) in differences.items())
        raise ConfigError(f"{folder} was started with another config:\n{listed}\nUse its values or another run.name.")


def _differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    before, after = dict(flatten(old.model_dump())), dict(flatten(new.model_dump()))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    # teacher.teachers.NAME.address is for one of several teachers what teacher.address is for one alone
    general = {key: re.sub(r"^teacher\.teachers\.[^.]+", "teacher", key) for key in keys}
    return {key: (before.get(key), after.get(key)) for key in keys if not general[key].startswith(CHANGEABLE_ON_RESUME)}


def connect_ray(config: Config) -> bool:
    """Connect to the running cluster (ray.address, RAY_ADDRESS, a head node of this machine); False when there is none.

    Errors: ConfigError when an address was given and nothing answers there.
    """
    if ray.is_initialized():
        return True
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    try:
        if address is not None:
            _check_answers(address)
        ray.init(address=address or "auto", logging_level=logging.WARNING)
    except ConnectionError as error:
        if address is not None:
            raise ConfigError(
                f"no Ray cluster answers at {address!r} ({error}): start one, or leave out ray.address and RAY_ADDRESS"
            ) from error
        return False
    return True


def _check_answers(address: str) -> None:
    """Somebody listens at host:port; Ray itself would try for a quarter of an hour. Errors: ConnectionError."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(str(error)) from error


def start_ray(config: Config) -> None:
    """Connect to the running cluster, else start a local Ray."""
    if not connect_ray(config):
        ray.init(
            num_cpus=config.ray.num_cpus or max(8, os.cpu_count() or 1),
            object_store_memory=config.ray.object_store_bytes,
            include_dashboard=config.ray.dashboard,
            logging_level=logging.WARNING,
        )


def node_labels() -> list[dict[str, str]]:
    """The labels of every node of the cluster."""
    return [node["Labels"] for node in ray.nodes() if node["Alive"]]


def set_up_logging() -> None:
    """Log to stderr: time, level, module, message; third parties only from warnings on."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    for package in ("raykd", "teacher_serving"):
        logging.getLogger(package).setLevel(logging.INFO)


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command; a ValueError is the user's to mend and is shown as one message without a traceback."""
    set_up_logging()
    try:
        return command() or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
