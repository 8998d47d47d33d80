"""The model of a Hugging Face folder, with its weights left on the disk.

The structure is made by ``transformers`` from the configuration, without memory for the parameters; each parameter
then becomes a window on its file. Names in files are brought to names of parameters as ``from_pretrained`` does. What
it fuses, splits or transposes on loading is laid out anew in a file of its own (:mod:`assembly`), and the parameter is
a window on that; a tensor that it converts otherwise is left as it is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .assembly import Assembly, NoWayBackError, converted, dtype_of
from .checkpoint import Checkpoint, some
from .layers import layer_network, prunable_layers
from .network import PathNetwork
from .shards import CheckpointError, Shard

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class CheckpointModel:
    """A model whose parameters are windows on the files of a checkpoint.

    Attributes:
        checkpoint: the folder.
        model: in eval mode; its parameters have one dtype, and are not to be written to.
        tensors: parameter or buffer name -> values, as they are in the files.
        keys: the same names -> names in the files (tied tensors may be there more than once).
        assemblies: parameter or buffer name -> how it is made of tensors of the files, of those that are.
        unmade: names of parameters that transformers makes of tensors of the files in a way that has no way back.
        unclaimed: names in the files that the model does not use as they are: they are not pruned.
        absent: names of parameters that no file has.
    """

    checkpoint: Checkpoint
    model: nn.Module
    tensors: dict[str, Tensor]
    keys: dict[str, list[str]]
    assemblies: dict[str, Assembly]
    unmade: list[str]
    unclaimed: list[str]
    absent: list[str] = field(default_factory=list)

    def used(self, name: str) -> None:
        """Tells the checkpoint that a parameter has been read."""
        for key in self.keys.get(name, (_window_of(name),)):
            self.checkpoint.used(key)

    def layers(self, *, runs: bool = False) -> PathNetwork:
        """The linear layers side by side, without those that are ``unmade``; see :func:`layer_network`.

        Args:
            runs: whether the model will be run, so that it needs all its parameters.

        Raises:
            CheckpointError: a weight that the files do not have, or whose dtype cannot be scored.
        """
        self._check([name for name in prunable_layers(self.model) if name not in self.unmade])
        if runs:
            self._check_whole()
        return self._watched(layer_network(self.model, self.tensors))

    def paths(self, example_input: Any) -> PathNetwork:
        """The model as a path network; see ``PathNetwork.from_module``.

        Raises:
            CheckpointError: a parameter that the files do not have, or whose dtype cannot be scored.
            UnsupportedModelError: an operator without a rule.
        """
        self._check_whole()
        self._check(self.tensors)
        network = PathNetwork.from_module(self.model, example_input)
        for name in network.tensors:  # where dtypes are mixed, the model has copies
            network.tensors[name] = self.tensors[name]
        return self._watched(network)

    def _check_whole(self) -> None:
        if self.unmade:
            raise CheckpointError(
                f"{self.checkpoint.folder}: transformers converts the files' tensors in a way that has no way back, "
                f"for {some(self.unmade)}"
            )
        if self.absent:
            raise CheckpointError(f"{self.checkpoint.folder}: no file has {some(self.absent)}")

    def _check(self, names: Any) -> None:
        folder = self.checkpoint.folder
        missing = [name for name in names if name in self.absent]
        if missing:
            raise CheckpointError(f"{folder}: no file has the model's weights {some(missing)}")
        weights = prunable_layers(self.model)
        for name in names:
            if name in weights and self.tensors[name].dtype not in _FLOATS:
                raise CheckpointError(
                    f"{folder}: {name}: wanted float32, float64, bfloat16 or float16 weights, "
                    f"got {self.tensors[name].dtype}"
                )

    def _watched(self, network: PathNetwork) -> PathNetwork:
        network.used = self.used
        return network


LayOut = Callable[[Mapping[str, Assembly]], Shard]
"""Lays parameters out in a file, with tensors of their names."""


def open_model(checkpoint: Checkpoint, lay_out: LayOut | None = None) -> CheckpointModel:
    """The checkpoint's model, its parameters windows on the files.

    Args:
        lay_out: asked for the values of parameters that are made of several tensors, if there are any; without it
            they are absent.

    Raises:
        CheckpointError: no such architecture, quantised weights, tensors of other shapes than the model's, or tied
            tensors that differ.
        ImportError: transformers is missing.
    """
    model = _structure(checkpoint)
    keys, assemblies, unmade, unclaimed = _claimed(checkpoint, model)
    tensors: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    persistent = set(model.state_dict(keep_vars=True))
    made = lay_out(assemblies) if lay_out is not None and assemblies else None
    for name, own in (*parameters.items(), *model.named_buffers()):
        if name in keys:
            tensors[name] = _value(checkpoint, name, keys[name], own.shape)
        elif made is not None and name in assemblies:
            tensors[name] = made.tensor(name)
            checkpoint.used.watch(_window_of(name), made.window(name))
        elif name not in parameters and not own.is_meta:
            tensors[name] = own.detach()  # of the structure itself, not of the files
    expected = [*parameters, *(name for name, _ in model.named_buffers() if name in persistent)]
    absent = [name for name in expected if name not in tensors]
    _fill(model, tensors, parameters, {*keys, *assemblies})
    return CheckpointModel(checkpoint, model.eval(), tensors, keys, assemblies, unmade, unclaimed, absent)


def _window_of(name: str) -> str:
    """What the windows of laid out parameters are known by, beside those of the files' tensors."""
    return f"parameter {name}"


