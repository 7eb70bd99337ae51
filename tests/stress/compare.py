"""Compares our models with transformers' own, on random configurations, masks and lengths.

    OMP_NUM_THREADS=1 nice python tests/stress/compare.py --cases 5000 [--seed 0] [--case N]

A case draws a model (RoBERTa or DeBERTa-V2, the classifier or the bare encoder) with its sizes and settings, LoRA or
none, what trains, training or evaluation, a batch with its mask, and which outputs are requested. transformers' class
gets the same weights, with LoRA merged into them (W + s B A); for a DeBERTa whose relative query is frozen, it gets
separate projections of the relative positions. Compared in fp32, relative to the tensor's largest number:

    logits, loss, hidden states, attentions      1e-5
    gradients of all that trains                 2e-5: sums over all tokens, in another order (tests/helpers.py)

A larger difference passes if ours is at most three times as far from transformers' model in float64 as theirs is, or,
in a gradient that cancels to little, if it is below fp32's rounding of the model's largest gradient.

LoRA's gradients are computed by the chain rule from that of transformers' merged weight: dA = s B^T dW, dB = s dW A^T.
Hidden states and attentions are compared at real tokens, and ours must be 0 at padding. Where a batch falls back to all
of its positions (a masked first token; in DeBERTa, a hole in a mask), masked positions are compared too.

Case N of a seed is always the same; --case N repeats it and prints its settings. Exit code 1 if a case differs.
"""

import argparse
import json
import math
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from helpers import CLASSIFIERS, randomise_  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import DebertaV2Config, RobertaConfig  # noqa: E402

from lora_nlu.methods.linear import merge_lora_
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.methods.targets import TARGETS
from lora_nlu.models.modeling_deberta_v2 import DebertaV2Model
from lora_nlu.models.modeling_roberta import RobertaModel

BARE = {
    "roberta": (RobertaModel, transformers.RobertaModel),
    "deberta-v2": (DebertaV2Model, transformers.DebertaV2Model),
}
ROUNDING = 2.0**-24  # of fp32
BOUNDS = {"logits": 1e-5, "loss": 1e-5, "hidden states": 1e-5, "attentions": 1e-5, "gradient": 2e-5}
SMOOTH = ("gelu", "gelu_new", "silu", "tanh", "quick_gelu")  # relu's gradient jumps where rounding decides
MASKS = ("none", "ones", "right", "right", "right", "right", "left", "holes", "zero rows")


# ------------------------------------------------------------------------------------------------------------- drawing


