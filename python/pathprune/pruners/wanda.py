"""Wanda: pruning by weights and activations (Sun, Liu, Bair and Kolter, ICLR 2024).

The score ``|w_ij| ||x_j||_2``, x_j the j-th input of the layer over all tokens of the data, is the sum over the paths
of one layer: it is computed and cut by the same passes, and never written out.

Bytes: one forward pass of the model over the data, then the weights as in ``Magnitude``.
Oracle: the definition, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..activations import InputSquares, as_columns, run
from ..batches import Data, require_reiterable, stream
from ..blockwise import run_by_blocks
from ..checks import accumulate_dtype
from ..layers import prunable_layers
from ..network import PathNetwork
from ..ops import WeightMap
from ..select import Bracket
from ..weights import Weight
from .base import Pruner, Scorer


@dataclass(frozen=True)
class Wanda(Pruner):
    """Keeps the largest ``|w_ij| ||x_j||_2`` of each output unit; ``scope="2:4"`` keeps two of every four inputs.

    The activations are those of the dense model, in evaluation mode; the published code lets each block see what the
    pruned blocks before it give. Every token counts alike: give batches without padding. The inputs of an expert are
    those of the tokens that are routed to it; one that no token reaches is scored by its weights.

    Args:
        data: re-iterable of batches ``x`` or ``(x, y)``; labels are ignored. See ``batches``.
        by_blocks: run all batches through one block of the model after the other, so that weights on a disk are read
            twice in all; of models that are a chain of blocks (:mod:`blockwise`). The masks are the same.

    Raises:
        TypeError: data that can be read only once.
        ValueError: no data; a layer that no batch runs, or whose inputs are not finite; a transposed convolution.

    Determinism: the same model and batches give the same masks.

    Example:
        >>> masks = pp.prune(model, pp.Wanda([{"input_ids": ids}]), density=0.5)
    """

    data: Data = field(repr=False, compare=False)
    by_blocks: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_reiterable(self.data, self.name)

    @property
    def needs_paths(self) -> bool:
        return False

    @property
    def scope(self) -> str:
        return "row"

    @property
    def resumes(self) -> bool:
        return True

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return WeightMap.ABS, WeightMap.ABS

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        if network.model is None:
            raise ValueError("Wanda: model: wanted a module, or a PathNetwork read from one; this was built by hand")
        names = [name for name, weight in weights.items() if weight.scored]
        squares = InputSquares(network.model, names, self.name, network.used)
        batches = stream(self.data, self.name, network.device)
        if self.by_blocks:
            run_by_blocks(network.model, list(batches), squares)
        else:
            with squares.watching():
                run(network.model, batches, self.name, network.example)
        norms, modules = squares.norms(), prunable_layers(network.model)

        def score(guess: Bracket | None) -> None:
            for name in names:
                dtype = accumulate_dtype(network.tensors[name].dtype)
                weights[name].score_by_itself(*as_columns(norms, modules[name], name, dtype))

        return score
