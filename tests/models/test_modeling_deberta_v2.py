"""Our DeBERTa-V2 against transformers' with the same weights, the reference implementation's goldens, and PEFT."""

import copy
import json
from functools import partial

import pytest
import torch
import transformers
from helpers import (
    DEBERTA_INPUTS,
    GOLDENS,
    assert_close,
    assert_same_deberta_gradients,
    golden,
    golden_inputs,
    golden_model,
    ragged_batch,
    randomise_,
    tiny_deberta_config,
    twins,
)
from helpers import inputs_of as any_inputs_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from lora_nlu.methods.linear import merge_lora_, unmerge_lora_
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.methods.marking import count_parameters, mark_only_lora_as_trainable
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification, DebertaV2Model, shifted, table_rows
from lora_nlu.ops.packing import PackedBatch

LENGTHS = [9, 4, 6, 4, 1]
inputs_of = partial(any_inputs_of, pad=0, embedding_size=20)
LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8}
# every part that an embedding or a classifier may have, beside the relative attention and convolution of the default
FULL = {
    "position_biased_input": True,
    "type_vocab_size": 2,
    "embedding_size": 20,
    "pooler_hidden_act": "tanh",
    "conv_groups": 2,
}
V3 = {"conv_kernel_size": 0}
# tiny_deberta_config is in the style of v2-xxlarge; what each row changes
SETTINGS = {
    "as v2-xxlarge": {},
    "as v2-xlarge": {"conv_kernel_size": 3, "attention_head_size": 8, "pooler_dropout": 0, "pooler_hidden_act": "gelu"},
    "as v3": V3,
    "all parts": FULL,
    "no relative attention": {"relative_attention": False},
    "no relative attention, no norm": {"relative_attention": False, "norm_rel_ebd": "none"},
    "no relative attention, no kinds": {"relative_attention": False, "pos_att_type": None},
    "no relative attention, own position keys": {"relative_attention": False, "share_att_key": False},
    "no buckets": {"position_buckets": -1},
    "buckets 0": {"position_buckets": 0},
    "buckets 2": {"position_buckets": 2},
    "buckets 7": {"position_buckets": 7},
    "buckets 32": {"position_buckets": 32},
    "max 20": {"max_relative_positions": 20},
    "max 0": {"max_relative_positions": 0},
    "max 6, less than the lengths": {"max_relative_positions": 6},
    "max 5, no buckets": {"max_relative_positions": 5, "position_buckets": -1},
    "max 1, no buckets": {"max_relative_positions": 1, "position_buckets": -1},
    "max 20, no buckets": {"max_relative_positions": 20, "position_buckets": -1},
    "c2p|p2c": {"pos_att_type": "c2p|p2c"},
    "P2C | C2P": {"pos_att_type": "P2C | C2P"},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": ["p2c"]},
    "kinds None": {"pos_att_type": None},
    "kinds []": {"pos_att_type": []},
    "own position keys": {"share_att_key": False},
    "own position keys, c2p": {"share_att_key": False, "pos_att_type": ["c2p"]},
    "own position keys, p2c": {"share_att_key": False, "pos_att_type": ["p2c"]},
    "own position keys, no buckets": {"share_att_key": False, "position_buckets": -1, "norm_rel_ebd": "none"},
    "no norm": {"norm_rel_ebd": "none"},
    "Layer_Norm | none": {"norm_rel_ebd": "Layer_Norm | none"},
    "kernel 1": {"conv_kernel_size": 1},
    "kernel 5": {"conv_kernel_size": 5},
    "kernel 21, wider than the sentences": {"conv_kernel_size": 21},
    "kernel 3 in 2 groups, tanh": {"conv_groups": 2, "conv_act": "tanh"},
    "absolute positions": {"position_biased_input": True},
    "absolute positions, no convolution": {"position_biased_input": True, "conv_kernel_size": 0},
    "2 token types": {"type_vocab_size": 2},
    "1 token type": {"type_vocab_size": 1},
    "embeddings of 20": {"embedding_size": 20},
    "embeddings of 48": {"embedding_size": 48},
    "pooler tanh": {"pooler_hidden_act": "tanh"},
    "pooler relu": {"pooler_hidden_act": "relu"},
    "act relu": {"hidden_act": "relu"},
    "act gelu_new, 2 heads, 3 layers, wide eps": {
        "hidden_act": "gelu_new",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "layer_norm_eps": 0.1,
    },
    "one layer": {"num_hidden_layers": 1},
    "one layer, no convolution": {"num_hidden_layers": 1, "conv_kernel_size": 0},
    "padding token 5": {"pad_token_id": 5},
}


# task: number of labels, problem_type, labels of a batch of n
TASKS = {
    "3 labels": (3, None, lambda n: torch.arange(n) % 3),
    "2 labels": (2, None, lambda n: torch.arange(n) % 2),
    "3 labels by name": (3, "single_label_classification", lambda n: torch.arange(n) % 3),
    "3 labels by name, in a column": (3, "single_label_classification", lambda n: (torch.arange(n) % 3)[:, None]),
    "class ids as floats": (3, None, lambda n: (torch.arange(n) % 3).float()),
    "negative ids": (3, None, lambda n: torch.tensor([2, -1, 0, -100, 1])[:n]),
    "-100 by name": (3, "single_label_classification", lambda n: torch.tensor([2, -100, 0, -100, 1])[:n]),
    "regression": (1, None, lambda n: torch.linspace(-1, 2, n)),
    "regression, labels in a column": (1, None, lambda n: torch.linspace(-1, 2, n)[:, None]),
    "regression by name": (1, "regression", lambda n: torch.linspace(-1, 2, n)),
    "regression by name, labels in a column": (1, "regression", lambda n: torch.linspace(-1, 2, n)[:, None]),
    "regression to 2 numbers": (2, "regression", lambda n: torch.linspace(-1, 2, 2 * n).view(n, 2)),
    "soft labels": (3, None, lambda n: torch.linspace(-1, 2, 3 * n).view(n, 3).softmax(-1)),
    "soft labels that do not add up to 1": (3, None, lambda n: torch.linspace(0, 2, 3 * n).view(n, 3)),
    "one-hot labels": (3, None, lambda n: F.one_hot(torch.arange(n) % 3)),
    "multi-label by name": (3, "multi_label_classification", lambda n: (torch.arange(3 * n) % 2).view(n, 3).float()),
}


