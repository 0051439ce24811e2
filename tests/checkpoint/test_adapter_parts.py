"""Parts of LoRA adapters: built, asked, resumed and repaired with the adapter and the base they were made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import ghoststore
from ghoststore import ProjectionConfig, Store
from ghoststore.errors import CheckpointError, MismatchError, UsageError
from ghoststore.store.part.build_command import build_command
from tests.support.adapters import save_adapter
from tests.support.parts import unbuild, vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

pytest.importorskip("peft", reason="peft is not installed: pip install 'ghoststore[peft]'")

SETTINGS: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "modules_to_save": ["ln_f"]}
PLAIN = ProjectionConfig(precondition="none", rank_total=9)


@pytest.fixture(scope="module")
def made(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one base, a corpus, a val set, and a store with a part of the first adapter and one merged."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(lab.checkpoint, folder / "base")
    for seed, name in enumerate(("one", "other")):
        save_adapter(folder / name, folder / "base", seed, **SETTINGS)
    lab.write(folder / "train.jsonl", lab.sample_rows(30, 1))
    lab.write(folder / "val.jsonl", lab.sample_rows(4, 3))
    build(folder, "part")
    build(folder, "merged", adapter="merge")
    build(folder, "default", projection=None)
    return folder


def build(folder: Path, name: str, **settings: Any) -> Any:
    given = {
        "checkpoint": folder / "one",
        "data": folder / "train.jsonl",
        "projection": PLAIN,
        "store": folder / "store",
    }
    return ghoststore.build(**{**given, "name": name, "span_rows": 8, "device": "cpu", **settings})


def query(folder: Path, part: str = "part", **settings: Any) -> Any:
    given = {"store": folder / "store", "part": part, "val_set": folder / "val.jsonl", "device": "cpu"}
    return ghoststore.query(**given, **settings)


def part_of(folder: Path, name: str = "part") -> ghoststore.Part:
    return Store.open(folder / "store").part(name)


def hits(result: Any) -> list[tuple[str, float]]:
    return [(hit.id, hit.score) for hit in result[0]]


def test_the_manifest_says_what_it_is_of(made: Path) -> None:
    manifest = part_of(made).manifest
    assert manifest["projection"]["layers"] == ["adapter"]
    assert {layer["name"].split(".lora_")[0].split(".")[-1] for layer in manifest["layers"]} == {
        "c_attn",
        "c_fc",
        "default",
    }
    assert manifest["checkpoint"]["architecture"] == "GPT2LMHeadModel"
    assert manifest["checkpoint"]["adapter"]["config"]["modules_to_save"] == ["ln_f"]
    assert manifest["source"]["base"] == str(made / "base")
    assert manifest["source"]["checkpoint"] == str(made / "one")
    merged = part_of(made, "merged").manifest
    assert merged["projection"]["layers"] == ["mlp", "attn"]
    assert [layer["name"].split(".")[-1] for layer in merged["layers"]] == ["c_attn", "c_proj", "c_fc", "c_proj"]
    assert "adapter" not in ghoststore.Store.open(made / "store").part("merged").manifest["source"]
    assert merged["checkpoint"]["fingerprint"] != manifest["checkpoint"]["fingerprint"]


def test_the_command_builds_the_same_part(lab: Lab, made: Path, tmp_path: Path) -> None:
    for name in ("part", "merged"):
        command = build_command(part_of(made, name).manifest, tmp_path / "store", name)
        assert f"--base {made / 'base'} --adapter {'merge' if name == 'merged' else 'only'}" in command
        assert "--proj-layers" not in command
    outcome = lab.run(*command.split()[1:], "--quiet", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    again = Store.open(tmp_path / "store").part("merged")
    assert np.array_equal(vectors_of(again), vectors_of(part_of(made, "merged")))
    assert again.manifest["checkpoint"] == part_of(made, "merged").manifest["checkpoint"]


def test_a_build_goes_on_with_the_same_adapter_alone(made: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made / "store", store)
    vectors = vectors_of(Store.open(store).part("part"))
    unbuild(Store.open(store).part("part"), 1)
    with pytest.raises(MismatchError, match=r"checkpoint\.adapter\.weights: stored .*, asked for "):
        build(made, "part", store=store, checkpoint=made / "other")
    with pytest.raises(MismatchError, match=r"checkpoint\.adapter\.merged: stored False, asked for True"):
        build(made, "part", store=store, adapter="merge", projection=ProjectionConfig(layers=("all",)))
    build(made, "part", store=store)
    assert np.array_equal(vectors_of(Store.open(store).part("part")), vectors)


@pytest.mark.thin(1)
@pytest.mark.parametrize("part", ["part", "merged", "default"])
def test_questions_find_base_and_adapter_again(made: Path, part: str) -> None:
    found = hits(query(made, part))
    assert found == hits(query(made, part, checkpoint=made / "one"))
    assert found == hits(query(made, part, checkpoint=made / "one", base=made / "base"))
    with ghoststore.open(made / "store", part=part, device="cpu") as session:
        assert hits(session.query(made / "val.jsonl")) == found
    assert len(query(made, part, rerank=12)[0]) == 10
    with pytest.raises(MismatchError, match=r"built from other weights than those in .*other on .*base"):
        query(made, part, checkpoint=made / "other")
    with pytest.raises((MismatchError, UsageError), match="base"):
        query(made, part, checkpoint=made / "base")


def test_a_base_that_was_moved_is_given(made: Path, tmp_path: Path) -> None:
    for name in ("one", "base", "store"):
        shutil.copytree(made / name, tmp_path / name)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/base"}))
    shutil.rmtree(tmp_path / "store" / "runs", ignore_errors=True)
    given: dict[str, Any] = {"store": tmp_path / "store", "part": "part", "val_set": made / "val.jsonl"}
    found = ghoststore.query(**given, checkpoint=tmp_path / "one", base=tmp_path / "elsewhere", device="cpu")
    assert hits(found) == hits(query(made))
    other = AutoModelForCausalLM.from_pretrained(made / "base")
    other.transformer.ln_f.bias.data += 1
    other.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(made / "base").save_pretrained(tmp_path / "changed")
    with pytest.raises(MismatchError, match=r"checkpoint\.adapter\.base: stored "):
        ghoststore.query(**given, checkpoint=tmp_path / "one", base=tmp_path / "changed", device="cpu")


def test_a_model_in_memory_is_that_of_the_folders(made: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(made / "base")
    peft = PeftModel.from_pretrained(base, made / "one")
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    before = {name: (p.clone(), p.requires_grad) for name, p in peft.named_parameters()}
    build(made, "part", checkpoint=peft, tokenizer=tokenizer, store=tmp_path / "store")
    own = Store.open(tmp_path / "store").part("part")
    assert own.manifest["checkpoint"] == part_of(made).manifest["checkpoint"]
    assert own.manifest["layers"] == part_of(made).manifest["layers"]
    assert np.array_equal(vectors_of(own), vectors_of(part_of(made)))
    assert hits(query(made, checkpoint=peft, tokenizer=tokenizer)) == hits(query(made))
    with ghoststore.open(made / "store", part="part", checkpoint=peft, tokenizer=tokenizer, device="cpu") as session:
        assert hits(session.query(made / "val.jsonl")) == hits(query(made))
    assert ghoststore.doctor(checkpoint=peft, tokenizer=tokenizer, samples=3, max_length=12).wrong == []
    assert all(
        (p == before[name][0]).all() and p.requires_grad == before[name][1] for name, p in peft.named_parameters()
    )
    given: dict[str, Any] = {"store": tmp_path / "store", "val_set": made / "val.jsonl", "device": "cpu"}
    assert hits(ghoststore.query(**given, checkpoint=made / "one", tokenizer=made / "base")) == hits(query(made))


def test_verify_repair_select_and_exact_gradients(made: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made / "store", store)
    vectors = vectors_of(Store.open(store).part("part"))
    assert ghoststore.verify(store).sound
    victim = next(path for path in (store / "parts" / "part" / "vectors" / "c").rglob("*") if path.is_file())
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert not ghoststore.verify(store).sound
    assert ghoststore.repair(store, part="part", device="cpu").sound
    assert np.array_equal(vectors_of(Store.open(store).part("part")), vectors)
    chosen = tmp_path / "chosen.jsonl"
    ghoststore.select(store=store, part="part", val_set=made / "val.jsonl", fraction=0.2, out=chosen, device="cpu")
    assert len(chosen.read_text().splitlines()) == 6
    report = ghoststore.full_gradients(
        checkpoint=made / "one", data=made / "train.jsonl", out=tmp_path / "full", max_samples=2, device="cpu"
    )
    names = {entry["name"] for entry in json.loads((tmp_path / "full" / "manifest.json").read_text())["parameters"]}
    assert report.rows == 2
    assert names == {name for layer in part_of(made).manifest["layers"] for name in layer["parameters"]}


def test_doctor_finds_nothing_wrong(made: Path) -> None:
    report = ghoststore.doctor(checkpoint=made / "one", samples=3, max_length=12, device="cpu")
    assert report.wrong == []
    assert report.settings["projection"]["layers"] == ["adapter"]


def test_trainings_from_an_adapter_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is an adapter, and a whole model is expected here: merge it"):
        ghoststore.train(
            checkpoint=made / "one",
            tokenizer=made / "base",
            data=made / "train.jsonl",
            val_set=made / "val.jsonl",
            store=tmp_path / "store",
            output_dir=tmp_path / "out",
        )
    with pytest.raises(UsageError, match=r"is of an adapter, and an evaluation trains whole models anew"):
        ghoststore.evaluate(store=made / "store", part="part", val_set=made / "val.jsonl", out=tmp_path / "evaluation")
