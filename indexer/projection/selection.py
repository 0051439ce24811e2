"""Selecting the layers to project by patterns, and joining tied parameters into blocks.

A pattern is a module path or a glob. Its components match whole, consecutive components anywhere in a module's path:
``mlp.c_fc`` matches ``transformer.h.0.mlp.c_fc``; ``transformer.h.1`` matches everything in block 1 and nothing in
block 10; ``h.*.attn`` matches each attention. Aliases: ``mlp``, ``attn``, ``norm``, ``embeddings``, ``head``,
``adapter``, ``all``; ``auto`` is resolved by :func:`default_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ghoststore.checkpoint.adapter import REPLACED, has_adapter, is_adapter_path
from ghoststore.errors import LayerError
from indexer.layers import LayerType, layer_type_by_name, layer_type_of
from indexer.layers.callers import is_part_of_another, replayed_parameters
from indexer.layers.replayed import matrix_axes
from indexer.projection.blocks import Block, Selection, Use

ATTENTION = frozenset(
    {
        *("attn", "attention", "self_attn", "self_attention", "cross_attn", "crossattention", "encoder_attn"),
        *("SelfAttention", "EncDecAttention", "LocalSelfAttention", "TransientGlobalSelfAttention", "rel_attn"),
        *("multi_head_attention", "linear_attn", "mixer", "mamba", "temporal_block", "conv", "short_conv"),
    }
)
FEED_FORWARD = frozenset(
    {
        *("mlp", "ffn", "ff", "feed_forward", "feedforward", "intermediate", "fc1", "fc2", "mlp_block", "shared_mlp"),
        *("DenseReluDense", "block_sparse_moe", "moe", "experts"),
    }
)
BLOCK_LINEARS = ("mlp", "attn")
"""Aliases of the linears inside the transformer blocks: embeddings, head and norms are left out."""
HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "decoder"})


def _in_attention(parts: list[str]) -> bool:
    return not ATTENTION.isdisjoint(parts)


def _in_feed_forward(parts: list[str]) -> bool:
    # BERT calls the second half of its feed-forward output.dense, next to attention.output.dense.
    return not _in_attention(parts) and (not FEED_FORWARD.isdisjoint(parts) or "output" in parts[:-1])


def _named(parts: list[str], word: str) -> bool:
    """Whether the module of a parameter (the last of ``parts``) has ``word`` in its name."""
    return word in "".join(parts[-2:-1]).lower()


def _is_norm(parts: list[str], kind: LayerType) -> bool:
    return _named(parts, "norm") if not kind.has_formula else not kind.is_matrix


def _is_embedding(parts: list[str], kind: LayerType) -> bool:
    return _named(parts, "embed") if not kind.has_formula else kind.is_lookup


def _matrix(parts: list[str], kind: LayerType) -> bool:
    return not _is_norm(parts, kind) and not _is_embedding(parts, kind)


ALIASES: dict[str, Callable[[list[str], LayerType], bool]] = {
    "mlp": lambda parts, kind: _matrix(parts, kind) and _in_feed_forward(parts),
    "attn": lambda parts, kind: _matrix(parts, kind) and _in_attention(parts),
    "norm": _is_norm,
    "embeddings": _is_embedding,
    "head": lambda parts, kind: _matrix(parts, kind) and parts[-1] in HEADS,
    "adapter": lambda parts, kind: is_adapter_path(parts),
    "all": lambda parts, kind: True,
}


def default_layers(model: nn.Module) -> tuple[str, ...]:
    """The patterns for which ``auto`` stands: all of a LoRA adapter, if the model has one, else its block linears."""
    return ("adapter",) if has_adapter(model) else BLOCK_LINEARS


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


def present_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model`` by name, without those that peft keeps beside an adapter's own in their place."""
    return ((name, module) for name, module in model.named_modules() if REPLACED not in name.split("."))


def formula_layers(model: nn.Module) -> dict[str, LayerType]:
    """The layer type of each module whose gradients a formula gives, by name."""
    layers = {}
    for name, module in present_modules(model):
        kind = None if is_part_of_another(model, name) else layer_type_of(module)
        if kind is not None:
            layers[name] = kind
    return layers


