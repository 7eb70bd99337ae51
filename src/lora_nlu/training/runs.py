"""One run in its output folder: begun, resumed or already done; scored; its results as files and as a table."""

import fcntl
import os
import re
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers.trainer_pt_utils import AcceleratorConfig

import lora_nlu
from lora_nlu.data.metrics import predicted
from lora_nlu.errors import UserError
from lora_nlu.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RUN_METADATA,
    is_training_run,
    read_json,
    write_json,
    write_text,
)
from lora_nlu.labels import label_list
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.methods.table import count_parameters, describe_method
from lora_nlu.training.checkpoints import (
    clear_leftovers,
    processes_of,
    remove_checkpoint,
    seconds_trained,
    whole_checkpoints,
)
from lora_nlu.training.processes import say
from lora_nlu.training.trainer import AdapterTrainer, Diverged

RUN = "run.json"  # marks an output folder as a run of ours
_LEFT_BEHIND = re.compile(r"\..*\.partial|\.saving|\.removing")  # of ours, by a process that was killed
_SCORED = ("eval*_results.json", "predict_results_*.tsv")  # written once a run has trained, if it does
_RESULTS = (
    "trainer_state.json",
    "*_results.json",
    *_SCORED,
    ADAPTER_WEIGHTS,
    ADAPTER_CONFIG,
    RUN_METADATA,
)
# What the difference of a setting means that says nothing by itself
_MEANING = {"train_data": ": the training examples differ", "eval_data": ": the evaluation examples differ"}
# What a method trains in the encoder, as the closing table calls it
LOSS_PARTS = {"lora": "LoRA", "bitfit": "biases", "houlsby": "adapters", "pfeiffer": "adapters"}
# What a run prints, saves and uploads, where it runs, how it evaluates: without effect on what it ends with, but for
# the draws of dropout, on which the number of processes has an effect as well. Every other field of RunArguments
# decides, one that a newer transformers brings too. The batch of a device counts as `examples_a_step`.
WITHOUT_EFFECT = frozenset(
    """
    output_dir overwrite_output_dir logging_dir do_train do_eval do_predict resume_from_checkpoint local_rank
    per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size average_tokens_across_devices
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_cache torch_empty_cache_steps full_determinism use_cpu
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug
    eval_strategy eval_steps eval_delay eval_on_start prediction_loss_only eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    save_strategy save_steps save_only_model save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    restore_callback_states_from_checkpoint remove_unused_columns dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed
    """.split()
)
# but where a checkpoint or the learning rate goes by the evaluations, their schedule decides
SCHEDULE = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps")
# what run.json has always recorded, at its default or not
_ALWAYS_RECORDED = frozenset(
    """
    seed data_seed learning_rate lr_scheduler_type warmup_steps weight_decay num_train_epochs max_steps optim adam_beta1
    adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor fp16 bf16 train_sampling_strategy
    """.split()
)


