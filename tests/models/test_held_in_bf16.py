"""Models whose frozen weights are held in bf16: as near to float64 as torch's autocast, in every method and mode."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, RobertaConfig

from lora_nlu import mark_trainable, merge_lora_, save_adapter, unmerge_lora_
from lora_nlu.errors import UserError
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.models.loading import base_fingerprint
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.ops.packing import PackedBatch

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60,
    "max_position_embeddings": 40, "num_labels": 3, "initializer_range": 0.1, "pad_token_id": 0,
}  # fmt: skip
OF_DEBERTA = {
    "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu",
    "type_vocab_size": 0,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**SIZES)),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config(**SIZES, **OF_DEBERTA)),
}
LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8}
EVERYWHERE = {"lora_target_modules": "query,key,value,dense,intermediate,output"}
METHODS = {
    "lora": LORA,
    "lora everywhere": LORA | EVERYWHERE,
    "dora": LORA | {"lora_variant": "dora"},
    "dora everywhere": LORA | EVERYWHERE | {"lora_variant": "dora"},
    "houlsby": {"apply_adapter": True, "adapter_type": "houlsby", "adapter_size": 4},
    "pfeiffer": {"apply_adapter": True, "adapter_type": "pfeiffer", "adapter_size": 4},
    "bitfit": {"apply_bitfit": True},
    "lora and biases": LORA | {"apply_bitfit": True},
    "head": {"head_only": True},
}


@pytest.fixture(scope="module", params=[*MODELS])
def base(request, tmp_path_factory) -> tuple[str, Path]:
    torch.manual_seed(0)
    kind, config = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    kind(copy.deepcopy(config)).save_pretrained(folder)
    return request.param, folder


def load(base: tuple[str, Path], dropout: float = 0.0, **settings: Any) -> Any:
    kind, config = MODELS[base[0]]
    config = kind.config_class.from_pretrained(base[1])
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    model = kind.from_pretrained(base[1], config=config)
    mark_trainable(model)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # lora_B starts at 0, where most gradients vanish
            nn.init.normal_(parameter, std=0.1, mean=float("magnitude" in name))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 60, (6, 20), generator=generator)
    mask = (torch.arange(20) < torch.tensor([20, 3, 17, 17, 9, 20])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.randint(3, (6,), generator=generator)}


def step(model: Any, autocast: bool = False, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(**(inputs or batch()))
    output.loss.backward()
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach().double(), grads


def distance(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The length of all differences together, relative to that of all gradients."""
    assert got.keys() == exact.keys()
    lengths = [sum((x**2).sum() for x in of.values()) for of in ({n: got[n] - exact[n] for n in got}, exact)]
    return float((lengths[0] / lengths[1]) ** 0.5)


