"""What run_glue.py --help prints: our flags and the most used of transformers', before torch is imported."""

import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from lora_nlu.methods.description import method_flags
from lora_nlu.training.arguments import DataArguments, OurRunArguments, model_arguments

_WIDTH, _COLUMN = 100, 34  # of the text, and where a flag's meaning begins
_USAGE = """\
usage: python run_glue.py FLAGS, or one JSON file of them. The last value of a flag wins.

examples: train LoRA on a GLUE task, evaluate what was trained, train on your own files
  run_glue.py --model_name_or_path roberta-base --task_name cola --do_train --do_eval \\
    --apply_lora --lora_r 8 --lora_alpha 16 --learning_rate 4e-4 --output_dir output/cola
  run_glue.py --model_name_or_path roberta-base --task_name cola --do_eval \\
    --lora_path output/cola --output_dir output/cola_again
  run_glue.py --model_name_or_path roberta-base --train_file train.csv --validation_file dev.csv \\
    --do_train --do_eval --apply_lora --lora_r 8 --lora_alpha 16 --output_dir output/mine"""
_END = "\n--help_all prints transformers' other flags too; docs/flags.md explains them."
# The most used of transformers' flags, with their value
TRANSFORMERS_FLAGS = {
    "--output_dir FOLDER": "Results and adapter; the same command again resumes there",
    "--do_train": "Train",
    "--do_eval": "Evaluate on the validation set",
    "--do_predict": "Predict the test set",
    "--learning_rate X": "Highest learning rate (default: 5e-5; LoRA: 2e-4 to 5e-4)",
    "--num_train_epochs X": "Epochs (default: 3)",
    "--max_steps N": "Train so many steps, whatever the epochs",
    "--per_device_train_batch_size N": "Examples per device and forward pass (default: 8)",
    "--gradient_accumulation_steps N": "Forward passes per step (default: 1)",
    "--warmup_steps X": "Steps of warm-up; below 1, their share of all (default: 0)",
    "--weight_decay X": "Weight decay, not of biases (default: 0)",
    "--eval_strategy WHEN": "Evaluate while training: no, steps or epoch (default: no)",
    "--save_strategy WHEN": "Save a checkpoint: no, steps or epoch (default: steps)",
    "--load_best_model_at_end": "End with the best checkpoint by --metric_for_best_model",
    "--seed N": "Seed (default: 42)",
    "--bf16": "Compute in bf16",
    "--report_to NAME": "Also log to tensorboard, wandb, mlflow, ... (default: none)",
}


def help_text(every_run_flag: Iterable[Field] = ()) -> str:
    """Our flags and `TRANSFORMERS_FLAGS`, each once; with the fields of `RunArguments`, transformers' others too."""
    of_methods = {flag.name for flag in method_flags()}
    of_model = fields(model_arguments())
    of_run = fields(OurRunArguments)
    groups = {
        "model": _explain(item for item in of_model if item.name not in of_methods),
        "what trains in it": _explain(item for item in of_model if item.name in of_methods),
        "data": _explain(fields(DataArguments)),
        "training, the most used of transformers' flags": TRANSFORMERS_FLAGS,
        "training, flags that transformers lacks": _explain(of_run),
    }
    shown = {flag.split()[0][2:] for flag in TRANSFORMERS_FLAGS} | {item.name for item in of_run}
    if others := _explain(item for item in every_run_flag if item.name not in shown):
        groups["training, transformers' other flags"] = others
    lines = [_USAGE]
    for title, flags in groups.items():
        lines += ["", f"{title}:", *(_columns(flag, meaning) for flag, meaning in flags.items())]
    return "\n".join(lines if others else [*lines, _END])


def _explain(items: Iterable[Field]) -> dict[str, str]:
    """The meaning of each flag, by the flag with a placeholder for its value; without those that are ignored."""
    flags = {}
    for item in items:
        meaning, default = " ".join(str(item.metadata.get("help", "")).split()), item.default
        choices = [str(choice) for choice in item.metadata.get("choices") or ()]
        if not all(choice in meaning for choice in choices):
            meaning += f": {', '.join(choices)}"
        elif not choices and default is not MISSING and default not in (None, False, 0, ""):
            meaning += f" (default: {str(default).lower()})"
        if not meaning.startswith("Ignored"):
            flags[f"--{item.name}{_value(item)}"] = meaning
    return flags


def _value(item: Field) -> str:
    """The placeholder for the value of a flag, after a blank; nothing for a flag without value."""
    kind: Any = str(getattr(item.type, "__name__", item.type))
    if kind.startswith("bool"):
        return " false" if item.default is True else ""
    names = {"_file": "FILE", "_dir": "FOLDER", "_path": "PATH", "_columns": "NAMES", "_layers": "NUMBERS"}
    names |= {"_modules": "NAMES", "labels": "NAMES"}
    number = "N" if "int" in kind else "X" if "float" in kind else "NAME"
    return " " + next((name for end, name in names.items() if item.name.endswith(end)), number)


def _columns(flag: str, meaning: str) -> str:
    """The lines of a flag: itself on the left, its meaning on the right."""
    start, indent = f"  {flag} ".ljust(_COLUMN), " " * _COLUMN
    text = textwrap.fill(meaning, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return f"{start.rstrip()}\n{text}" if len(start) > _COLUMN else start + text[_COLUMN:]
