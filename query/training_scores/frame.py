"""What a frame of ``ghoststore watch`` holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

RunState = Literal["running", "stopped", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extreme:
    """One of the best or worst samples so far, by Σ η·score."""

    id: str
    id_repeats: bool
    """Whether other samples of the run have this id, too: then ``source_row`` tells which one it is."""
    source_row: int
    domain: str | None
    value: float
    times: int
    text: str | None
    """None where the corpus is not at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainTrend:
    """One domain so far; None are the samples without one."""

    domain: str | None
    times: int
    value_per_time: float
    """Σ η·score ÷ times."""
    negative_share: float
    trend: list[float | None]
    """The same, bin by bin of the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Means in equal bins of steps; None where a bin has no finite number."""

    steps: list[float]
    """The middle of each bin."""
    train_loss: list[float | None]
    val_loss: list[float | None]
    learning_rate: list[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A run at one moment. Losses are nats a token; None where there is no number yet."""

    store: str
    run: str | None
    waiting: str | None = None
    """What is waited for; None once there are steps."""
    notes: list[str] = field(default_factory=list)
    repeated_ids: dict[str, int] | None = None
    """``ids`` that occur more than once, and the ``samples`` that have them; None where every id is unique."""
    planned: int = 0
    steps: int = 0
    """Committed steps."""
    unread: int = 0
    """Of these, not in this frame yet."""
    finished: bool = False
    """Whether the last step is committed."""
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of steps that are missing among the committed ones."""
    state: RunState | None = None
    """``running`` while a process writes it, ``stopped`` where none does and steps are missing; None without a run."""
    writer: dict[str, Any] | None = None
    """The process that writes it, or wrote it last: host, pid, command, since, touched (seconds since 1970), alive."""
    silent: float | None = None
    """Seconds without a writer; None unless it is stopped."""
    commit_age: float | None = None
    """Seconds since the last commit."""
    seconds_left: float | None = None
    """Steps to come × seconds of a recent step: evaluations and checkpoints aside. None where nobody writes."""
    train_loss: float | None = None
    val_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    """Of the recent steps."""
    score_share: float | None = None
    """Share of the recent steps' time that scoring took."""
    scored: int = 0
    left_out: int = 0
    """Scores that are NaN, infinite, or of a step without a learning rate."""
    negative_share: float | None = None
    recent_scores: int = 0
    recent_negative_share: float | None = None
    histogram: list[int] = field(default_factory=list)
    """Of the recent scores; those beyond the edges are in the first and last bin."""
    histogram_edges: list[float] = field(default_factory=list)
    best: list[Extreme] = field(default_factory=list)
    worst: list[Extreme] = field(default_factory=list)
    domains: list[DomainTrend] = field(default_factory=list)
    """By falling value per time."""
    curve: Curve | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore watch --once --json`` prints."""
        return asdict(self)
