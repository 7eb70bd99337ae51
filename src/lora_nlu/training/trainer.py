"""The trainer: what a step and an evaluation are. How it saves and resumes is in `checkpoints.py`."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from lora_nlu.errors import UserError, first_line
from lora_nlu.files import atomic_files
from lora_nlu.models.checkpoints import Checkpoints, notes_on_bf16
from lora_nlu.models.losses import classification_loss
from lora_nlu.ops.packing import lengths_of
from lora_nlu.training.checkpoints import CheckpointingTrainer, Diverged, seconds_trained
from lora_nlu.training.graphs import GraphedSteps, converted, halves_of
from lora_nlu.training.learning_rates import with_rates
from lora_nlu.training.processes import Interrupted, ignore_signals, lost_process, say, seed_from

# An evaluation scores every row once, in order and all of them together, whatever the flags of training's batches are;
# with group_by_length transformers would sort its rows too.
_EVALUATION: dict[str, Any] = {
    "dataloader_drop_last": False, "dataloader_persistent_workers": False, "eval_do_concat_batches": True,
    "batch_eval_metrics": False, "include_for_metrics": [], "train_sampling_strategy": "random",
}  # fmt: skip
_EVALUATION_BATCHES: dict[str, Any] = {"split_batches": False, "dispatch_batches": None, "even_batches": True}


@contextmanager
def _replaced(holder: Any, **values: Any) -> Iterator[None]:
    """Give attributes other values within the block."""
    before = {name: getattr(holder, name) for name in values}
    vars(holder).update(values)
    try:
        yield
    finally:
        vars(holder).update(before)


class _DropoutOfProcess(TrainerCallback):
    """Seed the dropout of every process but the first anew; the order of the data has been drawn by then."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index:
            torch.manual_seed(seed_from(args.seed, args.process_index))


