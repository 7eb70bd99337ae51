"""Our DeBERTa-V2 against transformers' with the same weights, the reference implementation's goldens, and PEFT."""

import copy
import json

import pytest
import torch
import transformers
from helpers import (
    GOLDENS,
    assert_close,
    golden,
    golden_inputs,
    golden_model,
    ragged_batch,
    randomise_,
    tiny_deberta_config,
    twins,
)
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


def inputs_of(kind: str, embedding_size: int = 20) -> dict[str, Tensor]:
    """One batch of each kind of input that the model takes."""
    batch = ragged_batch(LENGTHS, pad=0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shape = ids.shape
    generator = torch.Generator().manual_seed(1)
    if kind == "left padding":
        return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    if kind == "left and right padding":
        return {"input_ids": torch.cat([ids, ids.flip(1)]), "attention_mask": torch.cat([mask, mask.flip(1)])}
    if kind == "holes":
        full = torch.randint(3, 50, shape, generator=generator)
        holes = torch.rand(shape, generator=generator) < 0.4
        holes[:, 0] = False
        return {"input_ids": full, "attention_mask": (~holes).long()}
    if kind == "holes and a masked first position":
        full = torch.randint(3, 50, shape, generator=generator)
        holes = torch.rand(shape, generator=generator) < 0.4
        holes[:2, 0] = True
        holes[:, -1] = False
        return {"input_ids": full, "attention_mask": (~holes).long()}
    if kind == "a row with nothing in it":
        return {"input_ids": ids, "attention_mask": mask * (torch.arange(5) != 2)[:, None]}
    if kind == "no mask":
        return {"input_ids": torch.randint(3, 50, shape, generator=generator)}
    if kind == "no mask, padding tokens read as text":
        return {"input_ids": ids}
    if kind == "padding token inside the text":
        ids = torch.randint(3, 50, shape, generator=generator)
        ids[0, 2] = ids[0, 5] = ids[2, 0] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "inputs_embeds":
        return {"inputs_embeds": torch.randn(*shape, embedding_size, generator=generator), "attention_mask": mask}
    if kind == "inputs_embeds without mask":
        return {"inputs_embeds": torch.randn(*shape, embedding_size, generator=generator)}
    if kind == "position_ids":
        return {**batch, "position_ids": torch.randint(0, 40, shape, generator=generator)}
    if kind == "one row of position_ids":
        return {**batch, "position_ids": torch.arange(20, 20 + shape[1])[None]}
    if kind == "token types":
        return {**batch, "token_type_ids": torch.randint(0, 2, shape, generator=generator)}
    if kind == "one row of token types":
        return {**batch, "token_type_ids": torch.arange(shape[1])[None] % 2}
    if kind == "token types and position_ids, left padding":
        types, places = (
            torch.randint(0, 2, shape, generator=generator),
            torch.randint(0, 40, shape, generator=generator),
        )
        flipped = {name: tensor.flip(1) for name, tensor in batch.items()}
        return {**flipped, "token_type_ids": types, "position_ids": places}
    if kind == "one token":
        return {"input_ids": torch.tensor([[7], [8]]), "attention_mask": torch.ones(2, 1)}
    assert kind == "right padding"
    return batch


KINDS = [
    "right padding",
    "left padding",
    "left and right padding",
    "holes",
    "holes and a masked first position",
    "a row with nothing in it",
    "no mask",
    "no mask, padding tokens read as text",
    "padding token inside the text",
    "inputs_embeds",
    "inputs_embeds without mask",
    "position_ids",
    "one row of position_ids",
    "token types",
    "one row of token types",
    "token types and position_ids, left padding",
    "one token",
]
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


def is_zero_in_theory(name: str) -> bool:
    """Softmax ignores what is added to all keys alike: biases of keys, the relative norm's without p2c."""
    return name.endswith("key_proj.bias") or name == "deberta.encoder.LayerNorm.bias"


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, one_token: bool = False) -> None:
    """The same parameters have gradients, equal to 2e-5 of each one's largest entry (helpers says why 2e-5).

    Where the exact gradient is 0, both have rounding noise, below 1e-6 of the model's largest gradient. Only those of
    `is_zero_in_theory` may be such; with `one_token` those of queries, keys and the relative table too.
    """
    got, want = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert got.keys() == want.keys()
    noise = 1e-6 * max(p.grad.abs().max().item() for p in want.values() if p.grad is not None)
    for name, parameter in want.items():
        if parameter.grad is None:
            assert got[name].grad is None, name
            continue
        assert got[name].grad is not None, name
        if parameter.grad.abs().max().item() <= noise:
            attends = any(part in name for part in ("query_proj", "key_proj", "rel_embeddings", "encoder.LayerNorm"))
            assert is_zero_in_theory(name) or (one_token and attends), f"{name}: no gradient to compare"
            assert got[name].grad.shape == parameter.grad.shape, name
            assert got[name].grad.abs().max().item() <= noise, name
        else:
            assert_close(got[name].grad, parameter.grad, 2e-5, what=name)


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
    assert_same_gradients(ours, theirs, one_token)


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
def test_each_setting_moves_the_logits_so_that_the_comparisons_above_can_tell(setting):
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
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_every_gradient_are_transformers_own(kind, settings):
    ours, theirs = twins(tiny_deberta_config(**settings))
    inputs = inputs_of(kind)
    assert_same_training_step(ours, theirs, inputs, one_token=kind == "one token")
    with torch.no_grad():
        assert_close(ours.eval()(**inputs).logits, theirs.eval()(**inputs).logits, what="logits in eval mode")


