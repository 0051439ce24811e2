"""Options that several commands share, with the same names wherever they mean the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def patterns(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """A comma-separated list of patterns; none is no list, which would stand for all layers."""
    found = tuple(piece.strip() for piece in (value or "").split(",") if piece.strip())
    if value is not None and not found:
        raise click.BadParameter(f"{value!r} names no layer; leave the option out for all", ctx, parameter)
    return found


def number_or(*words: str) -> Callable[[click.Context, click.Parameter, str | None], int | str | None]:
    """A whole number, or one of ``words``."""

    def parse(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
        if value is None or value in words:
            return value
        try:
            return int(value)
        except ValueError:
            raise click.BadParameter(
                f"{value!r} is neither a number nor {' or '.join(words)}", ctx, parameter
            ) from None

    return parse


def one_or_several(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> str | tuple[str, ...] | None:
    """None, one value, or all of an option that may be repeated."""
    return values if len(values) > 1 else values[0] if values else None


def weights(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | tuple[float, ...] | None:
    """``learning-rate``, ``equal``, or comma-separated numbers."""
    if value is None or value in ("learning-rate", "equal"):
        return value
    try:
        return tuple(float(piece) for piece in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither learning-rate, equal, nor numbers with commas between them", ctx, parameter
        ) from None


def fields(command: F) -> F:
    """``--text-field`` and its kin: how rows of a corpus are read."""
    for option, what in (
        ("domain", "Field with the domain (default: 'domain' where rows have it)."),
        ("id", "Field with the id (default: 'id' where rows have it, else the row number)."),
        ("messages", "Field with chat messages, which go through the tokenizer's chat template."),
        ("completion", "Field with the completion: the only targets of a row with a prompt."),
        ("prompt", "Field with the prompt, which is no target."),
        ("text", "Field with the text (default: 'text', else prompt and completion, else messages)."),
    ):
        command = click.option(f"--{option}-field", metavar="NAME", help=what)(command)
    return command


def take_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the field options in ``values`` by one ``fields`` entry."""
    from ghoststore.corpus import Fields

    names = ("text", "prompt", "completion", "messages", "id", "domain")
    values["fields"] = Fields(**{name: values.pop(f"{name}_field") for name in names})
    return values


def question(command: F) -> F:
    """``--store``, ``--val-set`` and every other option of `query.ask.question.Question` but ``--mean/--each``."""
    command = fields(device(command))
    for option in reversed(QUESTION):
        command = option(command)
    return command


def projection(command: F) -> F:
    """``--proj-layers`` and its kin: which layers are projected, and how."""
    for option in reversed(PROJECTION):
        command = option(command)
    return command


def learned_projection(command: F) -> F:
    """The options of a projection that learns from a sample of the corpus; after those of :func:`projection`."""
    for option in reversed(LEARNED_PROJECTION):
        command = option(command)
    return command


def take_projection(values: dict[str, Any], exclude_layers: tuple[str, ...] = ()) -> Any:
    """Take the projection options out of ``values``: a ProjectionConfig."""
    from ghoststore.lazy import load

    kind, orthonormal = values.pop("proj_kind"), values.pop("proj_row_orthonormal")
    return load("ProjectionConfig")(
        layers=values.pop("proj_layers"),
        exclude_layers=exclude_layers,
        include_embeddings=values.pop("include_embeddings"),
        rank_total=values.pop("proj_rank_total"),
        rank_min=values.pop("proj_rank_min"),
        seed=values.pop("proj_seed"),
        kind="orthonormal" if orthonormal else kind,
        compress=values.pop("proj_compress"),
        compress_by=values.pop("proj_compress_by", "auto"),
        **{field: values.pop(option) for option, field in LEARNED_FIELDS.items() if option in values},
    )


def common(command: F) -> F:
    """``--json`` and ``--quiet``."""
    command = click.option("--quiet", "-q", is_flag=True, help="No progress bars; errors and notes only.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")(command)


store_optional = click.option("--store", metavar="PATH", help="The store: a directory.")
store = click.option("--store", required=True, metavar="PATH", help="The store: a directory.")
device = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto.")
model_dtype = click.option(
    "--model-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Numbers the model computes with.",
)
loss_reduction = click.option(
    "--loss-reduction",
    type=click.Choice(["mean", "sum"]),
    default="mean",
    show_default=True,
    help="A sample's loss over its own targets.",
)

