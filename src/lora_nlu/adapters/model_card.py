"""The README.md of an adapter folder, and the table that `inspect` prints."""

import hashlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

from lora_nlu.adapters.adapter import Adapter, encoder_prefix, foreign_layer, layer_count
from lora_nlu.adapters.reading import read_adapter, weights_in
from lora_nlu.errors import printable
from lora_nlu.escaping import markdown_text, yaml_scalar
from lora_nlu.files import ADAPTER_CONFIG, RUN_METADATA, write_text
from lora_nlu.hub import looks_like_hub_id
from lora_nlu.methods.targets import targets_and_layers
from lora_nlu.ops.tensors import not_finite

CARD = "README.md"
# In a card that may be written again, with a digest of its text as it was written
_MARK, _MARKED = "<!-- written by lora-nlu -->", re.compile("<!-- written by lora-nlu( [0-9a-f]{16})? -->")
_GLUE = "nyu-mll/glue"
# By model type, or without a recorded one by the first part of the names
_MODELS = {
    "roberta": "RoBERTa", "xlm-roberta": "XLM-RoBERTa", "camembert": "CamemBERT", "deberta-v2": "DeBERTa-V2",
    "deberta": "DeBERTa-V2",
}  # fmt: skip


def write_card(folder: Path) -> None:
    """Write the README.md of an adapter folder, unless there is one that somebody else wrote or changed."""
    path = folder / CARD
    if os.path.lexists(path):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if not _MARKED.search(text) or text != _signed(text):
            return
    write_text(path, _signed(card(read_adapter(str(folder)))))


def _signed(text: str) -> str:
    """A card with the digest of its text in its mark."""
    text = _MARKED.sub(_MARK, text)
    return text.replace(_MARK, f"{_MARK[:-4]} {hashlib.sha256(text.encode()).hexdigest()[:16]} -->")


def card(adapter: Adapter) -> str:
    """The adapter folder's README.md in the Hub's format: which library reads it, its training data and its metrics."""
    metadata = adapter.metadata
    task, base, metrics = metadata.get("task"), str(metadata.get("base_model") or ""), metadata.get("metrics")
    is_hub_id, is_glue = looks_like_hub_id(base), _is_glue(metadata)
    is_in_peft = adapter.row.in_peft and not adapter.frozen_relative_query
    header = ["---", f"library_name: {'peft' if is_in_peft else 'lora-nlu'}"]
    header += [f"base_model: {yaml_scalar(base)}"] if is_hub_id else []
    header += ["datasets:", f"- {_GLUE}"] if is_glue else []
    header += ["tags:", f"- {adapter.method}", "- text-classification", "pipeline_tag: text-classification", "---"]
    # Only the last part of a local path: the card may be published.
    local = f"{printable(Path(base).name)} (a local model)" if base else "an unnamed base model"
    name, method = base if is_hub_id else local, adapter.row.title or adapter.row.label
    lines = [f"# {method} for {markdown_text(name)} on {markdown_text(printable(task or 'an unnamed task'))}", ""]
    lines += ["|  |  |", "| --- | --- |"]
    lines += [
        f"| {fact} | {markdown_text(value)} |" for fact, value in (_facts(adapter) | {"base model": name}).items()
    ]
    places = ["this folder as adapter"] + ["the base model's as base"] * (not is_hub_id)
    places += ["labelled examples as examples.csv"] * (not is_glue)
    named = " and ".join(filter(None, [", ".join(places[:-1]), places[-1]]))
    lines += ["", f"Evaluate it in the folder of lora-nlu, with {named} there:", "", "```bash"]
    lines += ["python examples/text-classification/run_glue.py --do_eval \\"]
    lines += [f"  --model_name_or_path {base if is_hub_id else 'base'} --{adapter.row.path_flag} adapter \\"]
    examples = f"--task_name {task}" if is_glue else "--validation_file examples.csv"
    label_column = adapter.metadata.get("label_column")
    if not is_glue and isinstance(label_column, str):
        examples += f" --label_column {shlex.quote(printable(label_column, 200))}"
    lines += [f"  {examples} --output_dir adapter-evaluated", "```", ""]
    if adapter.frozen_relative_query and encoder_prefix(adapter) == "deberta":
        key = "AdaLoRA's DeBERTa does, and their key with the update"
        who = key if adapter.relative_query == "key" else "the reference implementation does"
        lines += [f"Trained with the relative positions' query frozen, as {who}. PEFT would",
                  "apply the update there and refuses to load this folder.", ""]  # fmt: skip
    elif not is_in_peft and not adapter.frozen_relative_query:
        lines += [f"PEFT has no {adapter.method} and refuses to load this folder.", ""]
    if metrics:
        settings = adapter.metadata.get("hyperparameters")
        kept_out = settings.get("validation_from_train") if isinstance(settings, dict) else None
        rows = (
            f"{kept_out} rows of the training set that were kept out of training" if kept_out else "the validation set"
        )
        lines += [f"Measured on {markdown_text(rows)} when it was trained:", ""]
        lines += [f"- {markdown_text(name)}: {value}" for name, value in _figures(metrics)]
    return "\n".join([*header, _MARK, "", *lines, ""])


