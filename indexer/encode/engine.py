"""GradProjLoraEngine: per-sample projected gradients of any model, from one backward pass of a batch.

Legend: B samples of a batch, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.activations import lean_activations
from indexer.encode.autograd_probe import AutogradBlocks, differing, unlike
from indexer.encode.branch import SideBranch
from indexer.encode.expanded import Expanded
from indexer.encode.flat_rows import FlatRows
from indexer.encode.forward_probe import ABSENT, CallKeeper, CannotRun, strangers
from indexer.encode.graphs import NewGraphs, called, hidden_in_graphs, refuse_not_run, refuse_unreached
from indexer.encode.modes import Removable, is_compiled, refuse_randomness, without_autocast
from indexer.encode.sample_axis import Witness, mixed_blocks, refuse_mixed
from indexer.encode.uses import FrozenInCalls, parameters_by_module, paths_of, refuse_hidden
from indexer.layers.base import refuse_counted
from indexer.projection.blocks import Use
from indexer.projection.matrices import Projection
from indexer.projection.plan import BlockPlan

TESTED_BATCHES = 2
"""Number of batches of at least two samples that are checked. One would not do: a layer that routes tokens may look
right in it."""
SAMPLED = 64
"""Later the batches of its powers are checked: what a model does may change. A check takes as long as three batches."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrapper of ``torch.compile``, which has the names of the layers; else ``model`` itself."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