def rows_of(inputs: dict[str, Tensor]) -> int:
    return next(iter(inputs.values())).shape[0]


def comparable(inputs: dict[str, Tensor]) -> Tensor:
    """[B, S] bool, where we compute what transformers does: wherever the mask is 1, and everywhere in the fallback."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(next(iter(inputs.values())).shape[:2], dtype=torch.bool)
    left_aligned = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)
    packs = torch.equal(mask == 1, left_aligned) and bool((mask[:, 0] == 1).all())
    return mask == 1 if packs else torch.ones_like(mask, dtype=torch.bool)


def assert_same_training_step(
    ours, theirs, inputs: dict[str, Tensor], labels: Tensor | None = None, one_token: bool = False
) -> None:
    """The same logits, loss and gradients."""
    labels = torch.arange(rows_of(inputs)) % 3 if labels is None else labels
    got, want = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert got.logits.shape == (rows_of(inputs), ours.num_labels)
    # for one label transformers' class gives [B] where it computes a loss, [B, 1] elsewhere
    assert_close(got.logits, want.logits.view(got.logits.shape), what="logits")
    assert_close(got.loss, want.loss, what="loss")
    got.loss.backward()
    want.loss.backward()
    assert_same_deberta_gradients(ours, theirs, one_token)


def assert_same_outputs(config, inputs: dict[str, Tensor]) -> None:
    """The encoders' hidden states and attentions are equal wherever we compute what transformers does."""
    theirs = randomise_(transformers.DebertaV2Model(copy.deepcopy(config))).eval()
    ours = DebertaV2Model(config).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        want = theirs(**inputs, output_hidden_states=True, output_attentions=True)
        got = ours(**inputs, output_hidden_states=True, output_attentions=True)
        bare = ours(**inputs)
    real, layers = comparable(inputs), config.num_hidden_layers
    assert len(got.hidden_states) == len(want.hidden_states) == layers + 1
    assert len(got.attentions) == len(want.attentions) == layers
    for i, (a, b) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        assert_close(a[real], b[real], what=f"hidden state {i}")
    for i, (a, b) in enumerate(zip(got.attentions, want.attentions, strict=True)):
        assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], what=f"attention {i}")  # [tokens, A, S]
    for output in (got, bare):
        assert_close(output.last_hidden_state[real], want.last_hidden_state[real], what="last hidden state")
    assert bare.hidden_states is None and bare.attentions is None


# Against transformers: settings.


@pytest.mark.parametrize("kind", ["right padding", "left and right padding"])
@pytest.mark.parametrize("name", SETTINGS)
def test_with_every_setting_logits_loss_and_gradients_are_transformers_own(name, kind):
    ours, theirs = twins(tiny_deberta_config(**SETTINGS[name]))
    inputs = inputs_of(kind)
    assert_same_training_step(ours, theirs, inputs)
    with torch.no_grad():
        assert_close(ours.eval()(**inputs).logits, theirs.eval()(**inputs).logits, what="logits in eval mode")


@pytest.mark.parametrize("kind", ["right padding", "left and right padding"])
@pytest.mark.parametrize("name", SETTINGS)
def test_with_every_setting_hidden_states_and_attentions_are_transformers_own(name, kind):
    assert_same_outputs(tiny_deberta_config(**SETTINGS[name]), inputs_of(kind))


@pytest.mark.parametrize(
    "setting",
    [
        "position_buckets",
        "norm_rel_ebd",
        "share_att_key",
        "pos_att_type",
        "relative_attention",
        "conv_kernel_size",
        "position_biased_input",
    ],
)
def test_each_setting_changes_the_logits_so_that_the_comparisons_above_would_show_it(setting):
    config = tiny_deberta_config()
    plain = {
        "position_buckets": 6,
        "norm_rel_ebd": "none",
        "share_att_key": False,
        "pos_att_type": ["c2p"],
        "relative_attention": False,
        "conv_kernel_size": 0,
        "position_biased_input": True,
    }
    inputs = inputs_of("right padding")
    first = randomise_(DebertaV2ForSequenceClassification(config)).eval()
    other = DebertaV2ForSequenceClassification(tiny_deberta_config(**{setting: plain[setting]})).eval()
    randomise_(other)
    weights = {name: tensor for name, tensor in first.state_dict().items() if name in other.state_dict()}
    if setting == "position_buckets":
        weights.pop("deberta.encoder.rel_embeddings.weight")
    other.load_state_dict(weights, strict=False)
    assert (first(**inputs).logits - other(**inputs).logits).abs().max() > 0.01


def test_settings_that_a_config_leaves_out_have_transformers_defaults():
    config = tiny_deberta_config()
    for name in ("position_buckets", "norm_rel_ebd", "share_att_key", "conv_act"):
        delattr(config, name)
    ours, theirs = twins(config)
    assert_same_training_step(ours, theirs, inputs_of("right padding"))
    del config.conv_kernel_size
    ours, theirs = twins(config)
    assert ours.deberta.encoder.conv is None
    assert_same_training_step(ours, theirs, inputs_of("right padding"))
    ours, theirs = twins(
        transformers.DebertaV2Config(
            vocab_size=50,
            hidden_size=32,
            num_attention_heads=4,
            num_labels=3,
            num_hidden_layers=2,
            intermediate_size=48,
            max_position_embeddings=40,
        )
    )
    inputs = inputs_of("right padding")
    assert_close(ours.eval()(**inputs).logits, theirs.eval()(**inputs).logits)


# Against transformers: inputs.


