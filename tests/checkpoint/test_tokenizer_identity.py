"""The identity of a tokenizer: whatever changes ids, or the text of a chat, changes it; saving does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from ghoststore.checkpoint.load import load_tokenizer
from ghoststore.checkpoint.same_model import IDENTIFYING
from ghoststore.checkpoint.tokenizer_identity import LARGEST_SECTION, fingerprint_tokenizer, tokenizer_identity
from ghoststore.store.base.manifest import differences
from tests.conftest import save_model

PIECES = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6, "ab": 7, "<pad>": 8}
MERGES = [("▁", "a"), ("a", "b")]
SCORES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)]
BYTES = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
KINDS: dict[str, Callable[[Path], Any]] = {
    "llama": lambda _: tf.LlamaTokenizer(vocab=PIECES, merges=MERGES, add_bos_token=True, add_eos_token=True),
    "gemma": lambda _: tf.GemmaTokenizer(vocab=PIECES | {"<bos>": 9, "<eos>": 10}, merges=MERGES),
    "gpt2": lambda _: tf.GPT2Tokenizer(vocab=BYTES, merges=[("a", "b")], add_prefix_space=True),
    "qwen2": lambda _: tf.Qwen2Tokenizer(vocab=BYTES, merges=[("a", "b")]),
    "bert": lambda _: tf.BertTokenizer(
        vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "##b": 6}, do_lower_case=True
    ),
    "t5": lambda _: tf.T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], extra_ids=2
    ),
    "xlm-roberta": lambda _: tf.XLMRobertaTokenizer(vocab=[*SCORES, ("<mask>", 0.0)]),
    "code-llama": lambda _: tf.CodeLlamaTokenizer(vocab=PIECES, merges=MERGES),
    "byt5": lambda _: tf.ByT5Tokenizer(),
    "ctrl": lambda folder: tf.CTRLTokenizer(*ctrl_files(folder)),
}


def ctrl_files(folder: Path) -> tuple[str, str]:
    (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1, "b</w>": 2, "ab</w>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_it_is_the_same(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind](tmp_path)
    found = []
    for number in range(3):
        made.save_pretrained(tmp_path / str(number))
        made = tf.AutoTokenizer.from_pretrained(tmp_path / str(number))
        found.append(tokenizer_identity(made))
    assert found[0] == found[1] == found[2]
    assert json.loads(json.dumps(found[0])) == found[0]
    for name, kind in IDENTIFYING["tokenizer"].items():
        assert isinstance(found[0][name], kind)
    assert str(tmp_path) not in json.dumps(found[0])


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def in_backend(**sections: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, "tokenizer.json", lambda value: value.update(sections))


def in_settings(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, "tokenizer_config.json", lambda value: value.update(settings))


def in_model(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, "tokenizer.json", lambda value: change(value["model"]))


def swap_two_words(model: dict[str, Any]) -> None:
    vocabulary = model["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
}
ADDED = {
    "id": 290,
    "content": "dog",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}
CHAT = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
REPLACE = {"type": "Replace", "pattern": {"String": "The"}, "content": "zzz"}
TEXT = "The cat sees A dog<|endoftext|> and B"
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "normalizer": (in_backend(normalizer=REPLACE), "normalizer"),
    "pre-tokenizer": (
        in_backend(
            pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        ),
        "pre_tokenizer.add_prefix_space",
    ),
    "template": (in_backend(post_processor=TEMPLATE), "post_processor.single"),
    "added token": (
        lambda folder: edit_json(folder, "tokenizer.json", lambda value: value["added_tokens"].append(ADDED)),
        "added_tokens.290",
    ),
    "flag of a token": (
        lambda folder: edit_json(folder, "tokenizer.json", lambda value: value["added_tokens"][0].update(lstrip=True)),
        "added_tokens.0.lstrip",
    ),
    "vocabulary": (in_model(swap_two_words), "model.vocab"),
    "merges": (in_model(lambda model: model["merges"].clear()), "model.merges"),
    "dropout of merges": (in_model(lambda model: model.update(dropout=1.0)), "model.dropout"),
    "special tokens split": (in_settings(split_special_tokens=True), "settings.split_special_tokens"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_ids_is_named(folder: Path, change: str) -> None:
    before = load_tokenizer(folder)
    make, path = CHANGES[change]
    make(folder)
    after = load_tokenizer(folder)
    if change == "flag of a token":
        assert before("a <|endoftext|>")["input_ids"] != after("a <|endoftext|>")["input_ids"], "it matters"
    else:
        assert before(TEXT)["input_ids"] != after(TEXT)["input_ids"], "it matters"
    found = differences(tokenizer_identity(before), tokenizer_identity(after))
    names = [name for name, _, _ in found if name != "fingerprint"]
    assert any(name.startswith(path) for name in names), names
    assert fingerprint_tokenizer(before) != fingerprint_tokenizer(after)


def test_what_changes_chats_is_named(folder: Path) -> None:
    before = tokenizer_identity(load_tokenizer(folder))
    (folder / "chat_template.jinja").write_text(CHAT)
    with_template = tokenizer_identity(load_tokenizer(folder))
    in_settings(bos_token="the")(folder)  # a template may print it
    with_token = tokenizer_identity(load_tokenizer(folder))
    assert ("chat_template", None, CHAT) in differences(before, with_template)
    assert ("special_tokens.bos_token", "<|endoftext|>", "the") in differences(with_template, with_token)


def test_a_class_that_treats_text_otherwise_is_named(tmp_path: Path) -> None:
    """Code Llama reads `<FILL_ME>` in a text, and Llama does not."""
    KINDS["code-llama"](tmp_path).save_pretrained(tmp_path)
    before = tokenizer_identity(load_tokenizer(tmp_path))
    in_settings(tokenizer_class="LlamaTokenizer")(tmp_path)
    after = tokenizer_identity(load_tokenizer(tmp_path))
    assert ("class", "CodeLlamaTokenizer", "LlamaTokenizer") in differences(before, after)


def test_files_of_a_tokenizer_in_python(tmp_path: Path) -> None:
    before = tokenizer_identity(KINDS["ctrl"](tmp_path))
    assert sorted(before["files"]) == ["merges.txt", "vocab.json"]
    ctrl_files(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 2, "b</w>": 1, "ab</w>": 3}))
    after = tokenizer_identity(tf.CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    assert {name for name, _, _ in differences(before, after)} == {"fingerprint", "files.vocab.json"}


def test_what_a_call_sets_anew_is_no_identity(folder: Path) -> None:
    before = load_tokenizer(folder)
    expected, ids = tokenizer_identity(before), before(TEXT)["input_ids"]
    before(TEXT, truncation=True, max_length=3, padding="max_length")  # leaves its state in the backend
    assert tokenizer_identity(before) == expected
    in_backend(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )(folder)
    in_settings(model_max_length=5, padding_side="left", clean_up_tokenization_spaces=True)(folder)
    after = load_tokenizer(folder)
    assert after(TEXT, verbose=False)["input_ids"] == ids
    assert tokenizer_identity(after) == expected


def test_a_padding_token_that_was_there_is_no_identity(folder: Path) -> None:
    """Training scripts set `tokenizer.pad_token = tokenizer.eos_token`, and save the tokenizer with the model."""
    edit_json(folder, "tokenizer_config.json", lambda value: value.pop("pad_token"))
    made = load_tokenizer(folder)
    assert made.pad_token is None
    expected, ids = tokenizer_identity(made), made(TEXT)["input_ids"]
    made.pad_token, made.padding_side = made.eos_token, "left"
    assert tokenizer_identity(made) == expected
    made.save_pretrained(folder)
    after = load_tokenizer(folder)
    assert after.pad_token == made.eos_token
    assert after(TEXT)["input_ids"] == ids
    assert tokenizer_identity(after) == expected


def test_a_new_padding_token_is_named(folder: Path) -> None:
    edit_json(folder, "tokenizer_config.json", lambda value: value.pop("pad_token"))
    made = load_tokenizer(folder)
    before, size = tokenizer_identity(made), len(made)
    made.add_special_tokens({"pad_token": "<new pad>"})
    made.save_pretrained(folder)
    found = differences(before, tokenizer_identity(load_tokenizer(folder)))
    assert {name for name, _, _ in found} == {"fingerprint", f"added_tokens.{size}"}


def test_a_padding_token_that_a_chat_template_prints_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ pad_token }}" + CHAT)
    made = load_tokenizer(folder)
    made.pad_token = made.eos_token
    before, chat = tokenizer_identity(made), [{"role": "user", "content": "x"}]
    text = made.apply_chat_template(chat, tokenize=False)
    made.pad_token = "the"
    assert made.apply_chat_template(chat, tokenize=False) != text
    found = differences(before, tokenizer_identity(made))
    assert ("special_tokens.pad_token", "<|endoftext|>", "the") in found


@pytest.mark.parametrize("value", [False, None])
@pytest.mark.parametrize("name", ["add_prefix_space", "use_default_system_prompt", "fix_mistral_regex"])
def test_a_setting_that_is_off_is_as_absent(folder: Path, name: str, value: bool | None) -> None:
    """Releases of transformers write more of what is off, or less."""
    before = load_tokenizer(folder)
    in_settings(**{name: value})(folder)
    after = load_tokenizer(folder)
    assert name in after.init_kwargs
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert tokenizer_identity(after) == tokenizer_identity(before)


def test_a_setting_that_is_on_by_default_is_named_where_it_is_off(tmp_path: Path) -> None:
    class Legacy(tf.ByT5Tokenizer):  # type: ignore[misc]
        """As those in Python on SentencePiece: `legacy` is not named, and on where it is absent."""

        def __init__(self, shout: bool = False, quiet: bool = True, **kwargs: Any) -> None:
            super().__init__(shout=shout, quiet=quiet, **kwargs)

    def settings(**given: Any) -> dict[str, Any]:
        made = Legacy()
        made.init_kwargs = given
        return dict(tokenizer_identity(made)["settings"])

    plain = settings()
    assert settings(shout=False) == plain
    for name, value in (("shout", True), ("shout", None), ("quiet", False), ("legacy", False)):
        assert settings(**{name: value}) == {**plain, name: value}


def test_large_sections_are_digests(folder: Path) -> None:
    found = tokenizer_identity(load_tokenizer(folder))
    assert found["model"]["vocab"].startswith("sha256:")
    assert found["model"]["byte_fallback"] is False
    assert all(len(json.dumps(section)) < 2 * LARGEST_SECTION for section in found.values())
    (folder / "chat_template.jinja").write_text(CHAT * 100)
    assert tokenizer_identity(load_tokenizer(folder))["chat_template"].startswith("sha256:")
