"""An activation that keeps only its input gives the same output bits and the same gradient."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import NewGELUActivation

from indexer.encode.activations import LeanGELU, lean_activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_and_gradient(dtype: torch.dtype) -> None:
    x = (4 * torch.randn(64, 33, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    weight = torch.randn(64, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = torch.nn.Sequential(NewGELUActivation())
    wanted = plain(x)
    with lean_activations(plain):
        found = plain(x)
        assert type(found.grad_fn).__name__ == f"{LeanGELU.__name__}Backward"
    assert torch.equal(found, wanted)
    (dx,), (dx_wanted,) = (torch.autograd.grad((y * weight).sum(), x) for y in (found, wanted))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert (dx - dx_wanted).norm() <= tolerance * dx_wanted.norm()


def test_keeps_one_array() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    kept: list[torch.Tensor] = []
    with (
        lean_activations(model := torch.nn.Sequential(NewGELUActivation())),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        model(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_the_module_is_as_before_afterwards() -> None:
    model = torch.nn.Sequential(NewGELUActivation())
    with pytest.raises(ZeroDivisionError), lean_activations(model):
        raise ZeroDivisionError
    assert "forward" not in vars(model[0])


def test_a_forward_of_the_users_own_is_left_alone() -> None:
    module = NewGELUActivation()
    module.forward = torch.relu
    with lean_activations(torch.nn.Sequential(module)):
        assert module.forward is torch.relu
