"""A model or a tokenizer that changed after the build, with the same weights: refused by all that compares with a part,
exit code 3, the field and both values named.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import MismatchError
from ghoststore.store import Store
from ghoststore.store.base.own import remember
from ghoststore.store.base.records import json_digest
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

Change = Callable[[Path], None]
PLAIN = ProjectionConfig(precondition="none")


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def make(folder: Path) -> None:
        path = folder / "model" / name
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return make


def config(**fields: Any) -> Change:
    return edited("config.json", lambda value: value.update(fields))


def backend(**sections: Any) -> Change:
    return edited("tokenizer.json", lambda value: value.update(sections))


def chat_template(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")


END = "<|endoftext|>"
ADDED = {
    "id": 290,
    "content": "dog",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
}
NORMALIZER = {"type": "Replace", "pattern": {"String": "the"}, "content": "zzz"}
PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
CHANGES: dict[str, tuple[Change, str]] = {
    "activation": (
        config(activation_function="relu"),
        "checkpoint.config.activation_function: stored 'gelu_new', VERB 'relu'",
    ),
    "epsilon": (config(layer_norm_epsilon=0.5), "checkpoint.config.layer_norm_epsilon: stored 1e-05, VERB 0.5"),
    "heads": (config(n_head=4), "checkpoint.config.n_head: stored 2, VERB 4"),
    "scaling": (config(scale_attn_weights=False), "checkpoint.config.scale_attn_weights: stored True, VERB False"),
    "normalizer": (backend(normalizer=NORMALIZER), "tokenizer.normalizer: stored None, VERB {'type': 'Replace'"),
    "pre-tokenizer": (
        backend(pre_tokenizer=PRE_TOKENIZER),
        "tokenizer.pre_tokenizer.add_prefix_space: stored False, VERB True",
    ),
    "template": (backend(post_processor=TEMPLATE), "tokenizer.post_processor.single: stored [{'Sequence'"),
    "added token": (
        edited("tokenizer.json", lambda value: value["added_tokens"].append(ADDED)),
        "tokenizer.added_tokens.290: stored None, VERB {'content': 'dog'",
    ),
    "chat template": (chat_template, "tokenizer.chat_template: stored None, VERB '{{ messages[0].content }}'"),
}


@pytest.fixture(scope="module")
def sound(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a corpus and a store with a part in a metric that was learned, and a plain one."""
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(lab.checkpoint, folder / "model")
    shutil.copy(lab.corpus, folder / "corpus.jsonl")
    for name, projection in (("learned", None), ("plain", PLAIN)):
        build(folder, name, projection)
    return folder


@pytest.fixture
def own(sound: Path, tmp_path: Path) -> Path:
    """A copy, which its manifests name."""
    shutil.copytree(sound, tmp_path / "own")
    for name in ("learned", "plain"):
        rewrite(
            tmp_path / "own",
            name,
            lambda manifest: manifest["source"].update(
                checkpoint=str(tmp_path / "own/model"), data=str(tmp_path / "own/corpus.jsonl")
            ),
        )
    return tmp_path / "own"


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """The manifest of a part with other entries, under its checksum."""
    path = folder / "store" / "parts" / name / "zarr.json"
    metadata = json.loads(path.read_text())
    attributes = metadata["attributes"]
    change(attributes["manifest"])
    attributes["manifest_sha256"] = json_digest(attributes["manifest"])
    path.write_text(json.dumps(metadata))
    # As if it had been built with these: what else a manifest says does not matter to whose it is.
    remember(attributes["manifest"], attributes["manifest"]["source"], path.parent)


def build(folder: Path, name: str, projection: ProjectionConfig | None, **options: Any) -> Any:
    return ghoststore.build(
        checkpoint=folder / "model",
        data=folder / "corpus.jsonl",
        store=folder / "store",
        name=name,
        projection=projection,
        span_rows=6,
        device="cpu",
        **options,
    )


def val_set(folder: Path) -> dict[str, Any]:
    return {"store": folder / "store", "val_set": folder / "corpus.jsonl", "part": "plain", "device": "cpu"}


