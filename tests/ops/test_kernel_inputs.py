"""What is handed to compiled code: any strides, offsets and expanded dims give the numbers of the plain expression in
float64; wrong sizes, dtypes and devices are errors, and so is a lack of memory.

Memory beside a view's own elements is NaN: whoever reads it shows it.
"""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import (
    factors,
    fused_attention,
    lora_layer,
    needs_library,
    noise,
    packed_batch,
    seeded,
    textbook_attention,
    textbook_lora,
)
from torch import Tensor, distributed, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor
from torch.nn import functional as F

from lora_nlu.methods.lora import LoRALinear
from lora_nlu.ops import kernels
from lora_nlu.ops.packing import PackedBatch
from lora_nlu.training import processes

few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])


def laid_out(shape: tuple[int, ...], order: Any, gaps: Any, expanded: Any, offset: int, seed: int = 0) -> Tensor:
    """Random numbers [shape] whose dims lie in memory in this order, with gaps of NaN; expanded ones have stride 0."""
    strides, step = [0] * len(shape), 1
    for dim in order:
        step *= gaps[dim]
        if not expanded[dim]:
            strides[dim], step = step, step * max(shape[dim], 1)
    memory = torch.full((offset + step + 1,), torch.nan)
    own = torch.arange(len(memory)).as_strided(shape, strides, offset).flatten().unique()
    memory[own] = noise(len(own), seed=seed)
    return memory.as_strided(shape, strides, offset)


def views(*shape: int, seed: int = 0) -> Any:
    each = st.tuples
    return st.builds(
        laid_out,
        st.just(shape),
        st.permutations(range(len(shape))),
        each(*(st.integers(1, 3) for _ in shape)),
        each(*(st.sampled_from([False, False, True]) for _ in shape)),
        st.integers(0, 5),
        st.just(seed),
    )


def assert_exact(f: Any, exact: Any, inputs: list[Tensor | None], grad: Tensor, tolerance: float = 1e-5) -> None:
    """f on these tensors as they lie, and its gradients from `grad` as it lies, are those of `exact` in float64."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    doubles = [None if x is None else x.double().requires_grad_() for x in inputs]
    float_leaves, double_leaves = [x for x in leaves if x is not None], [x for x in doubles if x is not None]
    y, want = f(*leaves), exact(*doubles)
    got = [y.detach(), *torch.autograd.grad(y, float_leaves, grad)]
    exactly = [want.detach(), *torch.autograd.grad(want, double_leaves, grad.double())]
    for i, (a, b) in enumerate(zip(got, exactly, strict=True)):
        # where the exact number is a difference that cancels, rounding is of the size of what cancelled
        scale = max(b.abs().max().item(), 1.0) if b.numel() else 1.0
        assert_close(a.double(), b, tolerance, scale, what=f"gradient {i}" if i else "result")


sizes = st.sampled_from([1, 2, 3, 5, 16, 17, 32, 48])


@few
@given(st.data(), sizes, sizes, sizes)
def test_a_linear_layer_of_any_strides_and_sizes_computes_x_w_plus_b(data, rows, size, out):
    inputs = [data.draw(views(rows, size)), data.draw(views(out, size, seed=1)), data.draw(views(out, seed=2))]
    grad = data.draw(views(rows, out, seed=3))
    assert_exact(kernels.linear, F.linear, inputs, grad)
    assert_exact(kernels.linear, F.linear, [*inputs[:2], None], grad)
    y = kernels.product(*inputs)
    assert_close(y.double(), F.linear(*(x.double() for x in inputs)), scale=max(y.abs().max().item(), 1.0))


@few
@given(st.data(), sizes, sizes, sizes, st.sampled_from([1, 2, 8, 17]))
def test_an_updated_layer_of_any_strides_and_sizes_is_the_textbooks(data, rows, size, out, rank):
    shapes = [(rows, size), (out, size), (out,), (rank, size), (out, rank)]
    inputs = [data.draw(views(*shape, seed=i)) for i, shape in enumerate(shapes)]
    grad = data.draw(views(rows, out, seed=9))
    assert_exact(lora_layer_of_views, textbook_lora, inputs, grad, 2e-5)


def lora_layer_of_views(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A layer whose parameters lie as these tensors do: they are put in place, not copied."""
    layer = LoRALinear(weight.shape[1], weight.shape[0], r=A.shape[0], lora_alpha=2.0 * A.shape[0])
    for name, tensor in {"weight": weight, "bias": bias, "lora_A": A, "lora_B": B}.items():
        del layer._parameters[name]
        setattr(layer, name, tensor)
    return layer(x)


