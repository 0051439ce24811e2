"""ghoststore beside other libraries: one checkpoint, the same rows, the same trainings on halves of the corpus.

Each way of scoring runs in processes of its own, in the Python of its library, with one thread, and exchanges nothing
but files with this script (see exchange.py). What is not installed, and what fails, is a line of the table too.

Legend: N rows, V val rows, M trainings on halves.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import Results, Table, machine_facts  # noqa: E402
from frontier import Case  # noqa: E402
from lds import MAX_LENGTH, demo_files, shown  # noqa: E402
from training_scores import own_groups  # noqa: E402

from ghoststore import Corpus  # noqa: E402
from ghoststore.checkpoint.load import find_checkpoint, load_tokenizer  # noqa: E402
from indexer.encode.tokens import Tokenizer, TokenSettings, rows_of  # noqa: E402
from query.demo.corpus import read_corpus  # noqa: E402
from query.evaluate.lds import Lds, lds, lds_difference  # noqa: E402

QUESTIONS = {"val_facts": "its words", "val_facts_paraphrased": "other words", "val_facts_inflected": "no shared word"}
SCRIPTS = {"ghoststore": "of_ghoststore", "bergson": "of_bergson", "dattri-llm": "of_dattri_llm", "dattri": "of_dattri"}
"""The script of each distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One line of the table."""

    of: str
    """The distribution."""
    name: str
    label: str
    build: str = ""
    """Ways with the same one share what they build."""
    few: bool = False
    """For some val rows alone: a question takes minutes a val row."""


WAYS = (
    Way(of="ghoststore", name="default", label="default", build="part"),
    Way(of="ghoststore", name="lexical", label="default with `--lexical 0.1`", build="part"),
    Way(of="ghoststore", name="exact", label="exact gradients in the default's metric", build="part"),
    Way(of="ghoststore", name="cg", label="`--rerank-with cg` of all rows", build="part", few=True),
    Way(of="ghoststore", name="tf-idf", label="TF-IDF"),
    Way(of="bergson", name="index-16-cosine", label="index, 16 × 16 a layer, cosine", build="index"),
    Way(of="bergson", name="index-16-dot", label="index, 16 × 16 a layer, dot", build="index"),
    Way(of="bergson", name="trackstar-16", label="TrackStar, 16 × 16 (default)"),
    Way(of="bergson", name="trackstar-32", label="TrackStar, 32 × 32"),
    Way(of="bergson", name="ekfac", label="EK-FAC, damping 0.1 (default)", build="factors"),
    Way(of="bergson", name="ekfac-0.001", label="EK-FAC, damping 0.001", build="factors"),
    Way(of="bergson", name="ekfac-cg", label="EK-FAC with CG, as released", build="factors", few=True),
    Way(of="bergson", name="ekfac-cg-copied", label="EK-FAC with CG, its gradients copied", build="factors", few=True),
    Way(of="dattri-llm", name="store-16-dot", label="store, 16 × 16 a layer, dot", build="store"),
    Way(of="dattri-llm", name="store-16-cosine", label="store, 16 × 16 a layer, cosine", build="store"),
    Way(of="dattri-llm", name="ekfac", label="EK-FAC, damping 0.001 (default)"),
    Way(of="dattri-llm", name="ekfac-relative", label="EK-FAC, damping 0.1 of the mean"),
    Way(of="dattri", name="logra-256", label="LoGra, 16 × 16 a layer"),
    Way(of="dattri", name="logra-4096", label="LoGra, 64 × 64 a layer (default)"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one way."""

    problem: str | None = None
    row_bytes: float | None = None
    build_seconds: float | None = None
    query_seconds: float | None = None
    load: float | None = None
    """Of the machine, when it began."""


