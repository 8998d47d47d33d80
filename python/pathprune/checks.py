"""What the ops accept. Every refusal is a ValueError "op: argument: wanted ..., got ...".

An argument of a given name means the same in every op, so one function checks them all by name.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

WORD = 16  # columns in one mask word
STRETCH = 64  # columns whose entries `tile_start` tells the beginning of
WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLOATS = "float32, float64, bfloat16 or float16"
_LEAST = {
    "columns": 0,
    "capacity": 0,
    "stride": 1,
    "n": 0,
    "offset": 0,
    "kernel_y": 1,
    "kernel_x": 1,
    "stride_y": 1,
    "stride_x": 1,
    "padding_y": 0,
    "padding_x": 0,
    "dilation_y": 1,
    "dilation_x": 1,
}

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """A: the dtype of the flows, scores and sums that belong to weights of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def words(columns: int) -> int:
    """W: how many mask words cover a row of `columns` weights."""
    return (columns + WORD - 1) // WORD


def checked(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """The function, preceded by `check_arguments` under its own name."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def run(*values: Given.args, **named: Given.kwargs) -> Returned:
        check_arguments(function.__name__, dict(zip(names, values, strict=False)) | named)
        return function(*values, **named)

    return run


def check_arguments(op: str, given: Mapping[str, Any]) -> None:
    """Checks the arguments of an op by their names in its schema.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device, strides or range.
    """
    for name, value in given.items():
        if name in ("f", "s") and not 0 <= value <= 3:
            refuse(op, name, "a WeightMap, 0 to 3", value)
        if name in ("lo", "hi", "at_least", "above") and value != value:
            refuse(op, name, "a number or an infinity", value)
        if name in _LEAST and (value is None or value < _LEAST[name]):
            refuse(op, name, f"a number >= {_LEAST[name]}", value)
    if op.startswith("sparse_"):
        _check_sparse(op, given)
        return
    if op.startswith("tiled_"):
        _check_tiled(op, given)
        return
    if op.startswith("thin_"):
        _check_thin(op, given)
        return
    if "weight" in given:
        groups, rows, columns = _check_weight(op, given)
        if "x_old" in given:
            _check_score_flows(op, given, "x_old", "g_old", groups, rows, columns)
        elif "s" in given:
            _check_score_flows(op, given, "x", "g", groups, rows, columns)
        if "x" in given and given["x"] is not None:
            _check_flow(op, given, "x", groups, rows if given.get("transposed") else columns)
    elif "mask" in given:
        _check_mask(op, given["mask"], given.get("columns"))
    elif "bits" in given and (given["bits"].dtype != torch.bool or given["bits"].dim() != 3):
        refuse(op, "bits", "bool [G, O, K]", given["bits"])
    elif "values" in given:
        _check_kth(op, given["values"], given["k"])
    elif "scores" in given:
        _check_sampling(op, given["scores"], given["temperature_inverse"])
    if op.endswith("_") and not given["mask"].is_contiguous():
        refuse(op, "mask", "a contiguous tensor to write to", f"strides {given['mask'].stride()}")


def seed_of(given: object, who: str) -> int:
    """A seed as ops take it, of whatever library the integer is.

    Raises:
        TypeError: no integer.
        ValueError: one that 64 bits with a sign cannot hold.
    """
    try:
        seed = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{who}: seed: wanted an int, got {given!r}") from None
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{who}: seed: wanted an int in [-2^63, 2^63), got {seed}")
    return seed


def refuse(op: str, argument: str, wanted: str, got: object) -> NoReturn:
    """Raises ValueError: what the op wanted for an argument, and what it got."""
    raise ValueError(f"{op}: {argument}: wanted {wanted}, got {_describe(got)}")


def _describe(got: object) -> str:
    if isinstance(got, Tensor):
        return f"{str(got.dtype).removeprefix('torch.')} {list(got.shape)} on {got.device}"
    return str(got)


def _check_tensor(
    op: str, argument: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != device:
        refuse(op, argument, f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}", tensor)


def _check_weight(op: str, given: Mapping[str, Any]) -> tuple[int, int, int]:
    """Checks a dense or packed weight with its mask; returns (G, O, K)."""
    weight, mask = given["weight"], given["mask"]
    layout, row_start = given.get("layout"), given.get("row_start")
    if weight.dtype not in WEIGHT_DTYPES:
        refuse(op, "weight", _FLOATS, weight)
    if layout is None:
        if weight.dim() != 3:
            refuse(op, "weight", "3 dimensions [G, O, K]", weight)
        groups, rows, columns = weight.shape
        if given.get("columns", columns) != columns:
            refuse(op, "columns", f"the weight's K = {columns}", given["columns"])
        if row_start is not None:
            refuse(op, "row_start", "None without a layout", row_start)
    else:
        columns = given["columns"]
        if weight.dim() != 1:
            refuse(op, "weight", "1 dimension with a layout", weight)
        if layout.dim() != 3:
            refuse(op, "layout", "3 dimensions [G, O, W]", layout)
        groups, rows = layout.shape[0], layout.shape[1]
        _check_tensor(op, "layout", layout, torch.int16, (groups, rows, words(columns)), weight.device)
        if row_start is None:
            refuse(op, "row_start", "a tensor with a layout", row_start)
        _check_tensor(op, "row_start", row_start, torch.int64, (groups * rows + 1,), weight.device)
        if mask is None:
            refuse(op, "mask", "a mask with a packed weight", mask)
    if mask is not None:
        _check_tensor(op, "mask", mask, torch.int16, (groups, rows, words(columns)), weight.device)
    return groups, rows, columns


def _check_flow(op: str, given: Mapping[str, Any], name: str, groups: int, units: int) -> None:
    flow, weight = given[name], given["weight"]
    if flow.dim() != 3:
        refuse(op, name, "3 dimensions [G, T, units]", flow)
    shape = (groups, flow.shape[1], units)
    _check_tensor(op, name, flow, accumulate_dtype(weight.dtype), shape, weight.device)


def _check_score_flows(op: str, given: Mapping[str, Any], x: str, g: str, groups: int, rows: int, columns: int) -> None:
    if (given[x] is None) != (given[g] is None):
        refuse(op, g, f"{x} and {g}, or neither", given[g])
    if given[x] is not None:
        _check_flow(op, given, x, groups, columns)
        _check_flow(op, given, g, groups, rows)
        if given[x].shape[1] != given[g].shape[1]:
            refuse(op, g, f"T = {given[x].shape[1]}, as {x}", given[g])


def _check_mask(op: str, mask: Tensor, columns: int | None) -> None:
    if mask.dtype != torch.int16 or mask.dim() != 3:
        refuse(op, "mask", "int16 [G, O, W]", mask)
    if columns is not None and mask.shape[2] != words(columns):
        refuse(op, "mask", f"W = {words(columns)} words for {columns} columns", mask)


def _check_kth(op: str, values: Tensor, k: int) -> None:
    if values.dim() != 1 or values.dtype not in WEIGHT_DTYPES:
        refuse(op, "values", f"1 dimension of {_FLOATS}", values)
    if not 1 <= k <= values.shape[0]:
        refuse(op, "k", f"1 to {values.shape[0]}", k)


def _check_sampling(op: str, scores: Tensor, temperature_inverse: float) -> None:
    if scores.dtype not in WEIGHT_DTYPES:
        refuse(op, "scores", _FLOATS, scores)
    if not 0 <= temperature_inverse < math.inf:
        refuse(op, "temperature_inverse", "a finite number >= 0", temperature_inverse)


def _check_sparse(op: str, given: Mapping[str, Any]) -> None:
    """Checks the arguments of an op on a sparse weight, its pattern first."""
    layout, columns = given["layout"], given["columns"]
    if layout.dim() != 3:
        refuse(op, "layout", "3 dimensions [G, O, W]", layout)
    groups, rows = layout.shape[:2]
    device = layout.device
    _check_tensor(op, "layout", layout, torch.int16, (groups, rows, words(columns)), device)
    _check_tensor(op, "row_start", given["row_start"], torch.int64, (groups * rows + 1,), device)
    if "index" not in given:
        return
    index = given["index"]
    if index.dim() != 1:
        refuse(op, "index", "1 dimension [stored]", index)
    stored = index.shape[0]
    _check_tensor(op, "index", index, torch.int16, (stored,), device)
    transpose = {
        "layout_t": (torch.int16, (groups, columns, words(rows))),
        "row_start_t": (torch.int64, (groups * columns + 1,)),
        "index_t": (torch.int16, (stored,)),
        "order": (torch.int32, (stored,)),
    }
    for name, (kind, shape) in transpose.items():
        if given.get(name) is not None:
            _check_tensor(op, name, given[name], kind, shape, device)
        elif given.get("transposed"):
            refuse(op, name, "a tensor to transpose with", None)
    kernel = given.get("kernel", 0)
    if not 0 <= kernel <= 3 or (kernel > 1 and given["x"].dim() == 3 and given["x"].shape[1] != 1):
        refuse(op, "kernel", "0 or 1, or for T = 1 also 2 or 3", kernel)
    dtype = _check_sparse_values(op, given, groups, rows, columns, stored)
    units = {"x": rows if given.get("transposed") else columns, "g": rows}
    positions = None
    for name in ("x", "g"):
        if name in given:
            flow = given[name]
            if flow.dim() != 3:
                refuse(op, name, "3 dimensions [G, T, units]", flow)
            dtype = dtype or accumulate_dtype(flow.dtype)
            positions = flow.shape[1] if positions is None else positions
            _check_tensor(op, name, flow, dtype, (groups, positions, units[name]), device)


def _check_tiled(op: str, given: Mapping[str, Any]) -> None:
    """Checks the arguments of an op on a masked weight that is computed dense."""
    name = "weight" if "weight" in given else "x"
    layout, index, columns, first = given["layout"], given["index"], given["columns"], given[name]
    if layout.dim() != 3:
        refuse(op, "layout", "3 dimensions [G, O, W]", layout)
    groups, rows = layout.shape[:2]
    _check_tensor(op, "layout", layout, torch.int16, (groups, rows, words(columns)), first.device)
    if first.dtype not in WEIGHT_DTYPES:
        refuse(op, name, _FLOATS, first)
    tile_start = given["tile_start"]
    of_weight: tuple[int, ...] = (groups, rows, columns)
    if (index is None) != (tile_start is None):
        refuse(op, "tile_start", "index and tile_start, or neither", tile_start)
    if index is not None:
        if index.dim() != 1:
            refuse(op, "index", "1 dimension [stored]", index)
        of_weight = (index.shape[0],)
        _check_tensor(op, "index", index, torch.int16, of_weight, layout.device)
        starts = (groups * rows * -(-columns // STRETCH) + 1,)
        _check_tensor(op, "tile_start", tile_start, torch.int32, starts, layout.device)
    if name == "weight":
        _check_tensor(op, name, first, first.dtype, of_weight, layout.device)
    positions = None
    for flow, units in (("x", rows if given.get("transposed") else columns), ("g", rows)):
        if flow not in given:
            continue
        if given[flow].dim() != 3:
            refuse(op, flow, "3 dimensions [G, T, units]", given[flow])
        positions = given[flow].shape[1] if positions is None else positions
        _check_tensor(op, flow, given[flow], first.dtype, (groups, positions, units), layout.device)


def _check_sparse_values(
    op: str, given: Mapping[str, Any], groups: int, rows: int, columns: int, stored: int
) -> torch.dtype | None:
    """Checks values [stored or more], or a dense weight; returns A, where they say what it is."""
    name = "values" if "values" in given else "dense"
    if name not in given:
        return None
    values = given[name]
    if values.dtype not in WEIGHT_DTYPES:
        refuse(op, name, _FLOATS, values)
    if name == "dense":
        _check_tensor(op, name, values, values.dtype, (groups, rows, columns), given["layout"].device)
    elif values.dim() != 1 or values.shape[0] < stored or values.device != given["layout"].device:
        refuse(op, name, f"1 dimension of at least {stored} on {given['layout'].device}", values)
    return accumulate_dtype(values.dtype)


def _check_thin(op: str, given: Mapping[str, Any]) -> None:
    """Images and kernels that a convolution has outputs for; the mask of the kernels; `g` for every output."""
    x = given["x"]
    if x.dim() != 4 or x.dtype not in (torch.float32, torch.float64):
        refuse(op, "x", "float32 or float64 [N, C, H, W]", x)
    if "w" in given:
        w = given["w"]
        if w.dim() != 4 or w.numel() == 0:
            refuse(op, "w", "[O, C, height, width], none of them 0", w)
        rows, kernel = w.shape[0], w.shape[2:]
        _check_tensor(op, "w", w, x.dtype, (rows, x.shape[1], *kernel), x.device)
        if given["bias"] is not None:
            _check_tensor(op, "bias", given["bias"], x.dtype, (rows,), x.device)
    else:
        if given["g"].dim() != 4:
            refuse(op, "g", "[N, O, H', W']", given["g"])
        rows, kernel = given["g"].shape[1], torch.Size((given["kernel_y"], given["kernel_x"]))
    outputs = []
    for size, k, axis in zip(x.shape[2:], kernel, "yx", strict=True):
        free = size + 2 * given[f"padding_{axis}"] - given[f"dilation_{axis}"] * (k - 1) - 1
        if free < 0:
            refuse(op, "x", "images no smaller than the kernel", x)
        outputs.append(free // given[f"stride_{axis}"] + 1)
    if "g" in given:
        _check_tensor(op, "g", given["g"], x.dtype, (x.shape[0], rows, *outputs), x.device)
    if given["mask"] is not None:
        _check_tensor(op, "mask", given["mask"], torch.int16, (1, rows, words(x.shape[1] * kernel.numel())), x.device)
