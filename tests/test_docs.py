"""Docs cannot drift: the reference is the commands' own help, and what the README shows exists and runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import ghoststore
from ghoststore.cli import COMMANDS, cli
from ghoststore.cli.reference import reference
from ghoststore.store import RunLayout, Status
from ghoststore.store.base.names import FORMAT_VERSION
from ghoststore.store.part.encoding import ENCODINGS
from ghoststore.store.part.layout import PartLayout
from ghoststore.tokens.manifest import SAMPLE, SHARDS_VERSION
from query.doctor.examination import CHECKS

if TYPE_CHECKING:
    from tests.conftest import Lab

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


OTHER_OPTIONS = {"--array", "--help", "--mode", "--packing", "--version"}
"""Of SLURM, of every command, of examples."""


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_reference_is_what_the_commands_say() -> None:
    assert (ROOT / "docs/cli.md").read_text() == reference(), "run `make docs`"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    found = command(name)
    assert found.help
    lacking = [p.name for p in found.params if isinstance(p, click.Option) and not p.help]
    assert not lacking


def shown_commands() -> list[tuple[str, str]]:
    return [
        (page.name, line.split("  #")[0].replace("…", ""))
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("ghoststore ")
    ]


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_every_command_line_in_the_docs_exists(page: str, line: str) -> None:
    _, name, *arguments = shlex.split(line)
    options = {flag for p in command(name).params for flag in (*p.opts, *p.secondary_opts)}
    assert {word for word in arguments if word.startswith("--")} <= options, f"{page}: {line}"


def test_files_named_in_the_docs_exist() -> None:
    """In backticks: paths from the root, and tests by the names of their file and function."""
    sources = {file.stem: file.read_text() for file in ROOT.glob("tests/**/*.py")}
    names = {*sources, *(name for source in sources.values() for name in re.findall(r"def (test_\w+)", source))}
    roots = "tests|benchmarks|docs|examples|indexer|query|ghoststore"
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(rf"`((?:{roots})/[\w./*-]*)`", text):
            assert list(ROOT.glob(name)), f"{page.name}: {name}"
        for name, function in re.findall(r"`(?:tests/[\w/]*)?(test_\w+\.py)(?:::(\w+))?`", text):
            files = [file.read_text() for file in ROOT.glob(f"tests/**/{name}")]
            assert files, f"{page.name}: {name}"
            assert any(f"def {function}" in source for source in files), f"{page.name}: {name}::{function}"
        assert set(re.findall(r"`(test_\w+)`", text)) <= names, page.name


def test_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for block in blocks(page, "bash"):
            assert set(re.findall(r"^make ([a-z-]+)", block, flags=re.MULTILINE)) <= targets, page


def anchors(page: Path) -> set[str]:
    """Those that a git host gives the headings of a page."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in link:
                continue
            target, _, anchor = link.partition("#")
            to = page.parent / target if target else page
            assert to.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(to), f"{page.name}: {link}"


def test_options_named_in_the_docs_exist() -> None:
    """In prose: words in backticks that begin with two dashes, but for those of other programs. Design notes speak of
    options that were not made.
    """
    options = {flag for name in COMMANDS for p in command(name).params for flag in (*p.opts, *p.secondary_opts)}
    for page in PAGES:
        if "design" in page.parts:
            continue
        text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", text):
            if not span.startswith(("--", "ghoststore ", *COMMANDS)):
                continue
            named = set(re.findall(r"(?<!\S)--[a-z][a-z-]*(?![\w…-])", span))
            assert named <= options | OTHER_OPTIONS, f"{page.name}: {span}"


@pytest.mark.parametrize("name", ["adapters", "models", "scale"])
def test_lines_are_no_wider_than_an_editor(name: str) -> None:
    wide = [line for line in (ROOT / f"docs/{name}.md").read_text().splitlines() if len(line) > 125]
    assert not wide


def test_the_loop_with_vectors_runs() -> None:
    (loop,) = [block for block in blocks(ROOT / "docs/python.md", "python") if "GradProjLoraEngine" in block]
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    names: dict[str, Any] = {
        "model": model,
        "batches": [(x, y)],
        "loss_of_each_sample": lambda logits, y: torch.nn.functional.cross_entropy(logits, y, reduction="none"),
    }
    exec(loop, names)
    assert names["vectors"].shape == (4, names["engine"].dimension)