@pytest.mark.parametrize("settings", [FULL, {**FULL, **V3, "share_att_key": False}], ids=["convolved", "not convolved"])
@pytest.mark.parametrize("kind", DEBERTA_INPUTS)
def test_logits_loss_and_every_gradient_are_transformers_own(kind, settings):
    ours, theirs = twins(tiny_deberta_config(**settings))
    inputs = inputs_of(kind)
    assert_same_training_step(ours, theirs, inputs, one_token=kind == "one token")
    with torch.no_grad():
        assert_close(ours.eval()(**inputs).logits, theirs.eval()(**inputs).logits, what="logits in eval mode")


@pytest.mark.parametrize("settings", [FULL, {**FULL, **V3, "share_att_key": False}], ids=["convolved", "not convolved"])
@pytest.mark.parametrize("kind", DEBERTA_INPUTS)
def test_the_encoder_returns_transformers_hidden_states_and_attentions(kind, settings):
    assert_same_outputs(tiny_deberta_config(**settings), inputs_of(kind))


@pytest.mark.parametrize("kind", ["position_ids", "token types"])
def test_positions_and_types_without_a_table_are_ignored_as_transformers_does(kind):
    ours, theirs = twins(tiny_deberta_config())
    assert_same_training_step(ours, theirs, inputs_of(kind))
    assert_close(ours(**inputs_of(kind)).logits, ours(**inputs_of("right padding")).logits, 1e-6)


def test_the_padding_tokens_own_row_gets_no_gradient_as_in_transformers():
    ours, theirs = twins(tiny_deberta_config(pad_token_id=5))
    inputs = {"input_ids": torch.tensor([[7, 5, 0, 9], [5, 8, 0, 5]])}
    assert_same_training_step(ours, theirs, inputs)
    gradient = ours.deberta.embeddings.word_embeddings.weight.grad
    assert torch.count_nonzero(gradient[5]) == 0 and torch.count_nonzero(gradient[0]) > 0


# Lengths and distances.


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    "settings",
    [
        {"position_buckets": 8, "max_relative_positions": -1},
        {"position_buckets": 8, "max_relative_positions": 20},
        {"position_buckets": 32, "max_relative_positions": 64},
        {"position_buckets": -1, "max_relative_positions": -1},
        {"position_buckets": -1, "max_relative_positions": 20},
        {"position_buckets": -1, "max_relative_positions": 20, "share_att_key": False},
    ],
    ids=str,
)
def test_lengths_beyond_the_buckets_and_all_maxima_give_transformers_logits_loss_and_gradients(settings, padding):
    ours, theirs = twins(tiny_deberta_config(**settings))  # max_position_embeddings is 40
    inputs = ragged_batch([150, 1, 39, 40, 41, 90, 20, 21], pad=0)
    if padding == "left":
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    assert_same_training_step(ours, theirs, inputs)


def bucket_settings() -> list[tuple[str, int, int, int]]:
    """(name, length, buckets, max) of each golden with as many keys as queries."""
    names = [name.removeprefix("vec.") for name in golden("log_buckets")[0] if name.startswith("vec.")]
    parts = [(name, *(int(part[1:]) for part in name.split("_"))) for name in names]
    return [(name, queries, buckets, reach) for name, queries, keys, buckets, reach in parts if queries == keys]


@pytest.mark.parametrize(("name", "length", "buckets", "reach"), bucket_settings())
def test_the_row_of_every_distance_is_the_references_bucket(name, length, buckets, reach):
    bucket = golden("log_buckets")[0][f"vec.{name}"]  # of each distance from -(length - 1) to length - 1
    span = buckets if buckets > 0 else reach
    assert list(table_rows(length, buckets, reach)) == (bucket + span).clamp(0, 2 * span - 1).tolist()


def test_the_goldens_cover_linear_and_logarithmic_distances_with_and_beyond_the_maximum():
    assert len(bucket_settings()) == 13
    assert any(buckets < 0 for *_, buckets, _ in bucket_settings())
    assert any(0 < buckets and length <= buckets // 2 for _, length, buckets, _ in bucket_settings())
    assert any(0 < buckets and length > reach for _, length, buckets, reach in bucket_settings())


@pytest.mark.parametrize(
    ("length", "buckets", "reach"),
    [(600, 256, 512), (200, 8, 40), (60, 2, 5), (60, 3, 5), (100, 7, 20), (300, 32, 64), (90, 40, 30), (50, -1, 20)],
)
def test_the_row_of_every_distance_is_the_one_transformers_reads(length, buckets, reach):
    places = torch.zeros(length, 1)
    position = build_relative_position(places, places, bucket_size=buckets, max_position=reach)[0]  # [L, L]
    span = buckets if buckets > 0 else reach
    want = (position + span).clamp(0, 2 * span - 1)
    rows = torch.tensor(table_rows(length, buckets, reach))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    assert torch.equal(rows[distance + length - 1], want)


@pytest.mark.parametrize(
    ("buckets", "reach", "distance", "row"), [(18, 17, 12, 31), (18, 26, 15, 32), (20, 81, 20, 34), (128, 126, 80, 214)]
)
def test_where_rounding_decides_a_bucket_it_is_that_of_the_references_float64(buckets, reach, distance, row):
    # Distances exactly on a step of the logarithm. The rows here are those of the reference's formula in numpy;
    # transformers' fp32 falls one lower or higher. No published model has such a distance.
    assert table_rows(distance + 1, buckets, reach)[-1] == row


def test_rows_never_fall_with_distance_and_shorter_lengths_read_the_middle_of_longer_ones():
    for buckets, reach in [(8, 40), (-1, 20), (256, 512), (7, 20)]:
        longest = table_rows(300, buckets, reach)
        assert list(longest) == sorted(longest)
        for length in (1, 2, 17, 299):
            assert table_rows(length, buckets, reach) == longest[300 - length : 299 + length]


@pytest.mark.parametrize(("length", "buckets", "rows"), [(1, 8, 1), (4, 8, 7), (5, 8, 9), (9, 8, 11), (200, 8, 16)])
def test_only_rows_of_distances_that_occur_are_in_use_each_once(length, buckets, rows):
    encoder = DebertaV2Model(tiny_deberta_config(position_buckets=buckets)).encoder
    packed = PackedBatch.from_mask(None, 2, length, torch.device("cpu"))
    table, distances = encoder.train().relative_table(packed, views=2)
    assert table.shape == (2, rows, 32) and distances.shape == (2 * length - 1,)
    assert distances.unique().tolist() == list(range(rows))
    assert encoder.eval().relative_table(packed, views=2)[0].shape == (1, rows, 32)  # no dropout: one for all views


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_shifted_is_an_index_gather_forward_and_backward(length):
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(2, 3, length, 2 * length - 1, generator=generator, requires_grad=True)
    other = products.detach().clone().requires_grad_()
    weights = torch.randn(2, 3, length, length, generator=generator)
    place = torch.arange(length)
    column = length - 1 - (place[:, None] - place)  # of distance i - j, columns by descending distance
    got, want = shifted(products), other.gather(-1, column.expand(2, 3, length, length))
    assert torch.equal(got, want)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert torch.equal(products.grad, other.grad)


def test_shifted_reads_a_slice_with_an_offset_of_its_own():
    table = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shifted(table[2:]), shifted(table[2:].clone()))


