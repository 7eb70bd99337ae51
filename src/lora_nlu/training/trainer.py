"""The `Trainer` subclass: checkpoints hold what was trained, appear whole or not at all, and are resumed whole."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerCallback, set_seed
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.utils import SAFE_WEIGHTS_NAME

from lora_nlu.adapters.attaching import load_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.tensor_files import check_archive
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError, first_line
from lora_nlu.files import ADAPTER_WEIGHTS, flush_and_rename, write_json
from lora_nlu.methods.table import trains_a_part
from lora_nlu.models.losses import classification_loss
from lora_nlu.ops.sharding import copy_into, is_finite, load_optimizer_state, made_whole, optimizer_state, parameters
from lora_nlu.training.checkpoints import (
    FILE_LIST,
    FULL_DISK,
    SAVING,
    STATE,
    check_moments,
    complete_checkpoints,
    last_finite_checkpoint,
    naming_damage,
    processes_of,
    remove_checkpoint,
    seconds_trained,
)
from lora_nlu.training.processes import lost_process


def _value(choice: Any) -> str:
    """What a person typed for one of transformers' enumerations."""
    return getattr(choice, "value", choice)


class Diverged(UserError):
    """Training left the finite numbers; `what` says where, in a few words."""

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


# An evaluation scores every row once, in order and all of them together, whatever the flags say of training's batches.
_EVALUATION: dict[str, Any] = {
    "dataloader_drop_last": False, "dataloader_persistent_workers": False, "eval_do_concat_batches": True,
    "batch_eval_metrics": False, "include_for_metrics": [],
}  # fmt: skip
_EVALUATION_BATCHES: dict[str, Any] = {"split_batches": False, "dispatch_batches": None, "even_batches": True}


@contextmanager
def _replaced(holder: Any, **values: Any) -> Iterator[None]:
    """Attributes with other values for a while."""
    kept = {name: getattr(holder, name) for name in values}
    vars(holder).update(values)
    try:
        yield
    finally:
        vars(holder).update(kept)


def seed_from(*numbers: int) -> int:
    """A seed of 32 bits that depends on all of these numbers: a sum would be the same for neighbouring runs."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class _OwnDropout(TrainerCallback):
    """Give every process but the first a dropout of its own; the order of the data has been drawn by then."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index:
            torch.manual_seed(seed_from(args.seed, args.process_index))


