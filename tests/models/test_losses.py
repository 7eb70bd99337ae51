"""R-Drop and cutoff: the losses against closed forms and the reference's goldens, the training step against two passes.

The classifier runs both views as one batch of twice the size. Each proof of a step therefore compares with something
that does not: the reference's own step, with its dropout masks or its draw replayed, or two separate passes.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CLASSIFIERS,
    assert_close,
    assert_same_gradients,
    golden,
    golden_inputs,
    golden_model,
    ragged_batch,
    randomise_,
    tiny_config,
    tiny_deberta_config,
)
from torch import Tensor, nn
from torch.nn import functional as F

import lora_nlu.models.losses
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.losses import classification_loss, cutoff, two_view_losses
from lora_nlu.models.modeling_deberta_v2 import table_rows
from lora_nlu.ops.packing import PackedBatch

LENGTHS = [9, 4, 6, 4, 1]
SPECIAL, UNK = [0, 1, 2], 3  # in both models' vocabularies: the padding, first and last tokens; the unknown token
CONFIGS: dict[str, Callable[..., Any]] = {"roberta": tiny_config, "deberta-v2": tiny_deberta_config}
FIRST_TOKEN, PAD = {"roberta": 0, "deberta-v2": 1}, {"roberta": 1, "deberta-v2": 0}
MODELS = list(CLASSIFIERS)
RDROP = {"reg_loss_wgt": 1.5}
CUTOFF = {**RDROP, "masking_prob": 0.4, "special_token_ids": SPECIAL, "unk_token_id": UNK}
NO_CUTOFF, WITH_CUTOFF = pytest.param(RDROP, id="R-Drop"), pytest.param(CUTOFF, id="cutoff")


# What two views lose, written again in numpy's float64.


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def closed_form(z1: np.ndarray, z2: np.ndarray, labels: np.ndarray, weight: float) -> tuple[float, float]:
    """(task, consistency) of logits [B, C] against labels: class ids [B], distributions [B, C], numbers [B] if C = 1.

    CE(z1) + CE(z2) and weight / 2 (KL(m || z1) + KL(m || z2)), each KL summed over rows and classes and divided by
    their number; rows of negative ids count nowhere. With one label, squared distances in place of CE and KL.
    """
    middle = (z1 + z2) / 2
    if z1.shape[1] == 1:
        task = sum(np.mean((z[:, 0] - labels) ** 2) for z in (z1, z2))
        return task, weight / 2 * sum(np.mean((z - middle) ** 2) for z in (z1, z2))
    if labels.ndim == 1:
        kept = np.flatnonzero(labels >= 0)
        z1, z2, middle, labels = z1[kept], z2[kept], middle[kept], np.eye(z1.shape[1])[labels[kept]]
    task = sum(-(labels * log_softmax(z)).sum() / len(z) for z in (z1, z2))
    target = log_softmax(middle)
    divergence = sum((np.exp(target) * (target - log_softmax(z))).sum() / z.size for z in (z1, z2))
    return task, weight / 2 * divergence


def slopes(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """df/dx by central differences."""
    result = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        result[place] = (f(up) - f(down)) / (2 * step)
    return result


def assert_is_closed_form(z1: Tensor, z2: Tensor, labels: Tensor, problem_type: str | None, weight: float) -> None:
    """Both parts in float64, and the sum's gradient in both views by finite differences."""
    z1, z2 = (z.double().clone().requires_grad_() for z in (z1, z2))
    task, consistency = two_view_losses(z1, z2, labels, problem_type, weight)
    (task + consistency).backward()
    a, b, y = z1.detach().numpy(), z2.detach().numpy(), labels.numpy()
    if labels.is_floating_point():
        y = y.astype(np.float64)
    want = closed_form(a, b, y, weight)
    assert [task.item(), consistency.item()] == pytest.approx(list(want), rel=1e-12, abs=1e-15)
    assert min(want) > 1e-4  # neither could be forgotten
    for got, numeric in (
        (z1.grad, slopes(lambda z: sum(closed_form(z, b, y, weight)), a)),
        (z2.grad, slopes(lambda z: sum(closed_form(a, z, y, weight)), b)),
    ):
        assert_close(got, torch.from_numpy(numeric), 1e-8)


def random_logits(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z1, z2 = 2 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return z1, z2


def distributions(rows: int, classes: int) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(7)).mul(2).softmax(-1)


# classes, labels, problem_type of 7 examples
LABELLED = {
    "2 classes": (2, torch.arange(7) % 2, None),
    "5 classes by name": (5, torch.arange(7) % 5, "single_label_classification"),
    "3 classes, some ignored": (3, torch.tensor([0, -1, 2, -100, 1, 1, -1]), None),
    "3 classes, one counted": (3, torch.tensor([-1, -1, -1, 1, -1, -1, -1]), None),
    "distributions over 4": (4, distributions(7, 4).double(), "soft_label_classification"),
    "regression": (1, torch.linspace(-2, 5, 7).double(), None),
    "regression by name": (1, torch.linspace(0, 0.9, 7).double(), "regression"),
}


@pytest.mark.parametrize("weight", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", LABELLED)
def test_task_consistency_and_both_gradients_are_the_closed_form(name, weight):
    classes, labels, problem_type = LABELLED[name]
    for seed in range(3):
        assert_is_closed_form(*random_logits(7, classes, seed), labels, problem_type, weight)


@pytest.mark.parametrize("name", LABELLED)
def test_the_gradient_of_each_part_passes_torchs_gradcheck(name):
    classes, labels, problem_type = LABELLED[name]
    logits = [z.requires_grad_() for z in random_logits(7, classes)]
    assert torch.autograd.gradcheck(lambda a, b: two_view_losses(a, b, labels, problem_type, 1.7), logits)


@pytest.mark.parametrize("name", LABELLED)
def test_equal_views_lose_twice_the_plain_loss_and_nothing_against_each_other(name):
    classes, labels, problem_type = LABELLED[name]
    z, _ = random_logits(7, classes)
    first, second = z.clone().requires_grad_(), z.clone().requires_grad_()
    task, consistency = two_view_losses(first, second, labels, problem_type, 4.0)
    assert_close(task, 2 * classification_loss(z, labels, problem_type), 1e-14)
    assert consistency.item() == pytest.approx(0, abs=1e-15)
    consistency.backward()
    assert first.grad.abs().max() < 1e-15 and second.grad.abs().max() < 1e-15


def test_logits_thousands_apart_have_finite_losses_and_gradients():
    first = torch.tensor([[1e4, -1e4, 0.0], [0.0, 3e3, -3e3]], requires_grad=True)
    second = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 3e3, -3e3]], requires_grad=True)
    task, consistency = two_view_losses(first, second, torch.tensor([0, 1]), None, 1.0)
    (task + consistency).backward()
    assert task.item() == pytest.approx(1e4)  # (0 + 20000 of the first row + 0 + 0 of the second) / 2
    assert consistency.item() == pytest.approx(0.5 * (2e4 - 2 * math.log(3)) / 6)  # m is uniform in the first row
    assert first.grad.isfinite().all() and second.grad.isfinite().all()


