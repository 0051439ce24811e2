"""Checkpoints of nanoGPT, and its models in memory, as GPT-2 of transformers: the same outputs, the same parameters.

``torch.save`` wrote ``{"model": state dict, "model_args": {…}, …}``. It is read with ``weights_only``: no code runs.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ghoststore.checkpoint.bounds import LARGEST_FILE, MOST_COUNT
from ghoststore.checkpoint.objects import copied, naming_address, place_of
from ghoststore.errors import CheckpointError
from ghoststore.lazy import importing
from ghoststore.progress import Progress
from ghoststore.settings.option import in_objects
from ghoststore.store.base.object_path import location

SUFFIXES = (".pt", ".pth", ".ckpt")
"""Of files that may be a checkpoint."""
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
COMPILED = "_orig_mod."
"""What torch.compile puts before the names of parameters."""
DATA = "data.pkl"
CLOSE = 1e-6
"""Largest relative difference of logits that can be rounding, between a model in memory and its GPT-2, both in float64;
some classes compute norms in float32."""

DAMAGE = (
    *(RuntimeError, OSError, EOFError, LookupError, TypeError, AttributeError, AssertionError, ValueError),
    *(OverflowError, struct.error),
)
"""What torch.load raises, beside UnpicklingError, where bytes of a file are others."""

_TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Modules whose weight transformers keeps as (inputs, outputs)."""
_NORMS = ("ln_1", "ln_2")
_WHAT = "a checkpoint of nanoGPT is a dictionary with `model` and `model_args`"


def is_checkpoint_file(source: object) -> bool:
    """Whether ``source`` is the path of a file that nanoGPT may have written."""
    if not isinstance(source, str | Path) or Path(source).suffix not in SUFFIXES:
        return False
    return location(source, "checkpoint").is_file() if in_objects(source) else Path(source).is_file()


def file_of(source: str | Path, progress: Progress | None = None) -> Path:
    """The path of a file: of an address in object storage, that of its copy."""
    return copied(source, (), suffixes=SUFFIXES, progress=progress) if in_objects(source) else Path(source)


def looks_like(model: Any) -> bool:
    """Whether an object in memory has the parts of nanoGPT's model: a configuration with its sizes, and its modules."""
    transformer = getattr(model, "transformer", None)
    return (
        all(isinstance(getattr(getattr(model, "config", None), name, None), int) for name in SIZES)
        and hasattr(model, "state_dict")
        and hasattr(model, "lm_head")
        and all(hasattr(transformer, name) for name in ("wte", "wpe", "h", "ln_f"))
    )


def load_nanogpt(path: str | Path) -> Any:
    """A checkpoint of nanoGPT as a GPT2LMHeadModel of transformers in eval mode, with the same outputs.

    It can be saved as a folder: ``load_nanogpt("ckpt.pt").save_pretrained("gpt2")``. Where nanoGPT has no biases
    (``bias=False``), its biases are zeros, and a training would train them. Raises CheckpointError as ``build`` does.
    """
    if not (is_checkpoint_file(path) if in_objects(path) else Path(path).is_file()):
        raise CheckpointError(f"checkpoint {path}: there is no such file; {_WHAT}")
    return read_file(file_of(path), zero_biases=True)


def uncompiled(model: Any) -> Any:
    """The model inside that of torch.compile; another one as it is."""
    return getattr(model, "_orig_mod", model)


def fit_biases(model: Any) -> None:
    """Give the zeros that stand for biases in ``model`` the dtype and device of the weights beside them."""
    for module in model.modules():
        if "bias" in module._buffers:
            module._buffers["bias"] = module._buffers["bias"].to(module.weight)


def read_file(path: Path, *, zero_biases: bool = False) -> Any:
    """The GPT2LMHeadModel of a checkpoint file, in eval mode, in the dtype of its weights: see :func:`as_gpt2`.

    CheckpointError for a file that is no checkpoint of nanoGPT, that holds more than tensors and plain values, or whose
    tensors are not those that its ``model_args`` ask for.
    """
    with naming_address(path):
        return _read(path, zero_biases=zero_biases)


