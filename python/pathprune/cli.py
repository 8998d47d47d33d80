"""The ``pathprune`` command: info, prune, prune-checkpoint, support, report, score-space, bench.

Exit codes: 0 done, 1 a mistake or a failure (one line on stderr), 2 wrong usage, 130 interrupted (to a shell: an
interrupt inside generated source ends CPython by the signal itself).
"""

from __future__ import annotations

import enum
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from . import bench as benchmarks
from . import info as installation
from .cell_space import CellSpace
from .checkpoint_pruning import prune_checkpoint as prune_files
from .loading import example_input, load_model, read_tokens
from .masks import Masks
from .network import PathNetwork
from .pruners import NTKSAP, PHEW, Magnitude, Pruner, Random, SynFlow, SynFlowL2, TraceSaliency, Wanda
from .pruning import prune as prune_model
from .report import Report
from .score_table import FLAGS
from .space_scores import SPACE_METHODS
from .space_scores import score_space as score_cells
from .tables import table
from .version import __version__

try:
    import typer
except ImportError as missing:
    print(f"pathprune: the command line needs typer ({missing}): pip install 'pathprune[cli]'", file=sys.stderr)
    raise SystemExit(1) from None

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MASKS, JSON, PLOT = "masks.safetensors", "report.json", "report.png"

Model = Annotated[
    str, typer.Option(help="package.module:factory, or a local Hugging Face folder; nothing is downloaded.")
]
StateDict = Annotated[Path | None, typer.Option(help="Weights to load, .safetensors or torch.save.")]
Shape = Annotated[str | None, typer.Option(help="Shape of one input batch, such as 1,3,224,224.")]
Seed = Annotated[int, typer.Option(help="Of chance: weights the model draws, and methods that draw.")]


class Method(str, enum.Enum):
    """What scores the weights."""

    SYNFLOW = "synflow"
    SYNFLOW_L2 = "synflow-l2"
    MAGNITUDE = "magnitude"
    RANDOM = "random"
    TRACE = "trace"
    PHEW = "phew"
    NTK_SAP = "ntk-sap"

    def pruner(self, rounds: int | None) -> Pruner:
        kinds: dict[str, type[Pruner]] = {
            "synflow": SynFlow,
            "synflow-l2": SynFlowL2,
            "magnitude": Magnitude,
            "random": Random,
            "trace": TraceSaliency,
            "phew": PHEW,
            "ntk-sap": NTKSAP,
        }
        return kinds[self.value]() if rounds is None else kinds[self.value](rounds=rounds)


class FileMethod(str, enum.Enum):
    """What scores weights that stay on the disk."""

    MAGNITUDE = "magnitude"
    SYNFLOW = "synflow"
    SYNFLOW_L2 = "synflow-l2"
    PHEW = "phew"
    WANDA = "wanda"

    def pruner(self, rounds: int | None, calibration: Path | None) -> Pruner:
        if self is not FileMethod.WANDA:
            if calibration is not None:
                raise ValueError(f"--calibration: wanted none, {self.value} looks at no data")
            return Method(self.value).pruner(rounds)
        if calibration is None:
            raise ValueError("--calibration: wanted a file of tokens for wanda, got none")
        return Wanda(read_tokens(calibration), by_blocks=True)


_SECONDS_TO_NOTICE = 5.0  # more than what clears up after an interrupt takes


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Mistakes and failures as a line on stderr and an exit code; bugs keep their traceback."""
    try:
        with _interrupted_until_noticed():
            yield
    except KeyboardInterrupt:
        typer.echo("pathprune: interrupted", err=True)
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if isinstance(error, typer.Exit):  # a RuntimeError of its own kind
            raise
        typer.echo(f"pathprune: {' '.join(str(error).split()) or type(error).__name__}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _interrupted_until_noticed() -> Iterator[None]:
    """Ctrl-C raises again some seconds later: Python drops what is raised inside a destructor or a weak reference's
    callback, of which reading a model has many.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    alarm, is_armed = signal.getsignal(signal.SIGALRM), False

    def interrupt(*_: object) -> None:
        nonlocal is_armed
        is_armed = True
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_NOTICE)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if is_armed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"pathprune {__version__}")
        raise typer.Exit


