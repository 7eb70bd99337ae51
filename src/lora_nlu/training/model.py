"""The model that the flags name: its adapter's file, its weights, its tokenizer, all compared with the flags."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from lora_nlu.adapters.adapter import Adapter, check_settings, with_relative_query
from lora_nlu.adapters.attaching import attach_adapter, head_rows
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.errors import UsageError, UserError, printable
from lora_nlu.files import ADAPTER_CONFIG
from lora_nlu.labels import config_labels, recorded_labels
from lora_nlu.methods.description import (
    contradicting_flags,
    description_of,
    methods_of_flags,
    set_method,
    settings_of_flags,
)
from lora_nlu.methods.lora import lora_layers
from lora_nlu.methods.method import Method
from lora_nlu.methods.table import METHODS
from lora_nlu.models.loading import base_fingerprint, check_method, load_model, own_adapter, set_task, set_two_views
from lora_nlu.models.tokenizer import check_tokenizer, load_tokenizer, tokenizer_fingerprint
from lora_nlu.ops.tensors import fingerprint
from lora_nlu.training.arguments import ModelArguments
from lora_nlu.training.inputs import Head
from lora_nlu.training.learning_rates import check_rates
from lora_nlu.training.output_folder import recorded
from lora_nlu.training.parsing import Flags, RunArguments
from lora_nlu.training.processes import say


def load_adapter(flags: Flags, config: Any) -> Adapter | None:
    """The adapter of --lora_path or --adapter_path, compared with the other flags. Raises UserError."""
    m = flags.model
    if not m.adapter_source:
        return None
    adapter = read_adapter(m.adapter_source, f"--{m.path_flag}", cache_dir=m.cache_dir, token=m.token)
    settings = settings_of_flags(m, config)
    adapter = with_relative_query(adapter, settings["lora_relative_query"])
    if (path_flag := METHODS[adapter.method].path_flag) != m.path_flag:
        raise UserError(f"{adapter.source}: contains {adapter.method}. Give it as --{path_flag}.")
    contradicting = contradicting_flags(m, adapter.method)
    if not contradicting and m.adapter_size not in (None, adapter.adapter_size):
        contradicting = [f"--adapter_size {m.adapter_size}"]
    if contradicting:
        contents, out = _contents(adapter, m), "it out" if len(contradicting) == 1 else "them out"
        raise UserError(
            f"{adapter.source}: contains {contents}; the flags differ: {', '.join(contradicting)}.\n"
            f"Leave {out}: the file's own method and sizes are used."
        )
    ignored = set() if _shares_projections(config) else {"lora_relative_query"}
    check_settings(adapter, {name: value for name, value in settings.items() if name not in ignored})
    own = {flag.name for flag in adapter.row.flags if not flag.decides} & {*adapter.settings}
    of_run = {name: settings[name] for name in own if settings.get(name) is not None}
    adapter = replace(adapter, settings=adapter.settings | of_run)  # of training, which may be another now
    if (task := adapter.metadata.get("task", flags.data.task)) != flags.data.task:
        say(flags.run, f"{adapter.source}: was trained on {printable(task)}; this is {flags.data.task}.")
    return adapter


def _contents(adapter: Adapter, model_args: ModelArguments) -> str:
    """What an adapter's file contains, in a few words."""
    if not adapter.ranks:
        return adapter.method + (f", size {adapter.adapter_size}" if adapter.adapter_size else "")
    ranks, alpha = sorted(set(adapter.ranks.values())), adapter.lora_alpha
    contents = f"{adapter.row.label}, rank {', '.join(map(str, ranks))}"
    if not adapter.row.has_alpha:
        return contents
    scaling = f"{alpha:g}" if alpha is not None else f"{model_args.lora_alpha:g}, which the file can't confirm"
    if adapter.use_rslora or adapter.alpha_pattern:
        scalings = ", ".join(f"{x:g}" for x in adapter.scalings())
        scaling += f", scaled by {scalings}" + " (rslora)" * adapter.use_rslora
    return f"{contents}, alpha {scaling}"


