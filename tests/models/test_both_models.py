"""What RoBERTa and DeBERTa-V2 both promise: against transformers' classes, the reference implementation's goldens, and
for themselves."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    CLASSIFIERS,
    DEBERTA_INPUTS,
    ROBERTA_INPUTS,
    assert_close,
    assert_same_deberta_gradients,
    assert_same_gradients,
    golden,
    golden_inputs,
    golden_model,
    inputs_of,
    ragged_batch,
    randomise_,
    tiny_config,
    tiny_deberta_config,
    twins,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.modeling_deberta_v2 import DebertaV2Model
from lora_nlu.models.modeling_roberta import RobertaModel

LENGTHS = [9, 4, 6, 4, 1]
LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8}
NO_CONVOLUTION = {"conv_kernel_size": 0}
ALL_PARTS = {
    "position_biased_input": True,
    "type_vocab_size": 2,
    "embedding_size": 20,
    "pooler_hidden_act": "tanh",
    "conv_groups": 2,
}
# The models under test: name, settings of the tiny config.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("roberta", {}),
    "deberta-v2": ("deberta-v2", {}),
    "deberta-v3": ("deberta-v2", NO_CONVOLUTION),
    "deberta-v2, one layer": ("deberta-v2", {"num_hidden_layers": 1}),
    "deberta-v2, one layer, kernel 5": ("deberta-v2", {"conv_kernel_size": 5, "num_hidden_layers": 1}),
    "deberta-v2, all parts": ("deberta-v2", ALL_PARTS),
    "deberta-v2, all parts, not convolved": ("deberta-v2", ALL_PARTS | NO_CONVOLUTION),
    "deberta-v2, all parts, one layer": ("deberta-v2", ALL_PARTS | {"num_hidden_layers": 1}),
    "deberta-v2, all parts, kernel 5": ("deberta-v2", ALL_PARTS | {"conv_kernel_size": 5}),
    "deberta-v2, no buckets": ("deberta-v2", {"position_buckets": -1}),
}


class Variant(NamedTuple):
    """A model with settings: what its tests build."""

    kind: str
    settings: dict[str, Any]

    @property
    def is_roberta(self) -> bool:
        return self.kind == "roberta"

    @property
    def pad(self) -> int:
        return 1 if self.is_roberta else 0

    def config(self, **settings: Any) -> Any:
        return (tiny_config if self.is_roberta else tiny_deberta_config)(**{**self.settings, **settings})

    def classifier(self, **settings: Any) -> Any:
        return CLASSIFIERS[self.kind][0](self.config(**settings))

    def encoder(self, **settings: Any) -> Any:
        return (RobertaModel if self.is_roberta else DebertaV2Model)(self.config(**settings))

    def twins(self, eager: bool = False, **settings: Any) -> tuple[Any, Any]:
        return twins(self.config(**settings), attn_implementation="eager" if eager and self.is_roberta else None)

    def batch(self, lengths: list[int] = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
        return ragged_batch(lengths, seed=seed, pad=self.pad)

    def inputs(self, kind: str) -> dict[str, Tensor]:
        return inputs_of(kind, self.pad, self.settings.get("embedding_size", 32))

    def assert_same_gradients(self, ours: nn.Module, theirs: nn.Module) -> None:
        (assert_same_gradients if self.is_roberta else assert_same_deberta_gradients)(ours, theirs)


def variants(*names: str) -> Any:
    """Parametrise a test by these `VARIANTS`."""
    return pytest.mark.parametrize("variant", [Variant(*VARIANTS[name]) for name in names], ids=names)


both_models = variants("roberta", "deberta-v2")


# Against transformers.


@pytest.mark.parametrize("padding", ["right padding", "left padding"])
@variants("roberta", "deberta-v2", "deberta-v2, all parts")
def test_inputs_embeds_get_transformers_gradient(variant, padding):
    models, inputs, grads = variant.twins(), variant.inputs("inputs_embeds"), []
    if padding == "left padding":
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    for model in models:
        embeds = inputs["inputs_embeds"].clone().requires_grad_()
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits.pow(2).sum().backward()
        grads.append(embeds.grad)
    assert_close(*grads)


@pytest.mark.parametrize("padding", ["right padding", "left padding"])
@both_models
def test_lengths_from_1_to_512_give_transformers_logits_loss_and_gradients(variant, padding):
    roberta = {"max_position_embeddings": 514}
    deberta = {"max_position_embeddings": 512, "position_buckets": 256, "position_biased_input": True}
    ours, theirs = variant.twins(**(roberta if variant.is_roberta else deberta))
    inputs = variant.batch([512, 1, 2, 63, 64, 65, 300, 511, 1, 128])
    if padding == "left padding":
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    labels = torch.arange(10) % 3
    got, want = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert_close(got.logits, want.logits, what="logits")
    assert_close(got.loss, want.loss, what="loss")
    got.loss.backward()
    want.loss.backward()
    variant.assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("kind", ["right padding", "left padding"])
@variants("roberta", "deberta-v2", "deberta-v3", "deberta-v2, one layer")
def test_a_classifier_that_returns_attentions_has_the_same_logits_and_gradients(variant, kind):
    ours, theirs = variant.twins()
    inputs, labels = variant.inputs(kind), torch.arange(5) % 3
    got = ours(**inputs, labels=labels, output_attentions=True, output_hidden_states=True)
    want = theirs(**inputs, labels=labels)
    assert_close(got.logits, want.logits)
    assert_close(copy.deepcopy(ours)(**inputs).logits, want.logits)
    layers = ours.config.num_hidden_layers
    assert len(got.attentions) == layers and len(got.hidden_states) == layers + 1
    got.loss.backward()
    want.loss.backward()
    variant.assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("more", [{}, {"output_hidden_states": True}, {"output_attentions": True}])
@both_models
def test_return_dict_false_gives_the_tuple_transformers_gives(variant, more, with_labels):
    ours, theirs = variant.twins(eager=True)
    inputs = variant.inputs("no mask")
    labels = {"labels": torch.arange(5) % 3} if with_labels else {}
    got = ours(**inputs, **labels, **more, return_dict=False)
    if variant.is_roberta:
        want = theirs(**inputs, **labels, **more, return_dict=False)
    else:  # its own tuples contain the hidden states twice
        want = theirs(**inputs, **labels, **more, return_dict=True).to_tuple()
    assert type(got) is tuple and len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, tuple):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                assert_close(x, y)
        else:
            assert_close(a, b)
    encoder = ours.base_model(**inputs, return_dict=False)
    assert type(encoder) is tuple and len(encoder) == 1  # no pooler in a classifier


@variants("roberta", "deberta-v2", "deberta-v3")
def test_in_bf16_we_are_no_further_from_fp32_than_transformers_is(variant):
    ours, theirs = (model.eval() for model in variant.twins(hidden_size=64, num_hidden_layers=3))
    inputs = variant.batch([1 + i % 12 for i in range(64)])
    with torch.no_grad():
        exact = theirs(**inputs).logits
        got, want = ours.bfloat16()(**inputs).logits, theirs.bfloat16()(**inputs).logits
    assert got.dtype == want.dtype == torch.bfloat16
    our_error, their_error = ((x.float() - exact).pow(2).mean().sqrt().item() for x in (got, want))
    assert their_error > 0
    assert our_error <= 1.5 * their_error, (our_error, their_error)


@both_models
def test_in_bf16_every_gradient_is_as_close_to_fp32_as_transformers_is(variant):
    ours, theirs = variant.twins()
    exact = copy.deepcopy(theirs)
    inputs, labels = variant.batch([1 + i % 12 for i in range(64)]), torch.arange(64) % 3
    for model in (ours.bfloat16(), theirs.bfloat16(), exact):
        model(**inputs, labels=labels).loss.backward()
    names = [name for name, _ in exact.named_parameters()]
    flat = [torch.cat([m.get_parameter(name).grad.float().flatten() for name in names]) for m in (ours, theirs, exact)]
    our_error, their_error = ((x - flat[2]).norm().item() for x in flat[:2])
    assert our_error <= 2 * their_error, (our_error, their_error)


# Against the reference implementation.

goldens = pytest.mark.parametrize("case", ["roberta_cls3", "roberta_reg", "deberta_cls3"])


@goldens
def test_a_lora_model_has_the_references_hidden_states_logits_and_loss(case):
    tensors, _ = golden(case)
    model, inputs = golden_model(case), golden_inputs(tensors)
    real = inputs["attention_mask"] == 1
    output = model(**inputs, labels=tensors["input.labels"], output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for i, got in enumerate(output.hidden_states):
        assert_close(got[real], tensors[f"out.hidden_states.{i}"][real], 2e-5, scale=1, what=f"hidden state {i}")
    assert_close(output.logits, tensors["out.logits"], 2e-5, scale=1)
    assert_close(output.loss, tensors["out.loss"], 2e-5)
    assert_close(model(**inputs).logits, tensors["out.logits"], 2e-5, scale=1)
    assert_close(model.eval()(**inputs).logits, tensors["out.logits_eval"], 2e-5, scale=1)


@goldens
def test_a_lora_model_has_the_references_gradients(case):
    tensors, description = golden(case)
    model = golden_model(case)
    mark_only_lora_as_trainable(model)
    model(**golden_inputs(tensors), labels=tensors["input.labels"]).loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(description["trainable"])
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(got) == set(description["trainable"])
    for name, gradient in got.items():
        assert_close(gradient, tensors[f"grad.{name}"], 2e-5, what=name)


@goldens
def test_a_float64_lora_model_has_the_references_float64_logits_and_loss(case):
    tensors, _ = golden(case)
    output = golden_model(case).double()(**golden_inputs(tensors), labels=tensors["input.labels"])
    assert_close(output.logits, tensors["out64.logits"], 1e-12)
    if case.startswith("roberta"):
        assert_close(output.loss, tensors["out64.loss"], 1e-12)
    else:  # the reference's loss is of fp32 logits in any model
        assert_close(output.loss, tensors["out64.loss"], 1e-7)
        loss_in_fp32 = F.cross_entropy(output.logits.float(), tensors["input.labels"]).double()
        assert_close(loss_in_fp32, tensors["out64.loss"], 1e-12)


@goldens
def test_the_goldens_differ_between_a_model_without_lora_and_one_with_it(case):
    tensors, _ = golden(case)
    inputs = golden_inputs(tensors)
    with_lora = golden_model(case).eval()
    without = type(with_lora)(copy.deepcopy(with_lora.config)).eval()
    without.load_state_dict({k: v for k, v in with_lora.state_dict().items() if "lora_" not in k}, strict=False)
    assert_close(without(**inputs).logits, tensors["alt.logits_no_lora"], 2e-5, scale=1)  # lora_B is zero there
    assert (with_lora(**inputs).logits - tensors["alt.logits_no_lora"]).abs().max() > 0.1


# Outputs.


def assert_first_tokens_are_those_of_all(variant: Variant, kind: str) -> None:
    model = randomise_(variant.encoder()).eval()
    inputs = variant.inputs(kind)
    every, first = model(**inputs), model(**inputs, first_token_only=True)
    assert first.last_hidden_state.shape == (len(every.last_hidden_state), 1, 32)
    assert_close(first.last_hidden_state[:, 0], every.last_hidden_state[:, 0], 1e-6)
    if variant.is_roberta:
        assert_close(first.pooler_output, every.pooler_output, 1e-6)


@pytest.mark.parametrize("kind", ROBERTA_INPUTS)
def test_first_tokens_alone_are_the_first_of_all_tokens_in_roberta(kind):
    assert_first_tokens_are_those_of_all(Variant("roberta", {}), kind)


@pytest.mark.parametrize("kind", DEBERTA_INPUTS)
@variants(
    "deberta-v2, all parts",
    "deberta-v2, all parts, not convolved",
    "deberta-v2, all parts, one layer",
    "deberta-v2, all parts, kernel 5",
)
def test_first_tokens_alone_are_the_first_of_all_tokens_in_deberta(variant, kind):
    assert_first_tokens_are_those_of_all(variant, kind)


@variants("roberta", "deberta-v2", "deberta-v3")
def test_padding_is_zero_in_the_last_hidden_state(variant):
    inputs = variant.inputs("right padding")
    output = randomise_(variant.encoder())(**inputs).last_hidden_state
    assert torch.count_nonzero(output[inputs["attention_mask"] == 0]) == 0
    assert (output[inputs["attention_mask"] == 1] != 0).all()


@both_models
def test_the_config_can_ask_for_tuples_hidden_states_and_attentions(variant):
    model = variant.classifier(return_dict=False, output_hidden_states=True, output_attentions=True)
    output = model(**variant.inputs("right padding"))
    assert type(output) is tuple and [len(part) for part in output[1:]] == [3, 2]


@variants(
    "roberta",
    "deberta-v2",
    "deberta-v3",
    "deberta-v2, one layer, kernel 5",
    "deberta-v2, all parts",
    "deberta-v2, no buckets",
)
def test_a_sentences_logits_do_not_depend_on_neighbours_order_or_padding(variant):
    model = randomise_(variant.classifier()).eval()
    batch = variant.batch([9, 4, 6, 4, 1, 12])
    ids, mask = batch.values()
    want = model(**batch).logits
    order = [3, 5, 0, 4, 2, 1]
    reordered = model(input_ids=ids[order], attention_mask=mask[order]).logits
    padded = model(input_ids=F.pad(ids, (0, 9), value=variant.pad), attention_mask=F.pad(mask, (0, 9))).logits
    alone = torch.cat([model(input_ids=row[None, :n]).logits for row, n in zip(ids, mask.sum(1).tolist(), strict=True)])
    assert_close(reordered, want[order], 1e-6)
    assert_close(padded, want, 1e-6)
    assert_close(alone, want, 1e-6)
    noise = torch.where(mask == 1, ids, 7)  # what stands under the padding is not read
    assert_close(model(input_ids=noise, attention_mask=mask).logits, want, 1e-6)
    nan = model.get_input_embeddings()(ids).masked_fill(mask[..., None] == 0, float("nan"))
    assert_close(model(inputs_embeds=nan, attention_mask=mask).logits, want, 1e-6)


# Training and evaluation.


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trains", ["LoRA", "everything"])
@both_models
def test_checkpointed_activations_give_identical_gradients(variant, trains, dropout):
    lora = LORA if trains == "LoRA" else {}
    model = variant.classifier(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **lora)
    randomise_(model).train()
    if lora:
        mark_only_lora_as_trainable(model)
        model.enable_input_require_grads()
    labels = torch.arange(5) % 3
    gradients, forwards = [], []
    layer = model.base_model.encoder.layer[0].intermediate
    for checkpointed in (False, True):
        if checkpointed:
            # the newer name of the same thing, where transformers has it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        calls = []
        hook = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        torch.manual_seed(0)
        model(**variant.inputs("right padding"), labels=labels).loss.backward()
        hook.remove()
        forwards.append(len(calls))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert forwards == [1, 2]  # the second run did recompute
    assert len(gradients[0]) == (8 + 4 if lora else len(list(model.parameters())))
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        assert torch.equal(gradients[1][name], want), name


@both_models
def test_two_training_runs_with_one_seed_are_bit_equal_and_with_another_are_not(variant):
    def run(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = variant.classifier(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **LORA).train()
        mark_only_lora_as_trainable(model)
        trains = [p for p in model.parameters() if p.requires_grad]
        for step in range(4):
            loss = model(**variant.batch(seed=step), labels=torch.arange(5) % 3).loss
            with torch.no_grad():
                for parameter, gradient in zip(trains, torch.autograd.grad(loss, trains), strict=True):
                    parameter -= 0.1 * gradient
        return model.state_dict()

    first, second, other = run(0), run(0), run(1)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    trained = [name for name in first if "lora_" in name or name.startswith(("pooler.", "classifier."))]
    assert len(trained) == 12 and not any(torch.equal(first[name], other[name]) for name in trained)


@both_models
def test_evaluation_is_deterministic_though_dropout_is_configured(variant):
    rates = ["hidden_dropout_prob", "attention_probs_dropout_prob", *([] if variant.is_roberta else ["pooler_dropout"])]
    model = randomise_(variant.classifier(**dict.fromkeys(rates, 0.5))).eval()
    batch = variant.inputs("right padding")
    want = model(**batch).logits
    assert torch.equal(model(**batch).logits, want)
    assert_close(model(**batch, output_attentions=True).logits, want)
    assert not torch.equal(model.train()(**batch).logits, want)
    no_dropout = variant.classifier()
    no_dropout.load_state_dict(model.state_dict())
    assert torch.equal(no_dropout.train()(**batch).logits, want)


@both_models
def test_input_embeddings_can_be_read_and_replaced(variant):
    model = variant.classifier()
    assert model.get_input_embeddings() is model.base_model.embeddings.word_embeddings
    model.resize_token_embeddings(60)
    assert model.get_input_embeddings().weight.shape == (60, 32) and model.config.vocab_size == 60
    assert model(input_ids=torch.tensor([[3, 59, 2]])).logits.shape == (1, 3)


# Limits and refusals.


def ten_positions(variant: Variant) -> Any:
    """A classifier with positions for 10 tokens; RoBERTa's table has two rows more, up to the padding's."""
    if variant.is_roberta:
        return variant.classifier(max_position_embeddings=12)
    return variant.classifier(max_position_embeddings=10, position_biased_input=True)


@pytest.mark.parametrize("as_embeds", [False, True])
@both_models
def test_a_sequence_beyond_the_position_table_is_refused_with_the_limit(variant, as_embeds):
    model = ten_positions(variant)

    def batch(length: int) -> dict[str, Tensor]:
        if as_embeds:
            return {"inputs_embeds": torch.zeros(1, length, 32)}
        return {"input_ids": torch.full((1, length), 5)}

    assert model(**batch(10)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match=r"11 tokens exceeds the model's 10 positions.*max_length=10"):
        model(**batch(11))


@both_models
def test_padding_beyond_the_position_table_is_no_error(variant):
    model = randomise_(ten_positions(variant)).eval()
    short = variant.batch([10, 4])
    wide = {"input_ids": F.pad(short["input_ids"], (0, 20), value=variant.pad)}
    wide["attention_mask"] = F.pad(short["attention_mask"], (0, 20))
    assert_close(model(**wide).logits, model(**short).logits, 1e-6)


@pytest.mark.parametrize("is_classifier", [False, True])
@both_models
def test_both_inputs_or_neither_is_an_error(variant, is_classifier):
    model = variant.classifier() if is_classifier else variant.encoder()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=torch.tensor([[3, 5, 2]]), inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(attention_mask=torch.ones(1, 3))


@both_models
def test_a_mask_of_another_shape_is_an_error(variant):
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, seq\] = \[1, 3\], got \[1, 4\]"):
        variant.encoder()(input_ids=torch.tensor([[3, 5, 2]]), attention_mask=torch.ones(1, 4))