class _EarlyStopping(EarlyStoppingCallback):
    """transformers', but a run that was interrupted after the evaluation that ended it does not train on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class _ByLength(LengthGroupedSampler):
    """transformers', but drawn from seed and epoch, as the plain order is: alike in all processes, and on resuming."""

    def __init__(self, seed: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class AdapterTrainer(Trainer):
    """`Trainer` that saves and loads the trained parameters alone; where the whole encoder trains, the whole model.

    `metadata` (task, label names, base model, ...) is written with every adapter. A step's loss and gradient are the
    mean over its examples, whatever number of processes, micro-batches and tokens they were dealt to.
    """

    loss_is_scaled_for_ga = True  # compute_loss weighs micro-batches itself; transformers would take all for equal
    args: Any  # transformers types these as possibly None
    model_wrapped: Any
    lr_scheduler: Any
    model: Any
    train_dataset: Any

    def __init__(self, *args: Any, metadata: dict[str, Any], **kwargs: Any) -> None:
        self.metadata = metadata
        super().__init__(*args, **kwargs)
        self.add_callback(_OwnDropout)
        # transformers writes the tokenizer's into the config, from which RoBERTa counts positions once it is loaded
        self._pad_token_id = self.model.config.pad_token_id
        if (patience := getattr(self.args, "early_stopping_patience", None)) is not None:
            self.add_callback(_EarlyStopping(patience, self.args.early_stopping_threshold))
            self.args.restore_callback_states_from_checkpoint = True  # how often it has waited already
        self.saves_part = trains_a_part(kwargs["model"])
        self._training_since: float | None = None
        self._spent: float | None = None  # seconds of training before this process, once known
        self._under_construction = False
        self._by_length: _ByLength | None = None
        self._loss_parts: dict[str, Tensor] = {}  # sums since the last log, and over how many steps
        self._steps = 0

    def create_accelerator_and_postprocess(self) -> None:
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        if self.args.fsdp and half:  # accelerate would also sum gradients and return the loss in halves
            policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
            self.args.fsdp_plugin_args["mixed_precision_policy"] = policy
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.world_size > 1 and not self.is_fsdp_enabled:
            # accelerate shards on accelerators alone and would drop the wish in silence; torch does on CPUs as well
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type, self.is_fsdp_enabled = DistributedType.FSDP, True

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop:
            return
        if self._by_length:  # which a resumed run's loader would not tell
            self._by_length.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.train_sampling_strategy == "group_by_length":  # groups of a step, however many processes share it
            step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            self._by_length = _ByLength(seed, step, lengths=[len(ids) for ids in dataset["input_ids"]])
            return self._by_length
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, BatchRebalanceSampler):
            sampler.seed = seed  # transformers has one order for all seeds
        return sampler

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers'. Raises UserError where its package is absent or --optim_args are not its own."""
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError, TypeError, NotImplementedError) as e:
            raise UserError(f"--optim {_value(self.args.optim)}: {first_line(e)}") from e

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises UserError where --lr_scheduler_kwargs are missing or not the schedule's own."""
        try:
            return super().create_scheduler(*args, **kwargs)
        except (ValueError, TypeError, KeyError, ArithmeticError) as e:
            kind = _value(self.args.lr_scheduler_type)
            settings = self.args.lr_scheduler_kwargs or {}
            raise UserError(
                f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs {json.dumps(settings)}: {first_line(e)}.\n"
                """Give its arguments as JSON, such as --lr_scheduler_kwargs '{"num_decay_steps": 100}'."""
            ) from e

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Tensor]:
        """The micro-batches of this process for one step, and the number of examples that all processes have in it.

        accelerate fills an epoch's last batches with examples from its beginning, so that no process waits in vain.
        They are taken out; where nothing is left one stays, of no weight. `examples` in a micro-batch says how many
        count.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [len(batch["input_ids"]) for batch in batches]
        real, processes = list(rows), self.args.world_size
        # batch_rebalance deals without filling
        filled = not self.args.dataloader_drop_last and self.args.train_sampling_strategy != "batch_rebalance"
        if processes > 1 and filled and self.accelerator.gradient_state.end_of_dataloader:
            left = (len(self.train_dataset) - 1) % (processes * rows[-1]) + 1  # examples in the last round
            real[-1] = min(max(left - self.args.process_index * rows[-1], 0), rows[-1])
        batches = [
            {name: x[: max(n, 1)] for name, x in batch.items()} | {"examples": n}
            for batch, n in zip(batches, real, strict=True)
        ]
        total = torch.full((1,), sum(real), device=self.args.device)
        self._steps += 1
        return batches, self.accelerator.gather(total).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; of a training step, what this micro-batch adds to the mean over all its examples.

        Where it has parts (R-Drop), they are logged beside it.
        """
        examples = inputs.pop("examples", None)
        loss, outputs = super().compute_loss(model, inputs, True)
        if examples is not None:
            share = examples * self.args.world_size / num_items_in_batch  # processes are averaged afterwards
            loss = loss * share
            for name in ("task_loss", "consistency_loss"):
                if isinstance(outputs, dict) and name in outputs:
                    self._loss_parts[name] = self._loss_parts.get(name, 0.0) + share * outputs[name].detach()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._loss = loss.to("cpu", non_blocking=loss.is_cuda)
        return loss

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count tokens, as transformers does; raises UserError if the loss of this micro-batch is not finite.

        Counting waits for the GPU, so that the copy of the loss made before it has arrived and costs no other wait.
        """
        super()._track_num_input_tokens(inputs)
        if self.args.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # in case nothing was counted
        if not math.isfinite(loss := self._loss.item()):
            super().log({"loss": loss})
            raise self._diverged(self.state.global_step + 1, f"the loss is {loss}")

    def _diverged(self, step: int, what: str) -> Diverged:
        advice = ["Lower --learning_rate"]
        advice += ["take --bf16 instead of --fp16"] if self.args.fp16 else []
        advice += [] if self.args.max_grad_norm else ["leave --max_grad_norm at 1"]
        last = last_finite_checkpoint(self.args.output_dir)
        kept = f"The last checkpoint with finite tensors is {last}" if last else "No checkpoint has finite tensors"
        message = f"training diverged at step {step}: {what}.\n{' or '.join(advice)}. {kept}."
        return Diverged(message, f"{what} at step {step}")

    def _check_trained(self, tensors: dict[str, Tensor]) -> None:
        """Raise UserError if a trained tensor is not finite: it must be neither scored nor saved."""
        if not is_finite(tensors.values()):
            name = next((name for name, tensor in tensors.items() if not is_finite([tensor])), "a trained tensor")
            raise self._diverged(self.state.global_step, f"{name} is no longer finite")

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._check_trained({name: p for name, p in self.model.named_parameters() if p.requires_grad})
        return super()._evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._training_since is not None:
            if self._spent is None:
                self._spent = seconds_trained(self.state.log_history)
            logs["elapsed_s"] = round(self._spent + time.monotonic() - self._training_since, 2)
        if "loss" in logs:
            for name, total in self._loss_parts.items():
                logs[name] = self.accelerator.gather(total[None] / self._steps).mean().item()
            self._loss_parts, self._steps = {}, 0
        super().log(logs, start_time)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._tr_loss = self.accelerator.gather(self._tr_loss[None]).mean()  # of the steps since the last log
        return super()._finalize_training(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; every log says after how many seconds of training it was made, interruptions left out."""
        self._training_since, self._spent = time.monotonic(), None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._training_since = None

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as e:  # the HTTP library in use decides what no network or no permission is called
            raise UserError(
                f"--push_to_hub: the Hub gives no repository to push to ({str(e).splitlines()[0][:150]}).\n"
                "Log in with `hf auth login`, or leave the flag out and upload the output folder later: hf upload."
            ) from e

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises UserError if the upload fails; what was trained is saved by then."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as e:  # as above
            if isinstance(e, UserError) or lost_process(e):
                raise
            raise UserError(
                f"--push_to_hub: the upload to the Hub failed ({first_line(e)}).\nThe run is complete in "
                f"{self.args.output_dir}. Upload it later: hf upload {self.hub_model_id} {self.args.output_dir}"
            ) from e

    # ------------------------------------------------------------------------------------------------- writing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', but of what an engine has in pieces only what will be saved comes together."""
        if not self.is_fsdp_enabled and not (self.saves_part and self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        state = parameters(self.model, trained_only=self.saves_part)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        state = dict(self.model.named_parameters()) if state_dict is None else state_dict
        self._check_trained({name: state[name] for name in trained & state.keys()})
        try:
            if not self.saves_part:
                super()._save(output_dir, state_dict)
            elif self.args.should_save:
                save_adapter(self.model, folder, self.metadata, state_dict)
        except (OSError, SafetensorError) as e:
            if self._under_construction:
                raise  # _save_checkpoint says what is whole
            raise UserError(f"Can't write the trained model to {folder}: {e}.") from e

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, SAVING)) if self._under_construction else folder

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP2 as without: another engine and another number of processes can take up from there.

        DeepSpeed has a format of its own, in which every process writes its piece.
        """
        if not self.is_fsdp_enabled and not (self.saves_part and self.is_deepspeed_enabled):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        states = {SCHEDULER_NAME: self.lr_scheduler.state_dict()}
        if self.is_fsdp_enabled:
            states[OPTIMIZER_NAME] = optimizer_state(self.optimizer)
        else:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            for name, state in states.items():
                torch.save(state, Path(output_dir, name))

    def _save_rng_state(self, output_dir: str) -> None:
        """One process writes those of all."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            states = [(path.name, path.read_bytes()) for path in Path(folder).iterdir()]
        if self.args.world_size > 1:
            states = gather_object(states)
        if self.args.should_save:
            for name, state in states:
                Path(output_dir, name).write_bytes(state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint under a temporary name, then rename it: whatever happens in between, the others stay."""
        output_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        saving = output_dir / SAVING
        if self.args.should_save:
            shutil.rmtree(saving, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._under_construction = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            best = output_dir / f"checkpoint-{self.state.best_global_step}"
            if best.name == name or best.is_dir():  # the best evaluation may have had no checkpoint
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(saving / name / STATE))
                written = [path for path in (saving / name).rglob("*") if path.is_file()]
                files = {str(path.relative_to(saving / name)): path.stat().st_size for path in written}
                write_json(saving / name / FILE_LIST, files)
                if (output_dir / name).exists():  # a damaged one of the same step
                    remove_checkpoint(output_dir / name)
                flush_and_rename(saving / name, output_dir / name)
        except (OSError, SafetensorError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not FULL_DISK.search(str(e)):
                raise
            last = complete_checkpoints(str(output_dir))
            kept = f"{last[-1]} is whole; the same command resumes from it" if last else "there is no earlier one"
            raise UserError(f"Can't write {output_dir / name}: {e}.\nMake room or choose another place; {kept}.") from e
        finally:
            self._under_construction = False
            if self.args.should_save:
                shutil.rmtree(saving, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.rotate(output_dir)

    def rotate(self, output_dir: Path) -> None:
        """Keep the last --save_total_limit checkpoints, the best among them; as transformers, one more if that is 1."""
        limit = self.args.save_total_limit
        if not limit or not self.args.should_save or not (kept := complete_checkpoints(str(output_dir))):
            return
        best = next((path for path in kept if path.name == Path(self.state.best_model_checkpoint or "").name), None)
        if best is not None and best != kept[-1]:
            kept.remove(best)
            kept.insert(-1, best)
            limit = max(limit, 2)
        for path in kept[:-limit]:
            remove_checkpoint(path)

    # ------------------------------------------------------------------------------------------------- reading

    def check_backend(self, checkpoint: str) -> None:
        """Raise UserError for a checkpoint whose optimizer state this engine can't read, or that has none."""
        pieces = len([*Path(checkpoint).glob("*/*zero_pp_rank_*_optim_states.pt")])
        if pieces != (self.args.world_size if self.is_deepspeed_enabled else 0):
            wrote = f"DeepSpeed in {pieces} processes" if pieces else "another engine than DeepSpeed"
            now = f"DeepSpeed in {self.args.world_size}" if self.is_deepspeed_enabled else "another engine"
            raise UserError(
                f"{checkpoint} was written by {wrote}; {now} can't go on from it.\n"
                "Resume it the same way, or start afresh with --overwrite_output_dir."
            )
        if not pieces and not Path(checkpoint, OPTIMIZER_NAME).is_file():
            raise UserError(
                f"{checkpoint} holds no optimizer state (--save_only_model): a run can't go on from it.\n"
                "Start another from what it learned (--lora_path), or afresh with --overwrite_output_dir."
            )

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self.model.config.pad_token_id = self._pad_token_id
        if not resume_from_checkpoint or not self.is_deepspeed_enabled or not self.saves_part:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        with naming_damage(resume_from_checkpoint):  # transformers' would miss the frozen parameters in it
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        is_adapter = Path(resume_from_checkpoint, ADAPTER_WEIGHTS).is_file()
        if not is_adapter and not self.is_fsdp_enabled:
            with naming_damage(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with made_whole(self.model):
            if is_adapter:
                load_adapter(self.model, read_adapter(resume_from_checkpoint), allow_new_head=False)
            else:
                copy_into(self.model, load_file(Path(resume_from_checkpoint, SAFE_WEIGHTS_NAME)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with naming_damage(checkpoint):
            for path in Path(checkpoint or "").glob("*.pt*") if checkpoint else ():
                check_archive(path)
            if not checkpoint or not self.is_fsdp_enabled:
                super()._load_optimizer_and_scheduler(checkpoint)
                check_moments(self.optimizer)
                return
            read = partial(torch.load, map_location="cpu", weights_only=True)
            load_optimizer_state(self.optimizer, read(Path(checkpoint, OPTIMIZER_NAME)))
            self.lr_scheduler.load_state_dict(read(Path(checkpoint, SCHEDULER_NAME)))

    def _load_scaler(self, checkpoint: str | None) -> None:
        with naming_damage(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint and processes_of(checkpoint) != self.args.world_size:  # dropout draws anew, each process its own
            set_seed(seed_from(self.args.seed, self.state.global_step, self.args.process_index))
            return
        with naming_damage(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best and (self.saves_part or self.is_fsdp_enabled):
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()

    # ----------------------------------------------------------------------------------------------- evaluation

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but the predictions are the logits alone, also where a config asks for hidden states."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        return loss, logits[0] if isinstance(logits, tuple) else logits, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As transformers', but of every row, and with the plain loss, a mean over examples: that of the logits.

        transformers averages batch means, in which examples that fill up the last round count again, and smooths
        labels as in training. Raises UserError for logits that are not finite, or fewer or more of them than rows.
        """
        if self.is_fsdp_enabled and not self.accelerator._models:
            # FSDP2 takes a model with its optimizer alone, and transformers gives it none where nothing trained
            self.model_wrapped, _ = self.accelerator.prepare(self.model, self.create_optimizer())
        without = {"compute_metrics": None, "label_smoother": None}
        with _replaced(self.args, **_EVALUATION), _replaced(self, **without):
            self.gather_function = self.accelerator.gather_for_metrics
            output: Any = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        logits, labels, rows = output.predictions, output.label_ids, len(dataloader.dataset)
        if len(logits) != rows:
            raise UserError(f"{len(logits)} predictions for {rows} rows: nothing was scored or written.")
        if (wrong := ~np.isfinite(logits).all(axis=1)).any():
            raise UserError(
                f"the model's logits are not finite for {wrong.sum()} of {rows} examples, the first is number "
                f"{wrong.argmax() + 1}: no score was computed.\nIf you use --fp16, --fp16_full_eval or another half "
                "precision flag, leave it out; otherwise the model's weights are not finite."
            )
        scores: dict[str, float] = {}
        if labels is not None:
            problem_type = self.model.config.problem_type
            loss = classification_loss(torch.as_tensor(logits).float(), torch.as_tensor(labels), problem_type)
            scores["loss"] = loss.item()
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if labels is not None and self.compute_metrics and not loss_only:
            scores |= self.compute_metrics(EvalPrediction(logits, labels))
        output.metrics.update({f"{metric_key_prefix}_{name}": score for name, score in scores.items()})
        return output

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_training"):
            config = replace(self.accelerator.dataloader_config, **_EVALUATION_BATCHES)
            with _replaced(self.args, **_EVALUATION), _replaced(self.accelerator, dataloader_config=config):
                return super()._get_dataloader(*args, **kwargs)
        try:
            loader = super()._get_dataloader(*args, **kwargs)
        except ValueError as e:
            raise UserError(f"the flags --dataloader_... do not fit each other: {first_line(e)}") from e
        if not len(loader):
            batch = self.args.train_batch_size * self.args.world_size
            raise UserError(
                f"--dataloader_drop_last leaves nothing to train on: {len(self.train_dataset)} examples are fewer than "
                f"one batch of {batch}.\nLeave the flag out, or lower --per_device_train_batch_size."
            )
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # With --train_sampling_strategy group_by_length transformers would sort the evaluation as well, and predictions
        # would come out in another order than the examples.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
