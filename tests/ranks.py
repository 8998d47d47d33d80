"""Several processes on this machine, and what each of them is asked to check."""

from __future__ import annotations

import datetime
import importlib
import json
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = datetime.timedelta(seconds=60)  # how long a rank waits for one that has gone another way


def outcomes(world: int, modules: list[str], cases: list[str], folder: Path) -> dict[str, str]:
    """Runs the cases in order on ``world`` processes (gloo); returns for each what went wrong, or ''.

    The cases are functions of the modules. After a case that failed on any rank the ranks may be out of step, so those
    behind it are not run.
    """
    mp.spawn(_rank, (world, modules, cases, str(folder)), nprocs=world)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return {case: "\n".join(filter(None, (one.get(case, "not run") for one in found))) for case in cases}


def _rank(rank: int, world: int, modules: list[str], cases: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=PATIENCE
    )
    functions = {name: made for module in modules for name, made in vars(importlib.import_module(module)).items()}
    done: dict[str, str] = {}
    for case in cases:
        began = time.perf_counter()
        try:
            functions[case](Path(folder))
            done[case] = ""
        except Exception:
            done[case] = f"rank {rank}:\n{traceback.format_exc()}"
        seconds = time.perf_counter() - began
        Path(folder, f"{rank}.json").write_text(json.dumps(done))
        every: list[str | None] = [None] * world
        try:
            dist.all_gather_object(every, done[case])
        except Exception:  # another rank has not come here
            break
        if rank == 0:
            print(f"{case}: {seconds:.1f} s", flush=True)
        if any(every):
            break
    dist.destroy_process_group()
