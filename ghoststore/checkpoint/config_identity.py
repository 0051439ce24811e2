"""The identity of a model beside its weights: every field of its configuration that can change what it computes.

It is the whole configuration of the loaded model, without a list of fields that are known to change no output (a test
loads the same weights with another value). Fields that are not on the list are compared, so new or forgotten fields are
compared, too.
"""

from __future__ import annotations

import math
from typing import Any

from ghoststore.store.base.manifest import Difference, differences

INERT = frozenset(
    {
        # Where the checkpoint comes from, and which program wrote it.
        "_name_or_path",
        "architectures",  # the class of the loaded model is compared by its name
        "transformers_version",
        # The dtype, which is an option of loading and recorded in the manifest's `dtype`.
        "dtype",
        "torch_dtype",
        # What a forward pass returns beside the logits. Caches are off when gradients are computed.
        "output_attentions",
        "output_hidden_states",
        "use_cache",
        # How missing weights are initialised; a checkpoint with missing weights is refused.
        "init_std",
        "initializer_factor",
        "initializer_range",
        # Heads of other tasks than next-token prediction.
        "classifier_dropout",
        "id2label",
        "label2id",
        "problem_type",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
    }
)
"""Fields that change no output of a causal language model, also not in training.

The ids of special tokens are not among them: `pad_token_id` becomes the embedding's `padding_idx`, whose row has no
gradient, and some models use `eos_token_id` in the forward pass (Qwen4-exp hashes n-grams up to it).
"""

DROPOUT = frozenset(
    {
        "activation_dropout",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "decoder_layerdrop",
        "dropout",
        "dropout_rate",
        "embd_pdrop",
        "encoder_layerdrop",
        "hidden_dropout",
        "hidden_dropout_prob",
        "layerdrop",
        "resid_pdrop",
    }
)
"""Fields that change outputs only in training mode. Gradients are computed in eval mode; training runs
compare these.
"""

LARGEST_NUMBER = 1 << 20
"""Largest number in a stored field that the present configuration does not have."""

_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_FLOAT = "__float__"


def config_identity(config: Any, *, training: bool = False) -> dict[str, Any]:
    """Every field of a transformers configuration that can change outputs, with nested ones, as JSON values.

    With ``training``, also the fields of dropout. Numbers that JSON lacks are written as transformers does:
    ``{"__float__": "Infinity"}``.
    """
    from transformers import PretrainedConfig

    left_out = INERT if training else INERT | DROPOUT
    identity = {}
    for name, value in config.to_dict().items():
        own = config.__dict__.get(name)
        nested = isinstance(own, PretrainedConfig)
        if name not in left_out:
            identity[name] = config_identity(own, training=training) if nested else _plain(value)
    return dict(sorted(identity.items()))


def config_differences(stored: dict[str, Any], config: Any, *, training: bool = False) -> list[Difference]:
    """(path, stored, found) for each difference between the identity ``stored`` and that of ``config``.

    A newer release of transformers may have new fields. To see whether both still mean the same, ``stored`` is read
    into the present class, as a config.json would be, and the result is compared. So a field that only ``config`` has
    is equal if it has the value that the class derives from the other fields; a field that only ``stored`` has is a
    difference.
    """
    own = config_identity(config, training=training)
    if stored == own:
        return []
    read = _read_by(config, stored, training) if _is_worth_reading(stored, own) else stored
    return differences(read, own, "checkpoint.config")


def agreed_config(stored: dict[str, Any] | None, config: Any, *, training: bool = False) -> dict[str, Any]:
    """``stored`` if it means the same as ``config`` in another release of transformers, else the identity of
    ``config``.

    Use it for a manifest that will be compared entry by entry.
    """
    if stored is not None and not config_differences(stored, config, training=training):
        return stored
    return config_identity(config, training=training)


def _is_worth_reading(stored: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether ``stored`` could mean the same as ``own``, and is safe to read into a class of transformers.

    If two integers differ, it cannot. A manifest may come from anywhere, and a class makes lists as long as the numbers
    that it reads, so other numbers are limited.
    """
    for name, value in stored.items():
        own_value = own.get(name)
        if isinstance(value, dict):
            if not _is_worth_reading(value, own_value if isinstance(own_value, dict) else {}):
                return False
        elif (
            isinstance(value, int)
            and value != own_value
            and (isinstance(own_value, int) or abs(value) > LARGEST_NUMBER)
        ):
            return False
    return True


def _read_by(config: Any, stored: dict[str, Any], training: bool) -> dict[str, Any]:
    """The identity of ``stored`` after it is read by the class of ``config``; ``stored`` itself if that is
    impossible.
    """
    if stored.get("model_type") != type(config).model_type:
        return stored
    try:
        read = type(config).from_dict(_python(stored))
    except Exception:  # noqa: BLE001 - a class may raise anything for values of another release, which then differ
        return stored
    return config_identity(read, training=training)


def _plain(value: Any) -> Any:
    """``value`` as JSON values; see :func:`config_identity` for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: next(name for name, number in _FLOATS.items() if str(number) == str(value))}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _python(value: Any) -> Any:
    """The inverse of :func:`_plain`."""
    if isinstance(value, dict):
        if set(value) == {_FLOAT} and value[_FLOAT] in _FLOATS:
            return _FLOATS[value[_FLOAT]]
        return {name: _python(entry) for name, entry in value.items()}
    return [_python(entry) for entry in value] if isinstance(value, list) else value
