"""Checkpoints: what they contain, that they are complete or absent, how they are read, errors for damaged ones."""

import json
import os
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerState, set_seed
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_pt_utils import safe_globals

from lora_nlu.adapters.attaching import load_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError, first_line, is_out_of_memory
from lora_nlu.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RUN_METADATA,
    atomic_files,
    atomic_write,
    flush_and_rename,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from lora_nlu.methods.description import methods_in
from lora_nlu.ops.sharding import is_finite
from lora_nlu.ops.tensors import check_moments, load_torch_file
from lora_nlu.training.file_list import FILE_LIST, REMOVING, list_files, remove_checkpoint
from lora_nlu.training.processes import lost_process, say, seed_from

STATE = "trainer_state.json"
_METHOD_STATE = "method_state.pt"  # in a checkpoint: what the methods' `after_step` keeps
_TOTAL_LOSS = "total_loss"  # among a checkpoint's states of callbacks: the sum of the losses of all steps
SAVING = "_saving"  # a checkpoint being written: never resumed from, nor uploaded, as transformers leaves out "_*"
# transformers before 5.20 loads an optimizer in one of several CPU processes to "cpu:0", which torch does not know
torch.serialization.register_package(0, lambda storage: None, lambda x, location: x if location == "cpu:0" else None)
_FULL_DISK = re.compile("inline_container|StreamWriter|iostream")  # in torch.save's RuntimeError for it


def complete_checkpoints(output_dir: str) -> list[Path]:
    """A run's checkpoints by step, oldest first, of which every file is there with the length that was written."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        with suppress(UserError, OSError, ValueError, TypeError):  # it is none, or damaged
            files, step = read_json(path / FILE_LIST), TrainerState(**read_json(path / STATE)).global_step
            lengths = {name: (path / name).stat().st_size for name in files}
            if type(step) is int and path.name == f"checkpoint-{step}" and lengths == files:
                found.append((step, path))
    return [path for _, path in sorted(found)]


def processes_of(checkpoint: str) -> int:
    """The number of processes that wrote a checkpoint, by its files of random states; 0 if it has none."""
    return len([*Path(checkpoint).glob("rng_state*.pth")])


def seconds_trained(log_history: list[dict[str, Any]]) -> float:
    """How long a run has trained by its last log, in all the processes that it was resumed in."""
    return next((entry["elapsed_s"] for entry in reversed(log_history) if "elapsed_s" in entry), 0.0)


def clear_leftovers(output_dir: str) -> None:
    """Remove what a killed process of this run was writing or removing; the folder must be locked."""
    remove_leftovers(Path(output_dir), older_than_s=0)
    _remove_saving(Path(output_dir))
    for path in Path(output_dir).glob("checkpoint-*"):
        with suppress(OSError):
            if (path / REMOVING).is_file():
                remove_checkpoint(path)
            elif path.name.removeprefix("checkpoint-").isdigit():
                path.rmdir()  # if it is empty


def _remove_saving(output_dir: Path) -> None:
    for saving in (output_dir / SAVING, output_dir / ".saving"):  # earlier versions' name
        if saving.is_symlink():
            saving.unlink()
        shutil.rmtree(saving, ignore_errors=True)


def clear_checkpoint(path: Path, args: Any) -> None:
    """Remove a checkpoint; one that can't be removed, or has other files in it, is renamed. args: TrainingArguments."""
    for remove in (remove_checkpoint, Path.rmdir):
        with suppress(OSError):
            remove(path)
    if os.path.lexists(path):
        renamed = path.with_name(f"{path.name}.{time.time_ns()}")
        path.rename(renamed)
        say(args, f"{path} can't be removed, or contains other files: it is {renamed.name} now.")


class Diverged(UserError):
    """Training met a number that is not finite; `what` says where, in a few words."""

    def __init__(self, args: Any, step: int, what: str):
        """args: the run's TrainingArguments."""
        advice = ["Lower --learning_rate"]
        advice += ["take --bf16 instead of --fp16"] if args.fp16 else []
        advice += [] if args.max_grad_norm else ["leave --max_grad_norm at 1"]
        last = last_finite_checkpoint(args.output_dir)
        kept = f"The last checkpoint with finite tensors is {last}" if last else "No checkpoint has finite tensors"
        super().__init__(f"training diverged at step {step}: {what}.\n{' or '.join(advice)}. {kept}.")
        self.what = f"{what} at step {step}"


