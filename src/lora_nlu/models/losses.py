"""The losses of a classifier: of logits against labels, and of two views of the same examples.

R-Drop (Liang et al. 2021, arXiv 2106.14448) asks two passes with independent dropout to agree; cutoff (Shen et al.
2020, arXiv 2009.13818) also hides some tokens from the second. Dim letters: B sequences, S longest, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification", "soft_label_classification")


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None, class_weights: Tensor | None = None
) -> Tensor:
    """The loss of `logits` [B, C], a mean over the batch, in fp32 where they are halves.

    `problem_type` decides, or else the labels: numbers [B] for one label (mean squared error), class ids [B]
    (cross-entropy, rows with a negative id left out), floats [B, C] (binary cross-entropy, or with
    "soft_label_classification" cross-entropy against distributions). With `class_weights` [C] the cross-entropy of an
    example is multiplied by the weight of its class, and the sum is still divided by the number of examples. Raises
    ValueError for any other problem type, for regression labels of another shape than the logits, and for class weights
    without class ids.
    """
    problem_type, logits = problem_type or _problem(logits, labels), _wide(logits)
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"config.problem_type {problem_type!r} is none of {', '.join(PROBLEM_TYPES)}.")
    if class_weights is not None and problem_type != "single_label_classification":
        raise ValueError(f"class_weights are for labels that are class ids, not for {problem_type}.")
    if problem_type == "regression":
        if labels.shape != logits.shape and not (logits.shape[1] == 1 and labels.numel() == len(logits)):
            raise ValueError(f"Regression needs labels of the logits' shape {[*logits.shape]}, got {[*labels.shape]}.")
        return F.mse_loss(logits.reshape(-1), labels.to(logits.dtype).reshape(-1))
    if problem_type == "single_label_classification":
        labels = labels.reshape(-1).long()
        weights = None if class_weights is None else class_weights.to(logits)
        total = F.cross_entropy(logits, labels.masked_fill(labels < 0, -100), weights, reduction="sum")
        return total / (labels >= 0).sum().clamp(min=1)
    if problem_type == "soft_label_classification":
        return F.cross_entropy(logits, labels.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _problem(logits: Tensor, labels: Tensor) -> str:
    if logits.shape[-1] == 1:
        return "regression"
    is_id = labels.dim() == 1 or not labels.is_floating_point()
    return "single_label_classification" if is_id else "multi_label_classification"


# ------------------------------------------------------------------------------- two views: R-Drop and cutoff


@dataclass
class TwoViewOutput(SequenceClassifierOutput):
    """A training step on two views: `loss` = `task_loss` + `consistency_loss`; the rest is the first view's."""

    task_loss: Tensor | None = None
    consistency_loss: Tensor | None = None


