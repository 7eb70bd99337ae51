"""Derivatives beyond an ordinary backward: higher-order, batched, forward-mode; and traces of torch's operations.

They are compared with float64: of a textbook expression, of our model, or of transformers'.
"""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config, twins
from test_kernels import (
    LORA,
    OPERATIONS,
    called,  # noqa: F401
    factors,
    lora_model,
    needs_library,
    noise,
    operations,
    packed_batch,
    seeded,
    textbook_attention,
    textbook_lora,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, functional
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_nlu.methods.linear import merge_lora_
from lora_nlu.ops import kernels

KINDS = ["roberta", "deberta-v2"]


def textbooks() -> dict[str, Any]:
    """The textbook expression of each of `operations`."""
    packed, tables = packed_batch([17, 3, 40]), [noise(1, 79, 48, seed=seed) for seed in (3, 4)]
    dropped, kept = factors(60, 48, 0.3), factors(60 * 3, 40, 0.3)
    return {
        "linear": F.linear,
        "update": textbook_lora,
        "folded update": textbook_lora,
        "dropout": lambda x: x * dropped.to(x),
        "attention": textbook_attention(packed, 3, 0.25, kept),
        "relative attention": textbook_attention(packed, 3, 0.25, kept, *tables),
    }


def penalty(f: Any, inputs: list[Tensor], trained: list[Tensor], order: int = 2) -> list[Tensor]:
    """Gradients of a gradient penalty on f (the squared norm of its gradients); of order 3, of a penalty on that."""
    value = torch.tanh(f(*inputs)).pow(2).sum()
    for _ in range(order - 1):
        grads = torch.autograd.grad(value, trained, create_graph=True)
        value = sum((g.pow(2).sum() for g in grads), torch.zeros((), dtype=value.dtype))
    return list(torch.autograd.grad(value, trained))


def assert_same_penalty(name: str, trained: Any, order: int = 2, of: Any = lambda f: f) -> None:
    """The penalty of an operation in fp32 has the gradients of its textbook in float64, for inputs number `trained`."""
    f, inputs = operations()[name]
    results = []
    for function, dtype in ((f, torch.float32), (textbooks()[name], torch.float64)):
        leaves = [0.3 * x.detach().to(dtype) for x in inputs]
        with_grad = [leaves[i].requires_grad_() for i in trained if i < len(leaves)]
        results.append(penalty(of(function), leaves, with_grad, order))
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(got.double(), want, 2e-5 if order > 2 else 1e-5, what=f"{name}, input {trained[i]}")


@needs_library
@pytest.mark.parametrize("trained", [range(5), [0], [1], [3, 4]], ids=["all", "first", "second", "A and B"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_gradients_are_those_in_float64(name, trained):
    if min(trained) < len(operations()[name][1]):
        assert_same_penalty(name, trained)


@needs_library
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_third_order_are_those_in_float64(name):
    assert_same_penalty(name, range(5), order=3)


@needs_library
@pytest.mark.parametrize("name", ["attention", "relative attention"])
@pytest.mark.parametrize(
    ("trained", "made"),
    [([0], lambda q, k, v: (q, q, q)), ([0, 1, 2], lambda q, k, v: (q, k + torch.sin(q), v * q))],
    ids=["the same", "computed from another"],
)
def test_gradients_of_gradients_of_inputs_made_of_each_other_are_those_in_float64(name, trained, made):
    assert_same_penalty(name, trained, of=lambda f: lambda *inputs: f(*made(*inputs)))


@needs_library
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_a_retained_graph_are_the_same_each_time(name):
    f, inputs = operations()[name]
    leaves = [nn.Parameter(0.3 * x) for x in inputs]
    value = torch.tanh(f(*leaves)).pow(2).sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    for _ in range(2):
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        for got, want in zip(grads, first, strict=True):
            assert_close(got.detach(), want)
        sum(g.pow(2).sum() for g in grads).backward(inputs=leaves, retain_graph=True)
    f, inputs = textbooks()[name], [0.3 * x.double() for x in inputs]
    want = penalty(f, inputs, [x.requires_grad_() for x in inputs])
    for leaf, second in zip(leaves, want, strict=True):
        assert_close(leaf.grad.double() / 2, second)


@needs_library
@pytest.mark.parametrize("name", OPERATIONS)
def test_many_gradients_at_once_are_the_gradients_one_by_one(name):
    f, inputs = operations()[name]
    leaves = [nn.Parameter(x) for x in inputs]
    y = f(*leaves)
    grads = noise(3, *y.shape)
    at_once = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in grads]
    for got, want in zip(at_once, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        assert_close(got, want)
        assert not got.requires_grad


# Models.


def curvature(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The product of the loss's Hessian and a random vector, by parameter."""
    parameters = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
    loss = model(**batch, labels=torch.arange(4) % 3).loss
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
    along = sum((g * noise(*g.shape, seed=i).to(g)).sum() for i, g in enumerate(grads))
    second = torch.autograd.grad(along, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, second, strict=True))


def assert_same_curvature(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and len(got) >= 4
    largest = max(x.abs().max().item() for x in want.values())
    for name, second in want.items():  # where the exact value is 0, ours is rounding noise
        assert_close(got[name].double(), second, scale=max(second.abs().max().item(), 0.05 * largest), what=name)


def config_of(kind: str, **settings: Any) -> Any:
    return (tiny_config if kind == "roberta" else tiny_deberta_config)(**settings)


BATCH = ragged_batch([9, 4, 6, 1])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("roberta", {}), ("deberta-v2", {}), ("deberta-v2", {"pos_att_type": ["c2p"], "share_att_key": False})]
    + [("deberta-v2", {"relative_attention": False})],
)
def test_second_derivatives_of_a_model_are_those_of_transformers_in_float64(kind, settings):
    ours, theirs = twins(config_of(kind, pad_token_id=1, **settings), attn_implementation="eager")
    assert_same_curvature(curvature(ours, BATCH), curvature(theirs.double(), BATCH))


@needs_library
@pytest.mark.parametrize("trains", ["lora", "all"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("roberta", {}), ("deberta-v2", {}), ("deberta-v2", {"lora_relative_query": True})],
)
def test_second_derivatives_of_a_lora_model_are_those_of_float64(called, kind, settings, trains):  # noqa: F811
    model = lora_model(kind, trains, pad_token_id=1, **settings)
    exact = copy.deepcopy(model).double()
    got = curvature(model, BATCH)
    assert {"add_low_rank"} <= called
    with sdpa_kernel(SDPBackend.MATH):
        assert_same_curvature(got, curvature(exact, BATCH))


@needs_library
def test_second_derivatives_of_a_merged_model_are_those_of_float64():
    model = lora_model("deberta-v2", "all", pad_token_id=1).eval()
    merge_lora_(model)
    exact = copy.deepcopy(model).double()
    for x in (model, exact):
        x.requires_grad_(False)
        x.classifier.requires_grad_(True)
        x.deberta.encoder.layer[0].attention.self.query_proj.weight.requires_grad_(True)
        x.deberta.encoder.layer[0].output.requires_grad_(True)
    assert_same_curvature(curvature(model, BATCH), curvature(exact, BATCH))


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_under_dropout_are_finite_differences_of_the_first(kind):
    model = lora_model(kind, "lora", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, pad_token_id=1)
    parameters = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    got = seeded(curvature, model, BATCH)
    directions = [noise(*p.shape, seed=i) for i, p in enumerate(parameters)]

    def slope(step: float) -> Tensor:  # the loss's gradient after a step along the Hessian product's vector
        for p, direction in zip(parameters, directions, strict=True):
            p.data.add_(step * direction)
        loss = seeded(lambda: model(**BATCH, labels=torch.arange(4) % 3).loss)
        grads = torch.autograd.grad(loss, parameters)
        for p, direction in zip(parameters, directions, strict=True):
            p.data.sub_(step * direction)
        return torch.cat([g.flatten() for g in grads]).double()

    h = 1e-3
    want = (8 * (slope(h) - slope(-h)) - (slope(2 * h) - slope(-2 * h))) / (12 * h)
    assert_close(
        torch.cat([x.flatten() for x in got.values()]).double(), want, 2e-3
    )  # rounding errors are divided by h


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_a_model_in_fp32_do_not_depend_on_the_default_dtype(kind):
    model = lora_model(kind, "lora", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, pad_token_id=1)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def second() -> tuple[Tensor, ...]:
        loss = model(**BATCH, labels=torch.arange(4) % 3).loss
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

    want = seeded(second)
    torch.set_default_dtype(torch.float64)
    try:
        got = seeded(second)
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("case", ["float64", "left padding", "no compiler"])
def test_a_second_derivative_of_torchs_fused_attention_raises_and_of_its_plain_one_is_right(case, monkeypatch):
    """RoBERTa without the kernels; transformers' class uses the same fused attention."""
    ours, theirs = twins(config_of("roberta"), attn_implementation="eager")
    batch = dict(BATCH)
    if case == "left padding":
        batch = {name: x.flip(1) for name, x in batch.items()}
    elif case == "no compiler":
        monkeypatch.setattr(kernels, "library", lambda: None)
    else:
        ours.double()
    with pytest.raises(RuntimeError, match="scaled_dot_product.* is not implemented"):
        curvature(ours, batch)
    with sdpa_kernel(SDPBackend.MATH):
        assert_same_curvature(curvature(ours, batch), curvature(theirs.double(), batch))


# torch.func, torch.autograd.functional and forward mode.


def per_sample(f: Any, A: Tensor) -> Tensor:
    """The gradient of each example's loss, by vmap."""
    return torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))(A, torch.arange(3))