@pytest.mark.parametrize("settings", [FULL, {**FULL, **V3, "share_att_key": False}], ids=["convolved", "not convolved"])
@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", ["right padding", "left padding"])
@pytest.mark.parametrize("settings", [{}, FULL], ids=["words alone", "projected"])
def test_inputs_embeds_get_transformers_gradient(settings, kind):
    ours, theirs = twins(tiny_deberta_config(**settings))
    inputs = inputs_of("inputs_embeds", settings.get("embedding_size", 32))
    if kind == "left padding":
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    grads = []
    for model in (ours, theirs):
        embeds = inputs["inputs_embeds"].clone().requires_grad_()
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits.pow(2).sum().backward()
        grads.append(embeds.grad)
    assert_close(*grads)


# Lengths and distances.


@pytest.mark.parametrize("padding", ["right", "left"])
def test_lengths_from_1_to_512_give_transformers_logits_loss_and_gradients(padding):
    config = tiny_deberta_config(max_position_embeddings=512, position_buckets=256, position_biased_input=True)
    ours, theirs = twins(config)
    inputs = ragged_batch([512, 1, 2, 63, 64, 65, 300, 511, 1, 128], pad=0)
    if padding == "left":
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    assert_same_training_step(ours, theirs, inputs)


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
        whole = table_rows(300, buckets, reach)
        assert list(whole) == sorted(whole)
        for length in (1, 2, 17, 299):
            assert table_rows(length, buckets, reach) == whole[300 - length : 299 + length]


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
    whole = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shifted(whole[2:]), shifted(whole[2:].clone()))


# What the outputs are.


