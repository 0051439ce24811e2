"""What does not fit what is stored is refused with exit code 3, both values shown and nothing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pytest

import ghoststore

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome


@pytest.fixture(scope="module")
def whole(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a folder with a checkpoint, a corpus and a store; a copy of it)."""
    folder, copy = (tmp_path_factory.mktemp("whole") / name for name in ("own", "copy"))
    shutil.copytree(lab.checkpoint, folder / "model")
    shutil.copy(lab.corpus, folder / "corpus.jsonl")
    assert build(lab, folder).code == 0
    return folder, Path(shutil.copytree(folder, copy))


@pytest.fixture
def own(whole: tuple[Path, Path]) -> Path:
    """The folder as it was built, where it was built, for its manifest names its inputs; free to change."""
    folder, copy = whole
    shutil.rmtree(folder)
    return Path(shutil.copytree(copy, folder))


def build(lab: Lab, own: Path, *options: str, **order: Any) -> Outcome:
    words = ("--checkpoint", own / "model", "--data", own / "corpus.jsonl", *options)
    return lab.build(own / "store", *words, **order)


def query(lab: Lab, own: Path, *options: str | Path) -> Outcome:
    return lab.run("query", "--store", own / "store", "--val-set", lab.corpus, "--json", *options)


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 3, outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--proj-seed", "5"], ["projection.seed: stored 0, asked for 5"]),
        (["--max-length", "9"], ["tokens.max_length: stored 32, asked for 9"]),
        (["--overlong", "skip"], ["tokens.overlong: stored 'truncate', asked for 'skip'"]),
        (["--proj-dtype", "bfloat16"], ["stored 8192, asked for 512"]),
        (["--proj-kind", "rademacher"], ["projection.kind: stored 'gaussian', asked for 'rademacher'"]),
        (["--proj-compress", "100"], ["projection.compress: stored 8192, asked for 100"]),
        (["--proj-layers", "mlp"], ["projection.layers: stored ['mlp', 'attn'], asked for ['mlp']"]),
        (["--loss-reduction", "sum"], ["loss.reduction: stored 'mean', asked for 'sum'"]),
        (["--span-rows", "5"], ["storage.span_rows: stored 6, asked for 5"]),
        (["--batch-tokens", "99"], ["batching.batch_tokens: stored 2048, asked for 99"]),
        (["--model-dtype", "bfloat16"], ["dtype.model: stored 'float32', asked for 'bfloat16'"]),
        (["--max-samples", "20"], ["corpus.samples: stored 27, asked for 20"]),
        (["--store-text"], ["storage.store_text: stored False, asked for True"]),
        (["--text-field", "id"], ["corpus.fields.text: stored 'text', asked for 'id'"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_other_settings(lab: Lab, own: Path, options: list[str], words: list[str]) -> None:
    before = lab.tree(own / "store")
    outcome = build(lab, own, *options)
    refused(outcome, *words, "part 'part'", "nothing was changed", "--name")
    assert lab.tree(own / "store") == before


def test_other_weights_in_the_same_folder(lab: Lab, own: Path) -> None:
    before = lab.tree(own / "store")
    stored = ghoststore.info(own / "store").parts[0].manifest["checkpoint"]["fingerprint"]
    lab.model(own / "model", seed=1)
    refused(build(lab, own), f"checkpoint.fingerprint: stored '{stored}', asked for 'sha256:")
    refused(
        query(lab, own),
        "other weights",
        f"checkpoint.fingerprint: stored '{stored}', found 'sha256:",
        str(own / "model"),
    )
    refused(query(lab, own, "--checkpoint", own / "model"), "other weights")
    assert lab.tree(own / "store") == before
    assert query(lab, own, "--checkpoint", lab.checkpoint).code == 0


def test_other_tokenizer(lab: Lab, own: Path) -> None:
    before = lab.tree(own / "store")
    tokenizer = json.loads((own / "model/tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (own / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    stored = ghoststore.info(own / "store").parts[0].manifest["tokenizer"]["fingerprint"]
    refused(build(lab, own), f"tokenizer.fingerprint: stored '{stored}', asked for 'sha256:")
    refused(query(lab, own), "another tokenizer", f"tokenizer.fingerprint: stored '{stored}', found 'sha256:")
    assert lab.tree(own / "store") == before


def replace_text(rows: list[Any]) -> None:
    rows[20]["text"] = rows[20]["text"].replace("20", "99")


def append(rows: list[Any]) -> None:
    rows.append({"id": "new", "text": "one more", "domain": "sky"})


def drop(rows: list[Any]) -> None:
    del rows[3]


def swap(rows: list[Any]) -> None:
    rows[0], rows[26] = rows[26], rows[0]


@pytest.mark.thin(1)
@pytest.mark.parametrize("change", [replace_text, append, drop, swap])
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "half"])
def test_other_corpus(lab: Lab, tmp_path: Path, change: Callable[[list[Any]], None], complete: bool) -> None:
    shutil.copytree(lab.checkpoint, tmp_path / "model")
    shutil.copy(lab.corpus, tmp_path / "corpus.jsonl")
    fault = {"call": "name", "path": r"00000002\.json$", "when": "before", "act": "EIO"}
    built = build(lab, tmp_path, **({} if complete else {"fault": fault}))
    assert built.code == (0 if complete else 6)
    before = lab.tree(tmp_path / "store")
    rows = [dict(row) for row in lab.rows]
    change(rows)
    lab.write(tmp_path / "corpus.jsonl", rows)
    words = ["corpus.fingerprint: stored 'sha256:", "asked for 'sha256:"]
    if change is append and not complete:  # completed: tests/indexer/build/test_grown.py
        assert build(lab, tmp_path).code == 0
        return
    if change is append:
        words = [
            "has grown since part 'part'",
            "the 27 samples of the part are unchanged, 1 follow",
            "--skip-samples 27",
        ]
    refused(build(lab, tmp_path), *words)
    assert lab.tree(tmp_path / "store") == before


def test_the_same_corpus_elsewhere_continues(lab: Lab, own: Path) -> None:
    """Where a corpus lies, and in which order its fields are written, is not what it is."""
    before = lab.tree(own / "store")
    moved = lab.write(own / "elsewhere.jsonl", [dict(reversed(row.items())) for row in lab.rows])
    outcome = lab.build(own / "store", "--data", moved)
    assert outcome.code == 0, outcome.err
    assert lab.tree(own / "store") == before


@pytest.mark.parametrize("form", ["corpus.parquet", "corpus.jsonl"])
def test_the_same_samples_at_other_places(lab: Lab, own: Path, form: str) -> None:
    """Rows lead back to their samples by these places: what differs is said, and what to do."""
    data = own / "other" / form
    data.parent.mkdir()
    rows = [json.loads(line) for line in (own / "corpus.jsonl").read_text().splitlines()]
    words = []
    if form == "corpus.parquet":
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).to_parquet(data)
        words = ["source.form: stored 'jsonl', asked for 'parquet'", "span 0 begins at offset: stored 0, asked for -1"]
    else:
        data.write_text("".join(json.dumps(row, separators=("   ,", ":")) + "\n" for row in rows))
        begins = [
            sum(len(line) for line in path.read_bytes().splitlines(keepends=True)[:6])
            for path in (own / "corpus.jsonl", data)
        ]
        words = [f"span 1 begins at offset: stored {begins[0]}, asked for {begins[1]}"]
    before = lab.tree(own / "store")
    refused(
        lab.build(own / "store", "--checkpoint", own / "model", "--data", data),
        *words,
        "part 'part'",
        "source.data: stored ",
        "the same samples",
        "nothing was changed",
        f"--data {own / 'corpus.jsonl'}",
        "another --name",
    )
    assert lab.tree(own / "store") == before


def test_standard_input_of_another_content(lab: Lab, tmp_path: Path) -> None:
    """Refused like a file, and the corpus that was kept for the first build is still that one."""
    store = tmp_path / "store"
    assert lab.build(store, "--data", "-", stdin=str(lab.corpus)).code == 0
    before = lab.tree(store)
    other = lab.write(tmp_path / "other.jsonl", lab.sample_rows(27, seed=9))
    refused(lab.build(store, "--data", "-", stdin=str(other)), "corpus.fingerprint: stored 'sha256:")
    assert lab.tree(store) == before


@pytest.mark.thin(1)
@pytest.mark.parametrize(("node", "what"), [("zarr.json", "store"), ("parts/part/zarr.json", "part")])
@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_other_format_version(lab: Lab, own: Path, node: str, what: str, version: Any) -> None:
    path = own / "store" / node
    metadata = json.loads(path.read_text())
    metadata["attributes"]["ghoststore_format"] = version
    path.write_text(json.dumps(metadata))
    before = lab.tree(own / "store")
    words = ["has no 'ghoststore_format'"] if version is None else [f"format version {version!r}", "reads version 1"]
    for outcome in (build(lab, own), query(lab, own), lab.run("info", "--store", own / "store")):
        refused(outcome, str(path), *words)
    assert lab.run("verify", "--store", own / "store", "--quiet").code == 3
    assert lab.tree(own / "store") == before


def test_a_zarr_group_of_someone_else(lab: Lab, tmp_path: Path) -> None:
    import zarr

    zarr.create_group(tmp_path / "store", attributes={"mine": True})
    before = lab.tree(tmp_path / "store")
    refused(lab.build(tmp_path / "store"), "not ghoststore's")
    assert lab.tree(tmp_path / "store") == before


def test_a_manifest_edited_by_hand(lab: Lab, own: Path) -> None:
    """Its checksum does not hold: damage, not another build."""
    path = own / "store/parts/part/zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["manifest"]["projection"]["seed"] = 5
    path.write_text(json.dumps(metadata))
    before = lab.tree(own / "store")
    for outcome in (build(lab, own, "--proj-seed", "5"), query(lab, own), lab.run("info", "--store", own / "store")):
        assert outcome.code == 4, outcome.err
        assert str(path) in outcome.err
        assert "checksum" in outcome.err
    assert lab.tree(own / "store") == before


def test_an_edit_with_a_new_checksum(lab: Lab, own: Path) -> None:
    """A hand that knows the checksum is still found out: the matrices do not have the stored hash."""
    from ghoststore.store.base.records import json_digest

    path = own / "store/parts/part/zarr.json"
    metadata = json.loads(path.read_text())
    attributes = metadata["attributes"]
    attributes["manifest"]["projection"]["seed"] = 5
    attributes["manifest_sha256"] = json_digest(attributes["manifest"])
    path.write_text(json.dumps(metadata))
    # Nobody's build wrote this manifest, so the checkpoint that it names is not opened by itself.
    refused(
        query(lab, own, "--checkpoint", own / "model"), "projection matrices have the hash sha256:", "draws sha256:"
    )


def test_other_model_of_the_same_weights_names(lab: Lab, own: Path) -> None:
    """A checkpoint with another number of layers."""
    before = lab.tree(own / "store")
    shutil.rmtree(own / "model")
    lab.model(own / "model", layers=2)
    refused(build(lab, own), "checkpoint.fingerprint", "projection.compress: stored 8192, asked for 16384")
    refused(query(lab, own), "other weights")
    assert lab.tree(own / "store") == before
