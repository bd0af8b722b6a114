"""What is wrong with a config, in the words of its author: where it was said, what was found, what was expected.

In:  an error of pydantic's, and which file set which option. Out: one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from raykd.config import Config


def explain(item: Any, origins: Mapping[str, str]) -> str:
    """One validation error as: where, what was found, what was expected."""
    location = [str(part) for part in item["loc"]]
    valid = valid_names(location[:-1])
    # pydantic puts the chosen `kind` of a union into the location (teacher, teacher.teachers.NAME): not of the user's path
    is_kind = [location[0] == "teacher" and i in (1, 4) and part in KINDS for i, part in enumerate(location)]
    dotted = ".".join(part for part, hidden in zip(location, is_kind, strict=True) if not hidden)
    prefix = f"{origin}: " if (origin := origin_of(dotted, origins)) else ""
    if item["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; valid names are {', '.join(sorted(valid))}"
        return f"{prefix}{dotted}: no such option{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{prefix}{message}"
    if item["type"] == "missing":
        return f"{prefix}{dotted}: is missing and has no default"
    return f"{prefix}{dotted}: found {item['input']!r}: {message}"


def origin_of(dotted: str, origins: Mapping[str, str]) -> str:
    """File (or "command line") that set this option last, or one inside it; "" where none did."""
    inside = [origin for path, origin in origins.items() if path == dotted or path.startswith(dotted + ".")]
    return inside[-1] if dotted and inside else ""


def members(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation (a model, a union, an Annotated union) may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in members(argument)]


KINDS = {str(model.model_fields["kind"].default) for model in members(Config.model_fields["teacher"].rebuild_annotation())}


def valid_names(location: Sequence[str]) -> list[str]:
    """Names of the options of the section at `location`."""
    models: list[type[BaseModel]] = [Config]
    for part in location:
        if part in KINDS and all("kind" in model.model_fields for model in models):
            models = [model for model in models if model.model_fields["kind"].default == part]
        else:
            named = [
                inner
                for model in models
                if part in model.model_fields
                for inner in members(model.model_fields[part].rebuild_annotation())
            ]
            models = named or models  # a name that the user has given to one of several of a kind
    return [option.alias or name for model in models for name, option in model.model_fields.items()]
