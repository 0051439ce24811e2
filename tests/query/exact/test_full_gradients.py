"""Exact gradients in files: equal to plain autograd, resumed to the same bytes, checked, refused where they must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ghoststore
import query.exact.full_gradients
from ghoststore.errors import CorpusError, CorruptError, LayerError, MismatchError, StorageError, UsageError

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS = 7
AT_ONCE = 3


def report_of(lab: Lab, out: Path, **settings: Any) -> ghoststore.FullGradientsReport:
    settings = {"checkpoint": lab.checkpoint, "data": lab.corpus, "max_samples": ROWS, "device": "cpu"} | settings
    return ghoststore.full_gradients(out=out, **settings)


def written(out: Path) -> torch.Tensor:
    """All gradients, in the order of rows."""
    files = json.loads((out / "manifest.json").read_text())["files"]
    return torch.cat([load_file(out / name)["gradients"] for name in files])


def plainly(lab: Lab, texts: list[str], reduction: str = "mean") -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """transformers' own loss of each text alone, and its gradients by name."""
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint)
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        loss = model(input_ids=ids, labels=ids).loss * (1 if reduction == "mean" else ids.shape[1] - 1)
        model.zero_grad()
        loss.backward()
        yield {name: p.grad.clone() for name, p in model.named_parameters()}, float(loss.detach())


@pytest.fixture
def three_a_file(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(lab.checkpoint).parameters())
    monkeypatch.setattr(query.exact.full_gradients, "FILE_BYTES", AT_ONCE * numbers * 4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_plain_autograd(lab: Lab, reduction: str, tmp_path: Path, three_a_file: None) -> None:
    report = report_of(lab, tmp_path / "out", loss_reduction=reduction)
    found, manifest = written(tmp_path / "out"), json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert found.shape == (ROWS, report.numbers)
    losses = [loss for file in manifest["files"].values() for loss in file["losses"]]
    expected = plainly(lab, [row["text"] for row in lab.rows[:ROWS]], reduction)
    for row, (gradients, loss) in enumerate(expected):
        assert losses[row] == pytest.approx(loss, rel=1e-6)
        covered = 0
        for one in manifest["parameters"]:
            wanted = gradients.pop(one["name"])
            assert list(wanted.shape) == one["shape"]
            got = found[row, one["start"] : one["stop"]].view(wanted.shape)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()) + 1e-9)
            covered += wanted.numel()
        assert covered == report.numbers
        assert not gradients, "a parameter is missing; a tied one is named once"
    assert [row["sample_id"] for row in manifest["rows"]] == [row["id"] for row in lab.rows[:ROWS]]
    assert [entry["rows"] for entry in manifest["files"].values()] == [[0, 3], [3, 6], [6, 7]]
    assert (report.files, report.statuses, report.bytes_on_disk) == (3, {"ok": ROWS}, ROWS * report.numbers * 4)


def test_who_may_read_the_manifest_may_read_the_gradients(lab: Lab, tmp_path: Path) -> None:
    """safetensors 0.8 makes files that their owner alone may read."""
    report_of(lab, tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}) == 1


