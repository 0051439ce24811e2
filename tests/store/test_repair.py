"""`ghoststore repair`: just what is damaged is made again, byte for byte, and a kill in between loses nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.errors import CorruptError
from ghoststore.store import Store
from tests.support.harms import Harm, delete, empty, flip_middle, truncate
from tests.support.runs import expected, train

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "store"))


def part(store: Path) -> Path:
    return store / "parts" / "part"


def repaired(lab: Lab, built: Path, store: Path, *options: str | Path) -> list[tuple[str, str]]:
    """(file, how) of what was mended; the store is then what it was."""
    outcome = lab.run("repair", "--store", store, *options, "--json", "--quiet")
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.json["sound"]
    assert lab.tree(store) == lab.tree(built)
    return [(one["file"], one["how"]) for one in outcome.json["mended"]]


def test_a_sound_store_is_left_alone(lab: Lab, built: Path, store: Path) -> None:
    assert repaired(lab, built, store) == []


HARMS = [flip_middle, truncate, empty, delete]
FILES = ["vectors/c/1/0", "sample_id/c/4", "commits/00000002.json", "status/c/0"]


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("file", "harm"), [(file, HARMS[(row + step) % 4]) for row, file in enumerate(FILES) for step in (0, 1)]
)
def test_a_damaged_span_is_built_again(lab: Lab, built: Path, store: Path, file: str, harm: Harm) -> None:
    """And no other: files of other spans are not even written."""
    harm(part(store) / file)
    before = {path: path.stat().st_mtime_ns for path in part(store).rglob("*") if path.is_file()}
    span = int(file.split("/")[2]) if "/c/" in file else 2
    assert repaired(lab, built, store) == [(f"commits/{span:08d}.json", "rebuilt")]
    names = (f"/c/{span}", f"/{span:08d}.json")
    changed = [path for path, mtime in before.items() if path.stat().st_mtime_ns != mtime]
    assert changed
    assert all(str(path).endswith((*names, f"/c/{span}/0")) for path in changed), changed


def test_many_harms_at_once(lab: Lab, built: Path, store: Path) -> None:
    """Metadata of groups and arrays, records and chunks of several spans, the folder of records: one repair."""
    for name in ("zarr.json", "parts/zarr.json", "runs/zarr.json"):
        delete(store / name)
    for name in ("norm/zarr.json", "sample_id/zarr.json", "span_start/zarr.json", "span_start/c/0/0"):
        flip_middle(part(store) / name)
    shutil.rmtree(part(store) / "commits")
    flip_middle(part(store) / "vectors/c/3/0")
    mended = dict(repaired(lab, built, store))
    assert {mended[f"commits/{span:08d}.json"] for span in range(5)} == {"rebuilt"}
    assert {name for name, how in mended.items() if how == "restored"} == {
        "zarr.json",
        "parts/zarr.json",
        "runs/zarr.json",
        "commits",
        "commits/zarr.json",
        "norm/zarr.json",
        "sample_id/zarr.json",
        "span_start/zarr.json",
        "span_start/c/0/0",
    }


def test_a_store_without_its_root(lab: Lab, built: Path, store: Path) -> None:
    """Every command says so in a sentence; `repair` restores it."""
    delete(store / "zarr.json")
    before = lab.tree(store)
    for outcome in (
        lab.run("info", "--store", store),
        lab.build(store),
        lab.run("query", "--store", store, "--val-set", lab.corpus),
        lab.run("index", "--store", store),
    ):
        assert outcome.code == 4, outcome.err
        assert f"{store / 'zarr.json'} is missing" in outcome.err
        assert f"`ghoststore repair --store {store}`" in outcome.err
    assert [damage.file for damage in ghoststore.verify(store).damage] == ["zarr.json"]
    assert lab.tree(store) == before
    assert repaired(lab, built, store) == [("zarr.json", "restored")]


OTHERS = {
    "windows": ("--max-length", "6", "--overlong", "window", "--max-samples", "20", "--store-text", "--span-rows", "9"),
    "plain": ("--proj-rank-total", "16", "--proj-layers", "mlp", "--proj-seed", "3", "--loss-reduction", "sum"),
    "codes": ("--proj-dtype", "int8", "--proj-precondition", "none", "--batch-tokens", "40", "--proj-compress", "50"),
    "pca": (
        "--proj-kind",
        "pca",
        "--calibration-samples",
        "9",
        "--exclude-layers",
        "*c_attn",
        "--attn-implementation",
        "eager",
    ),
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("case", OTHERS)
def test_the_settings_are_those_of_the_manifest(lab: Lab, tmp_path: Path, case: str) -> None:
    """Whatever the part was built with; nothing of it has to be said again."""
    assert lab.build(tmp_path / "built", *OTHERS[case]).code == 0
    store = Path(shutil.copytree(tmp_path / "built", tmp_path / "store"))
    flip_middle(part(store) / "vectors/c/1/0")
    delete(part(store) / "commits/00000000.json")
    mended = repaired(lab, tmp_path / "built", store)
    assert mended == [(f"commits/{span:08d}.json", "rebuilt") for span in (0, 1)]


@pytest.mark.slow
def test_a_part_of_standard_input(lab: Lab, tmp_path: Path) -> None:
    """Which nobody can read again: its rows must be given."""
    given = ("--checkpoint", lab.checkpoint, "--data", "-", "--span-rows", "6", "--name", "part", "--quiet")
    assert lab.run("build", "--store", tmp_path / "built", *given, stdin=str(lab.corpus)).code == 0
    store = Path(shutil.copytree(tmp_path / "built", tmp_path / "store"))
    flip_middle(part(store) / "text/c/1")
    outcome = lab.run("repair", "--store", store, "--json", "--quiet")
    assert outcome.code == 4
    assert "standard input" in outcome.json["unmended"][0]["why"]
    repaired(lab, tmp_path / "built", store, "--data", lab.corpus)


def test_learned_arrays_are_learned_again(lab: Lab, built: Path, store: Path) -> None:
    """What the projection learned is a function of checkpoint and corpus, too."""
    name = next(path for path in part(store).glob("projection_in/c/*") if path.is_file())
    flip_middle(name)
    flip_middle(part(store) / "loss/c/2")
    mended = dict(repaired(lab, built, store))
    assert mended == {"projection_in/c/0": "restored", "commits/00000002.json": "rebuilt"}


def test_another_place_of_the_inputs(lab: Lab, built: Path, store: Path, tmp_path: Path) -> None:
    """``checkpoint`` and ``data`` say where they are now; the same rows and weights, or nothing is changed."""
    flip_middle(part(store) / "vectors/c/1/0")
    model, corpus = shutil.copytree(lab.checkpoint, tmp_path / "model"), shutil.copy(lab.corpus, tmp_path / "c.jsonl")
    before = lab.tree(store)
    other = lab.write(tmp_path / "other.jsonl", lab.rows[:-1])
    outcome = lab.run("repair", "--store", store, "--data", other, "--json", "--quiet")
    assert outcome.code == 4
    assert "corpus" in outcome.json["unmended"][0]["why"]
    assert lab.tree(store) == before
    assert repaired(lab, built, store, "--checkpoint", model, "--data", corpus)


def test_records_without_the_model(lab: Lab, built: Path, store: Path, tmp_path: Path) -> None:
    """Where nothing can be computed, a lost record still follows from its chunks; a damaged chunk stays damaged."""
    delete(part(store) / "commits/00000003.json")
    truncate(part(store) / "commits/00000002.json")
    flip_middle(part(store) / "loss/c/1")
    outcome = lab.run("repair", "--store", store, "--checkpoint", tmp_path / "gone", "--json", "--quiet")
    assert outcome.code == 4
    assert [one["how"] for one in outcome.json["mended"]] == ["restored from its chunks"] * 2
    assert [one["file"] for one in outcome.json["unmended"]] == ["loss/c/1"]
    assert "gone" in outcome.json["unmended"][0]["why"]
    report = ghoststore.verify(store)
    assert [damage.file for damage in report.damage] == ["loss/c/1"]
    repaired(lab, built, store)


@pytest.mark.slow
def test_damaged_caches_are_dropped(lab: Lab, built: Path, store: Path) -> None:
    query = ("query", "--store", store, "--val-set", lab.corpus, "--precondition", "second-moment", "--json")
    assert lab.run(*query).code == 0
    assert lab.run("index", "--store", store, "--factory", "Flat", "--name", "flat", "--target-recall", "0.1").code == 0
    (moment,) = (part(store) / "second_moment").glob("second_moment-*.safetensors")
    flip_middle(moment)
    flip_middle(part(store) / "index/flat/index.json")
    delete(part(store) / "second_moment/zarr.json")
    assert not ghoststore.verify(store).sound
    outcome = lab.run("repair", "--store", store, "--json", "--quiet")
    assert outcome.code == 0, outcome.out
    dropped = {one["file"] for one in outcome.json["mended"] if one["how"].startswith("dropped")}
    assert dropped == {"index/flat/index.json", "second_moment/second_moment.json"}
    assert ghoststore.verify(store).sound
    assert lab.run(*query).code == 0


def test_what_cannot_be_restored(lab: Lab, store: Path) -> None:
    flip_middle(part(store) / "zarr.json")
    outcome = lab.run("repair", "--store", store, "--json", "--quiet")
    assert outcome.code == 4
    (left,) = outcome.json["unmended"]
    assert left["file"] == "zarr.json"
    assert "copy them, or all of it, back" in left["why"]


MOMENTS = {
    "record-away": ("name", r"commits/00000001\.json -> .*withdrawn", "after"),
    "chunk-away": ("name", r"norm/c/1/0 -> .*withdrawn", "after"),
    "chunks-away": ("name", r"n_tokens/c/1 -> .*withdrawn", "after"),
    "record-unnamed": ("name", r"commits/00000001\.json$", "before"),
    "record-named": ("name", r"commits/00000001\.json$", "after"),
}


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(lab: Lab, built: Path, store: Path, moment: str) -> None:
    """At any moment: the same command ends as if nothing had happened."""
    flip_middle(part(store) / "loss/c/1")
    call, path, when = MOMENTS[moment]
    fault = {"call": call, "path": path, "when": when, "act": "kill"}
    assert lab.run("repair", "--store", store, "--quiet", fault=fault).code == -9
    outcome = lab.run("repair", "--store", store, "--quiet")
    assert outcome.code == 0, outcome.out + outcome.err
    assert lab.tree(store) == lab.tree(built)


def test_lost_steps_of_a_run(lab: Lab, tmp_path: Path) -> None:
    """They are named; taken out only where that is asked for; a lost record is restored from its chunks."""
    store = tmp_path / "store"
    train(store)
    folder = store / "runs/run"
    delete(folder / "commits/00000003.json")
    flip_middle(folder / "score/c/1/0/0")
    truncate(folder / "score/zarr.json")
    outcome = lab.run("repair", "--store", store, "--json", "--quiet")
    assert outcome.code == 4
    assert {(one["file"], one["how"]) for one in outcome.json["mended"]} == {
        ("commits/00000003.json", "restored from its chunks"),
        ("score/zarr.json", "restored"),
    }
    (left,) = outcome.json["unmended"]
    assert left["file"] == "score/c/1/0/0"
    assert "steps 6 to 10 of run 'run' cannot be computed again" in left["why"]
    assert "--drop-damaged" in lab.run("repair", "--store", store).out
    dropped = lab.run("repair", "--store", store, "--drop-damaged", "--json", "--quiet")
    assert dropped.code == 0, dropped.out
    assert [one["how"] for one in dropped.json["mended"]] == ["taken out: steps 6 to 10 are lost"]
    run = Store.open(store).run()
    assert run.spans == [0, 2, 3, 4]
    assert ghoststore.verify(store).sound
    rest = [*range(5), *range(10, 23)]
    assert run.read_committed("score").tobytes() == expected("score", rest).tobytes()
    train(store, start=5, stop=10)
    assert Store.open(store).run().complete


def test_a_part_that_is_being_written_is_busy(lab: Lab, store: Path) -> None:
    from ghoststore.store.spans.writer import writing

    flip_middle(part(store) / "loss/c/1")
    with writing(Store.open(store).part()):
        assert lab.run("repair", "--store", store).code == 5
    with pytest.raises(CorruptError):
        Store.open(store).part().column("loss")


@pytest.mark.thin(1)
@pytest.mark.parametrize("inside", [".withdrawn", "loss/c", "commits", "index", "second_moment"])
def test_nothing_is_written_or_removed_where_a_link_leads(lab: Lab, store: Path, tmp_path: Path, inside: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "00000001").mkdir(parents=True)
    (elsewhere / "00000001" / "mine").write_text("mine")
    (elsewhere / ".draft.tmp").write_text("mine")
    (elsewhere / "00000000.json").write_text("{}")
    place = part(store) / inside
    if place.is_dir():
        shutil.rmtree(place)
    place.symlink_to(elsewhere)
    before = lab.tree(elsewhere)
    codes = {command: lab.run(command, "--store", store).code for command in ("verify", "repair", "gc", "index")}
    assert codes["verify"] == codes["repair"] == codes["index"] == 4
    assert codes["gc"] == 0, "left alone"
    moment = ("--precondition", "second-moment", "--damping", "1.0")
    lab.run("query", "--store", store, "--val-set", lab.corpus, *moment)
    assert lab.tree(elsewhere) == before


def test_metadata_and_the_one_chunk_of_an_array(lab: Lab, built: Path, store: Path) -> None:
    """Whose shape nothing else tells: both follow from checkpoint and corpus, in one repair."""
    for name in ("projection_in/zarr.json", "projection_in/c/0", "span_start/zarr.json", "span_start/c/0/0"):
        delete(part(store) / name)
    mended = repaired(lab, built, store)
    assert sorted(file for file, _ in mended) == [
        "projection_in/c/0",
        "projection_in/zarr.json",
        "span_start/c/0/0",
        "span_start/zarr.json",
    ]


@pytest.mark.slow
@pytest.mark.kill
def test_what_a_killed_repair_took_out_is_named(lab: Lab, store: Path) -> None:
    """Until a repair has gone on: its rows would be missing from every answer."""
    flip_middle(part(store) / "loss/c/1")
    code = (
        "import os\nimport indexer.build.repair as module\nmodule.compute_spans = lambda *_: os.kill(os.getpid(), 9)\n"
    )
    words = ["repair", "--store", str(store), "--quiet"]
    outcome = lab.run(code=f"{code}import ghoststore.cli\nghoststore.cli.main({words!r})")
    assert outcome.code == -9, outcome.err
    damage = ghoststore.verify(store).damage
    assert [(one.file, one.problem) for one in damage] == [
        ("commits/00000001.json", "taken out by a repair that was cut short, and not computed again")
    ]
    for outcome in (lab.build(store), lab.run("query", "--store", store, "--val-set", lab.corpus)):
        assert (outcome.code, outcome.out) == (4, "")
        assert "commits/00000001.json: taken out by a repair" in outcome.err
    assert lab.run(*words).code == 0
    assert ghoststore.verify(store).sound


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("moment", ["chunks-away", "record-away", "chunk-away"])
def test_what_a_killed_repair_took_out_is_put_back(
    lab: Lab, built: Path, store: Path, tmp_path: Path, moment: str
) -> None:
    """Where the corpus is gone by then: the span is as it was, and its damage is named."""
    truncate(part(store) / "loss/c/1")
    harmed = lab.tree(store)
    call, path, when = MOMENTS[moment]
    fault = {"call": call, "path": path, "when": when, "act": "kill"}
    assert lab.run("repair", "--store", store, fault=fault).code == -9
    assert not (part(store) / "commits/00000001.json").exists()
    nowhere = ("--data", tmp_path / "nowhere.jsonl")
    outcome = lab.run("repair", "--store", store, *nowhere, "--json", "--quiet")
    assert outcome.code == 4, outcome.out
    assert [one["file"] for one in outcome.json["unmended"]] == ["loss/c/1"]
    assert "nowhere.jsonl" in outcome.json["unmended"][0]["why"]
    assert lab.tree(store) == harmed
    assert lab.run("repair", "--store", store).code == 0
    assert lab.tree(store) == lab.tree(built)