@needs_library
@few
@given(
    st.data(),
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 4, 20]),
    st.booleans(),
    st.sampled_from(["none", "key", "query", "both"]),
    st.sampled_from([0.0, 0.3]),
)
def test_attention_of_any_strides_and_lengths_is_a_softmax_in_float64(
    data, lengths, heads, head_size, first_tokens, kinds, p
):
    packed, width = packed_batch(lengths), heads * head_size
    rows, queries = sum(lengths), len(lengths) if first_tokens else sum(lengths)
    inputs = [data.draw(views(n, width, seed=i)) for i, n in enumerate((queries, rows, rows))]
    table = [data.draw(views(1, 2 * packed.length - 1, width, seed=seed)) for seed in (3, 4)]
    tables = [table[0] if kinds in ("key", "both") else None, table[1] if kinds in ("query", "both") else None]
    grad = data.draw(views(queries, width, seed=9))
    exact = textbook_attention(packed, heads, 0.4, factors(queries * heads, packed.length, p), *tables)
    assert_exact(fused_attention(packed, heads, 0.4, p, *tables), exact, inputs, grad, 2e-5)


@needs_library
@few
@given(st.data(), st.lists(sizes, min_size=1, max_size=3), st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_of_any_strides_is_a_product_with_the_same_factors_forward_and_backward(data, shape, p):
    x, grad = data.draw(views(*shape)), data.draw(views(*shape, seed=1))
    factor = factors(x.numel() // shape[-1], shape[-1], p).view(shape)
    assert_exact(lambda x: seeded(kernels.dropout, x, p, True), lambda x: x * factor, [x], grad)


# Instances.


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("layout", ["slices of a fused tensor", "every second number", "one number, expanded"])
def test_a_checkpoint_whose_biases_are_views_gives_the_logits_that_transformers_gives(tmp_path, kind, layout):
    ours_class, theirs_class = CLASSIFIERS[kind]
    config = tiny_config() if kind == "roberta" else tiny_deberta_config()
    model = randomise_(theirs_class(config))
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("bias") and ".layer." in name:
            if layout == "slices of a fused tensor":
                state[name] = torch.stack([tensor, noise(len(tensor)), noise(len(tensor))], 1)[:, 0]
            elif layout == "every second number":
                state[name] = tensor.repeat_interleave(2)[::2]
            else:
                state[name] = tensor[:1].expand(len(tensor))
            assert not state[name].is_contiguous()
    torch.save(state, tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    batch = ragged_batch([9, 4, 6], pad=config.pad_token_id)
    with torch.no_grad():
        want = theirs_class.from_pretrained(tmp_path).eval()(**batch).logits
        assert_close(ours_class.from_pretrained(tmp_path).eval()(**batch).logits, want)


@pytest.mark.parametrize(
    "bias",
    [noise(128)[::2], noise(64, 3)[:, 1], noise(1).expand(64), noise(64).as_strided((64,), (0,), 3)],
    ids=["every second", "a column", "expanded", "one number of many"],
)  # fmt: skip
def test_a_bias_of_any_stride_is_added_as_it_reads(bias):
    layer = kernels.Linear(32, 64)
    layer.bias = nn.Parameter(bias)
    assert layer.bias.stride() == bias.stride()
    x = noise(5, 32)
    assert_close(layer(x).double(), F.linear(x.double(), layer.weight.double(), layer.bias.double()))
    updated = LoRALinear(32, 64, r=2, lora_alpha=2)
    updated.bias = nn.Parameter(bias)
    assert_close(updated(x).double(), F.linear(x.double(), updated.weight.double(), updated.bias.double()))


@pytest.mark.parametrize("f", [kernels.linear, kernels.product], ids=["linear", "product"])
@pytest.mark.parametrize("bias", [torch.ones(1), torch.ones(1, 4), torch.ones(())], ids=str)
def test_a_bias_that_torch_broadcasts_is_broadcast(f, bias):
    x, weight = noise(3, 5), noise(4, 5, seed=1)
    assert torch.equal(f(x, weight, bias), F.linear(x, weight, bias))


META = torch.ones(4, 5, device="meta")


@pytest.mark.parametrize("f", [kernels.linear, kernels.product], ids=["linear", "product"])
@pytest.mark.parametrize(
    ("weight", "bias", "expected_message"),
    [
        (noise(4, 6), None, "shapes"),
        (noise(4, 5).double(), None, "dtype"),
        (noise(4, 5).bfloat16(), None, "dtype"),
        (META, None, "weight: .*meta"),
        (noise(4, 5), torch.ones(4, device="meta"), "bias: .*meta"),
        (noise(4, 5), torch.ones(3), "size"),
        (noise(4, 5), torch.ones(9), "size"),
        (noise(4, 5), torch.ones(4).double(), "dtype"),
        (noise(4, 5), torch.ones(4).bfloat16(), "dtype"),
        (noise(4, 5), torch.ones(4, dtype=torch.int32), "dtype"),
    ],
    ids=str,
)
def test_a_weight_or_bias_of_another_size_dtype_or_device_is_an_error(f, weight, bias, expected_message):
    with pytest.raises((ValueError, RuntimeError), match=expected_message):
        f(noise(3, 5), weight, bias)


def test_a_layer_without_inputs_or_outputs_is_torchs():
    for size, out in ((0, 4), (4, 0)):
        x = noise(3, size).requires_grad_()
        y = kernels.linear(x, noise(out, size), noise(out, seed=2))
        assert torch.equal(y, F.linear(x, noise(out, size), noise(out, seed=2)))
        y.sum().backward()
        assert torch.equal(x.grad, torch.zeros(3, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [16, 10], ids=["compiled", "folded"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lora_A", (4, 15)), ("lora_A", (4, 1)), ("lora_A", (3, 16)), ("lora_A", (4, 32)), ("lora_A", (16, 4)),
        ("lora_B", (15, 4)), ("lora_B", (1, 4)), ("lora_B", (16, 5)), ("lora_B", (32, 4)), ("lora_B", (4, 16)),
        ("lora_A", (64,)), ("lora_B", (16, 4, 1)), ("lora_A", (0, 16)), ("weight", (1, 16)), ("weight", (16, 1)),
    ],
)  # fmt: skip
def test_matrices_of_another_shape_than_the_layers_are_an_error_that_names_them(dtype, size, name, shape):
    layer = LoRALinear(size, size, r=4, lora_alpha=8).to(dtype)
    shape = tuple(size if n == 16 else n for n in shape)
    setattr(layer, name, nn.Parameter(torch.ones(shape, dtype=dtype)))
    with pytest.raises((ValueError, RuntimeError), match="expected|shapes"):
        layer(noise(3, size).to(dtype))
    with pytest.raises((ValueError, RuntimeError), match="expected|shapes"):
        layer.merge()


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "weight", "bias"])
@pytest.mark.parametrize("kind", ["meta", "float64", "bfloat16"])
def test_matrices_of_another_dtype_or_device_are_an_error(name, kind):
    layer = LoRALinear(16, 16, r=4, lora_alpha=8)
    setattr(layer, name, nn.Parameter(getattr(layer, name).to(kind if kind == "meta" else getattr(torch, kind))))
    with pytest.raises((ValueError, RuntimeError), match="device|dtype|meta|type"):
        layer(noise(3, 16))


# Tensor subclasses, and tensors without data in memory.


class Int8(Tensor):
    """A weight as in quantisation libraries: int8 and a scale; F.linear is its only operation."""

    @staticmethod
    def __new__(cls, x: Tensor) -> "Int8":
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def __init__(self, x: Tensor) -> None:
        self.scale = x.abs().max() / 127
        self.bits = (x / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.bits * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of int8")


class Marked(Tensor):
    """A subclass that torch's operations return when it is an input, and compiled code would not."""


@pytest.mark.parametrize("layer", [kernels.Linear(48, 32), LoRALinear(48, 32, 4, 8)], ids=["linear", "update"])
def test_a_product_with_a_weight_of_a_tensor_subclass_is_left_to_torch(layer):
    """The update and all gradients equal the textbook's."""
    randomise_(layer)
    weight, x = Int8(layer.weight.detach()), noise(2, 5, 48).requires_grad_()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert type(layer.weight) is Int8
    trained = [x, *(p for name, p in layer.named_parameters() if name.startswith("lora_"))]
    exact = [p.detach().double().requires_grad_() for p in trained]
    plain, bias = (weight.bits * weight.scale).double(), layer.bias.detach().double()
    y = layer(x)
    want = textbook_lora(exact[0], plain, bias, *exact[1:]) if exact[1:] else F.linear(exact[0], plain, bias)
    assert_close(y.double(), want)
    grads = torch.autograd.grad(y.pow(2).sum(), trained)
    for got, gradient in zip(grads, torch.autograd.grad(want.pow(2).sum(), exact), strict=True):
        assert_close(got.double(), gradient)


@pytest.mark.parametrize("which", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_an_operation_with_any_input_of_a_tensor_subclass_is_left_to_torch(which):
    layer = randomise_(LoRALinear(48, 32, 4, 8))
    x = noise(5, 48)
    want = layer(x)
    if which == "x":
        x = x.as_subclass(Marked)
    else:
        setattr(layer, which, nn.Parameter(getattr(layer, which).detach().as_subclass(Marked)))
    y = layer(x)
    assert type(y) is Marked
    assert_close(y.as_subclass(Tensor), want)
    if which in ("x", "weight", "bias"):
        y = kernels.linear(x, layer.weight, layer.bias)
        assert type(y) is Marked
        assert_close(y.as_subclass(Tensor), F.linear(noise(5, 48), layer.weight, layer.bias).as_subclass(Tensor))
    if which == "x":
        assert type(kernels.dropout(x, 0.5, True)) is Marked


def test_a_distributed_layer_computes_what_it_does_on_one_device():
    layer, x = randomise_(LoRALinear(48, 32, 4, 8)), noise(2, 5, 48)
    want = layer(x)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()])))
        y = layer(distribute_tensor(x, mesh, [Replicate()]))
        y.sum().backward()
        assert_close(y.full_tensor(), want)
        assert layer.lora_A.grad.shape == (4, 48)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_fake_and_meta_models_give_outputs_of_the_right_shapes(kind, where):
    """Such tensors have no memory that a kernel could read."""
    config = (tiny_config if kind == "roberta" else tiny_deberta_config)(apply_lora=True, lora_r=4, lora_alpha=8)
    model, ids = CLASSIFIERS[kind][0](config).train(), torch.ones(3, 7, dtype=torch.long)
    if where == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            output = model(mode.from_tensor(ids), labels=mode.from_tensor(torch.zeros(3, dtype=torch.long)))
    else:
        output = model.to("meta")(ids.to("meta"), labels=torch.zeros(3, dtype=torch.long, device="meta"))
    assert output.logits.shape == (3, 3) and output.loss.shape == ()