class GradProjLoraEngine:
    """Per-sample projected gradients of ``model``, by side branches on the selected layers.

    ::

        with GradProjLoraEngine(model, ProjectionConfig(seed=7)) as engine:
            for x, y in batches:
                engine.prepare(len(x))
                losses_B = loss_of_each_sample(model(x), y)
                vectors_BD = engine.collect(losses_B)

    While it is attached, every parameter is frozen. On exit, also after an exception, each has its own
    ``requires_grad`` again and all hooks are removed. Outputs are bit-identical with and without the engine.

    The first two batches of more than one sample are checked, and later the 64th, the 4096th, …: the samples must be
    the first axis of every layer. The checks are a second backward pass of reweighted losses (not for a compiled model)
    and forward passes of some of the samples (only if the model itself is called). In the first of these batches, and
    later, vectors are held against autograd: those of one sample, which runs again, or, if the loop calls parts of the
    model, the sum of the batch; that batch takes the memory of a training step. In every batch a use of a weight
    outside its module is an error (not for a compiled model). ``check=False`` leaves all this out; ``find_uses=True``
    keeps the last.

    Raises LayerError for layers that cannot be projected, UsageError for a model whose forward pass is random.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ProjectionConfig | None = None,
        *,
        projection: Projection | None = None,
        check: bool = True,
        find_uses: bool | None = None,
    ) -> None:
        self.model = unwrap(model)
        self._given = model
        refuse_randomness(self.model)
        self.projection = projection or Projection.for_model(self.model, config or ProjectionConfig())
        self._leaves: dict[str, Tensor] = {}
        self._batch = 0
        self._handles: list[Removable] = []
        self._lean = ExitStack()
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._ran: set[str] = set()
        self._expanded = Expanded()
        self._tests_left = TESTED_BATCHES if check else 0
        self._checks = check
        self._trusting = not check and find_uses is None
        """Whether nobody has checked, or checks, what the layers see."""
        self._find_uses = check if find_uses is None else find_uses
        self._uses: FrozenInCalls | None = None
        self._batches = 0
        self._compare = self._tested = False
        """Whether the blocks of the open batch are compared with autograd's, and its axes checked."""
        self._flat_rows = FlatRows()
        self._graphs, self._new_graphs = NewGraphs(), False
        """Graphs of torch.compile, and whether new ones ran in the open batch."""
        self._narrow = False
        self._witness: Witness | None = None
        self._keeper: CallKeeper | None = None

    @property
    def dimension(self) -> int:
        """D, the numbers in a vector."""
        return self.projection.plan.dimension

    def __enter__(self) -> GradProjLoraEngine:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def attach(self) -> None:
        """Freeze the parameters and add the side branches. UsageError if the engine is attached already."""
        if self._handles:
            raise UsageError("this engine is attached already; call detach() first")
        refuse_randomness(self.model)
        device = next(self.model.parameters()).device
        self.projection.to(device)
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            if self._checks or self._find_uses:
                self._keeper = CallKeeper(self._given)
            self._lean.enter_context(lean_activations(self.model))
            if not is_compiled(self._given):
                self._lean.enter_context(self._expanded.named(self.model))
            for parameter, _ in self._flags:
                parameter.requires_grad_(False)
            if self._find_uses:
                self._uses = FrozenInCalls(self.model, parameters_by_module(self.model, self.projection.plan))
                self._handles += self._uses.attach(self._given)
            for layer in self.projection.plan.layers:
                for use in layer.block.uses:
                    module = self.model.get_submodule(use.module)
                    hook = self._hook(layer, use, module)
                    # Before all other hooks, which may change the output of the layer.
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove every branch and restore the ``requires_grad`` of every parameter."""
        self._lean.close()
        if self._keeper is not None:
            self._keeper.remove()
            self._keeper = None
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._handles, self._flags, self._leaves, self._uses = [], [], {}, None

    def prepare(self, batch_size: int) -> None:
        """Prepare the branches for one forward pass of ``batch_size`` samples, the first axis of every layer.

        UsageError if the engine is not attached.
        """
        if not self._handles:
            raise UsageError("the engine is not attached; use it as a context manager or call attach()")
        if batch_size < 1:
            raise UsageError(f"a batch has at least one sample, not {batch_size}")
        device = next(self.model.parameters()).device
        self._batch = batch_size
        self._batches += 1
        self._ran, self._expanded.names = set(), set()
        self._flat_rows.begin()
        self._graphs.begin()
        sampled = self._checks and _is_power(self._batches)
        self._compare |= sampled
        self._tested = batch_size > 1 and (self._tests_left > 0 or sampled)
        compiled = self._given is not self.model
        self._witness = Witness(device) if self._tested and not compiled else None
        if self._keeper is not None:
            self._keeper.begin()
        if self._uses is not None:
            self._uses.begin(whole=self._compare)
        self._leaves = self._new_leaves()

    def _new_leaves(self) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {
            # One number expanded to (B, k_out, k_in): the leaf takes no memory.
            layer.block.name: torch.zeros((), device=device)
            .expand(self._batch, layer.k_out, layer.k_in)
            .requires_grad_(True)
            for layer in self.projection.plan.layers
        }

    def collect(self, losses_B: Tensor) -> Tensor:
        """(B, D) float32: the vectors of the prepared batch, from each sample's own loss.

        ``losses_B[i]`` must depend only on sample i. Call it once after each :meth:`prepare`.

        Raises CaptureError if the backward pass did not reach a branch, or if a check finds that a layer mixes samples;
        no result of the batch may be used then. UsageError if the batch was collected already.
        """
        return self.projection.assemble(self._reached(losses_B, None))

    def hand_over(
        self, losses_B: Tensor, take: Callable[[int, Tensor], None], beside: GradProjLoraEngine | None = None
    ) -> None:
        """As :meth:`collect`, but ``take(place, block)`` gets the block (B, k_out, k_in) of each layer as soon as the
        backward pass has made it, and nothing else keeps it: no more than one of them is in memory.

        ``place`` counts the layers in the order of the plan. Those of an engine ``beside``, which is attached to the
        same model and was prepared for the same pass, come after the own ones; one backward pass gives both. Only for
        an engine with ``check=False``, since a check needs the blocks of a second pass.
        """
        assert not self._checks
        leaves = [*self._leaves_in_order(), *([] if beside is None else beside._leaves_in_order())]
        for place, leaf in enumerate(leaves):
            leaf.register_hook(partial(_handed, take, place))  # type: ignore[no-untyped-call]
        self._reached(losses_B, beside)

    def _reached(self, losses_B: Tensor, beside: GradProjLoraEngine | None) -> list[Tensor]:
        """The blocks of all layers, those of ``beside`` behind the own ones."""
        if losses_B.shape != (self._batch,):
            raise CaptureError(
                f"losses have shape {tuple(losses_B.shape)}; one each for {self._batch} samples is needed"
            )
        if not self._leaves:
            raise UsageError("the batch has been collected already; call prepare() before each forward pass")
        plan = self.projection.plan
        compiled = self._given is not self.model
        missing = [
            use.path
            for layer in plan.layers
            for use in layer.block.uses
            # A tied layer may go by another name (T5's `shared`); a compiled graph may hide a use.
            if use.module not in self._ran and (compiled or not self._ran_by_another_name(layer))
        ]
        refuse_not_run(missing, compiled=is_compiled(self._given))
        self._flat_rows.check()
        engines = [self] if beside is None else [self, beside]
        leaves = [leaf for engine in engines for leaf in engine._leaves_in_order()]
        if not losses_B.requires_grad:
            raise CaptureError(
                "the losses carry no gradient: was the forward pass under torch.no_grad(), or checkpointed with "
                "use_reentrant=True? Use use_reentrant=False"
            )
        try:
            hidden = [path for engine in engines for path in engine._hidden(losses_B)]
            blocks = self._blocks(losses_B, leaves)
            refuse_hidden(hidden)
            for engine in engines:
                engine._leaves = {}  # without leaves the branches do nothing in what runs again
                engine._freeze()
            refuse_hidden([path for engine in engines for path in engine._hidden_in_graphs()])
        except RuntimeError as error:
            if "use_reentrant=True" in str(error):
                raise CaptureError(
                    "gradient checkpointing with use_reentrant=True cannot be captured; use use_reentrant=False"
                ) from error
            raise
        finally:
            # Not earlier: with checkpointing the forward pass, and so the branches, run again in backward.
            for engine in engines:
                engine._end()
        unreached = [layer.block.name for layer, block in zip(plan.layers, blocks, strict=False) if block is None]
        refuse_unreached(unreached)
        return [block for block in blocks if block is not None]

    def _ran_by_another_name(self, layer: BlockPlan) -> bool:
        return any(use.module in self._ran for use in layer.block.uses)

    def _leaves_in_order(self) -> list[Tensor]:
        return [self._leaves[layer.block.name] for layer in self.projection.plan.layers]

    def _end(self) -> None:
        """End the batch."""
        self._leaves, self._witness = {}, None
        self._freeze()
        if self._keeper is not None:
            self._keeper.forget()

    def _freeze(self) -> None:
        if self._uses is not None:
            self._uses.end()

    def _hidden(self, losses_B: Tensor) -> list[str]:
        """The layers whose weights the losses use where no branch sees it. CaptureError if it cannot be told."""
        if self._uses is None:
            return []
        self._new_graphs = self._uses.compiled and (self._uses.changed or self._graphs.any())
        if self._uses.compiled:
            called(self.model, None if self._keeper is None else self._keeper.call)
        return paths_of(self.model, self.projection.plan, self._uses.hidden(losses_B))

    def _hidden_in_graphs(self) -> list[str]:
        """The layers whose weights are used, where no branch sees it, in graphs that are new in the batch."""
        call, self._new_graphs, new = None if self._keeper is None else self._keeper.call, False, self._new_graphs
        if call is None or not new:
            return []
        plan = self.projection.plan
        found = hidden_in_graphs(self.model, call, parameters_by_module(self.model, plan))
        self._graphs.looked()
        return paths_of(self.model, plan, found)

    def _blocks(self, losses_B: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
        """The blocks of the leaves' layers. In the first batches they are compared with those of reweighted losses."""
        witness, whole = self._witness, self._uses is not None and self._uses.whole
        weighed = witness is None and self._checks and self._batch > 1 and self._flat_rows.new_forms
        expected = AutogradBlocks(self.model, self.projection) if whole else None
        mixed: dict[str, str] = {}

        def gradients(*, retain: bool) -> tuple[Tensor | None, ...]:
            if expected is not None:
                return expected.gradients(losses_B.sum(), leaves, retain=retain)
            return torch.autograd.grad(losses_B.sum(), leaves, retain_graph=retain, allow_unused=True)

        try:
            if witness is not None:
                with witness.plain():
                    blocks = gradients(retain=True)
                witness.weighted(losses_B, leaves)
            elif weighed:
                blocks = gradients(retain=True)
                mixed = mixed_blocks(
                    [layer.block.name for layer in self.projection.plan.layers], losses_B, leaves, blocks
                )
            else:
                blocks = gradients(retain=False)
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            witness = None  # compiled in place: its graph allows only one backward pass
            blocks = gradients(retain=False)
        self._freeze()
        refuse_mixed(mixed, len(self.projection.plan.layers))
        if (self._tested or weighed) and self._batch > 1:
            self._leaves = {}  # without leaves the branches do nothing in the checks' forward passes
            self._check(witness)
        if self._compare:
            self._check_autograd(expected, blocks)
        if self._batch > 1:
            self._flat_rows.remember()
        return blocks

    def _check_autograd(self, expected: AutogradBlocks | None, blocks: Sequence[Tensor | None]) -> None:
        """CaptureError if blocks of a sample are not autograd's; of all samples if these were ``expected``.

        A model that does not run on a single sample is checked in its next batch, with all.
        """
        call = None if self._keeper is None else self._keeper.call
        if expected is not None:
            found = dict(zip([layer.block.name for layer in self.projection.plan.layers], blocks, strict=False))
            of_layers = [found[layer.block.name] for layer in expected.layers]
            sums = [None if block is None else block.sum(0) for block in of_layers]
            problems = unlike(expected, sums, narrow=self._narrow)
        elif call is None:
            return  # compiled
        else:
            batch, ran, self._batch, self._ran = self._batch, self._ran, 1, set()
            self._witness, self._leaves = None, self._new_leaves()
            try:
                problems = differing(self.model, call, batch, self._batches % batch, self.projection, self._leaves)
                complete = ran <= self._ran  # else the loop calls parts of the model beside it
            except CannotRun:
                problems, complete = {}, False
            finally:
                self._batch, self._ran, self._leaves = batch, ran, {}
            if not complete and self._uses is not None:
                self._uses.never_alone = True
                refuse_mixed(problems, len(self.projection.plan.layers))
                return
        refuse_mixed(problems, len(self.projection.plan.layers))
        self._compare = False

    def _check(self, witness: Witness | None) -> None:
        """CaptureError if a layer mixes samples, by reweighted losses and by forward passes of some of the samples.

        Without a ``witness`` (a compiled model, whose graph allows only one backward pass) only forward passes are
        used. They also serve for layers whose gradient is zero, about which reweighted losses say nothing. If neither
        check covers a layer, the next batch is checked.
        """
        covered: set[str] = set()
        if witness is not None and witness.finite:
            refuse_mixed(witness.problems(), len(self._ran))
            covered = witness.seen
        call = None if self._keeper is None else self._keeper.call
        if call is not None:
            try:
                uses = (use for layer in self.projection.plan.layers for use in layer.block.uses)
                kinds = {use.module: use.kind for use in uses if use.module in self._ran}
                problems = strangers(self.model, call, self._batch, kinds, outputs=not covered)
            except CannotRun:
                if not covered:
                    raise
                call, problems = None, {}
            # Without a graph, a fused kernel may replace layers that ran in the backward check.
            remaining = {name: words for name, words in problems.items() if words != ABSENT or name not in covered}
            refuse_mixed(remaining, len(self._ran))
        if self._tests_left and (call is not None or covered == self._ran):
            self._tests_left -= 1

    def _hook(self, layer: BlockPlan, use: Use, module: nn.Module) -> Callable[..., Any]:
        """The forward hook of one use. Without a prepared batch it does not change the output."""
        name = layer.block.name
        layer_type = use.kind
        sides = self.projection.sides_of(layer.block, use, module)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
            leaf = self._leaves.get(name)
            if leaf is None:
                return None
            if self._witness is not None:
                problem = layer_type.output_problem(module, args, kwargs, y)
                refuse_mixed({} if problem is None else {use.module: problem}, len(self._handles))
            seen = layer_type.seen(module, args, kwargs, y, self._batch, use.module)
            if self._trusting:
                refuse_counted(seen, use.module)
            with torch.no_grad(), without_autocast(seen.device.type):
                saved = layer_type.keep(module, seen.x, sides, seen.dtype)
            self._ran.add(use.module)
            if seen.expanded:
                self._expanded.names.add(use.module)
            self._flat_rows.saw(use.module, seen, self._batch)
            self._narrow |= seen.dtype in (torch.float16, torch.bfloat16)
            outputs: tuple[Tensor, ...] = SideBranch.apply(  # type: ignore[no-untyped-call]
                leaf, saved, (module, layer_type, sides, use.flipped), seen.rows, *seen.outputs
            )
            seen = seen.with_outputs(outputs)
            return seen.back((seen if self._witness is None else self._witness.tap(use.module, seen)).outputs)

        return hook


def _handed(take: Callable[[int, Tensor], None], place: int, block_BKJ: Tensor) -> Tensor:
    """Give a block away, and let zeros that take no memory stand for it."""
    take(place, block_BKJ)
    return block_BKJ.new_zeros(()).expand_as(block_BKJ)


def _is_power(batches: int) -> bool:
    """Whether ``batches`` is 1, or a power of :data:`SAMPLED`."""
    while batches % SAMPLED == 0:
        batches //= SAMPLED
    return batches == 1
