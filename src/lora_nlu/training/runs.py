"""A run from its start to its files: train or resume, evaluate, predict, describe."""

import resource
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_NAME

from lora_nlu.adapters.model_card import write_card
from lora_nlu.data.examples import LABEL, Examples, column
from lora_nlu.data.metrics import answers_of, greater_is_better, predicted
from lora_nlu.data.tokenization import digest, token_count
from lora_nlu.errors import UserError
from lora_nlu.escaping import json_line, tsv_cell
from lora_nlu.files import RUN, RUN_METADATA, read_json, write_json, write_text
from lora_nlu.methods.linear import unmerged_parameters
from lora_nlu.methods.marking import count_parameters
from lora_nlu.methods.table import METHODS
from lora_nlu.models.loading import sampled_fingerprint
from lora_nlu.training.checkpoints import (
    STATE,
    Diverged,
    clear_leftovers,
    complete_checkpoints,
    processes_of,
    seconds_trained,
)
from lora_nlu.training.file_list import EVALUATION, PREDICTIONS, WEIGHTS, list_files
from lora_nlu.training.output_folder import check_results, clear_earlier_run, record, remaining, wait_for_file
from lora_nlu.training.processes import Interrupted, deferred_signals, say
from lora_nlu.training.trainer import AdapterTrainer

STOPPED_EARLY = "stopped_early"  # in a run's metadata: the last step, and how many there could have been


def trainer_class(args: Any) -> type[AdapterTrainer]:
    """The trainer for the backend of the flags; args: RunArguments."""
    if args.is_sharded:
        from lora_nlu.training.sharded import ShardedTrainer

        return ShardedTrainer
    return AdapterTrainer


def train(trainer: AdapterTrainer, overwrite: bool) -> str | None:
    """Train or resume the run, and save the trained model; a run that has trained is only loaded.

    The output folder must be locked. Returns the fingerprint of the trained weights, in the first process.
    """
    args, is_first = trainer.args, trainer.args.process_index == 0
    folder = Path(args.output_dir)
    if overwrite and is_first:
        record(trainer)  # first: from here on the folder contains no finished run
        clear_earlier_run(args)
    # the first process decides for all
    decided = remaining(trainer) if is_first else (None, False, {})
    checkpoint, is_trained, trainer.metadata = broadcast_object_list([*decided])
    if is_first:
        clear_leftovers(args.output_dir)
    if is_trained:
        say(args, f"{folder}: already trained; --overwrite_output_dir trains afresh.")
        if not any(folder.glob("*model*.safetensors")):  # an adapter's, or a model's in one file or several
            raise UserError(f"{folder}: what was trained isn't there.\nPut it back, or --overwrite_output_dir.")
        trainer._load_from_checkpoint(str(folder))
        with suppress(UserError, KeyError):  # what an evaluation writes with its scores
            ended = read_json(folder / STATE)
            trainer.state.epoch = ended["epoch"]
            trainer.state.num_input_tokens_seen = ended["num_input_tokens_seen"]
        return _saved_weights(trainer)
    if checkpoint:
        say(args, f"Resuming from {checkpoint}.")
        before = processes_of(checkpoint)
        if before and before != args.world_size:
            say(args, f"It was written by {before} process{'es' * (before > 1)}: from here on dropout draws anew.")
    record(trainer)
    (text,) = broadcast_object_list([(folder / RUN).read_text() if is_first else None])
    wait_for_file(folder / RUN, text, args)
    with deferred_signals(trainer.signals):
        metrics = _train_from(checkpoint, trainer)
        if trainer.state.global_step < trainer.state.max_steps:
            stopped = {"step": trainer.state.global_step, "max_steps": trainer.state.max_steps}
            say(args, f"Stopped early, at step {stopped['step']} of {stopped['max_steps']}.")
            trainer.metadata = trainer.metadata | {STOPPED_EARLY: stopped}
        weights = _save(trainer, metrics)
    if args.push_to_hub:  # last, for it may fail
        trainer.push_to_hub(commit_message="Model save", revision=args.hub_revision)
    return weights


def _train_from(checkpoint: str | None, trainer: AdapterTrainer) -> dict[str, float]:
    """transformers' metrics of the training. Raises Interrupted or UserError if it is interrupted or diverges."""
    folder = Path(trainer.args.output_dir)
    try:
        return trainer.train(resume_from_checkpoint=checkpoint).metrics
    except Interrupted:
        record(trainer, interrupted={"step": trainer.state.global_step, "time": datetime.now(timezone.utc).isoformat()})
        trainer.accelerator.wait_for_everyone()  # a launcher ends the others when the first process ends
        raise
    except KeyboardInterrupt as e:
        last = complete_checkpoints(str(folder))
        kept = f"{last[-1]} is complete: the same command resumes from it" if last else "No checkpoint was due yet"
        raise UserError(f"interrupted at step {trainer.state.global_step}. {kept}.") from e
    except Diverged as e:
        with suppress(OSError):  # another process that diverged may be writing the same file
            write_json(folder / RUN, trainer.metadata | {"diverged": e.what})
        raise