@pytest.mark.parametrize("kind", ["right padding", "left padding"])
@pytest.mark.parametrize("settings", [{}, V3, {"num_hidden_layers": 1}], ids=["v2", "v3", "one layer"])
def test_a_classifier_asked_for_attentions_has_the_logits_and_gradients_it_has_without(settings, kind):
    ours, theirs = twins(tiny_deberta_config(**settings))
    inputs, labels = inputs_of(kind), torch.arange(5) % 3
    got = ours(**inputs, labels=labels, output_attentions=True, output_hidden_states=True)
    want = theirs(**inputs, labels=labels)
    bare = copy.deepcopy(ours)(**inputs)
    assert_close(got.logits, want.logits)
    assert_close(bare.logits, want.logits)
    layers = ours.config.num_hidden_layers
    assert len(got.attentions) == layers and len(got.hidden_states) == layers + 1
    got.loss.backward()
    want.loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [FULL, V3 | FULL | {"conv_kernel_size": 0}, FULL | {"num_hidden_layers": 1}, FULL | {"conv_kernel_size": 5}],
    ids=["2 layers, the first convolved", "2 layers", "1 layer, convolved", "2 layers, kernel 5"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_first_tokens_alone_are_the_first_tokens_of_the_whole(kind, settings):
    model = randomise_(DebertaV2Model(tiny_deberta_config(**settings))).eval()
    inputs = inputs_of(kind)
    whole, first = model(**inputs), model(**inputs, first_token_only=True)
    assert first.last_hidden_state.shape == (rows_of(inputs), 1, 32)
    assert_close(first.last_hidden_state[:, 0], whole.last_hidden_state[:, 0], 1e-6)


@pytest.mark.parametrize("settings", [{}, V3], ids=["v2", "v3"])
def test_padding_is_zero_in_the_last_hidden_state(settings):
    inputs = inputs_of("right padding")
    output = randomise_(DebertaV2Model(tiny_deberta_config(**settings)))(**inputs).last_hidden_state
    assert torch.count_nonzero(output[inputs["attention_mask"] == 0]) == 0
    assert (output[inputs["attention_mask"] == 1] != 0).all()


@pytest.mark.parametrize(
    "settings",
    [{}, V3, {"conv_kernel_size": 5, "num_hidden_layers": 1}, FULL, {"position_buckets": -1}],
    ids=["v2", "v3", "one layer, kernel 5", "all parts", "no buckets"],
)
def test_a_sentences_logits_do_not_depend_on_neighbours_order_or_padding(settings):
    model = randomise_(DebertaV2ForSequenceClassification(tiny_deberta_config(**settings))).eval()
    batch = ragged_batch([9, 4, 6, 4, 1, 12], pad=0)
    ids, mask = batch.values()
    want = model(**batch).logits
    order = [3, 5, 0, 4, 2, 1]
    reordered = model(input_ids=ids[order], attention_mask=mask[order]).logits
    padded = model(input_ids=F.pad(ids, (0, 9)), attention_mask=F.pad(mask, (0, 9))).logits
    alone = torch.cat([model(input_ids=row[None, :n]).logits for row, n in zip(ids, mask.sum(1).tolist(), strict=True)])
    assert_close(reordered, want[order], 1e-6)
    assert_close(padded, want, 1e-6)
    assert_close(alone, want, 1e-6)
    noise = torch.where(mask == 1, ids, 7)  # what stands under the padding is not read
    assert_close(model(input_ids=noise, attention_mask=mask).logits, want, 1e-6)
    nan = model.get_input_embeddings()(ids).masked_fill(mask[..., None] == 0, float("nan"))
    assert_close(model(inputs_embeds=nan, attention_mask=mask).logits, want, 1e-6)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("more", [{}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_return_dict_false_gives_the_tuple_transformers_gives(more, with_labels):
    ours, theirs = twins(tiny_deberta_config())
    inputs = inputs_of("no mask")
    labels = {"labels": torch.arange(5) % 3} if with_labels else {}
    got = ours(**inputs, **labels, **more, return_dict=False)
    want = theirs(**inputs, **labels, **more, return_dict=True).to_tuple()  # its own tuples hold hidden states twice
    assert type(got) is tuple and len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, tuple):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                assert_close(x, y)
        else:
            assert_close(a, b)
    encoder = ours.deberta(**inputs, return_dict=False)
    assert type(encoder) is tuple and len(encoder) == 1


def test_the_config_can_ask_for_tuples_hidden_states_and_attentions():
    model = DebertaV2ForSequenceClassification(
        tiny_deberta_config(return_dict=False, output_hidden_states=True, output_attentions=True)
    )
    output = model(**inputs_of("right padding"))
    assert type(output) is tuple and [len(part) for part in output[1:]] == [3, 2]


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


@pytest.mark.parametrize("settings", [{}, V3], ids=["v2", "v3"])
def test_in_bf16_we_are_no_further_from_fp32_than_transformers_is(settings):
    config = tiny_deberta_config(hidden_size=64, num_hidden_layers=3, **settings)
    ours, theirs = (model.eval() for model in twins(config))
    inputs = ragged_batch([1 + i % 12 for i in range(64)], pad=0)
    with torch.no_grad():
        exact = theirs(**inputs).logits
        got, want = ours.bfloat16()(**inputs).logits, theirs.bfloat16()(**inputs).logits
    assert got.dtype == want.dtype == torch.bfloat16
    our_error, their_error = ((x.float() - exact).pow(2).mean().sqrt().item() for x in (got, want))
    assert their_error > 0
    assert our_error <= 1.5 * their_error, (our_error, their_error)


def test_in_bf16_every_gradient_is_as_close_to_fp32_as_transformers_is():
    ours, theirs = twins(tiny_deberta_config())
    exact = copy.deepcopy(theirs)
    inputs, labels = ragged_batch([1 + i % 12 for i in range(64)], pad=0), torch.arange(64) % 3
    for model in (ours.bfloat16(), theirs.bfloat16(), exact):
        model(**inputs, labels=labels).loss.backward()
    names = [name for name, _ in exact.named_parameters()]
    flat = [torch.cat([m.get_parameter(name).grad.float().flatten() for name in names]) for m in (ours, theirs, exact)]
    our_error, their_error = ((x - flat[2]).norm().item() for x in flat[:2])
    assert our_error <= 2 * their_error, (our_error, their_error)


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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trains", ["LoRA", "everything"])
def test_checkpointed_activations_give_identical_gradients(trains, dropout):
    lora = LORA if trains == "LoRA" else {}
    config = tiny_deberta_config(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **lora)
    model = randomise_(DebertaV2ForSequenceClassification(config)).train()
    if lora:
        mark_only_lora_as_trainable(model)
        model.enable_input_require_grads()
    labels = torch.arange(5) % 3
    gradients, forwards = [], []
    layer = model.deberta.encoder.layer[0].intermediate
    for checkpointed in (False, True):
        if checkpointed:
            # the newer name of the same thing, where transformers has it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        calls = []
        hook = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs_of("right padding"), labels=labels).loss.backward()
        hook.remove()
        forwards.append(len(calls))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert forwards == [1, 2]  # the second run did recompute
    assert len(gradients[0]) == (8 + 4 if lora else len(list(model.parameters())))
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        assert torch.equal(gradients[1][name], want), name


# Against the reference implementation.


def test_a_lora_model_has_the_references_hidden_states_logits_and_loss():
    tensors, _ = golden("deberta_cls3")
    model, inputs = golden_model("deberta_cls3"), golden_inputs(tensors)
    real = inputs["attention_mask"] == 1
    output = model(**inputs, labels=tensors["input.labels"], output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for i, got in enumerate(output.hidden_states):
        assert_close(got[real], tensors[f"out.hidden_states.{i}"][real], 2e-5, scale=1, what=f"hidden state {i}")
    assert_close(output.logits, tensors["out.logits"], 2e-5, scale=1)
    assert_close(output.loss, tensors["out.loss"], 2e-5)
    assert_close(model(**inputs).logits, tensors["out.logits"], 2e-5, scale=1)
    assert_close(model.eval()(**inputs).logits, tensors["out.logits_eval"], 2e-5, scale=1)


def test_a_lora_model_has_the_references_gradients():
    tensors, description = golden("deberta_cls3")
    model = golden_model("deberta_cls3")
    mark_only_lora_as_trainable(model)
    model(**golden_inputs(tensors), labels=tensors["input.labels"]).loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(description["trainable"])
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(got) == set(description["trainable"])
    for name, gradient in got.items():
        assert_close(gradient, tensors[f"grad.{name}"], 2e-5, what=name)


def test_a_float64_lora_model_has_the_references_float64_logits_and_loss():
    tensors, _ = golden("deberta_cls3")
    output = golden_model("deberta_cls3").double()(**golden_inputs(tensors), labels=tensors["input.labels"])
    assert_close(output.logits, tensors["out64.logits"], 1e-12)
    assert_close(output.loss, tensors["out64.loss"], 1e-7)  # the reference's loss is of fp32 logits in any model
    loss_in_fp32 = F.cross_entropy(output.logits.float(), tensors["input.labels"]).double()
    assert_close(loss_in_fp32, tensors["out64.loss"], 1e-12)


def test_the_goldens_tell_a_model_without_lora_from_one_with_it():
    tensors, _ = golden("deberta_cls3")
    inputs = golden_inputs(tensors)
    with_lora = golden_model("deberta_cls3").eval()
    without = DebertaV2ForSequenceClassification(copy.deepcopy(with_lora.config)).eval()
    without.load_state_dict({k: v for k, v in with_lora.state_dict().items() if "lora_" not in k}, strict=False)
    assert_close(without(**inputs).logits, tensors["alt.logits_no_lora"], 2e-5, scale=1)  # lora_B is zero there
    assert (with_lora(**inputs).logits - tensors["alt.logits_no_lora"]).abs().max() > 0.1


def test_the_relative_query_bypasses_lora_as_in_the_reference_unless_the_config_asks_for_it():
    tensors, _ = golden("deberta_cls3")
    inputs = golden_inputs(tensors)
    reference, merged = tensors["out.logits_eval"], tensors["alt.logits_merged_into_weight"]
    by_default = golden_model("deberta_cls3").eval()(**inputs).logits
    assert_close(by_default, reference, 2e-5, scale=1)
    assert (by_default - merged).abs().max() > 0.1
    asked = golden_model("deberta_cls3", lora_relative_query=True).eval()(**inputs).logits
    assert_close(asked, merged, 2e-5, scale=1)
    assert (asked - reference).abs().max() > 0.1


# LoRA in the whole model, against PEFT.


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
def test_with_lora_in_the_relative_query_the_whole_model_has_pefts_logits_and_gradients(kind):
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
@pytest.mark.parametrize("asked", [False, True])
def test_where_no_relative_query_goes_through_query_proj_peft_agrees_whatever_is_asked(settings, asked):
    ours = lora_model(lora_relative_query=asked, **settings)
    assert_same_as_peft(ours, *peft_twin(ours, **settings), inputs_of("right padding"))


@pytest.mark.parametrize("kinds", [["p2c", "c2p"], ["p2c"]])
def test_by_default_a_shared_relative_query_is_frozen_and_pefts_logits_are_others(kinds):
    ours = lora_model(pos_att_type=kinds)
    theirs, _ = peft_twin(ours, pos_att_type=kinds)
    inputs = inputs_of("right padding")
    assert (ours(**inputs).logits - theirs(**inputs).logits).abs().max() > 0.01


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
def test_a_model_says_whether_its_relative_query_is_frozen_or_none_where_it_makes_no_difference(settings, frozen):
    config = tiny_deberta_config(**LORA, **settings)
    assert DebertaV2ForSequenceClassification(config).frozen_relative_query is frozen
    assert DebertaV2Model(config).frozen_relative_query is frozen


@pytest.mark.parametrize("asked", [False, True])
def test_with_lora_B_zero_a_lora_model_is_transformers_own_also_in_the_base_weights_gradients(asked):
    ours = lora_model(lora_relative_query=asked).requires_grad_(True)
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
@pytest.mark.parametrize("asked", [False, True])
def test_merging_leaves_the_logits_and_unmerging_gives_them_back(asked, kind):
    model, inputs = lora_model(lora_relative_query=asked).eval(), inputs_of(kind)
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
    assert_same_gradients(ours, theirs)
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
        assert_same_gradients(ours, theirs)
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


def test_two_training_runs_with_one_seed_are_bit_equal_and_with_another_are_not():
    config = tiny_deberta_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **LORA)

    def run(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = DebertaV2ForSequenceClassification(config).train()
        mark_only_lora_as_trainable(model)
        trains = [p for p in model.parameters() if p.requires_grad]
        for step in range(4):
            loss = model(**ragged_batch(LENGTHS, seed=step, pad=0), labels=torch.arange(5) % 3).loss
            with torch.no_grad():
                for parameter, gradient in zip(trains, torch.autograd.grad(loss, trains), strict=True):
                    parameter -= 0.1 * gradient
        return model.state_dict()

    first, second, other = run(0), run(0), run(1)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    trained = [name for name in first if "lora_" in name or name.startswith(("pooler.", "classifier."))]
    assert len(trained) == 12 and not any(torch.equal(first[name], other[name]) for name in trained)


def test_evaluation_is_deterministic_though_dropout_is_configured():
    config = tiny_deberta_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, pooler_dropout=0.5)
    model = randomise_(DebertaV2ForSequenceClassification(config)).eval()
    batch = inputs_of("right padding")
    want = model(**batch).logits
    assert torch.equal(model(**batch).logits, want)
    assert_close(model(**batch, output_attentions=True).logits, want)
    assert not torch.equal(model.train()(**batch).logits, want)
    no_dropout = DebertaV2ForSequenceClassification(tiny_deberta_config())
    no_dropout.load_state_dict(model.state_dict())
    assert torch.equal(no_dropout.train()(**batch).logits, want)


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


def test_input_embeddings_can_be_read_and_replaced():
    model = DebertaV2ForSequenceClassification(tiny_deberta_config())
    assert model.get_input_embeddings() is model.deberta.embeddings.word_embeddings
    model.resize_token_embeddings(60)
    assert model.get_input_embeddings().weight.shape == (60, 32) and model.config.vocab_size == 60
    assert model(input_ids=torch.tensor([[3, 59, 2]])).logits.shape == (1, 3)


# What is refused.


@pytest.mark.parametrize("as_embeds", [False, True])
def test_a_sequence_beyond_the_position_table_is_refused_with_the_limit(as_embeds):
    model = DebertaV2ForSequenceClassification(
        tiny_deberta_config(max_position_embeddings=10, position_biased_input=True)
    )

    def batch(length: int) -> dict[str, Tensor]:
        if as_embeds:
            return {"inputs_embeds": torch.zeros(1, length, 32)}
        return {"input_ids": torch.full((1, length), 5)}

    assert model(**batch(10)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match=r"11 tokens exceeds the model's 10 positions.*max_length=10"):
        model(**batch(11))


@pytest.mark.parametrize("model_class", [DebertaV2Model, DebertaV2ForSequenceClassification])
def test_both_inputs_or_neither_is_an_error(model_class):
    model = model_class(tiny_deberta_config())
    ids = torch.tensor([[3, 5, 2]])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(attention_mask=torch.ones(1, 3))


def test_a_mask_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, seq\] = \[1, 3\], got \[1, 4\]"):
        DebertaV2Model(tiny_deberta_config())(input_ids=torch.tensor([[3, 5, 2]]), attention_mask=torch.ones(1, 4))


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
def test_a_config_this_model_cannot_honour_is_refused_by_name(settings, message, model_class):
    with pytest.raises(ValueError, match=f"This DeBERTa-V2 can't honour its config: {message}"):
        model_class(tiny_deberta_config(**settings))


@pytest.mark.parametrize(
    "settings", [{"position_buckets": 76}, {"position_buckets": 2}, {"max_relative_positions": 6}, {"z_steps": 1}]
)
def test_the_settings_next_to_the_refused_ones_are_transformers_own(settings):
    ours, theirs = twins(tiny_deberta_config(**settings))
    assert_same_training_step(ours, theirs, inputs_of("right padding"))


def test_padding_beyond_the_position_table_is_no_error():
    model = DebertaV2ForSequenceClassification(
        tiny_deberta_config(max_position_embeddings=10, position_biased_input=True)
    ).eval()
    short = ragged_batch([8, 5], pad=0)
    wide = {name: torch.nn.functional.pad(tensor, (0, 12)) for name, tensor in short.items()}
    assert_close(model(**wide).logits, model(**short).logits)


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("relative_query", [False, True])
@pytest.mark.parametrize("wrap", [Wrapped, checkpoint_wrapper, "peft"])
def test_an_updated_projection_inside_another_module_is_read_as_the_config_says(wrap, relative_query):
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
