"""What a run prints and records when it ends."""

from pathlib import Path
from typing import Any

from lora_nlu.adapters.model_card import write_card
from lora_nlu.data.metrics import greater_is_better
from lora_nlu.data.tokenization import token_count
from lora_nlu.files import RUN_METADATA, read_json, write_json
from lora_nlu.methods.marking import count_parameters
from lora_nlu.methods.table import METHODS
from lora_nlu.training.runs import peak_memory_gib
from lora_nlu.training.trainer import AdapterTrainer


def describe_run(trainer: AdapterTrainer, metrics: dict[str, float], metric: str) -> None:
    """Write a trained adapter's figure into its metadata, and its model card, so that the folder can be uploaded."""
    folder = Path(trainer.args.output_dir)
    if trainer.saves_part and trainer.args.process_index == 0:
        reported = {key: value for key, value in metrics.items() if metric in key or key.startswith("eval_loss")}
        if reported:  # a start that only finds training done has none, and the earlier ones stay
            known = read_json(folder / RUN_METADATA)
            write_json(folder / RUN_METADATA, known | {"metrics": reported})
        write_card(folder)


def closing_table(trainer: AdapterTrainer, metrics: dict, metric: str, tables: dict[str, Any]) -> str:
    """What a person wants to know at the end, two columns."""
    counts, args, history = count_parameters(trainer.model), trainer.args, trainer.state.log_history
    rows = [("task", trainer.metadata["task"])]
    rows += [(key.removeprefix("eval_"), f"{metrics[key]:.4f}") for key in metrics if metric in key]
    epochs = [entry for entry in history if f"eval_{metric}" in entry]
    if args.do_train and len(epochs) > 1:
        choose = max if greater_is_better(metric) else min
        best = choose(epochs, key=lambda entry: entry[f"eval_{metric}"])
        rows.append(("best while training", f"{best[f'eval_{metric}']:.4f} at epoch {best['epoch']:.2f}"))
    method = trainer.metadata["method"]
    part = METHODS[method["name"]].part + " and biases" * bool(method.get("biases"))
    part = f", {counts.encoder:,} of them {part}" if part else ""
    rows.append(("trainable parameters", f"{counts.trainable:,} of {counts.total:,}{part}"))
    runtime = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)
    if runtime:
        tokens = trainer.state.num_input_tokens_seen - getattr(trainer, "_initial_num_input_tokens_seen", 0)
        rows.append(("training", f"{runtime:.1f} s, {tokens / runtime:,.0f} real tokens/s"))
    seconds = sum(value for key, value in metrics.items() if key.startswith("eval_runtime"))
    if seconds:
        tokens = sum(token_count(table) for name, table in tables.items() if name.startswith("validation"))
        rows.append(("evaluation", f"{seconds:.1f} s, {tokens / seconds:,.0f} real tokens/s"))
    for name, peak in reversed(peak_memory_gib().items()):
        rows.append((name.removesuffix("_gib").replace("_", " ").replace("gpu", "GPU"), f"{peak:.2f} GiB"))
    rows.append(("files", str(Path(args.output_dir).resolve())))
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in rows), ""])