@pytest.mark.parametrize("method", [*METHODS])
def test_logits_and_gradients_are_no_farther_from_float64_than_under_autocast(base, method):
    exact_logits, exact_grads = step(load(base, **METHODS[method]).double())
    held = load(base, **METHODS[method])
    assert held.hold_in_bf16(trains=True) == 12 and held.is_held_in_bf16
    logits, grads = step(held)
    theirs, their_grads = step(load(base, **METHODS[method]), autocast=True)
    errors = [float((x - exact_logits).abs().max()) for x in (logits, theirs)]
    distances = [distance(x, exact_grads) for x in (grads, their_grads)]
    print(f"{base[0]}, {method}: logits {errors[0]:.1e}, autocast {errors[1]:.1e}; gradients {distances}")
    # Errors of one draw scatter: a factor of 1.5 is below what would be another number of roundings.
    assert errors[0] <= 1.5 * errors[1] and distances[0] <= 1.5 * distances[1]
    assert 1e-5 < errors[0] < 0.05 and distances[0] < 0.05
    assert all(p.dtype is torch.float32 for p in held.parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", ["gradient checkpointing", "R-Drop", "cutoff", "lora dropout", "attentions", "holes"])
def test_every_mode_computes_in_bf16_what_it_computes_in_fp32(base, mode):
    settings, inputs = dict(LORA), batch()
    if mode in ("R-Drop", "cutoff"):
        settings |= {"reg_loss_wgt": 1.0, "masking_prob": 0.3 * (mode == "cutoff"), "unk_token_id": 3}
        settings |= {"special_token_ids": [0, 1, 2]}
    if mode == "holes":
        inputs["attention_mask"][0, 5] = 0
    if mode == "attentions":
        inputs["output_attentions"] = True
    held, plain = load(base, **settings), load(base, **settings)
    assert held.hold_in_bf16(trains=True)
    for model in (held, plain):
        if mode == "gradient checkpointing":
            model.gradient_checkpointing_enable()
        if mode == "lora dropout":
            for layer in model.modules():
                if isinstance(layer, LoRALinear):
                    layer.lora_dropout = 0.5
    results = []
    for model in (held, plain):
        torch.manual_seed(5)
        results.append(step(model, **inputs))
    (logits, grads), (exact_logits, exact_grads) = results
    assert (logits - exact_logits).abs().max() < 0.03 and distance(grads, exact_grads) < 0.05


def test_a_plan_of_fixed_size_computes_in_bf16_what_it_computes_in_fp32(base):
    held, plain, inputs = load(base, **LORA), load(base, **LORA), batch()
    held.hold_in_bf16(trains=True)
    inputs["packed"] = PackedBatch.of_size(inputs["attention_mask"], 96)  # 86 tokens
    (logits, grads), (exact_logits, exact_grads) = step(held, **inputs), step(plain, **inputs)
    assert (logits - exact_logits).abs().max() < 0.03 and distance(grads, exact_grads) < 0.05


def test_padding_and_the_order_of_a_batch_change_no_bit_and_neither_does_evaluation_twice(base):
    model = load(base, **LORA).eval()
    model.hold_in_bf16(trains=False)
    inputs = {name: x for name, x in batch().items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, logits)
        order = torch.tensor([3, 0, 5, 1, 2, 4])
        # sums over other rows never mix, but oneDNN may choose another kernel for another number of rows
        other = model(**{name: nn.functional.pad(x[order], (0, 7)) for name, x in inputs.items()}).logits
    torch.testing.assert_close(other, logits[order], rtol=0.02, atol=0.02)


def test_a_held_model_saves_its_adapter_and_reads_its_exact_weights_to_merge_or_to_be_saved(base, tmp_path):
    model, plain = load(base, **LORA), load(base, **LORA)
    fingerprint = base_fingerprint(model)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    assert model.hold_in_bf16(trains=True) == 12 == sum(p.is_mkldnn for p in model.parameters())
    assert base_fingerprint(model) == fingerprint
    save_adapter(model, tmp_path / "held", {})
    save_adapter(plain, tmp_path / "plain", {})
    for name in ("adapter_model.safetensors", "adapter_config.json", "run_metadata.json"):
        assert (tmp_path / "held" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    with pytest.raises(RuntimeError, match="restore_weights"):
        model.state_dict()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="can't be copied or pickled.*restore_weights"):
            copied(model)
    layer = next(module for module in model.modules() if isinstance(module, LoRALinear))
    assert model.to("cpu:0") is model
    for move in (layer.double, layer.bfloat16, lambda: layer.to("meta")):
        with pytest.raises(RuntimeError, match="can't be moved or converted"):
            move()
    with pytest.raises(ValueError, match="restore_weights"):
        layer.merge()
    merge_lora_(model)
    merge_lora_(plain)
    assert torch.equal(layer.weight, next(m for m in plain.modules() if isinstance(m, LoRALinear)).weight)
    unmerge_lora_(model)
    assert not model.is_held_in_bf16
    for name, x in model.state_dict().items():
        assert torch.equal(x, weights[name]), name
    assert model.hold_in_bf16(trains=True)
    model.save_pretrained(tmp_path / "saved")  # restores too
    assert not model.is_held_in_bf16


def test_weights_are_held_only_where_a_file_can_give_them_back_and_a_changed_file_is_an_error(base, tmp_path):
    kind, config = MODELS[base[0]]
    drawn = kind(copy.deepcopy(config))
    drawn.base_model.requires_grad_(False)
    assert drawn.hold_in_bf16(trains=True) == 0 and not drawn.is_held_in_bf16
    assert load(base).hold_in_bf16(trains=True) == 0  # everything trains
    assert load(base).hold_in_bf16(trains=False) == 12
    load(base).save_pretrained(tmp_path)
    model = load((base[0], tmp_path), **LORA)
    model.hold_in_bf16(trains=True)
    load(base).double().float().save_pretrained(tmp_path)
    model.restore_weights()  # the same numbers
    model.hold_in_bf16(trains=True)
    drawn.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the files have changed"):
        model.restore_weights()
    assert model.is_held_in_bf16