def _read(path: Path, *, zero_biases: bool) -> Any:
    with importing():
        import torch

    _refuse_odd_archive(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read without running what is in it ({_reason(error)}); load it where you "
            'trust it, and save what is needed: torch.save({"model": model.state_dict(), "model_args": model_args}, '
            "path)"
        ) from error
    except DAMAGE as error:
        raise CheckpointError(f"checkpoint {path} is damaged, or cannot be read ({_reason(error)})") from error
    if not isinstance(saved, dict) or not {"model", "model_args"} <= set(saved):
        found = ", ".join(map(repr, list(saved)[:6])) if isinstance(saved, dict) else type(saved).__name__
        raise CheckpointError(f"checkpoint {path}: {_WHAT}; found {found}")
    state, args = saved["model"], saved["model_args"]
    if not isinstance(state, Mapping) or not isinstance(args, Mapping):
        raise CheckpointError(f"checkpoint {path}: {_WHAT}, both dictionaries")
    return as_gpt2(state, args, f"checkpoint {place_of(path)}", zero_biases=zero_biases)


def convert_loaded(model: Any) -> Any:
    """The GPT2LMHeadModel that shares the weights of nanoGPT's ``model`` in memory, with its own training mode.

    CheckpointError for a model whose outputs are others than those of that GPT-2: its class was changed.
    """
    import torch
    from torch.func import functional_call

    config, what = model.config, f"the {type(model).__name__} in memory"
    args = {name: getattr(config, name) for name in SIZES} | {"bias": getattr(config, "bias", True)}
    converted = as_gpt2(model.state_dict(), args, what).train(model.training)
    wide = {name: parameter.detach().double() for name, parameter in model.named_parameters(remove_duplicate=False)}
    same = as_gpt2(wide, args, what)  # it shares the memory of these
    ids = torch.arange(min(16, args["block_size"]), device=same.device).mul(7).remainder(args["vocab_size"])[None]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            own, other = functional_call(model, wide, (ids, ids), tie_weights=False), same(input_ids=ids).logits
    except Exception as error:  # the forward pass is a user's, and may raise anything
        raise CheckpointError(
            f"{what} looks like a model of nanoGPT, and cannot be run as one, model(idx, targets), in float64: "
            f"{error!s:.300}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    own = own[0] if isinstance(own, tuple) else own
    if not isinstance(own, torch.Tensor) or own.shape != other.shape:
        raise CheckpointError(
            f"{what}: expected (logits, loss) with logits {tuple(other.shape)} from model(idx, targets)"
        )
    apart = float((own - other).abs().max() / other.abs().max().clamp_min(1e-9))
    if not apart <= CLOSE:
        raise CheckpointError(
            f"{what} has the parameters of nanoGPT's model and other outputs (logits are {apart:.1e} apart), so its "
            "class was changed: as a checkpoint it is not supported. Its gradients can be had from the engine, "
            "`ghoststore.GradProjLoraEngine(model)`"
        )
    return converted


def has_biases(model: Any) -> bool:
    """Whether a model of :func:`as_gpt2` has parameters for biases."""
    return getattr(model.config, "nanogpt_bias", True) is not False


def as_gpt2(state: Mapping[Any, Any], args: Mapping[Any, Any], what: str, *, zero_biases: bool = False) -> Any:
    """The GPT2LMHeadModel of a state dict and its ``model_args``, in eval mode. It shares the memory of the weights.

    Without ``bias`` its layers have no parameters for biases, like those of nanoGPT: Conv1D modules, which need one,
    have zeros in a buffer; with ``zero_biases`` they are parameters of zeros. CheckpointError, which begins with
    ``what``, for tensors that are not those of such a model.
    """
    with importing():
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.initialization import no_init_weights

    sizes = _sizes(args, what)
    bias = args.get("bias", True)
    if not isinstance(bias, bool):
        raise CheckpointError(f"{what}: `bias` of its model_args is {bias!r:.40}; expected true or false")
    tensors = _tensors(state, sizes["n_layer"], what)
    expected = dict(_expected(sizes, bias))
    for name in sorted(expected.keys() | tensors.keys()):
        tensor, shape = tensors.get(name), expected.get(name)
        if tensor is None or shape is None or tuple(tensor.shape) != shape:
            found = "none" if tensor is None else f"one of {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{what}: tensor {name!r}: its model_args ask for {'none' if shape is None else shape}, found {found}"
            )
    if not torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"]):
        raise CheckpointError(
            f"{what}: the weights of lm_head and of transformer.wte differ, and nanoGPT ties them: it is another model"
        )
    head = tensors["lm_head.weight"]
    config = GPT2Config(
        vocab_size=sizes["vocab_size"],
        n_positions=sizes["block_size"],
        n_embd=sizes["n_embd"],
        n_layer=sizes["n_layer"],
        n_head=sizes["n_head"],
        activation_function="gelu",  # exact, as nn.GELU()
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), _dropout(args, what)),
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        **({} if bias or zero_biases else {"nanogpt_bias": False}),
    )
    with no_init_weights(), torch.device("meta"):
        model: Any = GPT2LMHeadModel(config)
    if not has_biases(model):
        _drop_biases(model, head)
    given = {name: tensor.t() if name.endswith(_WEIGHTS) else tensor for name, tensor in tensors.items()}
    zeros = {
        name: head.new_zeros(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and not bias
    }
    model.load_state_dict({**zeros, **given}, assign=True)
    model.tie_weights()
    return model.requires_grad_(True).eval()


_WEIGHTS = tuple(f"{name}.weight" for name in _TRANSPOSED)


def _reason(error: Exception) -> str:
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.300}"