@pytest.mark.parametrize("place", ["one layer", "all but one layer"])
@pytest.mark.parametrize("settings", [{}, {"lora_relative_query": True}, {"share_att_key": False}], ids=str)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_lora_model_with_layers_on_disk_has_the_logits_it_has_in_memory(kind, settings, place, tmp_path):
    settings = settings | {"apply_lora": True, "lora_r": 4, "lora_alpha": 8}
    config = (tiny_config if kind == "roberta" else tiny_deberta_config)(**settings)
    model = randomise_(CLASSIFIERS[kind][0](config)).eval()
    batch = ragged_batch([9, 4, 6], pad=config.pad_token_id)
    base = model.base_model_prefix
    places = {name: "cpu" if place == "one layer" else "disk" for name, _ in model.named_children() if name != base}
    places |= {f"{base}.embeddings": "cpu" if place == "one layer" else "disk"}
    for name, _ in model.base_model.encoder.named_children():
        places[f"{base}.encoder.{name}"] = "cpu" if place == "one layer" else "disk"
    del places[f"{base}.encoder.layer"]
    places |= {f"{base}.encoder.layer.0": "disk", f"{base}.encoder.layer.1": "cpu"}
    with torch.no_grad():
        want = model(**batch).logits
        dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
        assert model.get_parameter(f"{base}.encoder.layer.0.attention.output.dense.weight").is_meta
        for _ in range(2):
            assert torch.equal(model(**batch).logits, want)