class Loops:
    """What the loops of the docs are given: a small model, rows, val data."""

    def __init__(self) -> None:
        transformers.utils.logging.disable_progress_bar()
        config = transformers.GPT2Config(
            vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        torch.manual_seed(0)
        self.model = transformers.GPT2LMHeadModel(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.rows = torch.randint(30, (12, 8))
        self.val_data = {"input_ids": self.rows[:2], "labels": self.rows[:2]}
        self.batches = [{"input_ids": rows, "labels": rows} for rows in self.rows.split(4)]
        self.dataset = Dataset.from_dict({"input_ids": self.rows.tolist(), "labels": self.rows.tolist()})
        self.max_steps = 12
        self.X_val = self.Y_val = self.rows[:2]

    def get_batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = torch.arange(4) + 4 * (iteration % 3)
        return self.rows[places], self.rows[places], places

    def train_step(self, manager: Any, iteration: int) -> None:
        X, Y, batch_idx = self.get_batch(iteration)
        manager.attach_train_batch(X, Y, iteration, batch_idx)
        X, Y = manager.prepare_forward_input(X, Y)
        self.model(input_ids=X, labels=Y).loss.backward()
        manager.prepare_gradients()
        self.optimizer.step()
        manager.aggregate_and_log()
        self.optimizer.zero_grad()

    def names(self) -> dict[str, Any]:
        return {**vars(self), "get_batch": self.get_batch, "train_step": self.train_step, "torch": torch}


def test_the_plain_loop_runs() -> None:
    loop = blocks(ROOT / "docs/loops.md", "python")[0]
    assert "GradDotProdEngine" in loop
    exec(loop, names := Loops().names())
    assert names["scores"].total.shape == (4,)


@pytest.mark.slow
def test_the_loops_of_their_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, own, packed, choosing, manager, trainer, _, save, resume = blocks(ROOT / "docs/loops.md", "python")
    exec(plain, Loops().names())
    assert capsys.readouterr().out.count("tensor(") == 3
    exec(own, names := Loops().names())
    assert names["scores"].total.isfinite().all()
    exec(packed, names := Loops().names())
    assert names["scores"].total.isfinite().all()
    before = Loops()
    exec(choosing, names := before.names())
    assert names["scores"].total.isfinite().all()
    assert before.optimizer.state
    exec(manager, Loops().names())
    assert ghoststore.Store.open("store").run("mine").complete
    exec(trainer, Loops().names())
    assert ghoststore.Store.open("store").run("trained").complete

    first = Loops()
    config = ghoststore.GhostConfig(store="store", name="resumed", samples=12, max_steps=12, batch_size=4)
    ghosts = ghoststore.GhostEngineManager(config, first.model, first.optimizer, (first.X_val, first.Y_val))
    for iteration in range(5):
        first.train_step(ghosts, iteration)
    exec(save, {**first.names(), "manager": ghosts})
    ghosts.cleanup()
    assert ghoststore.Store.open("store").run("resumed").steps == 0
    names = {**Loops().names(), "config": config, "GhostEngineManager": ghoststore.GhostEngineManager}
    exec(resume, names)
    assert ghoststore.Store.open("store").run("resumed").complete


@pytest.mark.slow
def test_the_loop_of_trl_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
    monkeypatch.chdir(tmp_path)
    (loop,) = [block for block in blocks(ROOT / "docs/loops.md", "python") if "SFTTrainer" in block]
    words = {"<pad>": 0, **{f"w{number}": number for number in range(1, 30)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    exec(loop, {**Loops().names(), "tokenizer": tokenizer})
    assert ghoststore.Store.open("store").run("tuned").complete


def test_the_policy_of_the_page_of_choosing_runs(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lab.checkpoint, "my-model")
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(lab.corpus, name)
    policy, _ = blocks(ROOT / "docs/choosing.md", "python")
    exec(policy, {"__name__": "page"})
    run = ghoststore.Store.open("store").run()
    assert (run.read_committed("weight") > 0).sum((1, 2)).tolist() == [8] * 4
    assert run.manifest["scoring"]["choosing"]["policy"] == "page.surprising"


def test_the_format_page_lists_every_array_and_status() -> None:
    page = (ROOT / "docs/format.md").read_text()
    layout = PartLayout(rows=1, dimension=1, groups=1, dtype="int8", span_rows=1, chunk_rows=1, store_text=True)
    assert f"format version {FORMAT_VERSION}" in page
    for name in [*(spec.name for spec in layout.arrays()), *ENCODINGS]:
        assert f"| `{name}` |" in page
    several = {"groups": ("g",), "blocks": ("b",), "dimension": 1, "weights": True}
    run = RunLayout(steps=1, ranks=1, batch=1, span_steps=1, rows=1, **several)
    for spec in run.arrays():
        assert re.search(rf"^\| `{spec.name}` \| .* \| {spec.dtype.name} \|", page, flags=re.MULTILINE)
    for spec in run.row_arrays():
        assert f"`{spec.name}`" in page
    for status in Status:
        assert re.search(rf"^\| {status.value} \| {status.name.lower().replace('_', ' ')}", page, flags=re.MULTILINE)


def test_the_page_of_shards_lists_every_field() -> None:
    page = (ROOT / "docs/shards.md").read_text()
    assert f"format version {SHARDS_VERSION}" in page
    assert f"packed, {SAMPLE.itemsize} bytes" in page
    listed = re.findall(r"^\| `(\w+)` \| (u?int\d+) \|", page, flags=re.MULTILINE)
    assert listed == [(name, SAMPLE[name].name) for name in SAMPLE.names or ()]


def test_the_python_of_the_page_of_shards_runs(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks(ROOT / "docs/shards.md", "python")
    monkeypatch.chdir(tmp_path)
    ghoststore.tokenize(data=lab.corpus, tokenizer=lab.checkpoint, out="shards")
    exec(block, names := dict[str, Any]())
    assert names["shards"].decode(names["ids"]) == lab.rows[7]["text"]


@pytest.mark.slow
def test_the_python_of_the_page_of_sessions_runs(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions, session, results, build, loaded, _ = blocks(ROOT / "docs/python.md", "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(lab.checkpoint)
    lab.write(tmp_path / "val.jsonl", lab.sample_rows(3, 5))
    (tmp_path / "train.jsonl").symlink_to(lab.corpus)
    exec(functions.replace("./store", "./files"), {})
    rows = [{**row, "domain": "weather"} for row in lab.sample_rows(12, 1)]
    ghoststore.build(checkpoint="my-model", data=rows, store="store", name="first")
    exec(session, names := dict[str, Any]())
    assert len(names["rows"]) == 12
    names["result"] = ghoststore.query(store="store", val_set=rows[:2], group_field="domain")
    exec(results, names)
    exec(build.replace("./store", "./other"), {"ghoststore": ghoststore})
    model = transformers.AutoModelForCausalLM.from_pretrained(lab.checkpoint)
    names |= {"model": model, "tokenizer": transformers.AutoTokenizer.from_pretrained(lab.checkpoint), "rows": rows}
    exec(loaded.replace("./store", "./third"), names)


@pytest.mark.slow
def test_the_python_of_the_page_of_select_runs(
    lab: Lab, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks(ROOT / "docs/select.md", "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").symlink_to(built)
    lab.write(tmp_path / "val.jsonl", lab.sample_rows(3, 5))
    exec(block, names := dict[str, Any]())
    assert names["made"].samples == 10
    assert "sky 3 of 14" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("page", ["query", "evaluate"])
def test_the_python_of_the_pages_of_questions_runs(
    lab: Lab,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    page: str,
) -> None:
    (block,) = blocks(ROOT / f"docs/{page}.md", "python")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built, tmp_path / "store")
    lab.write(tmp_path / "val.jsonl", lab.sample_rows(4, 5))
    exec(block, {})
    out = capsys.readouterr().out
    assert ("combined [('row-" if page == "query" else "preconditioned-dot Lds(") in out


@pytest.mark.slow
def test_the_python_of_the_page_of_the_doctor_runs(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks(ROOT / "docs/doctor.md", "python")
    monkeypatch.chdir(tmp_path)
    lab.write(tmp_path / "train.jsonl", lab.rows)
    model = transformers.AutoModelForCausalLM.from_pretrained(lab.checkpoint)
    exec(block, {"model": model, "tokenizer": transformers.AutoTokenizer.from_pretrained(lab.checkpoint)})
    assert "exactness ok" in capsys.readouterr().out


def test_the_page_of_the_doctor_lists_every_check() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs/doctor.md").read_text(), flags=re.MULTILINE)
    assert listed == [(check.name, check.asks) for check in CHECKS]


@pytest.mark.slow
def test_the_python_of_the_page_of_fidelity_runs(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(lab.checkpoint)
    (tmp_path / "train.jsonl").symlink_to(lab.corpus)
    assert lab.build(tmp_path / "store", "--proj-precondition", "none").code == 0
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs/fidelity.md", "python"):
        exec(block, names)
    assert names["gradient"].shape[1] == 32
    assert names["spearman"].value > 0.5
    assert len(names["errors"]) == 1


def test_the_format_pages_bytes_a_row_are_those_of_the_arrays() -> None:
    layout = PartLayout(rows=1, dimension=1, groups=1, dtype="float32", span_rows=1, chunk_rows=1, store_text=False)
    numbers = [spec for spec in layout.arrays() if spec.dtype is not str and spec.name != "vectors"]
    size = sum(spec.dtype.itemsize * spec.width for spec in numbers)
    assert f"{size} with the default projection" in (ROOT / "docs/format.md").read_text()
    assert size <= 50
