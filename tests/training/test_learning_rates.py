"""Learning rates of LoRA's B and of the head: which parameters have them, and what a step makes of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, ragged_batch, randomise_, settings_of, tiny_config, tiny_deberta_config

from lora_nlu.methods.marking import mark_trainable
from lora_nlu.methods.table import METHODS
from lora_nlu.training.learning_rates import with_rates

CONFIGS = {"roberta": tiny_config, "deberta-v2": tiny_deberta_config}
WITH_B = [row.name for row in METHODS.values() if row.has_ranks and row.rank_of == "lora_A"]


def trained(kind: str, method: str) -> Any:
    model = randomise_(CLASSIFIERS[kind][0](CONFIGS[kind](**settings_of(METHODS[method]))))
    mark_trainable(model)
    return model.train()


def groups_of(model: Any) -> list[dict[str, Any]]:
    """Two groups, with weight decay and without, as transformers makes them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name.endswith("bias") == is_bias], "weight_decay": 0.1 * (not is_bias)}
        for is_bias in (False, True)
    ]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", [*WITH_B, "bitfit", "full"])
def test_B_and_the_head_have_their_rates_and_nothing_else_changes(method, kind):
    model = trained(kind, method)
    names = {id(p): name for name, p in model.named_parameters()}
    ratio = 16.0 if method in WITH_B else None
    args = SimpleNamespace(learning_rate=1e-3, loraplus_lr_ratio=ratio, head_learning_rate=5e-2)
    before = groups_of(model)
    groups = with_rates(before, model, args)
    rates = {names[id(p)]: group.get("lr", 1e-3) for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {names[id(p)]: group["weight_decay"] for group in before for p in group["params"]}
    for name, rate in rates.items():
        in_encoder = name.startswith(f"{model.base_model_prefix}.")
        assert rate == (5e-2 if not in_encoder else 16e-3 if name.endswith(".lora_B") else 1e-3), name
    assert sum(len(group["params"]) for group in groups) == len(rates)
    assert groups[0].get("lr", 1e-3) == 1e-3 and all(group["params"] for group in groups)


def test_without_the_flags_the_groups_are_the_optimizers_own():
    model = trained("roberta", "lora")
    groups = groups_of(model)
    for args in (SimpleNamespace(learning_rate=1e-3), SimpleNamespace(loraplus_lr_ratio=None, head_learning_rate=None)):
        assert with_rates(groups, model, args) is groups


def test_a_step_of_gradient_descent_moves_B_and_the_head_as_much_more_as_their_rates_say():
    moved = {}
    for ratio, head_rate in ((None, None), (8.0, 3e-2)):
        model = trained("roberta", "lora")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        args = SimpleNamespace(learning_rate=1e-2, loraplus_lr_ratio=ratio, head_learning_rate=head_rate)
        optimizer = torch.optim.SGD(with_rates([{"params": [*model.parameters()]}], model, args), lr=1e-2)
        model(**ragged_batch([9, 4, 6], pad=1), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        moved[ratio] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for name, plain in moved[None].items():
        factor = 8 if name.endswith("lora_B") else 3 if name.startswith("classifier.") else 1
        torch.testing.assert_close(moved[8.0][name], factor * plain, rtol=1e-2, atol=1e-6)
        assert factor == 1 or plain.abs().max() > 1e-5
