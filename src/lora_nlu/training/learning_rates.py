"""Learning rates that differ from --learning_rate: of LoRA's B (LoRA+), and of the classification head."""

from typing import Any

from lora_nlu.errors import UsageError
from lora_nlu.methods.marking import describe_method
from lora_nlu.methods.table import METHODS
from lora_nlu.models.loading import head_names


def check_rates(model: Any, args: Any) -> None:
    """Raise UsageError if --loraplus_lr_ratio is given and no `lora_B` trains in the model; args: RunArguments."""
    if args.loraplus_lr_ratio is not None and not _matrices_B(model):
        label = METHODS[describe_method(model)["name"]].label
        raise UsageError(f"--loraplus_lr_ratio has no effect with {label}: it trains no lora_B. Remove it.")


def with_rates(groups: list[dict[str, Any]], model: Any, args: Any) -> list[dict[str, Any]]:
    """An optimizer's groups; `lora_B` and the head get groups of their own if their learning rates differ.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns at `loraplus_lr_ratio` times the rate of A. PEFT's optimizer
    gives this rate to every one-dimensional parameter too, such as the head's biases; here only B has it, as in the
    paper. The groups keep their weight decay, and those of the other parameters come first: the rate in logs is theirs.
    """
    # getattr: args may be transformers' own TrainingArguments, which have neither
    ratio, head_rate = getattr(args, "loraplus_lr_ratio", None), getattr(args, "head_learning_rate", None)
    faster = _matrices_B(model) if ratio is not None else set()
    head = {id(model.get_parameter(name)) for name in head_names(model)} if head_rate is not None else set()
    if not faster and not head:
        return groups
    others, with_own_rate = [], []
    for group in groups:
        rate, params = group.get("lr", args.learning_rate), group["params"]
        others.append(group | {"params": [p for p in params if id(p) not in faster | head]})
        with_own_rate.append(group | {"params": [p for p in params if id(p) in faster], "lr": rate * (ratio or 1)})
        with_own_rate.append(group | {"params": [p for p in params if id(p) in head], "lr": head_rate})
    return [group for group in others + with_own_rate if group["params"]]


def _matrices_B(model: Any) -> set[int]:
    """The ids of the matrices `lora_B` that train."""
    return {id(p) for name, p in model.named_parameters() if name.endswith(".lora_B") and p.requires_grad}
