"""What every kind of projection keeps of the rankings by exact gradients, at the same numbers a layer, and what its
build costs.

Legend: Q val samples, R rows, D numbers of a stored vector.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import (
    BuildWatch,
    Clock,
    Results,
    Spread,
    Table,
    folders,
    in_fresh_process,
    machine_facts,
    ratios,
    scratch_folder,
    write_jsonl,
)
from domains import Rows, read_rows, train
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import Corpus, Part, ProjectionConfig, Store
from ghoststore.checkpoint.load import find_checkpoint, load_model, load_tokenizer
from ghoststore.progress import Silent
from indexer.build.corpus_plan import LearningSample
from indexer.build.inputs import DEFAULT_BATCH_TOKENS
from indexer.encode.batching import plan_batches
from indexer.encode.encoder import pad
from indexer.encode.tokens import Tokenizer, TokenSettings, rows_of
from indexer.training.architectures import ARCHITECTURES
from query.ask.encoder import PartEncoder
from query.exact.products import Products, Share
from query.fidelity.agreement import Agreement, Estimate, agreement
from query.fidelity.fidelity import (
    exact_gradients,
    finite_pairs,
    has_own_metric,
    measure_exactly,
    pieces_of,
    vector_products,
)
from query.fidelity.sample import RowSample, SampleSpec

SHAPE = ARCHITECTURES["GPT2-Tiny"]
MATRICES = 4 * SHAPE.layers
NUMBERS = (16, 64, 256, 1024)
LEARNED_ROWS = ProjectionConfig().calibration_samples
LEARNING = "learning the projection"
ELSEWHERE = {16: 0.61, 64: 0.73, 256: 0.82, 1024: 0.885}
"""Spearman of plain gaussian Kronecker blocks by numbers a layer, as the field has measured it on another model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One way to project, at any number of numbers a layer."""

    label: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    sketched: bool = False
    """Blocks of 64 × 64 first."""
    dtype: str = "int8"

    def projection(self, numbers: int) -> ProjectionConfig:
        size = {"compress": numbers * MATRICES} if self.sketched else {"rank_total": numbers}
        return ProjectionConfig(**size, **self.settings)


@dataclass(frozen=True, slots=True)
class Case:
    """One part."""

    line: Line
    numbers: int

    @property
    def name(self) -> str:
        return f"{self.line.name}-{self.numbers}"


PLAIN = {"precondition": "none"}
LINES = (
    Line(label="gaussian", name="gaussian", settings=PLAIN),
    Line(label="gaussian, drawn again", name="gaussian-again", settings={**PLAIN, "seed": 1}),
    Line(label="rademacher", name="rademacher", settings={**PLAIN, "kind": "rademacher"}),
    Line(label="orthonormal", name="orthonormal", settings={**PLAIN, "kind": "orthonormal"}),
    *(
        Line(
            label=f"gaussian 64 × 64, {words}, {dtype}",
            name=f"sketch-{by}-{dtype}",
            settings={**PLAIN, "compress_by": by},
            sketched=True,
            dtype=dtype,
        )
        for by, words in (("all", "sketched together"), ("layer", "sketched by layer"))
        for dtype in ("float32", "int8")
    ),
    Line(label="pca", name="pca", settings={**PLAIN, "kind": "pca"}),
    Line(label="pca 64 × 64, sketched by layer", name="pca-sketch", settings={**PLAIN, "kind": "pca"}, sketched=True),
    Line(label="gaussian, preconditioned", name="kronecker", settings={"precondition": "kronecker"}),
    Line(
        label="gaussian 64 × 64, preconditioned, sketched by layer (default)",
        name="kronecker-sketch",
        sketched=True,
        settings={"precondition": "kronecker"},
    ),
)
CASES = [Case(line, numbers) for line in LINES for numbers in NUMBERS]
PLAINEST = CASES[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is built, and how often."""

    folder: Path
    """Holds the checkpoint and the corpus; the parts of the first repeat go to its store."""
    max_length: int
    repeats: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def corpus(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def store(self) -> Path:
        return self.folder / "store"


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU seconds on one thread, repeat by repeat."""

    plain: list[float]
    """A forward and backward pass over the rows with the gradients of all weights."""
    building: dict[str, list[float]]
    """By part: tokens, vectors, writing."""
    learning: dict[str, list[float]]
    """By part: what is learned from a sample before; 0 where nothing is."""


def write_corpus(rows: Rows, path: Path, count: int) -> None:
    """``count`` rows at random, and as many more as a projection is learned from."""
    if len(rows) < count + LEARNED_ROWS:
        raise click.UsageError(
            f"--rows {count} and the {LEARNED_ROWS} that projections are learned from are more than the {len(rows)} "
            "rows of --data"
        )
    chosen = np.random.default_rng(0).choice(len(rows), count + LEARNED_ROWS, replace=False)
    write_jsonl(path, [rows[place] for place in sorted(chosen)])


def ranked_rows(part: Part, corpus: Path) -> NDArray[np.int64]:
    """The usable rows of ``part`` that no projection is learned from: principal directions fit those best."""
    learned = LearningSample(LEARNED_ROWS)
    for sample in Corpus.open(str(corpus)).samples():
        learned.see(sample)
    return np.setdiff1d(part.row_numbers[part.usable()], [sample.source_row for sample in learned.samples])


def measure_costs(setting: Setting) -> Costs:
    """Build every part, all in turns in each repeat. For a fresh process of one thread."""
    costs = Costs([], {case.name: [] for case in CASES}, {case.name: [] for case in CASES})
    build_once(setting, PLAINEST, setting.folder / "warm")  # the first batches of a process take longer
    for repeat in range(setting.repeats):
        store = setting.store if repeat == 0 else setting.folder / f"store-{repeat}"
        costs.plain.append(plain_seconds(setting))
        for case in CASES:
            spent = build_once(setting, case, store).spent
            costs.building[case.name].append(spent["building"].cpu)
            costs.learning[case.name].append(spent[LEARNING].cpu if LEARNING in spent else 0.0)
            print(f"built: {case.name}, repeat {repeat}", file=sys.stderr, flush=True)
    return costs


def build_once(setting: Setting, case: Case, store: Path) -> BuildWatch:
    watch = BuildWatch()
    report = ghoststore.build(
        checkpoint=setting.checkpoint,
        data=setting.corpus,
        store=store,
        name=case.name,
        progress=watch,
        max_length=setting.max_length,
        projection=case.line.projection(case.numbers),
        proj_dtype=case.line.dtype,
        device="cpu",
    )
    assert report.layers == MATRICES
    assert report.dimension == case.numbers * MATRICES, f"{case.name} has {report.dimension} numbers"
    return watch


def plain_seconds(setting: Setting) -> float:
    """CPU seconds of a training step's passes over the batches of a build."""
    found = find_checkpoint(setting.checkpoint)
    model, tokenizer = load_model(found), Tokenizer(load_tokenizer(found.folder))
    model.loss_type = "ForCausalLM"  # what transformers takes anyway, after a warning
    samples = Corpus.open(str(setting.corpus)).samples()
    rows = [
        row for row in rows_of(samples, tokenizer, TokenSettings(max_length=setting.max_length)) if row.status.usable
    ]
    batches = plan_batches([len(row.tokens) for row in rows], DEFAULT_BATCH_TOKENS["cpu"])

    def step(batch: Sequence[int]) -> None:
        ids, labels, mask = pad([rows[place] for place in batch])
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()

    step(batches[0])  # touches its memory for the first time
    began = Clock.now()
    for batch in batches:
        step(batch)
    return Clock.now().since(began).cpu


@dataclass(frozen=True, slots=True)
class References:
    """The same rows and val samples for every part, and their exact products: computed once a metric."""

    sample: RowSample
    plain: dict[Share, Products]
    preconditioned: dict[Share, Products]
    preconditioner: str
    """Digest of the one that all preconditioned parts must have."""

    @classmethod
    def measure(cls, store: Store, corpus: Path, spec: SampleSpec) -> References:
        """By the models of two parts."""
        plain, other = (store.part(Case(line, NUMBERS[0]).name) for line in (LINES[0], LINES[-1]))
        sample = sample_of(plain, ranked_rows(plain, corpus), spec)
        return cls(sample, exact_of(plain, sample), exact_of(other, sample), preconditioner_of(other))

    def of(self, part: Part) -> dict[str, Products]:
        """Those that ``part`` is compared with: of its layers and, where it has no metric of its own, of all."""
        if not has_own_metric(part):
            return {"layers": self.plain["layers"], "all": self.plain["layers"] + self.plain["rest"]}
        assert preconditioner_of(part) == self.preconditioner, f"{part.name} is in another metric"
        return {"layers": self.preconditioned["layers"]}


def preconditioner_of(part: Part) -> str:
    return str(part.manifest["projection"]["calibration"]["preconditioner"])


def sample_of(part: Part, places: NDArray[np.int64], spec: SampleSpec) -> RowSample:
    """The rows ``places`` and the val samples, and how ``part`` sees these, as in a query."""
    encoder = PartEncoder(part, device="cpu")
    rows, vals = encoder.source_rows(places), spec.read_vals(encoder, places, Silent())
    return RowSample(places, rows, vals, encoder.vectors(vals))


def exact_of(part: Part, sample: RowSample) -> dict[Share, Products]:
    """Exact products of the sampled rows in the metric of ``part``, each gradient by plain autograd."""
    encoder = PartEncoder(part, device="cpu")
    pieces = pieces_of(encoder)
    found = measure_exactly(exact_gradients(encoder, pieces), pieces, sample, Silent())
    assert all(one.all() for one in finite_pairs(found.values(), Silent())), "a gradient is not finite"
    return found


def compared(part: Part, references: References) -> dict[str, Agreement]:
    """The scores that a query gives the sampled rows with exact ones, by reference and metric."""
    queries_QD = PartEncoder(part, device="cpu").vectors(references.sample.vals)
    found = vector_products(part, replace(references.sample, queries_QD=queries_QD))
    return {
        f"{name}, {metric}": agreement(found.scores(metric), exact.scores(metric))
        for name, exact in references.of(part).items()
        for metric in ("cosine", "dot")
    }


def shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def quality_cells(found: Mapping[str, Agreement]) -> dict[str, str]:
    """Columns for both references; – where one is not known."""
    cells = {}
    for name in ("layers", "all"):
        cosine, dot = (found.get(f"{name}, {metric}") for metric in ("cosine", "dot"))
        cells |= {
            f"{name}: Spearman": shown(cosine.spearman) if cosine else "–",
            f"{name}: recall@10": f"{cosine.recall.value:.2f}" if cosine else "–",
            f"{name}: relative error": f"{cosine.relative_error.value:.3f}" if cosine else "–",
            f"{name}: Spearman of dots": f"{dot.spearman.value:.3f}" if dot else "–",
        }
    return cells


def cost_cells(costs: Costs, case: Case) -> dict[str, str]:
    building, learning = costs.building[case.name], costs.learning[case.name]
    return {
        "build ÷ plainest": f"{ratios(building, costs.building[PLAINEST.name]).median:.2f}",
        "build ÷ passes": f"{ratios(building, costs.plain).median:.2f}",
        "learning, seconds": f"{Spread.of(learning).median:.1f}" if any(learning) else "–",
    }


def add_table(results: Results, store: Store, references: References, costs: Costs) -> None:
    rows, numbers = [], {}
    for case in CASES:
        part = store.part(case.name)
        found = compared(part, references)
        numbers[case.name] = {"bytes": part.layout.row_bytes, **{key: one.to_json() for key, one in found.items()}}
        rows.append(
            {
                "projection": case.line.label,
                "numbers a layer": f"{case.numbers:,}",
                "bytes a sample": f"{part.layout.row_bytes:,}",
                **quality_cells(found),
                **cost_cells(costs, case),
            }
        )
        print(f"compared: {case.name}", file=sys.stderr, flush=True)
    note = note_of(store.part(PLAINEST.name), references, costs)
    results.add(Table("Projections", rows, note), agreement=numbers, cpu_seconds=asdict(costs))


def note_of(part: Part, references: References, costs: Costs) -> str:
    sample, coverage = references.sample, part.manifest["coverage"]["share"]
    passes, plainest = Spread.of(costs.plain), Spread.of(costs.building[PLAINEST.name])
    elsewhere = ", ".join(f"{value} at {numbers:,}" for numbers, value in ELSEWHERE.items())
    return (
        f"{len(sample.rows)} rows ranked for {len(sample.vals)} val samples, by the stored vectors and by exact "
        f"gradients. `layers`: gradients of the {MATRICES} projected matrices ({coverage:.0%} of the parameters), for "
        "preconditioned parts in the same metric; `all`: of all parameters. Cosines unless dots are named; intervals "
        "(95 %) are over val samples, not over draws of the projection: the second line of gaussian shows those. int8 "
        "unless float32 is named. What is learned, is learned from other rows than those ranked. Build: CPU seconds on "
        f"one thread, medians of {plainest.repeats} repeat(s), of tokens, vectors and writing of all {part.rows} rows; "
        f"÷ {plainest.median:.2f} s of the plainest part (gaussian, {NUMBERS[0]} a layer), ÷ {passes.median:.2f} s of "
        "forward and backward passes with all weight gradients over the same batches. Learning comes on top, once a "
        f"build, from {LEARNED_ROWS} rows however large the corpus. For orientation: plain gaussian Kronecker blocks "
        f"were measured elsewhere, on another model, at a Spearman of {elsewhere} numbers a layer."
    )


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), required=True, help="Training corpus, with domains."
)
@click.option(
    "--val-set", type=click.Path(exists=True, path_type=Path), required=True, help="Val corpus, with domains."
)
@click.option("--minutes", type=float, default=4.0, show_default=True, help="How long to train.")
@click.option("--steps", type=int, help="Train so many steps instead.")
@click.option("--rows", "row_count", type=int, default=300, show_default=True, help="Rows that are ranked.")
@click.option("--val-samples", type=int, default=40, show_default=True, help="Val samples they are ranked for.")
@click.option("--max-length", type=int, default=256, show_default=True, help="Tokens of a sample.")
@click.option("--repeats", type=int, default=1, show_default=True, help="Of the builds, for their cost.")
@folders
def main(
    data: Path,
    val_set: Path,
    minutes: float,
    steps: int | None,
    row_count: int,
    val_samples: int,
    max_length: int,
    repeats: int,
    scratch: Path | None,
    out: Path,
) -> None:
    """Train a GPT2-Tiny, build parts with every projection, and compare their rankings with exact gradients'."""
    disable_progress_bar()
    torch.manual_seed(0)
    facts = machine_facts()
    rows = read_rows(data)
    with scratch_folder(scratch) as folder:
        setting = Setting(folder=folder, max_length=max_length, repeats=repeats)
        write_corpus(rows, setting.corpus, row_count)
        trained = train(rows, setting.checkpoint, minutes=minutes, steps=steps, max_length=max_length, shape=SHAPE)
        results = Results(
            name="projections",
            title="Kinds of projection against exact gradients",
            settings={
                "data": data.name,
                "val set": val_set.name,
                "train rows": len(rows),
                "max length": max_length,
                "repeats": repeats,
                **{f"training {key}": round(value, 3) for key, value in trained.items()},
            },
            facts=facts,
        )
        costs = in_fresh_process(measure_costs, setting, threads=1)
        store = Store.open(setting.store)
        spec = SampleSpec(rows=row_count, val_samples=val_samples, val_set=val_set)
        add_table(results, store, References.measure(store, setting.corpus, spec), costs)
    results.write(out)


if __name__ == "__main__":
    main()