class Runs:
    """Ways in processes, each done once: outcomes and scores stay in ``folder``. What failed is tried again."""

    def __init__(self, job: Path, folder: Path, pythons: dict[str, str]) -> None:
        self.job, self.folder, self.pythons = job, folder, pythons
        self.versions: dict[str, str | None] = {of: self._version(of) for of in SCRIPTS}

    def of(self, way: Way) -> Outcome:
        kept = self.folder / f"{way.of}-{way.name}.json"
        if kept.exists():
            return Outcome(**json.loads(kept.read_text()))
        if self.versions[way.of] is None:
            return Outcome(problem="not installed")
        print(f"{way.of}: {way.label}", file=sys.stderr, flush=True)
        load = round(os.getloadavg()[0], 1)
        try:
            outcome = replace(self._measured(way), load=load)
        except RuntimeError as error:
            return Outcome(problem=str(error), load=load)
        kept.write_text(json.dumps(asdict(outcome)))
        return outcome

    def scores(self, way: Way) -> NDArray[np.float64]:
        """(V, N)."""
        return np.nan_to_num(np.load(self.folder / f"{way.of}-{way.name}.npy"))

    def start_seconds(self, of: str) -> float | None:
        """CPU seconds until the model of a way is there."""
        kept = self.folder / f"{of}-start.json"
        if self.versions[of] is None:
            return None
        if not kept.exists():
            first = next(way for way in WAYS if way.of == of)
            try:
                kept.write_text(json.dumps(self._process(first, "start", self.folder / "work")))
            except RuntimeError:
                kept.write_text("null")
            shutil.rmtree(self.folder / "work", ignore_errors=True)
        return json.loads(kept.read_text())

    def _measured(self, way: Way) -> Outcome:
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        built = self.folder / "built" / f"{way.of}-{way.build or way.name}"
        if not (built / "seconds.json").exists():
            seconds = self._process(way, "build", work)
            (work / "seconds.json").write_text(json.dumps(seconds))
            if way.build:
                shutil.copytree(work, built)
        else:
            shutil.copytree(built, work)
        build_seconds = json.loads((work / "seconds.json").read_text())
        query_seconds = self._process(way, "query", work)
        if (work / "told.json").exists():
            told = json.loads((work / "told.json").read_text())
            build_seconds, query_seconds = told["build"] or build_seconds, told["query"]
        shutil.copy(work / "scores.npy", self.folder / f"{way.of}-{way.name}.npy")
        row_bytes = json.loads((work / "kept.json").read_text())["row_bytes"]
        shutil.rmtree(work)
        return Outcome(row_bytes=row_bytes, build_seconds=build_seconds, query_seconds=query_seconds)

    def _process(self, way: Way, phase: str, work: Path) -> float:
        """CPU seconds of one phase, all processes. RuntimeError with the last line of what it said, if it fails."""
        job = self.job.with_name(self.job.name + "-few") if way.few else self.job
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "datasets"),
            "PYTHONPATH": str(HERE.parents[1]) if way.of == "ghoststore" else "",
        }  # fmt: skip
        command = [self.pythons[way.of], HERE / f"{SCRIPTS[way.of]}.py", way.name, phase, job, work]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with (self.folder / f"{way.of}-{way.name}-{phase}.log").open("w+") as log:
            code = subprocess.run(
                list(map(str, command)), env=environment, stdout=log, stderr=log, cwd=self.folder
            ).returncode
            log.seek(0)
            said = log.read().strip().splitlines()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if code:
            last = re.sub(r"/\S+/", "", said[-1] if said else f"ended by {code}")
            raise RuntimeError(f"{phase}: {last[:160]}")
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def _version(self, of: str) -> str | None:
        if of == "ghoststore":
            return "this one"
        asked = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
        done = subprocess.run([self.pythons[of], "-c", asked, of], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True, slots=True)
class Judged:
    """The trainings, and which val rows they have losses of: the first ones."""

    kept_MN: NDArray[np.bool_]
    losses_VM: NDArray[np.float64]

    def lds(self, scores_VN: NDArray[np.float64], places: list[int]) -> Lds:
        return lds(scores_VN, self.kept_MN, self.losses_VM[places])

    def difference(self, one_VN: NDArray[np.float64], other_VN: NDArray[np.float64], places: list[int]) -> Lds:
        """LDS of one less that of the other, with an interval by resampling the trainings for both at once."""
        return lds_difference(one_VN, other_VN, self.kept_MN, self.losses_VM[places])


def write_rows(data: Path, tokenizer: Tokenizer, path: Path) -> int:
    """The rows of a corpus as tokens and labels, for every way the same."""
    settings, count = TokenSettings(max_length=MAX_LENGTH), 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows_of(Corpus.open(str(data)).samples(), tokenizer, settings):
            if not row.status.usable:
                raise click.UsageError(f"row {row.sample.id!r} cannot be used: {row.status.name.lower()}")
            tokens = row.tokens.tolist()
            labels = [-100] * row.first_target + tokens[row.first_target :]
            text = " ".join(row.sample.texts())
            line = {"id": row.sample.id, "text": text, "input_ids": tokens, "labels": labels}
            file.write(json.dumps(line) + "\n")
            count += 1
    return count


