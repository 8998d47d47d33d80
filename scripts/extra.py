"""Prints the packages of an optional extra of pyproject.toml, a line each: ``python scripts/extra.py docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10, whose pip carries the same parser
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]


def packages(extra: str) -> list[str]:
    """The requirements of an extra.

    Raises:
        SystemExit: there is no such extra; names those there are.
    """
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        extras: dict[str, Any] = tomllib.load(file)["project"]["optional-dependencies"]
    if extra not in extras:
        raise SystemExit(f"extra.py: wanted one of {', '.join(extras)}, got {extra!r}")
    return list(extras[extra])


if __name__ == "__main__":
    print("\n".join(packages(sys.argv[1] if len(sys.argv) > 1 else "")))
