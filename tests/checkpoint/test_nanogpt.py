"""Checkpoints of nanoGPT, and its model in memory: the same outputs, exact gradients, and refusals.

The oracle is nanoGPT's own model under plain autograd, one row at a time.
"""

from __future__ import annotations

import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ghoststore
from ghoststore.checkpoint.in_memory import LoadedCheckpoint
from ghoststore.checkpoint.load import find_checkpoint, load_model
from ghoststore.errors import CheckpointError, CorpusError, GhostStoreError, MismatchError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from tests.support.nanogpt import GPT, MLP, gpt, save, write_stream

if TYPE_CHECKING:
    from tests.conftest import Lab

WHOLE = ProjectionConfig(layers=("all",), rank_total="full", compress="none", precondition="none")
"""The vectors are the gradients themselves."""


def ids_of(model: GPT, rows: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_outputs(bias: bool, prefix: str, tmp_path: Path) -> None:
    """As nanoGPT's own, from the file, from memory, and from a folder made of the file."""
    model = gpt(bias=bias)
    path = save(model, tmp_path / "out-small" / "ckpt.pt", prefix=prefix)
    ids = ids_of(model, 3, 16)
    expected = model(ids, ids)[0].detach()
    found = find_checkpoint(path)
    ghoststore.load_nanogpt(path).save_pretrained(tmp_path / "folder")
    for checkpoint in (found, find_checkpoint(model), find_checkpoint(tmp_path / "folder")):
        logits = load_model(checkpoint)(input_ids=ids).logits.detach()
        assert float((logits - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    assert (found.name, found.where, found.recorded) == ("out-small", str(path), str(path))
    assert find_checkpoint(model).identity() == found.identity()
    assert (find_checkpoint(tmp_path / "folder").identity() == found.identity()) is bias
    names = {name: tuple(p.shape) for name, p in load_model(found).named_parameters()}
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert names.keys() == {name.replace("lm_head", "transformer.wte") for name in own}
    assert sum(map(np.prod, names.values())) == sum(map(np.prod, own.values()))


def test_the_gelu_matters() -> None:
    """The bound of `test_outputs` tells GPT-2's own approximate GELU from nanoGPT's."""
    model = gpt()
    ids = ids_of(model, 3, 16)
    converted: Any = find_checkpoint(model).copied()  # type: ignore[union-attr]
    for block in converted.transformer.h:
        block.mlp.act = torch.nn.GELU(approximate="tanh")
    expected = model(ids, ids)[0].detach()
    assert float((converted(input_ids=ids).logits.detach() - expected).abs().max()) > 1e-5 * float(expected.abs().max())


def test_identity(tmp_path: Path) -> None:
    """Weights and sizes count; what a training keeps beside them does not."""
    first = find_checkpoint(save(gpt(), tmp_path / "a.pt")).identity()
    assert find_checkpoint(save(gpt(), tmp_path / "b.pt", iter_num=7, config={})).identity() == first
    assert find_checkpoint(save(gpt(seed=1), tmp_path / "c.pt")).identity() != first


@pytest.mark.parametrize("source", ["file", "memory"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(source: str, bias: bool, tmp_path: Path) -> None:
    """⟨∇ℓᵢ, ∇ℓⱼ⟩ over all of nanoGPT's parameters, from vectors of a part of its `.bin`."""
    model = gpt(bias=bias)
    rows = [ids_of(model, 1, 16)[0], *ids_of(model, 5, 16)]
    stream = torch.cat([rows[0], *(row[1:] for row in rows[1:])])
    for row, before in zip(rows[1:], rows[:-1], strict=True):
        row[0] = before[-1]
    data = write_stream(tmp_path / "train.bin", stream)
    checkpoint = model if source == "memory" else save(model, tmp_path / "ckpt.pt")
    ghoststore.build(checkpoint=checkpoint, data=data, store=tmp_path / "store", projection=WHOLE, proj_dtype="float32")
    part = ghoststore.Store.open(tmp_path / "store").part()
    assert part.rows == len(rows)
    assert [str(i) for i in part.read_rows("sample_id", range(part.rows))] == [f"train.bin:{15 * i}" for i in range(6)]
    assert list(part.read_rows("n_tokens", range(part.rows))) == [16] * 6
    gradients = []
    for row in rows:
        logits = model(row[None], row[None])[0]
        grads = torch.autograd.grad(F.cross_entropy(logits[0, :-1], row[1:]), list(model.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in grads]))
    expected = torch.stack(gradients).double()
    vectors = torch.from_numpy(np.asarray(part.read_rows("vectors", range(part.rows)))).double()
    assert vectors.shape[1] >= expected.shape[1]
    error = (vectors @ vectors.T - expected @ expected.T).abs().max() / (expected @ expected.T).abs().max()
    assert float(error) < 2e-5
    assert float(error) > 0  # the two were computed apart


def test_commands(lab: Lab, tmp_path: Path) -> None:
    """From the files of a nanoGPT folder to results by the commands, without a tokenizer and with one."""
    vocabulary = 300
    model = gpt(vocab_size=vocabulary)
    checkpoint = save(model, tmp_path / "out" / "ckpt.pt", prefix="_orig_mod.")
    generator = np.random.default_rng(0)
    data = write_stream(tmp_path / "train.bin", generator.integers(0, 250, 200))
    val = write_stream(tmp_path / "val.bin", np.fromfile(data, "<u2")[30:46])
    build = ("build", "--checkpoint", checkpoint, "--data", data, "--max-samples", "9")
    told = lab.run(*build, "--store", tmp_path / "a")
    assert told.code == 0, told.err
    assert "windows of 16 tokens" in told.err
    query = ("query", "--val-set", val, "--metric", "cosine", "--json")
    outcome = lab.run(*query, "--store", tmp_path / "a", "--rerank", "10")
    assert outcome.code == 0, outcome.err
    best = outcome.json["results"][0]["hits"][0]
    assert best["id"] == "train.bin:30"
    assert best["text"] == " ".join(map(str, np.fromfile(data, "<u2")[30:46]))
    words = lab.run("query", "--store", tmp_path / "a", "--val-set", lab.corpus)
    assert (words.code, "the checkpoint has no tokenizer: give --tokenizer" in words.err) == (2, True), words.err
    told = lab.run(*build, "--store", tmp_path / "b", "--tokenizer", lab.checkpoint)
    assert told.code == 0, told.err
    assert "taken for those of the tokenizer that is given" in told.err
    assert lab.run(*query, "--store", tmp_path / "b").code == 0
    words = lab.run("query", "--store", tmp_path / "b", "--val-set", lab.corpus)
    assert words.code == 0, words.err
    assert lab.run("verify", "--store", tmp_path / "b").code == 0
    other = save(gpt(seed=1, vocab_size=vocabulary), tmp_path / "other.pt")
    assert lab.run(*query, "--store", tmp_path / "a", "--checkpoint", other).code == 3


def test_a_text_needs_a_tokenizer(lab: Lab, tmp_path: Path) -> None:
    checkpoint = save(gpt(), tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {}}))
    (tmp_path / "empty").mkdir()
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for data in ([{"text": "a b"}], [{"prompt": "a", "completion": "b"}], [chat]):
        with pytest.raises(UsageError, match="the checkpoint has no tokenizer: give `tokenizer`"):
            ghoststore.build(checkpoint=checkpoint, data=data, store=tmp_path / "store")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        ghoststore.build(checkpoint=checkpoint, data=["a"], store=tmp_path / "store", tokenizer=tmp_path / "meta.pkl")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        ghoststore.tokenize(data=["a"], tokenizer=tmp_path / "meta.pkl", out=tmp_path / "shards")
    assert not (tmp_path / "store" / "parts").exists()


def test_ids_beyond_the_vocabulary(lab: Lab, tmp_path: Path) -> None:
    checkpoint = save(gpt(), tmp_path / "ckpt.pt")
    data = write_stream(tmp_path / "train.bin", [*range(40), 101])
    with pytest.raises(UsageError, match=r"train\.bin:30': has the token 101, and the model takes ids up to 100"):
        ghoststore.build(checkpoint=checkpoint, data=data, store=tmp_path / "store")
    with pytest.raises(UsageError, match="nothing says which tokenizer made them: give `tokenizer`"):
        ghoststore.build(checkpoint=lab.checkpoint, data=data, store=tmp_path / "store")


class _Changed(GPT):
    """A model whose parameters are called as nanoGPT's, and whose outputs are others."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits, loss = super().forward(idx, targets)
        return 1.01 * logits, loss


def test_a_changed_class_in_memory(tmp_path: Path) -> None:
    data = write_stream(tmp_path / "train.bin", range(40))
    model = gpt(kind=_Changed).train()
    with pytest.raises(CheckpointError, match=r"_Changed in memory has the parameters of nanoGPT's model and other"):
        ghoststore.build(checkpoint=model, data=data, store=tmp_path / "store")
    assert all(module.training for module in model.modules())
    model = gpt()
    for block in model.transformer["h"]:
        assert isinstance(block.mlp, MLP)
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    with pytest.raises(CheckpointError, match="other outputs"):
        ghoststore.build(checkpoint=model, data=data, store=tmp_path / "store")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_memory_is_compared_in(dtype: torch.dtype) -> None:
    """The dtype of the weights neither makes a deep model another one, nor lets a class pass that is one."""
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 192, "vocab_size": 500}
    assert find_checkpoint(gpt(**sizes).to(dtype)).where.startswith("the GPT in memory")
    for settings in (sizes, {}):
        model = gpt(**settings).to(dtype)
        for block in model.transformer["h"]:
            block.mlp.gelu = torch.nn.GELU(approximate="tanh")
        with pytest.raises(CheckpointError, match="other outputs"):
            find_checkpoint(model)


def test_a_fresh_class_in_memory() -> None:
    """At nanoGPT's first weights, which are small, an approximate GELU changes the logits by 2e-6."""
    model = gpt()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.mul_(0).add_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
            if parameter.dim() == 2:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(parameter.numel()))
    find_checkpoint(model)
    for block in model.transformer["h"]:
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    with pytest.raises(CheckpointError, match="other outputs"):
        find_checkpoint(model)


def test_damaged(tmp_path: Path) -> None:
    """Whatever byte of the pickle is another: a CheckpointError, or nothing that matters."""
    path = save(gpt(n_layer=1), tmp_path / "ckpt.pt")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    pickled = files[name]
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        harmed = bytearray(pickled)
        harmed[draw.integers(len(harmed))] = draw.integers(256)
        with zipfile.ZipFile(path, "w") as archive:
            for other, data in files.items():
                archive.writestr(other, bytes(harmed) if other == name else data)
        with suppress(CheckpointError):
            find_checkpoint(path)
            continue
        refused += 1
    assert refused > 50


def _without(name: str) -> Any:
    return lambda saved: saved["model"].pop(name)


HARMS: dict[str, tuple[Any, str]] = {
    "state dict": (lambda saved: saved.pop("model_args"), "dictionary with `model` and `model_args`; found 'model'"),
    "lacking": (
        _without("transformer.ln_f.weight"),
        r"'transformer\.ln_f\.weight': its model_args ask for \(24,\), found none",
    ),
    "further": (lambda s: s["model"].update(extra=torch.ones(3)), "'extra': its model_args ask for none, found one of"),
    "vocabulary": (lambda s: s["model_args"].update(vocab_size=50), "ask for .50, 24., found one of .101, 24."),
    "layers": (lambda s: s["model_args"].update(n_layer=10**9), "have sizes that no model of nanoGPT has"),
    "some layers": (lambda s: s["model_args"].update(n_layer=3), "n_layer 3, and its tensors 2 layers"),
    "heads": (lambda s: s["model_args"].update(n_head=5), "have sizes that no model of nanoGPT has"),
    "no size": (lambda s: s["model_args"].pop("n_embd"), "have n_embd None"),
    "head": (
        lambda s: s["model"].update({"lm_head.weight": torch.ones(101, 24)}),
        "lm_head and of transformer.wte differ",
    ),
    "dtypes": (lambda s: s["model"].update({"transformer.ln_f.bias": torch.ones(24).half()}), "one dtype of floats"),
    "views": (
        lambda s: s["model"].update({"transformer.wpe.weight": torch.ones(1, 1).expand(16, 24)}),
        "'transformer.wpe.weight' is no plain tensor",
    ),
    "objects": (lambda s: s.update(config=Path("/")), "cannot be read without running what is in it"),
    "twice": (
        lambda s: s["model"].update({"_orig_mod.transformer.ln_f.weight": torch.ones(24)}),
        "'transformer.ln_f.weight' is there twice",
    ),
    "nothing": (lambda s: s.clear(), "found $"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_refused(harm: str, tmp_path: Path) -> None:
    change, words = HARMS[harm]
    path = save(gpt(), tmp_path / "ckpt.pt")
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=words) as caught:
        find_checkpoint(path)
    assert str(path) in str(caught.value)


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Bomb(), "model_args": {}}, "zipped.pt")
    torch.save({"model": _Bomb(), "model_args": {}}, "old.pt", _use_new_zipfile_serialization=False)
    Path("pickled.pt").write_bytes(pickle.dumps({"model": _Bomb()}))
    for name in ("zipped.pt", "old.pt", "pickled.pt"):
        with pytest.raises(CheckpointError, match=name):
            find_checkpoint(name)
    assert not Path("ran").exists()