ASKS: dict[str, Callable[[Path], Any]] = {
    "query": lambda folder: ghoststore.query(**val_set(folder)),
    "select": lambda folder: ghoststore.select(**val_set(folder), fraction=0.2, out=folder / "chosen.jsonl"),
    "fidelity": lambda folder: ghoststore.fidelity(store=folder / "store", part="plain", device="cpu"),
    "plot_error": lambda folder: ghoststore.plot_error(
        store=folder / "store", part=["plain"], out=folder / "error.png", device="cpu"
    ),
    "evaluate": lambda folder: ghoststore.evaluate(
        **val_set(folder), out=folder / "out", methods=["tf-idf"], halves=3, max_steps=1, workers=1
    ),
    "build": lambda folder: build(folder, "plain", PLAIN),
    "build, learned": lambda folder: build(folder, "learned", None),
}


def refused(folder: Path, ask: str, expected: str) -> str:
    before = {
        path: path.read_bytes() for path in (folder / "store").rglob("*") if path.suffix != ".lock" and path.is_file()
    }
    with pytest.raises(MismatchError) as caught:
        ASKS[ask](folder)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert expected.replace("VERB", "asked for" if ask.startswith("build") else "found") in message
    assert {path: path.read_bytes() for path in before} == before
    return message


@pytest.mark.thin(4)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ask", ["query", "build", "build, learned"])
def test_what_changed_is_named(own: Path, ask: str, change: str) -> None:
    make, expected = CHANGES[change]
    make(own)
    message = refused(own, ask, expected)
    if ask == "query":
        assert "part 'plain' was built from another" in message
        assert str(own / "model") in message
        assert "`checkpoint`" in message


@pytest.mark.thin
@pytest.mark.parametrize("ask", ["select", "fidelity", "plot_error", "evaluate"])
@pytest.mark.parametrize("change", ["activation", "normalizer"])
def test_every_command_that_uses_the_model(own: Path, ask: str, change: str) -> None:
    make, expected = CHANGES[change]
    make(own)
    refused(own, ask, expected)
    assert not [path for path in ("chosen.jsonl", "out/trainings", "error.png") if (own / path).exists()]


def test_all_that_differs_is_listed_at_once(own: Path) -> None:
    for change in ("activation", "epsilon", "normalizer"):
        CHANGES[change][0](own)
    message = refused(own, "query", CHANGES["activation"][1])
    for change in ("epsilon", "normalizer"):
        assert CHANGES[change][1].replace("VERB", "found") in message
    assert "another configuration than that of" in message
    assert "another tokenizer than that in" in message


def test_the_command_line(lab: Lab, own: Path) -> None:
    """Exit code 3, nothing on stdout; the stored model elsewhere still answers."""
    config(activation_function="relu")(own)
    words = ("query", "--store", own / "store", "--part", "plain", "--val-set", own / "corpus.jsonl", "--json")
    outcome = lab.run(*words)
    assert (outcome.code, outcome.out) == (3, "")
    assert "checkpoint.config.activation_function: stored 'gelu_new', found 'relu'" in outcome.err
    again = lab.run(
        "build",
        "--checkpoint",
        own / "model",
        "--data",
        own / "corpus.jsonl",
        "--store",
        own / "store",
        "--name",
        "learned",
        "--span-rows",
        "6",
    )
    assert again.code == 3
    assert "checkpoint.config.activation_function: stored 'gelu_new', asked for 'relu'" in again.err
    assert lab.run(*words, "--checkpoint", lab.checkpoint).code == 0


def test_rope_and_norms_of_another_architecture(lab: Lab, tmp_path: Path) -> None:
    import transformers

    shutil.copytree(lab.checkpoint, tmp_path / "model")
    shutil.copy(lab.corpus, tmp_path / "corpus.jsonl")
    settings = {
        "vocab_size": 290,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).save_pretrained(tmp_path / "model")
    build(tmp_path, "plain", PLAIN)
    before = (tmp_path / "model" / "config.json").read_text()
    rope = {"rope_type": "default", "rope_theta": 50.0}
    for change, expected in (
        (config(rope_parameters=rope), "checkpoint.config.rope_parameters.rope_theta: stored 10000.0, VERB 50.0"),
        (config(rms_norm_eps=0.1), "checkpoint.config.rms_norm_eps: stored 1e-06, VERB 0.1"),
        (config(hidden_act="relu"), "checkpoint.config.hidden_act: stored 'silu', VERB 'relu'"),
    ):
        change(tmp_path)
        for ask in ("query", "build"):
            refused(tmp_path, ask, expected)
        (tmp_path / "model" / "config.json").write_text(before)
    assert ASKS["query"](tmp_path).results