@dataclass(frozen=True, slots=True)
class _Layers:
    """Everything that can be selected, by path: that of a module with a formula, or that of a parameter."""

    formulas: dict[str, LayerType]
    replayed: dict[str, tuple[str, str]]
    """(module, name of the parameter in it) by path of the parameter."""
    unsupported: dict[str, list[str]]
    """Names of the parameters of each module that nothing handles."""

    @classmethod
    def of(cls, model: nn.Module) -> _Layers:
        formulas = formula_layers(model)
        again = replayed_parameters(model, formulas)
        present = dict(present_modules(model))
        replayed = {f"{name}.{key}": (name, key) for name, keys in again.items() if name in present for key in keys}
        handled = {id(model.get_parameter(path)) for path in replayed}
        handled |= {id(p) for name in formulas for p in model.get_submodule(name)._parameters.values()}
        unsupported = {}
        for name, module in present.items():
            own = [key for key, value in module._parameters.items() if value is not None and id(value) not in handled]
            if own and name not in formulas:
                unsupported[name] = own
        return cls(formulas, replayed, unsupported)

    @property
    def kinds(self) -> dict[str, LayerType]:
        """The type of each path."""
        again = layer_type_by_name("replayed")
        return {**self.formulas, **dict.fromkeys(self.replayed, again)}


def _examples(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:12])
    return shown + (f", … ({len(names)} in all)" if len(names) > 12 else "")


def _any_matches(patterns: list[str], kinds: Mapping[str, LayerType]) -> bool:
    return any(matches(pattern, path, kind) for pattern in patterns for path, kind in kinds.items())


def _selected(layers: _Layers, include: list[str], exclude: list[str]) -> list[str]:
    """The paths that the patterns select. LayerError for a pattern that matches nothing, and if nothing is left."""
    kinds = layers.kinds
    default = tuple(include[: len(BLOCK_LINEARS)]) == BLOCK_LINEARS
    for pattern in [*include, *exclude]:
        if (
            default
            and pattern in BLOCK_LINEARS
            and any(matches(p, path, k) for p in include for path, k in kinds.items())
        ):
            continue  # a model with one of both
        if pattern in exclude and any(_selects_unsupported(pattern, name) for name in layers.unsupported):
            continue
        if not any(matches(pattern, path, kind) for path, kind in kinds.items()):
            raise LayerError(
                f"layer pattern {pattern!r} matches no layer; the layers of this model are: {_examples(kinds)}. "
                "Patterns match whole path components; `all` takes every layer"
            )
    chosen = [
        path
        for path, kind in kinds.items()
        if any(matches(pattern, path, kind) for pattern in include)
        and not any(matches(pattern, path, kind) for pattern in exclude)
    ]
    if not chosen:
        raise LayerError(f"no layer is left: {include} without {exclude}; the layers are: {_examples(kinds)}")
    return chosen


def block_linears(model: nn.Module) -> list[str]:
    """Paths of the matrices inside the transformer blocks, by the rule of ``mlp`` and ``attn``: of modules, and of
    parameters of modules that no formula knows. LayerError if there are none.
    """
    kinds = _Layers.of(model).kinds
    names = [name for name, kind in kinds.items() if any(matches(pattern, name, kind) for pattern in BLOCK_LINEARS)]
    if not names:
        raise LayerError(
            f"{type(model).__name__} has no linears inside transformer blocks; its layers are: {_examples(kinds)}"
        )
    return names


def _selects_unsupported(pattern: str, name: str) -> bool:
    """Whether ``pattern`` would select the module ``name``, which nothing handles."""
    parts = name.split(".")
    if pattern in ALIASES:
        return {
            "all": True,
            "adapter": is_adapter_path(parts),
            "mlp": _in_feed_forward(parts),
            "attn": _in_attention(parts),
        }.get(pattern, False)
    return matches_path(pattern, name)


