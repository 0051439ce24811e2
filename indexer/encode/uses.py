"""Uses of weights where no branch or tap sees them, found in the graph of every batch.

Autograd keeps a node for each operation on a tensor that has a gradient. An edge of the graph that ends at a parameter
is a use of it; it must come from inside a call of the module that is tapped for the parameter. What a check of the
first batch cannot know, a branch that only a later batch takes, shows there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.utils.hooks import RemovableHandle

from indexer.encode.modes import Removable, around_calls, outermost_compiled
from indexer.encode.sample_axis import unsupported
from indexer.projection.plan import ProjectionPlan

PASSED_ON = frozenset(
    f"{name}Backward0"
    for name in (
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Alias", "Expand", "ToCopy", "Clone"),
        *("Unsqueeze", "Squeeze", "Select", "Slice", "AsStrided", "Split", "SplitWithSizes", "Unbind"),
    )
)
"""Operations that only pass a weight on, perhaps to several uses: autocast casts it once for all."""
LEAF = "torch::autograd::AccumulateGrad"
"""The node of a tensor without a past: a parameter."""


def parameters_by_module(model: nn.Module, plan: ProjectionPlan) -> dict[str, list[nn.Parameter]]:
    """By module with a branch, the parameters of the projected blocks whose use in it the branch sees."""
    found: dict[str, list[nn.Parameter]] = {}
    for layer in plan.layers:
        ids = {id(model.get_parameter(name)) for name in layer.block.parameters}
        for use in layer.block.uses:
            module = model.get_submodule(use.module)
            own = module._parameters.values() if use.kind.has_formula else [module.get_parameter(use.parameter)]
            found.setdefault(use.module, []).extend(p for p in own if p is not None and id(p) in ids)
    return found


def paths_of(model: nn.Module, plan: ProjectionPlan, parameters: Sequence[Tensor]) -> list[str]:
    """The uses of the projected blocks that have one of the ``parameters``."""
    ids = {id(parameter) for parameter in parameters}
    blocks = [layer.block for layer in plan.layers] if ids else []
    used = [block for block in blocks if any(id(model.get_parameter(name)) in ids for name in block.parameters)]
    return [use.path for block in used for use in block.uses]


def uses_in(loss: Tensor) -> Iterator[tuple[Tensor, Any]]:
    """(tensor without a past, the operation that uses it) of the graph of ``loss``, once for each use."""
    start: Any = loss.grad_fn
    waiting = [] if start is None else [start]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None or following in seen:
                continue
            name = following.name()  # costs as much as all else here: once for a node
            while name in PASSED_ON and len(following.next_functions) == 1:
                following = following.next_functions[0][0]
                if following is None:
                    break
                name = following.name()
            if following is None or following in seen:
                continue
            if name == LEAF:
                yield following.variable, node
            else:
                seen.add(following)
                waiting.append(following)


def refuse_hidden(names: Sequence[str]) -> None:
    """CaptureError that names the layers or parameters ``names``, if there are any."""
    if names:
        raise unsupported(
            f"{len(names)} weight(s) are used where nothing sees it (`F.linear(x, layer.weight)`, a forward that is "
            "called around the module's hooks, a module that was replaced): their gradients would lack a share. Call "
            f"the module, or leave them out (`exclude_layers`): {','.join(names)}",
            names,
        )


class FrozenInCalls:
    """Parameters that are frozen inside calls of their modules alone: all other uses of them are in the graph.

    ``parameters`` are those of each module by name. Nothing is kept for a backward pass that would not be kept
    otherwise, but for uses that are refused. Inside compiled graphs nothing can be frozen for a call: the parameters of
    modules that run there are frozen while the compiled module around the graph is called. Of a graph that is made
    around no such module (of a compiled function) nothing tells when it runs: then, once that is known, they are frozen
    in the whole batch. So a graph always sees them frozen, and none is made for the sake of that.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self._model = model
        self._of = {name: [p for p in own if p.is_floating_point()] for name, own in parameters.items()}
        self._all = list({id(p): p for own in self._of.values() for p in own}.values())
        self._inside: dict[int, int] = {}
        """By parameter, how many calls of its modules, or of compiled modules, are open."""
        self._open = self.whole = False
        """Whether a batch is open; whether everything is in its graph, the uses inside calls, too."""
        self._called = False
        """Whether a module was called in the open batch."""
        self.never_alone = False
        """Whether ``whole`` counts although the model itself is called: it does not run on one sample."""
        self._in_graphs: set[str] = set()
        """Modules that ran in compiled graphs in the last batch."""
        self._awaited: set[str] = set()
        """Modules that should run in graphs: a compiled module around them is called for the first time in the open
        batch."""
        self._watched: set[int] = set()
        """The parameters that are in the graph of the open batch where they are used outside calls."""
        self._traced: set[str] = set()
        self._eager: set[str] = set()
        """Modules that ran in the open batch in compiled graphs, and outside."""
        self._within = 0
        """How many calls of compiled modules are open."""
        self._adrift: set[str] = set()
        self._ever_adrift: set[str] = set()
        """Modules that ran in graphs outside calls of compiled modules: in the open batch, and ever before."""
        self._belonging: set[str] = set()
        """Modules inside of compiled ones."""
        self._frozen: list[list[nn.Parameter]] = []
        """For each open call of a compiled module, what is frozen for it."""

    def attach(self, given: nn.Module | None = None) -> list[Removable]:
        """The hooks on the modules. Those of branches must come later, to stand before them.

        ``given`` is what is called, the model or the wrapper of ``torch.compile`` around it; None where nothing will
        run in a compiled graph.
        """
        handles: list[Removable] = [self._model.register_forward_pre_hook(self._model_called, prepend=True)]
        for name, parameters in self._of.items():
            module = self._model.get_submodule(name)
            enter, leave = self._hooks(name, parameters)
            handles += [
                module.register_forward_pre_hook(enter, prepend=True),
                module.register_forward_hook(leave, prepend=True),
            ]
        for module in [] if given is None else outermost_compiled(given):
            inside = set(module.modules())
            compiled = _Compiled({name for name in self._of if self._model.get_submodule(name) in inside})
            self._belonging |= compiled.inside
            handles += around_calls(module, partial(self._enter_compiled, compiled), self._leave_compiled)
        return handles

    def begin(self, *, whole: bool) -> None:
        """Begin a batch. With ``whole`` nothing is frozen, unless the model itself is called."""
        self._open, self.whole, self._inside, self._frozen = True, whole, {}, []
        self._called = False
        self._traced, self._eager, self._adrift, self._awaited = set(), set(), set(), set()
        hidden = self._ids_of(self._in_graphs & self._ever_adrift)
        self._watched = {id(p) for p in self._all} - hidden if hidden else {id(p) for p in self._all}
        for parameter in self._all:
            if id(parameter) in self._watched:
                parameter.requires_grad_(True)

    def end(self) -> None:
        """End the batch: everything is frozen."""
        if self._open:
            self._open = self.whole = False
            self._frozen = []
            traced = self._traced | self._adrift
            self._in_graphs = (self._in_graphs | self._awaited | traced) - (self._eager - traced)
            self._ever_adrift |= self._adrift
            for parameter in self._all:
                parameter.requires_grad_(False)

    @property
    def changed(self) -> bool:
        """Whether modules ran in compiled graphs that did not before, or the other way round."""
        new = (self._traced | self._adrift | self._awaited) - self._in_graphs
        return bool(new or self._eager & self._in_graphs)

    @property
    def compiled(self) -> bool:
        """Whether modules ran, or should have run, in compiled graphs."""
        return bool(self._traced or self._adrift or self._awaited or self._in_graphs)

    def hidden(self, losses: Tensor) -> list[Tensor]:
        """The parameters that the ``losses`` use outside calls of their modules; of modules that ran in compiled
        graphs nothing is said where they were not frozen in them.
        """
        if self.whole or not self._open:
            return []  # a comparison with autograd shows them
        not_frozen = (self._traced - self._in_graphs - self._awaited) | self._adrift
        watched = self._watched - self._ids_of(not_frozen) if not_frozen else self._watched
        return list({id(tensor): tensor for tensor, _ in uses_in(losses) if id(tensor) in watched}.values())

    def _ids_of(self, names: Iterable[str]) -> set[int]:
        return {id(p) for name in names for p in self._of[name]}

    def _model_called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is self._model and not self.never_alone and not self._called:
            self.whole = False

    def _enter_compiled(self, compiled: _Compiled) -> None:
        """Also with ``whole``: the call of the model that makes an end of it may be in the graph."""
        self._within += 1
        if not self._open:
            return
        if not compiled.called:
            compiled.called = True
            self._awaited |= compiled.inside
        strays = self._in_graphs - self._belonging  # they stand in no compiled module: any graph may run them
        names = (compiled.inside & (self._in_graphs | self._awaited)) | strays
        parameters = [p for name in names for p in self._of[name]]
        self._frozen.append(parameters)
        self._freeze(parameters)

    def _leave_compiled(self) -> None:
        self._within -= 1
        if self._frozen:
            self._thaw(self._frozen.pop())

    def _freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        inside = self._inside
        for parameter in parameters:
            key = id(parameter)
            if key in self._watched:
                inside[key] = inside.get(key, 0) + 1
                parameter.requires_grad_(False)

    def _thaw(self, parameters: Iterable[nn.Parameter]) -> None:
        inside = self._inside
        for parameter in parameters:
            key = id(parameter)
            if key in self._watched:
                inside[key] = inside.get(key, 1) - 1
                if not inside[key]:
                    parameter.requires_grad_(True)

    def _hooks(self, name: str, parameters: Sequence[nn.Parameter]) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._called = True
            if torch.compiler.is_dynamo_compiling():
                (self._traced if self._within else self._adrift).add(name)
                return
            self._eager.add(name)
            if self._open and not self.whole:
                self._freeze(parameters)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not torch.compiler.is_dynamo_compiling() and self._open and not self.whole:
                self._thaw(parameters)

        return enter, leave


