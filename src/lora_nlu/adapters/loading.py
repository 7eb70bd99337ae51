"""Trained adapters together with their base model, ready to predict: one base in memory, however many adapters."""

import copy
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_nlu.adapters.adapter import Adapter, with_relative_query
from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UsageError, UserError, printable
from lora_nlu.files import ADAPTER_CONFIG, RUN, read_json
from lora_nlu.hub import look_for_hub
from lora_nlu.labels import (
    check_label_config,
    label_list,
    last_head_layer,
    placeholder_labels,
    recorded_labels,
    rows_by_label,
    set_labels,
)
from lora_nlu.methods.description import set_method
from lora_nlu.models.checkpoints import hold_in_bf16, notes_on_bf16
from lora_nlu.models.loading import load_config, load_model, set_task
from lora_nlu.models.tokenizer import check_tokenizer, load_tokenizer, tokenizer_fingerprint

# Of what `load` takes as arguments
_FLAG = re.compile(r"--(?=(base|lora_alpha|labels|task_name|tokenizer_name|lora_relative_query|bf16)\b)")


@dataclass(frozen=True)
class Source:
    """A trained model to predict with, before its weights are loaded: an adapter, or the folder of a complete model.

    labels: class 0 first, () for a regression.
    metadata: of the run that trained it, as far as it is recorded.
    config: of a complete model; its labels are placeholders if `labels` are assumed from a task's name.
    """

    path: str
    adapter: Adapter | None
    labels: tuple[str, ...]
    metadata: dict[str, Any]
    config: Any = None

    @property
    def recorded_base(self) -> str | None:
        """The base model that an adapter records."""
        return self.metadata.get("base_model") if self.adapter else None


@dataclass(frozen=True)
class Predictor:
    """A model that predicts, in evaluation mode, with its tokenizer and its labels: class 0 first, () for a regression.

    Those of several adapters share the weights of their base.
    """

    source: Source
    model: Any
    tokenizer: Any
    labels: tuple[str, ...]


def load(
    adapter: str | Path,
    base: str | None = None,
    lora_alpha: float | None = None,
    labels: Sequence[str] | None = None,
    task_name: str | None = None,
    tokenizer_name: str | None = None,
    lora_relative_query: str | None = None,
    bf16: bool = False,
) -> tuple[Any, Any, tuple[str, ...]]:
    """Model, tokenizer and labels of an adapter, ready for transformers' `pipeline("text-classification", ...)`.

    adapter:             whatever --lora_path or --adapter_path takes, or the folder of a complete model.
    base:                folder or Hub id of its base model; None for the one that it records.
    lora_alpha:          of a `.bin`, which doesn't record it.
    labels:              class 0 first, of an adapter or model that doesn't record them; () for a regression.
    task_name:           the GLUE task whose labels they are, instead of `labels`.
    tokenizer_name:      folder or Hub id of the tokenizer; None for the base model's.
    lora_relative_query: of a DeBERTa `.bin`, which doesn't record it: none, key or both.
    bf16:                hold the weights of the encoder's linear layers in bf16; the model then stays on the CPU.

    The model is in evaluation mode and its config has the labels. What was assumed is a warning, and so is a Hub that
    does not answer within seconds: only what was downloaded before is read then. Raises UserError.
    """
    notes: list[str] = []
    try:
        notes += look_for_hub(str(adapter))
        source = read_source(str(adapter), lora_alpha, labels, task_name, lora_relative_query)
        notes += look_for_hub(base or source.recorded_base, tokenizer_name)
        (predictor,), more = load_sources([source], base, lora_alpha, tokenizer_name, bf16)
        notes += more
    except UserError as e:
        raise UserError(_FLAG.sub("", str(e))) from e
    finally:
        for note in notes:
            warnings.warn(_FLAG.sub("", note), stacklevel=2)
    return predictor.model, predictor.tokenizer, predictor.labels