def _is_glue(metadata: dict[str, Any]) -> bool:
    """Whether a run was on GLUE, by a task name that is safe in a command."""
    task = metadata.get("task", "custom")  # the task of a run on files of one's own; earlier versions had no dataset
    return metadata.get("dataset", _GLUE) == _GLUE and task != "custom" and bool(re.fullmatch("[a-z0-9]{1,9}", task))


def inspect(adapter: Adapter) -> str:
    """A table of what an adapter contains."""
    source = adapter.source
    files = [source] if source.is_file() else [weights_in(source), source / ADAPTER_CONFIG, source / RUN_METADATA]
    size = sum(path.stat().st_size for path in files if path.is_file())
    facts = [("source", printable(source, 2000)), ("bytes", f"{size:,}"), *_facts(adapter).items()]
    facts += _figures(adapter.metadata.get("metrics") or {})
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in facts)


def _figures(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Metrics as name and value."""
    values = {name: printable(value, 20) if abs(value) > 1e9 else f"{value:.4f}" for name, value in metrics.items()}
    return [(printable(name.removeprefix("eval_"), 40), value) for name, value in values.items()]


def _facts(adapter: Adapter) -> dict[str, str]:
    """What an adapter's files record and contain, by name."""
    metadata, ranks, prefix, unrecorded = adapter.metadata, adapter.ranks, encoder_prefix(adapter), "unknown"
    start = "" if adapter.is_bare else f"{prefix or '?'}."
    encoder = {name: t for name, t in adapter.state.items() if name.startswith(start)}
    broken, labels, missing_layer = not_finite(adapter.state), adapter.labels, foreign_layer(adapter)
    kinds = (metadata.get("model_type"), prefix)
    model = next((_MODELS[kind] for kind in kinds if kind in _MODELS), "unknown: a head alone")
    model = "an encoder alone" if adapter.is_bare else model
    facts: dict[str, Any] = {
        "model": f"none here: no RoBERTa or DeBERTa-V2 has the layer {missing_layer}" if missing_layer else model,
        "base model": metadata.get("base_model", unrecorded),
        "base fingerprint": metadata.get("base_fingerprint", unrecorded),
        "task": metadata.get("task", unrecorded),
        "labels": unrecorded if labels is None else ", ".join(labels) or "a number (regression)",
        "method": adapter.method,
    }
    unrecorded = "unknown: the file doesn't record it"
    if ranks:
        alphas = sorted({alpha for _, alpha in adapter.layers().values()}) if adapter.lora_alpha is not None else []
        facts["layers with LoRA"] = layer_count(ranks)
        facts["modules with LoRA"] = f"{len(ranks)}: {', '.join(targets_and_layers(ranks)[0])}"
        facts["rank"] = ", ".join(map(str, sorted({*ranks.values()})))
        if adapter.row.has_alpha:
            facts["alpha"] = ", ".join(f"{alpha:g}" for alpha in alphas) or unrecorded
        if alphas and (adapter.use_rslora or adapter.alpha_pattern):
            formula = "alpha / sqrt(rank), rslora" if adapter.use_rslora else "alpha / rank"
            facts["scaling"] = f"{', '.join(f'{x:g}' for x in adapter.scalings())} ({formula})"
    facts |= adapter.row.facts(adapter) if adapter.row.facts else {}
    if ranks and prefix == "deberta":
        ways = {"none": "frozen", "key": "frozen; the relative key with LoRA", "both": "with LoRA, as in PEFT"}
        facts["relative query"] = ways[adapter.relative_query] if adapter.records_relative_query else unrecorded
    if adapter.adapter_size is not None:
        bottlenecks = [name for name in encoder if name.endswith(".adapter_A.weight")]
        facts["adapter size"], facts["layers with adapters"] = adapter.adapter_size, layer_count(bottlenecks)
        facts["adapters"] = len(bottlenecks)
    if biases := [name for name in encoder if name.endswith("bias") and ".adapter_" not in name]:
        facts["biases"] = f"{sum(encoder[name].numel() for name in biases):,} in {len(biases)} tensors"
    total, in_encoder = (
        sum(tensor.numel() for name, tensor in tensors.items() if adapter.trains(name))
        for tensors in (adapter.state, encoder)
    )
    facts["parameters"] = f"{total:,}, {in_encoder:,} of them in the encoder"
    facts["not finite"] = f"{len(broken)} tensors, {broken[0]} first" if broken else "none"
    return {name: printable(value, 2000) for name, value in facts.items()}