# Labels.


@pytest.mark.parametrize("kind", ["right padding", "left padding"])
@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_label_gives_transformers_loss_and_gradients(task, kind):
    num_labels, problem_type, labels_of = TASKS[task]
    ours, theirs = twins(tiny_deberta_config(num_labels=num_labels, problem_type=problem_type))
    assert_same_training_step(ours, theirs, inputs_of(kind), labels_of(len(LENGTHS)))


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_where_every_label_is_ignored_the_loss_is_0_and_so_are_the_gradients(problem_type):
    ours, theirs = twins(tiny_deberta_config(problem_type=problem_type))
    inputs, labels = inputs_of("right padding"), torch.full((5,), -100)
    loss = ours(**inputs, labels=labels).loss
    assert loss.item() == 0
    if problem_type is None:
        assert theirs(**inputs, labels=labels).loss.item() == 0
    loss.backward()
    assert all(p.grad is None or torch.count_nonzero(p.grad) == 0 for p in ours.parameters())


# Half precision and checkpointing.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["right padding", "holes"])
def test_every_dtype_goes_through_and_comes_out(dtype, kind):
    config = tiny_deberta_config(**LORA, **FULL)
    model = randomise_(DebertaV2ForSequenceClassification(config))
    exact = model(**inputs_of(kind)).logits
    output = model.to(dtype)(**inputs_of(kind), labels=torch.arange(5) % 3)
    assert output.logits.dtype == dtype
    assert output.loss.dtype == (dtype if dtype == torch.float64 else torch.float32)  # a scaler multiplies it
    assert_close(output.logits.float(), exact, 1e-5 if dtype == torch.float64 else 0.1)


# Against the reference implementation.


def test_the_relative_query_bypasses_lora_as_in_the_reference_unless_the_config_asks_for_it():
    tensors, _ = golden("deberta_cls3")
    inputs = golden_inputs(tensors)
    reference, merged = tensors["out.logits_eval"], tensors["alt.logits_merged_into_weight"]
    by_default = golden_model("deberta_cls3").eval()(**inputs).logits
    assert_close(by_default, reference, 2e-5, scale=1)
    assert (by_default - merged).abs().max() > 0.1
    updated = golden_model("deberta_cls3", lora_relative_query=True).eval()(**inputs).logits
    assert_close(updated, merged, 2e-5, scale=1)
    assert (updated - reference).abs().max() > 0.1


# LoRA in the complete model, against PEFT.


def lora_model(**settings) -> DebertaV2ForSequenceClassification:
    """Our classifier with LoRA, every parameter random, adapters and head ready to train."""
    model = randomise_(DebertaV2ForSequenceClassification(tiny_deberta_config(**LORA, **settings)))
    mark_only_lora_as_trainable(model)
    return model.train()


def peft_twin(ours: DebertaV2ForSequenceClassification, **settings) -> tuple[nn.Module, dict[str, tuple]]:
    """PEFT's model with the weights of ours, and each of our parameters' names with it and PEFT's."""
    lora = LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query_proj", "value_proj"],
        modules_to_save=["classifier", "pooler"],
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        bias="none",
    )
    theirs = get_peft_model(
        transformers.DebertaV2ForSequenceClassification(tiny_deberta_config(**settings)), lora
    ).train()

    def peft_name(name: str) -> str:
        if "lora_" in name:
            return f"base_model.model.{name}.default.weight"
        module, _, rest = name.partition(".")
        if module in ("classifier", "pooler"):
            return f"base_model.model.{module}.modules_to_save.default.{rest}"
        for layer in ("query_proj", "value_proj"):
            name = name.replace(f".{layer}.", f".{layer}.base_layer.")
        return f"base_model.model.{name}"

    pairs = {name: (p, theirs.get_parameter(peft_name(name))) for name, p in ours.named_parameters()}
    with torch.no_grad():
        for mine, peft in pairs.values():
            peft.copy_(mine)
    return theirs, pairs


def assert_same_as_peft(ours, theirs, pairs, inputs: dict[str, Tensor]) -> None:
    trains = {name for name, (mine, _) in pairs.items() if mine.requires_grad}
    assert trains == {name for name, (_, peft) in pairs.items() if peft.requires_grad}
    assert sum("lora_" in name for name in trains) == 8 and len(trains) == 12
    labels = torch.arange(5) % 3
    got, want = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert_close(got.logits, want.logits)
    assert_close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    for name in trains:
        assert_close(pairs[name][0].grad, pairs[name][1].grad, what=name)


@pytest.mark.parametrize("kind", ["right padding", "left padding", "holes"])
def test_with_lora_in_the_relative_query_the_complete_model_has_pefts_logits_and_gradients(kind):
    ours = lora_model(lora_relative_query=True)
    assert_same_as_peft(ours, *peft_twin(ours), inputs_of(kind))


