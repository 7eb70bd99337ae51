"""The README.md of an adapter folder, and the table that `inspect` prints."""

import re
from collections.abc import Iterable
from pathlib import Path

from lora_nlu.adapters.adapter import Adapter, encoder_prefix, foreign_layer, looks_like_hub_id
from lora_nlu.adapters.reading import read_adapter, weights_in
from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import printable
from lora_nlu.files import ADAPTER_CONFIG, RUN_METADATA, write_text
from lora_nlu.methods.targets import targets_and_layers
from lora_nlu.ops.tensors import not_finite

CARD = "README.md"
_MARK = "<!-- written by lora-nlu -->"
_TITLES = {
    "lora": "LoRA",
    "bitfit": "BitFit",
    "houlsby": "Houlsby adapters",
    "pfeiffer": "Pfeiffer adapters",
    "head": "A classification head",
}
_MODELS = {"roberta": "RoBERTa", "deberta": "DeBERTa-V2"}


def card(adapter: Adapter) -> str:
    """The adapter folder's README.md in the Hub's format: who reads it, what it was trained on, its figure."""
    known = adapter.metadata
    task, base, metrics = known.get("task"), str(known.get("base_model") or ""), known.get("metrics") or {}
    is_hub_id = looks_like_hub_id(base)
    in_peft = adapter.method == "lora" and not adapter.frozen_relative_query
    head = ["---", f"library_name: {'peft' if in_peft else 'lora-nlu'}"]
    head += [f"base_model: {base}"] if is_hub_id else []
    head += ["datasets:", "- nyu-mll/glue"] if task in TASKS else []
    head += [
        "tags:",
        f"- {adapter.method}",
        "- text-classification",
        "pipeline_tag: text-classification",
        "---",
        _MARK,
        "",
    ]
    # no path of this machine
    local = f"{printable(Path(base).name)} (a local model)" if base else "an unnamed base model"
    name = base if is_hub_id else local
    lines = [f"# {_TITLES[adapter.method]} for {name} on {printable(task or 'an unnamed task')}", ""]
    facts = dict(_facts(adapter)) | {"base model": name}
    cells = {key: value.replace("|", "\\|") for key, value in facts.items()}
    lines += [f"| {key} | {value} |" for key, value in [("", ""), ("---", "---"), *cells.items()]]
    door = "lora_path" if adapter.method == "lora" else "adapter_path"
    flags = (
        f"--model_name_or_path {base if is_hub_id else 'BASE_MODEL'} --{door} THIS_FOLDER --do_eval --output_dir OUT"
    )
    lines += ["", "Evaluate it with lora-nlu:", "", "```bash", "python examples/text-classification/run_glue.py \\"]
    lines += [
        f"  --task_name {task} {flags}" if task in TASKS else f"  --validation_file FILE {flags}",
        "```",
        "",
    ]
    if adapter.frozen_relative_query and encoder_prefix(adapter) == "deberta":
        lines += ["Trained with the relative positions' query frozen, as the reference implementation does. PEFT would",
                  "apply the update there and refuses to load this folder.", ""]  # fmt: skip
    if adapter.method != "lora":
        lines += [f"PEFT has no {adapter.method} and refuses to load this folder.", ""]
    if metrics:
        lines += ["Measured on the validation set when it was trained:", ""]
        lines += [f"- {name}: {value}" for name, value in _figures(metrics)]
    return "\n".join([*head, *lines, ""])


def write_card(folder: Path) -> None:
    """Write the README.md of an adapter folder, unless there is one that somebody else wrote."""
    path = folder / CARD
    if not path.is_file() or _MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, card(read_adapter(str(folder))))


def _figures(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Metrics as name and value."""
    values = {name: printable(value, 20) if abs(value) > 1e9 else f"{value:.4f}" for name, value in metrics.items()}
    return [(printable(name.removeprefix("eval_"), 40), value) for name, value in values.items()]


def _facts(adapter: Adapter) -> list[tuple[str, str]]:
    """What is known of an adapter, as name and value."""
    known, ranks, prefix = adapter.metadata, adapter.ranks, encoder_prefix(adapter)
    start = "" if adapter.is_bare else f"{prefix or '?'}."
    encoder = {name: t for name, t in adapter.state.items() if name.startswith(start)}
    total = sum(tensor.numel() for tensor in adapter.state.values())
    broken = not_finite(adapter.state)
    labels, foreign = adapter.labels, foreign_layer(adapter)
    model = "an encoder alone" if adapter.is_bare else _MODELS.get(prefix, "unknown: a head alone")
    rows = [
        ("model", f"none here: no RoBERTa or DeBERTa-V2 has the layer {foreign}" if foreign else model),
        ("base model", known.get("base_model", "unknown")),
        ("base fingerprint", known.get("base_fingerprint", "unknown")),
        ("task", known.get("task", "unknown")),
        ("labels", "unknown" if labels is None else ", ".join(labels) or "a number (regression)"),
        ("method", adapter.method),
    ]
    if ranks:
        alphas = sorted({*adapter.alphas().values()}) if adapter.lora_alpha is not None else []
        rows += [
            ("layers with LoRA", layer_count_text(ranks)),
            ("modules with LoRA", f"{len(ranks)}: {', '.join(targets_and_layers(ranks)[0])}"),
            ("rank", ", ".join(map(str, sorted({*ranks.values()})))),
            ("alpha", ", ".join(f"{alpha:g}" for alpha in alphas) or "unknown: the file doesn't say"),
        ]
        if alphas and (adapter.use_rslora or adapter.alpha_pattern):
            how = "alpha / sqrt(rank), rslora" if adapter.use_rslora else "alpha / rank"
            rows.append(("scaling", f"{', '.join(f'{x:g}' for x in adapter.scalings())} ({how})"))
    if ranks and prefix == "deberta":
        said = "frozen" if adapter.frozen_relative_query else "with LoRA, as in PEFT"
        rows.append(("relative query", said if adapter.records_relative_query else "unknown: the file doesn't say"))
    if adapter.adapter_size is not None:
        places = [name for name in encoder if name.endswith(".adapter_A.weight")]
        rows += [
            ("adapter size", str(adapter.adapter_size)),
            ("layers with adapters", layer_count_text(places)),
            ("adapters", str(len(places))),
        ]
    biases = [n for n in encoder if n.endswith("bias") and ".adapter_" not in n]
    rows += [("biases", f"{sum(encoder[n].numel() for n in biases):,} in {len(biases)} tensors")] if biases else []
    within = sum(tensor.numel() for tensor in encoder.values())
    rows += [
        ("parameters", f"{total:,}, {within:,} of them in the encoder"),
        ("not finite", f"{len(broken)} tensors, {broken[0]} first" if broken else "none"),
    ]
    return [(name, printable(value, 2000)) for name, value in rows]


def layer_count_text(names: Iterable[str]) -> str:
    return str(len({match.group(1) for name in names if (match := re.search(r"\.(\d+)\.", name))}))


def inspect(adapter: Adapter) -> str:
    """A table of what is in an adapter."""
    source = adapter.source
    files = [source] if source.is_file() else [weights_in(source), source / ADAPTER_CONFIG, source / RUN_METADATA]
    size = sum(path.stat().st_size for path in files if path.is_file())
    rows = [("source", printable(source, 2000)), ("bytes", f"{size:,}"), *_facts(adapter)]
    rows += _figures(adapter.metadata.get("metrics") or {})
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
