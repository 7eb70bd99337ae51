"""Both models in the place of transformers' own: its configs, arguments, hooks and outputs, taken or refused."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config, twins
from torch import nn
from transformers import AutoConfig, DebertaV2Config, RobertaConfig

from lora_nlu.modeling_deberta_v2 import DebertaV2Model
from lora_nlu.modeling_roberta import RobertaModel

KINDS = ["roberta", "deberta-v2"]
BASES = {"roberta": RobertaModel, "deberta-v2": DebertaV2Model}
LENGTHS = [7, 3, 5, 3]


def config_of(kind: str, **settings: Any) -> Any:
    return (tiny_config if kind == "roberta" else tiny_deberta_config)(**settings)


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    return ragged_batch(LENGTHS, pad=1 if kind == "roberta" else 0)


# Configs and arguments of from_pretrained.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", None])
def test_either_name_of_transformers_attentions_is_ours(kind, attention, tmp_path):
    ours, _ = CLASSIFIERS[kind]
    model = randomise_(ours._from_config(config_of(kind), attn_implementation=attention)).eval()
    model.save_pretrained(tmp_path)
    loaded = ours.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert loaded.config._attn_implementation == (attention or "eager")
    loaded.set_attn_implementation("sdpa")
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(**batch_of(kind)).logits, model(**batch_of(kind)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_transformers_class_has_used_makes_our_model(kind, tmp_path):
    ours, theirs = CLASSIFIERS[kind]
    config = config_of(kind)
    model = randomise_(theirs(config)).eval()
    mine = ours(config).eval()
    assert config._attn_implementation == ("sdpa" if kind == "roberta" else "eager")  # what transformers made of it
    mine.load_state_dict(model.state_dict())
    assert_close(mine(**batch_of(kind)).logits, model(**batch_of(kind)).logits)
    model.save_pretrained(tmp_path)
    loaded = ours.from_pretrained(tmp_path, config=model.config).eval()
    assert_close(loaded(**batch_of(kind)).logits, model(**batch_of(kind)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_a_subclass_or_read_by_autoconfig_makes_our_model(kind, tmp_path):
    ours, theirs = CLASSIFIERS[kind]
    subclass = type("Mine", (RobertaConfig if kind == "roberta" else DebertaV2Config,), {})
    model = randomise_(theirs(config_of(kind))).eval()
    model.save_pretrained(tmp_path)
    want = model(**batch_of(kind)).logits
    for config in (subclass.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert_close(ours.from_pretrained(tmp_path, config=config).eval()(**batch_of(kind)).logits, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "nonsense"])
def test_an_attention_we_lack_is_refused_by_name(kind, attention):
    ours, _ = CLASSIFIERS[kind]
    name = {"flash_attention_2": "Flash Attention 2", "nonsense": '"nonsense"'}.get(attention, attention)
    with pytest.raises(ValueError, match=name):
        ours._from_config(config_of(kind), attn_implementation=attention)
    with pytest.raises(ValueError, match=name):
        ours(config_of(kind)).set_attn_implementation(attention)


# Offloaded weights, and modules in the place of ours.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_model_has_the_logits_it_has_in_memory(kind, place, tmp_path):
    settings = {"type_vocab_size": 2}
    if kind == "deberta-v2":
        settings |= {"position_biased_input": True, "embedding_size": 20, "relative_attention": False}
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
def test_another_module_in_the_place_of_the_token_types_is_called(kind):
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
    real, pairs = mask == 1, (mask[:, None, :, None] * mask[:, None, None, :]).expand(-1, 4, -1, -1) == 1
    assert (len(got.hidden_states), len(got.attentions)) == (4, 3)
    for name, places in (("hidden_states", real), ("attentions", pairs)):
        for i, (x, y) in enumerate(zip(getattr(got, name), getattr(want, name), strict=True)):
            assert_close(x[places], y[places], what=f"{name}[{i}]")
            assert_close(x.grad[places], y.grad[places], 2e-5, what=f"gradient of {name}[{i}]")
            if padding in ("right padding", "one length"):
                assert x.shape == y.shape and not x[~places].any() and not x.grad[~places].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_hidden_state_is_the_last_of_the_hidden_states(kind):
    output = BASES[kind](config_of(kind))(**batch_of(kind), output_hidden_states=True)
    assert output.hidden_states[-1] is output.last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_a_hidden_state_in_a_hook_of_its_gradient_reaches_the_layers_before_it(kind):
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
