"""Layers that hold and compute a pruned network sparse.

pp.sparsify(model, masks, optimizer=optimizer)     # layers swapped in place where measured to be faster
print(model.sparsify_report)
train(model, optimizer)                            # masked weights have no gradient and no state
pp.densify(model, optimizer=optimizer)             # the original modules again, zeros written out
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ._mask_io import write_atomically
from .checks import accumulate_dtype, refuse, words
from .exporting import canonical_names
from .masked import PackedMask, expected_speedup, masked_matmul, pack_mask, unpack_layout
from .masks import Masks
from .pruned_convolution import expected_gain, is_sampled, is_thin
from .sparse_ops import KERNELS, Pattern, sparse_matmul
from .structure import require_module
from .surroundings import undisturbed
from .tables import percent, table
from .thin_ops import thin_convolution

__all__ = [
    "SparseConv2d",
    "SparseLinear",
    "SparsifyReport",
    "densify",
    "load_sparse",
    "save_sparse",
    "sparsify",
]

BATCHES = (1, 32, 256)  # what `sparsify` looks at where no batch is given
# A convolution as a matrix product has its patches to write out and its results to turn, and competes with
# kernels that have not: of a gain in the product so many times the size is wanted (measured, 1x1 and others).
POINTWISE_HANDICAP, PATCH_HANDICAP = 2.0, 8.0
PATCH_BYTES = 64 << 20  # of patches written out at once


def _groups_of(layer: Any) -> int:
    return int(getattr(layer, "groups", 1))


def _handicap(layer: nn.Module) -> float:
    if not isinstance(layer, nn.Conv2d):
        return 1.0
    return POINTWISE_HANDICAP if layer.kernel_size == (1, 1) else PATCH_HANDICAP


def _refill(parameter: nn.Parameter, values: Tensor) -> None:
    """Gives a parameter other values, of any shape, and no gradient.

    Where a loss of earlier is still held, autograd keeps the node that gathers the parameter's gradient, and with it
    the old shape, which it would want of every gradient to come. It makes a new node when the dtype changes.
    """
    other = torch.float64 if values.dtype != torch.float64 else torch.float32
    parameter.data = values.new_empty(0, dtype=other)
    parameter.data, parameter.grad = values, None


class _Sparse(nn.Module):
    """What the sparse layers share: the values as `weight` [stored], the mask's bits as the buffer `layout`.

    `layout` is saved with the values; what else the kernels need is made from it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    layout: Tensor
    column_index: Tensor

    _dense: list[Any]

    def __init__(self, dense: Any, mask: Tensor) -> None:
        super().__init__()
        self._dense = [dense]  # in a list, so that it is no submodule
        weight = dense.weight
        if not isinstance(weight, nn.Parameter) or mask.shape != weight.shape:
            refuse(type(self).__name__, "mask", f"bool {list(weight.shape)}", mask)
        self._shape = weight.shape
        groups = _groups_of(dense)
        packed = pack_mask(mask.to(weight.device).reshape(groups, weight.shape[0] // groups, -1))
        _refill(weight, packed.gather(weight.detach()))  # the same parameter, which optimizers and ties may hold
        self.weight = weight
        self.register_parameter("bias", dense.bias)
        self._adopt(packed)
        self.train(dense.training)

    def _adopt(self, mask: PackedMask) -> None:
        for name, value in mask.pattern._asdict().items():
            if name != "columns":
                self.register_buffer(name, value, persistent=name == "layout")
        self._columns = mask.in_features
        self._mask: PackedMask | None = None

    @property
    def mask(self) -> PackedMask:
        """The mask, packed."""
        if torch.compiler.is_compiling():
            return PackedMask(self._pattern())
        if self._mask is None or self._mask.pattern.layout is not self.layout:  # moved or loaded
            self._mask = PackedMask(self._pattern())
        return self._mask

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mask": None}  # made again when it is asked for

    def _pattern(self) -> Pattern:
        tensors: dict[str, Any] = {name: getattr(self, name) for name in Pattern._fields[:-1]}
        return Pattern(**tensors, columns=self._columns)

    @property
    def density(self) -> float:
        return self.weight.numel() / max(1, math.prod(self._shape))

    def dense_weight(self) -> Tensor:
        """The weight with its zeros written out, in the shape of the original. Differentiable."""
        return self.mask.scatter(self.weight).reshape(self._shape)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        layout = state.get(prefix + "layout")
        if (
            layout is not None
            and layout.shape == self.layout.shape
            and not torch.equal(layout.to(self.layout), self.layout)
        ):
            self._adopt(unpack_layout(layout.to(self.layout.device), self._columns))
            _refill(self.weight, self.weight.new_zeros(self.column_index.shape[0]))
        super()._load_from_state_dict(state, prefix, *rest)
        self._mask = None  # the layout has been written to, with what it was

    def _restored(self) -> nn.Module:
        """The original module, with its parameters as they are now."""
        dense = self._dense[0]
        _refill(self.weight, self.dense_weight().detach())
        dense.weight, dense.bias = self.weight, self.bias  # a copy of this layer has parameters of its own
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{list(self._shape)}, {self.weight.numel()} kept, density {self.density:.4g}, bias={self.bias is not None}"
        )


class SparseLinear(_Sparse):
    """`nn.Linear` with a mask, its values packed. The kernel is chosen at each call, as `PackedMask.kernel` tells.

    Args:
        dense: the layer to take over; its weight parameter becomes that of this layer, [stored] long.
        mask: bool [out, in]; what it drops is lost.
    """

    def forward(self, x: Tensor) -> Tensor:
        return masked_matmul(x, self.weight, self.mask, self.bias)


class SparseConv2d(_Sparse):
    """`nn.Conv2d` with a mask: where it is thin, over images side by side, whose vectors every weight reads; elsewhere
    a product with the patches (1x1 kernels have none to write out) or, where neither pays, the dense one.

    Args:
        dense: the layer to take over, of any stride, padding, dilation and groups.
        mask: bool [out, in / groups, height, width].
    """

    def forward(self, x: Tensor) -> Tensor:
        dense = self._dense[0]
        batched = x if x.dim() == 4 else x[None]
        if self._shifts(batched):
            (right, _, below, _) = dense._reversed_padding_repeated_twice
            mask = self.layout if is_sampled(batched, self._shape, dense.stride, self.density) else None
            geometry = dense.stride, (below, right), dense.dilation
            y = thin_convolution(batched, self.dense_weight(), self.bias, *geometry, False, mask)
            return y if x.dim() == 4 else y[0]
        kernel: Sequence[int] = self._shape[2:]
        mode = "constant" if dense.padding_mode == "zeros" else dense.padding_mode
        padded = F.pad(batched, dense._reversed_padding_repeated_twice, mode)
        height, width = (
            (size - dilation * (k - 1) - 1) // stride + 1
            for size, dilation, k, stride in zip(padded.shape[2:], dense.dilation, kernel, dense.stride, strict=True)
        )
        if self._takes_dense(len(batched) * height * width):
            weight, bias = self.dense_weight().to(x.dtype), self.bias
            y = F.conv2d(padded, weight, bias, dense.stride, 0, dense.dilation, dense.groups)
            return y if x.dim() == 4 else y[0]
        patch_bytes = 4 * height * width * dense.in_channels * math.prod(kernel)
        images = max(1, PATCH_BYTES // max(1, patch_bytes))
        made = [self._of_patches(self._patches(part), height, width) for part in padded.split(images)]
        y = torch.cat(made) if len(made) != 1 else made[0]
        y = y.to(x.dtype)
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y if x.dim() == 4 else y[0]

    def _shifts(self, x: Tensor) -> bool:
        """Whether zeros are skipped without writing patches out."""
        plain = _is_plain(self._dense[0]) and x.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")
        return plain and is_thin(x, self._shape, self._dense[0].stride, self.density)

    def _takes_dense(self, positions: int) -> bool:
        mask = self.mask
        training = torch.is_grad_enabled() and self.weight.requires_grad
        return mask.expected_speedup(positions, training=training) < _handicap(self._dense[0])

    def _patches(self, x: Tensor) -> Tensor:
        """[images, in * height * width of the kernel, positions]"""
        dense = self._dense[0]
        if tuple(self._shape[2:]) == (1, 1):
            return x[:, :, :: dense.stride[0], :: dense.stride[1]].flatten(2)
        return F.unfold(x, self._shape[2:], dense.dilation, 0, dense.stride)

    def _of_patches(self, patches: Tensor, height: int, width: int) -> Tensor:
        """[images, out, height, width]"""
        groups, images, positions = self._dense[0].groups, patches.shape[0], height * width
        kind = accumulate_dtype(self.weight.dtype)
        flow = patches.to(kind).view(images, groups, self._columns, positions)
        flow = flow.permute(1, 2, 0, 3).reshape(groups, self._columns, images * positions).mT
        y = sparse_matmul(self.weight, flow, self._pattern(), kernel=KERNELS["lanes"])
        rows = y.shape[2]
        y = y.view(groups, images, positions, rows).permute(1, 0, 3, 2)
        return y.reshape(images, groups * rows, height, width)


# ---- swapping ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swap:
    """What became of one layer.

    Attributes:
        name: of its weight.
        swapped: whether it is sparse now.
        reason: why, or why not.
        density: share of its weights that are kept.
        speedup: over the dense layer, by the measured table, forward, at each batch looked at.
        dense_bytes, packed_bytes: of the weight; of the values and the mask's bits, as they are saved.
    """

    name: str
    swapped: bool
    reason: str
    density: float
    speedup: dict[int, float]
    dense_bytes: int
    packed_bytes: int


class SparsifyReport(tuple[Swap, ...]):
    """One `Swap` for each layer that has a mask."""

    __slots__ = ()

    def __str__(self) -> str:
        batches = sorted({batch for swap in self for batch in swap.speedup})
        head = ["layer", "kept", *(f"x at {batch}" for batch in batches), "MB", "packed", "now"]
        rows = [
            [
                swap.name,
                percent(swap.density),
                *(f"{swap.speedup[b]:.2g}" if b in swap.speedup else "-" for b in batches),
                f"{swap.dense_bytes / 1e6:.3g}",
                f"{swap.packed_bytes / 1e6:.3g}",
                "sparse" if swap.swapped else swap.reason,
            ]
            for swap in self
        ]
        return table(head, rows)


@undisturbed
def sparsify(
    model: nn.Module,
    masks: Masks | Mapping[str, Tensor],
    *,
    batch: int | None = None,
    min_speedup: float = 1.0,
    prefer: Literal["faster", "smaller"] = "faster",
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Swaps layers for sparse ones, in place, where the measured table says that they are faster.

    The weight of a swapped layer stays the same parameter, [stored] long: an optimizer that holds it keeps
    doing so. What the mask drops becomes zero, as by `Masks.apply_`. `model.sparsify_report` says what was done.

    Args:
        masks: parameter name -> bool mask.
        batch: rows of x that are expected; for convolutions, images times positions. None: a layer is swapped
            where it is faster at any of 1, 32, 256.
        min_speedup: over the dense layer, forward, that is asked for.
        prefer: "smaller" swaps wherever values and bits take less room than the weight.
        optimizer: its state for the swapped weights (momentum and the like) is packed as well.

    Returns:
        model.

    Raises:
        ValueError: a name without a parameter, or a mask of another shape.
        TypeError: masks that are no mapping (of a file: `Masks.load` first).
    """
    require_module(model, "sparsify")
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"sparsify: masks: wanted Masks or a mapping of bool tensors by name, got {type(masks).__name__}"
        )
    if batch is not None and not (isinstance(batch, int) and batch >= 1):
        refuse("sparsify", "batch", "None or a number of rows >= 1", batch)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_masks(model, parameters, masks)
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    swaps, batches = [], BATCHES if batch is None else (batch,)
    for name, mask in masks.items():
        path, weight = name.rpartition(".")[0], parameters[name]
        if mask.dim() == 1:  # a bias
            weight.detach().masked_fill_(~mask.to(weight.device), 0)
            continue
        swap = _judge(name, model.get_submodule(path), mask, batches, min_speedup, prefer, holders[id(weight)])
        swaps.append(swap)
        if swap.swapped:
            _swap(model, path, mask, optimizer)
    model.sparsify_report = SparsifyReport(swaps)  # type: ignore[assignment]
    return model


def _check_masks(model: nn.Module, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    """Refuses masks that are not of the model's dense parameters, before anything is swapped."""
    for name, mask in masks.items():
        if name not in parameters:
            refuse("sparsify", "masks", "names of parameters", name)
        if isinstance(model.get_submodule(name.rpartition(".")[0]), _Sparse):
            refuse("sparsify", f"masks[{name!r}]", "a dense layer (densify first)", "one that is sparse already")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            refuse("sparsify", f"masks[{name!r}]", f"a bool tensor of shape {list(parameters[name].shape)}", mask)


def _judge(
    name: str, layer: nn.Module, mask: Tensor, batches: Sequence[int], least: float, prefer: str, holders: int
) -> Swap:
    kept, total = int(mask.sum()), max(1, mask.numel())
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dense_bytes = weight.numel() * weight.element_size()
    columns = max(1, mask[0].numel()) if len(mask) else 1
    packed_bytes = kept * weight.element_size() + len(mask) * -(-columns // 16) * 2
    groups = _groups_of(layer)
    handicap = _handicap(layer)
    rows = len(mask) // groups
    # Convolutions are judged by what was measured on the CPU, everywhere.
    on_cuda = weight.dtype if weight.is_cuda and not isinstance(layer, nn.Conv2d) else None
    speedup = {b: expected_speedup(rows, columns, kept / total, b, on_cuda=on_cuda) / handicap for b in batches}
    if isinstance(layer, nn.Conv2d) and _is_plain(layer):
        speedup = {b: max(s, expected_gain(weight, kept / total)) for b, s in speedup.items()}
    swapped = False
    if type(layer) not in _LAYERS or name.rpartition(".")[2] != "weight":
        reason = f"{type(layer).__name__}: no sparse layer"
    elif holders > 1:
        reason = "its weight is shared"
    elif prefer == "smaller":
        swapped = packed_bytes < dense_bytes
        reason = "smaller" if swapped else "not smaller"
    else:
        swapped = max(speedup.values()) >= least
        reason = "faster" if swapped else "not faster"
    return Swap(name, swapped, reason, kept / total, speedup, dense_bytes, packed_bytes)


def _is_plain(layer: Any) -> bool:
    """Whether ``thin_convolution`` can do it: one group, zeros around, as many on either side."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    even = left == right and top == bottom and layer.padding_mode == "zeros"
    return even and layer.groups == 1 and math.prod(layer.kernel_size) > 1


_LAYERS: dict[type[nn.Module], type[_Sparse]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}


def _swap(model: nn.Module, path: str, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    dense: Any = model.get_submodule(path)
    shape = dense.weight.shape
    sparse = _LAYERS[type(dense)](dense, mask)
    packed = sparse.mask
    _convert_state(optimizer, sparse.weight, shape, packed.gather)
    _replace(model, dense, sparse)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever the model has it: a layer may be used in several places."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _convert_state(
    optimizer: torch.optim.Optimizer | None, weight: nn.Parameter, shape: Sequence[int], convert: Any
) -> None:
    """Converts what the optimizer keeps in the shape of a weight."""
    if optimizer is None:
        return
    state = optimizer.state.get(weight, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == torch.Size(shape):
            state[key] = convert(value)


def _sparse_layers(model: nn.Module) -> Iterator[_Sparse]:
    return iter([module for module in model.modules() if isinstance(module, _Sparse)])


@undisturbed
def densify(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Gives the original modules back: the same objects, their parameters as they are now, zeros written out.

    Args:
        optimizer: its state for the weights is written out as well.

    Returns:
        model.
    """
    require_module(model, "densify")
    for layer in _sparse_layers(model):
        packed, stored, shape = layer.mask, layer.weight.shape, layer._shape

        def written_out(state: Tensor, packed: PackedMask = packed, shape: torch.Size = shape) -> Tensor:
            return packed.scatter(state).reshape(shape)

        dense = layer._restored()
        _convert_state(optimizer, layer.weight, stored, written_out)
        _replace(model, layer, dense)
    if hasattr(model, "sparsify_report"):
        del model.sparsify_report
    return model


# ---- files ---------------------------------------------------------------------------------------


def save_sparse(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the state of a sparsified model to a safetensors file, at its packed size; whole, or not at all.

    Raises:
        OSError: the disk is full, the folder is missing, ... An older file stays as it was.
    """
    require_module(model, "save_sparse")
    names = canonical_names(model)  # a tied tensor is written once
    state = {n: tensor.detach().contiguous() for n, tensor in model.state_dict().items() if names.get(n, n) == n}
    write_atomically(path, [save(state, {"format": "pt", "pathprune": "sparse"})])


def load_sparse(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Reads what `save_sparse` wrote into a model of the same architecture; its layers become sparse as saved.

    Returns:
        model.

    Raises:
        ValueError: the file is of another architecture: names what is missing or of another shape. The model is as it
            was.
        OSError: the file cannot be opened.
    """
    require_module(model, "load_sparse")
    state = load_file(path)
    masks: dict[str, Tensor] = {}  # of the layers that are still dense
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state |= {n: state[first] for n, first in canonical_names(model).items() if n in wanted and first in state}
    for name in [key.removesuffix(".layout") for key in state if key.rpartition(".")[2] == "layout"]:
        layer = dict(model.named_modules()).get(name)
        if isinstance(layer, _Sparse):  # takes any mask of its shape, and as many values
            wanted[f"{name}.weight"] = state.get(f"{name}.weight", layer.weight).shape
            continue
        if type(layer) not in _LAYERS:
            refuse("load_sparse", name, "a Linear or Conv2d layer", type(layer).__name__)
        assert layer is not None and isinstance(layer.weight, Tensor)
        layout, weight = state[f"{name}.layout"], layer.weight
        if layout.shape[:-1].numel() != weight.shape[0] or layout.shape[-1] != words(weight[0].numel()):
            refuse("load_sparse", f"{name}.layout", f"the layout of a weight {list(weight.shape)}", layout)
        masks[name] = unpack_layout(layout, weight[0].numel()).bits().reshape(weight.shape)
        wanted |= {f"{name}.layout": layout.shape, f"{name}.weight": torch.Size([int(masks[name].sum())])}
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state or wanted.get(name) != state[name].shape:
            refuse("load_sparse", name, f"shape {list(wanted.get(name, []))}", state.get(name))
    for name, mask in masks.items():
        _swap(model, name, mask, None)
    model.load_state_dict(state)
    return model
