"""Every form of file gives the same samples, from any place on, at random, and in a scan."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghoststore.corpus import Corpus, Position, Sample, SampleScan, Scan
from tests.support.corpora import FORMS, Write, csv_bytes, jsonl_bytes

TEXTS = [
    "plain",
    "",
    "two\nlines",
    "CRLF\r\ninside",
    'a "quoted", comma',
    "ünïcødé 漢字 🐈",
    "\u2028 and \x85 are no line ends",
    "  spaces\t",
    "last",
    "x" * 200_000,
]
ROWS = [{"id": f"n{i}", "text": text, "domain": f"d{i % 3}"} for i, text in enumerate(TEXTS)]


def placeless(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, offset=-1, file=0) for sample in samples]


def position(sample: Sample) -> Position:
    return Position(source_row=sample.source_row, file=sample.file, offset=sample.offset)


@pytest.mark.parametrize("form", FORMS)
def test_same_samples_and_fingerprint(form: str, write: Write) -> None:
    corpus = Corpus.open(write(form, ROWS))
    samples = list(corpus.samples())
    assert [(s.source_row, s.id, s.content, s.domain) for s in samples] == [
        (i, row["id"], row["text"], row["domain"]) for i, row in enumerate(ROWS)
    ]
    reference = Corpus.open(write("jsonl", ROWS))
    assert placeless(samples) == placeless(list(reference.samples()))
    assert SampleScan(samples).finish() == SampleScan(reference.samples()).finish()
    assert corpus.files == sorted(corpus.files)


@pytest.mark.parametrize("form", FORMS)
def test_start_equals_tail(form: str, write: Write) -> None:
    corpus = Corpus.open(write(form, ROWS))
    samples = list(corpus.samples())
    for number, sample in enumerate(samples):
        again = Corpus.open(corpus.source, corpus.resolved)
        assert list(again.samples(position(sample))) == samples[number:]
        assert list(again.samples(replace(position(sample), offset=-1))) == samples[number:]


@pytest.mark.parametrize("form", FORMS)
def test_fetch_equals_iteration(form: str, write: Write) -> None:
    corpus = Corpus.open(write(form, ROWS))
    samples = {sample.source_row: sample for sample in corpus.samples()}
    order = random.Random(0).choices(list(samples), k=15)
    expected = {row: samples[row] for row in order}
    again = Corpus.open(corpus.source, corpus.resolved)
    assert again.fetch([position(samples[row]) for row in order]) == expected
    assert again.fetch([replace(position(samples[row]), offset=-1) for row in order]) == expected
    assert again.fetch([]) == {}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_txt_is_one_sample_a_line(packing: str, tmp_path: Path) -> None:
    from tests.support.corpora import packed

    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(packed("\ufeffone\r\n\ntwo \r x\n漢字\n".encode(), packing.removeprefix(".")))
    corpus = Corpus.open(str(path))
    samples = list(corpus.samples())
    assert [s.content for s in samples] == ["one", "", "two \r x", "漢字"]
    assert [s.id for s in samples] == ["0", "1", "2", "3"]
    for number, sample in enumerate(samples):
        assert list(corpus.samples(position(sample))) == samples[number:]
    assert corpus.fetch([position(s) for s in reversed(samples)]) == dict(enumerate(samples))


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n \r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_endings_and_bom(ending: bytes, last: bytes, bom: bytes, tmp_path: Path) -> None:
    lines = {"a.jsonl": [b'{"text":"a"}', b'{"text":"b"}'], "a.csv": [b"text", b"a", b"b"]}
    for name, each in lines.items():
        if name == "a.csv" and b" " in last:
            continue
        (tmp_path / name).write_bytes(bom + ending.join(each) + last)
        corpus = Corpus.open(str(tmp_path / name))
        samples = list(corpus.samples())
        assert [s.content for s in samples] == ["a", "b"]
        assert corpus.fetch([position(s) for s in samples]) == dict(enumerate(samples))
        assert list(corpus.samples(position(samples[0]))) == samples


def test_suffix_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_bytes(jsonl_bytes(ROWS))
    assert Corpus.open(str(tmp_path / "A.JSONL")).form == "jsonl"


def test_offsets_are_bytes_of_records(write: Write) -> None:
    path = Path(write("jsonl", ROWS))
    for sample in Corpus.open(str(path)).samples():
        record = path.read_bytes()[sample.offset :].split(b"\n", 1)[0] + b"\n"
        assert record == jsonl_bytes([ROWS[sample.source_row]])


def test_saved_dataset_dict_needs_a_split(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    folder = str(tmp_path / "saved")
    parts = {"train": datasets.Dataset.from_list(ROWS[:4]), "test": datasets.Dataset.from_list(ROWS[4:])}
    datasets.DatasetDict(parts).save_to_disk(folder)
    assert [s.id for s in Corpus.open(f"{folder}:test").samples()] == [row["id"] for row in ROWS[4:]]
    for source in (folder, f"{folder}:valid"):
        with pytest.raises(ValueError, match=r"saved:train.*saved:test"):
            Corpus.open(source)
    with pytest.raises(ValueError, match="has no splits"):
        Corpus.open(f"{folder}/train:train")


def test_shuffled_dataset_keeps_its_order(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    folder = str(tmp_path / "saved")
    shuffled = datasets.Dataset.from_list(ROWS).shuffle(seed=1)
    shuffled.save_to_disk(folder)
    assert [s.id for s in Corpus.open(folder).samples()] == shuffled["id"][:]


def test_dataset_with_mixed_json_content(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", minversion="4.7")
    datasets.disable_progress_bars()
    rows = [
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    ]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes(rows))
    saved, lines = (Corpus.open(str(tmp_path / name)) for name in ("saved", "a.jsonl"))
    assert placeless(list(saved.samples())) == placeless(list(lines.samples()))


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"id": words, "text": words, "domain": words}), min_size=1, max_size=8))
def test_csv_and_jsonl_agree_on_any_text(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    scans: list[Scan] = []
    for name, data in (("a.csv", csv_bytes(rows)), ("a.jsonl", jsonl_bytes(rows))):
        (tmp_path / name).write_bytes(data)
        corpus = Corpus.open(str(tmp_path / name))
        samples = list(corpus.samples())
        assert [(s.id, s.content, s.domain) for s in samples] == [
            (row["id"], row["text"], row["domain"]) for row in rows
        ]
        assert corpus.fetch([position(s) for s in reversed(samples)]) == dict(enumerate(samples))
        scans.append(SampleScan(samples).finish())
    assert scans[0] == scans[1]
