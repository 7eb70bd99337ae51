"""Checkpoint folders: which are complete, what they contain, errors for damaged ones."""

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
FULL_DISK = re.compile("inline_container|StreamWriter|iostream")  # how torch.save says it, in a RuntimeError
FILE_LIST = "files.json"  # in a checkpoint: its files and their lengths
SAVING, _REMOVING = ".saving", ".removing"  # a checkpoint coming or going; never looked at by resume


def complete_checkpoints(output_dir: str) -> list[Path]:
    """Checkpoints of a run by step, oldest first: those whose files are all there, as long as they were written."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        try:
            files = json.loads((path / FILE_LIST).read_text())
            state = TrainerState.load_from_json(str(path / STATE))
            lengths = {name: (path / name).stat().st_size for name in files}
            whole = step.isdigit() and state.global_step == int(step) and lengths == files
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if whole:
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def last_finite_checkpoint(output_dir: str) -> Path | None:
    """The newest complete checkpoint of a run whose saved tensors are all finite; None if there is none."""
    for path in reversed(complete_checkpoints(output_dir)):
        if all(is_finite(load_file(file).values()) for file in path.glob("*.safetensors")):
            return path
    return None


def processes_of(checkpoint: str) -> int:
    """In how many processes a checkpoint's run was, by the random states in it; 0 if it has none."""
    return len([*Path(checkpoint).glob("rng_state*.pth")])


def seconds_trained(log_history: list[dict[str, Any]]) -> float:
    """How long a run has trained, by its last log, in all processes that took part one after another."""
    return next((entry["elapsed_s"] for entry in reversed(log_history) if "elapsed_s" in entry), 0.0)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that no moment of it looks like one: under another name first."""
    doomed = path.with_name(_REMOVING)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(output_dir: str) -> None:
    """Remove what a killed process had under construction, or under removal."""
    for name in (SAVING, _REMOVING):
        shutil.rmtree(Path(output_dir, name), ignore_errors=True)


def _damaged_file(checkpoint: Path) -> tuple[Path, Exception] | None:
    """The first of a checkpoint's files that can't be read for what is in it, and why; None if all can."""
    for path in sorted([*checkpoint.glob("*.pt*"), *checkpoint.glob("*.safetensors")]):
        try:
            with safe_globals():
                load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        except Exception as e:
            if not isinstance(e, OSError) or e.errno in (None, EINVAL):  # how torch calls a file that is cut
                return path, e
    return None


@contextmanager
def naming_damage(checkpoint: str | None) -> Iterator[None]:
    """Say of what fails while a checkpoint is loaded whether a file is damaged or other tensors train.

    Raises UserError for these two; every other error, of the GPU, of a disk or of permissions, stays what it is.
    """
    try:
        yield
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as e:
        if (
            isinstance(e, UserError | torch.OutOfMemoryError)
            or lost_process(e)
            or is_out_of_memory(e)
            or not checkpoint
        ):
            raise
        if damaged := _damaged_file(Path(checkpoint)):
            raise UserError(
                f"{damaged[0]}: damaged, can't be resumed from ({first_line(damaged[1])}).\n"
                f"Remove the folder {checkpoint}; the same command then takes the checkpoint before it, or starts anew."
            ) from e
        if isinstance(e, ValueError | KeyError):
            raise UserError(
                f"{checkpoint}: its optimizer state is for other tensors than those trained here "
                f"({first_line(e)}).\nThe checkpoint is not the problem: resume it with the flags of that run, or "
                "choose another --output_dir."
            ) from e
        raise


def check_moments(optimizer: Any) -> None:
    """Raise ValueError where Adam's moments are of other shapes than its parameters: fused, it would write beyond them.

    A file holds them by number, so this is how parameters in another order show.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's holds torch's
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        for parameter, moments in optimizer.state.items():
            for name, moment in moments.items():
                if isinstance(moment, Tensor) and moment.dim() and moment.shape != parameter.shape:
                    raise ValueError(f"{name} is {list(moment.shape)} for a parameter {list(parameter.shape)}")