def test_the_gradient_of_the_relative_table_is_dense_and_of_the_rows_in_use():
    model = randomise_(CLASSIFIERS["deberta-v2"][0](tiny_deberta_config(position_buckets=0, max_relative_positions=12)))
    model(**ragged_batch([5, 3], pad=0), labels=torch.tensor([0, 1])).loss.backward()
    grad = model.deberta.encoder.rel_embeddings.weight.grad
    assert grad.layout == torch.strided and grad.shape == (24, 32)
    assert grad.abs().sum(1).nonzero().flatten().tolist() == list(range(12 - 4, 12 + 5))


@pytest.mark.parametrize("settings", [{}, {"apply_lora": True, "lora_r": 4, "lora_alpha": 8}])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_quantize_dynamic_raises_an_error_with_a_remedy_and_does_not_change_the_model(kind, settings):
    config = (tiny_config if kind == "roberta" else tiny_deberta_config)(**settings)
    model = randomise_(CLASSIFIERS[kind][0](config)).eval()
    batch = ragged_batch([9, 4], pad=config.pad_token_id)
    want = model(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for what in ({nn.Linear}, None):
            with pytest.raises(RuntimeError, match="transformers' own class.*--to merged"):
                torch.ao.quantization.quantize_dynamic(model, what)
    assert torch.equal(model(**batch).logits, want)


# Attention.


@needs_library
@pytest.mark.parametrize(
    "wrong",
    [
        {"value": noise(7, 12)}, {"value": noise(7, 48)}, {"value": noise(6, 24)}, {"key": noise(7, 12)},
        {"key": noise(6, 24)}, {"key": noise(8, 24), "value": noise(8, 24)}, {"query": noise(5, 24)},
        {"query": noise(7, 12)}, {"query": noise(7, 24)[None]}, {"value": noise(7, 24).double()},
        {"key": noise(7, 24).bfloat16()}, {"value": torch.ones(7, 24, device="meta")}, {"heads": 5}, {"heads": 0},
        {"heads": -3}, {"relative_key": noise(1, 6, 24)}, {"relative_query": noise(1, 7, 12)},
        {"relative_key": noise(1, 7, 24).double()}, {"relative_query": noise(7, 24)},
        {"relative_key": noise(1, 7, 24), "relative_query": noise(2, 7, 24)},
        {"relative_key": torch.ones(1, 7, 24, device="meta")}, {"relative_key": noise(0, 7, 24)},
    ],
    ids=lambda wrong: ", ".join(f"{name} {getattr(x, 'shape', x)}" for name, x in wrong.items()),
)  # fmt: skip
def test_attention_on_tensors_that_do_not_belong_together_is_an_error(wrong):
    right = {"query": noise(7, 24), "key": noise(7, 24), "value": noise(7, 24), "heads": 3}
    with pytest.raises(ValueError, match="expected"):
        kernels.attention(packed=packed_batch([3, 4]), scale=0.5, p=0.1, **{**right, **wrong})


@needs_library
@pytest.mark.parametrize(
    "wrong",
    [
        ([0, 3, 8], [0, 3, 8], [0, 0], 5), ([0, 3, 6], [0, 3, 6], [0, 0], 4), ([0, 3, 7], [0, 3, 7], [0, 0], 3),
        ([0, 8, 7], [0, 8, 7], [0, 0], 8), ([0, 3, 3, 7], [0, 3, 3, 7], [0, 0, 0], 4),
        ([1, 3, 7], [1, 3, 7], [0, 0], 4),
        ([0, 3, 7], [0, 3, 7], [0, 1], 4), ([0, 3, 7], [0, 3, 7], [0, -1], 4), ([0, 3, 7], [0, 3, 7], [0], 4),
        ([0, 3, 7], [0, 7], [0, 0], 4), ([0, 4, 7], [0, 3, 7], [0, 0], 4),
    ],
    ids=str,
)  # fmt: skip
def test_sequences_that_are_not_the_rows_are_an_error(wrong):
    *places, longest = wrong
    packed = SimpleNamespace(
        key_mask=None, real=None, length=longest, starts=lambda *_: tuple(map(torch.tensor, places)), batch=2, groups=()
    )
    with pytest.raises(ValueError, match="expected|sequences"):
        kernels.attention(noise(7, 24), noise(7, 24), noise(7, 24), packed, 3, 0.5, 0.0)


@needs_library
def test_a_batch_of_other_lengths_than_its_rows_is_an_error():
    for groups, length in ((((2, 4),), 4), (((1, 3), (1, 4)), 3), (((1, 7), (1, 0)), 7)):
        packed = PackedBatch(2, length, None, torch.zeros(2, dtype=torch.long), None, groups)
        with pytest.raises(ValueError, match="expected|sequences"):
            kernels.attention(noise(7, 24), noise(7, 24), noise(7, 24), packed, 3, 0.5, 0.0)


@needs_library
def test_a_probability_below_0_is_no_dropout_of_the_kernels():
    inputs = noise(7, 24), noise(7, 24), noise(7, 24)
    assert kernels.attention(*inputs, packed_batch([3, 4]), 3, 0.5, -0.2) is None
    with pytest.raises(ValueError, match="probability"):
        kernels.dropout(inputs[0], -0.2, True)


@needs_library
@pytest.mark.parametrize("name", ["dropout", "attention", "update", "linear"])
def test_a_tensor_that_torch_negates_when_it_is_read_is_read_negated(name):
    packed = packed_batch([3, 4])
    f = {
        "dropout": lambda x: seeded(kernels.dropout, x, 0.5, True),
        "attention": lambda x: fused_attention(packed, 3, 0.5, 0.0)(x, x, x),
        "update": lambda x: lora_layer(x, noise(48, 48), None, noise(4, 48), noise(48, 4)),
        "linear": lambda x: kernels.linear(x, noise(24, 48), None),
    }[name]
    x = noise(7, 48)
    lazy = torch._neg_view(x)
    assert lazy.is_neg() and torch.equal(lazy, -x)
    assert torch.equal(f(lazy), f(-x))
    (want,) = torch.autograd.grad(f(x.requires_grad_()), x, -torch.ones_like(f(x)))
    (got,) = torch.autograd.grad(f(x), x, torch._neg_view(torch.ones_like(f(x))))
    assert torch.equal(got, want)


# A lack of memory.

WITHOUT_MEMORY = """
import os, resource, sys
import torch
from lora_nlu.ops import kernels
from lora_nlu.ops.packing import PackedBatch

def packed(rows):
    return PackedBatch(1, rows, None, torch.zeros(1, dtype=torch.long), None, ((1, rows),))

def attention(rows):
    x = torch.ones(rows, 1)
    return lambda: kernels.attention(x, x, x, packed(rows), 1, 1.0, 0.1)

def relative(longest):
    x, table = torch.ones(8, 1), torch.ones(1, 2 * longest - 1, 1)
    batch = PackedBatch(1, longest, None, torch.zeros(1, dtype=torch.long), None, ((1, 8),))
    return lambda: kernels.attention(x, x, x, batch, 1, 1.0, 0.0, table, table)

def backward(rows):
    x = torch.ones(rows, 1, requires_grad=True)
    y = kernels.attention(x, x, x, packed(rows), 1, 1.0, 0.1)
    return lambda: torch.autograd.grad(y, x, torch.ones_like(y))[0]

def update(rank):
    x, down, up = torch.ones(1, 64), torch.ones(1, 1).expand(64, rank), torch.ones(1, 1).expand(rank, 64)
    weight = torch.ones(64, 64)
    return lambda: kernels.product_with_update(x, weight, None, down, up, 1.0)[0]

def dropout(width):
    x = torch.ones(1, width)
    return lambda: kernels.dropout(x, 0.5, True)

torch.set_num_threads(int(sys.argv[1]))
for make, small, large, left in (
    (attention, 8, 2000, 4), (relative, 8, 30000, 4), (backward, 8, 2000, 4), (update, 8, 2**17, 8),
    (dropout, 8, 2**23, 40),
):
    make(small)()
    f = make(large)
    in_use = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + left * 2**20, resource.RLIM_INFINITY))
    try:
        y = f()
        print(make.__name__, "gave", y.flatten()[:3].tolist())
    except MemoryError as e:
        print(make.__name__, "MemoryError", e)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    y = f()
    print(make.__name__, "finite", bool(y.isfinite().all() and y.abs().max() > 0))
"""


@needs_library
@pytest.mark.parametrize("threads", ["1", "3"])
def test_without_memory_for_a_kernel_there_is_a_memory_error_and_no_number(threads, environment_with_fixed_malloc):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY, threads],
        env=environment_with_fixed_malloc, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    names = ["attention", "relative", "backward", "update", "dropout"]
    lines = done.stdout.splitlines()
    for name, tried, again in zip(names, lines[::2], lines[1::2], strict=True):
        assert tried.startswith(f"{name} MemoryError") and "not enough memory" in tried, lines
        assert again == f"{name} finite True"


