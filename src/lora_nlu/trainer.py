"""The `Trainer` subclass: checkpoints hold what was trained, appear whole or not at all, and are resumed whole."""

import json
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerState

from lora_nlu import adapters
from lora_nlu.errors import UserError
from lora_nlu.files import publish, write_json
from lora_nlu.methods import trains_a_part

STATE = "trainer_state.json"
_FILES = "files.json"  # in a checkpoint: its files and their lengths
_SAVING, _REMOVING = ".saving", ".removing"  # a checkpoint coming or going; never looked at by resume


def whole_checkpoints(output_dir: str) -> list[Path]:
    """Checkpoints of a run by step, oldest first: those whose files are all there, as long as they were written."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        try:
            files = json.loads((path / _FILES).read_text())
            state = TrainerState.load_from_json(str(path / STATE))
            lengths = {name: (path / name).stat().st_size for name in files}
            whole = step.isdigit() and state.global_step == int(step) and lengths == files
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if whole:
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


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
    for name in (_SAVING, _REMOVING):
        shutil.rmtree(Path(output_dir, name), ignore_errors=True)


@contextmanager
def _damage_said(checkpoint: str | None) -> Iterator[None]:
    """Turn what torch raises for a file it can't read into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as e:
        reason = str(e).splitlines()[0][:100] if str(e) else type(e).__name__
        raise UserError(
            f"{checkpoint}: damaged, can't be resumed from ({reason}).\n"
            "Remove this folder; the same command then takes the checkpoint before it, or starts anew."
        ) from e


class AdapterTrainer(Trainer):
    """`Trainer` that saves and loads the trained parameters alone; where the whole encoder trains, the whole model.

    `metadata` (task, label names, base model, ...) is written with every adapter.
    """

    args: Any  # transformers types these as possibly None
    model: Any
    train_dataset: Any

    def __init__(self, *args: Any, metadata: dict[str, Any], **kwargs: Any) -> None:
        self.metadata = metadata
        super().__init__(*args, **kwargs)
        self.saves_part = trains_a_part(kwargs["model"])
        self._training_since: float | None = None
        self._spent: float | None = None  # seconds of training before this process, once known
        self._under_construction = False
        self._loss_parts: dict[str, tuple[Tensor, int]] = {}  # since the last log: sum and number of steps

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; where a training step's has parts (R-Drop), they are logged beside it."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name in ("task_loss", "consistency_loss"):
            if isinstance(outputs, dict) and name in outputs:
                total, steps = self._loss_parts.get(name, (0.0, 0))
                self._loss_parts[name] = (total + outputs[name].detach(), steps + 1)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._training_since is not None:
            if self._spent is None:
                self._spent = seconds_trained(self.state.log_history)
            logs["elapsed_s"] = round(self._spent + time.monotonic() - self._training_since, 2)
        if "loss" in logs:
            for name, (total, steps) in self._loss_parts.items():
                logs[name] = self.accelerator.gather(total[None] / steps).mean().item()
            self._loss_parts.clear()
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; every log says after how many seconds of training it was made, interruptions left out."""
        self._training_since, self._spent = time.monotonic(), None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._training_since = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        try:
            super().init_hf_repo(token, private)
        except Exception as e:  # the HTTP library in use decides what no network or no permission is called
            raise UserError(
                f"--push_to_hub: the Hub gives no repository to push to ({str(e).splitlines()[0][:150]}).\n"
                "Log in with `hf auth login`, or leave the flag out and upload the output folder later: hf upload."
            ) from e

    # ------------------------------------------------------------------------------------------------- writing

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        try:
            if not self.saves_part:
                super()._save(output_dir, state_dict)
            elif self.args.should_save:
                adapters.save_adapter(self.model, folder, self.metadata, state_dict)
        except (OSError, SafetensorError) as e:
            if self._under_construction:
                raise  # _save_checkpoint says what is whole
            raise UserError(f"Can't write the trained model to {folder}: {e}.") from e

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, _SAVING)) if self._under_construction else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint under a temporary name, then rename it: whatever happens in between, the others stay."""
        output_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        saving = output_dir / _SAVING
        if self.args.should_save:
            shutil.rmtree(saving, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._under_construction = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_global_step:
                    self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{self.state.best_global_step}")
                    self.state.save_to_json(str(saving / name / STATE))
                written = [path for path in (saving / name).rglob("*") if path.is_file()]
                files = {str(path.relative_to(saving / name)): path.stat().st_size for path in written}
                write_json(saving / name / _FILES, files)
                if (output_dir / name).exists():  # a damaged one of the same step
                    remove_checkpoint(output_dir / name)
                publish(saving / name, output_dir / name)
        except (OSError, SafetensorError, RuntimeError) as e:
            # torch.save reports a full disk as a RuntimeError
            last = whole_checkpoints(str(output_dir))
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
        if not limit or not self.args.should_save or not (kept := whole_checkpoints(str(output_dir))):
            return
        best = next((path for path in kept if path.name == Path(self.state.best_model_checkpoint or "").name), None)
        if best is not None and best != kept[-1]:
            kept.remove(best)
            kept.insert(-1, best)
            limit = max(limit, 2)
        for path in kept[:-limit]:
            remove_checkpoint(path)

    # ------------------------------------------------------------------------------------------------- reading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not Path(resume_from_checkpoint, adapters.WEIGHTS).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        adapters.load_adapter(self.model, adapters.read_adapter(resume_from_checkpoint), allow_new_head=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _damage_said(checkpoint):
            for path in Path(checkpoint or "").glob("*.pt*") if checkpoint else ():
                adapters.check_archive(path)
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _damage_said(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.saves_part and best:
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()

    # ----------------------------------------------------------------------------------------------- evaluation

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # With --train_sampling_strategy group_by_length transformers would sort the evaluation as well, and predictions
        # would come out in another order than the examples.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