QUESTION = (
    store,
    click.option("--val-set", required=True, metavar="PATH", help="Val set, in any form of a corpus."),
    click.option(
        "--part",
        multiple=True,
        metavar="NAME",
        callback=one_or_several,
        help="Part to search (default: the only one). Repeated: builds of the same rows at successive checkpoints, "
        "whose scores are summed.",
    ),
    click.option(
        "--part-weights",
        metavar="W",
        callback=weights,
        help="Of several --part: learning-rate (of their checkpoints, the default), equal, or a number each, "
        "comma-separated.",
    ),
    click.option("--group-field", metavar="NAME", help="Field of the val set by which it is cut into groups."),
    click.option(
        "--combine",
        type=click.Choice(["mean", "max", "rank-fusion"]),
        default="mean",
        show_default=True,
        help="The ranking over all groups: by the mean or the largest of a row's scores, or by the sum of 1 / (60 + "
        "its rank).",
    ),
    click.option(
        "--metric", type=click.Choice(["cosine", "dot"]), default="cosine", show_default=True, help="The score."
    ),
    click.option("--layers", callback=patterns, help="Score these layers only (parts of plain blocks)."),
    click.option("--exclude-layers", callback=patterns, help="Score without these layers."),
    click.option(
        "--precondition",
        type=click.Choice(["none", "second-moment"]),
        default="none",
        show_default=True,
        help="Score with the damped inverse of the second moment of the part's rows, block by block.",
    ),
    click.option("--damping", type=float, help="Of --precondition, relative to the mean eigenvalue (default: 0.1)."),
    click.option("--max-samples", type=int, help="Only the first samples of the val set."),
    click.option("--checkpoint", metavar="PATH", help="Another path to the checkpoint the part was built from."),
    click.option(
        "--with-scores",
        metavar="RUN",
        help="Blend with the values of this training run of the store: (1-W)·z(similarity) + W·z(value). The value of "
        "a row is Σ learning rate × score of its sample; z standardises over the rows that have both. Rows without a "
        "value are left out, unless W is 0.",
    ),
    click.option(
        "--score-weight",
        type=float,
        metavar="W",
        help="W of --with-scores, 0 (similarity alone) to 1 (values alone); default: 0.5.",
    ),
)

PROJECTION = (
    click.option(
        "--proj-layers",
        default="mlp,attn",
        show_default=True,
        callback=patterns,
        help="Layers: mlp, attn, norm, embeddings, head, all, module paths or globs; comma-separated.",
    ),
    click.option("--include-embeddings", is_flag=True, help="Project the embedding layers too."),
    click.option(
        "--proj-rank-total",
        metavar="N|full",
        callback=number_or("full"),
        help="Numbers of a layer's block, k_in × k_out (default: 4096 before the sketch). Without "
        "--proj-compress: plain Kronecker blocks, whose scores can be taken by layer.",
    ),
    click.option("--proj-rank-min", type=int, default=1, show_default=True, help="Least rank of either side."),
    click.option(
        "--proj-compress",
        metavar="K|none",
        default="auto",
        show_default=True,
        callback=number_or("none", "auto"),
        help="Sketch the whole vector to K numbers; auto: 64 a layer.",
    ),
    click.option(
        "--proj-kind",
        type=click.Choice(["gaussian", "rademacher", "orthonormal", "pca"]),
        default="gaussian",
        show_default=True,
        help="How matrices are drawn; pca: the principal directions of the gradients, learned (build alone).",
    ),
    click.option("--proj-row-orthonormal", is_flag=True, help="The same as --proj-kind orthonormal."),
    click.option("--proj-seed", type=int, default=0, show_default=True, help="Seed of the matrices."),
)

LEARNED_PROJECTION = (
    click.option(
        "--proj-compress-by",
        type=click.Choice(["auto", "layer", "all"]),
        default="auto",
        show_default=True,
        help="layer: a sketch of each layer, sized by its share of the gradient, so that --layers can be asked "
        "for; all: one of all together; auto: layer where anything is learned.",
    ),
    click.option(
        "--proj-precondition",
        type=click.Choice(["auto", "none", "kronecker"]),
        default="auto",
        show_default=True,
        help="kronecker: scores are products in the inverse second moment of the gradients, which is learned as two "
        "factors a layer (K-FAC); auto: kronecker, unless --optimizer-state, pca or full blocks are given.",
    ),
    click.option(
        "--proj-damping",
        type=float,
        default=0.1,
        show_default=True,
        help="Of --proj-precondition, relative to the mean eigenvalue of each factor.",
    ),
    click.option(
        "--calibration-samples",
        type=int,
        default=256,
        show_default=True,
        help="Samples of the corpus that the projection is learned from.",
    ),
)
LEARNED_FIELDS = {
    "proj_precondition": "precondition",
    "proj_damping": "damping",
    "calibration_samples": "calibration_samples",
}
"""Names of options and of fields of a ProjectionConfig."""