def _refuse_unsupported(model: nn.Module, layers: _Layers, include: list[str], exclude: list[str]) -> None:
    """LayerError, with every selected module whose own parameters nothing handles."""
    refused = {
        name: own
        for name, own in layers.unsupported.items()
        if any(_selects_unsupported(pattern, name) for pattern in include)
        and not any(_selects_unsupported(pattern, name) for pattern in exclude)
    }
    if not refused:
        return
    lines = "\n".join(
        f"  {name or '(the model)'}: a {type(model.get_submodule(name)).__name__} with parameters {own}"
        for name, own in refused.items()
    )
    advice = (
        "name the layers that you want instead of `all`"
        if "" in refused
        else f"leave them out with `exclude_layers` '{','.join(refused)}'"
    )
    error = LayerError(f"no layer type handles {len(refused)} of the chosen layers:\n{lines}\n{advice}")
    error.unsupported = () if "" in refused else tuple(refused)
    raise error


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
    layers = _Layers.of(model)
    patterns = [*include, *(["embeddings"] if include_embeddings else [])]
    chosen = _selected(layers, patterns, list(exclude))
    _refuse_unsupported(model, layers, patterns, list(exclude))
    names_of: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names_of.setdefault(id(parameter), name)
    users: dict[int, list[str]] = {}
    for name in layers.formulas:
        users.setdefault(id(model.get_submodule(name)._parameters["weight"]), []).append(name)

    unhandled: dict[int, str] = {}
    for name, module in present_modules(model):
        if name not in layers.formulas:
            unhandled.update({id(p): name for p in module._parameters.values() if p is not None})
    blocks, covered = [], 0
    owner: dict[int, str] = {}
    selected: set[int] = set()
    counted: set[int] = set()
    for name in chosen:
        if name in layers.replayed:
            continue
        weight = model.get_submodule(name)._parameters["weight"]
        if id(weight) in selected:
            continue
        selected.add(id(weight))
        if id(weight) in unhandled:
            raise LayerError(
                f"layer {name!r} shares its weight with {unhandled[id(weight)]!r}, which no layer type handles: its "
                f"gradient would be incomplete. Leave it out with `exclude_layers` {name!r}"
            )
        block, parameters = _block(model, users[id(weight)], layers.formulas, names_of)
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
    again = _replayed_blocks(model, layers, chosen, names_of)
    blocks += again
    covered += sum(block.numel for block in again)
    return Selection(blocks=tuple(blocks), covered=covered, total=sum(p.numel() for p in model.parameters()))


def _replayed_blocks(model: nn.Module, layers: _Layers, chosen: list[str], names_of: dict[int, str]) -> list[Block]:
    """A block for each parameter among ``chosen`` that no formula knows, with every module that runs again for it."""
    paths: dict[int, list[str]] = {}
    for path in layers.replayed:
        paths.setdefault(id(model.get_parameter(path)), []).append(path)
    blocks = []
    for users in paths.values():
        parameter = model.get_parameter(users[0])
        if set(users).isdisjoint(chosen):
            continue
        shared = [name for name in layers.formulas if model.get_submodule(name)._parameters["weight"] is parameter]
        if shared:
            raise LayerError(
                f"layer {users[0]!r}, which no formula knows, shares its weight with {shared[0]!r}: its gradient would "
                f"be incomplete. Leave it out with `exclude_layers` {users[0]!r}"
            )
        n_out, n_in = matrix_axes(parameter)
        blocks.append(
            Block(
                name=users[0],
                type="replayed",
                parameters=(names_of[id(parameter)],),
                numel=parameter.numel(),
                n_out=n_out,
                n_in=n_in,
                is_matrix=n_in > 1,
                uses=tuple(
                    Use(
                        module=module,
                        type="replayed",
                        flipped=False,
                        bias=None,
                        bias_column=None,
                        parameter=key,
                        owner=type(model.get_submodule(module)).__name__,
                    )
                    for module, key in (layers.replayed[path] for path in users)
                ),
            )
        )
    return blocks


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