@pytest.mark.parametrize(
    "settings",
    [
        {"share_att_key": False},
        {"pos_att_type": ["c2p"]},
        {"relative_attention": False},
        {"pos_att_type": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("relative_query", [False, True])
def test_where_no_relative_query_goes_through_query_proj_peft_agrees_with_either_setting(settings, relative_query):
    ours = lora_model(lora_relative_query=relative_query, **settings)
    assert_same_as_peft(ours, *peft_twin(ours, **settings), inputs_of("right padding"))


@pytest.mark.parametrize("kinds", [["p2c", "c2p"], ["p2c"]])
def test_by_default_a_shared_relative_query_is_frozen_and_pefts_logits_are_others(kinds):
    ours = lora_model(pos_att_type=kinds)
    theirs, _ = peft_twin(ours, pos_att_type=kinds)
    inputs = inputs_of("right padding")
    assert (ours(**inputs).logits - theirs(**inputs).logits).abs().max() > 0.01


@pytest.mark.parametrize("way", ["none", "key", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # with the kernels and without
def test_each_way_of_the_relative_query_is_a_float64_model_whose_tables_have_projections_of_their_own(way, dtype):
    ours = lora_model(lora_relative_query=way, lora_target_modules=["query", "key", "value"]).to(dtype)
    assert ours.relative_query == way
    theirs = transformers.DebertaV2ForSequenceClassification(tiny_deberta_config(share_att_key=False)).double().train()
    leaves = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in ours.named_parameters()}
    weights = {name: x for name, x in leaves.items() if "lora_" not in name}
    for name, layer in ours.named_modules():
        if isinstance(layer, LoRALinear):
            update = 8 / 4 * leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
            weights[f"{name}.weight"] = leaves[f"{name}.weight"] + update
    for layer in range(2):
        start = f"deberta.encoder.layer.{layer}.attention.self."
        for table, source, has_update in (("query", "query_proj", way == "both"), ("key", "key_proj", way != "none")):
            values = weights if has_update else leaves
            weights[f"{start}pos_{table}_proj.weight"] = values[f"{start}{source}.weight"]
            weights[f"{start}pos_{table}_proj.bias"] = leaves[f"{start}{source}.bias"]
    inputs, labels = inputs_of("right padding"), torch.arange(5) % 3
    got = ours(**inputs, labels=labels)
    want = torch.func.functional_call(theirs, weights, (), {**inputs, "labels": labels})
    tolerance = 1e-5 if dtype is torch.float32 else 1e-6  # transformers scales by a root in fp32
    assert_close(got.logits.double(), want.logits, tolerance)
    got.loss.backward()
    want.loss.backward()
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert sum("lora_" in name for name in trained) == 12
    for name, gradient in trained.items():
        assert_close(gradient.double(), leaves[name].grad, tolerance, what=name)


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({}, True),
        ({"lora_relative_query": False}, True),
        ({"lora_relative_query": True}, False),
        ({"pos_att_type": ["c2p"]}, None),
        ({"share_att_key": False, "lora_relative_query": True}, None),
        ({"relative_attention": False}, None),
    ],
)
def test_frozen_relative_query_is_true_or_false_or_none_where_it_makes_no_difference(settings, frozen):
    config = tiny_deberta_config(**LORA, **settings)
    assert DebertaV2ForSequenceClassification(config).frozen_relative_query is frozen
    assert DebertaV2Model(config).frozen_relative_query is frozen


@pytest.mark.parametrize("relative_query", [False, True])
def test_with_lora_B_zero_a_lora_model_is_transformers_own_also_in_the_base_weights_gradients(relative_query):
    ours = lora_model(lora_relative_query=relative_query).requires_grad_(True)
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.zero_()
    theirs = transformers.DebertaV2ForSequenceClassification(tiny_deberta_config()).train()
    theirs.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if "lora_" not in name})
    inputs, labels = inputs_of("right padding"), torch.arange(5) % 3
    got, want = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert_close(got.logits, want.logits)
    got.loss.backward()
    want.loss.backward()
    for name, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad, 2e-5, what=name)


# Merging.


@pytest.mark.parametrize("kind", ["right padding", "left padding"])
@pytest.mark.parametrize("relative_query", [False, True])
def test_merging_leaves_the_logits_and_unmerging_gives_them_back(relative_query, kind):
    model, inputs = lora_model(lora_relative_query=relative_query).eval(), inputs_of(kind)
    with torch.no_grad():
        before = model(**inputs).logits
        merge_lora_(model)
        merged = model(**inputs).logits
        merge_lora_(model)
        twice = model(**inputs).logits
        unmerge_lora_(model)
        after = model(**inputs).logits
    assert_close(merged, before)
    assert torch.equal(twice, merged)
    assert_close(after, before)


def test_a_merged_model_whose_relative_query_is_frozen_cannot_be_saved(tmp_path):
    model = lora_model().eval()
    names = set(model.state_dict())
    merge_lora_(model)
    with pytest.raises(RuntimeError, match=r"relative query is frozen can't be saved.*unmerge_lora_\(model\)"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="relative query is frozen can't be saved"):
        model.save_pretrained(tmp_path)
    unmerge_lora_(model)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("settings", [{"lora_relative_query": True}, {"share_att_key": False}], ids=str)
def test_a_merged_model_without_a_frozen_relative_query_is_a_plain_model_for_transformers(settings):
    model = lora_model(**settings).eval()
    inputs = inputs_of("right padding")
    before = model(**inputs).logits
    merge_lora_(model)
    plain = transformers.DebertaV2ForSequenceClassification(tiny_deberta_config(**settings)).eval()
    plain.load_state_dict(model.state_dict())
    assert_close(plain(**inputs).logits, before)


# Dropout and determinism.