def dual(f: Any, A: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(A, v))).tangent


JACOBIANS = {
    "functional.jacobian": functional.jacobian,
    "vectorized": lambda f, A: functional.jacobian(f, A, vectorize=True),
    "forward": lambda f, A: functional.jacobian(f, A, vectorize=True, strategy="forward-mode"),
    "jacrev": lambda f, A: torch.func.jacrev(f)(A),
    "jacfwd": lambda f, A: torch.func.jacfwd(f)(A),
}
HESSIANS = {
    "vectorized": lambda f, A: functional.hessian(f, A, vectorize=True),
    "forward": lambda f, A: functional.hessian(f, A, vectorize=True, outer_jacobian_strategy="forward-mode"),
    "func.hessian": lambda f, A: torch.func.hessian(f)(A),
    "jacrev twice": lambda f, A: torch.func.jacrev(torch.func.jacrev(f))(A),
}
PRODUCTS = {  # of a vector with the Jacobian (names that end in "jvp") or with the Hessian
    "functional.hvp": lambda f, A, v: functional.hvp(f, A, v)[1],
    "functional.vhp": lambda f, A, v: functional.vhp(f, A, v)[1],
    "functional.jvp": lambda f, A, v: functional.jvp(f, A, v)[1],
    "func.jvp": lambda f, A, v: torch.func.jvp(f, (A,), (v,))[1],
    "forward_ad jvp": dual,
    "jvp of grad": lambda f, A, v: torch.func.jvp(torch.func.grad(f), (A,), (v,))[1],
}


