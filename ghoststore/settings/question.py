"""Options of ``ghoststore query`` and ``ghoststore select``: the val set, and how samples are scored for it."""

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Literal

from ghoststore.errors import UsageError
from ghoststore.settings.option import about, check_at_least, option, options
from ghoststore.settings.shared import (
    FIRST_VAL_SAMPLES,
    STORE,
    BehindOption,
    Checkpoint,
    Data,
    DeviceOption,
    EngineOptions,
    FieldsOption,
    LayersOptions,
    MetricOption,
    ProgressOption,
    RankingOptions,
    StoreOption,
    TokenizerSource,
    WeightOption,
    WhereOption,
)

NO_VAL_SET = "give `val_set`: what is asked for is near its gradient"
Combine = Literal["mean", "max", "rank-fusion"]
Precondition = Literal["none", "second-moment"]
PartWeights = str | Sequence[float]
"""``learning-rate``, ``equal``, or a number for each part."""
Index = Literal["exact", "ann"]
Spread = Literal["proportional", "equal"]
Quotas = Mapping[str, float] | Spread
"""The quota of each domain: a float is a share of the budget, an int a number of samples. Or one rule for
all domains.
"""
Diversity = Literal["none", "mmr", "facility-location", "greats"]
Leaks = Literal["exclude", "keep", "error"]
Order = Literal["corpus", "score"]
RerankWith = Literal["exact", "ekfac", "cg", "vectors"]


def parse_weights(word: str) -> PartWeights:
    """The weights in ``word``: ``learning-rate``, ``equal``, or comma-separated numbers. ValueError for
    another word.
    """
    if word in ("learning-rate", "equal"):
        return word
    try:
        return tuple(float(piece) for piece in word.split(","))
    except ValueError:
        raise ValueError(f"{word!r} is neither learning-rate, equal, nor numbers with commas between them") from None


def parse_quota(word: str) -> tuple[str, float]:
    """(domain, quota) in ``word``: ``DOMAIN=0.3`` (a share) or ``DOMAIN=100`` (samples). The last ``=`` separates them.

    ValueError for another word.
    """
    domain, _, number = word.rpartition("=")
    if not domain:
        raise ValueError(f"{word!r}: expected DOMAIN=SHARE or DOMAIN=SAMPLES")
    try:
        return domain, float(number) if {".", "e"} & set(number) else int(number)
    except ValueError:
        raise ValueError(f"{word!r}: {number!r} is neither a share (0.3) nor a number of samples (100)") from None


def quotas_of(quota: Sequence[tuple[str, float]]) -> dict[str, float]:
    """``quotas`` as a mapping, of (domain, quota) as :func:`parse_quota` reads them. UsageError for a domain that has
    two.
    """
    domains = [domain for domain, _ in quota]
    for domain in domains:
        if domains.count(domain) > 1:
            raise UsageError(f"`quota`: {domain!r} has two quotas")
    return dict(quota)


@options
class ValSetOption:
    """The option for a val set."""

    val_set: Data = field(metadata=about("Val set, in any form of a corpus.", "Input"))


@options
class RunGradientsOptions:
    """The gradients that a training run keeps, in the place of a part."""

    run: str | None = option(
        None,
        "In the place of a part: the gradients that this training run keeps (`ghoststore train --keep-gradients`), now "
        "or while it trains. A sample's score is the sum over the steps that it was in. With `val_set` and a "
        "`checkpoint` of that training; or, without, against each step's own val gradient.",
        "Input",
    )
    step_window: str | slice | None = option(
        None,
        "Of `run`: only steps from A up to, not including, B, as of `ghoststore scores --steps`.",
        "Scoring",
        metavar="A:B",
    )
    last: int | None = option(None, "Of `run`: only the last N committed steps.", "Scoring", metavar="N")


@options
class PartsOptions:
    """The options for one part, or for several whose scores are summed."""

    part: str | Sequence[str] | None = option(
        None,
        "Part of the store (default: the only one). Repeated: parts of other rows (built `like` one another), ranked "
        "as one, or builds of the same rows at successive checkpoints, whose scores are summed.",
        "Input",
        repeated=True,
    )
    part_weights: PartWeights | None = option(
        None,
        "Weights of several `part`: learning-rate (of their checkpoints, the default), equal, or a number each, "
        "comma-separated.",
        "Scoring",
        metavar="W",
        parse=parse_weights,
    )


@options
class OpenedAgain(BehindOption, DeviceOption):
    """The options for the inputs that an existing part was built from, without the checkpoint."""

    tokenizer: TokenizerSource | None = option(
        None, "The tokenizer the part was built with (default: where your own build read it).", "Model"
    )
    base: str | Path | None = option(
        None,
        "Where the checkpoint is an adapter: the folder of its base (default: as in your own build).",
        "Model",
        metavar="MODEL",
    )


@options
class RebuiltOptions(OpenedAgain):
    """The options for the inputs that an existing part was built from."""

    checkpoint: Checkpoint | None = option(
        None, "The checkpoint the part was built from (default: where your own build read it).", "Model"
    )


