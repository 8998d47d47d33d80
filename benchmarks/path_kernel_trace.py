"""The trace of the path kernel that masks leave, and the narrowest layer: PHEW beside SynFlow, SynFlow-L2 and chance.

python benchmarks/path_kernel_trace.py [--out benchmarks/results/path_kernel_trace.png]

ResNet-20 at its initialization, the densities of the PHEW paper. SynFlow-L2 keeps the most trace and narrows layers to
do it; walks that start at every unit keep them wide.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import pathprune as pp
from pathprune import models
from pathprune.path_kernel import log2_trace

DENSITIES = (0.512, 0.262, 0.134, 0.069, 0.035, 0.018)
METHODS = {
    "PHEW": pp.PHEW(),
    "whole paths, power 2": pp.PHEW(bias="flow", power=2),
    "SynFlow-L2": pp.SynFlowL2(),
    "SynFlow": pp.SynFlow(),
    "random": pp.Random(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "path_kernel_trace.png")
    out = parser.parse_args().out
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    network = pp.PathNetwork.from_module(models.resnet20(), torch.ones(1, 3, 32, 32))
    figure = Figure(figsize=(10, 4), layout="constrained")
    trace, width = figure.subplots(1, 2)
    for name, pruner in METHODS.items():
        schedule = "one-shot" if isinstance(pruner, pp.Random) else "exponential"
        found = pp.prune(network, pruner, density=list(DENSITIES), schedule=schedule, progress=False)
        traces = [log2_trace(network, masks) for masks in found]
        units = [sum(layer.reach.live_outputs for layer in masks.report().layers if layer.reach) for masks in found]
        print(f"{name:>20}: log2 trace {[round(t, 1) for t in traces]}, live units {units}", flush=True)
        trace.plot(DENSITIES, traces, marker="o", label=name)
        width.plot(DENSITIES, units, marker="o", label=name)
    for axes, text in ((trace, "log2 trace of the path kernel"), (width, "live units")):
        axes.set(xscale="log", xlabel="density", ylabel=text)
        axes.minorticks_off()
        axes.set_xticks(DENSITIES, [f"{density:.1%}" for density in DENSITIES])
        axes.grid(alpha=0.3)
    trace.legend(frameon=False)
    figure.savefig(out, dpi=130)
    print("written to", out)


if __name__ == "__main__":
    main()
