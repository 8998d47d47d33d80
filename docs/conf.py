"""Settings of the documentation: `make docs`."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

project = "pathprune"
author = "the pathprune authors"
copyright = "2026, the pathprune authors"
version = release = metadata.version("pathprune")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "sphinx_copybutton"]
exclude_patterns: list[str] = []
default_role = "code"  # `name` in a docstring
html_theme = "furo"
html_title = f"pathprune {version}"
templates_path: list[str] = []
nitpicky = False
intersphinx_mapping: dict[str, tuple[str, None]] = {}  # the pages are built without a network
suppress_warnings = ["intersphinx.empty"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Determinism", "Returned"]
python_use_unqualified_type_names = True
maximum_signature_line_length = 100

# Docstrings are plain text with ``literals``: bars are absolute values, stars products, a trailing underscore is part
# of a name. To reStructuredText these are markup, so they are escaped outside of literals.
LITERAL = re.compile(r"(``.+?``|:[a-z]+:`[^`]+`|`[^`]+`)")


def escaped(text: str) -> str:
    bullet = re.match(r"\s*\* ", text)
    lead = bullet[0] if bullet else ""
    parts = LITERAL.split(text[len(lead) :])
    for k in range(0, len(parts), 2):
        part = re.sub(r"([|*])", r"\\\1", parts[k])
        parts[k] = re.sub(r"(?<=\w)_(?!\w)", r"\\_", part)
    return lead + "".join(parts)


def listed(lines: list[str]) -> None:
    """Makes a list of what a function returns, where it names several things, a line or more each."""
    first = next((k + 1 for k, line in enumerate(lines) if line.strip() == "Returns:"), len(lines))
    last = next((k for k in range(first, len(lines)) if not lines[k].strip()), len(lines))
    named = [k for k in range(first, last) if re.match(r"    [a-z]\w*: ", lines[k])]
    if len(named) > 1 and named[0] == first:
        lines[first - 1] = "Returned:"  # the extension reads the first line of Returns as a type
        for k in range(first, last):
            lines[k] = f"    * {lines[k][4:]}" if k in named else f"      {lines[k].strip()}"


def escape_docstring(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    listed(lines)
    is_code = False  # a block after "::"
    for k, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            continue
        is_code = line.rstrip().endswith("::") or (is_code and (not line.strip() or line.startswith((" ", "\t"))))
        if not is_code:
            lines[k] = escaped(line)


def setup(app: object) -> None:
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)  # type: ignore[attr-defined]
