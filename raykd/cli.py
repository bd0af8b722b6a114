"""From a command line to a run: `--config a.yaml b.yaml key=value …` -> Config, run folder, logging, Ray.

In: argv, YAML files. Out: a validated `Config`; the run folder with its config.yaml; a connected Ray.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
import yaml
from pydantic import ValidationError

from raykd.config import Config, RunConfig
from raykd.config_errors import explain, origin_of

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
    "teacher.num_replicas",
    "tune.num_trials",
    "tune.max_",
)
"""Options (and prefixes of options) that do not change what is learned."""

CONFIG_FILE = "config.yaml"
"""The resolved config, in the run folder."""


class ConfigError(ValueError):
    """The configuration cannot be used: found, expected, what to change."""


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
    return without_tune(load_config(*words)), args


def without_tune(config: Config) -> Config:
    """The config as it is, for every command but raykd.tune. Errors: ConfigError where it has a `tune` section."""
    if config.tune is not None:
        raise ConfigError("tune: a sweep has no effect in this command; run it with raykd.tune, or leave the section out")
    return config


def parse_words(
    argv: Sequence[str] | None, description: str, *flags: str, steps: bool = False
) -> tuple[Words, argparse.Namespace]:
    """What stands on the command line, unread. With `steps`, `--steps N` is short for train.max_steps=N."""
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
    if steps:
        parser.add_argument("--steps", type=int, metavar="N", help="the same as train.max_steps=N")
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if "=" not in word or word.startswith("-")]
    if unknown:
        parser.error(f"unrecognised arguments: {' '.join(unknown)}")
    words = [*args.config, *rest]
    files = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if steps and args.steps is not None:
        overrides.append(f"train.max_steps={args.steps}")
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
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}  # dotted path -> file that set it last
    for file in files:
        for name, content in _with_included(Path(file)):
            _merge(merged, content, origins, name)
    stages = merged.pop("pipeline", None)
    _merge_overrides(merged, overrides, origins)
    if stages is None:
        return [_validated(merged, origins)]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"{origin_of('pipeline', origins)}: pipeline is no list of stages, expected `- {{stage: kd, …}}`")
    configs: list[Config] = []
    for number, stage in enumerate(stages, 1):
        own, own_origins = copy.deepcopy(merged), dict(origins)
        name = f"{merged.get('run', {}).get('name', RunConfig().name)}-{stage.get('stage', 'kd')}"
        before = {"init": {"from": str(run_folder(configs[-1])), "mode": "stage"}} if configs else {}
        _merge(own, {"run": {"name": name}} | before, own_origins, "pipeline")
        _merge(own, stage, own_origins, f"{origin_of('pipeline', origins)}, stage {number} of the pipeline")
        _merge_overrides(own, [word for word in overrides if not word.startswith(OF_THE_FIRST_STAGE)], own_origins)
        configs.append(_validated(own, own_origins))
    names = [config.run.name for config in configs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"pipeline: two stages have the run.name {twice[0]!r}; give each a name of its own")
    return configs


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values at some dotted paths, validated anew. Errors: ConfigError."""
    merged = config.model_dump()
    for path, value in values.items():
        for part in reversed(path.split(".")):
            value = {part: value}
        _merge(merged, value, {}, "")
    return _validated(merged, {})


def _merge_overrides(merged: dict[str, Any], overrides: Sequence[str], origins: dict[str, str]) -> None:
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: {override!r}: the value is not YAML: {error}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(merged, value, origins, "command line")


def _validated(merged: dict[str, Any], origins: dict[str, str]) -> Config:
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(item, origins) for item in error.errors())) from error
    return _with_absolute_paths(config)


def _with_included(file: Path, within: tuple[Path, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a file includes (`include: [demo.yaml]`, paths relative to its own), in order, and then its own content."""
    if file.resolve() in within:
        raise ConfigError(f"{file}: includes itself, by way of {' -> '.join(path.name for path in within)}")
    content = _read_yaml(file)
    included = content.pop("include", [])
    if not isinstance(included, list):
        raise ConfigError(f"{file}: include is a {type(included).__name__}, expected a list of files")
    for name in included:
        yield from _with_included(file.parent / str(name), (*within, file.resolve()))
    yield str(file), content


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"--config: found no file {str(file)!r}; overrides have the form key=value")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"--config: {file} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: found a {type(content).__name__} at the top, expected sections such as `train:`")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key twice in one mapping; YAML itself silently forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise yaml.MarkedYAMLError("found twice in one section", node.start_mark, f"{twice[0]!r}: write it once")
        return super().construct_mapping(node, deep)


def _merge(target: dict[str, Any], source: Mapping[str, Any], origins: dict[str, str], origin: str, path: str = "") -> None:
    for key, value in source.items():
        dotted = f"{path}{key}"
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value, origins, origin, dotted + ".")
            continue
        target[key] = value
        origins[dotted] = origin
        for inner, _ in _flatten(value, dotted + "."):
            origins[inner] = origin


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in nested mappings, the mappings themselves left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, Mapping):
                yield from _flatten(inner, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", inner


def _with_absolute_paths(config: Config) -> Config:
    values = config.model_dump()
    for key in PATH_KEYS:
        section, name = key.split(".")
        value = values[section].get(name)
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

    Errors: ConfigError when the folder holds a run and `resume` is off, when there is nothing to resume, or when the
    run was started with other options that change what is learned.
    """
    folder = run_folder(config)
    saved = folder / CONFIG_FILE
    if not resume:
        if saved.exists():
            raise ConfigError(
                f"{folder} already holds a run: continue it with --resume, or choose another run.name, or remove the folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
    else:
        check_same_run(config)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    temporary = saved.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, saved)
    return folder


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
    before, after = dict(_flatten(old.model_dump())), dict(_flatten(new.model_dump()))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {key: (before.get(key), after.get(key)) for key in keys if not key.startswith(CHANGEABLE_ON_RESUME)}


def connect_ray(config: Config) -> bool:
    """Connect to the running cluster (ray.address, RAY_ADDRESS, a head node of this machine); False when there is none.

    Errors: ConfigError when an address was given and nothing answers there.
    """
    if ray.is_initialized():
        return True
    try:
        ray.init(address=config.ray.address or "auto", logging_level=logging.WARNING)
    except ConnectionError as error:
        if address := config.ray.address or os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"no Ray cluster answers at {address!r}: start one or leave ray.address empty") from error
        return False
    return True


def start_ray(config: Config) -> None:
    """Connect to the running cluster, else start a local Ray."""
    if not connect_ray(config):
        ray.init(
            num_cpus=config.ray.num_cpus or max(8, os.cpu_count() or 1),
            object_store_memory=config.ray.object_store_bytes,
            include_dashboard=config.ray.dashboard,
            logging_level=logging.WARNING,
        )


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