@pytest.fixture(scope="module", params=["roberta", "deberta-v2", "relative query"])
def functions(request):
    """A model, a lora_A of it, logits and loss as functions of that in fp32, and their derivatives in float64."""
    kind, settings = request.param, {}
    if kind == "relative query":
        kind, settings = "deberta-v2", {"lora_relative_query": True}
    model = lora_model(kind, "lora", pad_token_id=1, **settings)
    name = next(name for name, _ in model.named_parameters() if name.endswith("lora_A"))
    batch, labels = ragged_batch([5, 3, 4]), torch.arange(3)

    def of(model: Any) -> Any:
        def logits(A: Tensor) -> Tensor:
            return functional_call(model, {name: A}, kwargs=batch).logits

        return logits, lambda A: F.cross_entropy(logits(A), labels)

    A = model.get_parameter(name).detach().clone()
    logits, loss = of(copy.deepcopy(model).double())
    with sdpa_kernel(SDPBackend.MATH):
        jacobian, hessian = functional.jacobian(logits, A.double()), functional.hessian(loss, A.double())
    return model, name, A, *of(model), jacobian, hessian


@pytest.mark.parametrize("function", JACOBIANS)
def test_a_jacobian_by_each_function_of_torch_is_that_of_float64(functions, function):
    *_, A, logits, _, jacobian, _ = functions
    assert_close(JACOBIANS[function](logits, A).double(), jacobian)


@pytest.mark.parametrize("function", HESSIANS)
def test_a_hessian_by_each_function_of_torch_is_that_of_float64(functions, function):
    *_, A, _, loss, _, hessian = functions
    assert_close(HESSIANS[function](loss, A).double(), hessian)


@pytest.mark.parametrize("function", PRODUCTS)
def test_a_product_with_a_hessian_or_jacobian_is_that_of_float64(functions, function):
    *_, A, logits, loss, jacobian, hessian = functions
    v = noise(*A.shape)
    got = PRODUCTS[function](logits if function.endswith("jvp") else loss, A, v)
    derivative = jacobian if function.endswith("jvp") else hessian
    assert_close(got.double(), (derivative * v.double()).sum((-1, -2)), 2e-5)


def test_gradients_per_example_by_vmap_are_those_one_by_one(functions):
    model, name, A, *_ = functions
    ids = ragged_batch([5, 5, 5], seed=1)["input_ids"]

    def loss(A: Tensor, i: Tensor) -> Tensor:
        row = ids.index_select(0, i[None])
        return functional_call(model, {name: A}, kwargs={"input_ids": row, "labels": i[None]}).loss

    want = [functional.vjp(lambda A, i=i: loss(A, torch.tensor(i)), A)[1] for i in range(3)]
    assert_close(per_sample(loss, A), torch.stack(want))