def _refuse_odd_archive(path: Path) -> None:
    """CheckpointError for a file that is no archive of torch.save, or that may unpack to more than its own size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} is no whole archive, as torch.save writes since torch 1.6 ({error!s:.200}); {_WHAT} in "
            "such a file: one of before, which you trust, becomes one by torch.save(torch.load(path), path)"
        ) from error
    size = path.stat().st_size
    for entry in entries:
        most = LARGEST_FILE if entry.filename.endswith(DATA) else size
        if entry.compress_type != zipfile.ZIP_STORED or not 0 <= entry.file_size <= min(size, most):
            raise CheckpointError(f"checkpoint {path} is damaged: {entry.filename!r:.80} has {entry.file_size:,} bytes")


def _sizes(args: Mapping[Any, Any], what: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name in SIZES:
        value = args.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{what}: its model_args have {name} {value!r:.40}; expected a whole number above 0")
        sizes[name] = value
    if sizes["n_embd"] % sizes["n_head"] or sizes["n_layer"] > MOST_COUNT:
        raise CheckpointError(f"{what}: its model_args have sizes that no model of nanoGPT has: {sizes}")
    return sizes


def _dropout(args: Mapping[Any, Any], what: str) -> float:
    value = args.get("dropout", 0.0)
    if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise CheckpointError(f"{what}: its model_args have dropout {value!r:.40}; expected 0 to 1")
    return float(value)


def _tensors(state: Mapping[Any, Any], layers: int, what: str) -> dict[str, Any]:
    """The parameters of a state dict by name, without the causal masks that older versions of nanoGPT keep there."""
    import torch

    tensors: dict[str, Any] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
            raise CheckpointError(f"{what}: {name!r:.80} is no plain tensor of a model of nanoGPT")
        name = name.removeprefix(COMPILED)
        if name.endswith(".attn.bias") and tensor.dim() == 4:
            continue
        if name in tensors:
            raise CheckpointError(f"{what}: {name!r:.80} is there twice, with and without {COMPILED!r} before it")
        tensors[name] = tensor.detach()
    if len({tensor.dtype for tensor in tensors.values()}) != 1 or not next(iter(tensors.values())).is_floating_point():
        raise CheckpointError(f"{what}: expected tensors of one dtype of floats, found {_dtypes(tensors)}")
    deepest = max((int(name.split(".")[2]) for name in tensors if _of_layer(name)), default=-1)
    if deepest + 1 != layers:  # compared first, before names are made for a layer
        raise CheckpointError(f"{what}: its model_args have n_layer {layers}, and its tensors {deepest + 1} layers")
    return tensors


def _of_layer(name: str) -> bool:
    pieces = name.split(".")
    return len(pieces) > 3 and pieces[:2] == ["transformer", "h"] and pieces[2].isdecimal() and len(pieces[2]) < 6


def _dtypes(tensors: Mapping[str, Any]) -> str:
    return ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()})) or "none"


def _expected(sizes: Mapping[str, int], bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of nanoGPT's model."""
    width = sizes["n_embd"]
    yield "transformer.wte.weight", (sizes["vocab_size"], width)
    yield "transformer.wpe.weight", (sizes["block_size"], width)
    yield "lm_head.weight", (sizes["vocab_size"], width)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_NORMS, (width,))
    shapes |= {
        "attn.c_attn": (3 * width, width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    modules = {
        f"transformer.h.{layer}.{name}": shape for layer in range(sizes["n_layer"]) for name, shape in shapes.items()
    }
    for name, shape in {**modules, "transformer.ln_f": (width,)}.items():
        yield f"{name}.weight", shape
        if bias:
            yield f"{name}.bias", shape[:1]


def _drop_biases(model: Any, like: Any) -> None:
    """Take the biases of norms and Conv1D modules out of the parameters of ``model``."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, Conv1D):
            del module.bias
            module.register_buffer("bias", like.new_zeros(module.nf), persistent=False)
        elif isinstance(module, torch.nn.LayerNorm):
            module.register_parameter("bias", None)
