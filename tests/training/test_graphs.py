"""Steps of a fixed size: what a batch is padded to changes nothing; graphs read the batch and add to the gradients."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from helpers import randomise_, tiny_config, tiny_deberta_config
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.ops.packing import PackedBatch
from lora_nlu.training import graphs
from lora_nlu.training.graphs import GraphedSteps, converted, halves_of, rounded, with_fixed_size
from lora_nlu.training.trainer import AdapterTrainer, can_record

KINDS = {
    "roberta": (RobertaForSequenceClassification, tiny_config),
    "deberta": (DebertaV2ForSequenceClassification, tiny_deberta_config),
}


def new_model(kind: str, **settings):
    of_class, config = KINDS[kind]
    zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "cls_dropout": 0.0}
    model = of_class(config(apply_lora=True, lora_r=4, lora_alpha=8, num_labels=2, **zero | settings))
    mark_only_lora_as_trainable(randomise_(model))
    return model.train()


def batch_of(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 50, mask.shape, generator=generator).where(mask == 1, 1)
    labels = torch.randint(0, 2, (len(lengths),), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def steps_of(model, longest: int = 64) -> GraphedSteps:
    return GraphedSteps(model, lambda inputs: model(**inputs).loss, longest, 1)


def test_a_plan_of_fixed_size_has_tokens_first_and_padding_after_them():
    plan = PackedBatch.of_size(torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]), 8)
    assert plan.slots.tolist() == [0, 1, 3, 6, 7, 8, 2, 4]
    assert plan.first_rows.tolist() == [0, 2, 3]
    assert plan.padded.key_mask[:, 0, 0].tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert plan.sequences(8)[0].tolist() == [0, 0, 1, 2, 2, 2, 3, 3]  # padding is no part of a sequence


@pytest.mark.parametrize("lengths", [(5, 2, 9, 2), (7, 7, 7), (1, 1), (32, 31)], ids=str)
@pytest.mark.parametrize("kind", ["roberta", "deberta", "deberta with a convolution"])
def test_a_batch_of_fixed_size_has_the_loss_and_the_gradients_of_its_tokens(kind, lengths):
    name, _, convolution = kind.partition(" ")
    model = new_model(name, **({"conv_kernel_size": 3, "conv_act": "tanh"} if convolution else {}))
    batch = batch_of(*lengths)
    loss = model(**batch).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    found = steps_of(model).step(batch)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=1e-6)
    assert gradients(model).keys() == expected.keys()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["roberta", "deberta"])
def test_frozen_weights_that_are_converted_once_change_no_bit_and_stay_as_they_are(kind, variant):
    settings = {"conv_kernel_size": 3} if kind == "deberta" else {}
    model, batch = new_model(kind, lora_variant=variant, **settings), batch_of(5, 2, 9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss_of(inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**inputs).loss

    found = []
    for half in (None, torch.bfloat16):
        steps = GraphedSteps(model, loss_of, 64, 1, half)
        found.append((steps.step(batch), gradients(model)))
        model.zero_grad()
    assert len(steps.halves) > 10
    assert {id(p) for p, _ in steps.halves}.isdisjoint(
        id(x.weight) for x in model.modules() if hasattr(x, "reads_weight")
    )
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close({name: p.detach() for name, p in model.named_parameters()}, before, rtol=0, atol=0)


def test_gradients_add_up_over_the_batches_of_a_step_and_with_those_of_other_steps():
    model = new_model("roberta")
    first, second, third = batch_of(5, 2), batch_of(9, 4, seed=1), batch_of(3, 3, seed=2)
    for batch in (first, second, third):
        model(**batch).loss.backward()
    expected = gradients(model)
    steps = steps_of(model)
    model.zero_grad()
    model(**first).loss.backward()
    assert steps.step(second) is not None
    model(**third).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    model.zero_grad()
    steps.step(second)
    once = gradients(model)
    model.zero_grad()
    model(**second).loss.backward()
    for name, gradient in gradients(model).items():  # those of earlier steps are gone
        torch.testing.assert_close(gradient, once[name], rtol=1e-5, atol=1e-6, msg=name)


def test_gradients_are_those_of_the_loss_that_a_gradient_scaler_has_scaled():
    model, batch = new_model("roberta"), batch_of(5, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    steps = GraphedSteps(model, lambda inputs: model(**inputs).loss, 64, 1, scale=scaler.scale)
    for factor in (8.0, 4.0):  # the factor that the scaler has at the time
        loss = steps.step(batch)
        found, plain = gradients(model), model(**batch).loss
        model.zero_grad()
        plain.backward()
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-6, atol=1e-6)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name], factor * gradient, rtol=1e-5, atol=1e-5, msg=name)
        model.zero_grad()
        scaler.update(4.0)


@pytest.mark.parametrize(
    "mask",
    [[[0, 1, 1], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]], [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]],
)
def test_another_mask_than_padding_on_the_right_is_no_step_of_fixed_size(mask):
    model = new_model("roberta")
    batch = batch_of(3, 3) | {"attention_mask": torch.tensor(mask)}
    assert steps_of(model).step(batch) is None
    assert not gradients(model)


def test_sizes_are_few_and_no_longer_than_the_model_allows():
    assert [rounded(n, 64) for n in (1, 64, 65, 1024, 1025, 1149)] == [64, 64, 128, 1024, 1152, 1152]
    inputs, rows = with_fixed_size(batch_of(40, 3), 512, 1)
    assert inputs["input_ids"].shape == (2, 64) and rows == 64
    assert inputs["input_ids"][0, 40:].eq(1).all() and not inputs["attention_mask"][0, 40:].any()
    inputs, rows = with_fixed_size(batch_of(40, 3), 50, 1)
    assert inputs["input_ids"].shape == (2, 40) and rows == 64
    inputs, rows = with_fixed_size(batch_of(32, 32), 512, 1)  # nothing to pad
    assert "attention_mask" not in inputs and rows is None


def test_a_step_of_fixed_size_never_waits_for_a_gpu():
    """FakeTensorMode raises where a value is read: what runs here can be recorded."""
    for kind in KINDS:
        with FakeTensorMode():
            model = new_model_unloaded(kind)
            mask = torch.ones(3, 32, dtype=torch.long)
            inputs = {"input_ids": torch.ones(3, 32, dtype=torch.long), "labels": torch.ones(3, dtype=torch.long)}
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**inputs, attention_mask=mask, packed=PackedBatch.of_size(mask, 64)).loss
            trained = [p for p in model.parameters() if p.requires_grad]
            assert None not in torch.autograd.grad(loss, trained, allow_unused=True)
            with pytest.raises(Exception, match="_local_scalar_dense"):
                model(**inputs, attention_mask=mask)  # reads the mask


def new_model_unloaded(kind: str):
    of_class, config = KINDS[kind]
    model = of_class(config(apply_lora=True, lora_r=4, lora_alpha=8, num_labels=2))
    mark_only_lora_as_trainable(model)
    return model.train()


class ReplayedOnCPU:
    """In place of torch.cuda.CUDAGraph: a replay computes the step of the recorded inputs."""

    steps: GraphedSteps

    def replay(self) -> None:
        (key, step), *_ = [(k, s) for k, s in self.steps.recorded.items() if s.graph is self]
        loss, trained, found = self.steps._compute(step.inputs, key[0])
        step.loss.copy_(loss)
        torch._foreach_add_([self.steps.gradients[i] for i in trained], found)


@pytest.fixture
def recorder(monkeypatch):
    """GraphedSteps of a tiny model that records on the CPU."""
    steps = steps_of(new_model("roberta"))
    steps.stream, steps.pool = SimpleNamespace(wait_stream=lambda other: None), None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (ReplayedOnCPU,), {"steps": steps}))
    monkeypatch.setattr(torch.cuda, "graph", lambda *arguments, **keywords: nullcontext())
    return steps


def test_the_second_batch_of_a_shape_is_recorded_and_later_ones_replayed_with_their_own_values(recorder):
    for number in range(5):
        batch = batch_of(5, 3 + number, seed=number)
        for p in recorder.parameters:
            p.grad = None
        loss = recorder.step(batch)
        found = [p.grad.clone() for p in recorder.parameters]
        expected = torch.autograd.grad(recorder.loss_of(dict(batch)), recorder.parameters)
        torch.testing.assert_close(loss, recorder.loss_of(dict(batch)).detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, [*expected], rtol=1e-5, atol=1e-6)
    assert len(recorder.recorded) == 1 and recorder.replays == 4
    recorder.step(batch_of(5, 3, 4))  # another shape
    assert len(recorder.recorded) == 1


def test_a_shape_beyond_the_limit_runs_without_a_graph(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 0)
    for number in range(3):
        assert recorder.step(batch_of(5, 3, seed=number)) is not None
    assert not recorder.recorded and not recorder.replays


def test_a_step_that_cannot_be_recorded_ends_recording_with_one_line_and_trains(recorder, monkeypatch, caplog):
    def fails(*arguments, **keywords):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    device, states, batch = torch.device("cuda", 0), [], batch_of(5, 3)
    stream = SimpleNamespace(wait_stream=lambda other: None, device=device)
    generator = SimpleNamespace(graphsafe_set_state=states.append)
    fresh = SimpleNamespace(manual_seed=lambda seed: SimpleNamespace(graphsafe_get_state=lambda: seed))
    for name, value in {"current_stream": lambda: stream, "set_stream": states.append, "graph": fails}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "initial_seed", lambda: 40)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch, "Generator", lambda device: fresh)
    losses = [float(recorder.step(batch)) for _ in range(4)]
    assert len(set(losses)) == 1 and not recorder.recorded
    assert states == [stream, 41]
    lines = [r.message for r in caplog.records]
    assert lines == ["Training without CUDA graphs, which is slower: operation not permitted when stream is capturing."]


def trainer_on(device: str, **settings):
    flags = {"gradient_checkpointing": False, "neftune_noise_alpha": None, "world_size": 1, "n_gpu": 1}
    args = SimpleNamespace(**flags | {"device": torch.device(device)} | settings)
    trainer = SimpleNamespace(args=args, methods=(), after_steps={}, model=new_model("roberta"))
    trainer.optimizer = AcceleratedOptimizer.__new__(AcceleratedOptimizer)  # as in a run, without its global state
    trainer.optimizer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    return trainer


def test_graphs_are_of_plain_steps_on_one_gpu():
    trainer = trainer_on("cuda")
    assert can_record(trainer, trainer.model)
    assert not can_record(trainer, torch.nn.DataParallel(trainer.model))
    others = [{"gradient_checkpointing": True}, {"neftune_noise_alpha": 5.0}, {"world_size": 2}]
    for settings in [*others, {"cuda_graphs": False}]:
        trainer = trainer_on("cuda", **settings)
        assert not can_record(trainer, trainer.model), settings
    trainer = trainer_on("cpu")
    assert not can_record(trainer, trainer.model)
    trainer = trainer_on("cuda")
    trainer.model.config.reg_loss_wgt = 1.0
    assert not can_record(trainer, trainer.model)
    trainer = trainer_on("cuda")
    trainer.optimizer.optimizer.train = lambda: None  # an optimizer without a schedule of its own
    assert not can_record(trainer, trainer.model)


def training_on(device: str, **settings):
    """A trainer whose model trains in bf16, and the dtypes that a weight has while transformers' step runs."""
    seen: list[torch.dtype] = []
    plain = trainer_on(device, **{"bf16": True, "torch_compile": False} | settings)
    trainer = AdapterTrainer.__new__(AdapterTrainer)
    vars(trainer).update(vars(plain), _graphs=None, _halves=None, seen=seen)
    trainer.model.config.reg_loss_wgt = 1.0  # no step of a graph
    return trainer, seen


