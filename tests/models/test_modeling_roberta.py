"""Our RoBERTa against transformers' with the same weights, the reference implementation's goldens, and PEFT."""

import copy

import pytest
import torch
import transformers
from helpers import (
    assert_close,
    assert_same_gradients,
    golden,
    golden_inputs,
    golden_model,
    ragged_batch,
    randomise_,
    tiny_config,
    tiny_deberta_config,
    twins,
)
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification, RobertaModel

LENGTHS = [9, 4, 6, 4, 1]


def inputs_of(kind: str) -> dict[str, Tensor]:
    """One batch of each kind of input that the model takes."""
    batch = ragged_batch(LENGTHS)
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
    if kind == "no mask":
        return {"input_ids": torch.randint(3, 50, shape, generator=generator)}
    if kind == "no mask, padding tokens read as text":
        return {"input_ids": ids}
    if kind == "padding token inside the text":
        ids = torch.randint(3, 50, shape, generator=generator)
        ids[0, 2] = ids[0, 5] = ids[2, 0] = 1
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "inputs_embeds":
        return {"inputs_embeds": torch.randn(*shape, 32, generator=generator), "attention_mask": mask}
    if kind == "inputs_embeds without mask":
        return {"inputs_embeds": torch.randn(*shape, 32, generator=generator)}
    if kind == "position_ids":
        return {**batch, "position_ids": torch.randint(0, 40, shape, generator=generator)}
    if kind == "one row of position_ids":
        return {**batch, "position_ids": torch.arange(20, 20 + shape[1])[None]}
    if kind == "token types":
        return {**batch, "token_type_ids": torch.randint(0, 2, shape, generator=generator)}
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
    "no mask",
    "no mask, padding tokens read as text",
    "padding token inside the text",
    "inputs_embeds",
    "inputs_embeds without mask",
    "position_ids",
    "one row of position_ids",
    "token types",
    "one token",
]
# task: number of labels, problem_type, labels of a batch of n
TASKS = {
    "3 labels": (3, None, lambda n: torch.arange(n) % 3),
    "2 labels": (2, None, lambda n: torch.arange(n) % 2),
    "regression": (1, None, lambda n: torch.linspace(-1, 2, n)),
    "regression, labels in a column": (1, "regression", lambda n: torch.linspace(-1, 2, n)[:, None]),
    "regression to 2 numbers": (2, "regression", lambda n: torch.linspace(-1, 2, 2 * n).view(n, 2)),
    "multi-label": (3, None, lambda n: (torch.arange(3 * n) % 2).view(n, 3).float()),
    "multi-label by name": (3, "multi_label_classification", lambda n: (torch.arange(3 * n) % 2).view(n, 3).float()),
}


def rows_of(inputs: dict[str, Tensor]) -> int:
    return next(iter(inputs.values())).shape[0]


def assert_same_training_step(ours, theirs, inputs: dict[str, Tensor], labels: Tensor) -> None:
    """The same logits, loss and gradients."""
    got, want = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert_close(got.logits, want.logits, what="logits")
    assert_close(got.loss, want.loss, what="loss")
    got.loss.backward()
    want.loss.backward()
    assert_same_gradients(ours, theirs)


# Against transformers: training step and outputs.


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_every_gradient_are_transformers_own(kind):
    ours, theirs = twins(tiny_config())
    inputs = inputs_of(kind)
    assert_same_training_step(ours, theirs, inputs, TASKS["3 labels"][2](rows_of(inputs)))
    with torch.no_grad():
        assert_close(ours.eval()(**inputs).logits, theirs.eval()(**inputs).logits, what="logits in eval mode")


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_label_gives_transformers_loss_and_gradients(task):
    num_labels, problem_type, labels_of = TASKS[task]
    ours, theirs = twins(tiny_config(num_labels=num_labels, problem_type=problem_type))
    assert_same_training_step(ours, theirs, inputs_of("right padding"), labels_of(len(LENGTHS)))