def test_ignored_rows_move_neither_part_nor_get_a_gradient():
    z1, z2 = random_logits(5, 3)
    labels = torch.tensor([2, -1, 0, -100, 1])
    kept = labels >= 0
    want = two_view_losses(z1[kept], z2[kept], labels[kept], None, 2.0)
    first, second = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    got = two_view_losses(first, second, labels, None, 2.0)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-14)
    sum(got).backward()
    for z in (first, second):
        assert torch.count_nonzero(z.grad[~kept]) == 0 and (z.grad[kept] != 0).all()


def test_a_batch_of_ignored_rows_loses_nothing():
    first, second = (z.requires_grad_() for z in random_logits(4, 3))
    parts = two_view_losses(first, second, torch.full((4,), -1), None, 2.0)
    assert [part.item() for part in parts] == [0, 0]
    sum(parts).backward()
    assert torch.count_nonzero(first.grad) == torch.count_nonzero(second.grad) == 0


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_two_views_of_a_multi_label_problem_are_an_error(problem_type):
    z1, z2 = random_logits(4, 3)
    with pytest.raises(ValueError, match="multi-label problems have none. Set reg_loss_wgt to 0"):
        two_view_losses(z1, z2, (z1 > 0).double(), problem_type, 1.0)


# Against the reference implementation: the formula.


FORMULAS = {"c2_w4": None, "c3": None, "c3_ignored": None, "c3_soft": "soft_label_classification"}


def formula(tag: str) -> tuple[dict[str, Tensor], float]:
    """One formula case: logits1, logits2, labels, loss, grad_logits1, grad_logits2; and its weight."""
    prefix = f"formula.{tag}."
    case = {key[len(prefix) :]: t for key, t in golden("deberta_rdrop")[0].items() if key.startswith(prefix)}
    return case, case.pop("reg_loss_wgt").item()


@pytest.mark.parametrize("tag", FORMULAS)
def test_the_loss_of_two_sets_of_logits_and_both_gradients_are_the_references(tag):
    case, weight = formula(tag)
    first, second = (case[f"logits{i}"].clone().requires_grad_() for i in (1, 2))
    loss = sum(two_view_losses(first, second, case["labels"], FORMULAS[tag], weight))
    assert_close(loss, case["loss"], 1e-6)
    loss.backward()
    assert_close(first.grad, case["grad_logits1"], 2e-6)
    assert_close(second.grad, case["grad_logits2"], 2e-6)


@pytest.mark.parametrize("tag", FORMULAS)
def test_the_references_formula_is_the_closed_form(tag):
    case, weight = formula(tag)
    assert_is_closed_form(case["logits1"], case["logits2"], case["labels"], FORMULAS[tag], weight)


def test_regression_is_the_closed_form_where_the_reference_takes_numbers_for_class_ids():
    case, weight = formula("reg_labels_below_1")
    z1, z2, labels = case["logits1"], case["logits2"], case["labels"]
    assert case["loss"] == 0 and torch.count_nonzero(case["grad_logits1"]) == 0  # cross-entropy over a single class
    as_ids = sum(two_view_losses(z1, z2, labels.long(), "single_label_classification", weight))
    assert as_ids == case["loss"]
    assert_is_closed_form(z1, z2, labels, None, weight)
    assert sum(two_view_losses(z1, z2, labels, None, weight)) > 10


# Against the reference implementation: complete training steps.


