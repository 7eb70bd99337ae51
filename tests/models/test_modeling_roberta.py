"""Our RoBERTa against transformers' with the same weights, the reference implementation's goldens, and PEFT."""

import copy

import pytest
import torch
import transformers
from helpers import (
    ROBERTA_INPUTS,
    assert_close,
    assert_same_gradients,
    inputs_of,
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


@pytest.mark.parametrize("kind", ROBERTA_INPUTS)
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


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_activation_layer_norm_eps_and_sizes_come_from_the_config(act):
    config = tiny_config(hidden_act=act, layer_norm_eps=0.1, num_attention_heads=2, num_hidden_layers=3, pad_token_id=0)
    ours, theirs = twins(config)
    inputs = ragged_batch(LENGTHS)
    inputs["input_ids"] *= inputs["attention_mask"]  # padding token 0
    assert_same_training_step(ours, theirs, inputs, torch.arange(5) % 3)


@pytest.mark.parametrize("kind", ROBERTA_INPUTS)
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


# LoRA in the complete model, against PEFT.


@pytest.mark.parametrize("kind", ["right padding", "left padding", "holes"])
def test_lora_in_the_complete_model_has_pefts_logits_and_gradients(kind):
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_decoder": True}, "is_decoder and add_cross_attention must be false"),
        ({"add_cross_attention": True}, "is_decoder and add_cross_attention must be false"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
    ],
)
def test_a_config_this_model_does_not_support_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RobertaForSequenceClassification(tiny_config(**settings))