def last_finite_checkpoint(output_dir: str) -> Path | None:
    """The newest complete checkpoint of a run whose saved tensors are all finite; None if there is none."""
    found = reversed(complete_checkpoints(output_dir))
    return next((p for p in found if all(is_finite(load_file(f).values()) for f in p.glob("*.safetensors"))), None)


@contextmanager
def explain_damage(checkpoint: str | None) -> Iterator[None]:
    """Load a checkpoint in this block: UserError says which file is damaged, or that other tensors train here."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as e:
        if not checkpoint or isinstance(e, torch.OutOfMemoryError) or is_out_of_memory(e) or lost_process(e):
            raise  # these, and errors of a disk or of permissions, are reported as they are
        if damaged := _damaged_file(Path(checkpoint)):
            remedy = (
                f"Remove the folder {checkpoint}; the same command then resumes from the one before it, or starts anew."
            )
            if not Path(checkpoint).name.startswith("checkpoint-"):  # the folder of a run that has trained
                remedy = "Put a copy of it there, or --overwrite_output_dir to train afresh."
            raise UserError(
                f"{damaged[0]}: damaged, can't be resumed from ({first_line(damaged[1])}).\n{remedy}"
            ) from e
        if isinstance(e, ValueError | KeyError):
            raise UserError(
                f"{checkpoint}: its optimizer state is for other tensors than those trained here ({first_line(e)}).\n"
                "The checkpoint is not the problem: resume it with that run's flags, or choose another --output_dir."
            ) from e
        raise


def _damaged_file(checkpoint: Path) -> tuple[Path, Exception] | None:
    """The first file of a checkpoint whose content can't be read, and the error; None if all can be read."""
    for path in sorted([*checkpoint.glob("*.pt*"), *checkpoint.glob("*.safetensors")]):
        try:
            with safe_globals():
                load_file(path) if path.suffix == ".safetensors" else load_torch_file(path)
        except Exception as e:
            if not isinstance(e, OSError) or e.errno in (None, EINVAL):  # torch's error for a truncated file
                return path, e
    return None