def drawn(seed: int, number: int) -> dict[str, Any]:
    """The settings of a case, as plain values."""
    rng = random.Random(f"{seed} {number}")
    one = rng.choice
    kind, with_gradients = one(("roberta", "deberta-v2")), rng.random() < 0.7
    activations = SMOOTH if with_gradients else (*SMOOTH, "relu")
    heads = rng.randint(1, 4)
    size = heads * one((4, 6, 8, 8, 16, 24) if heads < 3 else (2, 4, 6, 8, 8, 16, 24))
    config: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": size,
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": heads,
        "intermediate_size": rng.randint(1, 80),
        "hidden_act": one(activations),
        "max_position_embeddings": 64,
        "type_vocab_size": one((1, 2)) if kind == "roberta" else one((0, 0, 1, 2)),
        "layer_norm_eps": one((1e-5, 1e-7, 1e-12)),
        "pad_token_id": one((0, 1)),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": one((1, 2, 3, 5)),
    }
    if kind == "deberta-v2":
        buckets, reach = one((-1, 4, 8, 16)), one((-1, 12, 30))
        config |= {
            "relative_attention": rng.random() < 0.85,
            "position_buckets": buckets,
            "max_relative_positions": reach,
            "pos_att_type": one(([], ["c2p"], ["p2c"], ["c2p", "p2c"], ["p2c", "c2p"], ["p2c", "c2p"])),
            "share_att_key": rng.random() < 0.6,
            "norm_rel_ebd": one(("none", "layer_norm")),
            "position_biased_input": rng.random() < 0.4,
            "conv_kernel_size": one((0, 0, 1, 3, 5)),
            "conv_act": one(activations),
            "conv_groups": one((1, heads)),
            "pooler_hidden_act": one(activations),
            "embedding_size": one((size, size, 10)),
        }
    length, mask = rng.randint(1, 40), one(MASKS)
    lora = {
        "apply_lora": True,
        "lora_r": rng.randint(1, 5),
        "lora_alpha": one((1, 2, 3.5)),
        "lora_target_modules": [name for name in TARGETS if rng.random() < 0.5] or ["query"],
        "lora_layers": one((None, [0], [config["num_hidden_layers"] - 1])),
        "lora_relative_query": rng.random() < 0.5,
    }
    with_lora = rng.random() < 0.6
    regression = config["num_labels"] == 1
    problems = [None, "regression"] if regression else [None, None, "single_label_classification", "regression"]
    return {
        "kind": kind,
        "bare": rng.random() < 0.3,
        "config": config | (lora if with_lora else {}),
        "trains": one(("all", "lora")) if with_lora else "all",
        "training": rng.random() < 0.5,
        "gradients": with_gradients,
        "checkpointing": rng.random() < 0.1,
        "merged": with_lora and not with_gradients and rng.random() < 0.5,
        "batch": rng.randint(1, 6),
        "length": length,
        "mask": mask,
        "mask_dtype": one(("int64", "int64", "float32", "bool")) if kind == "roberta" else one(("int64", "float32")),
        "padding_ids": rng.random() < 0.8,
        "types": config["type_vocab_size"] > 0 and rng.random() < 0.5,
        "positions": rng.random() < 0.1,
        "embeds": rng.random() < 0.15,
        "problem": one(problems + ["multi_label_classification"] * (not regression)),
        "labels": one(("ids", "ids", "ids", "floats")),
        "hidden_states": rng.random() < 0.3,
        "attentions": rng.random() < 0.3,
    }