@options
class QuestionOptions(
    OpenedAgain, FieldsOption, LayersOptions, WhereOption, MetricOption, WeightOption, PartsOptions, StoreOption
):
    """The options that say what is scored against what."""

    val_set: Data | None = option(None, "Val set, in any form of a corpus; needed without `run`.", "Input")
    minus: Data | None = option(
        None,
        "A second val set, to be far from: its mean gradient is subtracted from that of `val_set`.",
        "Input",
        metavar="VAL_SET",
    )
    checkpoint: Checkpoint | Sequence[Checkpoint] | None = option(
        None,
        "The checkpoint the part was built from (default: where your own build read it); once for each `part`.",
        "Model",
        repeated=True,
    )
    group_field: str | None = option(None, "Field of the val set that divides it into groups.", "Input")
    combine: Combine = option(
        "mean",
        "The ranking over all groups: by the mean or the largest of a row's scores, or by the sum of 1 / (60 + its "
        "rank).",
        "Scoring",
    )
    precondition: Precondition = option(
        "none", "Score with the damped inverse of the second moment of the part's rows, block by block.", "Scoring"
    )
    damping: float | None = option(
        None, "Damping of `precondition`, relative to the mean eigenvalue (default: 0.1).", "Scoring"
    )
    max_samples: int | None = option(None, f"{FIRST_VAL_SAMPLES} `minus` is read whole.", "Input")
    phrase: str | None = option(
        None,
        "Of a val set of one sample: rank by the characters A up to, not including, B of its text alone. The model "
        "reads all of it; the loss is that of the phrase.",
        "Scoring",
        metavar="A:B",
    )
    with_scores: str | None = option(
        None,
        "Blend with the values of this training run of the store: (1-W)·z(similarity) + W·z(value). The value of a "
        "row is Σ `weight` × score of its sample; z standardises over the rows that have both. Rows without a value "
        "are left out, unless W is 0.",
        "Scoring",
        metavar="RUN",
    )
    score_weight: float | None = option(
        None, "W of `with_scores`, 0 (similarity alone) to 1 (values alone); default: 0.5.", "Scoring", metavar="W"
    )
    lexical: float | None = option(
        None,
        "Blend with BM25 of the texts: (1-W)·z(similarity) + W·z(BM25), W from 0 (gradients alone, the default) to 1 "
        "(words alone); 0.1 is a good one. Needs the texts of all rows.",
        "Scoring",
        metavar="W",
    )


@options
class RerankOptions:
    """The options of the second stage of a query."""

    rerank: int | None = option(
        None,
        "Second stage: rank the N best rows anew, by gradients that the model computes again (see `rerank_with`).",
        "Scoring",
        metavar="N",
    )
    rerank_with: RerankWith = option(
        "exact",
        "Of `rerank`: whole gradients in the part's metric (exact), with its eigenvalues measured (ekfac), for the "
        "query that conjugate gradients improve (cg), or vectors as the part has them, not rounded (vectors).",
        "Scoring",
    )
    rerank_samples: int | None = option(
        None,
        "Rows of the corpus that `rerank_with` ekfac and cg learn from (default: 256, 128).",
        "Advanced",
        metavar="N",
    )
    rerank_damping: float | None = option(
        None,
        "Damping of `rerank`, relative to the mean eigenvalue of a layer's factor (default: 0.01; cg: 0.1, relative to "
        "that of a layer).",
        "Advanced",
    )
    cg_steps: int | None = option(
        None,
        "Steps of conjugate gradients (default: 8). Each takes a few passes over the rows.",
        "Advanced",
        metavar="N",
    )

    def refuse_contradictions(self) -> None:
        """UsageError for values that are none, and for options that belong to another way."""
        check_at_least(1, rerank=self.rerank, rerank_samples=self.rerank_samples, cg_steps=self.cg_steps)
        if self.rerank_damping is not None and not self.rerank_damping > 0:
            raise UsageError(f"`rerank_damping` must be more than 0, not {self.rerank_damping}")
        if self.rerank is None and self.rerank_with != "exact":
            raise UsageError(f"`rerank_with={self.rerank_with}` belongs to `rerank`, the number of rows: give it, too")
        learns = self.rerank is not None and self.rerank_with in ("ekfac", "cg")
        damps = self.rerank is not None and self.rerank_with != "vectors"
        for name, value, fits in (
            ("rerank_samples", self.rerank_samples, learns),
            ("rerank_damping", self.rerank_damping, damps),
            ("cg_steps", self.cg_steps, learns and self.rerank_with == "cg"),
        ):
            if value is not None and not fits:
                ways = "`rerank_with=cg`" if name == "cg_steps" else "`rerank_with=ekfac` and `rerank_with=cg`"
                ways = "whole gradients, not with `rerank_with=vectors`" if name == "rerank_damping" else ways
                raise UsageError(f"`{name}` belongs to `rerank` with {ways}")