def only_dropout_(model: nn.Module, name: str, rate: float) -> nn.Module:
    """Dropout in the modules of this name alone."""
    found = 0
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            chosen = module_name.rsplit(".", 1)[-1] == name
            module.p = rate if chosen else 0.0
            found += chosen
    assert found, f"no {name}"
    return model


@pytest.mark.parametrize("asks_for_attentions", [False, True])
@pytest.mark.parametrize("place", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_the_loss_under_dropout_is_distributed_as_transformers(place, asks_for_attentions):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "cls_dropout": 0.0, place: 0.1}
    ours, theirs = twins(tiny_deberta_config(**rates))
    calls, copies = 200, 12  # the copies in one batch share the relative table's dropout: calls are what is independent
    batch = {name: t.repeat(copies, 1) for name, t in ragged_batch([8, 3, 5], pad=0).items()}
    labels = torch.tensor([0, 1, 2]).repeat(copies)

    @torch.no_grad()
    def losses(model, seed: int) -> Tensor:
        torch.manual_seed(seed)
        logits = [model(**batch, output_attentions=asks_for_attentions and model is ours).logits for _ in range(calls)]
        return torch.stack([F.cross_entropy(x, labels, reduction="none").view(copies, 3) for x in logits])

    got, want = losses(ours, 1), losses(theirs, 2)  # [calls, copies, 3]
    means = got.mean(1), want.mean(1)  # [calls, 3]
    standard_error = ((means[0].var(0) + means[1].var(0)) / calls).sqrt()  # [3], of the difference of means
    assert (standard_error > 0).all()
    assert ((means[0].mean(0) - means[1].mean(0)).abs() < 4 * standard_error).all()
    # spreads too: a missing dropout would move them by far more than 15%, their own standard error is 3-4%
    spread, want_spread = (x.flatten(0, 1).std(0) for x in (got, want))
    assert ((spread / want_spread - 1).abs() < 0.15).all()
    # the calls' means spread more than the copies' draws explain by what a batch shares: 7% standard error
    assert ((means[0].std(0) / means[1].std(0) - 1).abs() < 0.3).all()


@pytest.mark.parametrize("kind", ["right padding", "left padding", "no mask"])
@pytest.mark.parametrize("place", ["pooler_dropout", "cls_dropout"])
def test_the_heads_dropout_is_transformers_own_draw(place, kind):
    # [B, H] in both, so one seed gives one draw
    rates = {"hidden_dropout_prob": 0.0, "pooler_dropout": 0.0, "cls_dropout": 0.0, place: 0.4}
    ours, theirs = twins(tiny_deberta_config(**rates))
    inputs, logits = inputs_of(kind), []
    for model in (ours, theirs):
        torch.manual_seed(0)
        logits.append(model(**inputs).logits)
    assert_close(*logits)
    assert (logits[0] - ours.eval()(**inputs).logits).abs().max() > 0.01


@pytest.mark.usefixtures("torch_draws")
@pytest.mark.parametrize("settings", [FULL, V3], ids=["all parts", "v3"])
def test_one_sentence_under_dropout_everywhere_is_transformers_own_draw(settings):
    # Of one sentence without padding, and with every row of the table in use (4 buckets reach 8 rows in 6 tokens),
    # all that dropout meets has transformers' size and order: one seed gives one draw, if every dropout has its place.
    rates = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"], 0.2)
    config = tiny_deberta_config(**settings, **rates, position_buckets=4, max_relative_positions=5)
    assert sorted(set(table_rows(12, 4, 5))) == list(range(8))
    ours, theirs = twins(config)
    ids = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1])
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        output = model(input_ids=ids, labels=labels, output_hidden_states=True, output_attentions=True)
        output.loss.backward()
        outputs.append(output)
    got, want = outputs
    assert_close(got.logits, want.logits)
    for a, b in zip(got.hidden_states + got.attentions, want.hidden_states + want.attentions, strict=True):
        assert_close(a, b)
    assert_same_deberta_gradients(ours, theirs)
    assert (got.logits - ours.eval()(input_ids=ids).logits).abs().max() > 0.01


@pytest.mark.usefixtures("torch_draws")
@pytest.mark.parametrize("kind", ["right padding", "left padding"])
def test_the_relative_tables_dropout_is_one_draw_a_layer_for_a_whole_batch_as_in_transformers(kind):
    config = tiny_deberta_config(position_buckets=4, max_relative_positions=5)  # every row in use, as above
    ours, theirs = (only_dropout_(model, "pos_dropout", 0.4) for model in twins(config))
    inputs, labels = inputs_of(kind), torch.arange(5) % 3
    for seed in range(3):
        outputs = []
        for model in (ours, theirs):
            model.zero_grad()
            torch.manual_seed(seed)
            outputs.append(model(**inputs, labels=labels))
            outputs[-1].loss.backward()
        assert_close(outputs[0].logits, outputs[1].logits)
        assert_same_deberta_gradients(ours, theirs)
    assert (outputs[0].logits - ours.eval()(**inputs).logits).abs().max() > 0.01


@pytest.mark.parametrize("first_token_only", [False, True])
@pytest.mark.parametrize("kind", ["right padding", "left padding", "holes"])
def test_two_views_of_a_batch_are_each_what_the_batch_alone_is(kind, first_token_only):
    model = randomise_(DebertaV2ForSequenceClassification(tiny_deberta_config())).train()
    inputs = inputs_of(kind)
    doubled = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    more = {"first_token_only": first_token_only}
    want = model.base_model(**inputs, **more).last_hidden_state
    first, second = model.base_model(**doubled, **more, views=2).last_hidden_state.chunk(2)
    assert_close(first, want, 1e-6)
    assert_close(second, want, 1e-6)
    logits = [model.classifier(model.dropout(model.pooler(tokens))) for tokens in (first, second)]
    for half in logits:
        assert_close(half, model(**inputs).logits, 1e-6)


