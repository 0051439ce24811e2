"""Which model it is, beside its weights: every field of its configuration that can change what it computes.

The identity is the whole configuration of the loaded model, less a stated list of fields of which it is known (and
tested, by loading the same weights with another value) that they change no output. What is not on the list is in, so a
field that is new, or that nobody thought of, is compared.
"""

from __future__ import annotations

import math
from typing import Any

from ghoststore.store.base.manifest import Difference, differences

INERT = frozenset(
    {
        # Where it comes from and which program wrote it.
        "_name_or_path",
        "architectures",  # the class of the loaded model is compared by its name
        "transformers_version",
        # Which numbers it computes with: asked for where it is loaded, and kept in the manifest's `dtype`.
        "dtype",
        "torch_dtype",
        # What a forward pass gives beside the logits. Caches are off where gradients are taken.
        "output_attentions",
        "output_hidden_states",
        "use_cache",
        # How weights are drawn that no checkpoint holds; a checkpoint with missing weights is refused.
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
"""Fields that change no output of a causal language model, in training neither.

Ids of special tokens are not among them: `pad_token_id` becomes the embedding's `padding_idx`, whose row has no
gradient, and there are models whose forward pass asks for `eos_token_id` (Qwen4-exp hashes n-grams up to it).
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
"""Fields that change outputs in training mode alone: gradients are taken in eval mode, training runs keep them."""

LARGEST_NUMBER = 1 << 20
"""Of a stored field that the configuration at hand does not have."""

_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_FLOAT = "__float__"


def config_identity(config: Any, *, training: bool = False) -> dict[str, Any]:
    """Every field of a transformers configuration that can change outputs, nested ones included, as JSON values.

    With ``training`` those of dropout, too. Numbers that JSON does not know are written as transformers writes them:
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
    """(path, stored, found) wherever the identity ``stored`` is not that of ``config``.

    A release of transformers may know fields that the one before did not. Both must then mean the same: ``stored`` is
    read into the present class, as its config.json would be, and what comes out is compared. So a field that only
    ``config`` has is equal where it is what the class makes of the others; a field that only ``stored`` has differs.
    """
    own = config_identity(config, training=training)
    if stored == own:
        return []
    read = _read_by(config, stored, training) if _is_worth_reading(stored, own) else stored
    return differences(read, own, "checkpoint.config")


def agreed_config(stored: dict[str, Any] | None, config: Any, *, training: bool = False) -> dict[str, Any]:
    """``stored`` where it says the same as ``config`` in the words of another release, else the identity of ``config``:
    what a manifest is asked for that is compared entry by entry.
    """
    if stored is not None and not config_differences(stored, config, training=training):
        return stored
    return config_identity(config, training=training)


def _is_worth_reading(stored: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether ``stored`` may still mean the same as ``found``. Two whole numbers that differ never do; and a manifest
    may come from anywhere: a class makes lists as long as the numbers that it reads, so others are read up to a limit.
    """
    for name, value in stored.items():
        other = own.get(name)
        if isinstance(value, dict):
            if not _is_worth_reading(value, other if isinstance(other, dict) else {}):
                return False
        elif isinstance(value, int) and value != other and (isinstance(other, int) or abs(value) > LARGEST_NUMBER):
            return False
    return True


def _read_by(config: Any, stored: dict[str, Any], training: bool) -> dict[str, Any]:
    """What the class of ``config`` makes of ``stored``; ``stored`` itself where it is of another class, or of none."""
    if stored.get("model_type") != type(config).model_type:
        return stored
    try:
        read = type(config).from_dict(_python(stored))
    except Exception:  # noqa: BLE001 - a class may refuse other values in any way: then they are no longer the same
        return stored
    return config_identity(read, training=training)


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it."""
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
