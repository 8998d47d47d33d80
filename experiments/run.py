"""Reruns claims of the pruning papers, and gathers what was found on one page.

python experiments/run.py [collapse phew ...] [--quick] [--seeds 3] [--data FOLDER] [--out experiments]

Without names: all. A run that was stopped goes on when it is started again. --quick: one tiny case of each kind, into
another folder, to see that all works. --data: a folder with CIFAR-10, CIFAR-100 (binary versions), Tiny-ImageNet or
train/CLASS/* and val/CLASS/*, in place of the drawn images; --size: pixels of a side that its pictures are resized to.
--page: only the page and plots, from the results there are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import collapse, convergence, path_exclusion, phew, robust, sanity, sketching, trained_mask
from experiments.experiment import Case, Experiment, Results, Row, key_of
from experiments.training import DRAWN, image_case, task_of
from pathprune._mask_io import write_atomically
from pathprune.plots import new_figure

MODULES = (collapse, phew, convergence, path_exclusion, robust, sketching, sanity, trained_mask)
EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.name: module.EXPERIMENT for module in MODULES}
HERE = Path(__file__).resolve().parent

INTRODUCTION = """# The papers' claims, rerun

One small configuration of each claim, on tasks that need no network: scikit-learn's 8x8 digits, and drawn images of
CIFAR's shape (`training.py`: five shapes, filled or as outlines, 3 x 16 x 16). Networks are tiny, training is short and
seeds are few: this page says what holds *here*; it neither confirms nor refutes a paper at its own size.

    python experiments/run.py            # everything; goes on where it was stopped
    python experiments/run.py collapse   # one of them
    python experiments/run.py --data FOLDER --out out   # other images in place of the drawn ones

`FOLDER` has CIFAR-10 or CIFAR-100 (binary versions), Tiny-ImageNet, or pictures by class in ImageNet's layout
(`train/CLASS/*`, `val/CLASS/*`; `--size` says to which size they are resized). Networks take over the number of
classes; as many images are trained on as of the drawn ones, or ten of each class.

± is the standard deviation over seeds in tables, the standard error over pairs in findings. A finding *agrees* with a
claim, or *contradicts* it, where at least four fifths of the pairs that differ (alike in all but the thing compared)
point the same way and their mean is two standard errors from zero; else it is *mixed*. *Measured* are numbers without a
claim. SNIP, IterSNIP, FORCE and GraSP score with batch norm in training mode, as most published runs do, on ten images
of each class. All text below is made from `results/*.jsonl` by `run.py`.
"""


def complete(experiment: Experiment, results: Results, cases: Sequence[dict], folder: Path | None) -> None:
    """Runs the cases that have no result yet."""
    known = results.read()
    missing = [case for case in cases if key_of(case) not in known]
    for case in tqdm(missing, desc=experiment.name, unit="run", disable=None):
        results.append(case, experiment.run(case, folder))


def draw(experiment: Experiment, rows: Sequence[Row], path: Path) -> None:
    figure = new_figure(*experiment.size)
    experiment.plot(rows, figure)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def page(folder: Path, seeds: int, quick: bool = False, task: Case = DRAWN) -> str:
    """The page, from the results in a folder; an experiment without any is left out."""
    images = f"{image_case(quick, task)['images']:,} drawn images"
    parts = [INTRODUCTION]
    if task != DRAWN:
        images = f"{image_case(quick, task)['images']:,} images of {task['task']}"
        parts.append(
            f"On this page images of {task['task']} take the place of the drawn ones: {task['classes']} classes, "
            f"3 x {task['size']} x {task['size']}.\n"
        )
    for number, experiment in enumerate(EXPERIMENTS.values(), 1):
        rows = Results(folder / "results" / f"{experiment.name}.jsonl").rows(experiment.cases(quick, seeds, task))
        if rows:
            parts.append(section(number, experiment, rows, images))
    return "\n".join(parts)


def section(number: int, experiment: Experiment, rows: Sequence[Row], images: str) -> str:
    head, body = experiment.table(rows)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    found = [f"* **{finding.verdict}**: {finding.text}" for finding in experiment.findings(rows)]
    return "\n".join(
        [
            f"## {number}. {experiment.title}\n",
            f"*Claim.* {experiment.claim}\n",
            f"*Here.* {experiment.setting.format(images=images)} {len(rows)} runs.\n",
            f"![{experiment.title}](results/{experiment.name}.png)\n",
            *lines,
            "",
            *found,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="with --data; default: 32 of CIFAR, 64 of pictures")
    parser.add_argument("--out", type=Path, help="default: this folder; with --quick a temporary one")
    parser.add_argument("--page", action="store_true", help="run nothing")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"NAME: wanted some of {', '.join(EXPERIMENTS)}, got {', '.join(unknown)}")
    if given.seeds < 1:
        parser.error(f"--seeds: wanted at least 1, got {given.seeds}")
    if given.size is not None and given.data is None:
        parser.error("--size: wanted --data FOLDER with it, got none")
    if given.out is None and given.data is not None:
        parser.error("--out: wanted a folder for the results on other data, got none")
    try:
        task = DRAWN if given.data is None else task_of(given.data, given.size)
    except (OSError, ValueError, ImportError) as error:
        parser.error(f"--data: {error}")
    out = given.out or (Path(tempfile.mkdtemp(prefix="experiments-")) if given.quick else HERE)
    torch.set_num_threads(1)
    for name in given.names or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        results, cases = Results(out / "results" / f"{name}.jsonl"), experiment.cases(given.quick, given.seeds, task)
        if not given.page:
            complete(experiment, results, cases, given.data)
        rows = results.rows(cases)
        if rows:
            draw(experiment, rows, out / "results" / f"{name}.png")
    write_atomically(out / "README.md", [page(out, given.seeds, given.quick, task).encode()])
    print(out / "README.md")


if __name__ == "__main__":
    main()