def read_source(
    path: str,
    lora_alpha: float | None = None,
    labels: Sequence[str] | None = None,
    task_name: str | None = None,
    lora_relative_query: str | None = None,
) -> Source:
    """What is in an adapter, or in the folder of a complete model, without its base model.

    labels: class 0 first, of a file that records none; task_name: of a GLUE task, whose labels are assumed then.
    lora_alpha, lora_relative_query: as in `Adapter.layers` and `with_relative_query`.
    Raises UserError if it can't predict, if the labels are neither recorded nor given, or if those that are given
    contradict the recorded ones.
    """
    if task_name is not None and task_name not in TASKS:
        raise UserError(f"--task_name {printable(task_name)}: no GLUE task; these are: {', '.join(TASKS)}.")
    if _is_complete_model(Path(path)):
        for flag, value in (("lora_alpha", lora_alpha), ("lora_relative_query", lora_relative_query)):
            if value is not None:
                raise UserError(f"{path}: is a complete model: --{flag} has no effect on it. Leave --{flag} out.")
        return _read_complete_model(path, labels, task_name)
    adapter = read_adapter(path)
    if lora_relative_query is not None and adapter.records_relative_query:
        raise UsageError(f"--lora_relative_query: {path} is no DeBERTa .bin. Leave --lora_relative_query out.")
    adapter = with_relative_query(adapter, lora_relative_query)
    if adapter.row.has_ranks:
        adapter.layers(lora_alpha)  # raises if neither records the alpha, or if they differ
    if (count := adapter.label_count) is None:
        raise UserError(f"{path}: has no classification head, so it predicts nothing.")
    names = _choose_labels(path, count, adapter.labels, labels, task_name)
    if adapter.labels is None and labels is not None:
        adapter = replace(adapter, metadata=adapter.metadata | {"labels": [*labels]})
    return Source(path, adapter, names, adapter.metadata)


def _is_complete_model(folder: Path) -> bool:
    """Whether a folder contains a model, no adapter; a checkpoint of the reference with LoRA is read as an adapter."""
    config = folder / "config.json"
    if not config.is_file() or (folder / ADAPTER_CONFIG).is_file():
        return False
    return bool([*folder.glob("model*.safetensors")]) or not read_json(config).get("apply_lora")


def _read_complete_model(path: str, labels: Sequence[str] | None, task_name: str | None) -> Source:
    """As `read_source`, of a model whose weights and head are in one folder."""
    try:
        config = load_config(path)
    except UserError as e:
        raise UserError(str(e).replace("--model_name_or_path ", "")) from e
    model_class = next(iter(config.architectures or ()), "")
    if not model_class.endswith("ForSequenceClassification"):
        raise UserError(
            f"{path}: has no trained head, by its config.json (a {printable(model_class)}).\n"
            "Give an adapter that was trained on it, or the folder of a fine-tuned model."
        )
    recorded = recorded_labels(config)
    names = _choose_labels(path, config.num_labels, recorded, labels, task_name)
    if recorded is None and labels is not None:
        set_labels(config, names)
    run = Path(path, RUN)  # a complete model has no run_metadata.json
    metadata = read_json(run) if run.is_file() else {}
    return Source(path, None, names, metadata, config)


def _choose_labels(
    path: str, count: int, recorded: Sequence[str] | None, labels: Sequence[str] | None, task_name: str | None
) -> tuple[str, ...]:
    """The labels of a head with `count` outputs: the recorded ones, or else `labels`, or else those of the task.

    Raises UserError if there are none, or if those that are given contradict the recorded ones.
    """
    if labels is not None and task_name is not None:
        raise UserError(f"{path}: --labels and --task_name both name its classes: give one of them.")
    flag = "--labels" if task_name is None else "--task_name"
    given = labels if task_name is None else TASKS[task_name].labels
    if given is not None and recorded is not None:
        rows = rows_by_label(recorded, given)  # a task's labels may be in another order
        if rows is None or (labels is not None and rows != [*range(len(rows))]):
            raise UserError(
                f"{path}: was trained to predict {label_list(recorded)}, but {flag} gives {label_list(given)}.\n"
                f"Leave {flag} out: the label names are recorded."
            )
    elif given is not None and (len(given) or 1) != count:
        raise UserError(f"{path}: its head has {count} outputs, but {flag} gives {label_list(given)}.")
    names = given if recorded is None else recorded
    if names is None and count > 1:
        raise UserError(
            f"{path}: records no names for the {count} classes of its head; a guess could be wrong.\n"
            "Give them, class 0 first, as --labels (a,b,c), or give the name of a GLUE task as --task_name (mnli)."
        )
    return tuple(names or ())


def load_sources(
    sources: Sequence[Source],
    base: str | None = None,
    lora_alpha: float | None = None,
    tokenizer_name: str | None = None,
    bf16: bool = False,
) -> tuple[list[Predictor], list[str]]:
    """A predictor for each source, on the CPU, and lines to print.

    base: None for the one that the first adapter records. bf16: hold the weights of linear layers in it, those of the
    base once for all predictors. Raises UserError, also for adapters of several base models.
    """
    predictors, notes = _load_in_fp32(sources, base, lora_alpha, tokenizer_name)
    if bf16:
        notes += notes_on_bf16(hold_in_bf16([predictor.model for predictor in predictors], trains=False))
    return predictors, notes


