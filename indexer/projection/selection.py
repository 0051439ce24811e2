"""Selecting the layers to project by patterns, and joining tied parameters into blocks.

A pattern is a module path or a glob. Its components match whole, consecutive components anywhere in a module's path:
``mlp.c_fc`` matches ``transformer.h.0.mlp.c_fc``; ``transformer.h.1`` matches everything in block 1 and nothing in
block 10; ``h.*.attn`` matches each attention. Aliases: ``mlp``, ``attn``, ``norm``, ``embeddings``, ``head``, ``all``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ghoststore.errors import LayerError
from indexer.layers import LayerType, layer_type_by_name, layer_type_of

ATTENTION = frozenset(
    {"attn", "attention", "self_attn", "self_attention", "cross_attn", "crossattention", "encoder_attn"}
)
FEED_FORWARD = frozenset({"mlp", "ffn", "ff", "feed_forward", "feedforward", "intermediate", "fc1", "fc2"})
BLOCK_LINEARS = ("mlp", "attn")
"""Aliases of the linears inside the transformer blocks: embeddings, head and norms are left out."""
HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "decoder"})


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
        if not self.is_matrix:
            return torch.cat([tensors[name] for name in self.parameters]).unsqueeze(1)
        weight = tensors[self.parameters[0]]
        if layer_type_by_name(self.type).transposed:
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
        if not self.is_matrix:
            sizes = [like[name].numel() for name in self.parameters]
            return dict(zip(self.parameters, torch.split(matrix_OI[:, 0], sizes), strict=True))
        weight = like[self.parameters[0]]
        transposed = layer_type_by_name(self.type).transposed
        rows, columns = weight.shape[::-1] if transposed else weight.shape
        matrix = matrix_OI[:rows, :columns]
        tensors = {self.parameters[0]: matrix.t() if transposed else matrix}
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


def _in_attention(parts: list[str]) -> bool:
    return not ATTENTION.isdisjoint(parts)


def _in_feed_forward(parts: list[str]) -> bool:
    # BERT calls the second half of its feed-forward output.dense, next to attention.output.dense.
    return not _in_attention(parts) and (not FEED_FORWARD.isdisjoint(parts) or "output" in parts[:-1])


def _matrix(kind: LayerType) -> bool:
    return kind.is_matrix and not kind.is_lookup


ALIASES: dict[str, Callable[[list[str], LayerType], bool]] = {
    "mlp": lambda parts, kind: _matrix(kind) and _in_feed_forward(parts),
    "attn": lambda parts, kind: _matrix(kind) and _in_attention(parts),
    "norm": lambda parts, kind: not kind.is_matrix,
    "embeddings": lambda parts, kind: kind.is_lookup,
    "head": lambda parts, kind: _matrix(kind) and parts[-1] in HEADS,
    "all": lambda parts, kind: True,
}


def matches_path(pattern: str, path: str) -> bool:
    """Whether the components of ``pattern`` match consecutive whole components of ``path``."""
    components, parts = pattern.split("."), path.split(".")
    return any(
        all(fnmatchcase(part, component) for component, part in zip(components, parts[start:], strict=False))
        for start in range(len(parts) - len(components) + 1)
    )


def matches(pattern: str, path: str, kind: LayerType) -> bool:
    """Whether ``pattern`` (an alias, a path or a glob) selects the layer at ``path``."""
    alias = ALIASES.get(pattern)
    return alias(path.split("."), kind) if alias else matches_path(pattern, path)


def _supported_layers(model: nn.Module) -> dict[str, LayerType]:
    """The layer type of each module that a registered type handles, by name."""
    layers = {}
    for name, module in model.named_modules():
        kind = layer_type_of(module)
        if kind is not None:
            layers[name] = kind
    return layers


def _examples(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:12])
    return shown + (f", … ({len(names)} in all)" if len(names) > 12 else "")


def _selected_names(
    model: nn.Module, layers: dict[str, LayerType], include: list[str], exclude: list[str]
) -> list[str]:
    """The names of the layers that the patterns select. LayerError for a pattern without a layer, and for none left."""
    unsupported = _unsupported_modules(model, layers)
    for pattern in [*include, *exclude]:
        if pattern in exclude and any(_selects_unsupported(pattern, name) for name in unsupported):
            continue
        if not any(matches(pattern, name, kind) for name, kind in layers.items()):
            _refuse_unsupported(model, pattern, layers)
            raise LayerError(
                f"layer pattern {pattern!r} matches no layer; the layers of this model are: {_examples(layers)}. "
                "Patterns match whole path components; `all` takes every layer"
            )
    chosen = [
        name
        for name, kind in layers.items()
        if any(matches(pattern, name, kind) for pattern in include)
        and not any(matches(pattern, name, kind) for pattern in exclude)
    ]
    if not chosen:
        raise LayerError(f"no layer is left: {include} without {exclude}; the layers are: {_examples(layers)}")
    for pattern in include:
        _refuse_unsupported(model, pattern, layers, exclude)
    return chosen


def block_linears(model: nn.Module) -> list[str]:
    """Names of the linears inside the transformer blocks, by the rule of ``mlp`` and ``attn``, and of modules there
    that no layer type handles. LayerError if there are none.
    """
    layers = _supported_layers(model)
    names = [name for name, kind in layers.items() if any(matches(pattern, name, kind) for pattern in BLOCK_LINEARS)]
    if not names:
        raise LayerError(
            f"{type(model).__name__} has no linears inside transformer blocks; its layers are: {_examples(layers)}"
        )
    unsupported = _unsupported_modules(model, layers)
    return [
        *names,
        *(name for name in unsupported if any(_selects_unsupported(pattern, name) for pattern in BLOCK_LINEARS)),
    ]


def _unsupported_modules(model: nn.Module, layers: dict[str, LayerType]) -> dict[str, list[str]]:
    """For each module that no layer type handles the names of its parameters, without those that a handled layer
    shares.
    """
    handled = {id(p) for name in layers for p in model.get_submodule(name)._parameters.values()}
    unsupported = {}
    for name, module in model.named_modules():
        own = [key for key, value in module._parameters.items() if value is not None and id(value) not in handled]
        if own and name not in layers:
            unsupported[name] = own
    return unsupported


def _selects_unsupported(pattern: str, name: str) -> bool:
    """Whether ``pattern`` would select the module ``name``, which no layer type handles."""
    parts = name.split(".")
    if pattern in ALIASES:
        return {"all": True, "mlp": _in_feed_forward(parts), "attn": _in_attention(parts)}.get(pattern, False)
    return matches_path(pattern, name)


def _refuse_unsupported(
    model: nn.Module, pattern: str, layers: dict[str, LayerType], exclude: Iterable[str] = ()
) -> None:
    """LayerError if ``pattern`` selects a module whose own parameters no layer type handles."""
    for name, own in _unsupported_modules(model, layers).items():
        if _selects_unsupported(pattern, name) and not any(_selects_unsupported(p, name) for p in exclude):
            kind = type(model.get_submodule(name)).__name__
            raise LayerError(
                f"layer {name!r} is a {kind} with parameters {own}: no layer type handles it. "
                f"Leave it out with `exclude_layers` {name!r}"
            )


def select_blocks(
    model: nn.Module,
    include: Iterable[str] = BLOCK_LINEARS,
    exclude: Iterable[str] = (),
    *,
    include_embeddings: bool = False,
) -> Selection:
    """The blocks of the layers of ``model`` that the patterns select.

    A parameter that several modules share (a tied lm_head) is one block, whichever of them is selected. All these
    modules are its uses, because its gradient is the sum over them.

    Raises LayerError for a pattern that matches no layer, for a selected module whose type is not supported, and for a
    layer whose settings make its gradient depend on the batch.
    """
    layers = _supported_layers(model)
    patterns = [*include, *(["embeddings"] if include_embeddings else [])]
    chosen = _selected_names(model, layers, patterns, list(exclude))
    names_of: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names_of.setdefault(id(parameter), name)
    users: dict[int, list[str]] = {}
    for name in layers:
        users.setdefault(id(model.get_submodule(name)._parameters["weight"]), []).append(name)

    unhandled: dict[int, str] = {}
    for name, module in model.named_modules():
        if name not in layers:
            unhandled.update({id(p): name for p in module._parameters.values() if p is not None})
    blocks, covered = [], 0
    owner: dict[int, str] = {}
    selected: set[int] = set()
    counted: set[int] = set()
    for name in chosen:
        weight = model.get_submodule(name)._parameters["weight"]
        if id(weight) in selected:
            continue
        selected.add(id(weight))
        if id(weight) in unhandled:
            raise LayerError(
                f"layer {name!r} shares its weight with {unhandled[id(weight)]!r}, which no layer type handles: its "
                f"gradient would be incomplete. Leave it out with `exclude_layers` {name!r}"
            )
        block, parameters = _block(model, users[id(weight)], layers, names_of)
        for p in parameters:
            if owner.setdefault(id(p), name) != name:
                raise LayerError(
                    f"layers {owner[id(p)]!r} and {name!r} share the bias {names_of[id(p)]!r} but not the weight: not "
                    f"supported. Leave one out with `exclude_layers` {name!r}"
                )
        numel = sum(p.numel() for p in parameters if id(p) not in counted)
        counted.update(id(p) for p in parameters)
        covered += numel
        blocks.append(block)
    return Selection(blocks=tuple(blocks), covered=covered, total=sum(p.numel() for p in model.parameters()))


def _block(
    model: nn.Module, users: list[str], layers: dict[str, LayerType], names_of: dict[int, str]
) -> tuple[Block, list[nn.Parameter]]:
    """(block, its parameters) of the weight that ``users`` share. The first of them gives the name and the axes."""
    first = users[0]
    kind = layers[first]
    n_out, n_in = kind.axes(model.get_submodule(first))
    weight = model.get_submodule(first).get_parameter("weight")
    columns: dict[tuple[int, bool], int] = {}
    uses, parameters = [], [weight]
    for name in users:
        module, use_kind = model.get_submodule(name), layers[name]
        use_kind.check(module, name)
        if not use_kind.is_matrix and len(users) > 1:
            raise LayerError(f"layers {users} share the weight of a norm: tied norms are not supported")
        flipped = use_kind.is_lookup != kind.is_lookup
        bias = module._parameters.get("bias")
        column = None
        if bias is not None:
            if use_kind.is_matrix:
                if (id(bias), flipped) not in columns:
                    columns[id(bias), flipped] = n_out if flipped else n_in
                    n_out, n_in = n_out + flipped, n_in + (not flipped)
                    parameters.append(bias)
                column = columns[id(bias), flipped]
            else:
                parameters.append(bias)
        uses.append(
            Use(
                module=name,
                type=use_kind.name,
                flipped=flipped,
                bias=None if bias is None else names_of[id(bias)],
                bias_column=column,
            )
        )
    block = Block(
        name=first,
        type=kind.name,
        parameters=tuple(names_of[id(p)] for p in parameters),
        numel=sum(p.numel() for p in parameters),
        n_out=n_out,
        n_in=n_in,
        is_matrix=kind.is_matrix,
        uses=tuple(uses),
    )
    return block, parameters