def test_projected_layers_are_those_of_a_build(lab: Lab, built: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    report_of(lab, whole)
    report = report_of(lab, part, parameters="projected")
    layers = ghoststore.Store.open(built).part("part").manifest["layers"]
    names = {name for layer in layers for name in layer["parameters"]}
    assert {one["name"] for one in report.manifest["parameters"]} == names
    slices = json.loads((whole / "manifest.json").read_text())["parameters"]
    columns = [column for one in slices if one["name"] in names for column in range(one["start"], one["stop"])]
    torch.testing.assert_close(written(part), written(whole)[:, columns], rtol=1e-5, atol=1e-8)
    fewer = report_of(lab, tmp_path / "fewer", parameters="projected", proj_layers=["mlp"], exclude_layers=["c_fc"])
    assert {one["name"].rsplit(".", 2)[1] for one in fewer.manifest["parameters"]} == {"c_proj"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(lab: Lab, dtype: str, tmp_path: Path) -> None:
    report_of(lab, tmp_path / "wide")
    report = report_of(lab, tmp_path / "narrow", dtype=dtype)
    wide, narrow = written(tmp_path / "wide"), written(tmp_path / "narrow")
    assert narrow.dtype == getattr(torch, dtype)
    assert torch.equal(narrow, wide.to(narrow.dtype))
    assert report.bytes_on_disk == narrow.numel() * 2


def test_rows_without_a_gradient_keep_their_place(lab: Lab, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = lab.sample_rows(4)
    rows[1]["text"], rows[2]["text"] = "", "a"
    report = report_of(lab, tmp_path / "out", data=lab.write(tmp_path / "data.jsonl", rows))
    found = written(tmp_path / "out")
    assert found.shape[0] == 4
    assert bool((found[1] == 0).all())
    assert bool((found[0] != 0).any())
    assert report.statuses["empty"] == 1
    (entry,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"].values()
    assert entry["losses"][1] is None
    assert entry["statuses"][1] == "empty"


def test_out_of_range_is_told(lab: Lab, tmp_path: Path) -> None:
    """float16 ends at 65,504: a gradient beyond it is zeros and a status, not infinities."""

    def loud(model: Any, tokenizer: Any) -> None:
        model.transformer.ln_f.weight.mul_(1e8)
        model.transformer.wte.weight.mul_(1e-8)

    checkpoint = lab.model(tmp_path / "loud", change=loud)
    report = report_of(lab, tmp_path / "out", checkpoint=checkpoint, dtype="float16")
    assert report.statuses == {"out_of_range": ROWS}
    assert bool((written(tmp_path / "out") == 0).all())


def test_windows(lab: Lab, tmp_path: Path) -> None:
    long = lab.write(tmp_path / "long.jsonl", [{"id": "long", "text": " ".join(row["text"] for row in lab.rows[:6])}])
    report = report_of(lab, tmp_path / "out", data=long, max_length=16, overlong="window")
    assert report.samples == 1
    assert report.rows > 2
    starts = [row["window_start"] for row in report.manifest["rows"]]
    assert starts == [15 * place for place in range(report.rows)]
    with pytest.raises(CorpusError, match="`overlong` is error"):
        report_of(lab, tmp_path / "other", data=long, max_length=16, overlong="error")


def command_line(lab: Lab, out: Path, **order: Any) -> Any:
    arguments = [
        "full-gradients",
        "--checkpoint",
        lab.checkpoint,
        "--data",
        lab.corpus,
        "--out",
        out,
        "--max-samples",
        "7",
        "--json",
        "--quiet",
        "--device",
        "cpu",
    ]
    return lab.run(*arguments, **order)


SMALL_FILES = (
    "import query.exact.full_gradients as f; f.FILE_BYTES = {bytes}; "
    "import ghoststore.cli; ghoststore.cli.main({args!r})"
)


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "fault",
    [
        {"call": "name", "path": r"gradients-00001\.safetensors$", "when": "before"},
        {"call": "name", "path": r"gradients-00001\.safetensors$", "when": "after"},
        {"call": "fsync", "path": r"\.gradients-00002", "when": "before"},
        {"call": "name", "path": r"manifest\.json$", "when": "before", "number": 3},
        {"call": "name", "path": r"manifest\.json$", "when": "before", "number": 1},
        {"call": "name", "path": r"manifest\.json$", "when": "after", "number": 4},
    ],
)
def test_killed_and_resumed_byte_identical(lab: Lab, tmp_path: Path, fault: dict[str, Any]) -> None:
    numbers = report_of(lab, tmp_path / "counted", dry_run=True).numbers

    def run(out: Path, **order: Any) -> Any:
        args = [
            "full-gradients",
            "--checkpoint",
            str(lab.checkpoint),
            "--data",
            str(lab.corpus),
            "--out",
            str(out),
            "--max-samples",
            "7",
            "--json",
            "--quiet",
            "--device",
            "cpu",
        ]
        return lab.run(code=SMALL_FILES.format(bytes=AT_ONCE * numbers * 4, args=args), **order)

    whole = run(tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert (whole.json["files"], whole.json["resumed_files"]) == (3, 0)
    killed = run(tmp_path / "killed", fault=fault | {"act": "kill"})
    assert killed.code == -9, killed.err
    resumed = run(tmp_path / "killed")
    assert resumed.code == 0, resumed.err
    assert lab.tree(tmp_path / "killed") == lab.tree(tmp_path / "whole")
    (tmp_path / "killed" / "gradients-00001.safetensors").unlink()
    again = run(tmp_path / "killed")
    assert (again.code, again.json["resumed_files"]) == (0, 2)
    assert lab.tree(tmp_path / "killed") == lab.tree(tmp_path / "whole")


@pytest.mark.kill
def test_full_disk_and_the_rest_later(lab: Lab, tmp_path: Path) -> None:
    fault = {"call": "fsync", "path": r"gradients-00000", "when": "before", "act": "ENOSPC"}
    outcome = command_line(lab, tmp_path / "out", fault=fault)
    assert outcome.code == 6, outcome.err
    assert "the same command resumes" in outcome.err
    assert command_line(lab, tmp_path / "out").code == 0


def test_damage_is_named_and_repaired(lab: Lab, tmp_path: Path, three_a_file: None) -> None:
    out = tmp_path / "out"
    report_of(lab, out)
    whole = lab.tree(out)
    path = out / "gradients-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptError, match=r"gradients-00001\.safetensors is not what was written"):
        report_of(lab, out)
    path.unlink()
    assert report_of(lab, out).resumed_files == 2
    assert lab.tree(out) == whole
    (out / "manifest.json").write_text(whole["manifest.json"].decode().replace("row-0", "row-9"))
    with pytest.raises(CorruptError, match=r"manifest\.json is damaged"):
        report_of(lab, out)


def test_another_request_is_refused(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report_of(lab, out)
    other = lab.model(tmp_path / "model", seed=1)
    for settings, path in (
        ({"checkpoint": other}, "checkpoint.fingerprint"),
        ({"loss_reduction": "sum"}, "loss.reduction"),
        ({"dtype": "bfloat16"}, "dtype.stored"),
        ({"max_samples": 3}, "corpus.samples"),
        ({"max_length": 8}, "tokens.max_length"),
        ({"parameters": "projected"}, "parameters"),
    ):
        with pytest.raises(MismatchError, match=rf"{path}: stored .*, asked for"):
            report_of(lab, out, **settings)
        with pytest.raises(MismatchError):
            report_of(lab, out, dry_run=True, **settings)


def test_dry_run_counts_and_writes_nothing(lab: Lab, tmp_path: Path) -> None:
    dry = report_of(lab, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    done = report_of(lab, tmp_path / "out")
    assert (dry.bytes_on_disk, dry.numbers, dry.rows) == (done.bytes_on_disk, done.numbers, done.rows)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < on_disk - dry.bytes_on_disk < 200 * dry.files
    assert report_of(lab, tmp_path / "out", dry_run=True).resumed_files == 1
    shown = lab.run("full-gradients", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--out", "new", "--dry-run")
    assert shown.code == 0, shown.err
    assert f"would take {27 * dry.numbers * 4:,} bytes" in shown.out


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"parameters": "some"}, UsageError, "`parameters` 'some' is unknown"),
        ({"proj_layers": ["mlp"]}, UsageError, "`proj_layers` belongs to `parameters=projected`"),
        ({"parameters": "projected", "proj_layers": ["nothing"]}, LayerError, "matches no layer"),
        ({"max_samples": 0}, UsageError, "`max_samples` must be at least 1"),
        ({"dtype": "int8"}, UsageError, "`dtype` 'int8' is unknown"),
        ({"max_length": 4096}, UsageError, "`max_length=4096` is more than"),
        ({"dry_run": True, "data": "-"}, UsageError, "cannot read standard input"),
    ],
)
def test_refused(lab: Lab, tmp_path: Path, settings: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        report_of(lab, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_too_large_for_memory_or_disk(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = report_of(lab, tmp_path / "out", dry_run=True).memory_bytes
    monkeypatch.setattr("query.exact.job.physical_memory", lambda: needed - 1)
    with pytest.raises(UsageError, match=f"need {needed:,} bytes of memory beside the model; this machine has"):
        report_of(lab, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 17}))
    with pytest.raises(StorageError, match="17 are free there"):
        report_of(lab, tmp_path / "out")


def test_other_folders_are_left_alone(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds other files"):
        report_of(lab, tmp_path / "mine")
    with pytest.raises(UsageError, match="is a file"):
        report_of(lab, tmp_path / "mine" / "thesis.txt")
    assert lab.tree(tmp_path / "mine") == {"thesis.txt": b"years of work"}