def _load_in_fp32(
    sources: Sequence[Source], base: str | None, lora_alpha: float | None, tokenizer_name: str | None
) -> tuple[list[Predictor], list[str]]:
    """As `load_sources`, in fp32. Nothing else refers to the base's weights afterwards: `hold_in_bf16` frees them."""
    adapters = {source.path: source.adapter for source in sources if source.adapter}
    if complete := next((source for source in sources if not source.adapter), None):
        if len(sources) > 1 or base:
            raise UserError(f"{complete.path}: is a complete model, no adapter. Predict with it alone, without --base.")
        return _load_complete_model(complete, tokenizer_name)
    _check_same_base([*adapters.values()])
    first = next(iter(adapters.values()))
    if not (name := base or sources[0].recorded_base):
        raise UserError(f"{first.source} doesn't record its base model: give --base MODEL.")
    try:
        shared = load_base(name, first)
    except UserError as e:
        hint = "" if base else f"\n{first.source} names this base model. If it is elsewhere now, give --base FOLDER."
        raise UserError(f"{e}{hint}") from e
    predictors = []
    try:
        tokenizer, notes = load_tokenizer(tokenizer_name or name, shared.config)
        for source in sources:
            adapter = adapters[source.path]
            _check_tokenizer(source, tokenizer)
            model = _with_shared_weights(shared, adapter, source.labels)
            notes += attach_adapter(model, adapter, lora_alpha, allow_new_head=False)
            predictors.append(Predictor(source, model.eval(), tokenizer, source.labels))
    except UserError as e:
        raise UserError(str(e).replace("--model_name_or_path", "--base")) from e
    return predictors, notes


def load_base(base: str, adapter: Adapter) -> Any:
    """The base model of an adapter, with an untrained head that has as many outputs. Raises UserError."""
    revision, count = recorded_revision(adapter, base), adapter.label_count
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    unnamed = () if count == 1 else placeholder_labels(count or 0)
    try:
        config = load_config(base, **hub)
        set_method(config, {})  # an adapter of its own would be replaced: it is refused
        if count is not None:
            set_labels(config, unnamed if adapter.labels is None else adapter.labels)
        model, _ = load_model(base, config, needs_head=False, keeps_head=False, **hub)
    except UserError as e:
        raise UserError(str(e).replace("--model_name_or_path", "--base")) from e.__cause__
    return model


def recorded_revision(adapter: Adapter, base: str) -> str | None:
    """The revision of a base model that an adapter records, if it records this model."""
    return adapter.metadata.get("base_revision") if base == adapter.metadata.get("base_model") else None


def _check_same_base(adapters: Sequence[Adapter]) -> None:
    """Raise UserError for two adapters that record different base models, by their fingerprints."""
    first = adapters[0]
    for other in adapters[1:]:
        prints = [adapter.metadata.get("base_fingerprint") for adapter in (first, other)]
        if None not in prints and prints[0] != prints[1]:
            raise UserError(
                f"{first.source} and {other.source} were trained on different base models "
                f"({', '.join(printable(adapter.metadata.get('base_model'), 300) for adapter in (first, other))}).\n"
                "Predict with each of them alone."
            )


def _check_tokenizer(source: Source, tokenizer: Any) -> None:
    """Raise UserError if a source was trained with another tokenizer."""
    remedy = "Give the one it was trained with as --tokenizer_name."
    check_tokenizer(source.path, source.metadata, tokenizer_fingerprint(tokenizer), remedy)


def _with_shared_weights(base: Any, adapter: Adapter, labels: tuple[str, ...]) -> Any:
    """A model for these labels that shares the parameters of `base`, except for those that the adapter replaces."""
    shared = {id(parameter): parameter for name, parameter in base.named_parameters() if name not in adapter.state}
    model = copy.deepcopy(base, shared)
    set_task(model.config, adapter.metadata.get("task", "custom"), labels, None)
    model.num_labels = model.config.num_labels
    if last := last_head_layer(adapter.state):
        features = model.get_submodule(last).in_features
        model.set_submodule(last, nn.Linear(features, model.num_labels))
    return model


def _load_complete_model(source: Source, tokenizer_name: str | None) -> tuple[list[Predictor], list[str]]:
    """As `load_sources`, of a model whose weights and head are in one folder."""
    path, config = source.path, copy.deepcopy(source.config)
    recorded = recorded_labels(config)
    try:
        notes = check_label_config(path, config)
        set_task(config, source.metadata.get("task", "custom"), source.labels, None)
        model, more = load_model(path, config, needs_head=True, trained_labels=recorded)
        tokenizer, others = load_tokenizer(tokenizer_name or path, config)
    except UserError as e:
        raise UserError(str(e).replace("--model_name_or_path ", "")) from e
    _check_tokenizer(source, tokenizer)
    return [Predictor(source, model.eval(), tokenizer, source.labels)], [*notes, *more, *others]
