"""The blocks of a vector: which parameters each holds, how they are laid out, and the modules that use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from indexer.layers import LayerType, layer_type_by_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One module that uses a block's parameters."""

    module: str
    type: str
    flipped: bool
    """Whether this module's input axis is the block's output axis."""
    bias: str | None
    """Name of this module's bias parameter; None without one."""
    bias_column: int | None
    """Index of the bias on this module's input axis; None without one."""
    parameter: str = "weight"
    """Name of the block's parameter in this module."""
    owner: str = ""
    """Class of this module."""

    @property
    def kind(self) -> LayerType:
        """The layer type of this use."""
        return layer_type_by_name(self.type).of(self.parameter)

    @property
    def path(self) -> str:
        """The module; the path of the parameter where the module runs again for it."""
        return self.module if self.kind.has_formula else f"{self.module}.{self.parameter}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A parameter matrix (with the biases of its uses) that becomes one block of the vector."""

    name: str
    type: str
    parameters: tuple[str, ...]
    numel: int
    """Numbers in these parameters."""
    n_out: int
    n_in: int
    """Axes of the gradient matrix, biases included."""
    is_matrix: bool
    uses: tuple[Use, ...]

    def lay_out(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(n_out, n_in): ``tensors`` (one for each parameter, by name) in the layout of the gradient matrix; see
        :mod:`indexer.layers.base`.
        """
        kind = layer_type_by_name(self.type)
        weight = tensors[self.parameters[0]]
        if not kind.has_formula:
            return weight.reshape(self.n_out, self.n_in)
        if not self.is_matrix:
            return torch.cat([tensors[name] for name in self.parameters]).unsqueeze(1)
        if kind.transposed:
            weight = weight.t()
        matrix = weight.new_zeros(self.n_out, self.n_in)
        matrix[: weight.shape[0], : weight.shape[1]] = weight
        for use in self.uses:
            if use.bias is None or use.bias_column is None:
                continue
            bias = tensors[use.bias]
            if use.flipped:
                matrix[use.bias_column, : len(bias)] = bias
            else:
                matrix[: len(bias), use.bias_column] = bias
        return matrix

    def take_apart(self, matrix_OI: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`lay_out`: a tensor for each parameter, in the shape that it has in ``like``."""
        kind = layer_type_by_name(self.type)
        if not kind.has_formula:
            return {name: matrix_OI.reshape(like[name].shape) for name in self.parameters}
        if not self.is_matrix:
            sizes = [like[name].numel() for name in self.parameters]
            return dict(zip(self.parameters, torch.split(matrix_OI[:, 0], sizes), strict=True))
        weight = like[self.parameters[0]]
        rows, columns = weight.shape[::-1] if kind.transposed else weight.shape
        matrix = matrix_OI[:rows, :columns]
        tensors = {self.parameters[0]: matrix.t() if kind.transposed else matrix}
        for use in self.uses:
            if use.bias is None or use.bias_column is None:
                continue
            count = len(like[use.bias])
            line = matrix_OI[use.bias_column, :count] if use.flipped else matrix_OI[:count, use.bias_column]
            tensors[use.bias] = line
        return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The blocks of a model, in the order of its modules, and how much of the model they cover."""

    blocks: tuple[Block, ...]
    covered: int
    total: int
    """Numbers in the covered parameters, and in all parameters (tied ones once)."""
