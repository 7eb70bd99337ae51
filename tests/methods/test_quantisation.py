"""Quantised checkpoints and models: refused, naming the method or the layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, settings_of, tiny_config, tiny_deberta_config
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic
from transformers import AwqConfig, BitsAndBytesConfig, QuantoConfig

from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.converting import merged_state
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.methods.bottleneck import set_bottlenecks_
from lora_nlu.methods.description import description_of
from lora_nlu.methods.lora import set_lora_
from lora_nlu.methods.marking import mark_only_lora_as_trainable, mark_trainable
from lora_nlu.methods.table import METHODS
from lora_nlu.models.loading import load_config

KINDS = {"roberta": tiny_config, "deberta-v2": tiny_deberta_config}
LORA = {"apply_lora": True, "lora_r": 2, "lora_alpha": 4}
REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes, 8 bits": ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "bitsandbytes"),
    "bitsandbytes, 4 bits": ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "bitsandbytes"),
    "a dict": ({"quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}, "torchao"),
    "quanto": ({"quantization_config": QuantoConfig()}, "quanto"),
    "awq": ({"quantization_config": AwqConfig()}, "awq"),
    "an old flag": ({"load_in_8bit": True}, "load_in_8bit"),
    "another old flag": ({"load_in_4bit": True}, "load_in_4bit"),
    "gguf": ({"gguf_file": "model.gguf"}, "gguf_file"),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory) -> tuple[Any, Path]:
    """A classifier and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    model = randomise_(CLASSIFIERS[request.param][0](KINDS[request.param]()))
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("request_name", REQUESTS)
def test_quantisation_requested_on_loading_is_refused_by_name_before_its_package_is_imported(request_name, saved):
    model, folder = saved
    arguments, name = REQUESTS[request_name]
    for model_class in (type(model), type(model.base_model)):
        with pytest.raises(UserError, match=rf"{folder}: quantisation \({name}\).*\n.*--to merged.*own class"):
            model_class.from_pretrained(folder, **arguments)
    again = type(model).from_pretrained(folder, quantization_config=None)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "setting",
    [
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "torchao"},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8"},
        {"quant_method": "not yet known"},
        {"load_in_8bit": True},
    ],
)
def test_a_quantised_checkpoint_is_refused_by_name_however_its_config_is_given(setting, saved, tmp_path):
    model, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": setting}))
    name = setting.get("quant_method", "load_in_8bit")
    for arguments in ((), {"config": model.config_class.from_pretrained(tmp_path)}, {"config": tmp_path}):
        where = folder if arguments else tmp_path
        with pytest.raises(UserError, match=rf"{where}: quantisation \({name}\)"):
            type(model).from_pretrained(pretrained_model_name_or_path=where, **dict(arguments))
    with pytest.raises(UserError, match=rf"--model_name_or_path {tmp_path}: quantisation \({name}\)"):
        load_config(str(tmp_path))


class Int8Linear(nn.Linear):
    """Like a quantised layer of bitsandbytes: a subclass with an int8 weight."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features)
        self.weight = nn.Parameter((old.weight.detach() * 127).to(torch.int8), requires_grad=False)


class ScaledTensor(Tensor):
    """Like a quantised weight of torchao: a tensor subclass whose dtype is float32."""


def with_layer_class(old: nn.Linear) -> nn.Module:
    return Int8Linear(old)


def with_weight_class(old: nn.Linear) -> nn.Module:
    old.weight = nn.Parameter(old.weight.detach().as_subclass(ScaledTensor))
    return old


def with_int8_weight(old: nn.Linear) -> nn.Module:
    new = nn.Linear(old.in_features, old.out_features)
    new.weight = nn.Parameter(old.weight.detach().to(torch.int8), requires_grad=False)
    return new


def with_dynamic_layer(old: nn.Linear) -> nn.Module:
    return dynamic.Linear(old.in_features, old.out_features)


@pytest.mark.parametrize("quantise", [with_layer_class, with_weight_class, with_int8_weight, with_dynamic_layer])
@pytest.mark.parametrize("kind", KINDS)
def test_no_method_is_applied_to_a_model_with_quantised_layers_and_the_error_names_the_layer(kind, quantise, tmp_path):
    def quantised(**settings: Any) -> Any:
        model = CLASSIFIERS[kind][0](KINDS[kind](**settings))
        linear = [n for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear) and ".layer." in n]
        for name in linear:
            parent, _, child = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), child, quantise(model.base_model.get_submodule(name)))
        return model

    trained = {row.name: settings_of(row) for row in METHODS.values() if row.state and row.freezes}
    message = (
        r"attention.self.query(_proj)?(\.weight)? is a .*(Int8Linear|ScaledTensor|int8|dynamic.*Linear).*: quantised"
    )
    for method, settings in trained.items():
        model = CLASSIFIERS[kind][0](KINDS[kind](**settings))
        mark_trainable(model)
        save_adapter(model, tmp_path / method, {})
        with pytest.raises(ValueError, match=message):
            attach_adapter(quantised(), read_adapter(str(tmp_path / method)), None, allow_new_head=False)
        with pytest.raises(ValueError, match=message):  # layers whose update was lost
            mark_trainable(quantised(**settings))
    query = "query" if kind == "roberta" else "query_proj"
    name = f"{kind.removesuffix('-v2')}.encoder.layer.1.attention.self.{query}"
    with pytest.raises(ValueError, match=rf"^{name}(\.weight)? is a "):
        set_lora_(quantised(), {name: (2, 1.0)})
    with pytest.raises(ValueError, match=message):
        mark_only_lora_as_trainable(quantised(**LORA))
    with pytest.raises(ValueError, match=message):
        set_bottlenecks_(quantised(), "pfeiffer", 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_quantised_in_transformers_own_class(kind):
    ours_class, theirs_class = CLASSIFIERS[kind]
    ours = randomise_(ours_class(KINDS[kind](**LORA))).eval()
    state, settings = merged_state(ours)
    theirs = theirs_class(KINDS[kind](**settings)).eval()
    theirs.load_state_dict(state)
    quantised = torch.ao.quantization.quantize_dynamic(theirs, {nn.Linear})
    count = sum(isinstance(module, dynamic.Linear) for module in quantised.modules())
    assert (
        count == sum(isinstance(module, nn.Linear) for module in theirs.modules()) > 12
        and description_of(ours.config).rank
    )
    batch = ragged_batch([17, 3, 9], pad=ours.config.pad_token_id)
    with torch.no_grad():
        assert_close(quantised(**batch).logits, ours(**batch).logits, 0.1)