class CheckpointingTrainer(Trainer):
    """transformers' Trainer whose checkpoints contain only what trains, unless the complete encoder trains."""

    args: Any  # transformers types these as possibly None
    state: Any
    model_wrapped: Any
    lr_scheduler: Any
    model: Any
    train_dataset: Any

    def __init__(self, *args: Any, metadata: dict[str, Any], **kwargs: Any) -> None:
        self.metadata = metadata  # task, label names, base model, ...: written with every adapter
        self._is_saving_checkpoint = False
        self._not_removed: set[Path] = set()  # checkpoints that could not be
        self._saved: tuple[int, int] | None = None  # step and length of the log history of the last checkpoint
        # The sum of all steps' losses, a float64, so that a resumed run has the same; None if an older version began it
        self._total_loss: float | None = 0.0
        super().__init__(*args, **kwargs)
        # A loaded RoBERTa counts positions from the config's pad token, which transformers sets to the tokenizer's.
        self._pad_token_id = self.model.config.pad_token_id
        self.methods = methods_in(kwargs["model"])
        self.saves_part = any(row.freezes for row in self.methods)
        self.after_steps = {row.name: row.after_step(kwargs["model"]) for row in self.methods if row.after_step}

    # ------------------------------------------------------------------------------------------------- writing

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint under a temporary name, then rename it: an interruption leaves the others complete."""
        output_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            _remove_saving(output_dir)
        self.accelerator.wait_for_everyone()
        if self._total_loss is not None:
            self.record_total_loss()
        self._is_saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            best = output_dir / f"checkpoint-{self.state.best_global_step}"
            if best.name == name or best.is_dir():  # the best evaluation may have had no checkpoint
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self._publish(output_dir / SAVING / name, output_dir / name)
        except (OSError, SafetensorError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not _FULL_DISK.search(str(e)):
                raise
            last = complete_checkpoints(str(output_dir))
            kept = f"{last[-1]} is complete; the same command resumes from it" if last else "there is no earlier one"
            raise UserError(f"Can't write {output_dir / name}: {e}.\nMake room or choose another place; {kept}.") from e
        finally:
            self._is_saving_checkpoint = False
            if self.args.should_save:
                _remove_saving(output_dir)
        self._saved = self.state.global_step, len(self.state.log_history)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output_dir / name))
        self.rotate(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving_checkpoint:  # an upload runs while training goes on, and would not find it again
            super()._push_from_checkpoint(checkpoint_folder)

    def record_total_loss(self) -> float:
        """The sum of all steps' losses, a mean over the processes; also in the state, which is saved."""
        total = sum(gather_object([self._total_loss])) / self.args.world_size
        self.state.stateful_callbacks[_TOTAL_LOSS] = total
        return total

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, SAVING)) if self._is_saving_checkpoint else folder

    def _publish(self, written: Path, checkpoint: Path) -> None:
        """Complete a checkpoint by its state and the list of its files, and give it its name."""
        self.state.save_to_json(str(written / STATE))
        if self.after_steps:
            torch.save({name: x.state_dict() for name, x in self.after_steps.items()}, written / _METHOD_STATE)
        paths = [path for path in written.rglob("*") if path.is_file()]
        write_json(written / FILE_LIST, {str(path.relative_to(written)): path.stat().st_size for path in paths})
        clear_checkpoint(checkpoint, self.args)  # a damaged one of the same step
        flush_and_rename(written, checkpoint)

    def rotate(self, output_dir: Path, has_ended: bool = False) -> None:
        """Keep the last --save_total_limit checkpoints, the best among them; until the end one more if that is 1."""
        limit = self.args.save_total_limit
        if not limit or not self.args.should_save or not (kept := complete_checkpoints(str(output_dir))):
            return
        best = next((path for path in kept if path.name == Path(self.state.best_model_checkpoint or "").name), None)
        if best is not None and best != kept[-1]:
            kept.remove(best)
            kept.insert(len(kept) if has_ended else -1, best)
            limit = limit if has_ended else max(limit, 2)
        for path in kept[:-limit]:
            try:
                remove_checkpoint(path)
            except OSError as e:
                if path not in self._not_removed:
                    say(self.args, f"{path} can't be removed ({e.strerror}) and stays.")
                self._not_removed.add(path)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        state = dict(self.model.named_parameters()) if state_dict is None else state_dict
        self.check_finite({name: state[name] for name in trained & state.keys()})
        try:
            if not self.saves_part:
                with atomic_files(folder) as partial:
                    super()._save(str(partial), state_dict)
                    self._list_files(folder, *(path.name for path in partial.iterdir()))
            elif self.args.should_save:
                self._list_files(folder, ADAPTER_WEIGHTS, RUN_METADATA, ADAPTER_CONFIG)
                save_adapter(self.model, folder, self.metadata, state_dict)
        except (OSError, SafetensorError) as e:
            if self._is_saving_checkpoint:
                raise  # _save_checkpoint adds which checkpoint is complete
            raise UserError(f"Can't write the trained model to {folder}: {e}.") from e

    def _list_files(self, folder: Path, *names: str) -> None:
        if self.args.should_save and not self._is_saving_checkpoint:  # a checkpoint's list is written at its end
            list_files(folder, *names)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As transformers', but a file appears complete or not at all, and all_results.json is made of the others."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            list_files(folder, f"{split}_results.json", "all_results.json")
            _write_results(folder / f"{split}_results.json", metrics)
            results: dict[str, Any] = {}
            for name in ("train", "eval", split):
                with suppress(UserError):  # there is none, or a damaged one
                    results |= read_json(folder / f"{name}_results.json")
            if combined:
                _write_results(folder / "all_results.json", results)

    def save_state(self) -> None:
        """As transformers', but the file appears complete or not at all."""
        if self.is_world_process_zero():
            list_files(Path(self.args.output_dir), STATE)
            with atomic_write(Path(self.args.output_dir, STATE)) as partial:
                self.state.save_to_json(str(partial))

    def check_finite(self, tensors: dict[str, Tensor]) -> None:
        """Raise UserError if a trained tensor is not finite: it must be neither evaluated nor saved."""
        if not is_finite(tensors.values()):
            name = next((name for name, tensor in tensors.items() if not is_finite([tensor])), "a trained tensor")
            raise Diverged(self.args, self.state.global_step, f"{name} is no longer finite")

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the random states of all processes from one of them."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            states = [(path.name, path.read_bytes()) for path in Path(folder).iterdir()]
        if self.args.world_size > 1:
            states = gather_object(states)
        if self.args.should_save:
            for name, state in states:
                Path(output_dir, name).write_bytes(state)

    # ------------------------------------------------------------------------------------------------- reading

    def before_steps(self) -> None:
        """Let the methods replace weights by what steps multiply by; also after a checkpoint is loaded."""
        for row in self.methods:
            if row.before_steps:
                row.before_steps(self.model)

    def check_backend(self, checkpoint: str) -> None:
        """Raise UserError for a checkpoint whose optimizer state this backend can't read, or that has none."""
        shards = len([*Path(checkpoint).glob("*/*zero_pp_rank_*_optim_states.pt")])
        if shards != (self.args.world_size if self.is_deepspeed_enabled else 0):
            writer = f"by DeepSpeed in {shards} processes" if shards else "without DeepSpeed"
            reader = f"by DeepSpeed in {self.args.world_size} processes" if self.is_deepspeed_enabled else "without it"
            raise UserError(
                f"{checkpoint} was saved {writer} and can't be resumed {reader}.\n"
                "Resume it the same way, or start afresh with --overwrite_output_dir."
            )
        if not shards and not Path(checkpoint, OPTIMIZER_NAME).is_file():
            raise UserError(
                f"{checkpoint} contains no optimizer state (--save_only_model): a run can't resume from it.\n"
                "Start another run from its adapter (--lora_path), or afresh with --overwrite_output_dir."
            )

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self.model.config.pad_token_id = self._pad_token_id
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        done, checkpoint = super()._init_training_state(*args), args[3]
        if checkpoint and (recorded := read_json(Path(checkpoint, STATE)).get("best_model_checkpoint")):
            best = Path(checkpoint).parent / Path(recorded).name  # the folder may have been moved
            if self.args.load_best_model_at_end and not best.is_dir():
                raise UserError(f"{best}: the best checkpoint so far isn't there; --load_best_model_at_end needs it.")
            self.state.best_model_checkpoint = str(best)
        return done

    def _load_callback_state(self) -> None:
        self._total_loss = self.state.stateful_callbacks.pop(_TOTAL_LOSS, None)  # older versions did not write it
        super()._load_callback_state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if Path(resume_from_checkpoint, ADAPTER_WEIGHTS).is_file():
            load_adapter(self.model, read_adapter(resume_from_checkpoint), allow_new_head=False)
            self.before_steps()
            return
        with explain_damage(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with explain_damage(checkpoint):
            for path in Path(checkpoint).glob("*.pt*") if checkpoint else ():
                with safe_globals():
                    load_torch_file(path, "meta")
            self._read_optimizer_and_scheduler(checkpoint)
            if checkpoint and self.after_steps:
                saved = load_torch_file(Path(checkpoint, _METHOD_STATE))
                for name, after_step in self.after_steps.items():
                    after_step.load_state_dict(saved[name])

    def _read_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        check_moments(self.optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with explain_damage(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint and processes_of(checkpoint) != self.args.world_size:
            set_seed(seed_from(self.args.seed, self.state.global_step, self.args.process_index))
            return
        with explain_damage(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best and (self.saves_part or self.is_fsdp_enabled):
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()


def _write_results(path: Path, results: dict[str, Any]) -> None:
    write_text(path, json.dumps(results, indent=4, sort_keys=True))