@options
class QueryOptions(ProgressOption, RankingOptions, EngineOptions, RerankOptions, RunGradientsOptions, QuestionOptions):
    """Options of ``ghoststore query``."""

    near: int | None = option(
        None,
        "In the place of a val set: this row of the corpus (`source_row` of a result). Its stored vector is asked "
        "with; no model is needed.",
        "Input",
        metavar="ROW",
    )
    store: str | Path = option(
        "", f"{STORE} With `server`: the name of a store there, if it has several.", "Input", metavar="PATH"
    )
    server: str | None = option(
        None,
        "Ask an explorer, which has the model already: the address that `ghoststore serve` printed. Its token may be "
        "in GHOSTSTORE_TOKEN instead.",
        "Input",
        metavar="URL",
    )
    each: bool = option(
        False,
        "One ranking for each val sample, or one for the val set's mean gradient.",
        "Scoring",
        flag="--each/--mean",
    )
    index: Index = option(
        "exact",
        "Read every vector, or take candidates from a FAISS index (`ghoststore index`) and score these exactly.",
        "Advanced",
    )
    index_name: str | None = option(None, "Index of `index=ann` (default: the only one for the metric).", "Advanced")
    tokens: bool = option(
        False,
        "Show which tokens of a row carry its score, and which of the val sample ask for it: the model computes the "
        "rows shown again.",
        "Output",
    )
    histogram: bool = option(
        False, "Also count the scores of all rows in 60 bins, and the rows of each domain.", "Output"
    )
    candidates: bool = option(
        False, "Of a `run` that chose: count candidates that were not trained on, too, all alike.", "Scoring"
    )
    report: str | Path | None = option(
        None, "Write a new .html file: one page with texts, histograms, domains, layers.", "Output", metavar="FILE"
    )

    def refuse_contradictions(self) -> None:
        """UsageError where nothing is asked for, and for options of the second stage that belong to another way."""
        if self.val_set is None and self.near is None and self.run is None:
            raise UsageError(NO_VAL_SET)
        RerankOptions.refuse_contradictions(self)


@options
class OpenOptions(ProgressOption, EngineOptions, RebuiltOptions):
    """Options of ``ghoststore.open``."""

    store: str | Path = field(kw_only=False, metadata=about(STORE, "Input"))
    part: str | None = option(None, "Part of the session (default: the only one).", "Input")


@options
class SelfInfluenceOptions(
    ProgressOption, RankingOptions, BehindOption, DeviceOption, LayersOptions, WhereOption, StoreOption
):
    """Options of ``ghoststore self-influence``."""

    part: str | None = option(None, "Part to rank (default: the only one).", "Input")
    damping: float | None = option(
        None, "Damping, relative to the mean eigenvalue of the second moment (default: 0.1).", "Scoring"
    )


@options
class SelectOptions(ProgressOption, RunGradientsOptions, QuestionOptions):
    """Options of ``ghoststore select``."""

    out: str | Path = field(
        metadata=about(
            "New file or folder, in the form of the corpus; or .jsonl, .parquet, or a folder of save_to_disk.", "Output"
        )
    )
    fraction: float | None = option(None, "Choose this share of the samples that can be chosen.", "Output")
    count: int | None = option(None, "Choose N samples.", "Output", metavar="N")
    threshold: float | None = option(None, "Choose every sample with at least this score.", "Output")
    threshold_nats: float | None = option(
        None, "Choose every sample with at least this score in nats, as tables of `query` show it.", "Output"
    )
    token_budget: int | None = option(
        None, "Choose from the top while all together have N tokens.", "Output", metavar="N"
    )
    quotas: Quotas | None = option(
        None,
        "A quota for every domain: as in the corpus, or the same for all. Or one for each of some with `quota`.",
        "Scoring",
        choices=("proportional", "equal"),
    )
    diversity: Diversity = option(
        "none",
        "Also make the chosen samples differ: maximal marginal relevance, facility location, or the greedy GREATS.",
        "Scoring",
    )
    diversity_weight: float | None = option(
        None,
        "mmr: 0 (score alone) to 1 (diversity alone), default 0.5. greats: 0 or more, default 1.",
        "Scoring",
        metavar="W",
    )
    candidates: int | None = option(
        None, "With `diversity`, choose among the N best (default: 4 for each to choose).", "Scoring", metavar="N"
    )
    all_candidates: bool = option(
        False, "Of a `run` that chose: choose from candidates that were not trained on, too, all alike.", "Scoring"
    )
    leaks: Leaks = option("exclude", "What to do with near-duplicates of the val set in the corpus.", "Scoring")
    order: Order = option("corpus", "Order of the rows in `out`.", "Output")
    report: str | Path | None = option(
        None, "New .json file for the report (default: `out` and .report.json).", "Output", metavar="FILE"
    )
    card: bool = option(
        False, "Also a Hugging Face dataset card: README.md, in a folder `out`, or beside a file.", "Output"
    )


@options
class QuotaOption:
    """Of the command line alone: the option for ``quotas`` as a mapping."""

    quota: Sequence[tuple[str, float]] = option(
        (),
        "Quota of a domain: a share of what is chosen (0.3), or a number of samples (100); repeatable. The other "
        "domains share the rest.",
        "Scoring",
        metavar="DOMAIN=Q",
        repeated=True,
        parse=parse_quota,
    )