def test_a_batch_of_masks_under_vmap_raises_an_error_with_a_remedy(functions):
    model, *_ = functions
    batch = ragged_batch([5, 3, 4])

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids[None], mask[None]).logits

    with pytest.raises(RuntimeError, match="attention_mask.*transformers' own class"):
        torch.func.vmap(logits)(batch["input_ids"], batch["attention_mask"])


# Traces.


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs).logits


def traced(kind: str, dtype: torch.dtype, *inputs: Tensor) -> tuple[Any, Any]:
    model = Logits(randomise_(CLASSIFIERS[kind][0](config_of(kind, pad_token_id=1, **LORA))).eval().to(dtype))
    with torch.no_grad():
        return model, torch.jit.trace(model, inputs, check_trace=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 3], [5, 5]], ids=["padding", "all ones"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_with_a_mask_raises_an_error_with_a_remedy(kind, lengths, dtype):
    with pytest.raises(RuntimeError, match="attention_mask.*transformers' own class"):
        traced(kind, dtype, *ragged_batch(lengths).values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_without_a_mask_computes_what_the_model_does_or_raises(kind, dtype):
    model, trace = traced(kind, dtype, ragged_batch([5, 5])["input_ids"])
    with torch.no_grad():
        for lengths in ([5, 5], [3], [7, 7, 7]):
            ids = ragged_batch(lengths, seed=3)["input_ids"]
            try:
                got = trace(ids)
            except RuntimeError:
                assert kind == "deberta-v2" and lengths != [5, 5]  # its relative table is traced for one length
                continue
            assert_close(got, model(ids), 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_with_a_mask_raises_an_error_with_a_remedy(kind):
    model = Logits(CLASSIFIERS[kind][0](config_of(kind, pad_token_id=1)).eval())
    with pytest.raises(RuntimeError, match="attention_mask.*transformers' own class"):
        torch.export.export(model, tuple(ragged_batch([5, 3]).values()))


def test_a_model_compiled_as_one_graph_has_the_same_gradients_and_refuses_their_gradients():
    model = lora_model("roberta", "lora", num_hidden_layers=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = {"input_ids": ragged_batch([5, 5])["input_ids"], "labels": torch.arange(2)}
    want = torch.autograd.grad(model(**batch).loss, parameters)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, gradient in zip(torch.autograd.grad(compiled(**batch).loss, parameters), want, strict=True):
        assert_close(got, gradient)
    with pytest.raises(RuntimeError, match="create_graph|double backward|twice"):
        grads = torch.autograd.grad(compiled(**batch).loss, parameters, create_graph=True)
        torch.autograd.grad(sum(g.pow(2).sum() for g in grads), parameters)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_of_make_fx_computes_what_the_model_does(called, kind):  # noqa: F811
    """The result of a compiled kernel would be a constant in the graph."""
    model = Logits(lora_model(kind, "lora")).eval()
    ids, other = (ragged_batch([5, 5], seed=seed)["input_ids"] for seed in (0, 3))
    with torch.no_grad():
        graph = make_fx(model)(ids)
        assert not called
        assert_close(graph(other), model(other))
        assert (graph(other) - graph(ids)).abs().max() > 0.1


@needs_library
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_dispatch_mode_around_only_the_forward_of_a_checkpointed_model_changes_no_gradient(reentrant):
    model = lora_model("deberta-v2", "all", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch, results = ragged_batch([5, 3], pad=0), []
    for mode in (nullcontext(), FlopCounterMode(display=False)):
        model.zero_grad()
        with mode:
            loss = seeded(lambda: model(**batch, labels=torch.arange(2)).loss)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        results[-1] = [x.clone() for x in results[-1]]
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


def test_kernels_are_used_again_after_every_trace_and_transform():
    x = torch.ones(2, 3)

    def traced_sum(x: Tensor) -> Tensor:
        assert kernels.is_traced()
        return x.sum()

    for transform in (
        torch.func.grad,
        torch.func.vmap,
        make_fx,
        lambda f: lambda x: torch.jit.trace(f, x, check_trace=False),
    ):
        assert kernels.can_replace(x) and not kernels.is_traced()
        transform(traced_sum)(x)
    for mode in (forward_ad.dual_level(), FakeTensorMode()):
        with mode:
            assert kernels.is_traced() and not kernels.can_replace(x)
    assert kernels.can_replace(x) and not kernels.is_traced()
