"""Which code made a result: version and hash, for manifests and reports."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

VERSION = "0.1.0"
"""As in pyproject.toml; a job that brings the source along has no installed package to ask."""


@cache
def code_version() -> str:
    """`<version>+<hash>` of all Python files of raykd and teacher_serving, whatever folder they lie in."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(file for package in ("raykd", "teacher_serving") for file in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{VERSION}+{digest.hexdigest()[:16]}"