def _plain(value: Any) -> Any:
    """A setting as JSON has it, the same in every run."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, AcceleratorConfig):  # those left at their default say nothing
        standard = AcceleratorConfig().to_dict()
        return {name: x for name, x in value.to_dict().items() if x != standard[name]} or None
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def depends_on_evaluations(args: Any) -> bool:
    """Whether evaluations while training decide which checkpoint, how many steps or what learning rate a run has."""
    stops_early = getattr(args, "early_stopping_patience", None) is not None
    return args.load_best_model_at_end or stops_early or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def deciding_settings(args: Any) -> dict[str, Any]:
    """The settings that decide what a run ends with, by name, as plain JSON; args: TrainingArguments."""
    names = [field.name for field in fields(args) if field.name not in WITHOUT_EFFECT]
    names += SCHEDULE if depends_on_evaluations(args) else ()
    settings = {name: _plain(getattr(args, name)) for name in names}
    each = args.per_device_train_batch_size
    settings["examples_a_step"] = each * args.gradient_accumulation_steps * args.world_size
    if args.dataloader_drop_last:
        settings["examples_a_batch"] = each * args.world_size
    if args.neftune_noise_alpha is not None:  # its noise depends on a batch's longest sequence
        settings["examples_a_device"] = each
    return settings


def left_at_default(args: Any, settings: dict[str, Any]) -> list[str]:
    """Those of these settings that are at their default and that older versions did not record."""
    standard = {field.name: _plain(field.default) for field in fields(args) if field.default is not MISSING}
    return [n for n, x in settings.items() if n not in _ALWAYS_RECORDED and n in standard and standard[n] == x]


def run_metadata(
    args: Any, model: Any, task: str, labels: tuple[str, ...], known: dict[str, Any], decided: dict[str, Any]
) -> dict[str, Any]:
    """What a later reader of the adapter, and a later start of the same run, must know.

    args: TrainingArguments; known: of the base model and the adapter started from; decided: what else decides what a
    run ends with.
    """
    config, layers = model.config, [module for module in model.modules() if isinstance(module, LoRALinear)]
    settings = deciding_settings(args)
    return {
        "task": task,
        "labels": list(labels),
        **known,
        "base_revision": getattr(config, "_commit_hash", None),
        "lora": {
            "ranks": sorted({layer.r for layer in layers}),
            "scalings": sorted({layer.scaling for layer in layers}),
            "lora_relative_query": bool(getattr(config, "lora_relative_query", False)),
        },
        "method": describe_method(model),
        "parameters": count_parameters(model)._asdict(),
        "hyperparameters": settings | decided,
        "left_at_default": left_at_default(args, settings),
        "versions": {module.__name__: module.__version__ for module in (lora_nlu, torch, transformers)},
    }


def prepare_output_dir(output_dir: str, overwrite: bool) -> None:
    """Make sure the output folder can be written and is ours (or new). Raises UserError."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        content = [path.name for path in folder.iterdir() if not _LEFT_BEHIND.fullmatch(path.name)]
    except OSError as e:
        raise UserError(f"--output_dir {folder}: can't be written ({e.strerror}).") from e
    if content and RUN not in content and not overwrite:
        raise UserError(
            f"--output_dir {folder} holds {len(content)} entries ({content[0]}, ...) and is no run of ours.\n"
            "Choose another folder, or --overwrite_output_dir to write into it all the same."
        )


def record(trainer: AdapterTrainer, **more: Any) -> None:
    """Write what the folder holds into it: the run's metadata and, once trained, that it is."""
    if trainer.args.process_index == 0:
        write_json(Path(trainer.args.output_dir, RUN), trainer.metadata | more)


def record_evaluation(trainer: AdapterTrainer, evaluated: str) -> None:
    """Record in the folder of an evaluation or prediction what is evaluated; what a training run wrote stays.

    evaluated: the adapter, or else the model. Raises UserError in the folder of a run that trained, if it isn't what
    that run ended with or its task is another: the figures there are taken for the run's.
    """
    folder, now = Path(trainer.args.output_dir), trainer.metadata
    (earlier,) = broadcast_object_list([recorded(folder)])
    if not is_training_run(earlier):
        record(trainer)
        return
    task, method = earlier.get("task"), earlier.get("method", {}).get("name")
    if folder.resolve() != Path(evaluated).resolve() or task != now["task"]:
        flag = {"full": "model_name_or_path", "lora": "lora_path"}.get(method, "adapter_path")
        raise UserError(
            f"--output_dir {folder} is of a run that trained on {task}; the results of {evaluated} on {now['task']} "
            f"would be taken for that run's.\nChoose another --output_dir; what was trained there is --{flag} {folder}."
        )


def recorded(folder: Path) -> dict[str, Any]:
    """What the run in a folder recorded of itself; nothing if there was none."""
    return read_json(folder / RUN) if (folder / RUN).is_file() else {}


def _wait_for(path: Path, content: str, args: Any) -> None:
    """Wait until this process reads what the first one wrote, for a network's disk may be late. Raises UserError."""
    for _ in range(60):
        if path.is_file() and path.read_text() == content:
            return
        time.sleep(0.5)
    raise UserError(
        f"{path}: process {args.process_index} (on {socket.gethostname()}) doesn't see what the first process wrote.\n"
        "--output_dir must be on a disk that all machines share."
    )


def check_all_alike(trainer: AdapterTrainer) -> None:
    """Raise UserError in a process that was started with other flags or another base model than the first."""
    flags = {name: str(value) for name, value in trainer.args.to_dict().items() if name != "local_rank"}
    mine = trainer.metadata | {"hyperparameters": flags | trainer.metadata["hyperparameters"]}
    (first,) = broadcast_object_list([mine])
    if differences := _differences(first, mine):
        raise UserError(
            f"process {trainer.args.process_index} (on {socket.gethostname()}) was started otherwise than the first: "
            f"{'; '.join(differences[:8])}.\nStart the same command, with as many devices, on all machines."
        )


