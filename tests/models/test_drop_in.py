"""Both models in place of transformers' own: configs, arguments, hooks and outputs, accepted as there or refused."""

from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config, twins
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, DebertaV2Config, RobertaConfig, Trainer, TrainingArguments

from lora_nlu.models.modeling_deberta_v2 import DebertaV2Model
from lora_nlu.models.modeling_roberta import RobertaModel

KINDS = ["roberta", "deberta-v2"]
SELECTS_LAYERS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)  # output_hidden_states of numbers
BASES = {"roberta": RobertaModel, "deberta-v2": DebertaV2Model}
LENGTHS = [7, 3, 5, 3]


def config_of(kind: str, **settings: Any) -> Any:
    return (tiny_config if kind == "roberta" else tiny_deberta_config)(**settings)


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    return ragged_batch(LENGTHS, pad=1 if kind == "roberta" else 0)


# Configs and arguments of from_pretrained.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", None])
def test_attn_implementation_sdpa_and_eager_are_both_accepted(kind, attention, tmp_path):
    ours, theirs = CLASSIFIERS[kind]
    assert ours._supports_sdpa == theirs._supports_sdpa and ours._can_set_attn_implementation()  # what callers check
    model = randomise_(ours._from_config(config_of(kind), attn_implementation=attention)).eval()
    model.save_pretrained(tmp_path)
    loaded = ours.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert loaded.config._attn_implementation == (attention or "eager")
    loaded.set_attn_implementation("sdpa")
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(**batch_of(kind)).logits, model(**batch_of(kind)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_transformers_class_has_used_builds_our_model(kind, tmp_path):
    ours, theirs = CLASSIFIERS[kind]
    config = config_of(kind)
    model = randomise_(theirs(config)).eval()
    built = ours(config).eval()
    assert config._attn_implementation == ("sdpa" if kind == "roberta" else "eager")  # what transformers set in it
    built.load_state_dict(model.state_dict())
    assert_close(built(**batch_of(kind)).logits, model(**batch_of(kind)).logits)
    model.save_pretrained(tmp_path)
    loaded = ours.from_pretrained(tmp_path, config=model.config).eval()
    assert_close(loaded(**batch_of(kind)).logits, model(**batch_of(kind)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_a_subclass_or_read_by_autoconfig_builds_our_model(kind, tmp_path):
    ours, theirs = CLASSIFIERS[kind]
    subclass = type("Mine", (RobertaConfig if kind == "roberta" else DebertaV2Config,), {})
    model = randomise_(theirs(config_of(kind))).eval()
    model.save_pretrained(tmp_path)
    want = model(**batch_of(kind)).logits
    for config in (subclass.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert_close(ours.from_pretrained(tmp_path, config=config).eval()(**batch_of(kind)).logits, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "nonsense"])
def test_an_unsupported_attn_implementation_is_refused_by_name(kind, attention):
    ours, _ = CLASSIFIERS[kind]
    name = {"flash_attention_2": "Flash Attention 2", "nonsense": '"nonsense"'}.get(attention, attention)
    with pytest.raises(ValueError, match=name):
        ours._from_config(config_of(kind), attn_implementation=attention)
    with pytest.raises(ValueError, match=name):
        ours(config_of(kind)).set_attn_implementation(attention)


# Offloaded weights, and modules that replace ours.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_model_has_the_logits_it_has_in_memory(kind, place, tmp_path):
    settings: dict[str, Any] = {"type_vocab_size": 2, "apply_lora": True, "lora_r": 2, "lora_alpha": 4}
    if kind == "deberta-v2":
        settings |= {"position_biased_input": True, "embedding_size": 20}
    model = randomise_(CLASSIFIERS[kind][0](config_of(kind, **settings))).eval()
    batch = batch_of(kind)
    types = torch.randint(0, 2, batch["input_ids"].shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = [model(**batch).logits, model(**batch, token_type_ids=types).logits]
        if place == "cpu":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        assert model.base_model.embeddings.token_type_embeddings.weight.is_meta
        assert torch.equal(model(**batch).logits, want[0])
        assert torch.equal(model(**batch, token_type_ids=types).logits, want[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_model_is_loaded_with_some_layers_on_disk_and_saved_from_there(kind, tmp_path):
    model = randomise_(CLASSIFIERS[kind][0](config_of(kind, apply_lora=True, lora_r=4, lora_alpha=8))).eval()
    model.save_pretrained(tmp_path / "complete")
    state_names = (
        "",
        model.base_model_prefix,
        f"{model.base_model_prefix}.encoder",
        f"{model.base_model_prefix}.encoder.layer",
    )
    places = {
        name: "disk" if name.endswith("layer.1") else "cpu"
        for name, _ in model.named_modules()
        if name not in state_names and name.rpartition(".")[0] in state_names
    }
    loaded = (
        type(model).from_pretrained(tmp_path / "complete", device_map=places, offload_folder=tmp_path / "off").eval()
    )
    assert loaded.base_model.encoder.layer[1].output.dense.weight.is_meta
    want = model(**batch_of(kind)).logits
    assert_close(loaded(**batch_of(kind)).logits, want)
    loaded.save_pretrained(tmp_path / "again")
    assert_close(type(model).from_pretrained(tmp_path / "again").eval()(**batch_of(kind)).logits, want)
    weights = load_file(tmp_path / "complete" / "model.safetensors")  # what is on disk is no excuse for what is gone
    del weights[next(name for name in weights if "layer.1" in name and "lora_B" in name)]
    save_file(weights, tmp_path / "complete" / "model.safetensors", {"format": "pt"})
    with pytest.raises(KeyError, match="lora_B"):
        loaded = type(model).from_pretrained(tmp_path / "complete", device_map=places, offload_folder=tmp_path / "off")
        loaded(**batch_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_replaces_the_token_type_embeddings_is_called(kind):
    class Doubled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    ours, theirs = twins(config_of(kind, type_vocab_size=2))
    for model in (ours.eval(), theirs.eval()):
        embeddings = model.base_model.embeddings
        other = Doubled(2, 32)
        other.weight = embeddings.token_type_embeddings.weight
        embeddings.token_type_embeddings = other
    assert_close(ours(**batch_of(kind)).logits, theirs(**batch_of(kind)).logits)


# Hidden states and attentions are part of the graph.


MASKS = {
    "right padding": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
    "left padding": [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 1, 0, 0]],
    "one length": [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]],
    "none": None,
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_attentions_have_transformers_values_and_gradients(kind, padding, checkpointed):
    mask = torch.ones(3, 5) if MASKS[padding] is None else torch.tensor(MASKS[padding])
    batch: dict[str, Any] = {
        "input_ids": torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(0)),
        "attention_mask": None if MASKS[padding] is None else mask,
        "labels": torch.arange(3),
    }
    ours, theirs = twins(config_of(kind, num_hidden_layers=3), attn_implementation="eager")
    if checkpointed:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    outputs = []
    for model in (ours, theirs):
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        for x in (*output.hidden_states, *output.attentions):
            x.retain_grad()
        output.loss.backward()
        outputs.append(output)
    got, want = outputs
    real, real_pairs = mask == 1, (mask[:, None, :, None] * mask[:, None, None, :]).expand(-1, 4, -1, -1) == 1
    assert (len(got.hidden_states), len(got.attentions)) == (4, 3)
    for name, positions in (("hidden_states", real), ("attentions", real_pairs)):
        for i, (x, y) in enumerate(zip(getattr(got, name), getattr(want, name), strict=True)):
            assert_close(x[positions], y[positions], what=f"{name}[{i}]")
            assert_close(x.grad[positions], y.grad[positions], 2e-5, what=f"gradient of {name}[{i}]")
            if padding in ("right padding", "one length"):
                assert x.shape == y.shape and not x[~positions].any() and not x.grad[~positions].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_hidden_state_is_the_last_of_the_hidden_states(kind):
    output = BASES[kind](config_of(kind))(**batch_of(kind), output_hidden_states=True)
    assert output.hidden_states[-1] is output.last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_hook_on_a_hidden_state_changes_the_gradients_of_the_layers_before_it(kind):
    gradients = []
    for factor in (1, 0):
        model = randomise_(CLASSIFIERS[kind][0](config_of(kind)))
        output = model(**batch_of(kind), labels=torch.arange(4) % 3, output_hidden_states=True)
        output.hidden_states[1].register_hook(lambda grad, factor=factor: factor * grad)
        output.loss.backward()
        layers = model.base_model.encoder.layer
        gradients.append([layer.intermediate.dense.weight.grad.abs().sum().item() for layer in layers])
    assert gradients[0][0] > 0 and gradients[1][0] == 0
    assert gradients[0][1] == gradients[1][1] > 0


# Arguments of forward, accepted as in transformers or refused by name.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("requested", [[0, -1], [1], 1, -1, 0, (0,), [5], [-4], [], True, False, None])
def test_output_hidden_states_may_be_numbers_of_layers_as_in_transformers(kind, requested):
    ours, theirs = twins(config_of(kind))
    if kind == "roberta" and not isinstance(requested, bool | None) and not SELECTS_LAYERS:
        # this version of transformers returns other states for numbers: those that 5.23 returns are expected
        states = theirs.eval()(**batch_of(kind), output_hidden_states=True).hidden_states
        numbers = {requested} if isinstance(requested, int) else {*requested}
        want = requested and [x if {i, i - len(states)} & numbers else None for i, x in enumerate(states)] or None
    else:
        want = theirs.eval()(**batch_of(kind), output_hidden_states=requested).hidden_states
    got = ours.eval()(**batch_of(kind), output_hidden_states=requested).hidden_states
    if want is None:
        assert got is None
        return
    real = batch_of(kind)["attention_mask"] == 1
    assert [x is None for x in got] == [x is None for x in want]
    for x, y in zip(got, want, strict=True):
        if y is not None:
            assert_close(x[real], y[real])
    base = ours.base_model(**batch_of(kind), output_hidden_states=requested, return_dict=False)
    assert [x is None for x in base[-1]] == [x is None for x in want]


def test_selected_hidden_states_can_be_requested_with_two_views():
    model = CLASSIFIERS["roberta"][0](tiny_config(reg_loss_wgt=1.0))
    output = model(**batch_of("roberta"), labels=torch.arange(4) % 3, output_hidden_states=[-1])
    assert [x if x is None else x.shape for x in output.hidden_states] == [None, None, (4, 7, 32)]


@pytest.mark.parametrize("is_classifier", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_keywords_that_change_nothing_in_an_encoder_are_accepted_as_in_transformers(kind, is_classifier):
    ours, theirs = (model if is_classifier else model.base_model for model in twins(config_of(kind)))
    batch = batch_of(kind)
    for more in (
        {"special_tokens_mask": batch["attention_mask"], "offset_mapping": torch.zeros(4, 7, 2), "length": LENGTHS},
        {"use_cache": True, "past_key_values": None},
        {"encoder_hidden_states": None, "encoder_attention_mask": None, "head_mask": None, "is_causal": False},
        {"overflow_to_sample_mapping": torch.arange(4), "cache_position": torch.arange(7)},
    ):
        got, want = (model.eval()(**batch, **more)[0] for model in (ours, theirs))
        if is_classifier:
            assert_close(got, want)
        else:
            assert_close(got[batch["attention_mask"] == 1], want[batch["attention_mask"] == 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        *((name, ValueError) for name in ("past_key_values", "encoder_hidden_states", "head_mask", "is_causal")),
        *((name, TypeError) for name in ("atention_mask", "label", "num_items_in_batch", "decoder_input_ids")),
    ],
)
def test_keywords_that_would_be_ignored_or_are_misspelled_are_refused_by_name(kind, name, error):
    model = CLASSIFIERS[kind][0](config_of(kind))
    for forward in (model, model.base_model):
        with pytest.raises(error, match=name):
            forward(**batch_of(kind), **{name: torch.ones(4, 7)})


def test_transformers_trainer_takes_the_loss_as_a_mean_and_keeps_the_columns_it_always_kept(tmp_path):
    for kind in KINDS:
        trainer = Trainer(CLASSIFIERS[kind][0](config_of(kind)), TrainingArguments(str(tmp_path), use_cpu=True))
        assert trainer.model_accepts_loss_kwargs is False and trainer.label_names == ["labels"]
        trainer._set_signature_columns_if_needed()
        assert {"input_ids", "attention_mask", "label"} < {*trainer._signature_columns}
        assert not {"special_tokens_mask", "length"} & {*trainer._signature_columns}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_by_query_and_key_and_additive_masks_are_refused(kind):
    model, ids = CLASSIFIERS[kind][0](config_of(kind)), torch.full((2, 3), 5)
    for shape in ((2, 3, 3), (2, 1, 3, 3), (2, 1, 1, 3)):
        with pytest.raises(ValueError, match=r"\[batch, seq\] = \[2, 3\], got .* by query and key, are not supported"):
            model(ids, torch.ones(shape))
    for low in (-torch.inf, -1e4, torch.finfo(torch.float32).min, 0.5):
        with pytest.raises(ValueError, match="attention_mask has values other than 0 and 1"):
            model(ids, torch.tensor([[0.0, 0, 0], [0, 0, low]]))
    want = model.eval()(ids, torch.tensor([[1, 1, 1], [1, 1, 0]])).logits
    for dtype in (torch.bool, torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(model(ids, torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=dtype)).logits, want)


@pytest.mark.parametrize("weight", [0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (0, 0), (6,), (2, 3, 1)])
def test_an_empty_batch_or_one_of_another_rank_is_refused_by_name(kind, shape, weight):
    model, ids = CLASSIFIERS[kind][0](config_of(kind, reg_loss_wgt=weight)), torch.zeros(shape, dtype=torch.long)
    for mask in (None, torch.ones(shape)):
        with pytest.raises(ValueError, match=r"input_ids must be \[batch, seq\], at least one token of one sequence"):
            model(ids, mask, labels=torch.zeros(shape[0]).long())
        with pytest.raises(ValueError, match=r"inputs_embeds must be \[batch, seq, H\]"):
            model.base_model(
                None, mask, inputs_embeds=torch.zeros(shape[:2]) if len(shape) != 2 else ids[..., None] * 1.0
            )


# Edge cases of configs.


@pytest.mark.parametrize("padding", MASKS)
def test_a_roberta_without_layers_computes_what_transformers_does(padding):
    ours, theirs = twins(tiny_config(num_hidden_layers=0))
    ids = torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = None if MASKS[padding] is None else torch.tensor(MASKS[padding])
    got, want = (model(ids, mask, labels=torch.arange(3)) for model in (ours, theirs))
    assert_close(got.logits, want.logits)
    got.loss.backward()
    want.loss.backward()
    for name, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad, what=name)


@pytest.mark.parametrize("padding", MASKS)
def test_a_deberta_without_layers_returns_its_embeddings(padding):  # transformers' class can't run
    model = randomise_(CLASSIFIERS["deberta-v2"][0](tiny_deberta_config(num_hidden_layers=0))).eval()
    ids = torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = None if MASKS[padding] is None else torch.tensor(MASKS[padding])
    output = model(ids, mask, output_hidden_states=True)
    assert torch.equal(output.logits, model.classifier(model.dropout(model.pooler(output.hidden_states[0]))))
    assert_close(model(ids, mask).logits, output.logits, 1e-6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kinds", ["None", "", None, [], ["none"], "c2p", ["c2p"], "none|p2c", " C2P | P2C ", ["p2c"]])
def test_pos_att_type_is_read_as_transformers_reads_it(kinds, shared):
    ours, theirs = twins(tiny_deberta_config(pos_att_type=kinds, share_att_key=shared))
    assert_close(ours(**batch_of("deberta-v2")).logits, theirs(**batch_of("deberta-v2")).logits)


def test_pos_att_type_set_to_a_string_after_the_configs_construction_is_read_too():
    config = tiny_deberta_config(pos_att_type=None)
    config.pos_att_type = "c2p|p2c"
    ours, theirs = twins(config)
    assert_close(ours(**batch_of("deberta-v2")).logits, theirs(**batch_of("deberta-v2")).logits)


# Labels that don't fit.


@pytest.mark.parametrize("weight", [0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_problem_type_is_refused_by_name(kind, weight):  # transformers returns no loss
    model = CLASSIFIERS[kind][0](config_of(kind, reg_loss_wgt=weight))
    vars(model.config)["problem_type"] = "classification"  # as from a file: huggingface_hub 1 refuses to set it
    for labels in (torch.arange(4) % 3, torch.rand(4, 3)):
        with pytest.raises(
            ValueError, match="config.problem_type 'classification' is none of regression, single_label"
        ):
            model(**batch_of(kind), labels=labels)
    assert model(**batch_of(kind)).logits.shape == (4, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_regression_labels_of_another_shape_than_the_logits_are_refused(kind):
    for count, wrong in ((2, [(8,), (2, 4), (4, 1), (4,)]), (1, [(3,), (8,), (4, 2)])):
        model = CLASSIFIERS[kind][0](config_of(kind, num_labels=count, problem_type="regression"))
        for shape in wrong:
            with pytest.raises(ValueError, match=rf"needs labels of the logits' shape \[4, {count}\], got"):
                model(**batch_of(kind), labels=torch.zeros(shape))
        for shape in [(4, 2)] if count == 2 else [(4,), (4, 1)]:
            assert model(**batch_of(kind), labels=torch.zeros(shape)).loss.shape == ()


# Dropout, changed as users do, by its modules.


def dropouts(model: nn.Module) -> dict[str, nn.Dropout]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}


@pytest.mark.parametrize("settings", [{}, {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.5}])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_set_to_0_in_every_dropout_module_is_off(kind, settings):
    model = randomise_(
        CLASSIFIERS[kind][0](config_of(kind, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, **settings))
    )
    model.requires_grad_(False)  # attention of the kernels; without this DeBERTa's is torch's
    want = model.eval()(**batch_of(kind)).logits
    for module in dropouts(model).values():
        module.p = 0
    assert_close(model.train()(**batch_of(kind)).logits, want)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_drops_by_the_mode_of_the_module_that_transformers_asks(kind, grad):
    # RoBERTa's attention asks the module of the attention, DeBERTa's the module of the dropout.
    for model in twins(config_of(kind, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)):
        on_alone, off_alone = [], []
        for mode, differ in ((False, on_alone), (True, off_alone)):
            model.train(mode)
            for name, module in dropouts(model).items():
                module.train(not mode and "attention.self.dropout" in name)
            with torch.set_grad_enabled(grad):
                one, other = (model(**batch_of(kind)).logits for _ in range(2))
            differ.append((one - other).abs().max() > 1e-3)
        assert on_alone == [kind == "deberta-v2"] and off_alone == [kind == "roberta"], type(model)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("outputs", [{}, {"output_hidden_states": True}, {"output_attentions": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tuple_has_its_parts_in_transformers_order(kind, outputs, pooled):
    classes = (BASES[kind], getattr(transformers, BASES[kind].__name__))
    settings = {"add_pooling_layer": pooled} if kind == "roberta" else {}
    ours, theirs = (each(config_of(kind), **settings).eval() for each in classes)
    ours.load_state_dict(randomise_(theirs).state_dict())
    theirs.set_attn_implementation("eager")
    inputs = {"input_ids": batch_of(kind)["input_ids"], **outputs}
    assert [*ours(**inputs)] == [name for name in theirs(**inputs) if name != "cross_attentions"]  # ()
    got, want = (model(**inputs, return_dict=False) for model in (ours, theirs))
    for mine, other in zip(got, want, strict=False):
        for x, y in zip(*(each if isinstance(each, tuple) else (each,) for each in (mine, other)), strict=True):
            assert_close(x, y)


# Code written for transformers' classes.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"type_vocab_size": 2, "embedding_size": 16, "share_att_key": False}])
def test_parameters_come_in_transformers_order(kind, settings):
    """By which an optimizer's state, `parameters_to_vector` and the weights of a seed go."""
    ours, theirs = CLASSIFIERS[kind]
    torch.manual_seed(0)
    mine = ours(config_of(kind, **settings))
    torch.manual_seed(0)
    other = theirs(config_of(kind, **settings))
    names = [name for name, _ in mine.named_parameters()]
    assert names == [name for name, _ in other.named_parameters()]
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), other.parameters(), strict=True))


class MeanPooled(nn.Module):
    """A head that reads every token: [B, S, H] to [B, C]; [B, H] as a DeBERTa's pooler."""

    def __init__(self, size: int, labels: int | None) -> None:
        super().__init__()
        self.dense = nn.Linear(size, labels or size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.dense(features[:, :3].mean(1))  # the shortest sequence has three tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["replaced", "theirs", "patched", "called"])
def test_a_head_in_the_place_of_ours_reads_what_it_reads_in_transformers_class(kind, how):
    ours, theirs = twins(config_of(kind))
    name = "classifier" if kind == "roberta" else "pooler"
    batch = batch_of(kind)
    if how == "replaced":
        head = randomise_(MeanPooled(32, 3 if kind == "roberta" else None))
        for model in (ours, theirs):
            setattr(model, name, head)
    elif how == "theirs":
        setattr(ours, name, getattr(theirs, name))
    elif how == "patched":
        head = randomise_(MeanPooled(32, 3 if kind == "roberta" else None))
        for model in (ours, theirs):
            getattr(model, name).forward = head.forward
    else:
        for model in (ours, theirs):
            hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
            model.called = getattr(model, name)(hidden)
        assert_close(ours.called, theirs.called)
    assert_close(ours(**batch).logits, theirs(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_torch_func_of_a_loss_that_takes_its_batch_as_arguments_are_transformers(kind):
    ours, theirs = twins(config_of(kind))
    batch = batch_of(kind)

    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        def loss(parameters: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            return torch.func.functional_call(model, parameters, (), inputs).loss

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.grad(loss)(
            parameters, batch["input_ids"], batch["attention_mask"], torch.tensor([0, 1, 2, 1])
        )

    want = gradients(theirs)
    largest = max(grad.abs().max().item() for grad in want.values())
    for name, grad in gradients(ours).items():
        assert_close(grad, want[name], scale=largest, what=name)