def two_views(config: PreTrainedConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a batch and the same again, or their cutoff, as one batch of 2 B. Raises ValueError for cutoff."""
    ids = inputs["input_ids"]
    replaced: dict[str, Any] = {}
    if p := getattr(config, "masking_prob", 0):
        if ids is None:
            raise ValueError("masking_prob replaces tokens: give input_ids, not inputs_embeds.")
        if not hasattr(config, "special_token_ids") or not hasattr(config, "unk_token_id"):
            raise ValueError("masking_prob needs the tokenizer's special_token_ids and unk_token_id in the config.")
        replaced["input_ids"] = cutoff(ids, inputs["attention_mask"], p, config.special_token_ids, config.unk_token_id)
    for name, x in inputs.items():
        if name == "sequence_lengths":
            replaced[name] = x and [*x, *x]
        elif x is not None and not (name in ("token_type_ids", "position_ids") and x.shape[0] == 1):
            replaced[name] = torch.cat([x, replaced.get(name, x)])  # but one row of types or positions is for all
    return inputs | replaced


def output_with_loss(
    config: PreTrainedConfig, logits: Tensor, labels: Tensor | None, several_floats: str, two_view_weight: float,
    encoded: BaseModelOutput, class_weights: Tensor | None,
) -> SequenceClassifierOutput:  # fmt: skip
    """A classifier's output from its logits [B, C] and its encoder's output; the loss is None without labels.

    Where `config.problem_type` is not set, it is `several_floats` for labels [B, C]. With a `two_view_weight`, logits
    are [2 B, C], of both views; the loss and its errors are of `two_view_losses`. `class_weights`: as in
    `classification_loss`.
    """
    problem_type: str | None = config.problem_type
    if problem_type is None and labels is not None and labels.dim() == 2 and labels.shape[1] > 1:
        problem_type = several_floats
    hidden, attentions = encoded.hidden_states, encoded.attentions
    if labels is None or not two_view_weight:
        loss = None if labels is None else classification_loss(logits, labels, problem_type, class_weights)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden, attentions=attentions)
    first, second = logits.chunk(2)  # [B, C] each
    task, consistency = two_view_losses(first, second, labels, problem_type, two_view_weight, class_weights)
    hidden, attentions = _first_view(hidden), _first_view(attentions)
    return TwoViewOutput(task + consistency, first, hidden, attentions, task_loss=task, consistency_loss=consistency)


def _first_view(layers: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """The first view's part of tensors [2 B, ...]; a layer's that was not requested is None."""
    return layers and tuple(x if x is None else x.chunk(2)[0] for x in layers)


def two_view_losses(
    first: Tensor, second: Tensor, labels: Tensor, problem_type: str | None, weight: float,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(task, consistency): what both views' logits [B, C] lose against the labels, and against each other.

    task = L(z1) + L(z2), summed as the reference does; with m = (z1 + z2) / 2 and the gradient flowing through m,
    consistency = weight / 2 * (KL(softmax m || softmax z1) + KL(softmax m || softmax z2)), each KL a mean over
    examples x classes (not over examples); for regression the mean squared distances to m instead of the KLs.
    `class_weights` weigh the task's part alone (`classification_loss`).
    Raises ValueError for multi-label problems, which have no softmax.
    """
    problem_type = problem_type or _problem(first, labels)
    if problem_type == "multi_label_classification":
        raise ValueError("R-Drop compares class distributions: multi-label problems have none. Set reg_loss_wgt to 0.")
    first, second = _wide(first), _wide(second)  # views may be closer to each other than half precision can tell
    losses = [classification_loss(view, labels, problem_type, class_weights) for view in (first, second)]
    task = losses[0] + losses[1]
    mean = (first + second) / 2
    if problem_type == "regression":
        return task, 0.5 * weight * (F.mse_loss(first, mean) + F.mse_loss(second, mean))
    views = torch.stack([first, second]).log_softmax(-1)  # [2, B, C]
    target = mean.log_softmax(-1).expand_as(views)
    divergences = F.kl_div(views, target, reduction="none", log_target=True).sum(0)  # [B, C]
    if problem_type != "single_label_classification":
        return task, 0.5 * weight * divergences.mean()
    counted = labels.reshape(-1, 1) >= 0
    return task, 0.5 * weight * ((divergences * counted).sum() / (counted.sum().clamp(min=1) * first.shape[-1]))


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def cutoff(
    input_ids: Tensor, attention_mask: Tensor | None, masking_prob: float, special_ids: Sequence[int], unk_id: int
) -> Tensor:
    """Ids [B, S] in which each attended token that is not among `special_ids` is `unk_id` with that probability."""
    chosen = _draw(input_ids, masking_prob)
    for special in special_ids:  # torch.isin would have to wait for the GPU to receive them
        chosen &= input_ids != special
    if attention_mask is not None:
        chosen &= attention_mask != 0
    return input_ids.masked_fill(chosen, unk_id)


def _draw(like: Tensor, p: float) -> Tensor:
    """Independent booleans of the shape of `like`, True with probability p."""
    return torch.rand(like.shape, device=like.device) < p