def _save(trainer: AdapterTrainer, metrics: dict[str, float]) -> str | None:
    """Write the trained model, its metrics and the record that it is trained; returns its `_saved_weights`."""
    trainer.save_model(_internal_call=True)
    seconds, samples = seconds_trained(trainer.state.log_history), len(trainer.train_dataset)
    measured = {"train_seconds": seconds, "train_samples": samples, **peak_memory_gib()}
    if STOPPED_EARLY in trainer.metadata:
        measured["stopped_early_at_step"] = trainer.metadata[STOPPED_EARLY]["step"]
    trainer.save_metrics("train", metrics | measured)
    trainer.save_state()
    weights = _saved_weights(trainer)
    record(trainer, trained=True, **{WEIGHTS: weights})
    return weights


def _saved_weights(trainer: AdapterTrainer) -> str | None:
    """The fingerprint of the trained model in the output folder; None in all but the first process, and if unknown."""
    folder = Path(trainer.args.output_dir)
    if trainer.args.process_index != 0:
        return None
    if trainer.saves_part:
        return read_json(folder / RUN_METADATA).get(WEIGHTS)  # older versions recorded none
    path = folder / SAFE_WEIGHTS_NAME  # a larger model is in several files
    return sampled_fingerprint(load_file(path)) if path.is_file() else None


def loaded_weights(trainer: AdapterTrainer) -> str:
    """The fingerprint of the weights that an evaluation or prediction has loaded."""
    of_adapter = trainer.metadata["started_from_fingerprint"]
    return of_adapter or sampled_fingerprint(unmerged_parameters(trainer.model))


def evaluate(
    trainer: AdapterTrainer, tables: dict[str, Any], examples: Examples, metric: str, weights: str | None
) -> dict[str, Any]:
    """The metrics of every validation set; those of MNLI's second one end in _mm, of both together in _overall.

    weights: the model's fingerprint; it is recorded, and the digest of each set's examples and its size before some
    were chosen. --write_eval_predictions writes eval_predictions_<task>.jsonl beside.
    Raises UserError rather than replace a run's results by those of fewer examples.
    """
    rows = examples.rows
    sets = [name for name in tables if name.startswith("validation")]
    if trainer.args.process_index == 0:
        earlier = _results(Path(trainer.args.output_dir, EVALUATION))
        for name in sets:
            before = earlier.get("eval_samples" + "_mm" * name.endswith("mismatched"))
            check_results(trainer, weights, len(tables[name]), rows.get(name), before, EVALUATION)
    combined: dict[str, Any] = {WEIGHTS: weights}
    for name in sets:
        of_set = {"eval_set_samples": rows.get(name), "eval_data": digest(tables[name])}
        metrics: dict[str, Any] = trainer.evaluate(tables[name]) | of_set
        if trainer.args.write_eval_predictions and trainer.args.process_index == 0:
            task = trainer.metadata["task"] + "-mm" * name.endswith("mismatched")
            path = Path(trainer.args.output_dir, f"eval_predictions_{task}.jsonl")
            list_files(path.parent, path.name)
            _write_answers(path, examples, name, trainer.evaluated_logits)
        if name.endswith("mismatched"):
            metrics = {f"{key}_mm": value for key, value in metrics.items() if key.startswith("eval_")}
            trainer.save_metrics("eval_mm", metrics, combined=False)
        combined |= metrics
    if len(sets) > 1 and f"eval_{metric}" in combined:  # --prediction_loss_only computes no metric
        sizes = [len(tables[name]) for name in sets]
        scores = [combined[f"eval_{metric}"], combined[f"eval_{metric}_mm"]]
        combined[f"eval_{metric}_overall"] = sum(s * n for s, n in zip(scores, sizes, strict=True)) / sum(sizes)
    combined["eval_precision"] = trainer.precision
    trainer.save_metrics("eval", combined)
    return combined


def _results(path: Path) -> dict[str, Any]:
    """The content of a file of results; empty if there is none, or a damaged one."""
    with suppress(UserError):
        return read_json(path)
    return {}


