"""What a source may be: files, patterns, several of them, folders of the hub; and what is said of others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ghoststore.corpus import Corpus, Position, part_word
from ghoststore.corpus.locate import absolute, exists
from ghoststore.errors import CorpusError
from tests.support.corpora import jsonl_bytes, write_parquet


def rows(name: str, count: int = 2) -> list[dict[str, str]]:
    return [{"id": f"{name}{i}", "text": f"text {i} of {name}"} for i in range(count)]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    for name in ("b", "a", "more/c"):
        (folder / f"{name}.jsonl").write_bytes(jsonl_bytes(rows(name)))
    (folder / "README.md").write_text("not data")
    return folder


def ids(source: object) -> list[str]:
    """The ids of a corpus, which `fetch` and a start in the middle give, too."""
    corpus = Corpus.open(source)  # type: ignore[arg-type]
    samples = list(corpus.samples())
    places = [Position(source_row=s.source_row, file=s.file, offset=s.offset) for s in samples]
    again = Corpus.open(corpus.recorded, corpus.resolved)
    assert again.fetch(places[::-1]) == {s.source_row: s for s in samples}
    assert list(again.samples(places[-1])) == samples[-1:]
    return [s.id for s in samples]


def message(source: object) -> str:
    with pytest.raises(CorpusError) as caught:
        list(Corpus.open(source).samples())  # type: ignore[arg-type]
    return str(caught.value)


def test_patterns(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ids(f"{files}/*.jsonl") == ["a0", "a1", "b0", "b1"]
    assert ids(f"{files}/**/*.jsonl") == ["a0", "a1", "b0", "b1", "more/c0", "more/c1"]
    assert ids(f"{files}/*") == ["a0", "a1", "b0", "b1"]
    assert ids(f"{files}/[b]*") == ["b0", "b1"]
    monkeypatch.chdir(files)
    assert Corpus.open("*.jsonl").recorded == f"{files}/*.jsonl"
    assert ids("*.jsonl") == ["a0", "a1", "b0", "b1"]
    assert "x*.jsonl: no file has such a name" in message(f"{files}/x*.jsonl")
    (files / "c.csv").write_text("text\na\n")
    assert "expected files of one form, found csv, jsonl" in message(f"{files}/*")


def test_a_file_whose_name_is_a_pattern(files: Path) -> None:
    (files / "a[1].jsonl").write_bytes(jsonl_bytes(rows("odd")))
    assert ids(files / "a[1].jsonl") == ["odd0", "odd1"]


def test_several(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they are given."""
    assert ids([files / "b.jsonl", files / "a.jsonl"]) == ["b0", "b1", "a0", "a1"]
    assert ids((files / "more", files / "*.jsonl")) == ["more/c0", "more/c1", "a0", "a1", "b0", "b1"]
    monkeypatch.chdir(files)
    several = Corpus.open([Path("b.jsonl"), Path("more")])
    assert several.recorded.split("\n") == [f"{files}/b.jsonl", f"{files}/more"]
    assert exists(several.recorded)
    assert not exists(several.recorded + "\n/no/such")
    assert part_word([Path("b.jsonl"), Path("a.jsonl")]) == "b"
    assert [part_word(name) for name in ("x/train-*.jsonl.gz", "x/*.json", "a.tsv")] == ["train", "x", "a"]
    assert "is given twice" in message([Path("a.jsonl"), Path("*.jsonl")])
    assert "nothing: does not exist" in message([Path("a.jsonl"), Path("nothing")])
    (files / "c.csv").write_text("text\na\n")
    assert "expected files of one form, found csv after jsonl" in message([Path("a.jsonl"), Path("c.csv")])


def test_several_are_no_datasets(files: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows("d")).save_to_disk(str(files / "saved"))
    assert "has to be a file, a folder of files or a pattern" in message([files / "saved", files / "a.jsonl"])


CARD = "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: data/train-*\n{}---\n"
OTHER = "- config_name: large\n  data_files: data/test-*\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A dataset\n")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs")
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"):
        write_parquet(folder / "data" / f"{name}.parquet", rows(name[:8].rstrip("-")))
    return folder


def test_a_clone_of_the_hub(clone: Path) -> None:
    assert [name[:-1] for name in ids(f"{clone}:train")] == ["train-00"] * 4
    assert Corpus.open(f"{clone}:train").files == sorted(clone.glob("data/train*"))
    assert ids(f"{clone}:test") == ["test-0000", "test-0001"]
    assert f"which split? it has {clone}:train, {clone}:test" in message(clone)
    assert f"no split 'dev'; it has {clone}:train, {clone}:test" in message(f"{clone}:dev")
    for file in clone.glob("data/test*"):
        file.unlink()
    assert len(ids(clone)) == 4
    assert absolute(f"{clone}/../clone:train") == f"{clone}:train"


def test_a_clone_with_configurations(clone: Path) -> None:
    (clone / "README.md").write_text(CARD.format(""))
    assert len(ids(clone)) == 4
    (clone / "README.md").write_text(CARD.format(OTHER))
    assert "which configuration? it has" in message(clone)
    assert f"{clone}:small:SPLIT" in message(f"{clone}:train")
    assert len(ids(f"{clone}:small:train")) == 4
    assert ids(f"{clone}:large:train") == ["test-0000", "test-0001"]
    assert f"no split 'x'; it has {clone}:small:train" in message(f"{clone}:small:x")
    assert "no configuration 'x'" in message(f"{clone}:x:train")


def test_a_clone_with_files_at_the_top(tmp_path: Path) -> None:
    """Its splits are not one corpus; in a folder without a card files are only files."""
    for name in ("train", "validation"):
        (tmp_path / f"{name}.json").write_bytes(jsonl_bytes(rows(name)))
    assert len(ids(tmp_path)) == 4
    assert ids(f"{tmp_path}:validation") == ["validation0", "validation1"]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert "which split?" in message(tmp_path)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert ids(f"{tmp_path}:train") == ["train0", "train1"]


def test_a_card_that_leads_elsewhere(clone: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "secret.parquet", rows("s"))
    (clone / "README.md").write_text(CARD.format("").replace("data/train-*", str(tmp_path / "secret.parquet")))
    assert "outside" in message(clone) or "not found" in message(clone)


def test_what_git_lfs_left(clone: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for file in clone.glob("data/*"):
        file.write_bytes(pointer)
    assert "run `git lfs pull`" in message(f"{clone}:train")
    assert "run `git lfs pull`" in message(next(clone.glob("data/*")))


def test_the_hub_offline() -> None:
    """As the command says it: what was looked for, and why it was not found."""
    code = (
        "import sys\nfrom ghoststore.corpus import Corpus\n"
        "for source in ('no-such/data:train', 'no-such/data:config:train[:10%]', 'no-such/data'):\n"
        "    try:\n        Corpus.open(source)\n    except ValueError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    split, config, bare = run.stdout.splitlines()
    for line in (split, config):
        assert "no such path exists, and the Hugging Face hub could not be reached" in line
        assert "ffline" in line
    assert bare == "no-such/data: does not exist; for a dataset of the hub, add its split: no-such/data:train"
