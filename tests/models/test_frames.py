"""From the loss to the matmul: how many of our functions a call goes through, and which modules fire their hooks."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from torch import Tensor

import lora_nlu
from lora_nlu.methods.marking import mark_trainable
from lora_nlu.models.modeling_deberta_v2 import DebertaV2Model
from lora_nlu.models.modeling_roberta import RobertaModel
from lora_nlu.ops import kernels

SOURCE = str(Path(lora_nlu.__file__).parent)
MOST_FRAMES = 8
RECORDED = Path(__file__).with_name("hooks.json")  # written when the models' forwards were in mixins
LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8}
# name: config, settings, compiled functions that a training step can't use there
CONFIGS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "roberta": (tiny_config, {}, set()),
    "roberta, dropout in LoRA": (tiny_config, {"lora_dropout": 0.1}, {"add_low_rank"}),
    "deberta-v2": (tiny_deberta_config, {}, set()),
    "deberta-v2, own relative projections": (tiny_deberta_config, {"share_att_key": False}, set()),
    "deberta-v2, updated relative query": (tiny_deberta_config, {"lora_relative_query": True}, {"attention"}),
}


MODULES: dict[str, tuple[Any, Any]] = {
    "RobertaModel": (tiny_config, RobertaModel),
    "RobertaForSequenceClassification": (tiny_config, CLASSIFIERS["roberta"][0]),
    "DebertaV2Model": (tiny_deberta_config, DebertaV2Model),
    "DebertaV2ForSequenceClassification": (tiny_deberta_config, CLASSIFIERS["deberta-v2"][0]),
}


def our_frames() -> list[str]:
    """The functions of this package that are running, outermost first."""
    frame, names = sys._getframe(), []
    while frame := frame.f_back:
        if frame.f_code.co_filename.startswith(SOURCE):
            names.append(frame.f_code.co_qualname)
    return names[::-1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Of every product by oneDNN and every compiled function, as they are called: its name and our frames."""
    calls: list[tuple[str, list[str]]] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append((name, our_frames()))
            return function(*args)

        return call

    class Library:
        def __getattr__(self, name: str) -> Any:
            return recorded(name, getattr(compiled, name))

    compiled, product = kernels.library(), recorded("product", kernels.ONEDNN_LINEAR)
    monkeypatch.setattr(kernels, "library", Library)
    monkeypatch.setattr(kernels, "ONEDNN_LINEAR", product)
    monkeypatch.setattr(kernels, "has_onednn", lambda: True)  # on any processor
    return calls


@pytest.mark.skipif(kernels.library() is None or kernels.ONEDNN_LINEAR is None, reason="needs g++ and oneDNN")
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_at_most_8_of_our_frames_are_between_the_loss_and_each_product_and_attention(name, trains, calls):
    make_config, settings, unused = CONFIGS[name]
    config = make_config(**LORA, **settings, attention_probs_dropout_prob=0.1)
    model = randomise_(CLASSIFIERS[config.model_type][0](config)).train(trains)
    mark_trainable(model)
    with torch.set_grad_enabled(trains):
        assert model(**ragged_batch([5, 3, 7]), labels=torch.arange(3)).loss.isfinite()
    assert {name for name, _ in calls} >= {"product", "attention", "add_low_rank"} - (unused if trains else set())
    assert sum(name == "product" for name, _ in calls) >= 2 * 6  # every dense layer of both encoder layers
    for function, frames in calls:
        if function in ("product", "attention"):
            assert frames[0] == f"{type(model).__name__}.forward"
            assert len(frames) <= MOST_FRAMES, (function, frames)


# Hooks.


def shapes(x: Any) -> list[list[int]]:
    """The shapes of the tensors in what a module takes or returns."""
    if isinstance(x, Tensor):
        return [list(x.shape)]
    if isinstance(x, dict):
        x = list(x.values())
    elif hasattr(x, "rows"):  # EncoderOutputs
        x = [x.rows, *x.hidden_states, *x.attentions]
    return [shape for part in x for shape in shapes(part)] if isinstance(x, (list, tuple)) else []


def hooked_calls(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[list[Any]]:
    """Of each call of a module, in the order of their ends: its name, the shapes of its inputs and of its outputs."""
    ended: list[list[Any]] = []
    begun: list[list[Any]] = []

    def before(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        begun.append([name, shapes(args) + shapes(kwargs)])

    def after(name: str, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        assert begun.pop() == [name, shapes(args) + shapes(kwargs)]
        ended.append([name, shapes(args) + shapes(kwargs), shapes(output)])

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, *inputs, name=name: before(name, *inputs), with_kwargs=True)
        module.register_forward_hook(lambda _, *results, name=name: after(name, *results), with_kwargs=True)
    model(**inputs)
    assert not begun
    return ended


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_every_module_fires_its_hooks_in_order_with_the_recorded_shapes(kind, trains):
    recorded = json.loads(RECORDED.read_text())[kind]
    make_config, model_class = MODULES[kind]
    config = make_config(**LORA, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model = randomise_(model_class(config)).train(trains)
    labels = {} if kind.endswith("Model") else {"labels": torch.arange(3)}
    calls = hooked_calls(model, ragged_batch([5, 3, 7], pad=config.pad_token_id) | labels)
    assert calls == recorded
    silent = {name for name, _ in model.named_modules()} - {name for name, *_ in calls}
    assert all(name.endswith(("encoder.layer", "attention.self.dropout")) for name in silent), silent