def test_a_packed_archive(tmp_path: Path) -> None:
    """A few bytes that unpack to many are refused before they are."""
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt/data.pkl", bytes(1 << 20))
    with pytest.raises(CheckpointError, match=r"is damaged: 'ckpt/data\.pkl' has 1,048,576 bytes"):
        find_checkpoint(path)
    path.write_bytes(save(gpt(), tmp_path / "whole.pt").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"ckpt\.pt is no whole archive, as torch\.save writes"):
        find_checkpoint(path)


def test_where_a_folder_is_wanted(lab: Lab, tmp_path: Path) -> None:
    """The advice is followed."""
    path = save(gpt(vocab_size=300), tmp_path / "out" / "ckpt.pt")
    with pytest.raises(CheckpointError, match=rf"or the file of nanoGPT's checkpoint: {path}"):
        find_checkpoint(path.parent)
    train = (
        "train",
        "--data",
        lab.corpus,
        "--output-dir",
        tmp_path / "trained",
        "--method",
        "Regular",
        "--max-steps",
        "1",
    )
    refused = lab.run(*train, "--checkpoint", path)
    assert refused.code == 2
    assert "load_nanogpt" in refused.err, refused.err
    ghoststore.load_nanogpt(path).save_pretrained(tmp_path / "folder")
    done = lab.run(*train, "--checkpoint", tmp_path / "folder", "--tokenizer", lab.checkpoint)
    assert done.code == 0, done.err


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    """One of an older torch becomes one as the error says; one that is not there is not asked for at the hub."""
    path = tmp_path / "ckpt.pt"
    with pytest.raises(CheckpointError, match=r"ckpt\.pt: there is no such file"):
        find_checkpoint(path)
    save(gpt(), path)
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch\.save\(torch\.load\(path\), path\)"):
        find_checkpoint(path)
    torch.save(torch.load(path), path)
    assert find_checkpoint(path).identity() == find_checkpoint(gpt()).identity()


