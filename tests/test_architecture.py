"""The house: imports only go down, and the kernels know nothing of torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "pathprune"

FLOORS = [
    {
        "version",
        "_library",
        "checks",
        "nodes",
        "_mask_io",
        "models",
        "tables",
        "data",
        "pictures",
        "schedules",
        "policy",
        "batches",
        "exporting",
        "graph_values",
        "scratch",
        "residency",
        "shards",
        "checkpoint",
        "restartable",
        "assembly",
        "expert_inputs",
        "cell_space",
        "score_table",
        "real",
        "torch_prune",
        "scaled",
        "distributed",
        "structure",
        "surroundings",
        "stores",
        "maintenance",
        "bench",
    },
    {"loading", "reference", "sparse_reference", "spectrum", "pooling", "plots", "info"},
    {"walk_reference", "ops"},
    {"belonging"},
    {
        *("sparse_ops", "masked", "masks"),
        *("rules", "wire_rules", "norm_rules", "complex_rules", "attention_rules", "expert_rules"),
        *("product_rules", "scan_rules", "tracer"),
    },
    {"walk_ops", "thin_ops"},
    {
        "network",
        "position_classes",
        "score_sources",
        "row_blocks",
        "select",
        "sparse",
        "pruned_convolution",
        "bias_masks",
        "sharded_masks",
    },
    {"walk_graph", "walk_masks", "path_links", "mean_field", "rescaling", "gradient_moments", "cell_networks"},
    {"walk_tables"},
    {"walks"},
    {"weights", "sharded_weight", "layers"},
    {"row_selection"},
    {"flow"},
    {
        "activations",
        "blockwise",
        "liveness",
        "spatial",
        "tangent",
        "gates",
        "recording",
        "routing",
        "path_sampling",
        "summed_weights",
        "routed_flow",
    },
    {"path_kernel", "path_gram", "tangent_kernel"},
    {"convergence"},
    {"pruners", "stable_resnet"},
    {"pruning", "savepoints", "sanity", "zico", "space_scores", "checkpoint_model"},
    {"allocation", "report", "scoring", "measures", "checkpoint_pruning"},
    {"many_networks"},
    {"comparison"},
    {"cli", "demo"},
]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    for height, rooms in enumerate(FLOORS):
        if name in rooms:
            return height
    raise AssertionError(f"'{name}' has no floor: enter it in FLOORS")


def imported(path: Path) -> set[str]:
    """Rooms of the package that a file imports when it is loaded (imports inside functions are not)."""
    tree = ast.parse(path.read_text())
    found = set()
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    guarded = {id(node) for check in checks for node in ast.walk(check)}
    for node in tree.body:
        for inner in ast.walk(node) if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ():
            if not isinstance(inner, ast.ImportFrom) or id(inner) in guarded:
                continue
            depth = len(path.relative_to(PACKAGE).parts) - 1
            if inner.level == depth + 1:
                found |= {inner.module.split(".")[0]} if inner.module else {alias.name for alias in inner.names}
            elif inner.level == 0 and (inner.module or "").startswith("pathprune."):
                found.add(inner.module.split(".")[1])
    return found


def test_imports_only_go_down():
    for path in PACKAGE.rglob("*.py"):
        own = room(path)
        if own in ("__init__", "__main__"):
            continue
        for other in imported(path) - {own}:
            assert floor(other) <= floor(own), f"{path.name} (floor {floor(own)}) imports {other} ({floor(other)})"


def test_kernels_do_not_know_torch():
    for path in [
        *(ROOT / "csrc/core").glob("*"),
        *(ROOT / "csrc/ops").glob("*.h"),
        *(ROOT / "csrc/ops").glob("*.cu"),
    ]:
        includes = re.findall(r'#include\s+[<"]([^">]+)', path.read_text())
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))], path


def test_no_room_is_too_large():
    files = [*PACKAGE.rglob("*.py"), *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    long = [f"{path.relative_to(ROOT)}: {n}" for path in files if (n := len(path.read_text().splitlines())) > 500]
    assert not long, long