def prepare_model(
    flags: Flags, config: Any, adapter: Adapter | None, head: Head, labels: tuple[str, ...]
) -> tuple[Any, Any, dict[str, str | None]]:
    """The model, with the adapter, that predicts the examples' labels; its tokenizer; the fingerprints of all three."""
    model_args, data_args, args = flags
    _check_backend(adapter.row if adapter else None, flags)
    name, base_labels = model_args.model_name_or_path, recorded_labels(config)
    if not adapter or not adapter.label_count:
        base_labels = head.labels
    elif head.labels is not None:
        adapter = replace(adapter, metadata=adapter.metadata | {"labels": [*head.labels]})
    set_task(config, data_args.task, labels, model_args.cls_dropout)
    model = _load_model(flags, config, adapter, base_labels)
    fingerprints: dict[str, str | None] = {"base_fingerprint": base_fingerprint(model)}
    fingerprints["started_from_fingerprint"] = fingerprint(adapter.state | adapter.frozen)[:16] if adapter else None
    tokenizer, notes = load_tokenizer(model_args.tokenizer_name or name, config, **model_args.hub)
    say(args, *notes)
    set_two_views(model, tokenizer, model_args.reg_loss_wgt, model_args.masking_prob)
    if adapter:
        say(args, *attach_adapter(model, adapter, model_args.lora_alpha, args.do_train, config_labels(model.config)))
        guess = ""
        if not adapter.records_relative_query and model.frozen_relative_query is not None:
            ways = {"none": "without LoRA, the reference's way", "key": "without LoRA, the relative key with it"}
            way = ways.get(adapter.relative_query, "with LoRA, PEFT's way")
            guess = f"; the relative query {way}, which the file can't confirm"
        say(args, f"Loaded {adapter.source}: {_contents(adapter, model_args)}{guess}.")
        for layer in lora_layers(model).values():
            layer.lora_dropout = model_args.lora_dropout or 0.0
    check_rates(model, args)
    fingerprints["tokenizer_fingerprint"] = of_tokenizer = tokenizer_fingerprint(tokenizer)
    source, metadata = model_args.adapter_source or name, adapter.metadata if adapter else recorded(Path(name))
    check_tokenizer(source, metadata, of_tokenizer, "Give the one it was trained with as --tokenizer_name.")
    return model, tokenizer, fingerprints


def _check_backend(of_adapter: Method | None, flags: Flags) -> None:
    """Raise UsageError for a method that the backend can't shard; of_adapter: that of the file the run starts from."""
    for row in [of_adapter] if of_adapter else methods_of_flags(flags.model):
        if flags.run.is_sharded and not row.shards:
            backend = "--deepspeed" if flags.run.deepspeed else "--fsdp"
            raise UsageError(f"{backend}: {row.label} can't be sharded. Leave the flag out: DDP trains it.")


def _load_model(flags: Flags, config: Any, adapter: Adapter | None, base_labels: tuple[str, ...] | None) -> Any:
    """The base model with the method of the flags; base_labels: those of its own head, where they are recorded."""
    model_args, _, args = flags
    name = model_args.model_name_or_path
    settings = settings_of_flags(model_args, config)
    if adapter:  # it brings its own layers
        settings |= {row.switch: False for row in METHODS.values() if row.added}
    saved = set_method(config, settings)
    if settings["lora_relative_query"] not in (None, "none") and not _shares_projections(config):
        has_own = config.model_type == "deberta-v2" and config.relative_attention
        positions = "relative positions with projections of their own" if has_own else "no relative positions"
        raise UsageError(f"--lora_relative_query: this {config.model_type} model has {positions}. Leave the flag out.")
    replaces_head = adapter and (not args.do_train or head_rows(adapter, config_labels(config)) is not None)
    needs_head = not args.do_train and adapter is None
    set_seed(args.seed)  # A and the head are drawn while loading
    loading: AbstractContextManager[None] = nullcontext()
    if args.is_sharded:
        from lora_nlu.training.sharded import complete_loading

        loading = complete_loading(args)
    with loading:
        # a method that starts from the weights needs them exactly
        for_bf16 = args.bf16 and args.bf16_in_model and not (adapter and adapter.row.start)
        model, notes = load_model(name, config, needs_head, base_labels, not replaces_head, for_bf16, **model_args.hub)
    check_method(model, name, saved)
    if needs_head:
        _check_is_trained(model, model_args, args, saved)
    say(args, *notes)
    return model


def _shares_projections(config: Any) -> bool:
    """Whether a model's relative positions use `query_proj` and `key_proj`, as tokens do."""
    is_relative = config.model_type == "deberta-v2" and config.relative_attention
    return bool(is_relative and getattr(config, "share_att_key", False))


def _check_is_trained(model: Any, model_args: ModelArguments, args: RunArguments, saved: dict[str, Any]) -> None:
    """Raise UsageError for a method's flag in a run that neither trains nor loads anything that the method trained."""
    rows = [row for row in description_of(model.config).rows if row.switch and (row.added or not saved.get(row.switch))]
    if not rows or (rows[0].added and own_adapter(model)):
        return
    flag, name = rows[0].switch, model_args.model_name_or_path
    folder = args.output_dir if Path(str(args.output_dir), ADAPTER_CONFIG).is_file() else "FOLDER"
    raise UsageError(
        f"--{flag} says what trains, and nothing trains here (--do_train) or is given that was trained.\n"
        f"Give it: --{rows[0].path_flag} {folder}. Or leave --{flag} out: {name} is evaluated as it is."
    )
