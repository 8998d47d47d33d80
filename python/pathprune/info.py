"""What this installation is made of: `pathprune info`, or `python -m pathprune.info`."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _library
from .version import __version__


def build_info() -> dict[str, Any]:
    """What the binary was built from, with and for.

    Returns:
        version, git_revision, torch_target_version, cuda_architectures, nvcc_version (None where the CUDA
        library was not built), isas, isa (the one in use), compiler, sanitized. Empty without the binary.
    """
    return {} if _library.core is None else _library.core.build_info()


def _gpus() -> str:
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "none found"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def _driver() -> str:
    """The newest CUDA that the driver serves, such as 13.0."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)  # CUDA builds of torch have it
    try:
        number = ask()
    except RuntimeError:
        number = 0
    return f"CUDA {number // 1000}.{number % 1000 // 10}" if number else "none"


def facts() -> dict[str, str]:
    """What `text` prints, as label -> value."""
    built = build_info()
    target = built.get("torch_target_version", 0)
    lines = {
        "pathprune": __version__ + (f" (revision {built['git_revision'][:12]})" if built else ""),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "driver": _driver(),
        "GPUs": _gpus(),
        "CPU ops": "compiled" if _library.cpu_loaded else f"plain torch ({_library.cpu_error})",
        "CUDA ops": "compiled" if _library.cuda_loaded else f"plain torch ({_library.cuda_error})",
        "threads": str(torch.get_num_threads()),
    }
    if built:
        lines |= {
            "instruction set": f"{built['isa']} (built: {', '.join(built['isas'])})",
            "GPU code": ", ".join(built["cuda_architectures"]) or "not built",
            "compilers": f"{built['compiler']}, nvcc {built['nvcc_version'] or 'none'}",
            "needs torch": f"{target >> 56}.{target >> 48 & 0xFF} or newer",
        }
    return lines


def text() -> str:
    """The facts, a line each."""
    lines = facts()
    width = max(map(len, lines))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines.items())


if __name__ == "__main__":
    print(text())
