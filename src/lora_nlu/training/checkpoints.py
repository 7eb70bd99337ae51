"""Checkpoint folders: which are complete, how they appear and disappear, errors for damaged or diverged ones."""

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINVAL
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from lora_nlu.errors import UserError, first_line, is_out_of_memory
from lora_nlu.ops.sharding import is_finite
from lora_nlu.training.processes import lost_process

STATE = "trainer_state.json"
FILE_LIST = "files.json"  # in a checkpoint: its files and their lengths
SAVING, _REMOVING = ".saving", ".removing"  # a checkpoint being written or removed; resuming never reads them
FULL_DISK = re.compile("inline_container|StreamWriter|iostream")  # in torch.save's RuntimeError for it


def complete_checkpoints(output_dir: str) -> list[Path]:
    """A run's checkpoints by step, oldest first, of which every file is there with the length that was written."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        try:
            files = json.loads((path / FILE_LIST).read_text())
            state = TrainerState.load_from_json(str(path / STATE))
            lengths = {name: (path / name).stat().st_size for name in files}
            complete = step.isdigit() and state.global_step == int(step) and lengths == files
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            complete = False
        if complete:
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def processes_of(checkpoint: str) -> int:
    """The number of processes that wrote a checkpoint, by its files of random states; 0 if it has none."""
    return len([*Path(checkpoint).glob("rng_state*.pth")])


def seconds_trained(log_history: list[dict[str, Any]]) -> float:
    """How long a run has trained by its last log, in all the processes that it was resumed in."""
    return next((entry["elapsed_s"] for entry in reversed(log_history) if "elapsed_s" in entry), 0.0)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint: renamed first, so that a half-removed one is never taken for a checkpoint."""
    renamed = path.with_name(_REMOVING)
    shutil.rmtree(renamed, ignore_errors=True)
    path.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def clear_leftovers(output_dir: str) -> None:
    """Remove checkpoints that a killed process was writing or removing."""
    for name in (SAVING, _REMOVING):
        shutil.rmtree(Path(output_dir, name), ignore_errors=True)


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
    for path in reversed(complete_checkpoints(output_dir)):
        if all(is_finite(load_file(file).values()) for file in path.glob("*.safetensors")):
            return path
    return None


@contextmanager
def naming_damage(checkpoint: str | None) -> Iterator[None]:
    """Around the loading of a checkpoint: raise UserError if one of its files is damaged, or if other tensors train.

    Every other error, of the GPU, of a disk or of permissions, stays as it is.
    """
    try:
        yield
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as e:
        has_own_message = isinstance(e, UserError | torch.OutOfMemoryError) or lost_process(e) or is_out_of_memory(e)
        if has_own_message or not checkpoint:
            raise
        if damaged := _damaged_file(Path(checkpoint)):
            raise UserError(
                f"{damaged[0]}: damaged, can't be resumed from ({first_line(damaged[1])}).\n"
                f"Remove the folder {checkpoint}; the same command then resumes from the one before it, or starts anew."
            ) from e
        if isinstance(e, ValueError | KeyError):
            raise UserError(
                f"{checkpoint}: its optimizer state is for other tensors than those trained here "
                f"({first_line(e)}).\nThe checkpoint is not the problem: resume it with the flags of that run, or "
                "choose another --output_dir."
            ) from e
        raise


def _damaged_file(checkpoint: Path) -> tuple[Path, Exception] | None:
    """The first file of a checkpoint whose content can't be read, and the error; None if all can be read."""
    for path in sorted([*checkpoint.glob("*.pt*"), *checkpoint.glob("*.safetensors")]):
        try:
            with safe_globals():
                load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        except Exception as e:
            if not isinstance(e, OSError) or e.errno in (None, EINVAL):  # torch's error for a truncated file
                return path, e
    return None


def check_moments(optimizer: Any) -> None:
    """Raise ValueError where Adam's moments have other shapes than its parameters.

    A file has them by number, so parameters in another order show only here; fused, Adam would write beyond the tensor.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps torch's
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        for parameter, moments in optimizer.state.items():
            for name, moment in moments.items():
                if isinstance(moment, Tensor) and moment.dim() and moment.shape != parameter.shape:
                    raise ValueError(f"{name} is {list(moment.shape)} for a parameter {list(parameter.shape)}")