def predict(trainer: AdapterTrainer, tables: dict[str, Any], examples: Examples, weights: str | None) -> list[Path]:
    """Write predict_results_<task>.tsv (index, label name or number) for every test set; MNLI has three of them.

    Beside it, predictions_<task>.jsonl has the texts of each example and the probabilities of all classes.
    predict_results.json then records the same of each file as `evaluate` does of a set. Returns the paths of both.
    """
    folder = Path(trainer.args.output_dir)
    paths, task, labels = [], trainer.metadata["task"], trainer.metadata["labels"]
    for split in [name for name in tables if name.startswith("test")]:
        name = {"test_mismatched": f"{task}-mm", "test_ax": "ax"}.get(split, task)
        answers_path, details_path = folder / f"predict_results_{name}.tsv", folder / f"predictions_{name}.jsonl"
        paths.extend([answers_path, details_path])
        made_of, samples, rows = _results(folder / PREDICTIONS), len(tables[split]), examples.rows.get(split)
        if trainer.args.process_index == 0:
            earlier = made_of.get(answers_path.name)
            before = earlier.get("samples") if isinstance(earlier, dict) else None
            check_results(trainer, weights, samples, rows, before, answers_path.name)
        logits: Any = trainer.predict(tables[split]).predictions  # one row for each example, checked by the trainer
        answers = [tsv_cell(labels[int(x)]) if labels else f"{x:.3f}" for x in predicted(logits)]
        if trainer.args.process_index == 0:
            list_files(folder, details_path.name, answers_path.name, PREDICTIONS)
            _write_answers(details_path, examples, split, logits)
            lines = ["index\tprediction", *(f"{index}\t{answer}" for index, answer in enumerate(answers))]
            write_text(answers_path, "\n".join(lines) + "\n")
            of_set = {"samples": samples, "set_samples": rows, "data": digest(tables[split])}
            of_set["precision"] = trainer.precision
            write_json(folder / PREDICTIONS, made_of | {answers_path.name: {WEIGHTS: weights} | of_set})
    return paths


def _write_answers(path: Path, examples: Examples, split: str, logits: Any) -> None:
    """Write a JSON line for each example of a split: its texts, the answer, and its own label where it has one."""
    table, labels = examples.splits[split], examples.labels
    names = [name for name in ("text", "text_pair", LABEL) if name in table.column_names]
    values = [column(table, name).to_pylist() for name in names]
    if LABEL in names:
        names[-1] = "expected"
        values[-1] = [labels[i] for i in values[-1]] if labels else values[-1]
    details = enumerate(zip(zip(*values, strict=True), answers_of(logits, labels), strict=True))
    objects = [{"index": i, **dict(zip(names, row, strict=True)), **answer} for i, (row, answer) in details]
    write_text(path, "".join(f"{json_line(one)}\n" for one in objects))


def peak_memory_gib() -> dict[str, float]:
    """The peak of this process's memory, in GiB; on CUDA also of the GPU's."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    peak = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_available():
        peak["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


def describe_run(trainer: AdapterTrainer, metrics: dict[str, float], metric: str) -> None:
    """Write a trained adapter's metrics into its metadata, and its model card, so that the folder can be uploaded."""
    folder = Path(trainer.args.output_dir)
    if trainer.saves_part and trainer.args.process_index == 0:
        reported = {key: value for key, value in metrics.items() if metric in key or key.startswith("eval_loss")}
        if reported:  # without --do_eval the metrics of an earlier start remain
            scored = {"metrics": reported, "precision": metrics["eval_precision"]}
            write_json(folder / RUN_METADATA, read_json(folder / RUN_METADATA) | scored)
        write_card(folder)


def four_decimals(figure: float) -> str:
    return f"{round(figure, 4) + 0.0:.4f}"  # never -0.0000


def closing_table(trainer: AdapterTrainer, metrics: dict, metric: str, tables: dict[str, Any]) -> str:
    """Scores, parameters, speed, memory and the folder, in two columns."""
    counts, args, history = count_parameters(trainer.model), trainer.args, trainer.state.log_history
    rows = [("task", trainer.metadata["task"])]
    rows += [(key.removeprefix("eval_"), four_decimals(metrics[key])) for key in metrics if metric in key]
    end = max((i for i, entry in enumerate(history) if "train_loss" in entry), default=0)  # final evaluations follow it
    if epochs := [entry for entry in history[:end] if f"eval_{metric}" in entry]:
        choose = max if greater_is_better(metric) else min
        best = choose(epochs, key=lambda entry: entry[f"eval_{metric}"])
        rows.append(("best while training", f"{four_decimals(best[f'eval_{metric}'])} at epoch {best['epoch']:.2f}"))
    if stopped := trainer.metadata.get(STOPPED_EARLY):
        rows.append(("stopped early", f"at step {stopped['step']} of {stopped['max_steps']}"))
    method = trainer.metadata["method"]
    part = METHODS[method["name"]].part + " and biases" * bool(method.get("biases"))
    part = f", {counts.encoder:,} of them {part}" if part else ""
    rows.append(("trainable parameters", f"{counts.trainable:,} of {counts.total:,}{part}"))
    if runtime := next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None):
        tokens = trainer.state.num_input_tokens_seen - getattr(trainer, "_initial_num_input_tokens_seen", 0)
        rows.append(("training", f"{runtime:.1f} s, {tokens / runtime:,.0f} real tokens/s"))
    if seconds := sum(value for key, value in metrics.items() if key.startswith("eval_runtime")):
        tokens = sum(token_count(table) for name, table in tables.items() if name.startswith("validation"))
        rows.append(("evaluation", f"{seconds:.1f} s, {tokens / seconds:,.0f} real tokens/s, {trainer.precision}"))
    for name, peak in reversed(peak_memory_gib().items()):
        rows.append((name.removesuffix("_gib").replace("_", " ").replace("gpu", "GPU"), f"{peak:.2f} GiB"))
    rows.append(("files", str(Path(args.output_dir).resolve())))
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in rows), ""])
