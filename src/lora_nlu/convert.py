"""One door out: an adapter in PEFT's, the published or a merged form, and a table of what is in one.

python -m lora_nlu.adapters inspect SOURCE
python -m lora_nlu.adapters convert SOURCE DESTINATION --to {peft,bin,merged} [--lora_alpha A] [--base MODEL]
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_nlu import loading
from lora_nlu.adapters import (
    CONFIG,
    METADATA,
    WEIGHTS,
    Adapter,
    attach_adapter,
    check_values,
    encoder_prefix,
    not_finite,
    read_adapter,
    write_adapter,
)
from lora_nlu.errors import UserError
from lora_nlu.files import appearing, publish, write_text
from lora_nlu.labels import placeholders, set_labels
from lora_nlu.lora import LoRALinear
from lora_nlu.tasks import TASKS

CARD = "README.md"
_MARK = "<!-- written by lora-nlu -->"
_TITLES = {
    "lora": "LoRA",
    "bitfit": "BitFit",
    "houlsby": "Houlsby adapters",
    "pfeiffer": "Pfeiffer adapters",
    "head": "A classification head",
}


def published_order(adapter: Adapter) -> list[str]:
    """Names as the published files have them: layers by number, query before value, A before B, then the head."""

    def place(name: str) -> tuple:
        parts = [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]
        in_encoder = name.startswith(f"{encoder_prefix(adapter)}.")
        return (not in_encoder, name.startswith("classifier."), parts[:-1], parts[-1] == (0, "bias"), parts[-1])

    return sorted(adapter.state, key=place)


def write_published(adapter: Adapter, path: Path) -> None:
    """Write one flat fp32 state dict in the published layout. Raises UserError for what that layout can't say."""
    if adapter.method != "lora":
        raise UserError(f"{adapter.source}: holds {adapter.method}; the published layout is LoRA's: use peft.")
    if len({scaling * rank for rank, scaling in adapter.layers().values()}) > 1 or adapter.use_rslora:
        raise UserError(f"{adapter.source}: a .bin knows no alpha, and this adapter has several (or rslora): use peft.")
    shared = encoder_prefix(adapter) == "deberta"
    if shared and not adapter.frozen_relative_query:
        raise UserError(
            f"{adapter.source}: a DeBERTa .bin is read with the relative positions' query frozen, and this adapter has "
            "LoRA there: use peft."
        )
    names = {name.rpartition(".")[2] for name in adapter.ranks}
    if names != ({"query_proj", "value_proj"} if shared else {"query", "value"}):
        raise UserError(f"{adapter.source}: a .bin has LoRA on query and value, this adapter on {', '.join(names)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as partial:
        torch.save({name: adapter.state[name].float() for name in published_order(adapter)}, partial)


def merged_state(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict without LoRA that gives the same logits in transformers' own class, and what its config must say.

    A DeBERTa whose relative query is frozen gets projections of its own for the relative embeddings, copied from the
    base: with `share_att_key` false, `pos_query_proj` and `pos_key_proj` are what `query_proj` and `key_proj` were.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    settings: dict[str, Any] = {}
    if getattr(model, "frozen_relative_query", False):
        settings["share_att_key"] = False
        pairs = [("p2c", "query_proj", "pos_query_proj"), ("c2p", "key_proj", "pos_key_proj")]
        for name, module in model.named_modules():
            if name.endswith(".attention.self"):
                for kind, source, target in pairs:
                    if kind in model.config.pos_att_type:
                        layer = getattr(module, source)
                        state[f"{name}.{target}.weight"] = layer.weight.detach().clone()
                        state[f"{name}.{target}.bias"] = layer.bias.detach().clone()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            update = module.scaling * (module.lora_B.detach().float() @ module.lora_A.detach().float())
            state[f"{name}.weight"] = (module.weight.detach().float() + update).to(module.weight.dtype)
    return state, settings


def write_merged(adapter: Adapter, base: str, folder: Path) -> None:
    """Write a plain Hub model: config, weights with the update in them, tokenizer. transformers loads it without us."""
    if adapter.adapter_size is not None:
        raise UserError(f"{adapter.source}: bottleneck adapters are layers of their own; no plain model has them.")
    config = loading.load_config(base)
    count = adapter.label_count
    if count is None:
        raise UserError(f"{adapter.source}: has no classification head to put into a merged model.")
    unnamed = () if count == 1 else placeholders(count)
    set_labels(config, unnamed if adapter.labels is None else adapter.labels)
    model, _ = loading.load_model(base, config, needs_head=False, keeps_head=False)
    attach_adapter(model, adapter, None, allow_new_head=False)
    state, settings = merged_state(model)
    config = model.config
    for name in ("lora_relative_query", "apply_bitfit", "head_only"):
        config.__dict__.pop(name, None)
    for name, value in settings.items():
        setattr(config, name, value)
    config.architectures = [type(model).__name__]
    tokenizer, _ = loading.load_tokenizer(base, config)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        weights = partial / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights, {"format": "pt"})
        weights.chmod(0o644)  # save_file hides it from other users
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def card(adapter: Adapter) -> str:
    """The adapter folder's README.md in the Hub's format: who reads it, what it was trained on, its figure."""
    known = adapter.metadata
    task, base, metrics = known.get("task"), known.get("base_model"), known.get("metrics") or {}
    is_hub_id = bool(base) and not Path(str(base)).exists() and not str(base).startswith(("/", "."))
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
    name = base if is_hub_id else Path(str(base)).name if base else "an unnamed base model"
    lines = [f"# {_TITLES[adapter.method]} for {name} on {task or 'an unnamed task'}", ""]
    facts = dict(_facts(adapter)) | {"base model": name}  # not a path of this machine
    lines += [f"| {key} | {value} |" for key, value in [("", ""), ("---", "---"), *facts.items()]]
    door = "lora_path" if adapter.method == "lora" else "adapter_path"
    flags = f"--model_name_or_path {name} --{door} THIS_FOLDER --do_eval --output_dir OUT"
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
        lines += [f"- {name.removeprefix('eval_')}: {value:.4f}" for name, value in metrics.items()]
    return "\n".join([*head, *lines, ""])


def write_card(folder: Path) -> None:
    """Write the README.md of an adapter folder, unless there is one that somebody else wrote."""
    path = folder / CARD
    if not path.is_file() or _MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, card(read_adapter(str(folder))))


