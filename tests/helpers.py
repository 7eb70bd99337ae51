"""What several test files share: tiny configs, random weights, ragged batches, comparisons, golden files."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import DebertaV2Config, RobertaConfig

from lora_nlu.methods.method import Method
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

# model type: our classifier, transformers' own
CLASSIFIERS: dict[str, tuple[Any, Any]] = {
    "roberta": (RobertaForSequenceClassification, transformers.RobertaForSequenceClassification),
    "deberta-v2": (DebertaV2ForSequenceClassification, transformers.DebertaV2ForSequenceClassification),
}
# The kinds of `inputs_of` that the models are tested with.
ROBERTA_INPUTS = [
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
DEBERTA_INPUTS = [
    *ROBERTA_INPUTS,
    "a row with nothing in it",
    "one row of token types",
    "token types and position_ids, left padding",
]
GOLDENS = Path(__file__).parent / "goldens"


def settings_of(row: Method) -> dict[str, Any]:
    """Config settings that choose a method of the table: its switch and what goes with it, and 4 for each size."""
    others = {"target_rank": 2, "init_warmup": 0, "final_warmup": 1, "mask_interval": 1}
    flags = [flag for flag in row.flags if flag.kind is int or (flag.kind is float and flag.below is None)]
    sizes = {flag.name: others.get(flag.name, 4) for flag in flags}
    return {**row.chosen_by, **sizes}


def flags_of(row: Method) -> list[str]:
    """The same choice on run_glue.py's command line; the switch comes first."""
    flags = [(f"--{name}", [] if value is True else [str(value)]) for name, value in settings_of(row).items()]
    return [word for flag, values in flags for word in (flag, *values)]


def tiny_config(**settings: Any) -> RobertaConfig:
    """Hidden 32, 2 layers, no dropout, weights wide enough that every part of the model moves the logits."""
    base = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
        "num_labels": 3,
        "pad_token_id": 1,
    }
    return RobertaConfig(**{**base, **settings})


def tiny_deberta_config(**settings: Any) -> DebertaV2Config:
    """The same size in the style of v2-xxlarge: buckets, shared keys, convolution; no dropout."""
    base = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "type_vocab_size": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
        "layer_norm_eps": 1e-7,
        "num_labels": 3,
        "pad_token_id": 0,
        "relative_attention": True,
        "position_buckets": 8,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    }
    return DebertaV2Config(**{**base, **settings})


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, also biases, LayerNorms, padding rows and lora_B: a forgotten one then shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise + 1 if name.endswith("LayerNorm.weight") else noise)
    return model


def twins(config: Any, seed: int = 0, attn_implementation: str | None = None) -> tuple[Any, Any]:
    """Our classifier and transformers' with the same random weights, in train mode."""
    ours_class, theirs_class = CLASSIFIERS[config.model_type]
    theirs_config = copy.deepcopy(config)  # transformers writes problem_type into it
    if attn_implementation:
        theirs_config._attn_implementation = attn_implementation
    theirs = randomise_(theirs_class(theirs_config), seed)
    ours = ours_class(config)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(), theirs.train()


def ragged_batch(lengths: list[int], vocab_size: int = 50, seed: int = 0, pad: int = 1) -> dict[str, Tensor]:
    """Random sequences of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, vocab_size, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}


def assert_close(
    got: Tensor, want: Tensor, tolerance: float = 1e-5, scale: float | None = None, what: str = ""
) -> None:
    """max|got - want| <= tolerance * scale, the scale being max|want| unless given; shapes and dtypes equal."""
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{what}: {got.shape, got.dtype, want.shape, want.dtype}"
    )
    scale = want.abs().max().item() if scale is None else scale
    error = (got - want).abs().max().item()
    assert error <= tolerance * scale, f"{what}: off by {error:.3g}, {error / scale if scale else 0:.3g} of {scale:.3g}"


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float = 2e-5) -> None:
    """The same parameters have gradients, equal to `tolerance` of each one's largest entry.

    2e-5, not 1e-5: a gradient sums over all tokens, in an order that padding changes; the reference's own fp32 and
    float64 gradients differ by 2e-6 on 48 tokens.
    """
    got, want = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert got.keys() == want.keys()
    for name, parameter in want.items():
        if parameter.grad is None:
            assert got[name].grad is None, name
            continue
        assert got[name].grad is not None, name
        scale = parameter.grad.abs().max().item()
        for part in ("query", "key"):
            # The exact gradient of a key's bias is 0 (softmax ignores what is added to all keys), and so are those of
            # query and key over a single token; what is left there is the rounding of terms of about the value's size.
            if f".{part}." in name:
                scale = max(scale, 0.1 * want[name.replace(part, "value")].grad.abs().max().item())
        assert_close(got[name].grad, parameter.grad, tolerance, scale, name)


def is_zero_in_theory(name: str) -> bool:
    """Softmax ignores what is added to all keys alike: biases of keys, the relative norm's without p2c."""
    return name.endswith("key_proj.bias") or name == "deberta.encoder.LayerNorm.bias"


def assert_same_deberta_gradients(ours: nn.Module, theirs: nn.Module, one_token: bool = False) -> None:
    """As `assert_same_gradients`, for DeBERTa.

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


def inputs_of(kind: str, pad: int = 1, embedding_size: int = 32) -> dict[str, Tensor]:
    """One batch of each kind of input that the model takes."""
    batch = ragged_batch([9, 4, 6, 4, 1], pad=pad)
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
        ids[0, 2] = ids[0, 5] = ids[2, 0] = pad
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


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of one golden case (goldens/README.md)."""
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return tensors, json.loads((GOLDENS / f"{name}.json").read_text())


def golden_model(name: str, **settings: Any) -> Any:
    """Our classifier with a golden case's config and weights, in train mode."""
    tensors, case = golden(name)
    if "params_from" in case:
        tensors, _ = golden(case["params_from"].removesuffix(".npz"))
    kind, config_class = ("deberta-v2", DebertaV2Config) if name.startswith("deberta") else ("roberta", RobertaConfig)
    model = CLASSIFIERS[kind][0](config_class(**{**case["config"], **settings}))
    model.load_state_dict({key[len("param.") :]: t for key, t in tensors.items() if key.startswith("param.")})
    return model.train()


def golden_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensors[f"input.{key}"] for key in ("input_ids", "attention_mask")}
