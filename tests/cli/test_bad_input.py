"""Everything a user can get wrong: exit code 2, one line that names the thing, no traceback, nothing harmed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

LONGEST = 2_000
"""Characters of a message that a person still reads."""


def refused(outcome: Outcome, *patterns: str) -> None:
    assert outcome.code == 2, f"{outcome.code}: {outcome.out}{outcome.err}"
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert len(outcome.err) < LONGEST
    for pattern in patterns:
        assert re.search(pattern, outcome.err), outcome.err


@pytest.fixture
def model(lab: Lab, tmp_path: Path) -> Path:
    """A checkpoint of our own, free to break."""
    return Path(shutil.copytree(lab.checkpoint, tmp_path / "model"))


@pytest.fixture
def val(lab: Lab, tmp_path: Path) -> Path:
    return lab.write(tmp_path / "val.jsonl", [{"text": "the cat"}])


def nothing(model: Path) -> None:
    shutil.rmtree(model)


def a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("weights")


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def unknown_architecture(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "nonesuch"}')


def no_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def pickled(model: Path) -> None:
    no_weights(model)
    # A pickle that would write a file if anyone read it.
    (model / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + bytes(model) + b"/ran'\ntR.")


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_a_header(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def hostile_header(model: Path) -> None:
    """One that claims more bytes than any machine has."""
    (model / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")


def empty_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def lacking(model: Path) -> None:
    change_weights(model, lambda weights: weights.pop("transformer.h.0.mlp.c_fc.weight"))


def not_a_number(model: Path) -> None:
    change_weights(model, lambda weights: weights["transformer.ln_f.bias"].__setitem__(3, float("nan")))


def infinite(model: Path) -> None:
    change_weights(model, lambda weights: weights["transformer.ln_f.bias"].__setitem__(3, float("inf")))


def other_shape(model: Path) -> None:
    name = "transformer.h.0.attn.c_proj.weight"
    change_weights(model, lambda weights: weights.__setitem__(name, weights[name][:16].clone()))


def missing_shard(model: Path) -> None:
    index = {"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_elsewhere(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../other/model.safetensors"}}))


def change_weights(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def bert(model: Path) -> None:
    """Bidirectional: its loss is not next-token prediction."""
    import torch
    import transformers

    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,
    )
    # Of weights that hardly attend, as drawn anew each time, a later token may move nothing that can be seen.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bidirectional = transformers.BertForMaskedLM(config)
    bidirectional.save_pretrained(model)


@pytest.mark.parametrize(
    ("harm", "pattern"),
    [
        (nothing, "there is no such folder"),
        (a_file, "is a file; give the folder"),
        (no_config, r"no config\.json"),
        (broken_config, "."),
        (unknown_architecture, "nonesuch"),
        (no_tokenizer, "has no tokenizer; .*--tokenizer"),
        (broken_tokenizer, "tokenizer in .* cannot be loaded"),
        (no_weights, r"no model\.safetensors"),
        (pickled, "pickle only .*can run code"),
        (truncated, "."),
        (only_a_header, "."),
        (hostile_header, "."),
        (empty_weights, "."),
        (lacking, r"missing keys transformer\.h\.0\.mlp\.c_fc\.weight"),
        (not_a_number, r"'transformer\.ln_f\.bias' has NaN or infinite weights"),
        (infinite, r"'transformer\.ln_f\.bias' has NaN or infinite weights"),
        (other_shape, r"c_proj\.weight"),
        (missing_shard, r"model-00001-of-00002\.safetensors"),
        (shard_elsewhere, r"\.\./other/model\.safetensors"),
        (bert, "is not causal"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_checkpoint(lab: Lab, model: Path, tmp_path: Path, harm: Callable[[Path], None], pattern: str) -> None:
    harm(model)
    refused(lab.build(tmp_path / "store", "--checkpoint", model), re.escape(str(model)), pattern)
    assert not (model / "ran").exists()
    assert not list(tmp_path.glob("store/parts/*/zarr.json"))


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("content", "patterns"),
    [
        (b"", ["has no rows"]),
        (b"\n\n", ["has no rows"]),
        (b'{"text": "a"}\n{"text": \n', ["line 2: invalid JSON"]),
        (b'{"text": "a"}\n{"text": "b"}\n{"body": "c"}\n', ["line 3: no field 'text'"]),
        (b'{"text": "a"}\n{"text": 7}\n', ["line 2: field 'text': expected a string or null, found 7"]),
        (b'{"text": "a"}\n\xff\n', ["line 2: expected UTF-8"]),
        (b'{"body": "a"}\n', ["line 1: no field 'text'", "fields found: 'body'", "--text-field"]),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', ["sample '0'", "no chat template"]),
    ],
    ids=["empty", "blank", "malformed", "missing-later", "number", "not-utf8", "missing", "messages"],
)
def test_corpus(lab: Lab, built: Path, tmp_path: Path, content: bytes, patterns: list[str]) -> None:
    """The same for a corpus and for a val set."""
    data = tmp_path / "bad.jsonl"
    data.write_bytes(content)
    if b"messages" not in content:
        patterns = [re.escape(str(data)), *patterns]
    refused(lab.build(tmp_path / "store", "--data", data), *patterns)
    assert not list(tmp_path.glob("store/parts/*/commits/*.json")) or b"messages" in content
    refused(lab.run("query", "--store", built, "--val-set", data), *patterns)


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        (["--data", "{tmp}/absent.jsonl"], [r"absent\.jsonl: does not exist"]),
        (["--data", "{tmp}/val.doc"], [r"val\.doc: unsupported form '\.doc'"]),
        (["--text-field", "words"], ["no field 'words' \\(from --text-field\\)", "'id', 'text', 'domain'"]),
        (["--id-field", "words"], ["no field 'words' \\(from --id-field\\)"]),
        (["--prompt-field", "text"], ["--prompt-field and --completion-field must be given together"]),
        (["--text-field", "text", "--messages-field", "id"], ["different kinds of content"]),
        (["--proj-layers", "nonesuch"], ["'nonesuch' matches no layer", r"transformer\.h\.0\.attn\.c_attn"]),
        (["--proj-layers", ""], ["layer"]),
        (["--exclude-layers", "h.99"], [r"'h\.99' matches no layer"]),
        (["--exclude-layers", "mlp,attn"], ["no layer is left"]),
        (["--proj-rank-total", "100000"], ["--proj-rank-total 100000 is larger than layer 'transformer"]),
        (["--proj-rank-total", "0"], ["--proj-rank-total must be at least 1"]),
        (["--proj-rank-total", "many"], ["'many' is neither a number nor full"]),
        (["--proj-rank-min", "40", "--proj-rank-total", "1600"], ["--proj-rank-min 40"]),
        (["--proj-compress", "1000000"], ["--proj-compress 1000000 is not smaller than"]),
        (["--proj-compress", "0"], ["--proj-compress must be at least 1"]),
        (["--proj-kind", "dense"], ["'dense' is not one of"]),
        (["--proj-dtype", "int4"], ["'int4' is not one of"]),
        (["--max-length", "33"], ["--max-length 33 is more than the 32 positions"]),
        (["--max-length", "1"], ["--max-length must be at least 2"]),
        (["--max-samples", "0"], ["--max-samples must be at least 1"]),
        (["--batch-tokens", "0"], ["--batch-tokens must be at least 1"]),
        (["--batch-tokens", "-5"], ["--batch-tokens must be at least 1"]),
        (["--span-rows", "0"], ["--span-rows must be at least 1"]),
        (["--device", "tpu"], ["tpu"]),
        (["--device", "cuda:77"], ["cuda:77"]),
        (["--device", "meta"], ["meta"]),
        (["--attn-implementation", "nonesuch"], ["nonesuch"]),
        (["--tokenizer", "{tmp}/absent"], ["absent"]),
        (["--frobnicate"], ["No such option.*--frobnicate"]),
        (["--name", "../x"], [r"'\.\./x' cannot name a part"]),
        (["--name", "a/b"], ["'a/b' cannot name a part"]),
        (["--name", ".hidden"], [r"'\.hidden' cannot name a part"]),
        (["--name", "x" * 129], ["cannot name a part"]),
        (["--dry-run", "--data", "-"], ["--dry-run cannot read standard input"]),
    ],
    ids=lambda value: "=".join(value[:2])[:40] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_build_options(lab: Lab, tmp_path: Path, options: list[str], patterns: list[str]) -> None:
    (tmp_path / "val.doc").write_text("x")
    refused(lab.build(tmp_path / "store", *(word.format(tmp=tmp_path) for word in options)), *patterns)
    assert not list(tmp_path.glob("store/parts/*/zarr.json"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["build", "full-gradients", "doctor"])
def test_tokenizers_that_are_none(lab: Lab, model: Path, tmp_path: Path, command: str) -> None:
    """A folder that is not there, and one without a tokenizer: neither is called a checkpoint."""
    words = [command, "--checkpoint", lab.checkpoint, "--data", lab.corpus]
    words += {"build": ["--store", tmp_path / "store"], "full-gradients": ["--out", tmp_path / "out"]}.get(command, [])
    no_tokenizer(model)
    for folder, what in ((tmp_path / "absent", "there is no such folder"), (model, "has no tokenizer; .*--tokenizer")):
        outcome = lab.run(*words, "--tokenizer", folder)
        refused(outcome, rf"{re.escape(str(folder))}:? {what}")
        assert "checkpoint" not in outcome.err


def test_cuda_that_is_not_there(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused(lab.build(tmp_path / "store", "--device", "cuda"), "--device cuda: .*sees no CUDA device; use --device cpu")
    refused(lab.run("query", "--store", built, "--val-set", val, "--device", "cuda:0"), "--device cuda:0")


@pytest.mark.parametrize("arguments", [[], ["--store", "s"], ["--checkpoint", "c", "--data", "d"]])
def test_missing_options(lab: Lab, arguments: list[str]) -> None:
    refused(lab.run("build", *arguments), "Missing option")


@pytest.mark.parametrize(
    ("command", "pattern"),
    [(["frobnicate"], "No such command 'frobnicate'.*build.*query"), (["--frobnicate"], "No such option")],
)
def test_unknown_commands(lab: Lab, command: list[str], pattern: str) -> None:
    refused(lab.run(*command), pattern)


@pytest.mark.parametrize("command", ["query", "info", "verify"])
def test_stores_that_are_none(lab: Lab, built: Path, val: Path, tmp_path: Path, command: str) -> None:
    import ghoststore

    words = ["--val-set", val] if command == "query" else []
    refused(lab.run(command, "--store", tmp_path / "absent", *words), "there is no store at .*absent")
    assert not (tmp_path / "absent").exists()
    refused(lab.run(command, "--store", val, *words), r"val\.jsonl")
    (tmp_path / "folder").mkdir()
    refused(lab.run(command, "--store", tmp_path / "folder", *words), "there is no store at .*folder")
    refused(lab.run(command, "--store", built, "--part", "nonesuch", *words), "no part 'nonesuch'; it has: part")
    refused(lab.run(command, "--store", built, "--part", "../part", *words), r"'\.\./part' cannot name a part")
    ghoststore.Store.create(tmp_path / "bare")
    if command == "query":
        refused(lab.run(command, "--store", tmp_path / "bare", *words), "has no parts; `ghoststore build")
    else:
        assert lab.run(command, "--store", tmp_path / "bare").code == 0


@pytest.mark.parametrize("command", ["scores", "watch"])
def test_runs_that_are_none(lab: Lab, built: Path, val: Path, tmp_path: Path, command: str) -> None:
    once = ["--once"] if command == "watch" else []
    refused(lab.run(command, "--store", tmp_path / "absent", *once), "there is no store at .*absent")
    assert not (tmp_path / "absent").exists()
    refused(lab.run(command, "--store", val, *once), r"val\.jsonl")
    refused(lab.run(command, "--store", built, "--run", "../run", *once), r"'\.\./run' cannot name a run")
    if command == "scores":
        refused(lab.run(command, "--store", built), "has no runs; `ghoststore train")
        refused(lab.run(command, "--store", built, "--run", "nonesuch"), "no run 'nonesuch'; it has: none")


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["scores", "--store", "s", "--value", "median"], "'median' is not one of"),
        (["scores", "--store", "s", "--by", "id"], "'id' is not 'domain'|'id' is not one of"),
        (["scores", "--store", "s", "--top-k", "ten"], "'ten' is not a valid integer"),
        (["scores", "--store", "s", "--out", "scores.xlsx"], r"results are written as \.json"),
        (["scores", "--store", "s", "--plot", "scores.gif"], r"pictures are written as \.png"),
        (["scores"], "Missing option '--store'"),
        (["watch", "--store", "s", "--json"], "it needs --once"),
        (["watch", "--store", "s", "--interval", "0"], "--interval must be above 0"),
        (["watch", "--store", "s", "--interval", "soon"], "'soon' is not a valid float"),
        (["query", "--store", "s", "--val-set", "v", "--score-weight", "2"], "--score-weight must be between 0"),
        (["query", "--store", "s", "--val-set", "v", "--score-weight", "0.5"], "belongs to --with-scores"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_scores(lab: Lab, built: Path, val: Path, words: list[str], pattern: str) -> None:
    refused(lab.run(*({"s": built, "v": val}.get(word, word) for word in words)), pattern)


def test_several_parts(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    store = shutil.copytree(built, tmp_path / "store")
    shutil.copytree(store / "parts/part", store / "parts/other")
    refused(lab.run("query", "--store", store, "--val-set", val), "several parts; choose one with --part: other, part")
    assert lab.run("query", "--store", store, "--val-set", val, "--part", "other").code == 0


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        (["--top-k", "0"], ["ask for at least one row"]),
        (["--top-k", "-1"], ["--top-k -1"]),
        (["--bottom-k", "-1"], ["--bottom-k -1"]),
        (["--top-k", "ten"], ["'ten' is not a valid integer"]),
        (["--metric", "euclid"], ["'euclid' is not one of"]),
        (["--max-samples", "0"], ["--max-samples must be at least 1"]),
        (["--max-samples", "-1"], ["--max-samples must be at least 1"]),
        (["--layers", "h.99"], [r"'h\.99' matches no layer"]),
        (["--exclude-layers", "mlp,attn"], ["no layer of part .* is left"]),
        (["--val-set", "{tmp}/absent.jsonl"], [r"absent\.jsonl: does not exist"]),
        (["--text-field", "words"], ["no field 'words'"]),
        (["--checkpoint", "{tmp}/absent"], ["absent", "no such folder"]),
        (["--device", "tpu"], ["tpu"]),
        (["--out", "{tmp}/results.xlsx"], [r"results are written as \.json, \.jsonl, \.csv, \.parquet"]),
        (["--out", "{tmp}/absent/results.csv"], ["the folder .*absent does not exist"]),
    ],
    ids=lambda value: "=".join(value[:2]) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_query_options(
    lab: Lab, built: Path, val: Path, tmp_path: Path, options: list[str], patterns: list[str]
) -> None:
    words = [word.format(tmp=tmp_path) for word in options]
    default = [] if "--val-set" in words else ["--val-set", str(val)]
    refused(lab.run("query", "--store", built, *default, *words), *patterns)


@pytest.mark.thin(1)
@pytest.mark.parametrize("option", [["--layers", "mlp"], ["--exclude-layers", "attn"]])
def test_layers_of_one_sketch(lab: Lab, val: Path, tmp_path: Path, option: list[str]) -> None:
    store = tmp_path / "store"
    assert lab.build(store, "--proj-compress-by", "all").code == 0
    refused(
        lab.run("query", "--store", store, "--val-set", val, *option),
        "one sketch of all layers together",
        "--proj-compress-by layer",
    )


@pytest.mark.parametrize("texts", [[""], [None, "a"], ["", " "]])
def test_val_set_without_a_usable_row(lab: Lab, built: Path, tmp_path: Path, texts: list[Any]) -> None:
    val = lab.write(tmp_path / "val.jsonl", [{"text": text} for text in texts])
    refused(lab.run("query", "--store", built, "--val-set", val), r"no row of the val set .*val\.jsonl can be used")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_out_that_exists_is_left_alone(lab: Lab, built: Path, val: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"mine.{suffix}"
    out.write_text("mine")
    refused(lab.run("query", "--store", built, "--val-set", val, "--out", out), f"{out} exists; nothing was written")
    assert out.read_text() == "mine"


@pytest.mark.parametrize("content", ["photo.jpg", "zarr.txt", ".hidden"])
def test_store_at_a_folder_of_something_else(lab: Lab, tmp_path: Path, content: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / content).write_text("x")
    before = lab.tree(tmp_path)
    refused(lab.build(tmp_path / "photos"), "photos exists and is not a store")
    assert lab.tree(tmp_path) == before


def test_store_at_a_file(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(lab.build(tmp_path / "file"), "file exists and is not a store")
    assert (tmp_path / "file").read_text() == "x"


def test_no_code_of_a_checkpoint_is_run(lab: Lab, model: Path, tmp_path: Path) -> None:
    """A config that asks for its own code (``auto_map``): refused, or loaded without it."""
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (model / "config.json").write_text(json.dumps(config))
    refused(lab.build(tmp_path / "store", "--checkpoint", model), re.escape(str(model)))
    assert not (tmp_path / "ran").exists()
