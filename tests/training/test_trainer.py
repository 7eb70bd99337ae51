"""Checkpoints: what they contain, that they appear complete or not at all, and that resuming changes no bit."""

import json
import os
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import assert_same_gradients, ragged_batch, randomise_, tiny_config, tiny_deberta_config, twins
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.training.checkpoints import complete_checkpoints
from lora_nlu.training.graphs import GraphedSteps
from lora_nlu.training.output_folder import locked
from lora_nlu.training.trainer import AdapterTrainer

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "roberta_cls3.json").read_text())
STEPS = 12


def examples(rows: int = 40, seed: int = 0) -> Dataset:
    """Sequences of 2 to 15 tokens; the label is the first one's parity."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(3, 50, (int(torch.randint(2, 16, (1,), generator=generator)),), generator=generator).tolist()
        for _ in range(rows)
    ]
    return Dataset.from_dict({"input_ids": ids, "label": [row[0] % 2 for row in ids]})


def collate(rows: list[dict]) -> dict[str, Tensor]:
    tensors = [torch.tensor(row["input_ids"]) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=1)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 1).long(),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def new_trainer(
    folder: Path, lora: bool = True, kind: type[AdapterTrainer] = AdapterTrainer, **settings
) -> AdapterTrainer:
    """A trainer over a tiny model with dropout, that saves every 4 of 12 steps."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = tiny_config(apply_lora=lora, lora_r=4, lora_alpha=8, num_labels=2, **dropout)
    model = randomise_(RobertaForSequenceClassification(config))
    if lora:
        mark_only_lora_as_trainable(model)
    flags = {
        "max_steps": STEPS,
        "save_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "weight_decay": 0.1,
    }
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **(flags | settings)
    )
    set_seed(args.seed)
    return kind(
        model=model,
        args=args,
        train_dataset=examples(),
        eval_dataset=examples(24, seed=1),
        data_collator=collate,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        metadata={"task": "custom", "labels": ["even", "odd"]},
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_steps_of_fixed_size_as_on_a_gpu_train_like_plain_ones(tmp_path, monkeypatch, smoothing):
    trained = {}
    for is_fixed in (False, True):
        folder = tmp_path / str(is_fixed)
        trainer = new_trainer(folder, gradient_accumulation_steps=2, label_smoothing_factor=smoothing, max_steps=4)
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        steps = []
        with monkeypatch.context() as patch:
            patch.setattr("lora_nlu.training.trainer.can_record", lambda *_: is_fixed)  # noqa: B023
            patch.setattr(GraphedSteps, "_run", counted(GraphedSteps._run, steps))
            trainer.train()
        assert len(steps) == 7 * is_fixed  # of 5 micro-batches an epoch
        trained[is_fixed] = parameters(trainer)
    torch.testing.assert_close(trained[True], trained[False], rtol=1e-4, atol=1e-6)


def counted(function, calls: list):
    return lambda *arguments: calls.append(None) or function(*arguments)


def parameters(trainer: AdapterTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """The folder and final parameters of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = new_trainer(folder)
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    assert all(torch.equal(before[n], after[n]) != p.requires_grad for n, p in trainer.model.named_parameters())
    return folder, after


def test_only_checkpoints_with_a_readable_state_of_their_own_step_count_as_complete(tmp_path):
    def checkpoint(name: str, state: str | None) -> None:
        (tmp_path / name).mkdir(parents=True)
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
        (tmp_path / name / "files.json").write_text(json.dumps({"trainer_state.json": len(state or "")}))

    for step in (100, 20, 3):
        checkpoint(f"checkpoint-{step}", json.dumps({"global_step": step}))
    checkpoint("checkpoint-200", None)
    checkpoint("checkpoint-300", '{"global_step": 30')
    checkpoint("checkpoint-400", json.dumps({"global_step": 300}))
    checkpoint("checkpoint-500", "{}")
    checkpoint("checkpoint-600", "[]")
    checkpoint("checkpoint-best", json.dumps({"global_step": 700}))
    checkpoint("_saving/checkpoint-800", json.dumps({"global_step": 800}))
    (tmp_path / "checkpoint-900").write_text("a file")
    checkpoint("checkpoint-1000", json.dumps({"global_step": 1000}))
    (tmp_path / "checkpoint-1000" / "files.json").write_text('{"trainer_state.json": 21, "optimizer.pt": 9}')
    checkpoint("checkpoint-1100", json.dumps({"global_step": 1100}))
    (tmp_path / "checkpoint-1100" / "files.json").unlink()
    assert names(complete_checkpoints(str(tmp_path))) == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert complete_checkpoints(str(tmp_path / "nowhere")) == []


def test_a_checkpoint_contains_the_trained_parameters_and_no_base_weights(uninterrupted):
    folder, final = uninterrupted
    assert names(complete_checkpoints(str(folder))) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert not (folder / "_saving").exists()
    last = folder / "checkpoint-12"
    tensors = load_file(last / ADAPTER_WEIGHTS)
    trained = {n: t for n, t in final.items() if "lora_" in n or n.startswith("classifier.")}
    as_saved = {f"base_model.model.{n}" + (".weight" if "lora_" in n else ""): t for n, t in trained.items()}
    assert_equal_bits(tensors, as_saved)
    present = {path.name for path in last.iterdir()}
    assert present >= {
        ADAPTER_CONFIG,
        RUN_METADATA,
        ADAPTER_WEIGHTS,
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    assert not present & {"model.safetensors", "pytorch_model.bin"}
    moments = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    assert len(moments) == len(trained)


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_bit_equal_to_the_uninterrupted_one(step, uninterrupted, tmp_path):
    folder, final = uninterrupted
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    trainer = new_trainer(tmp_path)
    randomise_(trainer.model.classifier, seed=9)  # whatever was in the model, the checkpoint's values count
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_equal_bits(parameters(trainer), final)
    state, expected = (json.loads((f / "checkpoint-12" / "trainer_state.json").read_text()) for f in (tmp_path, folder))
    assert state["num_input_tokens_seen"] == expected["num_input_tokens_seen"]
    optimizers = [torch.load(f / "checkpoint-12" / "optimizer.pt", weights_only=True) for f in (tmp_path, folder)]
    for got, want in zip(*(o["state"].values() for o in optimizers), strict=True):
        assert_equal_bits(got, want)


def test_another_seed_gives_another_model_so_bit_equality_is_no_accident(uninterrupted, tmp_path):
    trainer = new_trainer(tmp_path, seed=5, save_strategy="no")
    trainer.train()
    final = uninterrupted[1]
    assert not all(torch.equal(t, final[n]) for n, t in parameters(trainer).items())


class Breaks(AdapterTrainer):
    """Fails while it saves step 8: after the adapter, before the trainer state."""

    error: BaseException = OSError(28, "No space left on device")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.state.global_step == 8:
            raise self.error


class BreaksAsTorchDoes(Breaks):
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


class IsKilled(Breaks):
    error = KeyboardInterrupt()


@pytest.mark.parametrize("kind", [Breaks, BreaksAsTorchDoes, IsKilled])
def test_a_save_that_breaks_off_leaves_the_earlier_checkpoint_and_no_half_one(kind, uninterrupted, tmp_path):
    trainer = new_trainer(tmp_path, kind=kind)
    with pytest.raises(KeyboardInterrupt if kind is IsKilled else UserError) as error:
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    if kind is not IsKilled:
        assert "checkpoint-8" in str(error.value) and "checkpoint-4 is complete" in str(error.value)
        assert str(error.value).count("\n") < 3
    again = new_trainer(tmp_path)
    again.train(resume_from_checkpoint=str(complete_checkpoints(str(tmp_path))[-1]))
    assert_equal_bits(parameters(again), uninterrupted[1])


def test_the_error_of_a_first_save_that_fails_says_that_there_is_no_earlier_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no earlier one"):
        new_trainer(tmp_path, kind=Breaks, save_steps=8).train()
    assert list(tmp_path.iterdir()) == []


class IsKilledInAnEvaluation(AdapterTrainer):
    step = 0

    def evaluate(self, *args, **kwargs):
        if self.state.global_step == self.step:
            raise KeyboardInterrupt
        return super().evaluate(*args, **kwargs)


PLATEAU = {"patience": 0, "factor": 0.1, "mode": "max"}


@pytest.mark.parametrize(("step", "save_steps"), [(5, 1), (10, 5), (12, 4)], ids=["first", "second", "inside an epoch"])
def test_a_run_killed_in_the_evaluation_at_an_epochs_end_evaluates_there_when_it_resumes(step, save_steps, tmp_path):
    """The learning rate falls by what the evaluation finds; early stopping and the best model count on it as well."""
    settings = {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    settings |= {"lr_scheduler_kwargs": PLATEAU, "greater_is_better": True, "save_steps": save_steps}
    complete = new_trainer(tmp_path / "complete", **settings)
    complete.train()
    killed = new_trainer(tmp_path / "killed", kind=IsKilledInAnEvaluation, **settings)
    killed.step = step
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = new_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=str(complete_checkpoints(str(tmp_path / "killed"))[-1]))
    evaluations = [
        [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (complete, resumed)
    ]
    assert [step for step, _ in evaluations[0]] == [5, 10, 12] and evaluations[0] == evaluations[1]
    assert_equal_bits(parameters(resumed), parameters(complete))


@pytest.mark.parametrize("steps", [9, 10], ids=["inside an epoch", "at its end"])
def test_a_run_resumed_from_its_last_checkpoint_takes_no_further_step(steps, tmp_path):
    settings = {"max_steps": steps, "lr_scheduler_type": "constant"}
    trainer = new_trainer(tmp_path, **settings)
    trainer.train()
    for _ in range(2):
        resumed = new_trainer(tmp_path, **settings)
        result = resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
        assert result.global_step == resumed.state.global_step == steps
        assert_equal_bits(parameters(resumed), parameters(trainer))


@pytest.mark.parametrize("resumed_at", [4, 8, 12])
def test_the_train_loss_of_a_resumed_run_is_the_mean_over_all_its_steps(resumed_at, tmp_path):
    logging = {"logging_steps": 5}
    loss = new_trainer(tmp_path / "complete", **logging).train().metrics["train_loss"]
    shutil.copytree(tmp_path / "complete", tmp_path / "resumed")
    resumed = new_trainer(tmp_path / "resumed", **logging)
    metrics = resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / f"checkpoint-{resumed_at}")).metrics
    assert metrics["train_loss"] == resumed.state.log_history[-1]["train_loss"] == loss
    state = json.loads((tmp_path / "resumed" / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["total_loss"] == pytest.approx(12 * loss, rel=1e-6)


def test_what_a_killed_process_left_behind_is_never_resumed_from_and_cleared_by_the_next_save(uninterrupted, tmp_path):
    folder, final = uninterrupted
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copytree(folder / "checkpoint-8", tmp_path / "_saving" / "checkpoint-8")
    (tmp_path / "_saving" / "checkpoint-8" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-8").mkdir()  # half a checkpoint of some other program
    assert names(complete_checkpoints(str(tmp_path))) == ["checkpoint-4"]
    trainer = new_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal_bits(parameters(trainer), final)
    assert names(complete_checkpoints(str(tmp_path))) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert not (tmp_path / "_saving").exists()


@pytest.mark.parametrize("kind", ["link", "read-only"])
def test_a_checkpoint_that_can_not_be_removed_is_left_told_once_and_not_counted(
    kind, uninterrupted, tmp_path, capsys, monkeypatch
):
    old, files = tmp_path / "checkpoint-2", tmp_path / ("elsewhere" if kind == "link" else "checkpoint-2")
    new_trainer(tmp_path, max_steps=2, save_steps=2).train()
    if kind == "link":
        old.rename(files)
        old.symlink_to(files)
    replace = os.replace

    def read_only(source: Path, target: Path) -> None:
        if kind == "read-only" and Path(source).parent == old:
            raise PermissionError(13, "Permission denied", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", read_only)
    trainer = new_trainer(tmp_path, save_steps=3, save_total_limit=2)
    trainer.train()
    assert_equal_bits(parameters(trainer), uninterrupted[1])
    assert names(complete_checkpoints(str(tmp_path))) == ["checkpoint-2", "checkpoint-9", "checkpoint-12"]
    reason = "it is a link" if kind == "link" else "Permission denied"
    assert capsys.readouterr().out.count(f"{old} can't be removed ({reason}) and stays.") == 1


def test_a_folder_of_somebody_elses_under_a_checkpoints_name_is_renamed_not_removed(uninterrupted, tmp_path, capsys):
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "thesis.txt").write_text("mine")
    trainer = new_trainer(tmp_path)
    trainer.train()
    assert_equal_bits(parameters(trainer), uninterrupted[1])
    assert names(complete_checkpoints(str(tmp_path))) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    (renamed,) = tmp_path.glob("checkpoint-8.*")
    assert (renamed / "thesis.txt").read_text() == "mine" and f"it is {renamed.name} now" in capsys.readouterr().out


def test_a_checkpoint_is_not_written_through_a_link_that_waits_under_its_temporary_name(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "_saving").symlink_to(tmp_path / "mine")
    new_trainer(tmp_path / "run", max_steps=4).train()
    assert names(complete_checkpoints(str(tmp_path / "run"))) == ["checkpoint-4"]
    assert not [*(tmp_path / "mine").iterdir()] and not (tmp_path / "run" / "_saving").is_symlink()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("eval_results.json", lambda trainer: trainer.save_metrics("eval", {"eval_loss": 0.5})),
        ("all_results.json", lambda trainer: trainer.save_metrics("eval", {"eval_loss": 0.5})),
        ("trainer_state.json", lambda trainer: trainer.save_state()),
        ("README.md", lambda trainer: trainer.create_model_card(model_name="tiny")),
        ("model.safetensors", lambda trainer: trainer.save_model()),
        ("config.json", lambda trainer: trainer.save_model()),
    ],
)
def test_a_file_that_transformers_would_write_appears_complete_or_not_at_all(name, write, tmp_path, monkeypatch):
    trainer, replace = new_trainer(tmp_path, lora=False), os.replace

    def no_space(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", no_space)
        with pytest.raises((OSError, UserError), match="No space left"):
            write(trainer)
    assert not (tmp_path / name).exists() and not [*tmp_path.glob(".*")]
    write(trainer)
    assert (tmp_path / name).stat().st_size and not [*tmp_path.glob(".*")]


def test_damaged_results_are_written_anew(tmp_path):
    trainer = new_trainer(tmp_path)
    trainer.save_metrics("train", {"train_loss": 1.5})
    for name in ("all_results.json", "eval_results.json"):
        (tmp_path / name).write_text("")  # as versions before 0.3 left it on a full disk
    trainer.save_metrics("eval", {"eval_loss": 0.5})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"train_loss": 1.5, "eval_loss": 0.5}
    assert (tmp_path / "eval_results.json").read_text() == '{\n    "eval_loss": 0.5\n}'


def test_an_upload_leaves_a_model_card_that_is_there(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    new_trainer(tmp_path).create_model_card(model_name="tiny")
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("lora", [True, False])
def test_load_best_model_at_end_ends_with_the_best_checkpoints_parameters(lora, tmp_path):
    trainer = new_trainer(
        tmp_path,
        lora,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best one isn't the last one
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(losses, key=losses.__getitem__)
    assert best != STEPS, "the last evaluation is the best: the test proves nothing"
    checkpoint = tmp_path / f"checkpoint-{best}"
    assert Path(trainer.state.best_model_checkpoint) == checkpoint
    assert json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())["best_model_checkpoint"] == str(
        checkpoint
    )
    assert trainer.evaluate()["eval_loss"] == losses[best]
    saved = load_file(checkpoint / (ADAPTER_WEIGHTS if lora else "model.safetensors"))
    final = parameters(trainer)
    for name, tensor in saved.items():
        name = name.removeprefix("base_model.model.")
        assert torch.equal(final[name.removesuffix(".weight") if "lora_" in name else name], tensor), name


@pytest.mark.parametrize("limit", [1, 2])
def test_save_total_limit_keeps_the_last_checkpoints_and_the_best(limit, tmp_path):
    new_trainer(tmp_path / "plain", save_steps=2, save_total_limit=limit).train()
    want = {1: ["checkpoint-12"], 2: ["checkpoint-10", "checkpoint-12"]}[limit]
    assert names(complete_checkpoints(str(tmp_path / "plain"))) == want
    trainer = new_trainer(
        tmp_path / "best",
        save_total_limit=limit,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint).name
    assert best != "checkpoint-12"
    assert best in names(complete_checkpoints(str(tmp_path / "best")))
    assert len(complete_checkpoints(str(tmp_path / "best"))) == limit


BEST = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
BEST["greater_is_better"] = True  # so that the best one isn't the last one


def test_the_best_checkpoint_is_found_where_the_run_was_moved_to(tmp_path):
    complete = new_trainer(tmp_path / "o", **BEST)
    complete.train()
    best = Path(complete.state.best_model_checkpoint).name
    assert best != "checkpoint-12"
    (tmp_path / "o").rename(tmp_path / "moved")
    new_trainer(tmp_path / "o", seed=1, **BEST).train()  # another run where it was
    moved = new_trainer(tmp_path / "moved", **BEST)
    moved.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-12"))
    assert_equal_bits(parameters(moved), parameters(complete))
    assert moved.state.best_model_checkpoint == str(tmp_path / "moved" / best)
    shutil.rmtree(tmp_path / "moved" / best)
    with pytest.raises(UserError, match=f"moved/{best}: the best checkpoint so far isn't there"):
        new_trainer(tmp_path / "moved", **BEST).train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-12"))


def test_at_the_end_no_folder_is_removed_that_the_run_did_not_write(tmp_path):
    (tmp_path / "checkpoint-9000").mkdir()
    (tmp_path / "checkpoint-9000" / "model.bin").write_text("mine")
    trainer = new_trainer(tmp_path, save_total_limit=1, **BEST)
    trainer.train()
    assert complete_checkpoints(str(tmp_path)) == [Path(trainer.state.best_model_checkpoint)]
    assert (tmp_path / "checkpoint-9000" / "model.bin").read_text() == "mine"


def test_what_is_uploaded_while_training_is_complete(tmp_path, monkeypatch):
    """The upload runs in the background and may list the folder at any time, such as while the next one is saved."""
    uploads = []

    class Hub:
        def upload_folder(self, folder_path: str, ignore_patterns=None, **kwargs) -> Future:
            uploads.append((Path(folder_path), ignore_patterns))
            assert names(complete_checkpoints(folder_path))[-1] == f"checkpoint-{trainer.state.global_step}"
            (done := Future()).set_result(None)
            return done

    class Looks(AdapterTrainer):
        def init_hf_repo(self, *args, **kwargs) -> None:
            self.hub_model_id, self.push_in_progress = "me/tiny", None

        def _save_rng_state(self, output_dir: str) -> None:
            super()._save_rng_state(output_dir)
            for folder, ignored in uploads:
                files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
                assert {*filter_repo_objects(files, ignore_patterns=ignored)} == {
                    "adapter_config.json", "adapter_model.safetensors", "training_args.bin"
                }  # fmt: skip

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = new_trainer(tmp_path, kind=Looks, push_to_hub=True, hub_strategy="every_save")
    with locked(tmp_path):
        trainer.train()
    assert len(uploads) == 3


def test_an_optimizer_state_in_another_order_of_the_parameters_is_refused(uninterrupted, tmp_path):
    """By the shapes: a fused AdamW would write beyond a smaller tensor's memory."""
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(uninterrupted[0] / checkpoint.name, checkpoint)
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = saved["state"]  # lora_A [4, 32] and lora_B [32, 4] are the first two
    moments[0], moments[1] = moments[1], moments[0]
    torch.save(saved, checkpoint / "optimizer.pt")
    with pytest.raises(UserError, match=r"exp_avg is \[32, 4\] for a parameter \[4, 32\]"):
        new_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_without_lora_a_checkpoint_contains_the_complete_model_and_resumes_bit_equal(tmp_path):
    first = new_trainer(tmp_path, lora=False)
    first.train()
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert saved.keys() == dict(first.model.named_parameters()).keys()
    assert not (tmp_path / "checkpoint-8" / ADAPTER_WEIGHTS).exists()
    shutil.rmtree(tmp_path / "checkpoint-12")
    again = new_trainer(tmp_path, lora=False)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_equal_bits(parameters(again), parameters(first))


def test_weight_decay_reaches_lora_and_head_weights_and_no_bias_as_in_the_reference(tmp_path):
    trainer = new_trainer(tmp_path)
    optimizer = trainer.create_optimizer()
    by_id = {id(p): n for n, p in trainer.model.named_parameters()}
    decay = {by_id[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    layers = tuple(f".layer.{i}." for i in range(2))  # the golden model has a third one
    reference = {
        name
        for name in GOLDEN["trainable_with_weight_decay"]
        if ".layer." not in name or any(i in name for i in layers)
    }
    assert {name for name, value in decay.items() if value == 0.1} == reference
    assert {name for name, value in decay.items() if value == 0.0} == {
        "classifier.dense.bias",
        "classifier.out_proj.bias",
    }


def test_the_steps_that_a_gradient_scaler_skips_are_no_divergence(tmp_path):
    trainer = new_trainer(tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    trainer.accelerator.scaler = scaler
    trainer.model.classifier.dense.weight.register_hook(lambda gradient: 1e4 * gradient)  # scaled, beyond fp32
    before = parameters(trainer)
    trainer.train()
    assert scaler.get_scale() < 2.0**127, "no step was skipped: the test proves nothing"
    assert trainer.state.global_step == STEPS
    assert not torch.equal(parameters(trainer)["classifier.dense.weight"], before["classifier.dense.weight"])


@pytest.mark.parametrize("kind", [kind.value for kind in OptimizerNames])
def test_every_optimizer_is_made_or_its_flag_and_what_it_lacks_are_named(kind, tmp_path):
    try:
        new_trainer(tmp_path, optim=kind).create_optimizer()
    except UserError as e:
        assert str(e).startswith(f"--optim {kind}: ") and "\n" not in str(e)
        assert kind not in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_is_made_or_its_flag_and_the_argument_that_it_lacks_are_named(kind, tmp_path):
    lacking = {"cosine_with_min_lr": "min_lr", "cosine_warmup_with_min_lr": "min_lr"}
    lacking |= {"warmup_stable_decay": "num_decay_steps"}
    settings = {"lr_scheduler_type": kind, "eval_strategy": "steps", "metric_for_best_model": "loss"}
    trainer = new_trainer(tmp_path, **settings)
    trainer.create_optimizer()
    if kind in lacking:
        with pytest.raises(UserError, match=f"--lr_scheduler_type {kind} with .*{lacking[kind]}"):
            trainer.create_scheduler(STEPS)
        settings["lr_scheduler_kwargs"] = {lacking[kind]: 1}
    trainer = new_trainer(tmp_path, **settings)
    trainer.create_optimizer()
    assert trainer.create_scheduler(STEPS)


@pytest.mark.parametrize("lengths", [[9, 4, 1, 7], [5, 5]], ids=["padded", "equal lengths"])
@pytest.mark.parametrize("config", [tiny_config(), tiny_deberta_config()], ids=lambda config: config.model_type)
def test_neftunes_noise_is_transformers_own_number_by_number(config, lengths):
    """Uniform within alpha / sqrt(S H), S the longest of the batch, padding included; none in evaluation."""
    ours, theirs = twins(config)
    batch = ragged_batch(lengths, pad=config.pad_token_id) | {"labels": torch.zeros(len(lengths), dtype=torch.long)}
    losses = {}
    for model in (ours, theirs):
        for alpha in (0.0, 5.0):
            hook = activate_neftune(model, alpha)
            torch.manual_seed(3)
            losses[model, alpha] = model(**batch).loss
            deactivate_neftune(model, hook)
        losses[model, 5.0].backward()
    for alpha in (0.0, 5.0):
        torch.testing.assert_close(losses[ours, alpha], losses[theirs, alpha], rtol=1e-5, atol=0)
    assert (losses[ours, 5.0] - losses[ours, 0.0]).abs() > 1e-3
    assert_same_gradients(ours, theirs)
    rows: list[Tensor] = []
    hook, bound = activate_neftune(ours, 5.0), 5 / (max(lengths) * config.hidden_size) ** 0.5
    ours.get_input_embeddings().register_forward_hook(lambda module, inputs, out: rows.append(out))
    ours(**batch)
    noise = rows[0] - ours.get_input_embeddings().weight[batch["input_ids"]]
    assert 0.99 * bound < noise.abs().max() <= 1.00001 * bound
    deactivate_neftune(ours, hook)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", ADAPTER_WEIGHTS])
def test_a_damaged_file_in_a_checkpoint_is_an_error_that_names_the_checkpoint(file, uninterrupted, tmp_path):
    checkpoint = Path(shutil.copytree(uninterrupted[0] / "checkpoint-8", tmp_path / "checkpoint-8"))
    (checkpoint / file).write_bytes((checkpoint / file).read_bytes()[:300])
    with pytest.raises(UserError, match="checkpoint-8.*damaged"):
        new_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_predictions_keep_the_examples_order_when_training_groups_by_length(tmp_path):
    plain, grouped = (
        new_trainer(tmp_path, train_sampling_strategy=strategy) for strategy in ("random", "group_by_length")
    )
    torch.testing.assert_close(
        grouped.predict(examples(24)).predictions, plain.predict(examples(24)).predictions, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "setting", [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}]
)
def test_training_and_evaluation_read_the_logits_also_where_the_config_asks_for_more(tmp_path, setting):
    """A model used from Python keeps what its config asks for; run_glue.py sets these for its tasks."""
    results = []
    for settings in ({}, setting):
        trainer = new_trainer(tmp_path / str(len(results)), max_steps=2)
        for name, value in settings.items():
            setattr(trainer.model.config, name, value)
        evaluated, predicted = trainer.evaluate(), trainer.predict(examples(5, seed=2))
        results.append((evaluated["eval_loss"], evaluated["eval_accuracy"], predicted.predictions.tolist()))
        assert trainer.train().training_loss > 0.1
    output = trainer.model(**collate(examples(2).to_list()))
    assert isinstance(output, tuple) if "return_dict" in setting else len(output) == 3
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-5)
    torch.testing.assert_close(torch.tensor(results[0][2]), torch.tensor(results[1][2]), rtol=1e-5, atol=1e-6)


def resume(checkpoint: Path, tmp_path: Path) -> BaseException:
    with pytest.raises(Exception) as caught:
        new_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    return caught.value


@pytest.fixture
def good(uninterrupted, tmp_path) -> Path:
    return Path(shutil.copytree(uninterrupted[0] / "checkpoint-8", tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("change", ["a group less", "a tensor less"])
def test_an_optimizer_state_of_other_tensors_is_no_damage_and_the_checkpoint_is_called_good(change, good, tmp_path):
    state = torch.load(good / "optimizer.pt", weights_only=True)
    if change == "a group less":
        state["param_groups"].pop()
    else:
        state["param_groups"][0]["params"].pop()
    torch.save(state, good / "optimizer.pt")
    error = resume(good, tmp_path)
    assert isinstance(error, UserError) and "for other tensors than those trained here" in str(error)
    assert (
        "The checkpoint is not the problem" in str(error) and "emove" not in str(error) and "damaged" not in str(error)
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        PermissionError(13, "Permission denied", "optimizer.pt"),
        OSError(5, "Input/output error"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["optimizer", "random state"])
def test_a_fault_that_is_no_files_keeps_its_own_message_on_resuming(place, error, good, tmp_path, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    if place == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", fail)
    else:
        monkeypatch.setattr(torch.random, "set_rng_state", fail)
    assert resume(good, tmp_path) is error


def test_too_little_memory_to_read_a_checkpoint_is_not_called_damage(good, tmp_path, monkeypatch):
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    assert resume(good, tmp_path) is error


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_file_that_contains_something_else_is_reported_as_damaged(file, good, tmp_path):
    (good / file).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    error = resume(good, tmp_path)
    assert isinstance(error, UserError) and f"checkpoint-8/{file}: damaged" in str(error)
    assert f"Remove the folder {good}" in str(error)


def test_a_damaged_file_of_a_complete_model_is_named(tmp_path):
    new_trainer(tmp_path, lora=False, max_steps=4).train()
    path = tmp_path / "checkpoint-4" / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(UserError, match=r"checkpoint-4/model\.safetensors: damaged"):
        new_trainer(tmp_path, lora=False, max_steps=8).train(resume_from_checkpoint=str(path.parent))
