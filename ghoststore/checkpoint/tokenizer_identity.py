"""The identity of a tokenizer: everything that can change the ids of a text or a chat.

Small sections are kept as they are, so that an error can show both values. Large ones (a vocabulary, merges) are kept
as SHA-256.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

from ghoststore.checkpoint.token_ids import TokenIds

LARGEST_SECTION = 2000
"""Most characters of JSON of a section that is kept as it is."""

RUNTIME = ("version", "truncation", "padding")
"""Entries of tokenizer.json that do not change ids: each call sets truncation and padding itself."""

PADDING = "pad_token"

NOISE = frozenset(
    {
        # Where the tokenizer comes from, and how it was loaded.
        "_commit_hash",
        "auto_map",
        "backend",
        "from_slow",
        "is_local",
        "local_files_only",
        "name_or_path",
        "processor_class",
        "subfolder",
        "tokenizer_class",  # the class of the loaded one is compared by its name
        "tokenizer_file",
        "tokenizer_object",
        "transformers_version",
        "trust_remote_code",
        "vocab",
        "vocab_file",
        "merges",
        "merges_file",
        # Padding, truncation, decoding and the names of inputs: ghoststore cuts and pads rows itself.
        "clean_up_tokenization_spaces",
        "max_length",
        "model_input_names",
        "model_max_length",
        "pad_to_multiple_of",
        "pad_token_type_id",
        "padding_side",
        "stride",
        "truncation_side",
        "truncation_strategy",
        # Settings that are in other sections.
        "add_bos_token",  # the post-processor
        "add_eos_token",
        "added_tokens_decoder",
        "additional_special_tokens",  # the added tokens
        "chat_template",
        "extra_special_tokens",
        "split_special_tokens",
    }
)
"""Settings of a tokenizer that are not among the ``settings`` of its identity. All others are."""


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """The sections of a transformers tokenizer, as JSON values, and ``fingerprint``: the SHA-256 (``sha256:…``) of all.

    With a Rust backend these are ``normalizer``, ``pre_tokenizer``, ``post_processor``, ``decoder``, ``model`` and
    ``added_tokens`` (by id) from its tokenizer.json. For others it is ``files``: the SHA-256 of each file that the
    tokenizer saves. Both have ``class``, ``special_tokens``, ``chat_template`` and ``settings`` (those of
    tokenizer_config.json).

    The padding token is included only if the chat template names it, because ghoststore pads rows itself.
    """
    if isinstance(tokenizer, TokenIds):
        return tokenizer.identity()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = _files(tokenizer) if backend is None else _backend(backend)
    template = getattr(tokenizer, "chat_template", None)
    special = {
        name: str(token)
        for name, token in getattr(tokenizer, "special_tokens_map", {}).items()
        if name != PADDING or PADDING in _text(template)
    }
    sections = {
        **described,
        "class": type(tokenizer).__name__,
        "special_tokens": special,
        "chat_template": _condensed(template),
        "settings": {
            **_settings(tokenizer, special, rust=backend is not None),
            "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        },
    }
    text = json.dumps(sections, sort_keys=True)
    return {"fingerprint": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}", **sections}


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """The ``fingerprint`` of :func:`tokenizer_identity`."""
    return str(tokenizer_identity(tokenizer)["fingerprint"])


def _backend(backend: Any) -> dict[str, Any]:
    sections = json.loads(backend.to_str())
    for name in RUNTIME:
        sections.pop(name, None)
    added = {str(token.pop("id")): token for token in sections.pop("added_tokens", [])}
    condensed = {name: _condensed(section) for name, section in sections.items()}
    return {**condensed, "added_tokens": _value_or_digest(added, _text(added))}


def _files(tokenizer: Any) -> dict[str, Any]:
    """The sections of a tokenizer in Python: the files that it saves, without its settings, which have paths and
    versions.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {
            str(path.relative_to(folder)): _digest(path.read_bytes())
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.name not in ("tokenizer_config.json", "special_tokens_map.json")
        }
    added = {str(index): repr(token) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    return {"files": files, "added_tokens": _value_or_digest(added, _text(added))}


def _settings(tokenizer: Any, special: dict[str, str], *, rust: bool) -> dict[str, Any]:
    init_kwargs, defaults = getattr(tokenizer, "init_kwargs", {}), _defaults(type(tokenizer))
    tokens = {*special, PADDING, *getattr(tokenizer, "SPECIAL_TOKENS_ATTRIBUTES", ())}
    names = sorted(init_kwargs.keys() - NOISE - tokens)
    return {
        name: _condensed(json.loads(json.dumps(init_kwargs[name], default=str)))
        for name in names
        if not _as_absent(name, init_kwargs[name], defaults, rust=rust)
    }


def _as_absent(name: str, value: Any, defaults: dict[str, Any], *, rust: bool) -> bool:
    """Whether ``value`` means the same as no value: it is None or False, and so is the default.

    With a Rust backend a setting without a default counts as off, because its effects are in the other sections. A
    tokenizer in Python may accept ``legacy`` without naming it as a parameter, and switch it on if it is absent.
    """
    if value is not None and value is not False:
        return False
    default = defaults.get(name)
    return default is None or default is False if rust else name in defaults and default is value


def _defaults(kind: type) -> dict[str, Any]:
    """The defaults of the parameters of the ``__init__`` of a class and of its bases, by name."""
    inits = [vars(base)["__init__"] for base in reversed(kind.__mro__[:-1]) if "__init__" in vars(base)]
    named = [item for init in inits for item in inspect.signature(init).parameters.items()]
    return {name: parameter.default for name, parameter in named if parameter.default is not inspect.Parameter.empty}


def _condensed(section: Any) -> Any:
    """``section`` if it is small, else its digest. A large dictionary keeps its small entries, and digests of the
    others.
    """
    if not isinstance(section, dict):
        return _value_or_digest(section, _text(section))
    texts = {name: _text(entry) for name, entry in section.items()}
    if sum(map(len, texts.values())) <= LARGEST_SECTION:
        return section
    return {name: _value_or_digest(entry, texts[name]) for name, entry in section.items()}


def _value_or_digest(value: Any, text: str) -> Any:
    """``value`` if its JSON ``text`` is short, else the digest of that."""
    return value if len(text) <= LARGEST_SECTION else _digest(text)


def _text(value: Any) -> str:
    return json.dumps(value)


def _digest(value: str | bytes) -> str:
    data = value.encode() if isinstance(value, str) else value
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
