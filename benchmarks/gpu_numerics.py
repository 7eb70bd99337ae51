"""The stage `numerics` of gpu.sh: logits, loss and every gradient on the device against float64 on the CPU.

Small models with random weights, all methods, in fp32 (without TF32) and under bf16 and fp16 autocast, dropout 0; one
row each for a method or a way to call the model. Beside it, the error that transformers' own class, for LoRA in PEFT's
wrapper, has in the same precision against itself in float64.
"""

import copy
import json
import math
import re
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from common import XXLARGE
from sides import ROBERTA, build_peer, make_batch
from torch import Tensor, nn
from transformers import DebertaV2Config, RobertaConfig
from transformers import DebertaV2ForSequenceClassification as PeerDeberta
from transformers import RobertaForSequenceClassification as PeerRoberta

from lora_nlu.methods.linear import merge_lora_
from lora_nlu.methods.marking import mark_trainable
from lora_nlu.methods.table import METHODS
from lora_nlu.models import losses
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

SMALL = {"vocab_size": 500, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
SMALL |= {"num_hidden_layers": 3, "max_position_embeddings": 130, "num_labels": 3}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout")
DEBERTA = XXLARGE | SMALL | {"position_buckets": 32}  # the longest sequences reach distances that share a row
MODELS: dict[str, tuple[type, dict]] = {
    "RoBERTa": (RobertaConfig, ROBERTA | SMALL),
    "DeBERTa-v3": (DebertaV2Config, DEBERTA | {"conv_kernel_size": 0}),
    "DeBERTa-v2": (DebertaV2Config, DEBERTA),  # with the convolution
    "DeBERTa-v2, own relative projections": (DebertaV2Config, DEBERTA | {"share_att_key": False}),
}
LENGTHS = [17, 100, 9, 9, 128, 33, 2, 60]
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a relative error may be where there is no peer; with a peer, three times the peer's, and a tenth of this always
BOUNDS = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
LOSS_SCALE = 1024.0  # keeps small gradients in fp16's range
NO_PEER = ("houlsby", "pfeiffer")
TWO_VIEWS = {"reg_loss_wgt": 1.0, "masking_prob": 0.3, "special_token_ids": [0, 1, 2], "unk_token_id": 3}
Shape = tuple[tuple[str, int], ...]  # of --smoke, in place of SMALL's
# Ways to call a model with LoRA: the settings of its config
WAYS: dict[str, dict[str, Any]] = {
    "every layer type": {"lora_target_modules": ["query", "key", "value", "dense", "intermediate", "output"]},
    "PEFT's relative query": {"lora_relative_query": True},
    "R-Drop and cutoff": TWO_VIEWS,
    "regression": {"num_labels": 1, "lora_relative_query": True},
    "equal lengths": {"lora_relative_query": True},
    "gradient checkpointing": {},
    "dropout, checkpointed": {},
}
EVALUATIONS = ("evaluation", "one by one", "all hidden states", "merged", "left padding", "a mask with holes")


def settings_of(method: str) -> dict[str, Any]:
    """The attributes of a config that choose a method of the table."""
    row = METHODS[method]
    rank = {"lora_r": 8, "lora_alpha": 16} if row.has_alpha else {}
    return {**row.chosen_by, **rank, **({"adapter_size": 16} if "adapter_type" in row.chosen_by else {})}


def work(stage: Any, smoke: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    models = ["RoBERTa", "DeBERTa-v2"] if smoke else list(MODELS)
    precisions = ["fp32", "bf16"] if smoke else list(PRECISIONS)
    methods = ["lora", "pfeiffer"] if smoke else list(METHODS)
    ways = ["R-Drop and cutoff", "dropout, checkpointed"] if smoke else list(WAYS)
    cases = [(method, method) for method in methods] + [("lora", way) for way in (*ways, *EVALUATIONS)]
    cases = [(model, *case, precision) for model in models for case in cases for precision in precisions]
    shape: Shape = (("hidden_size", 32), ("num_attention_heads", 2), ("num_hidden_layers", 2)) if smoke else ()
    return [
        (f"{model}: {way}, {precision}", partial(measure, model, method, way, precision, stage.device, shape))
        for model, method, way, precision in cases
        if way != "PEFT's relative query" or model.startswith("DeBERTa")
    ]


def configure(model: str, method: str, way: str, shape: Shape) -> Any:
    kind, settings = MODELS[model]
    p = 0.1 if way == "dropout, checkpointed" else 0.0
    config = kind(**(settings | dict(shape) | dict.fromkeys(DROPOUTS, p)))
    for name, value in (settings_of(method) | WAYS.get(way, {})).items():
        setattr(config, name, value)
    return config


@lru_cache(maxsize=2)
def build(model: str, method: str, way: str, shape: Shape) -> nn.Module:
    """Ours on the CPU, in fp32: every number random, what trains marked."""
    config = configure(model, method, way, shape)
    torch.manual_seed(0)
    kind = RobertaForSequenceClassification if model == "RoBERTa" else DebertaV2ForSequenceClassification
    ours = kind(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():  # biases, LayerNorms and B are constants at first
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    mark_trainable(ours)
    if "checkpoint" in way:
        ours.gradient_checkpointing_enable()
    return ours


@lru_cache(maxsize=2)
def build_peer_of(model: str, method: str, way: str, shape: Shape) -> nn.Module | None:
    """transformers' class with the numbers of ours, in PEFT's wrapper for LoRA; None for a method that it lacks."""
    if method in NO_PEER or (way in WAYS and way not in ("PEFT's relative query", "regression", "equal lengths")):
        return None
    ours, config = build(model, method, way, shape), configure(model, method, way, shape)
    is_roberta = model == "RoBERTa"
    peer = build_peer(config) if method == "lora" else (PeerRoberta if is_roberta else PeerDeberta)(config)
    numbers = ours.state_dict()
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(numbers[name_in_ours(name)])
            if method != "lora":
                parameter.requires_grad_(name in trained)
    return peer


def name_in_ours(name: str) -> str:
    """The name in our model of a parameter in PEFT's wrapper."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = re.sub(r"\.(original_module|modules_to_save\.default)\.", ".", name)
    return re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)


def batch_of(model: str, way: str) -> dict[str, Tensor]:
    lengths = [40] * 8 if way == "equal lengths" else LENGTHS
    batch = make_batch(lengths, 0, 0, 1 if model == "RoBERTa" else 0, SMALL["vocab_size"])
    if way == "regression":
        batch["labels"] = batch["labels"] + 0.5
    if way == "a mask with holes":
        batch["attention_mask"][:, 3::5] = 0
    if way == "left padding":
        padding = batch["input_ids"].shape[1] - batch["attention_mask"].sum(1)
        order = torch.arange(batch["input_ids"].shape[1])[None] - padding[:, None]
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name].gather(1, order % batch[name].shape[1])
    return batch


@contextmanager
def same_cutoff() -> Any:
    """Cutoff replaces the same tokens on every device."""
    before = losses._draw

    def draw(like: Tensor, p: float) -> Tensor:
        return (torch.rand(like.shape, generator=torch.Generator().manual_seed(2)) < p).to(like.device)

    losses._draw = draw
    try:
        yield
    finally:
        losses._draw = before


def training_step(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Any]:
    """Logits, loss and gradients by name, as float64 on the CPU."""
    scale = LOSS_SCALE if dtype is torch.float16 else 1.0
    model.train()
    with same_cutoff(), autocast(batch, dtype):
        output = model(**batch)
    (scale * output.loss).backward()
    logits = output.logits.detach().double().cpu().reshape(len(batch["labels"]), -1)  # the peer's may be [B]
    grads = {name: p.grad.double().cpu() / scale for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "loss": output.loss.item(), "grads": grads}


def autocast(batch: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
    return torch.autocast(batch["input_ids"].device.type, dtype=dtype) if dtype else nullcontext()


@torch.no_grad()
def evaluation(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype | None, way: str) -> dict[str, Any]:
    """Logits as float64 on the CPU, by one of the ways of EVALUATIONS."""
    model.eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if way == "merged":
        merge_lora_(model)
    with autocast(batch, dtype):
        if way == "one by one":
            rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            logits = torch.cat([model(input_ids=ids[mask.bool()][None]).logits for ids, mask in rows])
        elif way == "all hidden states":
            logits = model(**inputs, output_hidden_states=True, output_attentions=True).logits
        else:
            logits = model(**inputs).logits
    return {"logits": logits.double().cpu()}


def on(device: torch.device, model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A copy of a model and a batch on a device, numbers in this type."""
    copied = copy.deepcopy(model).to(device, dtype)
    floats = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    return copied, {name: x.to(device) for name, x in floats.items()}


@lru_cache(maxsize=4)
def exact(which: str, model: str, method: str, way: str, shape: Shape) -> dict[str, Any]:
    """What a model computes in float64 on the CPU."""
    built = (build if which == "ours" else build_peer_of)(model, method, way, shape)
    assert built is not None
    inputs = on(torch.device("cpu"), built, batch_of(model, way), torch.double)
    return evaluation(*inputs, None, "") if way in EVALUATIONS else training_step(*inputs, None)


def measure(model: str, method: str, way: str, precision: str, device: torch.device, shape: Shape) -> dict[str, Any]:
    case, dtype = (model, method, way, shape), PRECISIONS[precision]
    on_device = partial(on, device, batch=batch_of(model, way), dtype=torch.float32)
    ours = build(*case)
    if way == "dropout, checkpointed":  # the same dropout as without checkpointing, in the same precision
        results = []
        for checkpointed in (True, False):
            copied, batch = on_device(ours)
            if not checkpointed:
                copied.gradient_checkpointing_disable()
            torch.manual_seed(3)
            results.append(training_step(copied, batch, dtype))
        row = {"ours": errors(*results)}
    elif way in EVALUATIONS:
        row = {"ours": errors(evaluation(*on_device(ours), dtype, way), exact("ours", *case))}
        if way == "evaluation" and (peer := build_peer_of(*case)) is not None:
            row["peer"] = errors(evaluation(*on_device(peer), dtype, way), exact("peer", *case))
    else:
        row = {"ours": errors(training_step(*on_device(ours), dtype), exact("ours", *case))}
        if (peer := build_peer_of(*case)) is not None:
            row["peer"] = errors(training_step(*on_device(peer), dtype), exact("peer", *case))
            if precision == "fp32" and (method != "lora" or way != "lora" or model == "RoBERTa"):  # one reading
                difference = exact("ours", *case)["logits"] - exact("peer", *case)["logits"]
                row["sides_differ_in_float64"] = difference.abs().max().item()
    row["ok"] = is_ok(row, precision)
    return row


def errors(got: dict[str, Any], true: dict[str, Any]) -> dict[str, Any]:
    """Relative errors: of the logits by their largest, of all gradients together, and of the worst one alone."""
    result: dict[str, Any] = {"logits": relative(got["logits"], true["logits"])}
    if "grads" in true:
        grads, expected = got["grads"], true["grads"]
        result["loss"] = abs(got["loss"] - true["loss"]) / abs(true["loss"])
        if grads.keys() != expected.keys():
            return result | {"gradients": math.nan, "worst": f"other parameters: {grads.keys() ^ expected.keys()}"}
        largest = max(x.norm().item() for x in expected.values())
        # a gradient that is 0 but for rounding (an attention's key bias) has no relative error of its own
        single = {n: ((grads[n] - x).norm() / max(x.norm(), 1e-2 * largest)).item() for n, x in expected.items()}
        worst = max(single, key=lambda name: (math.isnan(single[name]), single[name]))
        difference = math.sqrt(sum((grads[n] - x).square().sum().item() for n, x in expected.items()))
        total = math.sqrt(sum(x.square().sum().item() for x in expected.values()))
        result |= {"gradients": difference / total, "worst": f"{single[worst]:.1e} {worst}"}
    return result


def relative(x: Tensor, true: Tensor) -> float:
    return ((x - true).abs().max() / true.abs().max()).item()


def is_ok(row: dict[str, Any], precision: str) -> bool:
    bound = BOUNDS[precision]
    if row.get("sides_differ_in_float64", 0.0) > 1e-9:
        return False
    for name, error in row["ours"].items():
        if isinstance(error, float):
            limit = max(3 * row["peer"][name], 0.1 * bound) if "peer" in row else bound
            if not error <= limit:  # NaN is not either
                return False
    return True


def failures(rows: dict[str, Any]) -> list[str]:
    return [f"{name}: {json.dumps(row)}" for name, row in rows.items() if not row.get("ok")]


def line(name: str, row: dict[str, Any]) -> str:
    """What is printed of a row: nothing if it is as it should be."""
    return "" if row.get("ok") else f"LOOK: {name}: {json.dumps(row)}"


def summary(rows: dict[str, Any]) -> str:
    """The largest errors of each model and precision as Markdown, in brackets the peer's."""
    lines = ["| model | precision | rows within their bounds | logits | gradients |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, row in rows.items():
        groups.setdefault((name.partition(":")[0], name.rpartition(" ")[2]), []).append(row)
    for group, members in groups.items():
        cells = []
        for kind in ("logits", "gradients"):
            mine, theirs = (
                [row[side][kind] for row in members if kind in row.get(side, {})] for side in ("ours", "peer")
            )
            cells.append(f"{max(mine, default=math.nan):.1e} ({max(theirs, default=math.nan):.1e})")
        within = sum(bool(row.get("ok")) for row in members)
        lines.append(f"| {' | '.join(group)} | {within} of {len(members)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown: ours, and in brackets the peer's where there is one."""
    lines = ["| what | logits | loss | gradients | worst gradient | within its bound |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | no |")
            continue
        cells = []
        for kind in ("logits", "loss", "gradients"):
            mine, theirs = row["ours"].get(kind), row.get("peer", {}).get(kind)
            cells.append("" if mine is None else f"{mine:.1e}" + ("" if theirs is None else f" ({theirs:.1e})"))
        worst, ok = row["ours"].get("worst", ""), "yes" if row["ok"] else "NO"
        lines.append(f"| {name} | {' | '.join(cells)} | {worst} | {ok} |")
    return f"{summary(rows)}\n\n" + "\n".join(lines)