@app.callback()
def pathprune(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Path-based pruning of neural networks."""


@app.command()
def info() -> None:
    """What this installation is made of."""
    typer.echo(installation.text())


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help=f"Folder for {MASKS}, {JSON} and {PLOT}.")],
    method: Annotated[Method, typer.Option(help="What scores the weights.")] = Method.SYNFLOW,
    density: Annotated[float | None, typer.Option(help="Fraction of weights kept.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction removed.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Default: the method's own.")] = None,
    input_shape: Shape = None,
    state_dict: StateDict = None,
    scope: Annotated[str, typer.Option(help="global, layer, row, or n:m such as 2:4.")] = "global",
    schedule: Annotated[str, typer.Option(help="exponential, linear or one-shot.")] = "exponential",
    seed: Seed = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="Name pattern to leave whole; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace earlier results in the folder.")] = False,
) -> None:
    """Prune a model to a density.

    Masks, report and plot are written into a folder, all of them or none.
    """
    with _one_line_errors():
        _check_folder(out, overwrite)
        network, pruner = load_model(model, state_dict, seed), method.pruner(rounds)
        needs_example = pruner.needs_paths or input_shape is not None
        masks = prune_model(
            network,
            pruner,
            density=density,
            sparsity=sparsity,
            example_input=example_input(network, input_shape) if needs_example else None,
            scope=scope,
            schedule=schedule,
            seed=seed,
            exclude=exclude or (),
        )
        assert isinstance(masks, Masks)
        masks.metadata["model"] = model
        report = Report.of(masks)
        with _new_folder(out) as folder:
            masks.save(folder / MASKS)
            report.to_json(folder / JSON)
            _plot(report, folder / PLOT)
            written = sorted(path.name for path in folder.iterdir())
    typer.echo(str(report))
    typer.echo(f"\nWrote {', '.join(written)} to {out}")


@app.command()
def prune_checkpoint(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors weights.")],
    out: Annotated[Path, typer.Option(help="The folder to make: pruned shards, masks, and the other files.")],
    method: Annotated[FileMethod, typer.Option(help="What scores the weights.")] = FileMethod.MAGNITUDE,
    density: Annotated[float | None, typer.Option(help="Fraction of weights kept.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction removed.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Default: the method's own.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Of wanda: a safetensors file of token numbers, [length] or [samples, length].")
    ] = None,
    input_shape: Shape = None,
    scope: Annotated[str | None, typer.Option(help="global, layer, row, or 2:4. Default: the method's own.")] = None,
    schedule: Annotated[str, typer.Option(help="exponential, linear or one-shot.")] = "exponential",
    seed: Seed = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="Name pattern to leave whole; repeatable.")] = None,
) -> None:
    """Prune a checkpoint from file to file.

    Memory is bounded; the same command goes on after an interruption.
    """
    with _one_line_errors():
        made = prune_files(
            folder,
            method.pruner(rounds, calibration),
            out,
            density=density,
            sparsity=sparsity,
            input_shape=input_shape,
            scope=scope,
            schedule=schedule,
            seed=seed,
            exclude=exclude or (),
        )
    typer.echo(str(Report.of(made.masks)))
    for note in made.notes():
        typer.echo(note)
    typer.echo(f"\nWrote {out}")


@app.command()
def support(model: Model, input_shape: Shape = None, state_dict: StateDict = None, seed: Seed = 0) -> None:
    """List a model's operators and path rules.

    Exit code 1 if an operator has no rule, or one that refuses its use.
    """
    with _one_line_errors():
        network = load_model(model, state_dict, seed)
        found = PathNetwork.support_report(network, example_input(network, input_shape))
    typer.echo(str(found))
    raise typer.Exit(0 if found else 1)


@app.command()
def report(
    masks: Annotated[Path, typer.Argument(help=f"A {MASKS}.")],
    model: Annotated[str | None, typer.Option(help="Find paths anew on this model.")] = None,
    input_shape: Shape = None,
    state_dict: StateDict = None,
    seed: Seed = 0,
    json: Annotated[Path | None, typer.Option(help="Also write JSON here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also save a picture here.")] = None,
) -> None:
    """Show what masks leave of a network."""
    with _one_line_errors():
        loaded = Masks.load(masks)
        if model is None:
            found = Report.of(loaded)
        else:
            network = load_model(model, state_dict, seed)
            found = Report.of(loaded, network, example_input(network, input_shape))
        if json is not None:
            found.to_json(json)
        if plot is not None:
            _plot(found, plot)
    typer.echo(str(found))


@app.command("score-space")
def score_space(
    out: Annotated[Path, typer.Option(help="JSON-lines file; if it is there, the run goes on where it stopped.")],
    method: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SPACE_METHODS)}; repeatable.")] = None,
    weights: Annotated[str, typer.Option(help="shared (one supernet) or fresh (every cell its own).")] = "shared",
    sample: Annotated[int | None, typer.Option(help="Score so many cells, drawn from the seed; default: all.")] = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(help="Architectures in a flow.")] = 256,
    top: Annotated[int, typer.Option(help="How many of the best to show, by the first method.")] = 10,
) -> None:
    """Score the cells of NAS-Bench-201's space.

    All 15,625 of them, or a sample; without data.
    """
    with _one_line_errors():
        space, methods = CellSpace(), method or ["synflow"]
        architectures = None
        if sample is not None:
            if not 1 <= sample <= len(space):
                raise ValueError(f"--sample: wanted 1 to {len(space)}, got {sample}")
            architectures = [space[k] for k in sorted(random.Random(seed).sample(range(len(space)), sample))]
        began = time.perf_counter()
        rows = []
        total = len(space) if sample is None else sample
        for row in score_cells(
            space, methods, architectures=architectures, weights=weights, seed=seed, batch=batch, results=out
        ):
            rows.append(row)
            if len(rows) % 1000 == 0:
                typer.echo(f"{len(rows)} of {total}", err=True)
        seconds = time.perf_counter() - began
        best = sorted(rows, key=lambda row: (-row.scores[methods[0]], row.name))[:top]
        lines = [[row.name, *(f"{row.scores[name]:.3f}" for name in methods)] for row in best]
    typer.echo(table(["architecture", *methods], lines))
    counts = {flag: sum(flag in row.flags for row in rows) for flag in FLAGS}
    flagged = ", ".join(f"{count} {flag}" for flag, count in counts.items() if count) or "none flagged"
    typer.echo(f"\n{len(rows)} architectures in {seconds:.1f} s: {flagged}. Written to {out}")


_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure against published loops and PyTorch.

    In a checkout; `pathprune bench --help` says how.
    """
    with _one_line_errors():
        code = benchmarks.run(context.args)
    raise typer.Exit(code)


def _plot(found: Report, path: Path) -> None:
    try:
        found.plot(path)
    except ImportError as missing:
        typer.echo(f"pathprune: no {path.name} ({missing}): pip install 'pathprune[plot]'", err=True)


# ------------------------------------------------------------------------------------------ the output folder


def _check_folder(out: Path, overwrite: bool) -> None:
    """Refuses, before any work, a folder that could not be written at the end."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: wanted a folder, got the file {out}")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"--out: {out} is not empty; --overwrite replaces earlier results in it")
    above = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    if not os.access(above, os.W_OK):
        raise ValueError(f"--out: {above} is not writable")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill: it takes the place ``out`` when complete, and vanishes on any failure before."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp's are private
        with _uninterrupted():
            if out.is_dir() and any(out.iterdir()):
                for file in partial.iterdir():
                    os.replace(file, out / file.name)
            else:
                os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits no more than the few renames it encloses, then counts for nothing: the work is done."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Entry point of the ``pathprune`` command."""
    app(prog_name="pathprune")


if __name__ == "__main__":
    main()