def test_inputs_embeds_get_transformers_gradient():
    ours, theirs = twins(tiny_config())
    inputs = inputs_of("inputs_embeds")
    grads = []
    for model in (ours, theirs):
        embeds = inputs["inputs_embeds"].clone().requires_grad_()
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits.pow(2).sum().backward()
        grads.append(embeds.grad)
    assert_close(*grads)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_lengths_from_1_to_512_give_transformers_logits_loss_and_gradients(padding):
    ours, theirs = twins(tiny_config(max_position_embeddings=514))
    inputs = ragged_batch([512, 1, 2, 63, 64, 65, 300, 511, 1, 128])
    if padding == "left":
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    assert_same_training_step(ours, theirs, inputs, torch.arange(10) % 3)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_activation_layer_norm_eps_and_sizes_come_from_the_config(act):
    config = tiny_config(hidden_act=act, layer_norm_eps=0.1, num_attention_heads=2, num_hidden_layers=3, pad_token_id=0)
    ours, theirs = twins(config)
    inputs = ragged_batch(LENGTHS)
    inputs["input_ids"] *= inputs["attention_mask"]  # padding token 0
    assert_same_training_step(ours, theirs, inputs, torch.arange(5) % 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_returns_transformers_hidden_states_attentions_and_pooler_output(kind):
    config = tiny_config()
    theirs_config = copy.deepcopy(config)
    theirs_config._attn_implementation = "eager"  # the one that returns attentions
    theirs = randomise_(transformers.RobertaModel(theirs_config)).eval()
    ours = RobertaModel(config).eval()
    ours.load_state_dict(theirs.state_dict())
    inputs = inputs_of(kind)
    want = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    got = ours(**inputs, output_hidden_states=True, output_attentions=True)
    bare = ours(**inputs)

    real = inputs.get("attention_mask", torch.ones(want.last_hidden_state.shape[:2])) == 1
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    assert len(got.attentions) == len(want.attentions) == 2
    for i, (a, b) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        assert_close(a[real], b[real], what=f"hidden state {i}")
    for i, (a, b) in enumerate(zip(got.attentions, want.attentions, strict=True)):
        assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], what=f"attention {i}")  # [tokens, A, S]
    for output in (got, bare):
        assert_close(output.last_hidden_state[real], want.last_hidden_state[real], what="last hidden state")
        assert_close(output.pooler_output, want.pooler_output, what="pooler output")
    assert bare.hidden_states is None and bare.attentions is None


@pytest.mark.parametrize("kind", ["right padding", "left padding"])
def test_a_classifier_asked_for_attentions_has_the_logits_and_gradients_it_has_without(kind):
    ours, theirs = twins(tiny_config())
    inputs, labels = inputs_of(kind), torch.arange(5) % 3
    got = ours(**inputs, labels=labels, output_attentions=True, output_hidden_states=True)
    want = theirs(**inputs, labels=labels)
    assert_close(got.logits, want.logits)
    assert len(got.attentions) == 2 and len(got.hidden_states) == 3
    got.loss.backward()
    want.loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_first_tokens_alone_are_the_first_tokens_of_the_whole(kind):
    model = randomise_(RobertaModel(tiny_config())).eval()
    inputs = inputs_of(kind)
    whole, first = model(**inputs), model(**inputs, first_token_only=True)
    assert first.last_hidden_state.shape == (rows_of(inputs), 1, 32)
    assert_close(first.last_hidden_state[:, 0], whole.last_hidden_state[:, 0], 1e-6)
    assert_close(first.pooler_output, whole.pooler_output, 1e-6)


@pytest.mark.parametrize("with_attentions", [True, False])
@pytest.mark.parametrize("config", [tiny_config, tiny_deberta_config])
def test_a_fully_masked_sequence_has_transformers_gradients_with_and_without_attentions(config, with_attentions):
    # transformers' sdpa and eager differ there; the second alone gives attentions
    ours, theirs = twins(config(), attn_implementation="eager" if with_attentions or config != tiny_config else None)
    inputs = ragged_batch([9, 4, 7], pad=config().pad_token_id)
    inputs["attention_mask"][1] = 0
    for model in (ours, theirs):
        out = model(**inputs, labels=torch.tensor([0, 2, 1]), output_attentions=with_attentions)
        out.loss.backward()
    assert_same_gradients(ours, theirs)