def mask_of(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[B, S] int64, 0 = padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    if kind in ("right", "zero rows"):
        mask = (torch.arange(length) < lengths).long()
    elif kind == "left":
        mask = (torch.arange(length) >= length - lengths).long()
    elif kind == "holes":
        mask = (torch.rand(batch, length, generator=generator) < 0.7).long()
        mask[torch.arange(batch), torch.randint(length, (batch,), generator=generator)] = 1
    if kind == "zero rows":
        mask[torch.randint(batch, (1,), generator=generator)] = 0
    return mask


def inputs_of(case: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments of both models, without labels, and the mask [B, S] as bool."""
    config, shape = case["config"], (case["batch"], case["length"])
    mask = mask_of(case["mask"], *shape, generator)
    ids = torch.randint(2, config["vocab_size"], shape, generator=generator)
    if case["padding_ids"]:
        ids = ids.where(mask == 1, config["pad_token_id"])
    inputs = {"input_ids": ids}
    if case["embeds"]:
        size = config.get("embedding_size", config["hidden_size"])
        inputs = {"inputs_embeds": torch.randn(*shape, size, generator=generator)}
    if case["mask"] != "none":
        inputs["attention_mask"] = mask.to(getattr(torch, case["mask_dtype"]))
    if case["types"]:
        inputs["token_type_ids"] = torch.randint(config["type_vocab_size"], shape, generator=generator)
    if case["positions"]:
        inputs["position_ids"] = torch.randint(2, config["max_position_embeddings"], shape, generator=generator)
    return inputs, mask.bool()


def labels_of(case: dict[str, Any], generator: torch.Generator) -> Tensor:
    count, batch, problem = case["config"]["num_labels"], case["batch"], case["problem"]
    if count == 1:
        return torch.randn(batch, generator=generator)
    if problem in ("regression", "multi_label_classification") or (problem is None and case["labels"] == "floats"):
        return torch.rand(batch, count, generator=generator)
    labels = torch.randint(count, (batch,), generator=generator)
    labels[1:][torch.rand(batch - 1, generator=generator) < 0.2] = -100  # not in the loss
    return labels


# ----------------------------------------------------------------------------------------------------------- the models


def updates(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def own_projections(model: Any) -> dict[str, str]:
    """For a DeBERTa whose relative query is frozen: names of the tokens' projections to those of relative positions."""
    if not getattr(model, "frozen_relative_query", False):
        return {}
    pairs = {"query_proj": ("p2c", "pos_query_proj"), "key_proj": ("c2p", "pos_key_proj")}
    return {
        name: name.replace(own, shared)
        for name, _ in model.named_modules()
        for own, (kind, shared) in pairs.items()
        if name.endswith(f".self.{own}") and kind in model.config.pos_att_type
    }


def our_model(case: dict[str, Any], seed: int) -> Any:
    config_class = RobertaConfig if case["kind"] == "roberta" else DebertaV2Config
    model_class = (BARE if case["bare"] else CLASSIFIERS)[case["kind"]][0]
    model: Any = randomise_(model_class(config_class(**case["config"], problem_type=case["problem"])), seed)
    with torch.no_grad():  # wide layers would saturate attention, which amplifies rounding errors
        for parameter in model.parameters():
            parameter.mul_(min(1.0, (24 / parameter.shape[-1]) ** 0.5) if parameter.dim() > 1 else 1.0)
    if case["trains"] == "lora":
        mark_only_lora_as_trainable(model)
    else:
        model.requires_grad_(True)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable()
    return model.train(case["training"])


def their_model(case: dict[str, Any], ours: Any, dtype: torch.dtype) -> Any:
    """transformers' model of the same function; its merged weights are computed in float64 and rounded once."""
    state = {name: tensor.double() for name, tensor in ours.state_dict().items() if "lora_" not in name}
    settings = {name: v for name, v in case["config"].items() if not name.startswith(("lora_", "apply_"))}
    for tokens, positions in own_projections(ours).items():
        settings["share_att_key"] = False
        for part in ("weight", "bias"):
            state[f"{positions}.{part}"] = state[f"{tokens}.{part}"]
    for name, layer in updates(ours).items():
        update = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        state[f"{name}.weight"] = state[f"{name}.weight"] + update
    config = type(ours.config)(**settings, problem_type=case["problem"])
    if case["attentions"]:
        config._attn_implementation = "eager"  # sdpa returns none
    model = (BARE if case["bare"] else CLASSIFIERS)[case["kind"]][1](config).to(dtype)
    model.load_state_dict(state)
    return model.train(case["training"])


# ----------------------------------------------------------------------------------------------------------- comparing


def results(
    model: Any, case: dict[str, Any], inputs: dict[str, Tensor], labels: Tensor, seen: Tensor, seed: int
) -> dict[str, Tensor | None]:
    """Outputs at the positions `seen`, ours also at the others (padding, to be 0), and gradients by parameter.

    The gradients are those of the loss plus a random sum of the other outputs.
    """
    dtype, is_ours = next(model.parameters()).dtype, type(model).__module__.startswith("lora_nlu")
    inputs = dict(inputs)
    if case["embeds"]:
        embeds = inputs["inputs_embeds"].to(dtype, copy=True).requires_grad_(case["gradients"])
        inputs["inputs_embeds"] = embeds
    if not case["bare"]:
        inputs["labels"] = labels.to(dtype) if labels.is_floating_point() else labels
    outputs = {"output_hidden_states": case["hidden_states"], "output_attentions": case["attentions"]}
    with torch.set_grad_enabled(case["gradients"]):
        out = model(**inputs, **outputs)
        found = {name: out[name] for name in ("logits", "loss", "last_hidden_state", "pooler_output") if name in out}
        found |= {f"hidden states {i}": tensor for i, tensor in enumerate(out.hidden_states or ())}
        found |= {f"attentions {i}": tensor.transpose(1, 2) for i, tensor in enumerate(out.attentions or ())}
        for name, tensor in list(found.items()):
            if name.startswith(("last_hidden_state", "hidden", "attentions")):
                found[name] = tensor[seen]
                if is_ours:
                    found[f"padding of {name}"] = tensor[~seen]
        if case["gradients"]:
            generator = torch.Generator().manual_seed(seed)
            rest = (tensor for name, tensor in found.items() if not name.startswith(("logits", "loss", "pad")))
            sums = [(tensor * torch.randn(tensor.shape, generator=generator)).mean() for tensor in rest]
            torch.stack([out.loss, *sums] if "loss" in out else sums).sum().backward()
    if "logits" in found:  # transformers' DeBERTa flattens them where there is one label
        found["logits"] = found["logits"].reshape(case["batch"], -1)
    if case["gradients"]:
        found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
        found |= {"gradient of inputs_embeds": embeds.grad} if case["embeds"] else {}
    return found


def as_ours(ours: Any, want: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """transformers' results with the gradients of our parameters, and the least scale of each gradient's error.

    A gradient that is 0 by cancellation keeps the rounding errors of its terms. Where attention ignores a parameter (a
    key's bias; a query's weight over a single token), these terms are about as large as the value's gradients; those of
    a bias as its weight's gradients; those of LoRA as the products that are summed.
    """
    grads = {name.removeprefix("gradient of "): t for name, t in want.items() if name.startswith("gradient of ")}
    of_tokens = dict(grads)
    for tokens, positions in own_projections(ours).items() if grads else ():
        for part in ("weight", "bias"):
            grads[f"{tokens}.{part}"] = grads[f"{tokens}.{part}"] + grads.pop(f"{positions}.{part}")
    size = {name: 0.1 * grad.abs().max().item() for name, grad in grads.items() if grad is not None}
    values = [number for name, number in size.items() if ".self.value" in name]
    floors = dict.fromkeys(grads, 0.0)
    for name in floors:
        stem, _, layer = name.partition(".self.")
        if layer and not layer.startswith("value"):
            value = f"{stem}.self.value{'_proj' * ('_proj' in layer)}.{layer.rpartition('.')[2]}"
            floors[name] = size.get(value, 0.0)
        elif "encoder.rel_embeddings" in name or "encoder.LayerNorm" in name:
            floors[name] = max(values, default=0.0)
        if name.endswith("bias"):
            floors[name] = max(floors[name], size.get(f"{name.removesuffix('bias')}weight", 0.0))
    for name, layer in updates(ours).items() if grads else ():
        grad, s = of_tokens[f"{name}.weight"], layer.scaling
        A, B = layer.lora_A.detach().to(grad.dtype), layer.lora_B.detach().to(grad.dtype)
        grads[f"{name}.lora_A"], grads[f"{name}.lora_B"] = s * B.T @ grad, s * grad @ A.T
        terms = (0.1 * grad.abs()).clamp(min=floors[f"{name}.weight"])
        floors[f"{name}.lora_A"] = (s * B.abs().T @ terms).max().item()
        floors[f"{name}.lora_B"] = (s * terms @ A.abs().T).max().item()
    rest = {name: tensor for name, tensor in want.items() if not name.startswith("gradient of ")}
    of = "gradient of "
    return rest | {of + name: t for name, t in grads.items()}, {of + name: floor for name, floor in floors.items()}


def relative(got: Tensor | None, want: Tensor | None, floor: float) -> float:
    """The largest difference, relative to the largest expected number or to `floor` if larger; None means zeros."""
    if got is None or want is None:
        one = want if got is None else got
        return 0.0 if one is None or not one.any() else math.inf
    if got.shape != want.shape:
        return math.inf
    if not want.numel() or torch.equal(got, want):
        return 0.0
    scale = max(want.abs().max().item(), floor)
    return (got - want).abs().max().item() / scale if scale else math.inf  # NaN stays NaN


def errors_of(case: dict[str, Any], seed: int) -> tuple[dict[str, float], bool]:
    """The largest error of each kind of result, and whether a comparison needed float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs, mask = inputs_of(case, generator)
    batch = (case, inputs, labels_of(case, generator), seen_of(case, mask), seed)
    ours = our_model(case, seed)
    theirs, exact = (their_model(case, ours, dtype) for dtype in (torch.float32, torch.float64))
    if case["merged"]:
        merge_lora_(ours.eval())
    got = results(ours, *batch)
    want, floors = as_ours(ours, results(theirs, *batch))
    truth: dict[str, Any] = {}
    gradients = (tensor for name, tensor in want.items() if name.startswith("gradient") and tensor is not None)
    largest = max((tensor.abs().max().item() for tensor in gradients), default=0.0)
    errors: dict[str, float] = {}
    frozen = {f"gradient of {name}" for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    for name in sorted((got.keys() | want.keys()) - frozen):
        kind = next((kind for kind in BOUNDS if name.startswith(kind)), "hidden states")
        floor = floors.get(name, 0.0)
        error = relative(got.get(name), want.get(name), floor)
        if BOUNDS[kind] < error < math.inf:
            truth = truth or as_ours(ours, results(exact, *batch))[0]
            of_ours, of_theirs = (relative(x[name].double(), truth[name], floor) for x in (got, want))
            rounding = ROUNDING * largest / max(got[name].abs().max().item(), floor) if kind == "gradient" else 0.0
            if of_ours <= max(3 * of_theirs, rounding):
                continue
            error = of_ours
        errors[kind] = max(errors.get(kind, 0.0), error)
    return errors, bool(truth)


def seen_of(case: dict[str, Any], mask: Tensor) -> Tensor:
    """[B, S] bool: where hidden states and attentions are compared."""
    falls_back = not mask[:, 0].all() or (case["kind"] != "roberta" and bool((mask[:, 1:] > mask[:, :-1]).any()))
    return torch.ones_like(mask) if falls_back else mask


def compare_cases(seed: int, numbers: range) -> tuple[dict[str, tuple[float, int]], dict[int, str], int]:
    """The worst error of each kind with its case, failures by case, and how many cases needed float64."""
    worst: dict[str, tuple[float, int]] = dict.fromkeys(BOUNDS, (0.0, -1))
    failures, count = {}, 0
    for number in numbers:
        try:
            errors, judged = errors_of(drawn(seed, number), number)
        except Exception as e:
            failures[number] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            continue
        count += judged
        worst |= {kind: max(worst[kind], (error, number)) for kind, error in errors.items()}
        differ = [f"{kind} {error:.2g}" for kind, error in errors.items() if not error <= BOUNDS[kind]]
        if differ:
            failures[number] = ", ".join(differ)
    return worst, failures, count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone and print its settings")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.case is not None:
        print(json.dumps(drawn(args.seed, args.case), indent=1))
    numbers = range(args.cases) if args.case is None else range(args.case, args.case + 1)
    begun = time.monotonic()
    worst, failures, judged = compare_cases(args.seed, numbers)
    for number, failed in failures.items():
        print(f"  case {number}: {failed}  (--seed {args.seed} --case {number})")
    for kind, (error, number) in worst.items():
        print(f"worst {kind}: {error:.2g} of the largest, case {number} (bound {BOUNDS[kind]:.0e})")
    seconds = time.monotonic() - begun
    print(f"{len(numbers)} cases, {judged} of them decided in float64 and not in the worst errors above")
    print(f"{len(failures)} failures, {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