@pytest.fixture
def environment_with_fixed_malloc() -> dict[str, str]:
    """malloc returns large blocks at once and requests them anew, so that a limit applies to each."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@needs_library
def test_sizes_whose_product_overflows_are_a_memory_error():
    rank = 2**40  # [48, 2^40] and [2^40, 48] without memory of their own
    down, up = torch.ones(1, 1).expand(48, rank), torch.ones(1, 1).expand(rank, 48)
    with pytest.raises((MemoryError, RuntimeError), match="memory|overflow"):
        kernels.product_with_update(noise(1, 48), noise(48, 48), None, down, up, 1.0)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("attention: not enough memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                     "tried to allocate 4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=str,
)  # fmt: skip
def test_a_program_without_memory_ends_with_advice_and_not_with_a_traceback(error, capsys):
    def main(argv: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        processes.run(main, ["run_glue.py"], {})
    printed = capsys.readouterr().err
    assert ended.value.code == 1
    assert "not enough memory" in printed and "--per_device_train_batch_size" in printed and "Traceback" not in printed


def test_torchs_own_failed_allocation_is_one_of_them(capsys):
    with pytest.raises(SystemExit) as ended:
        processes.run(lambda argv: torch.empty(2**60), ["run_glue.py"], {})
    assert ended.value.code == 1 and "not enough memory" in capsys.readouterr().err