def test_padding_is_zero_in_the_last_hidden_state():
    inputs = inputs_of("right padding")
    output = randomise_(RobertaModel(tiny_config()))(**inputs).last_hidden_state
    assert torch.count_nonzero(output[inputs["attention_mask"] == 0]) == 0


def test_without_a_pooling_layer_there_is_no_pooler_output():
    model = RobertaModel(tiny_config(), add_pooling_layer=False)
    assert model.pooler is None
    assert model(**inputs_of("right padding")).pooler_output is None


def test_positions_count_real_tokens_from_the_padding_id():
    embeddings = RobertaModel(tiny_config()).embeddings
    ids = torch.tensor([[5, 6, 7, 1, 1], [5, 1, 7, 1, 8]])
    positions = embeddings.positions(ids, 2, 5, torch.device("cpu"))
    assert positions.tolist() == [[2, 3, 4, 1, 1], [2, 1, 3, 1, 4]]
    assert embeddings.positions(None, 2, 3, torch.device("cpu")).tolist() == [[2, 3, 4], [2, 3, 4]]


@pytest.mark.parametrize("num_labels", [1, 3])
def test_state_dict_keys_are_transformers_own(num_labels):
    ours = RobertaForSequenceClassification(tiny_config(num_labels=num_labels))
    theirs = transformers.RobertaForSequenceClassification(tiny_config(num_labels=num_labels))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    encoder, their_encoder = RobertaModel(tiny_config()), transformers.RobertaModel(tiny_config())
    assert encoder.state_dict().keys() == their_encoder.state_dict().keys()


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("more", [{}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_return_dict_false_gives_the_tuple_transformers_gives(more, with_labels):
    ours, theirs = twins(tiny_config(), attn_implementation="eager")
    inputs = inputs_of("no mask")
    labels = {"labels": torch.arange(5) % 3} if with_labels else {}
    got = ours(**inputs, **labels, **more, return_dict=False)
    want = theirs(**inputs, **labels, **more, return_dict=False)
    assert type(got) is tuple and len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, tuple):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                assert_close(x, y)
        else:
            assert_close(a, b)
    encoder = ours.roberta(**inputs, return_dict=False)
    assert type(encoder) is tuple and len(encoder) == 1  # no pooler in a classifier


def test_the_config_can_ask_for_tuples_hidden_states_and_attentions():
    model = RobertaForSequenceClassification(
        tiny_config(return_dict=False, output_hidden_states=True, output_attentions=True)
    )
    output = model(**inputs_of("right padding"))
    assert type(output) is tuple and [len(part) for part in output[1:]] == [3, 2]


# Half precision and checkpointing.


def test_in_bf16_we_are_no_further_from_fp32_than_transformers_is():
    config = tiny_config(hidden_size=64, num_hidden_layers=3)
    ours, theirs = (model.eval() for model in twins(config))
    inputs = ragged_batch([1 + i % 12 for i in range(64)])
    with torch.no_grad():
        exact = theirs(**inputs).logits
        got, want = ours.bfloat16()(**inputs).logits, theirs.bfloat16()(**inputs).logits
    assert got.dtype == want.dtype == torch.bfloat16
    our_error, their_error = ((x.float() - exact).pow(2).mean().sqrt().item() for x in (got, want))
    assert their_error > 0
    assert our_error <= 1.5 * their_error, (our_error, their_error)


def test_in_bf16_every_gradient_is_as_close_to_fp32_as_transformers_is():
    ours, theirs = twins(tiny_config())
    exact = copy.deepcopy(theirs)
    inputs, labels = ragged_batch([1 + i % 12 for i in range(64)]), torch.arange(64) % 3
    for model in (ours.bfloat16(), theirs.bfloat16(), exact):
        model(**inputs, labels=labels).loss.backward()
    names = [name for name, _ in exact.named_parameters()]
    flat = [torch.cat([m.get_parameter(name).grad.float().flatten() for name in names]) for m in (ours, theirs, exact)]
    our_error, their_error = ((x - flat[2]).norm().item() for x in flat[:2])
    assert our_error <= 2 * their_error, (our_error, their_error)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_activations_give_identical_gradients(dropout):
    config = tiny_config(
        apply_lora=True,
        lora_r=4,
        lora_alpha=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = randomise_(RobertaForSequenceClassification(config)).train()
    mark_only_lora_as_trainable(model)
    model.enable_input_require_grads()
    labels = torch.arange(5) % 3
    gradients, forwards = [], []
    layer = model.roberta.encoder.layer[0].intermediate
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
    assert len(gradients[0]) == 8 + 4 and gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        assert torch.equal(gradients[1][name], want), name


# Against the reference implementation.


@pytest.mark.parametrize("case", ["roberta_cls3", "roberta_reg"])
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


@pytest.mark.parametrize("case", ["roberta_cls3", "roberta_reg"])
def test_a_lora_model_has_the_references_gradients(case):
    tensors, description = golden(case)
    model = golden_model(case)
    mark_only_lora_as_trainable(model)
    model(**golden_inputs(tensors), labels=tensors["input.labels"]).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(got) == set(description["trainable"])
    for name, gradient in got.items():
        assert_close(gradient, tensors[f"grad.{name}"], 2e-5, what=name)


@pytest.mark.parametrize("case", ["roberta_cls3", "roberta_reg"])
def test_a_float64_lora_model_has_the_references_float64_logits_and_loss(case):
    tensors, _ = golden(case)
    output = golden_model(case).double()(**golden_inputs(tensors), labels=tensors["input.labels"])
    assert_close(output.logits, tensors["out64.logits"], 1e-12)
    assert_close(output.loss, tensors["out64.loss"], 1e-12)


@pytest.mark.parametrize("case", ["roberta_cls3", "roberta_reg"])
def test_the_goldens_tell_a_model_without_lora_from_one_with_it(case):
    tensors, _ = golden(case)
    inputs = golden_inputs(tensors)
    with_lora = golden_model(case).eval()
    without = RobertaForSequenceClassification(copy.deepcopy(with_lora.config)).eval()
    without.load_state_dict({k: v for k, v in with_lora.state_dict().items() if "lora_" not in k}, strict=False)
    assert_close(without(**inputs).logits, tensors["alt.logits_no_lora"], 2e-5, scale=1)  # lora_B is zero there
    assert (with_lora(**inputs).logits - tensors["alt.logits_no_lora"]).abs().max() > 0.1


# LoRA in the whole model, against PEFT.


@pytest.mark.parametrize("kind", ["right padding", "left padding", "holes"])
def test_lora_in_the_whole_model_has_pefts_logits_and_gradients(kind):
    config = tiny_config(apply_lora=True, lora_r=4, lora_alpha=6)
    ours = randomise_(RobertaForSequenceClassification(config)).train()
    mark_only_lora_as_trainable(ours)
    settings = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, lora_dropout=0.0, target_modules=["query", "value"], bias="none"
    )
    theirs = get_peft_model(transformers.RobertaForSequenceClassification(tiny_config()), settings).train()

    def peft_name(name: str) -> str:
        if "lora_" in name:
            return f"base_model.model.{name}.default.weight"
        if name.startswith("classifier."):
            return f"base_model.model.{name.replace('classifier.', 'classifier.modules_to_save.default.')}"
        return f"base_model.model.{name.replace('query.', 'query.base_layer.').replace('value.', 'value.base_layer.')}"

    pairs = {name: (p, theirs.get_parameter(peft_name(name))) for name, p in ours.named_parameters()}
    with torch.no_grad():
        for mine, peft in pairs.values():
            peft.copy_(mine)
    trains = {name for name, (mine, _) in pairs.items() if mine.requires_grad}
    assert trains == {name for name, (_, peft) in pairs.items() if peft.requires_grad}
    assert sum("lora_" in name for name in trains) == 8

    inputs, labels = inputs_of(kind), torch.arange(5) % 3
    got, want = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert_close(got.logits, want.logits)
    got.loss.backward()
    want.loss.backward()
    for name in trains:
        assert_close(pairs[name][0].grad, pairs[name][1].grad, what=name)


# Dropout and determinism.


@pytest.mark.parametrize("asks_for_attentions", [False, True])
@pytest.mark.parametrize("place", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_the_loss_under_dropout_is_distributed_as_transformers(place, asks_for_attentions):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, place: 0.1}
    ours, theirs = twins(tiny_config(**rates), attn_implementation="eager")
    draws = 1500  # of each of 3 sentences: the rows of one batch draw independently
    batch = {name: t.repeat(draws, 1) for name, t in ragged_batch([8, 3, 5]).items()}
    labels = torch.tensor([0, 1, 2]).repeat(draws)

    def losses(model, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            logits = model(**batch, output_attentions=asks_for_attentions and model is ours).logits
        return F.cross_entropy(logits, labels, reduction="none").view(draws, 3)

    got, want = losses(ours, 1), losses(theirs, 2)
    standard_error = ((got.var(0) + want.var(0)) / draws).sqrt()  # [3], of the difference of means
    assert (standard_error > 0).all()
    assert ((got.mean(0) - want.mean(0)).abs() < 4 * standard_error).all()
    # spreads too: a missing dropout would move them by far more than 15%, their own standard error is 3-4%
    assert ((got.std(0) / want.std(0) - 1).abs() < 0.15).all()


def test_two_training_runs_with_one_seed_are_bit_equal_and_with_another_are_not():
    config = tiny_config(
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, apply_lora=True, lora_r=4, lora_alpha=8
    )

    def run(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = RobertaForSequenceClassification(config).train()
        mark_only_lora_as_trainable(model)
        trains = [p for p in model.parameters() if p.requires_grad]
        for step in range(4):
            loss = model(**ragged_batch(LENGTHS, seed=step), labels=torch.arange(5) % 3).loss
            with torch.no_grad():
                for parameter, gradient in zip(trains, torch.autograd.grad(loss, trains), strict=True):
                    parameter -= 0.1 * gradient
        return model.state_dict()

    first, second, other = run(0), run(0), run(1)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    trained = [name for name in first if "lora_" in name or name.startswith("classifier.")]
    assert len(trained) == 12 and not any(torch.equal(first[name], other[name]) for name in trained)


def test_evaluation_is_deterministic_though_dropout_is_configured():
    config = tiny_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = randomise_(RobertaForSequenceClassification(config)).eval()
    batch = inputs_of("right padding")
    want = model(**batch).logits
    assert torch.equal(model(**batch).logits, want)
    assert_close(model(**batch, output_attentions=True).logits, want)
    assert not torch.equal(model.train()(**batch).logits, want)
    no_dropout = RobertaForSequenceClassification(tiny_config())
    no_dropout.load_state_dict(model.state_dict())
    assert torch.equal(no_dropout.train()(**batch).logits, want)


def test_a_sentences_logits_do_not_depend_on_neighbours_order_or_padding():
    model = randomise_(RobertaForSequenceClassification(tiny_config())).eval()
    batch = ragged_batch([9, 4, 6, 4, 1, 12])
    ids, mask = batch.values()
    want = model(**batch).logits
    order = [3, 5, 0, 4, 2, 1]
    reordered = model(input_ids=ids[order], attention_mask=mask[order]).logits
    padded = model(input_ids=F.pad(ids, (0, 9), value=1), attention_mask=F.pad(mask, (0, 9))).logits
    alone = torch.cat([model(input_ids=row[None, :n]).logits for row, n in zip(ids, mask.sum(1).tolist(), strict=True)])
    assert_close(reordered, want[order], 1e-6)
    assert_close(padded, want, 1e-6)
    assert_close(alone, want, 1e-6)
    noise = torch.where(mask == 1, ids, 7)  # what stands under the padding is not read
    assert_close(model(input_ids=noise, attention_mask=mask).logits, want, 1e-6)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 0.1),
        ({"cls_dropout": None}, 0.1),
        ({"cls_dropout": 0.3}, 0.3),
        ({"cls_dropout": 0.0}, 0.0),
        ({"classifier_dropout": 0.2}, 0.2),
        ({"classifier_dropout": 0.0}, 0.0),
        ({"classifier_dropout": 0.2, "cls_dropout": 0.0}, 0.0),
    ],
)
def test_the_heads_dropout_is_cls_dropout_even_0_and_hidden_dropout_by_default(settings, rate):
    model = RobertaForSequenceClassification(tiny_config(hidden_dropout_prob=0.1, **settings))
    assert model.classifier.dropout.p == rate
    assert model.roberta.embeddings.dropout.p == 0.1