@pytest.mark.parametrize("views", [2, 3])
def test_two_views_of_other_sentences_are_each_what_they_are_alone_with_the_same_gradients(views):
    model = randomise_(DebertaV2Model(tiny_deberta_config())).train()
    batch = ragged_batch(LENGTHS * views, pad=0)  # as many of each length in every view
    want = model(**batch).last_hidden_state
    want.pow(3).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    got = model(**batch, views=views).last_hidden_state
    got.pow(3).sum().backward()
    assert_close(got, want, 1e-6)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 2e-5, what=name)


@pytest.mark.parametrize("kind", ["right padding", "left padding"])
@pytest.mark.parametrize("first_token_only", [False, True])
def test_views_have_a_dropout_of_the_relative_table_each_and_rows_of_one_view_share_it(first_token_only, kind):
    model = only_dropout_(randomise_(DebertaV2Model(tiny_deberta_config())).train(), "pos_dropout", 0.4)
    inputs = {name: tensor.repeat(4, 1) for name, tensor in inputs_of(kind).items()}

    def quarters(views: int) -> tuple[Tensor, ...]:
        return model(**inputs, first_token_only=first_token_only, views=views).last_hidden_state.chunk(4)

    a, b, c, d = quarters(1)
    for other in (b, c, d):
        assert_close(other, a, 1e-6)
    a, b, c, d = quarters(2)
    assert_close(b, a, 1e-6)
    assert_close(d, c, 1e-6)
    assert (c - a).abs().max() > 0.01
    different = quarters(4)
    assert all((x - y).abs().max() > 0.01 for i, x in enumerate(different) for y in different[:i])
    model.eval()
    a, b, c, d = quarters(2)
    for other in (b, c, d):
        assert_close(other, a, 1e-6)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [({}, 0.1), ({"cls_dropout": None}, 0.1), ({"cls_dropout": 0.3}, 0.3), ({"cls_dropout": 0}, 0)],
)
def test_the_heads_dropout_is_cls_dropout_even_0_and_hidden_dropout_by_default(settings, rate):
    model = DebertaV2ForSequenceClassification(
        tiny_deberta_config(hidden_dropout_prob=0.1, pooler_dropout=0.2, **settings)
    )
    assert (model.dropout.p, model.pooler.dropout.p) == (rate, 0.2)
    assert model.deberta.embeddings.dropout.p == model.deberta.encoder.layer[0].attention.self.pos_dropout.p == 0.1


# Initialisation and checkpoints.