def _clear_earlier_run(folder: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for path in folder.glob("checkpoint-*"):
        if path.is_dir():
            remove_checkpoint(path)
    for name in _RESULTS:
        for path in folder.glob(name):
            path.unlink()


def _find_checkpoint(output_dir: str, given: str | None) -> str | None:
    """Where to resume: --resume_from_checkpoint, or the last whole checkpoint of an unfinished run."""
    checkpoints = [str(path) for path in whole_checkpoints(output_dir)]
    if given and str(given).lower() not in ("true", "false"):
        if str(Path(given)) not in map(str, whole_checkpoints(str(Path(given).parent))):
            raise UserError(f"--resume_from_checkpoint {given}: no whole checkpoint.")
        return given
    return checkpoints[-1] if checkpoints and str(given).lower() != "false" else None


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two runs' metadata differ that decides what they end with."""
    differences = []
    for key in ("task", "labels", "base_fingerprint", "tokenizer_fingerprint", "lora", "method", "hyperparameters"):
        one, other = earlier.get(key, now.get(key)), now.get(key)  # an older version recorded less
        if isinstance(one, dict) and isinstance(other, dict):
            names = one if key == "hyperparameters" else {**one, **other}  # an older version recorded fewer of these
            changed = [name for name in names if one.get(name) != other.get(name)]
            differences += [f"{n} {one.get(n)}, now {other.get(n)}{_MEANING.get(n, '')}" for n in changed]
        elif one != other:
            one, other = (label_list(value) if key == "labels" else value for value in (one, other))
            differences.append(f"{key} {one}, now {other}")
    return differences


def _check_best_metric(source: str, earlier: dict[str, Any], args: Any) -> None:
    """Raise UserError for an older version's run: its best figure was of another metric or direction, unrecorded."""
    if args.metric_for_best_model and "metric_for_best_model" not in earlier.get("hyperparameters", {}):
        raise UserError(
            f"{source} holds a run that an older version began. That version chose the best checkpoint otherwise.\n"
            "Choose another --output_dir, or --overwrite_output_dir to train afresh."
        )


def _check_same_run(source: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on from, or take for done, what was trained otherwise. Raises UserError with the differences."""
    if differences := _differences(earlier, now):
        raise UserError(
            f"{source} holds a run with other settings: {'; '.join(differences[:8])}.\n"
            "Choose another --output_dir, or --overwrite_output_dir to train afresh."
        )


def _to_do(trainer: AdapterTrainer) -> tuple[str | None, bool]:
    """The checkpoint to resume from, if any, and whether all is done. Raises UserError if another run left either."""
    folder = Path(trainer.args.output_dir)
    earlier = recorded(folder) or trainer.metadata
    checkpoint = _find_checkpoint(trainer.args.output_dir, trainer.args.resume_from_checkpoint)
    if checkpoint or "trained" in earlier:
        _check_same_run(str(folder), earlier, trainer.metadata)
    elif results := [path.name for name in _SCORED for path in sorted(folder.glob(name))]:
        raise UserError(
            f"--output_dir {folder} holds results that another model gave ({results[0]}), to be taken for this run's.\n"
            "Choose another folder, or --overwrite_output_dir to remove them first."
        )
    if checkpoint and Path(checkpoint, RUN_METADATA).is_file():  # it may be another folder's
        _check_same_run(checkpoint, read_json(Path(checkpoint, RUN_METADATA)), trainer.metadata)
    if checkpoint and "trained" not in earlier:
        _check_best_metric(str(folder), earlier, trainer.args)
        trainer.check_engine(checkpoint)
    return checkpoint, "trained" in earlier


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder while a run trains into it; one may have outlived its launcher. Raises UserError if one does."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(held)
        raise UserError(
            f"{folder}: another run trains into it now. Wait for it or end it, or take another folder."
        ) from e
    except OSError:
        pass  # some networks' disks have no locks
    try:
        yield
    finally:
        os.close(held)


def train(trainer: AdapterTrainer, overwrite: bool) -> None:
    """Train, or take up where an interrupted run stopped, or skip what is already done; save what was trained.

    Raises UserError for a folder of another run, now or earlier, and where something can't be read or written.
    """
    with _alone_in(Path(trainer.args.output_dir)) if trainer.args.process_index == 0 else nullcontext():
        _train(trainer, overwrite)


def _train(trainer: AdapterTrainer, overwrite: bool) -> None:
    args = trainer.args
    folder = Path(args.output_dir)
    if overwrite and args.process_index == 0:
        record(trainer)  # first: from here on the folder holds no finished run
        _clear_earlier_run(folder)
    checkpoint, trained = _to_do(trainer) if args.process_index == 0 else (None, False)
    checkpoint, trained = broadcast_object_list([checkpoint, trained])  # one process looks, and all do the same
    if trained:
        say(args, f"{folder}: already trained; --overwrite_output_dir trains afresh.")
        trainer._load_from_checkpoint(str(folder))
        return
    if checkpoint:
        say(args, f"Resuming from {checkpoint}.")
        before = processes_of(checkpoint)
        if before and before != args.world_size:
            say(args, f"It was written by {before} process{'es' * (before > 1)}: from here on dropout draws anew.")
    record(trainer)
    if args.process_index == 0:
        clear_leftovers(args.output_dir)
    (written,) = broadcast_object_list([(folder / RUN).read_text() if args.process_index == 0 else None])
    _wait_for(folder / RUN, written, args)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as e:
        last = whole_checkpoints(args.output_dir)
        kept = f"{last[-1]} is whole: the same command resumes from it" if last else "No checkpoint was due yet"
        raise UserError(f"interrupted at step {trainer.state.global_step}. {kept}.") from e
    except Diverged as e:
        with suppress(OSError):  # where several processes meet it, another may be writing the same
            write_json(folder / RUN, trainer.metadata | {"diverged": e.what})
        raise
    if trainer.state.global_step < trainer.state.max_steps:
        say(args, f"Stopped early, at step {trainer.state.global_step} of {trainer.state.max_steps}.")
    trainer.rotate(folder)  # a run killed between its last save and the rotation had none since
    trainer.save_model(_internal_call=True)  # an upload comes last: its failure must lose nothing
    seconds, samples = seconds_trained(trainer.state.log_history), len(trainer.train_dataset)
    measured = {"train_seconds": seconds, "train_samples": samples, **peak_memory_gib()}
    trainer.save_metrics("train", result.metrics | measured)
    trainer.save_state()
    record(trainer, trained=True)
    if args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save", revision=args.hub_revision)


def evaluate(trainer: AdapterTrainer, tables: dict[str, Any], metric: str) -> dict[str, float]:
    """Score every validation set; MNLI's second one gets the suffix _mm, and both together _overall."""
    sets = [name for name in tables if name.startswith("validation")]
    combined: dict[str, float] = {}
    for name in sets:
        metrics = trainer.evaluate(tables[name]) | {"eval_samples": len(tables[name])}
        if name.endswith("mismatched"):
            metrics = {f"{key}_mm": value for key, value in metrics.items() if key.startswith("eval_")}
            trainer.save_metrics("eval_mm", metrics, combined=False)
        combined |= metrics
    if len(sets) > 1 and f"eval_{metric}" in combined:  # --prediction_loss_only computes none
        sizes = [len(tables[name]) for name in sets]
        scores = [combined[f"eval_{metric}"], combined[f"eval_{metric}_mm"]]
        combined[f"eval_{metric}_overall"] = sum(s * n for s, n in zip(scores, sizes, strict=True)) / sum(sizes)
    trainer.save_metrics("eval", combined)
    return combined


def predict(trainer: AdapterTrainer, tables: dict[str, Any]) -> list[Path]:
    """Write predict_results_<task>.tsv (index, label name or number) for every test set; MNLI has three of them."""
    written, task, labels = [], trainer.metadata["task"], trainer.metadata["labels"]
    for name in (name for name in tables if name.startswith("test")):
        logits: Any = trainer.predict(tables[name]).predictions
        answers = predicted(logits)
        which = {"test_mismatched": f"{task}-mm", "test_ax": "ax"}.get(name, task)
        path = Path(trainer.args.output_dir, f"predict_results_{which}.tsv")
        if trainer.args.process_index == 0:
            numbered = zip(range(len(tables[name])), answers, strict=True)
            lines = [f"{i}\t{labels[int(a)] if labels else format(a, '.3f')}" for i, a in numbered]
            write_text(path, "\n".join(["index\tprediction", *lines]) + "\n")
        written.append(path)
    return written


def peak_memory_gib() -> dict[str, float]:
    """The most memory this process has held, in GiB; on CUDA also the most of the GPU's."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    peak = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_available():
        peak["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peak
