"""One command line, at least, for each command that writes. ``{F}`` is a folder of its own, ``{I}`` has the inputs."""

from __future__ import annotations

from dataclasses import dataclass

from ghoststore.cli import COMMANDS

READ_ONLY = ("info", "serve", "verify", "watch")
"""Commands that write nothing."""
LONG = ("demo", "doctor")
"""Commands that are made of the others (demo), or write one file that they remove (doctor)."""


@dataclass(frozen=True)
class Command:
    """A command line, and the folder it begins with."""

    line: str
    base: str = "store"
    """What is in the folder: ``nothing``, ``half`` a build, a ``store`` of all kinds, a ``damaged`` or littered one."""
    passing: str = r"(?!)"
    """Of files that come and go, or grow, while it works: no partial one is told from a whole one by its bytes."""
    heavy: bool = False
    """Left to the soak."""

    @property
    def name(self) -> str:
        return self.line.split()[0]

    @property
    def words(self) -> list[str]:
        return self.line.split()


STORE = "--store {F}/store"
BUILD = (
    f"build --checkpoint {{I}}/model --data {{I}}/corpus.jsonl {STORE} --name part --span-rows 5 --device cpu --quiet"
    " --proj-rank-total 64"
)
"""Blocks of 64 numbers: by default the second moment of this model would have 150 MB, which each case copies and holds.
"""
ASK = f"{STORE} --val-set {{I}}/val.jsonl --device cpu --quiet"
DRAWN = f"{ASK} --rows 12 --val-samples 3"
TRAIN = (
    f"train --checkpoint {{I}}/model --data {{I}}/corpus.jsonl --val-set {{I}}/val.jsonl {STORE} --name run"
    " --output-dir {F}/out --batch-size 3 --val-batch-size 3 --max-steps 6 --checkpoint-interval 3 --eval-interval 3"
    " --dot-prod-save-interval 2 --device cpu --quiet"
)

ALL = {
    "build": Command(BUILD, "nothing"),
    "build-on": Command(BUILD, "half"),
    # Until the end is seen, arrays are as long as any, and the manifest does not know the rest.
    "build-stream": Command(f"{BUILD} --stream", "nothing", passing=r"store/parts/part/([^/]+/)?zarr\.json$"),
    "query-json": Command(f"query {ASK} --out {{F}}/hits.json --report {{F}}/hits.html"),
    "query-csv": Command(f"query {ASK} --out {{F}}/hits.csv"),
    "query-jsonl": Command(f"query {ASK} --each --out {{F}}/hits.jsonl"),
    "query-parquet": Command(f"query {ASK} --precondition second-moment --out {{F}}/hits.parquet"),
    "self-influence": Command(f"self-influence {STORE} --out {{F}}/rows.csv --device cpu --quiet"),
    "select": Command(f"select {ASK} --fraction 0.5 --out {{F}}/best.jsonl"),
    "index": Command(f"index {STORE} --factory Flat --rebuild --quiet", passing=r"store/parts/part/index/"),
    "fidelity": Command(f"fidelity {DRAWN}"),
    "plot-error": Command(f"plot-error {DRAWN} --out {{F}}/error.png"),
    "full-gradients": Command(
        "full-gradients --checkpoint {I}/model --data {I}/corpus.jsonl --max-samples 3 --parameters projected"
        " --device cpu --quiet --out {F}/gradients",
        "nothing",
        passing=r"gradients/manifest\.json$",
    ),
    "evaluate": Command(
        f"evaluate {ASK} --out {{F}}/evaluation --method dot --halves 3 --max-steps 2 --batch-size 4 --workers 1",
        heavy=True,
    ),
    "tokenize": Command(
        "tokenize --data {I}/corpus.jsonl --tokenizer {I}/model --shard-samples 5 --workers 1 --quiet --out {F}/shards",
        "nothing",
    ),
    "tokenize-workers": Command(
        "tokenize --data {I}/corpus.jsonl --tokenizer {I}/model --shard-samples 3 --workers 2 --quiet --out {F}/shards",
        "nothing",
        heavy=True,
    ),
    "train": Command(TRAIN, "nothing", passing=r"out/|store/runs/"),
    "scores": Command(f"scores {STORE} --plot {{F}}/scores.png --out {{F}}/scores.json --quiet"),
    "repair": Command(f"repair {STORE} --checkpoint {{I}}/model --data {{I}}/corpus.jsonl --quiet", "damaged"),
    "gc": Command(f"gc {STORE} --quiet", "littered"),
    "rm": Command(f"rm {STORE} --run run --yes"),
    "rm-part": Command(f"rm {STORE} --part part --yes", heavy=True),
    "mv": Command(f"mv {STORE} --part part --to-name moved"),
    "cp": Command(f"cp {STORE} --part part --to-name copy --quiet"),
    "cp-run": Command(f"cp {STORE} --run run --to-store {{F}}/other --quiet", heavy=True),
    "export": Command(f"export {STORE} --out {{F}}/vectors.safetensors --quiet"),
    "export-parquet": Command(f"export {STORE} --out {{F}}/vectors.parquet --quiet", heavy=True),
}

WRITING = {case: command for case, command in ALL.items() if command.name in COMMANDS}
"""Those of this release."""
