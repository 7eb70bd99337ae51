"""What several test files share: tiny configs, random weights, ragged batches, comparisons, golden files."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import RobertaConfig

from lora_nlu.modeling_roberta import RobertaForSequenceClassification

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


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, also biases, LayerNorms, padding rows and lora_B: a forgotten one then shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise + 1 if name.endswith("LayerNorm.weight") else noise)
    return model


def twins(
    config: RobertaConfig, seed: int = 0, attn_implementation: str = "sdpa"
) -> tuple[RobertaForSequenceClassification, transformers.RobertaForSequenceClassification]:
    """Our classifier and transformers' with the same random weights, in train mode."""
    theirs_config = copy.deepcopy(config)  # transformers writes problem_type into it
    theirs_config._attn_implementation = attn_implementation
    theirs = randomise_(transformers.RobertaForSequenceClassification(theirs_config), seed)
    ours = RobertaForSequenceClassification(config)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(), theirs.train()


def ragged_batch(lengths: list[int], vocab_size: int = 50, seed: int = 0) -> dict[str, Tensor]:
    """Random sequences of these lengths, padded on the right with id 1."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, vocab_size, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


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


def golden_model(name: str, **settings: Any) -> RobertaForSequenceClassification:
    """Our classifier with a golden case's config and weights, in train mode."""
    tensors, case = golden(name)
    model = RobertaForSequenceClassification(RobertaConfig(**{**case["config"], **settings}))
    model.load_state_dict({key[len("param.") :]: t for key, t in tensors.items() if key.startswith("param.")})
    return model.train()


def golden_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensors[f"input.{key}"] for key in ("input_ids", "attention_mask")}