# Around the model: initialisation, pipeline, errors.


def test_a_new_model_is_initialised_as_transformers_does():
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(tiny_config(vocab_size=500, hidden_size=64, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.numel() >= 2000:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
    embeddings = model.roberta.embeddings
    assert torch.count_nonzero(embeddings.word_embeddings.weight[1]) == 0
    assert torch.count_nonzero(embeddings.position_embeddings.weight[1]) == 0


def test_transformers_pipeline_classifies_with_our_model(tmp_path):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["a good film", "a bad film"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.model.save(str(tmp_path))
    tiny_config().save_pretrained(tmp_path)
    tokenizer = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    config = tiny_config(vocab_size=len(tokenizer), apply_lora=True, lora_r=4, lora_alpha=8)
    model = randomise_(RobertaForSequenceClassification(config)).eval()
    texts = ["a good film", "bad", "a bad film, a good film"]
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu")
    got = classify(texts, batch_size=3)
    want = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    for scores, row in zip(got, want, strict=True):
        by_label = {score["label"]: score["score"] for score in scores}
        assert [by_label[f"LABEL_{i}"] for i in range(3)] == pytest.approx(row.tolist(), abs=1e-6)


def test_input_embeddings_can_be_read_and_replaced():
    model = RobertaForSequenceClassification(tiny_config())
    assert model.get_input_embeddings() is model.roberta.embeddings.word_embeddings
    model.resize_token_embeddings(60)
    assert model.get_input_embeddings().weight.shape == (60, 32) and model.config.vocab_size == 60
    assert model(input_ids=torch.tensor([[0, 59, 2]])).logits.shape == (1, 3)


@pytest.mark.parametrize("as_embeds", [False, True])
def test_a_sequence_beyond_the_position_table_is_refused_with_the_limit(as_embeds):
    model = RobertaForSequenceClassification(
        tiny_config(max_position_embeddings=12)
    )  # 10 positions after the padding's

    def batch(length: int) -> dict[str, Tensor]:
        if as_embeds:
            return {"inputs_embeds": torch.zeros(1, length, 32)}
        return {"input_ids": torch.full((1, length), 5)}

    assert model(**batch(10)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match=r"11 tokens exceeds the model's 10 positions.*max_length=10"):
        model(**batch(11))


def test_padding_beyond_the_position_table_is_no_error():
    model = randomise_(RobertaForSequenceClassification(tiny_config(max_position_embeddings=12))).eval()
    batch = ragged_batch([10, 4])
    padded = {"input_ids": F.pad(batch["input_ids"], (0, 20), value=1)}
    padded["attention_mask"] = (padded["input_ids"] != 1).long()
    assert_close(model(**padded).logits, model(**batch).logits, 1e-6)


@pytest.mark.parametrize("model_class", [RobertaModel, RobertaForSequenceClassification])
def test_both_inputs_or_neither_is_an_error(model_class):
    model = model_class(tiny_config())
    ids = torch.tensor([[0, 5, 2]])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(attention_mask=torch.ones(1, 3))


def test_a_mask_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, seq\] = \[1, 3\], got \[1, 4\]"):
        RobertaModel(tiny_config())(input_ids=torch.tensor([[0, 5, 2]]), attention_mask=torch.ones(1, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_decoder": True}, "is_decoder and add_cross_attention must be false"),
        ({"add_cross_attention": True}, "is_decoder and add_cross_attention must be false"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
    ],
)
def test_a_config_this_model_cannot_honour_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RobertaForSequenceClassification(tiny_config(**settings))