class Replay(nn.Module):
    """In place of a dropout: each call multiplies by the next of these factors, which must have its shape."""

    def __init__(self, factors: list[Tensor]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factors.pop(0)
        assert factor.shape == x.shape, (factor.shape, x.shape)
        return x * factor


def recorded_factors(tensors: dict[str, Tensor], case: dict[str, Any]) -> dict[str, list[Tensor]]:
    """What the reference's two passes multiplied by in each dropout: 0 where dropped, else 1 / (1 - p)."""
    factors: dict[str, list[Tensor]] = {}
    for entry in case["mask_order"]:
        _, _, _, name = entry["key"].split(".", 3)  # mask.pass1.00.<module>
        shape, p = entry["shape"], entry["p"]
        dropped = np.unpackbits(tensors[entry["key"]].numpy(), count=math.prod(shape)).reshape(shape)
        factors.setdefault(name, []).append(torch.from_numpy((1 - dropped) / (1 - p)).float())
    return factors


def replay_(
    model: nn.Module, factors: dict[str, list[Tensor]], packed: PackedBatch, narrow: str | None
) -> list[Replay]:
    """Put the two passes' factors into the dropouts of a model that runs both as the batch `packed`.

    The layer whose name starts with `narrow` runs for first tokens alone.
    """
    encoder = model.deberta.encoder
    rows = table_rows(packed.length, encoder.buckets, encoder.reach)
    order = packed.unsort.argsort()  # the batch's sequence at each packed place
    replays = []
    for name, passes in factors.items():
        firsts = narrow is not None and name.startswith(narrow)
        both = torch.cat(passes)
        if name.endswith("pos_dropout"):
            calls = [torch.stack(passes)[:, rows[0] : rows[-1] + 1]]  # [V, U, H]
        elif name.endswith("self.dropout"):
            calls, start = [], 0
            for n, length in packed.groups:
                some = both[order[start : start + n]].transpose(0, 1)  # [A, n, S, S]
                calls.append(some[:, :, : 1 if firsts else length, :length])
                start += n
        elif both.dim() == 3:
            calls = [packed.pack(both)[packed.first_rows] if firsts else packed.pack(both)]  # [Q, H]
        else:
            calls = [both]  # of the head: [2 B, H] in the batch's order
        model.set_submodule(name, Replay(calls))
        replays.append(model.get_submodule(name))
    return replays


def two_views(model: nn.Module, **inputs: Any) -> tuple[Any, Tensor, Tensor]:
    """The output of a training step, and both views' logits."""
    logits: list[Tensor] = []
    hook = model.classifier.register_forward_hook(lambda module, args, result: logits.append(result))
    output = model(**inputs)
    hook.remove()
    assert len(logits) == 1
    first, second = logits[0].chunk(2)
    return output, first, second


def encoder_calls(model: nn.Module) -> list[dict[str, Any]]:
    """The arguments of every later call of the encoder."""
    calls: list[dict[str, Any]] = []
    model.base_model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def assert_is_golden_step(name: str, model: nn.Module, **more: Any) -> Any:
    """Logits of both views, loss and every gradient of the golden training step."""
    tensors, _ = golden(name)
    output, first, second = two_views(model, **golden_inputs(tensors), labels=tensors["input.labels"], **more)
    assert torch.equal(output.logits, first)
    assert_close(first, tensors["out.logits1"], 2e-5, scale=1, what="first view")
    assert_close(second, tensors["out.logits2"], 2e-5, scale=1, what="second view")
    assert (first - second).abs().max() > 0.1
    assert_close(output.loss, tensors["out.loss"], 2e-5, scale=1, what="loss")
    output.loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(got) == {key[len("grad.") :] for key in tensors if key.startswith("grad.")}
    assert sum("lora_" in name for name in got) == 12 and len(got) == 16
    for name, gradient in got.items():
        assert_close(gradient, tensors[f"grad.{name}"], 2e-5, what=name)
    return output


@pytest.mark.parametrize("last_layer", ["on all tokens", "on first tokens"])
def test_with_the_references_dropout_masks_a_step_has_its_logits_loss_and_gradients(last_layer):
    tensors, case = golden("deberta_rdrop")
    model = golden_model("deberta_rdrop")
    mark_only_lora_as_trainable(model)
    all_tokens = last_layer == "on all tokens"
    mask = tensors["input.attention_mask"].repeat(2, 1)
    packed = PackedBatch.from_mask(mask, *mask.shape, mask.device, keep_distances=True)
    assert packed.groups == ((2, 3), (2, 17), (2, 31), (2, 40), (2, 48))
    droppers = {name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0}
    factors = recorded_factors(tensors, case)
    assert set(factors) == droppers and len(droppers) == 15 and all(len(passes) == 2 for passes in factors.values())
    replays = replay_(model, factors, packed, None if all_tokens else "deberta.encoder.layer.2.")
    assert_is_golden_step("deberta_rdrop", model, output_hidden_states=all_tokens)
    assert not any(replay.factors for replay in replays)  # each was used


def test_with_the_references_draw_a_cutoff_step_has_its_ids_logits_loss_and_gradients(monkeypatch):
    tensors, case = golden("deberta_cutoff")
    model = golden_model("deberta_cutoff", special_token_ids=SPECIAL, unk_token_id=UNK)
    mark_only_lora_as_trainable(model)
    draws = []

    def draw(like: Tensor, p: float) -> Tensor:
        draws.append((like.shape, p))
        return tensors["mask.random"].clone()

    monkeypatch.setattr(lora_nlu.models.losses, "_draw", draw)
    calls = encoder_calls(model)
    assert_is_golden_step("deberta_cutoff", model)
    assert draws == [((5, 48), 0.3)]
    (call,) = calls
    first, second = call["input_ids"].chunk(2)
    assert torch.equal(first, tensors["input.input_ids"])
    assert torch.equal(second, tensors["out.masked_input_ids"])
    assert torch.equal(second != first, tensors["mask.applied"] & (first != UNK))
    assert tensors["mask.applied"].sum() == case["n_masked"]
    assert (tensors["mask.random"] & ~tensors["mask.applied"]).sum() == case["n_random_on_special_or_pad"] > 0


# Against two separate passes.


def model_of(kind: str, **settings: Any) -> Any:
    """Our classifier with LoRA and random weights, in train mode, every parameter to train."""
    config = CONFIGS[kind](apply_lora=True, lora_r=4, lora_alpha=6, **settings)
    return randomise_(CLASSIFIERS[kind][0](config)).train().requires_grad_(True)


def plain(model: Any) -> Any:
    """The same model without R-Drop."""
    other = copy.deepcopy(model)
    other.config.reg_loss_wgt = 0.0
    return other


def inputs_of(model_kind: str, kind: str) -> dict[str, Tensor]:
    """A batch of one kind of input; sequences start with a special token, two ids are special inside the longest."""
    batch = ragged_batch([6] if kind.startswith("batch of 1") else LENGTHS, pad=PAD[model_kind])
    batch["input_ids"][:, 0] = FIRST_TOKEN[model_kind]
    batch["input_ids"][0, 3] = batch["input_ids"][0, 5] = 2
    ids, shape = batch["input_ids"], batch["input_ids"].shape
    generator = torch.Generator().manual_seed(1)
    if kind == "left padding":
        return {name: t.flip(1) for name, t in batch.items()}
    if kind == "left and right padding":
        return {name: torch.cat([t, t.flip(1)]) for name, t in batch.items()}
    if kind == "holes":
        batch["attention_mask"][0, 2] = batch["attention_mask"][2, 4] = 0
        return batch
    if kind in ("no mask", "batch of 1, no mask"):
        return {"input_ids": torch.where(ids == PAD[model_kind], 7, ids)}
    if kind == "inputs_embeds":
        return {
            "inputs_embeds": torch.randn(*shape, 32, generator=generator),
            "attention_mask": batch["attention_mask"],
        }
    if kind in ("token types", "batch of 1, token types"):
        return {**batch, "token_type_ids": torch.randint(0, 2, shape, generator=generator)}
    if kind == "one row of token types":
        return {**batch, "token_type_ids": torch.randint(0, 2, shape[1:], generator=generator)[None]}
    if kind in ("position_ids", "batch of 1, position_ids"):
        return {**batch, "position_ids": torch.randint(0, 40, shape, generator=generator)}
    if kind == "one row of position_ids":
        return {**batch, "position_ids": torch.arange(20, 20 + shape[1])[None]}
    assert kind in ("right padding", "batch of 1")
    return batch


KINDS = [
    "right padding",
    "left padding",
    "left and right padding",
    "holes",
    "no mask",
    "token types",
    "one row of token types",
    "position_ids",
    "one row of position_ids",
    "batch of 1",
    "batch of 1, no mask",
    "batch of 1, token types",
    "batch of 1, position_ids",
]


def settings_for(model_kind: str, kind: str) -> dict[str, Any]:
    """DeBERTa in the v2-xxlarge style has neither positions nor types to add: give it those that the inputs name."""
    if model_kind == "roberta":
        return {}
    types, positions = "types" in kind, "position_ids" in kind
    return {"type_vocab_size": 2 if types else 0, "position_biased_input": positions}


def labels_of(kind: str, rows: int) -> Tensor:
    if kind == "regression":
        return torch.linspace(-1, 2, rows)
    if kind == "distributions":
        return distributions(rows, 3)
    labels = torch.arange(rows) % 3
    if kind == "some ignored":
        labels[1::2] = -100
    return labels


def fixed_draw(monkeypatch, like: Tensor) -> Tensor:
    """Let every draw of cutoff be this one, about half of it True."""
    draw = torch.rand(like.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    monkeypatch.setattr(lora_nlu.models.losses, "_draw", lambda like, p: draw.clone())
    return draw


def second_inputs(inputs: dict[str, Tensor], draw: Tensor) -> dict[str, Tensor]:
    """The inputs with the drawn ordinary tokens unknown, token by token."""
    ids = inputs["input_ids"].clone()
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    for place in np.ndindex(*ids.shape):
        if draw[place] and mask[place] and ids[place].item() not in SPECIAL:
            ids[place] = UNK
    return {**inputs, "input_ids": ids}


def assert_step_is_two_passes(model: Any, inputs: dict[str, Tensor], second: dict[str, Tensor], labels: Tensor) -> None:
    """Logits of both views, both losses and every gradient are those of a pass on each of two inputs."""
    reference = plain(model)
    problem_type = "soft_label_classification" if labels.dim() == 2 and labels.is_floating_point() else None
    z1, z2 = reference(**inputs).logits, reference(**second).logits
    task, consistency = two_view_losses(z1, z2, labels, problem_type, model.config.reg_loss_wgt)
    output, first, other = two_views(model, **inputs, labels=labels)
    assert torch.equal(output.logits, first)
    assert_close(first, z1, what="first view")
    assert_close(other, z2, what="second view")
    assert_close(output.task_loss, task, what="task loss")
    assert_close(output.consistency_loss, consistency, scale=task.item(), what="consistency loss")
    assert_close(output.loss, task + consistency, what="loss")
    output.loss.backward()
    (task + consistency).backward()
    assert_same_gradients(model, reference)
    if second is inputs:  # equal views: twice the plain step
        twice = plain(model)
        twice.zero_grad()
        loss = 2 * twice(**inputs, labels=labels).loss
        assert_close(output.loss, loss)
        assert output.consistency_loss.abs() < 1e-6
        loss.backward()
        assert_same_gradients(model, twice)
    else:
        assert (z1 - z2).abs().max() > 0.01 and consistency > 1e-4


@pytest.mark.parametrize("settings", [NO_CUTOFF, WITH_CUTOFF])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_kind", MODELS)
def test_without_dropout_a_step_is_two_passes_whatever_the_input(model_kind, kind, settings, monkeypatch):
    model, inputs = model_of(model_kind, **settings, **settings_for(model_kind, kind)), inputs_of(model_kind, kind)
    before = {name: t.clone() for name, t in inputs.items()}
    draw = fixed_draw(monkeypatch, inputs["input_ids"])
    second = second_inputs(inputs, draw) if settings is CUTOFF else inputs
    assert_step_is_two_passes(model, inputs, second, labels_of("3 labels", len(inputs["input_ids"])))
    assert all(torch.equal(inputs[name], t) for name, t in before.items())  # nothing was cut in place


@pytest.mark.parametrize("settings", [NO_CUTOFF, WITH_CUTOFF])
@pytest.mark.parametrize(
    ("model_kind", "task"),
    [(kind, task) for kind in MODELS for task in ("regression", "some ignored")] + [("deberta-v2", "distributions")],
)
def test_without_dropout_a_step_is_two_passes_whatever_the_labels(model_kind, task, settings, monkeypatch):
    model = model_of(model_kind, **settings, num_labels=1 if task == "regression" else 3)
    inputs = inputs_of(model_kind, "right padding")
    draw = fixed_draw(monkeypatch, inputs["input_ids"])
    second = second_inputs(inputs, draw) if settings is CUTOFF else inputs
    assert_step_is_two_passes(model, inputs, second, labels_of(task, len(LENGTHS)))


@pytest.mark.parametrize("model_kind", MODELS)
def test_inputs_embeds_without_dropout_are_two_passes_too(model_kind):
    model, inputs = model_of(model_kind, **RDROP), inputs_of(model_kind, "inputs_embeds")
    assert_step_is_two_passes(model, inputs, inputs, labels_of("3 labels", len(LENGTHS)))


@pytest.mark.parametrize("more", [{"output_hidden_states": True}, {"output_attentions": True}])
@pytest.mark.parametrize("model_kind", MODELS)
def test_a_step_that_returns_hidden_states_or_attentions_is_the_same_step(model_kind, more, monkeypatch):
    model, inputs = model_of(model_kind, **CUTOFF), inputs_of(model_kind, "right padding")
    fixed_draw(monkeypatch, inputs["input_ids"])
    labels = labels_of("3 labels", len(LENGTHS))
    got, want = model(**inputs, labels=labels, **more), model(**inputs, labels=labels)
    for name in ("loss", "logits", "task_loss", "consistency_loss"):
        assert_close(got[name], want[name], what=name)


# With dropout, the views are independent.


PLACES = ["hidden_dropout_prob", "attention_probs_dropout_prob", "cls_dropout"]
NO_DROPOUT = {place: 0.0 for place in PLACES}


def only_the_tables_dropout_(model: Any, p: float) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = p if name.endswith("pos_dropout") else 0.0


@pytest.mark.parametrize("kind", ["right padding", "left padding", "no mask", "batch of 1"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model_kind", MODELS)
def test_every_dropout_sets_the_two_views_of_every_example_apart(model_kind, place, kind):
    model, inputs = model_of(model_kind, **RDROP, **{**NO_DROPOUT, place: 0.5}), inputs_of(model_kind, kind)
    rows = len(inputs["input_ids"])
    torch.manual_seed(0)
    output, first, second = two_views(model, **inputs, labels=labels_of("3 labels", rows))
    apart = (first - second).abs().amax(-1)  # [B]
    if place == "attention_probs_dropout_prob" and "attention_mask" in inputs:
        apart = apart[inputs["attention_mask"].sum(1) > 2]  # the heads of a short sequence may all drop alike
    assert len(apart) > 0 and (apart > 1e-3).all()
    assert output.consistency_loss > 1e-4


@pytest.mark.parametrize("kind", ["right padding", "left padding", "no mask", "batch of 1"])
def test_the_dropout_of_the_relative_table_alone_sets_the_views_apart(kind):
    model, inputs = model_of("deberta-v2", **RDROP, **NO_DROPOUT), inputs_of("deberta-v2", kind)
    only_the_tables_dropout_(model, 0.5)
    rows = len(inputs["input_ids"])
    torch.manual_seed(0)
    output, first, second = two_views(model, **inputs, labels=labels_of("3 labels", rows))
    apart = (first - second).abs().amax(-1)
    longer = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum(1) > 1
    assert (apart[longer] > 1e-3).all() and output.consistency_loss > 1e-4
    assert (apart[~longer] < 1e-5).all()  # a single token has one distance: softmax over one key


@pytest.mark.parametrize("padding", ["right", "left"])
def test_all_sequences_of_a_view_share_one_dropout_of_the_relative_table(padding):
    model = model_of("deberta-v2", **RDROP, **NO_DROPOUT)
    only_the_tables_dropout_(model, 0.5)
    batch = ragged_batch([7, 3, 7, 5, 3, 7], pad=0)
    ids = batch["input_ids"]
    ids[2] = ids[5] = ids[0]
    ids[4] = ids[1]
    if padding == "left":
        batch = {name: t.flip(1) for name, t in batch.items()}
    torch.manual_seed(0)
    _, first, second = two_views(model, **batch, labels=labels_of("3 labels", 6))
    for view in (first, second):
        for copy_of, original in ((2, 0), (5, 0), (4, 1)):
            assert_close(view[copy_of], view[original], 1e-5)
    assert ((first - second).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model_kind", MODELS)
def test_the_views_logits_are_uncorrelated_over_many_draws(model_kind, place):
    model = model_of(model_kind, **RDROP, **{**NO_DROPOUT, place: 0.1})
    for name, module in model.named_modules():
        if name.endswith("pos_dropout"):
            module.p = 0.0  # shared by the rows of a view: one draw only
    draws = 2000
    batch = {name: t.repeat(draws, 1) for name, t in ragged_batch([6], pad=PAD[model_kind]).items()}
    torch.manual_seed(0)
    with torch.no_grad():
        _, first, second = two_views(model, **batch, labels=labels_of("3 labels", draws))
    for a, b in zip(first.T, second.T, strict=True):
        assert a.std() > 1e-3
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.15)  # as much dropout in either
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 5 / math.sqrt(draws)


def test_the_relative_tables_dropouts_of_the_views_are_uncorrelated_over_many_steps():
    model = model_of("deberta-v2", **RDROP, **NO_DROPOUT)
    only_the_tables_dropout_(model, 0.3)
    batch, steps = ragged_batch([6], pad=0), 150
    torch.manual_seed(0)
    with torch.no_grad():
        views = [two_views(model, **batch, labels=torch.tensor([1]))[1:] for _ in range(steps)]
    first, second = (torch.cat(logits) for logits in zip(*views, strict=True))  # [steps, 3]
    for a, b in zip(first.T, second.T, strict=True):
        assert a.std() > 1e-3
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 5 / math.sqrt(steps)


# Only training steps have two views.


def encoder_rows(calls: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The rows of each call, and the views that they are: DeBERTa's encoder is told their number, RoBERTa's is not."""
    return [(len(call["input_ids"]), call.get("views", len(call["input_ids"]) // len(LENGTHS))) for call in calls]


@pytest.mark.parametrize("settings", [NO_CUTOFF, WITH_CUTOFF])
@pytest.mark.parametrize("num_labels", [3, 1])
@pytest.mark.parametrize("model_kind", MODELS)
def test_evaluation_with_labels_is_one_plain_pass_with_the_plain_loss(model_kind, num_labels, settings):
    dropout = {place: 0.5 for place in PLACES}
    model = model_of(model_kind, num_labels=num_labels, **settings, **dropout).eval()
    inputs = inputs_of(model_kind, "right padding")
    labels = labels_of("3 labels" if num_labels == 3 else "regression", len(LENGTHS))
    want, calls = plain(model)(**inputs, labels=labels), encoder_calls(model)
    output = model(**inputs, labels=labels)
    assert encoder_rows(calls) == [(len(LENGTHS), 1)]
    assert list(output.keys()) == ["loss", "logits"]
    assert not hasattr(output, "task_loss") and not hasattr(output, "consistency_loss")
    assert torch.equal(output.logits, want.logits) and torch.equal(output.loss, want.loss)
    loss = F.mse_loss(want.logits[:, 0], labels) if num_labels == 1 else F.cross_entropy(want.logits, labels)
    assert_close(output.loss, loss, 1e-6)
    assert torch.equal(calls[0]["input_ids"], inputs["input_ids"])


@pytest.mark.parametrize("settings", [NO_CUTOFF, WITH_CUTOFF])
@pytest.mark.parametrize("model_kind", MODELS)
def test_training_mode_without_labels_is_one_plain_pass(model_kind, settings):
    model, inputs = model_of(model_kind, **settings), inputs_of(model_kind, "right padding")
    want, calls = plain(model)(**inputs).logits, encoder_calls(model)
    output = model(**inputs)
    assert encoder_rows(calls) == [(len(LENGTHS), 1)]
    assert list(output.keys()) == ["logits"] and torch.equal(output.logits, want)
    assert torch.equal(calls[0]["input_ids"], inputs["input_ids"])


@pytest.mark.parametrize("settings", [{}, {"reg_loss_wgt": 0.0}, {**CUTOFF, "reg_loss_wgt": 0.0}])
@pytest.mark.parametrize("model_kind", MODELS)
def test_without_reg_loss_wgt_a_training_step_is_one_plain_pass(model_kind, settings):
    model, inputs = model_of(model_kind, **settings), inputs_of(model_kind, "right padding")
    calls, labels = encoder_calls(model), labels_of("3 labels", len(LENGTHS))
    output = model(**inputs, labels=labels)
    assert encoder_rows(calls) == [(len(LENGTHS), 1)]
    assert list(output.keys()) == ["loss", "logits"]
    assert torch.equal(calls[0]["input_ids"], inputs["input_ids"])
    assert_close(output.loss, F.cross_entropy(output.logits, labels), 1e-6)


@pytest.mark.parametrize("settings", [NO_CUTOFF, WITH_CUTOFF])
@pytest.mark.parametrize("num_labels", [3, 1])
@pytest.mark.parametrize("model_kind", MODELS)
def test_a_training_step_is_one_call_on_twice_the_batch_whose_two_losses_add_up(model_kind, num_labels, settings):
    dropout = {place: 0.2 for place in PLACES}
    model = model_of(model_kind, num_labels=num_labels, **settings, **dropout)
    inputs, calls = inputs_of(model_kind, "right padding"), encoder_calls(model)
    labels = labels_of("3 labels" if num_labels == 3 else "regression", len(LENGTHS))
    torch.manual_seed(0)
    output, first, second = two_views(model, **inputs, labels=labels)
    assert encoder_rows(calls) == [(2 * len(LENGTHS), 2)]
    assert list(output.keys()) == ["loss", "logits", "task_loss", "consistency_loss"]
    assert torch.equal(output.logits, first)
    assert torch.equal(output.loss, output.task_loss + output.consistency_loss)
    assert output.task_loss > 0 and output.consistency_loss > 0
    task, consistency = closed_form(
        *(z.detach().double().numpy() for z in (first, second)), labels.numpy(), model.config.reg_loss_wgt
    )
    assert output.task_loss.item() == pytest.approx(task, rel=1e-5)
    assert output.consistency_loss.item() == pytest.approx(consistency, rel=1e-4)
    torch.manual_seed(0)
    as_tuple = model(**inputs, labels=labels, return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


# Cutoff.


def text(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids 0 to 49, a few of them special, and a mask of which a fifth is padding with whatever ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (rows, length), generator=generator)
    return ids, (torch.rand(rows, length, generator=generator) < 0.8).long()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.95])
def test_only_ordinary_attended_tokens_are_replaced_and_of_those_a_share_of_p(p, dtype):
    ids, mask = text(1000, 400)
    torch.manual_seed(0)
    got = cutoff(ids, mask.to(dtype), p, SPECIAL, UNK)
    changed = got != ids
    special = (ids == 0) | (ids == 1) | (ids == 2)
    assert special.sum() > 10000 and (mask == 0).sum() > 10000
    assert not changed[special].any() and not changed[mask == 0].any()
    assert (got[changed] == UNK).all()
    ordinary = ~special & (mask == 1) & (ids != UNK)  # one that is unknown already does not show
    n = int(ordinary.sum())
    assert abs(int(changed[ordinary].sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_a_tenth_of_a_million_tokens_is_replaced_to_a_thousandth():
    ids = torch.full((1000, 1000), 7)
    torch.manual_seed(0)
    got = cutoff(ids, None, 0.1, SPECIAL, UNK)
    assert set(got.unique().tolist()) == {UNK, 7}
    assert (got == UNK).double().mean().item() == pytest.approx(0.1, abs=1e-3)


def test_without_a_mask_special_tokens_stay_and_every_other_token_can_go():
    ids, _ = text(200, 200)
    got = cutoff(ids, None, 1.0, SPECIAL, UNK)
    assert torch.equal(got, torch.where(ids <= 2, ids, UNK))


def test_probability_0_replaces_nothing_and_1_every_ordinary_attended_token():
    ids, mask = text(200, 200)
    before = ids.clone()
    assert torch.equal(cutoff(ids, mask, 0.0, SPECIAL, UNK), before)
    ordinary = (mask == 1) & (ids > 2)
    got = cutoff(ids, mask, 1.0, SPECIAL, UNK)
    assert torch.equal(got, torch.where(ordinary, UNK, ids))
    assert torch.equal(ids, before) and got.dtype == ids.dtype  # a new tensor


def test_the_special_and_unknown_ids_are_the_callers():
    ids, mask = text(200, 200)
    got = cutoff(ids, mask, 1.0, [4, 49], 11)
    assert torch.equal(got, torch.where((mask == 1) & (ids != 4) & (ids != 49), 11, ids))


def test_draws_are_independent_from_call_to_call_and_token_to_token():
    ids, p, n = torch.full((500, 500), 7), 0.3, 250000
    torch.manual_seed(0)
    first, second = (cutoff(ids, None, p, SPECIAL, UNK) == UNK for _ in range(2))
    pairs = {
        "calls": first & second,
        "tokens side by side": first & first.roll(1, 1),
        "sequences": first & first.roll(1, 0),
    }
    for what, both in pairs.items():
        # 5 standard deviations; neighbours overlap, which adds a little to a binomial's
        assert abs(int(both.sum()) - n * p * p) < 5 * math.sqrt(n * p * p * (1 + 2 * p)), what
    torch.manual_seed(0)
    assert torch.equal(cutoff(ids, None, p, SPECIAL, UNK) == UNK, first)  # the seed decides


@pytest.mark.parametrize("model_kind", MODELS)
def test_a_training_step_cuts_a_share_of_p_from_the_second_view_alone_and_anew_each_time(model_kind):
    model = model_of(model_kind, **CUTOFF)
    batch = ragged_batch([20, 11] * 100, pad=7)  # padding that only the mask distinguishes from text
    batch["input_ids"][:, 0] = FIRST_TOKEN[model_kind]
    calls = encoder_calls(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            model(**batch, labels=labels_of("3 labels", 200))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ordinary = (mask == 1) & (ids > UNK)
    cuts = []
    for call in calls:
        first, second = call["input_ids"].chunk(2)
        assert torch.equal(first, ids)
        assert torch.equal(second[~ordinary], ids[~ordinary])
        cuts.append((second != ids)[ordinary])
        assert (second[ordinary][cuts[-1]] == UNK).all()
    n, p = int(ordinary.sum()), CUTOFF["masking_prob"]
    assert len(cuts) == 2 and n > 2000
    for cut, share in ((cuts[0], p), (cuts[1], p), (cuts[0] & cuts[1], p * p)):
        assert abs(int(cut.sum()) - n * share) < 5 * math.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("model_kind", MODELS)
def test_cutoff_of_embeddings_is_an_error(model_kind):
    model, inputs = model_of(model_kind, **CUTOFF), inputs_of(model_kind, "inputs_embeds")
    labels = labels_of("3 labels", len(LENGTHS))
    with pytest.raises(ValueError, match="masking_prob replaces tokens: give input_ids, not inputs_embeds"):
        model(**inputs, labels=labels)
    assert model.eval()(**inputs, labels=labels).loss > 0  # evaluation cuts nothing


@pytest.mark.parametrize(
    ("model_kind", "problem_type"),
    [("roberta", None), ("roberta", "multi_label_classification"), ("deberta-v2", "multi_label_classification")],
)
def test_rdrop_of_a_multi_label_problem_is_an_error(model_kind, problem_type):
    model, inputs = model_of(model_kind, **RDROP, problem_type=problem_type), inputs_of(model_kind, "right padding")
    labels = (torch.arange(3 * len(LENGTHS)) % 2).view(-1, 3).float()
    with pytest.raises(ValueError, match="multi-label problems have none"):
        model(**inputs, labels=labels)
    logits = model.eval()(**inputs).logits
    loss = model(**inputs, labels=labels).loss
    assert_close(loss, F.binary_cross_entropy_with_logits(logits, labels), 1e-6)


# The loss of one pass.


def test_regression_is_the_mean_squared_error_of_the_only_logit():
    logits = torch.tensor([[1.0], [-2.0], [0.5]], requires_grad=True)
    loss = classification_loss(logits, torch.tensor([3.0, -2.0, 1.0]), None)
    assert loss.item() == pytest.approx((4 + 0 + 0.25) / 3)
    loss.backward()
    assert_close(logits.grad, torch.tensor([[-4.0], [0.0], [-1.0]]) / 3, 1e-6)


def test_regression_to_several_numbers_is_a_mean_over_all_of_them():
    logits, labels = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [5.0, 1.0]])
    assert classification_loss(logits, labels, "regression").item() == pytest.approx((1 + 0 + 4 + 9) / 4)


def test_cross_entropy_is_the_mean_of_minus_log_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])) + torch.tensor([[3.0], [-1.0]])
    want = -(math.log(0.25) + math.log(0.7)) / 2
    assert classification_loss(logits, torch.tensor([1, 2]), None).item() == pytest.approx(want)


@pytest.mark.parametrize("ignored", [-1, -2, -100])
def test_negative_ids_are_left_out_of_sum_and_count(ignored):
    z, _ = random_logits(6, 3)
    labels = torch.tensor([0, ignored, 2, ignored, 1, 1])
    got, want = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = classification_loss(got, labels, None)
    expected = F.cross_entropy(want[labels >= 0], labels[labels >= 0])
    assert_close(loss, expected, 1e-14)
    loss.backward()
    expected.backward()
    assert_close(got.grad, want.grad, 1e-14)
    assert torch.count_nonzero(got.grad[labels < 0]) == 0


def test_with_every_id_negative_loss_and_gradient_are_0():
    logits = random_logits(3, 4)[0].requires_grad_()
    loss = classification_loss(logits, torch.tensor([-1, -100, -1]), None)
    assert loss == 0
    loss.backward()
    assert torch.count_nonzero(logits.grad) == 0


def test_soft_labels_are_cross_entropy_against_distributions():
    z, _ = random_logits(5, 4)
    soft = distributions(5, 4)  # of another dtype than the logits
    want = -(soft.double() * z.log_softmax(-1)).sum(-1).mean()
    assert_close(classification_loss(z, soft, "soft_label_classification"), want, 1e-12)
    hard = torch.tensor([0, 3, 1, 1, 2])
    as_soft = classification_loss(z, F.one_hot(hard, 4), "soft_label_classification")
    assert_close(as_soft, classification_loss(z, hard, None), 1e-12)


def test_multi_label_is_a_binary_cross_entropy_for_each_label():
    z, _ = random_logits(5, 4)
    labels = (torch.arange(20) % 3 == 0).view(5, 4)
    want = -torch.where(labels, z.sigmoid(), (-z).sigmoid()).log().mean()
    assert_close(classification_loss(z, labels.float(), None), want, 1e-12)
    assert_close(classification_loss(z, labels.long(), "multi_label_classification"), want, 1e-12)


IDS, NUMBERS = torch.tensor([2, 0, 1, 1]), torch.tensor([0.5, -1.0, 3.0, 2.0])


@pytest.mark.parametrize(
    ("classes", "labels", "problem_type"),
    [
        (1, NUMBERS, "regression"),
        (1, NUMBERS[:, None], "regression"),
        (1, NUMBERS.double(), "regression"),
        (1, IDS, "regression"),
        (3, IDS, "single_label_classification"),
        (3, IDS.int(), "single_label_classification"),
        (3, IDS.float(), "single_label_classification"),
        (3, IDS[:, None], "single_label_classification"),
        (3, F.one_hot(IDS).float(), "multi_label_classification"),
    ],
)
def test_shape_and_dtype_of_the_labels_decide_the_problem_type(classes, labels, problem_type):
    z = random_logits(4, classes)[0].float()
    want = {
        "regression": lambda: F.mse_loss(z[:, 0], labels.reshape(-1).float()),
        "single_label_classification": lambda: F.cross_entropy(z, labels.reshape(-1).long()),
        "multi_label_classification": lambda: F.binary_cross_entropy_with_logits(z, labels),
    }[problem_type]()
    assert_close(classification_loss(z, labels, None), want, 1e-6)
    assert_close(classification_loss(z, labels, problem_type), want, 1e-6)


def test_a_named_problem_overrides_what_the_labels_look_like():
    z, _ = random_logits(4, 3)
    labels = distributions(4, 3).double()
    values = {
        name: classification_loss(z, labels, name).item()
        for name in ("regression", "soft_label_classification", "multi_label_classification")
    }
    assert values["regression"] == pytest.approx((z - labels).pow(2).mean().item())
    assert values["soft_label_classification"] == pytest.approx(-(labels * z.log_softmax(-1)).sum(-1).mean().item())
    assert values["multi_label_classification"] == classification_loss(z, labels, None).item()
    assert len(set(values.values())) == 3


def test_what_a_step_on_two_views_returns_beside_the_loss_is_the_first_views():
    model = CLASSIFIERS["deberta-v2"][0](tiny_deberta_config(reg_loss_wgt=1.0)).train()
    batch = ragged_batch([7, 3, 5], pad=0)
    output = model(**batch, labels=torch.tensor([0, 1, 2]), output_hidden_states=True, output_attentions=True)
    plain = model.eval()(**batch, output_hidden_states=True, output_attentions=True)
    assert_close(output.logits, plain.logits)
    for got, want in zip(
        (*output.hidden_states, *output.attentions), (*plain.hidden_states, *plain.attentions), strict=True
    ):
        assert_close(got, want)


def test_views_whose_means_are_equal_in_half_precision_still_have_their_distance():
    generator = torch.Generator().manual_seed(0)
    first = 3 * torch.randn(64, 3, generator=generator)
    views = [first.bfloat16(), (first + 0.05 * torch.randn(64, 3, generator=generator)).bfloat16()]
    labels = torch.arange(64) % 3
    got = two_view_losses(*views, labels, None, 1.0)[1]
    assert_close(got, two_view_losses(*(view.float() for view in views), labels, None, 1.0)[1])


def test_cutoff_without_the_tokenizers_ids_in_the_config_raises_an_error_that_names_them():
    model = CLASSIFIERS["roberta"][0](tiny_config(reg_loss_wgt=1.0, masking_prob=0.1)).train()
    with pytest.raises(ValueError, match="special_token_ids and unk_token_id"):
        model(**ragged_batch([5, 3]), labels=torch.tensor([0, 1]))


# Class weights.


@pytest.mark.parametrize("labels", [torch.tensor([0, 2, 2, 1, 0]), torch.tensor([2, -1, 0, -100, 2])])
def test_class_weights_multiply_each_examples_cross_entropy_and_the_divisor_stays_the_number_of_examples(labels):
    z, weights = random_logits(5, 3)[0].requires_grad_(), torch.tensor([0.5, 0.0, 3.0])
    loss = classification_loss(z, labels, None, weights)
    loss.backward()
    counted = labels >= 0
    of_rows = torch.where(counted, weights.double()[labels.clamp(min=0)], 0.0)[:, None] / counted.sum()
    classes, p = F.one_hot(labels.clamp(min=0), 3), z.detach().softmax(-1)
    assert_close(loss.detach(), -(of_rows * classes * p.log()).sum(), 1e-12)
    assert_close(z.grad, of_rows * (p - classes), 1e-12)


@pytest.mark.parametrize("labels", [torch.tensor([0.5, 1.0]), F.one_hot(torch.tensor([0, 1])).float()])
def test_class_weights_without_class_ids_are_refused(labels):
    z = random_logits(2, 1 if labels.dim() == 1 else 2)[0]
    with pytest.raises(ValueError, match="class_weights are for labels that are class ids"):
        classification_loss(z, labels, None, torch.ones(2))


@pytest.mark.parametrize("settings", [{}, RDROP, CUTOFF], ids=["one pass", "R-Drop", "cutoff"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_training_step_weighs_the_cross_entropy_alone_and_an_evaluation_nothing(kind, settings, monkeypatch):
    model, batch = model_of(kind, **settings).train(), ragged_batch(LENGTHS, pad=PAD[kind])
    if settings is CUTOFF:
        fixed_draw(monkeypatch, batch["input_ids"])
    labels, weights = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([0.25, 2.0, 1.5])
    if settings:
        unweighted, *views = two_views(model, **batch, labels=labels)
    else:
        unweighted = model(**batch, labels=labels)
        views = [unweighted.logits]
    task = sum((weights[labels] * F.cross_entropy(z, labels, reduction="none")).mean() for z in views)
    expected = task + unweighted.consistency_loss if settings else task
    model.class_weights = weights
    output = model(**batch, labels=labels)
    assert_close(output.loss, expected)
    if settings:
        assert torch.equal(output.consistency_loss, unweighted.consistency_loss)
        assert_close(output.task_loss, task)
    assert abs(output.loss.item() - unweighted.loss.item()) > 0.01
    reference = copy.deepcopy(model)
    for loss, of in ((output.loss, model), (expected, reference)):
        gradients = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        for parameter, gradient in zip(of.parameters(), gradients, strict=True):
            parameter.grad = gradient
    assert_same_gradients(model, reference)
    evaluated = model.eval()(**batch, labels=labels)
    assert_close(evaluated.loss, F.cross_entropy(evaluated.logits, labels))