def test_what_changes_nothing_is_the_same_model(own: Path) -> None:
    """Fields that change no output, and a folder that was saved again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = ghoststore.query(**val_set(own)).to_json()["results"]
    model, tokenizer = (one.from_pretrained(own / "model") for one in (AutoModelForCausalLM, AutoTokenizer))
    model.save_pretrained(own / "model")
    tokenizer.save_pretrained(own / "model")
    config(use_cache=False, initializer_range=0.5, attn_pdrop=0.3, transformers_version="4.40.0")(own)
    assert ghoststore.query(**val_set(own)).to_json()["results"] == first
    for name, projection in (("learned", None), ("plain", PLAIN)):
        assert build(own, name, projection).resumed_rows == 27


def test_full_gradients(own: Path) -> None:
    def gradients() -> Any:
        return ghoststore.full_gradients(
            checkpoint=own / "model", data=own / "corpus.jsonl", out=own / "gradients", max_samples=2, device="cpu"
        )

    gradients()
    assert gradients().resumed_files
    config(activation_function="relu")(own)
    with pytest.raises(MismatchError, match=r"config\.activation_function: stored 'gelu_new', asked for 'relu'"):
        gradients()


# Manifests that do not say which model they are of.


LACKING = r"lacks checkpoint\.config, tokenizer\.class, tokenizer\.special_tokens in its manifest"


def nameless(manifest: dict[str, Any]) -> None:
    del manifest["checkpoint"]["config"]
    manifest["tokenizer"] = {"fingerprint": manifest["tokenizer"]["fingerprint"]}


OPTIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "plain": {"projection": PLAIN},
    "blocks": {
        "projection": ProjectionConfig(
            rank_total=16, rank_min=2, seed=3, kind="rademacher", layers=("mlp",), precondition="none"
        ),
        "max_length": 9,
        "overlong": "window",
        "max_samples": 12,
        "batch_tokens": 64,
        "span_rows": 5,
        "proj_dtype": "float16",
        "loss_reduction": "sum",
        "model_dtype": "bfloat16",
        "store_text": True,
    },
    "by layer": {
        "projection": ProjectionConfig(
            compress=40,
            compress_by="layer",
            damping=0.5,
            calibration_samples=20,
            exclude_layers=("transformer.h.0.mlp.c_proj",),
        ),
        "fields": ghoststore.Fields(text="text", id="id"),
        "gradient_checkpointing": True,
    },
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_nameless_part_and_the_command_that_builds_it_again(lab: Lab, own: Path, name: str) -> None:
    folder = own / "with spaces"
    shutil.copytree(own / "model", folder / "model")
    shutil.copy(own / "corpus.jsonl", folder / "corpus.jsonl")
    options = {"projection": None, **OPTIONS[name]}
    given = {"checkpoint": folder / "model", "data": folder / "corpus.jsonl", "store": folder / "store", "name": "it"}
    ghoststore.build(**given, **options, device="cpu")
    built = Store.open(folder / "store").part("it")
    expected, vectors = built.manifest, vectors_of(built)
    rewrite(folder, "it", nameless)
    asks: list[Callable[[], Any]] = [
        lambda: ghoststore.query(**val_set(folder) | {"part": "it"}),
        lambda: ghoststore.build(**given, **options, device="cpu"),
    ]
    messages = []
    for ask in asks:
        with pytest.raises(
            MismatchError,
            match=LACKING,
        ) as caught:
            ask()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert str(built.path) in messages[0]
    command = shlex.split(messages[0].splitlines()[-1])
    assert command[:2] == ["ghoststore", "build"]
    shutil.rmtree(built.path)
    outcome = lab.run(*command[1:], "--device", "cpu", "--quiet")
    assert outcome.code == 0, outcome.err
    again = Store.open(folder / "store").part("it")
    same = (
        "checkpoint",
        "tokenizer",
        "corpus",
        "tokens",
        "loss",
        "projection",
        "layers",
        "storage",
        "batching",
        "dtype",
    )
    assert {section: again.manifest[section] for section in same} == {section: expected[section] for section in same}
    assert (vectors_of(again) == vectors).all()


def test_a_nameless_part_of_standard_input(own: Path) -> None:
    rewrite(own, "plain", nameless)
    rewrite(own, "plain", lambda manifest: manifest["source"].update(data="-"))
    with pytest.raises(MismatchError, match="corpus on standard input") as caught:
        ASKS["query"](own)
    assert "--data - --store" in str(caught.value)