class _Compiled:
    """A compiled module: the names of the modules inside, and whether it was called in a batch."""

    def __init__(self, inside: set[str]) -> None:
        self.inside, self.called = inside, False


class CallWindows:
    """The operations of a graph that belong to calls of modules, told by the order in which autograd numbers them.

    ``parameters`` are those of each module by name; they have gradients.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self._model, self._of = model, parameters
        self._watched = {id(p) for own in parameters.values() for p in own}
        self._started: dict[str, int] = {}
        self._windows: dict[int, list[tuple[int, int]]] = {}

    def attach(self) -> list[RemovableHandle]:
        """The hooks on the modules that note where a call begins."""
        return [
            self._model.get_submodule(name).register_forward_pre_hook(self._hook(name), prepend=True)
            for name in self._of
        ]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not torch.compiler.is_dynamo_compiling():
                self._started[name] = _get_sequence_nr()

        return hook

    def begin(self) -> None:
        """Begin a batch."""
        self._windows = {}

    def ended(self, name: str) -> None:
        """A call of the module ``name`` is over, and what it returned is tapped."""
        window = self._started.get(name, 0), _get_sequence_nr()
        for parameter in self._of.get(name, ()):
            self._windows.setdefault(id(parameter), []).append(window)

    def hidden(self, losses: Tensor, elsewhere: Collection[str] = ()) -> list[str]:
        """Names of the parameters that the ``losses`` use outside calls of their modules, but for those of the modules
        ``elsewhere``, whose calls cannot be told (in a compiled graph).
        """
        found: set[int] = set()
        trusted = {id(p) for name in elsewhere for p in self._of.get(name, ())}
        for tensor, node in uses_in(losses):
            key = id(tensor)
            if key in self._watched and key not in found and key not in trusted:
                number = node._sequence_nr()
                if not any(first <= number < last for first, last in self._windows.get(key, ())):
                    found.add(key)
        return [name for name, p in self._model.named_parameters() if id(p) in found] if found else []
