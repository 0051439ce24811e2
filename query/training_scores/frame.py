"""The data of one frame of ``ghoststore watch``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ghoststore.settings.shared import StepWeight, WeightOption

RunState = Literal["running", "stopped", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extreme:
    """One of the best or worst samples so far, by Σ weight·score."""

    id: str
    id_repeats: bool
    """Whether other samples of the run have the same id. ``source_row`` then tells which one this is."""
    source_row: int
    domain: str | None
    value: float
    times: int
    text: str | None
    """The sample's text; None if the corpus cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainTrend:
    """The scores of one domain so far. The ``domain`` None stands for samples without one."""

    domain: str | None
    times: int
    value_per_time: float | None
    """Σ weight·score ÷ times; None where no score of the domain counts."""
    negative_share: float | None
    kept_share: float | None
    """Share of the domain's candidates that were trained on; None for a run that does not choose."""
    trend: list[float | None]
    """``value_per_time`` in each bin of steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Means in equal bins of steps; None for a bin without a finite number."""

    steps: list[float]
    """The middle of each bin, in steps."""
    train_loss: list[float | None]
    val_loss: list[float | None]
    learning_rate: list[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainMeans:
    """The mean weight·score of one domain in each bin of steps. The ``domain`` None stands for samples without one."""

    domain: str | None
    mean: list[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSpread:
    """Scores in equal bins of steps, unweighted but for ``domains``; None for a bin without any."""

    steps: list[float]
    """The middle of each bin, in steps."""
    mean: list[float | None]
    quantiles: list[float]
    """Which quantiles the ``bands`` are, 0 to 1."""
    bands: list[list[float | None]]
    """One list for each quantile. A number is off by at most 1/64 of itself."""
    domains: list[DomainMeans]
    groups: dict[str, list[float | None]]
    """The mean score for each val group."""
    kept_share: list[float | None] | None
    """Share of the candidates that were trained on; None for a run that does not choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A run at one moment. Losses are in nats a token. A number that does not exist yet is None."""

    store: str
    run: str | None
    runs: int = 1
    """Runs that there were to follow, where none was named."""
    waiting: str | None = None
    """What ``watch`` waits for; None once there are steps."""
    notes: list[str] = field(default_factory=list)
    repeated_ids: dict[str, int] | None = None
    """Number of ``ids`` that occur more than once, and of ``samples`` that have them; None if every id is unique."""
    planned: int = 0
    """Steps of the whole run."""
    steps: int = 0
    """Committed steps."""
    unread: int = 0
    """Committed steps that this frame does not contain yet."""
    finished: bool = False
    """Whether the last step is committed."""
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of missing steps between committed ones, half-open."""
    state: RunState | None = None
    """``running`` while a process writes the run, ``stopped`` if none does and steps are missing, else ``finished``;
    None without a run, and for an unfinished one in object storage, where nothing shows who writes.
    """
    writer: dict[str, Any] | None = None
    """The process that writes the run, or wrote it last: host, pid, command, since, touched (both in seconds since
    1970), alive.
    """
    silent: float | None = None
    """Seconds since the last sign of a writer; None unless the run is stopped."""
    commit_age: float | None = None
    """Seconds since the last commit."""
    seconds_left: float | None = None
    """Remaining steps × mean seconds of a recent step, without evaluations and checkpoints. None if nobody writes."""
    train_loss: float | None = None
    val_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    """Tokens a second in the recent steps."""
    seconds_per_step: float | None = None
    """Mean over the recent steps."""
    score_share: float | None = None
    """Share of the time of the recent steps that scoring took, 0 to 1."""
    scored: int = 0
    left_out: int = 0
    """Scores that are NaN or infinite."""
    negative_share: float | None = None
    weight: StepWeight = WeightOption.weight
    """What the score of a step counts with in the values of samples and domains."""
    candidates: int | None = None
    """Samples that steps chose among; None for a run that does not choose."""
    kept: int | None = None
    """Those of the candidates that were trained on."""
    kept_share: float | None = None
    recent_kept_share: float | None = None
    """Of the recent steps."""
    recent_scores: int = 0
    recent_negative_share: float | None = None
    histogram: list[int] = field(default_factory=list)
    """Counts of the recent scores; those beyond the edges are in the first and the last bin."""
    histogram_edges: list[float] = field(default_factory=list)
    best: list[Extreme] = field(default_factory=list)
    worst: list[Extreme] = field(default_factory=list)
    domains: list[DomainTrend] = field(default_factory=list)
    """The domains, highest value per time first."""
    curve: Curve | None = None
    spread: ScoreSpread | None = None
    """For the explorer alone: None, and not in the document of the command line, unless the watcher was asked for it.
    """

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore watch --once --json`` prints."""
        document = asdict(self)
        if self.spread is None:
            del document["spread"]
        return document
