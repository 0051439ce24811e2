"""``select --card``: a dataset card that the hub's reader takes, true to the report, whatever names say."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pytest
from huggingface_hub import DatasetCard

import ghoststore
from ghoststore.corpus import Fields
from ghoststore.errors import UsageError
from ghoststore.settings.question import SelectOptions, parse_quota
from ghoststore.store import Store
from query.select.card import _size, command_line, escaped

if TYPE_CHECKING:
    from tests.conftest import Lab

HOSTILE = "sky | <script>alert(1)</script> [x](http://x) `a` **b**\n---\nlicense: mit\n# T"


@pytest.fixture
def val(lab: Lab, tmp_path: Path) -> Path:
    return lab.write(tmp_path / "val.jsonl", lab.sample_rows(4, seed=3))


def load(path: Path, cache: Path) -> list[dict[str, Any]]:
    rows = datasets.load_dataset(str(path), split="train", cache_dir=str(cache))
    return [dict(row) for row in rows]


def test_says_what_was_chosen_and_how(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    """The numbers are those of the report; the command in it chooses the same rows; the hub finds the rows."""
    (tmp_path / "one").mkdir()
    out = tmp_path / "one/best.jsonl"
    words = ("select", "--store", built, "--val-set", val, "--quota", "sky=0.5", "--metric", "cosine")
    made = lab.run(*words, "--count", "6", "--out", out, "--card", "--json")
    assert made.code == 0, made.err
    report = made.json
    assert report["card"] == str(tmp_path / "one/README.md")
    card = DatasetCard.load(tmp_path / "one/README.md")
    assert card.data.size_categories == ["n<1K"]
    assert "data-selection" in card.data.tags
    assert (card.data.language, card.data.license) == (None, None)
    assert f"6 of {report['available']} samples" in card.text
    assert f"{report['tokens']:,} tokens" in card.text
    manifest = Store.open(built).part().manifest
    for section in ("checkpoint", "corpus"):
        assert escaped(manifest[section]["fingerprint"]) in card.text
    for share in report["domains"]:
        assert f"| {share['domain']} | {share['chosen']} | {share['available']} | {share['tokens']} |" in card.text
    assert f"{report['leaks']['found']} rows of the corpus hold at least 50%" in card.text
    (line,) = [line for line in card.text.splitlines() if line.startswith("ghoststore select")]
    again = line.replace(str(out), str(tmp_path / "again.jsonl")).replace(" --card", "")
    assert lab.run(*shlex.split(again)[1:]).code == 0
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
    rows = load(out.parent, tmp_path / "cache")
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]


def test_of_a_folder_it_lies_inside(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    made = ghoststore.select(store=built, val_set=val, count=5, out=tmp_path / "best", card=True, device="cpu")
    assert made.card == str(tmp_path / "best/README.md")
    card = DatasetCard.load(tmp_path / "best/README.md")
    assert card.data.to_dict().keys() == {"size_categories", "tags"}
    assert "`datasets.load_from_disk` opens them" in card.text
    assert len(datasets.load_from_disk(str(tmp_path / "best"))) == 5
    plain = ghoststore.select(store=built, val_set=val, count=5, out=tmp_path / "plain", device="cpu")
    assert plain.card is None
    assert not (tmp_path / "plain/README.md").exists()


def test_names_are_no_markup(lab: Lab, tmp_path: Path, val: Path) -> None:
    """Domains, paths and parts of any name: the card keeps its metadata, its headings and its tables."""
    rows = [row | {"domain": HOSTILE if row["domain"] == "sky" else "earth"} for row in lab.rows]
    data = lab.write(tmp_path / "train.jsonl", rows)
    assert lab.build(tmp_path / "store", "--data", data).code == 0
    hostile_val = val.rename(tmp_path / "v```|<b>\n---.jsonl")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out/# <i>x.jsonl"
    ghoststore.select(store=tmp_path / "store", val_set=hostile_val, count=9, out=out, card=True, device="cpu")
    text = (tmp_path / "out/README.md").read_text()
    card = DatasetCard(text)
    assert card.data.to_dict().keys() == {"size_categories", "tags", "configs"}
    assert [line for line in text.splitlines() if line == "---"] == ["---", "---"]
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        r"# \# &lt;i&gt;x.jsonl",
        "## How it was chosen",
        "## By domain",
        "## Scores (nats) and lengths",
        "## Near-duplicates of the val set",
    ]
    assert card.data.configs[0]["data_files"][0]["path"] == out.name
    in_code = False
    for line in card.text.splitlines():
        if line.startswith("```"):
            in_code = not in_code
        assert in_code or not any(tag in line for tag in ("<script", "<b>", "<i>", "](http"))
    (of_sky,) = [line for line in text.splitlines() if "alert" in line]
    assert of_sky.replace(r"\|", "").count("|") == 6


@pytest.mark.slow
def test_of_a_union(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    """Every part is named with its fingerprint."""
    store, new = tmp_path / "store", lab.write(tmp_path / "new.jsonl", lab.sample_rows(8, seed=9))
    assert lab.build(store).code == 0
    ghoststore.build(like="part", data=new, store=store, name="new", device="cpu")
    made = ghoststore.select(
        store=store, val_set=val, part=["part", "new"], count=20, out=tmp_path / "both", card=True, device="cpu"
    )
    text = Path(str(made.card)).read_text()
    assert "| part | part |" in text
    assert "| part | new |" in text
    assert "--part part --part new" in text


def test_a_card_that_is_there_stays(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    options: dict[str, Any] = {"store": built, "val_set": val, "count": 5, "card": True, "device": "cpu"}
    with pytest.raises(UsageError, match=r"`card` writes .*README.md, which exists; .* a folder of its own"):
        ghoststore.select(out=tmp_path / "best.jsonl", **options)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "val.jsonl"]


COMMANDS: list[tuple[dict[str, Any], str]] = [
    ({"val_set": "v w.jsonl", "fields": Fields(text="body")}, "--text-field body --val-set 'v w.jsonl' --out o"),
    ({"run": "r", "step_window": slice(None, -5)}, "--run r --step-window :-5 --out o"),
    ({"run": "r", "step_window": slice(2, 10), "last": 3}, "--run r --step-window 2:10 --last 3 --out o"),
    ({"part": ["a", "b"], "checkpoint": ["c", "d"]}, "--part a --part b --checkpoint c --checkpoint d --out o"),
    ({"data": [Path("a"), Path("b")]}, "--data a --data b --out o"),
    ({"val_set": [Path("a"), Path("b")]}, "--val-set '…' --out o"),
    ({"minus": ["a text"], "checkpoint": object()}, "--minus '…' --checkpoint '…' --out o"),
    ({"quotas": {"a=b": 0.3, "c": 100, "d": 1e-5}}, "--out o --quota a=b=0.3 --quota c=100 --quota d=1e-05"),
]


@pytest.mark.parametrize(("options", "words"), COMMANDS, ids=[words for _, words in COMMANDS])
def test_the_command_has_what_was_given(options: dict[str, Any], words: str) -> None:
    assert command_line(SelectOptions(store="s", out="o", **options)) == f"ghoststore select --store s {words}"


def test_quotas_of_the_command_are_read_back() -> None:
    assert parse_quota("d=1e-05") == ("d", 1e-5)
    assert parse_quota("a=b=0.3") == ("a=b", 0.3)


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        *[(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (123_456, "100K<n<1M"), (10**7, "10M<n<100M")],
        *[(10**10, "10B<n<100B"), (10**11, "100B<n<1T"), (10**12, "n>1T"), (10**14, "n>1T")],
    ],
)
def test_sizes_are_those_of_the_hub(rows: int, name: str) -> None:
    assert _size(rows) == name


def test_texts_in_memory_are_not_in_the_command(lab: Lab, built: Path, tmp_path: Path) -> None:
    made = ghoststore.select(
        store=built, val_set=["a secret question"], count=3, out=tmp_path / "best", card=True, device="cpu"
    )
    text = Path(str(made.card)).read_text()
    assert "secret" not in text
    assert "--val-set …" in text or "--val-set '…'" in text