def write_job(case: Case, folder: Path, val_lines: list[str]) -> None:
    """The files of a job: see exchange.py."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(load_tokenizer(find_checkpoint(str(case.checkpoint)).folder))
    val_set = folder / "val.jsonl"
    val_set.write_text("".join(f"{line}\n" for line in val_lines), encoding="utf-8")
    write_rows(case.data, tokenizer, folder / "rows.jsonl")
    write_rows(val_set, tokenizer, folder / "val_rows.jsonl")
    paths = {"checkpoint": case.checkpoint, "data": case.data, "val_set": val_set}
    told = {**{name: str(path.resolve()) for name, path in paths.items()}, "max_length": MAX_LENGTH}
    (folder / "job.json").write_text(json.dumps(told))


@dataclass(frozen=True, slots=True)
class Facts:
    """The questions behind the val rows: the row of the corpus that states each answer."""

    places: dict[str, list[int]]
    """By wording, of the val rows."""
    source: dict[int, int]
    """By place of a val row, the place of its row."""

    def recall(self, scores_VN: NDArray[np.float64]) -> dict[str, float]:
        """At 1."""
        best_V = scores_VN.argmax(1)
        return {
            name: float(np.mean([best_V[place] == self.source[place] for place in places]))
            for name, places in self.places.items()
        }


def facts_of(case: Case, first: int) -> tuple[list[str], Facts]:
    """(lines of the val set, what they ask for), from the demo's corpus."""
    corpus = read_corpus()
    place_of = {json.loads(line)["id"]: place for place, line in enumerate(case.data.read_text().splitlines())}
    lines: list[str] = []
    facts = Facts({}, {})
    for name, wording in QUESTIONS.items():
        facts.places[wording] = []
        for question in getattr(corpus, name):
            facts.source[first + len(lines)] = place_of[question["source_id"]]
            facts.places[wording].append(first + len(lines))
            told = {field: question[field] for field in ("id", "prompt", "completion")}
            lines.append(json.dumps({**told, "domain": name}))
    return lines, facts


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def line_of(way: Way, outcome: Outcome, runs: Runs, cells: dict[str, str]) -> dict[str, str]:
    kept = "none" if outcome.row_bytes is None else f"{outcome.row_bytes:,.0f}"
    version = runs.versions[way.of]
    return {
        "library": way.of if way.of == "ghoststore" or version is None else f"{way.of} {version}",
        "way": way.label,
        **cells,
        "bytes a row": "–" if outcome.problem else kept,
        "CPU s build": seconds(outcome.build_seconds),
        "CPU s query": seconds(outcome.query_seconds),
    }


