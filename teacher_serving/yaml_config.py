"""YAML files and overrides of the form a.b=value to one mapping, and that to a validated config, for all commands.

In:  files, merged deeply from left to right (lists replace), then overrides, parsed as YAML.
Out: the mapping, with who set which option; the config of this package's commands (raykd/cli.py makes those of its own).
     ConfigError names the file and the option.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from teacher_serving.config import Strict
from teacher_serving.wire import explain

C = TypeVar("C", bound=Strict)


class ConfigError(ValueError):
    """The configuration cannot be used: found, expected, what to change."""


def load(kind: type[C], files: Sequence[str], overrides: Sequence[str]) -> C:
    """The config that files and overrides describe. Errors: ConfigError.

    The relative folder of a model that exists is made absolute: engines run in other folders.
    """
    merged, origins = read_files(files)
    merge_overrides(merged, overrides, origins)
    teacher = merged.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("model"), str) and Path(teacher["model"]).exists():
        teacher["model"] = str(Path(teacher["model"]).absolute())
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        lines = [explain(item) for item in error.errors()]
        raise ConfigError("\n".join(f"{', '.join(files)}: {line}" for line in lines)) from None


def read_files(files: Sequence[str | Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the files say together; for every dotted path the file that set it last. Errors: ConfigError."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in files:
        for name, content in _with_included(Path(file)):
            merge(merged, content, origins, name)
    return merged, origins


def merge_overrides(merged: dict[str, Any], overrides: Sequence[str], origins: dict[str, str]) -> None:
    """Put `a.b=value` into the mapping. Errors: ConfigError where the value is not YAML."""
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: {override!r}: the value is not YAML: {error}") from error
        merge(merged, nested(key, value), origins, "command line")


def nested(path: str, value: Any) -> dict[str, Any]:
    """{a: {b: value}} of the dotted path a.b."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def merge(target: dict[str, Any], source: Mapping[str, Any], origins: dict[str, str], origin: str, path: str = "") -> None:
    """Put the source into the target, deeply, and note where every option of it comes from."""
    for key, value in source.items():
        dotted = f"{path}{key}"
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge(target[key], value, origins, origin, dotted + ".")
            continue
        target[key] = value
        origins[dotted] = origin
        for inner, _ in flatten(value, dotted + "."):
            origins[inner] = origin


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in nested mappings, the mappings themselves left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, Mapping):
                yield from flatten(inner, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", inner


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
        raise ConfigError(f"{file}: found a {type(content).__name__} at the top, expected sections such as `teacher:`")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key twice in one mapping; YAML itself silently forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise yaml.MarkedYAMLError("found twice in one section", node.start_mark, f"{twice[0]!r}: write it once")
        return super().construct_mapping(node, deep)