class _AfterStep(TrainerCallback):
    """Calls what methods do after an optimizer step, while the gradients are still there."""

    def __init__(self, after_steps: dict[str, Any]) -> None:
        self.after_steps = after_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for after_step in self.after_steps.values():
            if hasattr(after_step, "begin"):
                after_step.begin(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for after_step in self.after_steps.values():
            after_step.step(state.global_step + 1, state.max_steps)


class _EarlyStopping(EarlyStoppingCallback):
    """As transformers', but a run that was interrupted after the evaluation that ended it does not resume training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class _StopAfterSignal(TrainerCallback):
    """Ends training after the step in which a process received a signal; nothing else is due then but at that step."""

    def __init__(self, is_signalled: Callable[[], bool]) -> None:
        self.is_signalled = is_signalled

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.is_signalled()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_signalled() and state.global_step < state.max_steps and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False


class _SaveAfterEpoch(TrainerCallback):
    """A checkpoint due at an epoch's last step is saved after its evaluation, which a resumed run would lack."""

    is_due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps or float(state.epoch).is_integer()
        self.is_due = control.should_save and is_last
        control.should_save = control.should_save and not is_last

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.is_due
        self.is_due = False


class _ByLength(LengthGroupedSampler):
    """As transformers', but drawn from seed and epoch: the same order in all processes and on resuming."""

    def __init__(self, seed: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def _collated_with_lengths(collate: Callable[[Any], Any], features: Any) -> dict[str, Any]:
    """A batch with its `sequence_lengths`, read here because the mask is on the CPU, where no GPU is waited for."""
    batch = dict(collate(features))
    lengths = lengths_of(batch["attention_mask"]) if "attention_mask" in batch else None
    return batch if lengths is None else batch | {"sequence_lengths": lengths}


class AdapterTrainer(CheckpointingTrainer):
    """transformers' Trainer for adapters. A step's loss is the mean over its examples, however they are divided."""

    loss_is_scaled_for_ga = True  # compute_loss weighs micro-batches itself; transformers would weigh all equally

    def __init__(self, *args: Any, class_weights: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if class_weights is not None:
            self.model.class_weights = torch.tensor(class_weights, device=self.args.device)
        self.add_callback(_DropoutOfProcess)
        self.add_callback(_SaveAfterEpoch)
        if self.after_steps:
            self.add_callback(_AfterStep(self.after_steps))
        if (patience := getattr(self.args, "early_stopping_patience", None)) is not None:
            self.add_callback(_EarlyStopping(patience, self.args.early_stopping_threshold))
            self.args.restore_callback_states_from_checkpoint = True  # the evaluations that it has waited already
        self.signals: list[int] = []  # that this process has received while training
        self._signals_of_all = torch.zeros(())  # processes that had received one when the current step began
        self.add_callback(_StopAfterSignal(self._is_signalled))
        self._by_length: _ByLength | None = None
        self._loss_parts: dict[str, Tensor] = {}  # sums over the steps since the last log
        self._steps = 0
        self._graphs: GraphedSteps | None = None  # made in the first step, where a step can be recorded
        self._halves: list | None = None  # frozen weights in half precision; made in the first step without a graph
        self._training_since: float | None = None
        self._seconds_before: float | None = None  # of training before this process started, once read
        if not self.args.torch_compile:  # it would compile anew for other lengths
            self.data_collator = partial(_collated_with_lengths, self.data_collator)
        if self.args.device.type == "cuda" and self.args.dataloader_pin_memory:
            self.accelerator.dataloader_config.non_blocking = True  # else moving a batch waits for the step before
        self.before_steps()
        if self.args.bf16:
            self._hold_in_bf16()

    def _hold_in_bf16(self) -> None:
        """Let the model hold weights in bf16, where this run computes so without autocast, and say it."""
        if not getattr(self.args, "bf16_in_model", False) or self.model.is_held_in_bf16:
            return
        say(self.args, *notes_on_bf16(self.model.hold_in_bf16(trains=self.args.do_train)))

    @property
    def precision(self) -> str:
        """In which precision the model multiplies now: fp32, bf16 or fp16."""
        args: Any = self.args
        full = "bf16" if args.bf16_full_eval else "fp16" if args.fp16_full_eval else ""
        if getattr(args, "bf16_in_model", False) and full != "fp16":
            return "bf16" if self.model.is_held_in_bf16 else "fp32"
        return full or {"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; every log has the seconds of training up to it, without interruptions."""
        self._training_since, self._seconds_before = time.monotonic(), None
        self._total_loss, self._graphs, self._halves = 0.0, None, None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._training_since = self._graphs = self._halves = None

    # --------------------------------------------------------------------------------------------------- a step

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers'. Raises UserError if its package is missing or --optim_args are not its own."""
        is_new = self.optimizer is None
        try:
            optimizer: Any = super().create_optimizer(model)
        except (ImportError, ValueError, TypeError, NotImplementedError) as e:
            raise UserError(f"--optim {self.args.optim.value}: {first_line(e)}") from e
        if is_new:
            groups = optimizer.param_groups
            for row in self.methods:
                if row.parameter_groups:
                    groups = row.parameter_groups(self.model, groups, self.args.learning_rate)
            groups = with_rates(groups, self.model, self.args)
            if groups is not optimizer.param_groups:
                optimizer.param_groups = []
                for group in groups:
                    optimizer.add_param_group(group)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises UserError if --lr_scheduler_kwargs are missing or not the schedule's own."""
        try:
            return super().create_scheduler(*args, **kwargs)
        except (ValueError, TypeError, KeyError, ArithmeticError) as e:
            kind, settings = self.args.lr_scheduler_type.value, json.dumps(self.args.lr_scheduler_kwargs or {})
            raise UserError(
                f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs {settings}: {first_line(e)}.\n"
                """Give its arguments as JSON, such as --lr_scheduler_kwargs '{"num_decay_steps": 100}'."""
            ) from e

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.train_sampling_strategy == "group_by_length":  # groups as large as a step of all processes
            step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            self._by_length = _ByLength(seed, step, lengths=[len(ids) for ids in dataset["input_ids"]])
            return self._by_length
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, BatchRebalanceSampler):
            sampler.seed = seed  # transformers has one order for all seeds
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            return  # the checkpoint that this run resumed from is its last
        if self._by_length:  # accelerate's loader does not tell it the epoch in a resumed run
            self._by_length.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)
        if self._is_signalled() and self.state.global_step < self.state.max_steps:
            self._end_after_signal()

    def _is_signalled(self) -> bool:
        """Whether this run is to end; the same in all processes."""
        return bool(self.signals if self.args.world_size == 1 else self._signals_of_all.item())

    def _end_after_signal(self) -> None:
        """Save a checkpoint, unless the last one is of this state, and raise Interrupted."""
        if self._saved != (self.state.global_step, len(self.state.log_history)) or self.args.save_only_model:
            self.control.should_training_stop = False  # it is in the checkpoint
            with _replaced(self.args, save_only_model=False):
                self._save_checkpoint(self.model_wrapped, None)
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        by = f" by {signal.Signals(self.signals[0]).name}" if self.signals else ""
        folder = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
        raise Interrupted(
            f"interrupted{by} at step {self.state.global_step} of {self.state.max_steps}. "
            f"{folder} is complete: the same command resumes from it."
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Tensor]:
        """The micro-batches of this process for one step, and the number of examples of all processes in that step.

        accelerate fills an epoch's last batches with examples from its beginning, so that all processes have as many
        batches. These examples are removed here. If a process has no real example left, it keeps one with weight 0, so
        that all processes still exchange gradients. `examples` in a micro-batch is the number of its real examples.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [len(batch["input_ids"]) for batch in batches]
        real, processes = list(rows), self.args.world_size
        # BatchRebalanceSampler does not fill batches
        is_filled = not self.args.dataloader_drop_last and self.args.train_sampling_strategy != "batch_rebalance"
        if processes > 1 and is_filled and self.accelerator.gradient_state.end_of_dataloader:
            last = (len(self.train_dataset) - 1) % (processes * rows[-1]) + 1  # real examples in all last batches
            real[-1] = min(max(last - self.args.process_index * rows[-1], 0), rows[-1])
        counted = zip(batches, real, strict=True)
        batches = [{name: x[: max(n, 1)] for name, x in batch.items()} | {"examples": n} for batch, n in counted]
        counts = [torch.full((1,), n, device=self.args.device) for n in (sum(real), int(bool(self.signals)))]
        total, signals = self.accelerator.gather(torch.stack(counts, 1)).sum(0)
        self._signals_of_all = signals.to("cpu", non_blocking=signals.is_cuda)  # read after the step, as the loss is
        self._steps += 1
        return batches, total

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        """The model's loss; in training, this micro-batch's share of the mean over all examples of the step."""
        examples = inputs.pop("examples", None)
        loss, outputs = super().compute_loss(model, inputs, True)
        if examples is not None:
            share = examples * self.args.world_size / num_items_in_batch  # processes are averaged afterwards
            loss = sum((row.loss_term(self.model) for row in self.methods if row.loss_term), loss) * share
            if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # transformers 5.17 divides by this in any case
                loss = loss * self.current_gradient_accumulation_steps
            for name in ("task_loss", "consistency_loss"):  # R-Drop's, for the log
                if isinstance(outputs, dict) and name in outputs:
                    self._loss_parts[name] = self._loss_parts.get(name, 0.0) + share * outputs[name].detach()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self._recorded_step(model, inputs, num_items_in_batch)
        if loss is None:
            if self._halves is None:
                can_use = self._graphs is None and can_convert(self, model)
                self._halves = halves_of(self.model, self._half) if can_use else []
            with converted(self._graphs.halves if self._graphs else self._halves):
                loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss = loss.to("cpu", non_blocking=loss.is_cuda)
        return loss

    def _recorded_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor | None:
        """A step by `GraphedSteps`; None, and nothing is done, where there can be none."""
        if not can_record(self, model):
            return None
        if self._graphs is None:
            config = self.model.config
            limit = config.max_position_embeddings - (config.pad_token_id or 0) - 1
            scale = self.accelerator.scaler.scale if self.accelerator.scaler else None
            loss_of = partial(self._loss_of, model)
            self._graphs = GraphedSteps(model, loss_of, limit, config.pad_token_id or 0, self._half, scale)
        if not model.training:
            model.train()
        return self._graphs.step(self._prepare_inputs(inputs) | {"num_items_in_batch": num_items_in_batch})

    @property
    def _half(self) -> torch.dtype | None:
        """The dtype of autocast in training; None without it."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    def _loss_of(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        count = inputs.pop("num_items_in_batch")
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        return loss if hasattr(Trainer, "loss_is_scaled_for_ga") else loss / self.current_gradient_accumulation_steps

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count tokens, as transformers does; raise UserError if the loss of this micro-batch is not finite."""
        super()._track_num_input_tokens(inputs)
        # Counting has waited for the GPU: the copy of the loss has arrived, and reading it costs no other wait.
        if self.args.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # in case nothing was counted
        if not math.isfinite(loss := self._loss.item()):
            super().log({"loss": loss})
            raise Diverged(self.args, self.state.global_step + 1, f"the loss is {loss}")
        if self._total_loss is not None:
            self._total_loss += loss

    # ------------------------------------------------------------------------------------------------------ logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._training_since is not None:
            if self._seconds_before is None:
                self._seconds_before = seconds_trained(self.state.log_history)
            logs["elapsed_s"] = round(self._seconds_before + time.monotonic() - self._training_since, 2)
        if "loss" in logs:
            for name, total in self._loss_parts.items():
                logs[name] = self.accelerator.gather(total[None] / self._steps).mean().item()
            self._loss_parts, self._steps = {}, 0
        if "train_loss" in logs and self._total_loss is not None:  # transformers' is of the steps since this start
            logs["train_loss"] = self.record_total_loss() / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._tr_loss = self.accelerator.gather(self._tr_loss[None]).mean()  # of the steps since the last log
        with _replaced(self.args, save_total_limit=None):  # it would remove folders by their names
            output = super()._finalize_training(*args, **kwargs)
        self.rotate(Path(self.args.output_dir), has_ended=True)
        return output

    # ----------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.check_finite({name: p for name, p in self.model.named_parameters() if p.requires_grad})
        return super()._evaluate(*args, **kwargs)

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> Any:  # fmt: skip
        """As transformers', but with the loss of all logits together, a mean over the examples.

        transformers averages the losses of batches, counts the examples that fill the last batches twice, and smooths
        labels as in training. Raises UserError for logits that are not finite, or are not as many as the examples.
        """
        without = {"compute_metrics": None, "label_smoother": None}
        evaluation = dict(_EVALUATION)
        if self.args.bf16_full_eval and getattr(self.args, "bf16_in_model", False):
            evaluation["bf16_full_eval"] = False  # transformers would cast the model
            if not self.is_in_train:
                self._hold_in_bf16()
        with _replaced(self.args, **evaluation), _replaced(self, **without):
            self.gather_function = self.accelerator.gather_for_metrics
            output: Any = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        logits, labels = output.predictions, output.label_ids
        _check_logits(logits, len(dataloader.dataset))
        self.evaluated_logits = logits  # [examples, classes], of the last evaluation
        scores: dict[str, float] = {"samples": len(logits)}
        if labels is not None:
            problem_type = self.model.config.problem_type
            loss = classification_loss(torch.as_tensor(logits).float(), torch.as_tensor(labels), problem_type)
            scores["loss"] = loss.item()
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if labels is not None and self.compute_metrics and not loss_only:
            scores |= self.compute_metrics(EvalPrediction(logits, labels))
        output.metrics.update({f"{metric_key_prefix}_{name}": score for name, score in scores.items()})
        return output

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but the predictions are the logits alone, also where the config asks for hidden states."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        return loss, logits[0] if isinstance(logits, tuple) else logits, labels

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = self._new_dataloader(*args, **kwargs)
        if self.args.dataloader_num_workers:
            batches = getattr(loader, "base_dataloader", loader)  # accelerate's wraps torch's
            batches.worker_init_fn = partial(_start_worker, batches.worker_init_fn)
        return loader

    def _new_dataloader(self, *args: Any, **kwargs: Any) -> Any:
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

    # --------------------------------------------------------------------------------------------------- the Hub

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as e:  # the HTTP library in use has its own errors for a missing network or permission
            raise UserError(
                f"--push_to_hub: the Hub gives no repository to push to ({first_line(e)}).\n"
                "Log in with `hf auth login`, or leave the flag out and upload the output folder later: hf upload."
            ) from e

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', but the README.md appears complete or not at all, and one that is there stays."""
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and not (folder / "README.md").exists():
            with atomic_files(folder) as partial, _replaced(self.args, output_dir=str(partial)):
                super().create_model_card(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises UserError if the upload fails; the trained model is saved by then."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as e:  # as above
            if isinstance(e, UserError) or lost_process(e):
                raise
            raise UserError(
                f"--push_to_hub: the upload to the Hub failed ({first_line(e)}).\nThe run is complete in "
                f"{self.args.output_dir}. Upload it later: hf upload {self.hub_model_id} {self.args.output_dir}"
            ) from e


def can_record(trainer: Any, model: Any) -> bool:
    """Whether a step of this trainer, of a model as it is passed to `training_step`, may be a CUDA graph's."""
    args = trainer.args
    if args.device.type != "cuda" or not getattr(args, "cuda_graphs", True) or args.world_size * args.n_gpu > 1:
        return False
    if model is not trainer.model or not isinstance(trainer.model, Checkpoints):  # compiled, or wrapped by a backend
        return False
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's wrapper of any has a `train`
    if args.gradient_checkpointing or args.neftune_noise_alpha or hasattr(optimizer, "train"):
        return False
    if any(row.loss_term for row in trainer.methods) or trainer.after_steps or getattr(model.config, "reg_loss_wgt", 0):
        return False  # what these do besides is the host's work
    return not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in model.parameters() if p.requires_grad)


def can_convert(trainer: Any, model: Any) -> bool:
    """Whether a step without a graph may compute with frozen weights that were converted to half precision before.

    Not where a backend keeps the weights or compiles with them, and not with checkpoints, which are for memory: without
    them a step holds all of the converted weights for its backward anyway.
    """
    args = trainer.args
    is_for_memory = args.gradient_checkpointing or getattr(args, "is_sharded", False)
    if args.device.type != "cuda" or args.torch_compile or is_for_memory:
        return False
    replica = model.module if isinstance(model, DistributedDataParallel) else model
    return replica is trainer.model and isinstance(replica, Checkpoints)


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    ignore_signals()
    if start:
        start(worker)


def _check_logits(logits: np.ndarray, rows: int) -> None:
    """Raise UserError unless there are finite logits for every row."""
    if len(logits) != rows:
        raise UserError(f"{len(logits)} predictions for {rows} rows: nothing was scored or written.")
    if (wrong := ~np.isfinite(logits).all(axis=1)).any():
        raise UserError(
            f"the model's logits are not finite for {wrong.sum()} of {rows} examples, the first is number "
            f"{wrong.argmax() + 1}: no score was computed.\nIf you use --fp16, --fp16_full_eval or another half "
            "precision flag, leave it out; otherwise the model's weights are not finite."
        )
