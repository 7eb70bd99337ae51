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

from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

# model type: our classifier, transformers' own
CLASSIFIERS: dict[str, tuple[Any, Any]] = {
    "roberta": (RobertaForSequenceClassification, transformers.RobertaForSequenceClassification),
    "deberta-v2": (DebertaV2ForSequenceClassification, transformers.DebertaV2ForSequenceClassification),
}
GOLDENS = Path(__file__).parent / "goldens"


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