@pytest.mark.parametrize("name", SETTINGS)
def test_state_dict_keys_and_shapes_are_transformers_own_and_loras_beside_them(name):
    settings = SETTINGS[name]

    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in model.state_dict().items()}

    with torch.device("meta"):
        want = shapes(transformers.DebertaV2ForSequenceClassification(tiny_deberta_config(**settings)))
        plain = shapes(DebertaV2ForSequenceClassification(tiny_deberta_config(**settings)))
        lora = shapes(DebertaV2ForSequenceClassification(tiny_deberta_config(**settings, **LORA)))
        assert shapes(transformers.DebertaV2Model(tiny_deberta_config(**settings))) == shapes(
            DebertaV2Model(tiny_deberta_config(**settings))
        )
    assert plain == want
    matrices = {
        f"deberta.encoder.layer.{i}.attention.self.{layer}.lora_{matrix}": torch.Size(shape)
        for i in range(tiny_deberta_config(**settings).num_hidden_layers)
        for layer in ("query_proj", "value_proj")
        for matrix, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    assert lora == {**want, **matrices}


def test_a_new_model_is_initialised_as_transformers_does():
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(
        tiny_deberta_config(**{**FULL, "embedding_size": 48}, vocab_size=500, hidden_size=64, initializer_range=0.05)
    )
    drawn = 0
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.numel() >= 2000:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
            drawn += 1
    assert drawn == 2 * 6 + 4  # per layer; words, their projection, convolution, pooler
    assert torch.count_nonzero(model.deberta.embeddings.word_embeddings.weight[0]) == 0


def lora_matrices(model: nn.Module) -> tuple[Tensor, Tensor]:
    """All entries of A and of B, each flat."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    return tuple(torch.cat([getattr(layer, name).flatten() for layer in layers]) for name in ("lora_A", "lora_B"))


def test_new_lora_matrices_are_drawn_as_in_the_reference_A_normal_and_B_zero():
    fresh = json.loads((GOLDENS / "head_loading.json").read_text())["fresh_init"]["deberta"]
    torch.manual_seed(0)
    config = tiny_deberta_config(hidden_size=fresh["hidden"], initializer_range=0.02, lora_r=16, lora_alpha=48)
    config.apply_lora = True
    model = DebertaV2ForSequenceClassification(config)
    A, B = lora_matrices(model)
    assert A.numel() == 4 * 16 * 256
    assert A.std().item() == pytest.approx(fresh["A_std"], rel=0.02)  # 16,384 draws: 4 standard errors are 2.2%
    assert A.abs().max().item() > 3.3 * 0.02  # a normal's tail; a uniform draw of this deviation ends at 1.73
    assert A.abs().max().item() > fresh["kaiming_a_sqrt5_bound"]
    assert torch.count_nonzero(B) == fresh["B_absmax"] == 0
    assert model.deberta.encoder.layer[0].attention.self.query_proj.scaling == fresh["scaling"][0]


@pytest.mark.parametrize("written_by", ["DebertaV2Model", "DebertaV2ForMaskedLM", "DebertaV2ForMaskedLM, not legacy"])
def test_a_base_checkpoint_keeps_its_weights_and_lora_starts_anew(written_by, tmp_path):
    settings = {"initializer_range": 0.05, "legacy": "not legacy" not in written_by}
    writer = getattr(transformers, written_by.split(",")[0])(tiny_deberta_config(**settings))
    randomise_(writer).save_pretrained(tmp_path)
    base = writer if written_by == "DebertaV2Model" else writer.deberta
    config = transformers.DebertaV2Config.from_pretrained(tmp_path, num_labels=3)
    config.update(LORA)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, report = DebertaV2ForSequenceClassification.from_pretrained(
            tmp_path, config=config, output_loading_info=True
        )
        head = {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}
        assert set(report["missing_keys"]) == head and not report["unexpected_keys"]
        models.append(model)
    got = models[0].deberta.state_dict()
    assert {name for name in got if "lora_" not in name} == set(base.state_dict())
    for name, tensor in base.state_dict().items():
        assert torch.equal(got[name], tensor), name
    (A, B), (again, _), (other, _) = map(lora_matrices, models)
    assert A.std().item() == pytest.approx(0.05, rel=0.15)  # 512 draws: 4 standard errors are 12%
    assert torch.count_nonzero(B) == 0
    assert torch.equal(A, again) and not torch.equal(A, other)
    assert models[0].classifier.weight.std().item() == pytest.approx(0.05, rel=0.4)  # 96 draws


def test_a_saved_model_is_loaded_as_it_was(tmp_path):
    model = lora_model().eval()
    model.save_pretrained(tmp_path)
    loaded = DebertaV2ForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = inputs_of("right padding")
    with torch.no_grad():  # with gradients, what trains decides how it is computed, to rounding
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_v2_xxlarge_with_r_16_has_4718592_lora_parameters():
    config = transformers.DebertaV2Config(
        vocab_size=128100,
        hidden_size=1536,
        num_hidden_layers=48,
        num_attention_heads=24,
        attention_head_size=64,
        intermediate_size=6144,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        conv_kernel_size=3,
        conv_act="gelu",
        apply_lora=True,
        lora_r=16,
        lora_alpha=32,
    )
    with torch.device("meta"):
        model = DebertaV2ForSequenceClassification(config)
    mark_only_lora_as_trainable(model)
    counts = count_parameters(model)
    head = 1536 * 1536 + 1536 + 2 * 1536 + 2
    assert counts.encoder == 4_718_592
    assert counts.trainable == 4_718_592 + head
    per_layer = 4 * (1536 * 1536 + 1536) + 2 * 1536 * 6144 + 6144 + 1536 + 4 * 1536
    shared = 128100 * 1536 + 2 * 1536 + 512 * 1536 + 2 * 1536 + 3 * 1536 * 1536 + 1536 + 2 * 1536
    assert counts.total == 48 * per_layer + shared + counts.trainable


# What is refused.


@pytest.mark.parametrize("model_class", [DebertaV2Model, DebertaV2ForSequenceClassification])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
        ({"attention_head_size": 16}, "attention_head_size 16 is not hidden_size / num_attention_heads"),
        ({"pos_att_type": "p2c|p2p"}, "pos_att_type p2p: only c2p and p2c are supported"),
        ({"pos_att_type": ["c2p", "c2c", "p2p"]}, r"pos_att_type c2c\|p2p: only c2p and p2c"),
        ({"pos_att_type": "c2p|p2c|c2p"}, r"pos_att_type c2p\|p2c\|c2p names a kind twice"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd batch_norm: only layer_norm and none are supported"),
        ({"norm_rel_ebd": "layer_norm|rms"}, "norm_rel_ebd rms: only layer_norm and none"),
        ({"position_buckets": 1}, "position_buckets 1 does not fit max_relative_positions 40"),
        ({"position_buckets": 78}, "position_buckets 78 does not fit max_relative_positions 40"),
        ({"max_relative_positions": 5}, "position_buckets 8 does not fit max_relative_positions 5"),
        ({"conv_kernel_size": 2}, "conv_kernel_size 2 is even"),
        ({"pooler_hidden_size": 16}, "pooler_hidden_size 16 is not hidden_size 32"),
        ({"z_steps": 2}, "z_steps 2: the enhanced mask decoder is not supported"),
        ({"conv_kernel_size": 4, "z_steps": 3}, "conv_kernel_size 4 is even; z_steps 3"),
    ],
)
def test_a_config_this_model_does_not_support_is_refused_by_name(settings, message, model_class):
    with pytest.raises(ValueError, match=f"This DeBERTa-V2 does not support its config: {message}"):
        model_class(tiny_deberta_config(**settings))


@pytest.mark.parametrize(
    "settings", [{"position_buckets": 76}, {"position_buckets": 2}, {"max_relative_positions": 6}, {"z_steps": 1}]
)
def test_the_settings_next_to_the_refused_ones_are_transformers_own(settings):
    ours, theirs = twins(tiny_deberta_config(**settings))
    assert_same_training_step(ours, theirs, inputs_of("right padding"))


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("relative_query", [False, True])
@pytest.mark.parametrize("wrap", [Wrapped, checkpoint_wrapper, "peft"])
def test_an_updated_projection_inside_another_module_is_read_by_the_configs_settings(wrap, relative_query):
    settings = {"lora_target_modules": ["query", "key"], "lora_relative_query": relative_query}
    config = tiny_deberta_config(apply_lora=True, lora_r=4, lora_alpha=8, **settings)
    model = randomise_(DebertaV2ForSequenceClassification(config)).eval()
    inputs = {**ragged_batch([9, 7, 3], pad=0), "labels": torch.tensor([0, 1, 2])}
    want = model(**inputs)
    want.loss.backward()
    gradient = model.deberta.encoder.layer[0].attention.self.query_proj.lora_A.grad.clone()
    if wrap == "peft":  # its update starts at 0
        got = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["query_proj", "key_proj"])).eval()
        got = got.base_model.model
    else:
        got = model
        for layer in got.deberta.encoder.layer:
            attention = layer.attention.self
            attention.query_proj, attention.key_proj = wrap(attention.query_proj), wrap(attention.key_proj)
    assert got.frozen_relative_query == (not relative_query)
    got.zero_grad()
    output = got(**inputs)
    assert_close(output.logits, want.logits)
    if wrap != "peft":
        output.loss.backward()
        matrix = next(
            x for name, x in got.named_parameters() if "layer.0" in name and "query_proj" in name and "lora_A" in name
        )
        assert_close(matrix.grad, gradient)