def test_adapters_are_of_folders(tmp_path: Path) -> None:
    with pytest.raises(GhostStoreError, match="`base` and `adapter` belong to the folder of an adapter"):
        find_checkpoint(save(gpt(), tmp_path / "ckpt.pt"), adapter="only")


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_a_corpus_of_torch(protocol: int | None, tmp_path: Path) -> None:
    """Archives, and files of before, which are pickles."""
    path = save(gpt(), tmp_path / "model.bin")
    if protocol is not None:
        saved = gpt().state_dict()
        torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.raises(CorpusError, match="a file of torch, and no token ids"):
        _ = ghoststore.Corpus.open(path).resolved


def test_dtypes(tmp_path: Path) -> None:
    """The zeros in the place of biases follow the weights."""
    model = gpt(bias=False)
    ids = ids_of(model, 2, 16)
    expected = gpt(bias=False).bfloat16()(ids, ids)[0].float()
    for checkpoint in (save(model, tmp_path / "ckpt.pt"), model):
        logits = load_model(find_checkpoint(checkpoint), dtype="bfloat16")(input_ids=ids).logits
        assert logits.dtype == torch.bfloat16
        assert float((logits.float() - expected).detach().abs().max()) < 0.05 * float(expected.detach().abs().max())


def test_a_compiled_model_in_memory() -> None:
    model = gpt()
    compiled = find_checkpoint(torch.compile(model))
    assert compiled.identity() == find_checkpoint(model).identity()
    assert (compiled.name, compiled.where) == ("GPT", "the GPT in memory (float32)")
    assert isinstance(compiled, LoadedCheckpoint)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in compiled.model.parameters()} == shared


