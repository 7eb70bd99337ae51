"""Where a step waits for a GPU: not in forward or backward, once the lengths are read from the mask on the CPU.

Tensors on the meta device have no values and take a GPU's way through the models: whatever reads a value there raises.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, ragged_batch, randomise_, settings_of, tiny_config, tiny_deberta_config

from lora_nlu.methods.marking import mark_only_lora_as_trainable, mark_trainable
from lora_nlu.methods.table import METHODS
from lora_nlu.models.losses import two_views
from lora_nlu.ops.packing import lengths_of
from lora_nlu.training.graphs import with_fixed_size
from lora_nlu.training.trainer import AdapterTrainer, _collated_with_lengths

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, **DROPOUT}
CUTOFF = {"reg_loss_wgt": 1.0, "masking_prob": 0.2, "special_token_ids": [0, 1, 2], "unk_token_id": 3}
XXLARGE = {"position_buckets": 256, "max_relative_positions": -1, "max_position_embeddings": 512}
MODELS: dict[str, Any] = {
    "roberta": tiny_config,
    "deberta, as xxlarge": partial(tiny_deberta_config, **XXLARGE),
    "deberta without a convolution": partial(tiny_deberta_config, **XXLARGE, conv_kernel_size=0),
}
STEPS: dict[str, dict[str, Any]] = {"plain": {}, "R-Drop": {"reg_loss_wgt": 1.0}, "cutoff": CUTOFF}
LENGTHS = [9, 4, 6, 4, 1]


def new_model(kind: str, **settings: Any) -> Any:
    config = MODELS[kind](**LORA | settings)
    model = randomise_(CLASSIFIERS[config.model_type][0](config))
    mark_only_lora_as_trainable(model)
    return model.train()


def batch_of(*lengths: int) -> dict[str, Any]:
    return ragged_batch([*lengths]) | {"labels": torch.arange(len(lengths)) % 3}


def without_values(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to("meta") for name, x in batch.items()}


def step(model: Any, **inputs: Any) -> list[torch.Tensor]:
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant checkpoints", "checkpoints"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", MODELS)
def test_forward_and_backward_read_no_value_of_a_batch_with_its_lengths(kind, steps, checkpointing):
    model = new_model(kind, **STEPS[steps]).to("meta")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing, "preserve_rng_state": False})
        model.enable_input_require_grads()
    batch = without_values(batch_of(*LENGTHS))
    found = step(model, **batch, sequence_lengths=LENGTHS)
    assert len(found) == 1 + sum(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        step(model, **batch)  # reads the mask


@pytest.mark.parametrize("make_config", [tiny_config, tiny_deberta_config])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_any_method_reads_no_value_of_a_batch_with_its_lengths(method, make_config):
    config = make_config(**settings_of(METHODS[method]), **DROPOUT)
    model = CLASSIFIERS[config.model_type][0](config)
    mark_trainable(model)
    found = step(model.train().to("meta"), **without_values(batch_of(*LENGTHS)), sequence_lengths=LENGTHS)
    assert len(found) > 1


@pytest.mark.parametrize("request_", [{}, {"output_hidden_states": True}, {"output_attentions": True}], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_an_evaluation_reads_no_value_of_a_batch_with_its_lengths(kind, request_):
    model = new_model(kind).to("meta").eval()
    output = model(**without_values(batch_of(*LENGTHS)), sequence_lengths=LENGTHS, **request_)
    assert output.logits.shape == (5, 3) and output.loss.is_meta


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7], [1, 1]], ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_with_its_lengths_gives_the_same_bits(kind, steps, lengths):
    found = []
    for known in ({}, {"sequence_lengths": lengths}):
        torch.manual_seed(0)
        found.append(step(new_model(kind, **STEPS[steps]), **batch_of(*lengths), **known))
    assert len(found[0]) > 1
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_lengths_of_another_number_of_sequences_are_those_of_a_whole_batch_and_not_used():
    model, batch = new_model("roberta").eval(), batch_of(*LENGTHS)
    part = {name: x[1:3] for name, x in batch.items()}
    assert torch.equal(model(**part, sequence_lengths=LENGTHS).logits, model(**part).logits)


@pytest.mark.parametrize("wrong", [[9, 4, 6, 4, 10], [9, 4, 6, 4, 0]])
@pytest.mark.parametrize("kind", ["roberta", "deberta, as xxlarge"])
def test_impossible_lengths_are_refused(kind, wrong):
    with pytest.raises(ValueError, match=r"sequence_lengths must be 1 to 9, the columns of attention_mask, got \[9, 4"):
        new_model(kind)(**batch_of(*LENGTHS), sequence_lengths=wrong)


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]), [2, 1, 3]),
        (torch.ones(2, 3, dtype=torch.bool), [3, 3]),
        (torch.tensor([[0, 1, 1]]), None),  # padding on the left
        (torch.tensor([[1, 0, 1]]), None),  # a hole
        (torch.tensor([[0, 0, 0], [1, 1, 1]]), None),  # a sequence of no tokens
        (torch.ones(2, 3), None),  # floats may be additive
        (torch.ones(2, 1, 1, 3, dtype=torch.long), None),
    ],
)
def test_lengths_are_read_from_a_mask_of_padding_on_the_right_alone(mask, lengths):
    assert lengths_of(mask) == lengths


def test_both_views_have_the_lengths_of_the_batch():
    views = two_views(tiny_config(), batch_of(3, 1) | {"sequence_lengths": [3, 1]})
    assert views["sequence_lengths"] == [3, 1, 3, 1] == lengths_of(views["attention_mask"])
    assert two_views(tiny_config(), batch_of(3, 1) | {"sequence_lengths": None})["sequence_lengths"] is None


def test_a_batch_of_fixed_size_reads_no_value_if_it_has_its_lengths():
    batch = batch_of(40, 3)
    inputs, rows = with_fixed_size(without_values(batch) | {"sequence_lengths": [40, 3]}, 512, 1)
    expected, expected_rows = with_fixed_size(batch, 512, 1)
    assert rows == expected_rows == 64
    assert {n: x.shape for n, x in inputs.items()} == {n: x.shape for n, x in expected.items()}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        with_fixed_size(without_values(batch), 512, 1)


def test_a_collated_batch_has_its_lengths_where_they_say_what_the_mask_says():
    batch = batch_of(3, 1)
    assert _collated_with_lengths(dict, batch) == batch | {"sequence_lengths": [3, 1]}
    left = batch | {"attention_mask": batch["attention_mask"].flip(1)}
    assert _collated_with_lengths(dict, left).keys() == batch.keys()
    del batch["attention_mask"]
    assert _collated_with_lengths(dict, batch).keys() == batch.keys()


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cuda", False), ("cpu", True)])
@pytest.mark.parametrize("compiled", [True, False])
def test_batches_of_a_run_have_lengths_and_move_to_a_gpu_without_waiting(device, pinned, compiled, monkeypatch):
    def init(self, args):
        self.args, self.data_collator, self.after_steps = args, dict, {}
        self.accelerator = SimpleNamespace(dataloader_config=SimpleNamespace(non_blocking=False))
        self.add_callback = self.before_steps = lambda *arguments: None

    monkeypatch.setattr(AdapterTrainer.__bases__[0], "__init__", init)
    flags = {"dataloader_pin_memory": pinned, "torch_compile": compiled, "bf16": False}
    trainer: Any = AdapterTrainer(SimpleNamespace(device=torch.device(device), **flags))
    assert ("sequence_lengths" in trainer.data_collator(batch_of(3, 1))) is not compiled
    assert trainer.accelerator.dataloader_config.non_blocking is (device == "cuda" and pinned)