def add_tables(results: Results, runs: Runs, judged: Judged, facts: Facts | None, few: list[int]) -> None:
    """All ways; then all on the few val rows that the slowest had."""
    every = list(range(len(judged.losses_VM)))
    base = runs.of(WAYS[0])
    if base.problem:
        raise click.ClickException(f"ghoststore's default failed: {base.problem}")
    default = runs.scores(WAYS[0])
    rows, few_rows, numbers = [], [], {}
    for way in WAYS:
        outcome = runs.of(way)
        cells = {"LDS": outcome.problem or "", "− default": "", **({} if facts is None else {"facts": ""})}
        told: dict[str, Any] = asdict(outcome)
        if not outcome.problem:
            scores = runs.scores(way)
            of_few = scores if way.few else scores[few]
            on_few = judged.lds(of_few, few), judged.difference(of_few, default[few], few)
            if not way.few:
                on_all = judged.lds(scores[every], every), judged.difference(scores[every], default[every], every)
                cells |= {"LDS": shown(on_all[0]), "− default": "" if way is WAYS[0] else shown(on_all[1])}
                told |= {"lds": asdict(on_all[0]), "difference": asdict(on_all[1])}
                if facts is not None:
                    told["recall"] = facts.recall(scores)
                    cells["facts"] = " / ".join(f"{share:.2f}" for share in told["recall"].values())
            else:
                cells["LDS"] = "see below"
            told |= {"few": [asdict(each) for each in on_few]}
            few_cells = {"LDS": shown(on_few[0]), "− default": "" if way is WAYS[0] else shown(on_few[1])}
            few_rows.append({"library": way.of, "way": way.label, **few_cells})
        rows.append(line_of(way, outcome, runs, cells))
        numbers[f"{way.of}/{way.name}"] = told
    starts = {of: runs.start_seconds(of) for of in dict.fromkeys(way.of for way in WAYS)}
    note = (
        "LDS with 95 % intervals by resampling the trainings; `− default`: the paired difference from ghoststore's "
        "default, by resampling the trainings for both. "
        + ("" if facts is None else f"`facts`: recall at 1, asked {' / '.join(facts.places)}. ")
        + "`bytes a row`: what is kept of a row; none where every question passes over the corpus. CPU seconds are "
        "those of whole processes with one thread, imports included: until the model is there "
        + ", ".join(f"{of} {seconds(value)}" for of, value in starts.items() if value is not None)
        + "."
    )
    results.add(Table("All ways", rows, note), ways=numbers, start_seconds=starts)
    note = f"{len(few)} of the val rows: what CG had time for."
    results.add(Table("On the same few val rows", few_rows, note))


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Corpus; without it that of the demo.")
@click.option("--val-set", type=click.Path(exists=True, path_type=Path), help="Val corpus, with --data.")
@click.option("--name", default="demo", show_default=True, help="Of the results.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of trainings and outcomes; kept.")
@click.option("--python", "pythons", multiple=True, metavar="LIBRARY=PYTHON", help="The Python that a library is in.")
@click.option("--halves", type=int, default=48, show_default=True, help="Trainings on random halves.")
@click.option("--max-steps", type=int, default=200, show_default=True, help="Of every training.")
@click.option("--workers", type=int, default=2, show_default=True, help="Trainings at once.")
@click.option("--few", type=int, default=10, show_default=True, help="Val rows of the slowest ways.")
@click.option("--skip", multiple=True, metavar="LIBRARY/WAY", help="Leave out a way, by its name in the script.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(
    data: Path | None, val_set: Path | None, name: str, work: Path, pythons: tuple[str, ...], halves: int,
    max_steps: int, workers: int, few: int, skip: tuple[str, ...], out: Path,
) -> None:  # fmt: skip
    """Compare ghoststore with what else is installed."""
    if (data is None) != (val_set is None):
        raise click.UsageError("give --data and --val-set, or neither")
    global WAYS
    WAYS = tuple(way for way in WAYS if f"{way.of}/{way.name}" not in skip)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "train.jsonl").exists():
        if data is None or val_set is None:
            _, whole = demo_files(work)
            own_groups(whole, work / "own.jsonl", 10)
            (work / "own.jsonl").replace(whole)
        else:
            (work / "train.jsonl").write_bytes(data.read_bytes())
            (work / "val.jsonl").write_bytes(val_set.read_bytes())
    case = Case(work, halves, workers)
    case.recipe = replace(case.recipe, max_steps=max_steps)
    case.prepare()
    losses = np.load(work / "halved.npz")
    judged = Judged(losses["kept"], losses["losses"])
    val_lines = case.val_set.read_text(encoding="utf-8").splitlines()
    asked, facts = facts_of(case, len(val_lines)) if data is None else ([], None)
    chosen = list(range(0, len(val_lines), -(-len(val_lines) // few)))
    write_job(case, work / "job", val_lines + asked)
    write_job(case, work / "job-few", [val_lines[place] for place in chosen])
    python_of = dict.fromkeys(SCRIPTS, sys.executable) | dict(pair.split("=", 1) for pair in pythons)
    (work / "outcomes").mkdir(exist_ok=True)
    runs = Runs((work / "job").resolve(), (work / "outcomes").resolve(), python_of)
    settings = {"corpus": name, "samples": judged.kept_MN.shape[1], "val rows": len(val_lines),
                "halves": len(judged.kept_MN), **asdict(case.recipe),
                **({"left out": " ".join(skip)} if skip else {})}  # fmt: skip
    results = Results(name=f"rivals-{name}", title="Beside other libraries", settings=settings, facts=machine_facts())
    add_tables(results, runs, judged, facts, chosen)
    results.write(out)


if __name__ == "__main__":
    main()