def _structure(checkpoint: Checkpoint) -> nn.Module:
    """The module that the configuration describes, its parameters on the meta device."""
    folder = checkpoint.folder
    if checkpoint.config.get("quantization_config"):
        raise CheckpointError(f"{folder}: its weights are quantised (quantization_config), which cannot be pruned")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a Hugging Face folder needs transformers: pip install 'pathprune[examples]'") from error
    wanted = checkpoint.config.get("architectures")
    name = wanted[0] if isinstance(wanted, list) and wanted and isinstance(wanted[0], str) else None
    kind: Any = getattr(transformers, name, None) if name else transformers.AutoModel
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise CheckpointError(f"{folder}: config.json: transformers {transformers.__version__} has no model '{name}'")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with _parameters_on_meta():
            return kind.from_config(config) if kind is transformers.AutoModel else kind(config)
    except Exception as error:  # a wrong configuration fails in many ways
        raise CheckpointError(f"{folder}: config.json: {type(error).__name__}: {error}") from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made within have no memory for parameters; their buffers are real. The RNG state stays as it is."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        hook.remove()


def _claimed(
    checkpoint: Checkpoint, model: nn.Module
) -> tuple[dict[str, list[str]], dict[str, Assembly], list[str], list[str]]:
    """What of the model is in the files: see the attributes of :class:`CheckpointModel`, by canonical names."""
    canonical = _first_names(model)
    rename, in_order = _renaming(model)
    keys: dict[str, list[str]] = {}
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}  # name -> its converter, its tensors by pattern
    unmade, unclaimed = [], []
    for key in sorted(checkpoint.where, key=in_order):
        claim = rename(key)
        if claim.name not in canonical:
            unclaimed.append(key)
        elif claim.converter is None:
            keys.setdefault(canonical[claim.name], []).append(key)
        else:
            _, patterns = collected.setdefault(claim.name, (claim.converter, {}))
            patterns.setdefault(claim.pattern, []).append(key)
    assemblies: dict[str, Assembly] = {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, (converter, patterns) in collected.items():
        targets, made = _made(checkpoint, shapes, name, converter, patterns)
        if made is None or any(one not in canonical or canonical[one] in keys for one in made):
            unclaimed += [key for some_keys in patterns.values() for key in some_keys]
            unmade += [canonical[one] for one in targets if one in canonical and canonical[one] not in keys]
        else:
            assemblies.update({canonical[one]: assembly for one, assembly in made.items()})
    return keys, assemblies, unmade, unclaimed


def _made(
    checkpoint: Checkpoint,
    shapes: Mapping[str, torch.Size],
    name: str,
    converter: Any,
    patterns: Mapping[str, list[str]],
) -> tuple[list[str], dict[str, Assembly] | None]:
    """The names that a conversion makes, and the parameters; None where there is no way back from them to the files.

    Raises:
        CheckpointError: tensors that do not make up the model's parameters.
    """
    found = next((target for target in converter.target_patterns if target in name), None)
    if found is None:
        return [name], None

    def full(target: str) -> str:
        return name.replace(found, target, 1)

    def wanted(target: str) -> torch.Size:
        return shapes[full(target)]

    names = [full(target) for target in converter.target_patterns]
    tensors = {
        pattern: [Assembly.of(key, checkpoint.entry(key).shape) for key in keys] for pattern, keys in patterns.items()
    }
    try:
        made = {full(target): assembly for target, assembly in converted(converter, tensors, wanted).items()}
    except (NoWayBackError, KeyError):
        return names, None
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{checkpoint.folder}: {name}: the files' tensors do not make it up: {error}") from error
    for one, assembly in made.items():
        if one in shapes and shapes[one] != assembly.shape:
            want, got = list(shapes[one]), list(assembly.shape)
            raise CheckpointError(
                f"{checkpoint.folder}: {one}: the model wants {want}, the files' tensors make up {got}"
            )
    if any(dtype_of(checkpoint, assembly) is None or not assembly.shape for assembly in made.values()):
        return names, None
    return names, made


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first: on the meta device, tied tensors are one object."""
    first: dict[int, str] = {}
    everyone = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in everyone}


class _Claim(NamedTuple):
    """What a name in the files is in the model; ``converter`` where the tensor does not stay as it is."""

    name: str
    converter: Any = None
    pattern: str = ""


def _renaming(model: nn.Module) -> tuple[Callable[[str], _Claim], Callable[[str], Any]]:
    """From a name in the files to the model's; and the order in which they are to be taken."""
    own = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "") or None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # before transformers 5 names differed by the base model's prefix alone

        def plain(key: str) -> _Claim:
            ways = (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
            return _Claim(next((way for way in ways if way in own), key))

        return plain, str
    transforms = get_model_conversion_mapping(cast(Any, model))
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def renamed(key: str) -> _Claim:
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        return _Claim(name) if pattern is None else _Claim(name, by_pattern[pattern], pattern)

    return renamed, dot_natural_key


def _value(checkpoint: Checkpoint, name: str, keys: list[str], shape: torch.Size) -> Tensor:
    """The window of a tensor; of a tied one that the files have more than once, the first of them."""
    for key in keys:
        if checkpoint.entry(key).shape != shape:
            got = list(checkpoint.entry(key).shape)
            raise CheckpointError(f"{checkpoint.folder}: {key}: the model wants {list(shape)}, the file has {got}")
    first = checkpoint.tensor(keys[0])
    for key in keys[1:]:
        other = checkpoint.tensor(key)
        same = other.dtype == first.dtype and torch.equal(other, first)
        checkpoint.used(key)
        if not same:
            raise CheckpointError(
                f"{checkpoint.folder}: {keys[0]} and {key} are one tied tensor ({name}) but have different values"
            )
    checkpoint.used(keys[0])
    return first


def _fill(model: nn.Module, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], files: set[str]) -> None:
    """Puts values in place of the meta parameters, so that the model can run.

    They are windows, and copies in the commonest dtype where the files' dtypes are mixed (an exported graph, and most
    models, want one); buffers that are not in the files stay what the structure made them. What no file has is zero,
    in the memory of one number.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name in parameters:
        if name in tensors and tensors[name].is_floating_point():
            sizes[tensors[name].dtype] += tensors[name].numel()
    common = next((dtype for dtype, _ in sizes.most_common() if dtype in _FLOATS), torch.float32)

    def uniform(name: str, own: Tensor) -> Tensor:
        if name not in tensors:
            return torch.zeros((), dtype=common if own.is_floating_point() else own.dtype).expand(own.shape)
        value = tensors[name]
        return value.to(common) if name in files and value.is_floating_point() else value

    made = {id(own): nn.Parameter(uniform(name, own), requires_grad=False) for name, own in parameters.items()}
    buffers = {id(own): uniform(name, own) for name, own in model.named_buffers()}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[attribute] = made[id(parameter)]
        for attribute, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[attribute] = buffers[id(buffer)]