def test_changes_in_memory_are_noticed(tmp_path: Path) -> None:
    model = gpt()
    data = write_stream(tmp_path / "train.bin", range(40))
    ghoststore.build(checkpoint=model, data=data, store=tmp_path / "store")
    with ghoststore.open(tmp_path / "store", checkpoint=model) as store:
        store.query(data)
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        with pytest.raises(MismatchError, match=r"the weights of the GPT in memory .* have changed"):
            store.query(data)


@pytest.mark.slow
def test_the_doctor(tmp_path: Path) -> None:
    model = gpt()
    data = write_stream(tmp_path / "val.bin", torch.arange(400) * 7 % 101)
    for given in ({"model": model}, {"checkpoint": save(model, tmp_path / "ckpt.pt")}):
        report = ghoststore.doctor(**given, data=data, samples=8)
        assert report.settings["max_length"] == 16
        assert not report.wrong, report


@pytest.mark.slow
def test_evaluate_wants_a_tokenizer_and_biases(lab: Lab, tmp_path: Path) -> None:
    """It trains again: the GPT-2 of the file, on the ids of its windows."""
    generator = np.random.default_rng(0)
    data, val = (write_stream(tmp_path / name, generator.integers(0, 200, 300)) for name in ("train.bin", "val.bin"))
    for bias in (True, False):
        path = save(gpt(vocab_size=300, bias=bias), tmp_path / str(bias) / "ckpt.pt")
        store = tmp_path / f"store-{bias}"
        ghoststore.build(checkpoint=path, data=data, store=store, tokenizer=lab.checkpoint)
        options: dict[str, Any] = {"store": store, "val_set": val, "checkpoint": path, "tokenizer": lab.checkpoint}
        if bias:
            report = ghoststore.evaluate(
                **options, out=tmp_path / "out", halves=3, max_steps=2, tests=["lds"], methods=["dot"], workers=1
            )
            assert report.lds[0].method == "dot"
        else:
            with pytest.raises(UsageError, match="its layers have no biases"):
                ghoststore.evaluate(**options, out=tmp_path / "other")