def _facts(adapter: Adapter) -> list[tuple[str, str]]:
    """What is known of an adapter, as name and value."""
    known, ranks, prefix = adapter.metadata, adapter.ranks, encoder_prefix(adapter)
    within = sum(t.numel() for name, t in adapter.state.items() if prefix and name.startswith(f"{prefix}."))
    total = sum(tensor.numel() for tensor in adapter.state.values())
    broken = not_finite(adapter.state)
    labels = adapter.labels
    alpha = "unknown: the file doesn't say" if adapter.lora_alpha is None else f"{adapter.lora_alpha:g}"
    rows = [
        ("base model", str(known.get("base_model", "unknown"))),
        ("base fingerprint", str(known.get("base_fingerprint", "unknown"))),
        ("task", str(known.get("task", "unknown"))),
        ("labels", "unknown" if labels is None else ", ".join(labels) or "a number (regression)"),
        ("method", adapter.method),
    ]
    if adapter.adapter_size is not None:
        rows.append(("adapter size", str(adapter.adapter_size)))
    if ranks:
        alpha += (" (rslora)" if adapter.use_rslora else "") + (", others by pattern" * bool(adapter.alpha_pattern))
        rows += [
            ("layers with LoRA", str(len(ranks))),
            ("modules", ", ".join(sorted({name.rpartition(".")[2] for name in ranks}))),
            ("rank", ", ".join(map(str, sorted(set(ranks.values()))))),
            ("alpha", alpha),
        ]
    if ranks and prefix == "deberta":
        rows.append(("relative query", "frozen" if adapter.frozen_relative_query else "with LoRA, as in PEFT"))
    rows += [
        ("parameters", f"{total:,}, {within:,} of them in the encoder"),
        ("not finite", f"{len(broken)} tensors, {broken[0]} first" if broken else "none"),
    ]
    return rows


def inspect(adapter: Adapter) -> str:
    """A table of what is in an adapter."""
    files = (
        [adapter.source]
        if adapter.source.is_file()
        else [adapter.source / name for name in (WEIGHTS, CONFIG, METADATA)]
    )
    size = sum(path.stat().st_size for path in files if path.is_file())
    metrics = adapter.metadata.get("metrics") or {}
    rows = [("source", str(adapter.source)), ("bytes", f"{size:,}"), *_facts(adapter)]
    rows += [(name.removeprefix("eval_"), f"{value:.4f}") for name, value in metrics.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def convert(adapter: Adapter, destination: Path, to: str, lora_alpha: float | None, base: str | None) -> str:
    """Write `adapter` in another form; returns a line on what was written. Raises UserError."""
    if destination.exists() and (destination.is_file() or any(destination.iterdir())):
        raise UserError(f"{destination}: is there already. Give another destination; nothing is written over.")
    check_values(adapter)
    if None not in (adapter.lora_alpha, lora_alpha) and adapter.lora_alpha != lora_alpha:
        raise UserError(f"{adapter.source}: was trained with lora_alpha {adapter.lora_alpha:g}, not {lora_alpha:g}.")
    if adapter.method == "lora":
        adapter.layers(lora_alpha)  # says so where neither knows the alpha
    if adapter.lora_alpha is None:
        adapter = replace(adapter, lora_alpha=lora_alpha)
    if to == "bin":
        write_published(adapter, destination)
        return f"{destination}: published layout. It doesn't know its alpha: say --lora_alpha {adapter.lora_alpha:g}."
    if to == "peft":
        write_adapter(adapter, destination)
        write_card(destination)
        return f"{destination}: {'PEFT' if adapter.method == 'lora' else adapter.method} folder with a model card."
    base = base or adapter.metadata.get("base_model")
    if not base:
        raise UserError(f"{adapter.source} doesn't say its base model: give --base MODEL.")
    write_merged(adapter, base, destination)
    return f"{destination}: a plain model; load it with transformers' from_pretrained."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_nlu.adapters", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    looked_at = commands.add_parser("inspect", help="print what is in an adapter")
    converted = commands.add_parser("convert", help="write an adapter in another form")
    for command in (looked_at, converted):
        command.add_argument("source", help="a published .bin, an adapter or output folder, or a Hub id")
    converted.add_argument("destination", type=Path)
    converted.add_argument("--to", required=True, choices=["peft", "bin", "merged"])
    converted.add_argument("--lora_alpha", type=float, help="for a file that doesn't know its own")
    converted.add_argument("--base", help="the base model to merge into, if not the one recorded")
    args = parser.parse_args(argv)
    try:
        adapter = read_adapter(args.source)
        if args.command == "inspect":
            print(inspect(adapter))
        else:
            print(convert(adapter, args.destination.absolute(), args.to, args.lora_alpha, args.base))
    except (UserError, OSError) as e:
        print(f"lora_nlu.adapters: error: {e}", file=sys.stderr)
        return 1
    return 0