def test_a_step_without_a_graph_computes_with_frozen_weights_that_were_converted_once(monkeypatch):
    def step(trainer, model, inputs, count):
        weight = trainer.model.roberta.encoder.layer[0].attention.self.key.weight
        trainer.seen.append((weight.dtype, weight.data_ptr()))
        return torch.ones(())

    monkeypatch.setattr(Trainer, "training_step", step)
    trainer, seen = training_on("cuda")
    weight = trainer.model.roberta.encoder.layer[0].attention.self.key.weight
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(wrapped)
    wrapped.module = trainer.model
    for model in (trainer.model, wrapped):
        trainer.training_step(model, {})
        assert weight.dtype is torch.float32
    assert seen[0] == seen[1] and seen[0][0] is torch.bfloat16
    others = [
        {"gradient_checkpointing": True},
        {"torch_compile": True},
        {"is_sharded": True},
        {"bf16": False, "fp16": False},
    ]
    for settings in others:
        trainer, seen = training_on("cuda", **settings)
        trainer.training_step(trainer.model, {})
        assert seen[0][0] is torch.float32, settings
    for device, of in (("cpu", lambda trainer: trainer.model), ("cuda", lambda trainer: torch.nn.Sequential())):
        trainer, seen = training_on(device)
        trainer.training_step(of(trainer), {})
        assert seen[0][0] is torch.float32


@pytest.mark.parametrize("kind", ["roberta", "deberta"])
def test_converted_weights_change_no_bit_of_a_step_on_two_views(kind):
    model, batch = new_model(kind, reg_loss_wgt=1.0), batch_of(5, 2, 9) | {"sequence_lengths": [5, 2, 9]}
    halves, found = halves_of(model, torch.bfloat16), []
    for values in ([], halves):
        model.zero_grad()
        with converted(values):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert len(halves) > 10 and len(found[0][1]) > 10
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_cutoff_spares_special_tokens_as_before():
    from lora_nlu.models.losses import cutoff

    ids = torch.tensor([[0, 5, 6, 2, 1]])
    found = cutoff(ids, (ids != 1).long(), 1.0, [0, 1, 2], 3)
    assert found.tolist() == [[0, 3, 3, 2, 1]]
