"""The version, read from the installed distribution; one source: pyproject.toml."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pathprune")
except PackageNotFoundError:  # running from a source tree
    __version__ = "0+source"
