"""PiSSA: a layer against its formula in float64 and PEFT's, its start, and W, which stays what it was."""

import copy
import pytest
import torch
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.errors import UserError
from lora_nlu.methods import pissa
from lora_nlu.methods.pissa import PissaLinear, principal_part

I, O, ALPHA = 24, 20, 6.0  # noqa: E741 (the paper's letters)
PARTS = ("lora_A", "lora_B")


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def layer_of(R: int, lora_dropout: float = 0.0, seed: int = 0, **settings) -> PissaLinear:
    """A layer that has started and has trained a little."""
    layer = PissaLinear(I, O, R, ALPHA, lora_dropout=lora_dropout, **settings)
    layer.weight.copy_(0.2 * random(O, I, seed=seed))
    layer.bias.copy_(random(O, seed=seed + 1))
    layer.start()
    for number, name in enumerate(PARTS):
        parameter = getattr(layer, name)
        parameter.add_(0.1 * random(*parameter.shape, seed=seed + 2 + number)).requires_grad_(True)
    return layer


def formula(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """(W - U_R S_R V_R^T) x + b + s B A x, one token a row, by a full SVD."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    R = A.shape[0]
    return x @ (W - (U[:, :R] * S[:R]) @ Vt[:R] + s * B @ A).T + b


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("subtracted", [False, True])
@pytest.mark.parametrize("R", [1, 4, 8, 16])
def test_a_layer_has_the_values_and_gradients_of_its_formula_in_float64(R, subtracted, use_rslora):
    layer = layer_of(R, use_rslora=use_rslora)
    W = layer.weight.double()
    if subtracted:
        layer.subtract()
    x = random(7, I).requires_grad_(True)
    exact = [t.detach().double().requires_grad_(True) for t in (x, layer.lora_A, layer.lora_B)]
    want = formula(exact[0], W, layer.bias.double(), *exact[1:], layer.scaling)
    got = layer(x)
    assert_close(got, want.float())
    grad = random(7, O, seed=9)
    want.backward(grad.double())
    got.backward(grad)
    for parameter, other in zip((x, layer.lora_A, layer.lora_B), exact, strict=True):
        assert_close(parameter.grad, other.grad.float())
    assert layer.weight.grad is layer.lora_A_start.grad is layer.lora_B_start.grad is None


@pytest.mark.parametrize("shape", [(20, 24), (24, 20), (24, 24), (1, 5)])
def test_the_start_is_the_best_approximation_of_its_rank_and_the_same_from_call_to_call(shape):
    W, rank = random(*shape), min(4, *shape)
    A, B = principal_part(W, rank, 2.0)
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    assert_close(2.0 * B @ A, ((U[:, :rank] * S[:rank]) @ Vt[:rank]).float())
    assert_close((A @ A.T).diag(), (S[:rank] / 2.0).float())
    assert_close((B.T @ B).diag(), (S[:rank] / 2.0).float())
    assert all(torch.equal(*pair) for pair in zip((A, B), principal_part(W.clone(), rank, 2.0), strict=True))


def test_a_weight_of_lower_rank_starts_with_finite_numbers():
    W = random(O, 1) @ random(1, I)
    A, B = principal_part(W, 3, 1.0)
    assert A.isfinite().all() and B.isfinite().all()
    assert_close(B @ A, W)
    assert not any(x.any() for x in principal_part(torch.zeros(O, I), 3, 1.0))


def test_a_rank_that_the_weight_does_not_have_and_an_offloaded_weight_are_refused():
    with pytest.raises(UserError, match=r"rank 21.*\[20, 24\] has 20 singular vectors. Lower --lora_r"):
        principal_part(random(O, I), 21, 1.0)
    with pytest.raises(UserError, match="on the meta device"):
        principal_part(torch.empty(O, I, device="meta"), 2, 1.0)


@pytest.mark.parametrize("subtracted", [False, True])
def test_without_the_update_the_layer_multiplies_by_W(subtracted):
    layer, x = layer_of(4), random(2, 3, I)
    W, want = layer.weight.clone(), F.linear(x, layer.weight, layer.bias)
    if subtracted:
        layer.subtract()
    assert_close(layer(x, apply_update=False), want)
    assert_close(layer.frozen_weight(), W)


@pytest.mark.parametrize("subtracted", [False, True])
def test_dropout_is_of_what_a_and_b_read_alone_as_in_peft(subtracted):
    layer, x = layer_of(4, lora_dropout=0.5), random(5, I)
    A, B = layer.lora_A, layer.lora_B
    W_res = layer.weight - layer.scaling * layer.lora_B_start @ layer.lora_A_start
    if subtracted:
        layer.subtract()
    torch.manual_seed(3)
    dropped = layer.dropout(x)
    torch.manual_seed(3)
    assert_close(layer(x), F.linear(x, W_res, layer.bias) + layer.scaling * dropped @ A.T @ B.T)


def test_merged_and_unmerged_the_layer_computes_the_same_and_has_its_weight_again():
    layer, x = layer_of(4).eval(), random(5, I)
    want, W = layer(x), layer.weight.clone()
    layer.merge()
    assert_close(layer(x), want)
    assert torch.equal(layer.frozen_weight(), W)
    assert {*layer.state_dict()} == {"weight", "bias"}
    layer.unmerge()
    assert torch.equal(layer.weight, W)


def test_a_layer_whose_weight_is_the_residual_is_neither_merged_saved_nor_loaded():
    layer = layer_of(4)
    state = layer.state_dict()
    layer.subtract()
    with pytest.raises(ValueError, match="W_res of PiSSA.*restore_weights"):
        layer.merge()
    with pytest.raises(RuntimeError, match="can't be saved.*restore_weights"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match="weight: the weight of this layer is W_res of PiSSA"):
        layer.load_state_dict(state)
    assert_close(copy.deepcopy(layer)(random(5, I)), layer(random(5, I)))


@pytest.mark.parametrize("subtracted", [False, True])
def test_gradients_of_gradients_half_precision_and_autocast_take_the_plain_path(subtracted):
    layer, x = layer_of(2), random(3, I).requires_grad_(True)
    want = layer(x.detach())
    if subtracted:
        layer.subtract()
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    grad.sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(x.detach()).float(), want, 0.03)
    assert_close(layer.bfloat16()(x.detach().bfloat16()).float(), want, 0.03)
