"""A model from a checkpoint folder or Hub id: its configuration, its weights, its head, and checks of each."""

import copy
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from lora_nlu.errors import UserError, first_line, is_out_of_memory, printable
from lora_nlu.files import ADAPTER_CONFIG, read_json, weights_file_problem
from lora_nlu.labels import (
    check_label,
    check_labels,
    config_labels,
    label_list,
    last_head_layer,
    match_head_rows,
    set_labels,
)
from lora_nlu.methods.description import (
    description_of,
    is_added,
    method_of_config,
    method_of_tensor,
    set_method,
)
from lora_nlu.methods.linear import unmerged_parameters
from lora_nlu.methods.marking import mark_trainable
from lora_nlu.models.checkpoints import linear_weights_as_in, refuse_quantised, weight_files
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import (
    CamembertForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)
from lora_nlu.ops.frozen import plain
from lora_nlu.ops.tensors import is_loaded, load_torch_file, not_finite

# By model type
MODELS: dict[str, Any] = {
    "roberta": RobertaForSequenceClassification,
    "xlm-roberta": XLMRobertaForSequenceClassification,
    "camembert": CamembertForSequenceClassification,
    "deberta-v2": DebertaV2ForSequenceClassification,
}
_MOST_LABELS, _MOST_LAYERS = 100_000, 1_000  # each takes time before the weights are read


def load_config(name: str, **hub: Any) -> Any:
    """The config of a folder or Hub id (`hub`: cache_dir, token, revision). Raises UserError for none of `MODELS`."""
    try:
        settings, _ = PreTrainedConfig.get_config_dict(name, **hub)
        if isinstance(count := settings.get("num_labels"), int) and count > _MOST_LABELS:  # it would list their names
            raise ValueError(f"num_labels is {count:,}; supported: {_MOST_LABELS:,}")
        if (kind := settings.get("model_type")) in CONFIG_MAPPING and kind not in MODELS:
            raise UserError(
                f"--model_name_or_path {name}: a {kind!r} model; supported: {', '.join(MODELS)}.\n"
                "docs/encoders.md lists encoders that work, and shows how a BERT is rewritten as a RoBERTa."
            )
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    except UserError:
        raise
    except Exception as e:  # transformers raises errors of many kinds for a config that it can't use
        if Path(name, ADAPTER_CONFIG).is_file() and not Path(name, "config.json").is_file():
            settings = read_json(Path(name, ADAPTER_CONFIG))
            row = method_of_config(settings)
            flag = row.path_flag if row else "adapter_path"
            base = printable(settings.get("base_model_name_or_path") or "the model it was trained from", 300)
            raise UserError(
                f"--model_name_or_path {name}: is an adapter.\n"
                f"Give it as --{flag}, and its base ({base}) as --model_name_or_path."
            ) from e
        problem = "neither a folder with a config.json nor a model available from the Hub"
        if isinstance(e.__cause__, LocalEntryNotFoundError) and not Path(name).exists():
            raise UserError(
                f"--model_name_or_path {name}: no such folder; the Hub ({huggingface_hub.constants.ENDPOINT}) is not "
                "reached, and no model of this name was downloaded before.\nOn a machine with a network: hf download "
                f"{name} --local-dir FOLDER. Then give that folder as --model_name_or_path."
            ) from e
        if Path(name, "config.json").is_file():
            problem = "its config.json can't be used"
        if "trust_remote_code" in str(e):
            problem = "its config.json has an auto_map, which asks to run code of the checkpoint; that is refused"
        raise UserError(f"--model_name_or_path {name}: {problem}.\n({first_line(e)})") from e
    refuse_quantised(f"--model_name_or_path {name}", getattr(config, "quantization_config", None))
    _check_config(name, config)
    config._attn_implementation = "eager"  # as transformers calls the models' own; the file may ask for another
    return config


def _check_config(name: str, config: Any) -> None:
    """Raise UserError for a value that transformers accepts and that fails later; labels become their text."""
    labels, label_ids, classes = [*config.id2label.values()], config.label2id, config.architectures
    problem = ""
    if not 0 <= config.num_hidden_layers <= _MOST_LAYERS:
        problem = f"num_hidden_layers is {config.num_hidden_layers:,}; supported: 0 to {_MOST_LAYERS:,}"
    elif wrong := [label for label in labels if not isinstance(label, str | int | float)]:
        problem = f"id2label contains {printable(wrong[0], 40)}; expected names"
    elif not isinstance(label_ids or {}, dict):
        problem = f"label2id is {printable(label_ids, 40)}; expected an object"
    elif config.model_type != "deberta-v2" and config.pad_token_id is None:
        problem = "pad_token_id is null; expected a number: positions are counted from it"
    elif not isinstance(classes, list | None) or not all(isinstance(model_class, str) for model_class in classes or ()):
        problem = f"architectures is {printable(classes, 40)}; expected a list of names"
    if problem:
        raise UserError(f"--model_name_or_path {name}: its config.json can't be used.\n({problem})")
    config.id2label = {i: str(label) for i, label in config.id2label.items()}
    for label in config.id2label.values():
        check_label(f"--model_name_or_path {name}: its config.json", label)


def set_task(config: Any, task: str, labels: tuple[str, ...], cls_dropout: float | None) -> None:
    """Set what the task and the flags decide in a config, whatever its checkpoint was saved with.

    What stays is the architecture. The head's dropout is `cls_dropout`, without it the model's hidden_dropout_prob.
    """
    set_labels(config, labels)
    config.finetuning_task, config.cls_dropout, config.classifier_dropout = task, cls_dropout, None
    config.output_hidden_states = config.output_attentions = False
    config.return_dict = True


def longest_input(config: Any) -> float:
    """How many tokens the position table has room for; infinity for a DeBERTa, which has none."""
    if config.model_type != "deberta-v2":
        return config.max_position_embeddings - config.pad_token_id - 1  # it counts from pad_token_id + 1
    return config.max_position_embeddings if config.position_biased_input else math.inf


def load_model(
    name: str, config: Any, needs_head: bool, trained_labels: Sequence[str] | None = None,
    keeps_head: bool = True, for_bf16: bool = False, **hub: Any,
) -> tuple[Any, list[str]]:  # fmt: skip
    """The model of `config` with the weights of `name` in fp32, what trains in it marked; and notes for the log.

    trained_labels: the labels that the checkpoint's head predicts, class 0 first; None where nothing records them. The
    head's rows are put in the order of the config's labels, and a head for other labels starts anew; not so without
    `keeps_head`, when an adapter's head will replace it.
    for_bf16: `hold_in_bf16` will follow; until then frozen linear weights stay in the files' dtype, fp16 or bf16, and
    their fp32 copy takes no memory.
    What a method adds and a head that the checkpoint lacks are drawn from torch's global generator. Raises UserError if
    weights are not finite, the encoder's are missing or misshapen, an adapter in them would be left out, or the head is
    missing and `needs_head`.
    """
    verbosity, notes = transformers.logging.get_verbosity(), []
    needs_fp32 = any(row.start or row.before_steps or not row.freezes for row in description_of(config).rows)
    transformers.logging.set_verbosity_error()  # what is missing is checked and reported below
    try:
        files = _check_size(name, config, **hub)
        with linear_weights_as_in([] if needs_fp32 or not for_bf16 else files):
            model, report = MODELS[config.model_type].from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **hub
            )
    except UserError:
        raise
    except Exception as e:  # torch raises errors of many kinds for a damaged file
        for path in sorted(Path(name).glob("*.safetensors")) or sorted(Path(name).glob("pytorch_model*.bin")):
            if path.is_file() and (text := weights_file_problem(path)):
                raise UserError(f"--model_name_or_path {name}: {path.name}: {text}") from e
        problem = "there is not enough memory for its weights" if is_out_of_memory(e) else "its weights can't be loaded"
        raise UserError(f"--model_name_or_path {name}: {problem} ({first_line(e)}).") from e
    finally:
        transformers.logging.set_verbosity(verbosity)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers took an adapter beside the model, and its base
        raise UserError(
            f"--model_name_or_path {name}: contains a model and an adapter ({ADAPTER_CONFIG}); it is unclear which is "
            f"meant.\nGive the adapter's files in a folder of their own as --lora_path, and the model without "
            f"{ADAPTER_CONFIG} here."
        )
    new = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if wrong := sorted(new - set(head_names(model))):
        raise UserError(
            f"--model_name_or_path {name}: {len(wrong)} weights are missing or not of config.json's shape, "
            f"{', '.join(wrong[:3])} among them."
        )
    if broken := not_finite(model.state_dict()):
        raise UserError(
            f"--model_name_or_path {name}: {len(broken)} of its weights are not finite (NaN or infinity), {broken[0]} "
            "first.\nIts training diverged, or the file is damaged; take another checkpoint."
        )
    if unexpected := sorted(report["unexpected_keys"]):
        first = ", ".join(map(printable, unexpected[:3]))
        notes.append(f"{name}: {len(unexpected)} weights have no place in the model: {first} ...")
    if new and needs_head:
        raise _no_head(name, config, trained_labels, report)
    if needs_head:
        check_labels(name, trained_labels, config_labels(config))
    if keeps_head:
        notes += _order_head_(model, name, trained_labels, report)
    mark_trainable(model)
    return model, notes


def _check_size(name: str, config: Any, **hub: Any) -> list[Path]:
    """The files of the weights. Raises UserError, before allocation, for a model or tensors far larger than them."""
    files = weight_files(name, config, **hub)
    for file in files:
        if file.suffix != ".safetensors":
            load_torch_file(file, "meta")
    if not files:
        return []  # transformers says what is missing
    shallow = copy.deepcopy(config)
    set_method(shallow, {})
    shallow.num_hidden_layers = 1
    with torch.device("meta"):
        sizes = {key: p.numel() for key, p in MODELS[config.model_type](shallow).named_parameters()}
    layer = sum(size for key, size in sizes.items() if ".layer.0." in key)
    count, size = sum(sizes.values()) + (config.num_hidden_layers - 1) * layer, sum(f.stat().st_size for f in files)
    if count > 2 * size + 2**24:  # a number of the weights has at least a byte; the head may be missing
        raise UserError(
            f"--model_name_or_path {name}: config.json describes a model of {count:,} numbers, and the files of its "
            f"weights have only {size:,} bytes.\nThey don't belong together: download both again."
        )
    return files


def _no_head(name: str, config: Any, trained: Sequence[str] | None, report: dict[str, Any]) -> UserError:
    """Why the head in a checkpoint's weights can't be evaluated: there is none, or it has other rows."""
    shapes = {key: shape for key, shape, _ in report["mismatched_keys"]}
    last = last_head_layer(shapes)
    if last is None:
        return UserError(
            f"{name} has no trained head.\n"
            "Train one (run_glue.py --do_train), or give an adapter that was trained on it (run_glue.py: --lora_path)."
        )
    rows = shapes[f"{last}.weight"][0]
    if trained is not None and rows != (len(trained) or 1):
        return UserError(
            f"{name}: the head in its weights has {rows} rows, and its config.json has {len(trained) or 1} labels: "
            f"{label_list(trained)}."
        )
    labels = label_list(config_labels(config))
    if trained is None:
        return UserError(f"{name}: the head in its weights has {rows} rows; they can't be the labels {labels}.")
    return UserError(f"{name}: was trained to predict {label_list(trained)}; the examples have {labels}.")


def own_adapter(model: Any) -> list[str]:
    """Names of the LoRA matrices and bottlenecks that a model got from its checkpoint."""
    return [name for name, parameter in model.named_parameters() if is_added(name) and is_loaded(parameter)]


def check_method(model: Any, name: str, saved: dict[str, Any]) -> None:
    """Raise UserError if LoRA or bottlenecks that a model got from its checkpoint were saved with other settings.

    saved: the settings in the checkpoint's config, by name; the model's config has those of the flags.
    """
    config, own = model.config, own_adapter(model)
    if not own:
        return
    row = method_of_tensor(own[0], saved)
    for setting in row.settings:
        if (value := saved.get(setting)) != vars(config).get(setting) and value:
            raise UserError(
                f"--model_name_or_path {name}: contains {own[0]}, trained with {setting} {value}; no flag gives it.\n"
                "Save it as an adapter (lora_nlu.save_adapter), and give that and the plain base model."
            )
    for flag in [flag for flag in row.flags if flag.decides]:
        setting, unset = flag.name, False if flag.unset is None else flag.unset
        trained_with, flag_value = (values.get(setting) or unset for values in (saved, vars(config)))
        if trained_with is False and flag.kind is not bool:
            raise UserError(
                f"--model_name_or_path {name}: contains {own[0]}, and its config.json doesn't record the "
                f"{setting} that it was trained with.\nGive the plain base model there, and this as --lora_path."
            )
        if trained_with != flag_value:
            raise UserError(
                f"--model_name_or_path {name}: contains {own[0]}, trained with {setting} {trained_with}; the flags "
                f"give {flag_value}.\n{'Leave out' if trained_with == unset else 'Give'} --{setting}"
                f"{'' if trained_with is True or trained_with == unset else f' {trained_with}'}."
            )


@torch.no_grad()
def _order_head_(model: Any, name: str, trained: Sequence[str] | None, report: dict[str, Any]) -> list[str]:
    """Put the rows of a checkpoint's head in the order of the model's labels, or draw it anew; notes for the log."""
    last = last_head_layer(model.state_dict())
    if f"{last}.weight" in report["missing_keys"]:
        return [] if trained is None else [f"{name}: has no trained head; a new one is initialised."]
    shapes = {key: shape for key, shape, _ in report["mismatched_keys"]}
    count = shapes.get(f"{last}.weight", [model.config.num_labels])[0]
    rows, note = match_head_rows(name, count, trained, config_labels(model.config))
    if rows is None:
        for layer in model.classifier.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=model.config.initializer_range)
                nn.init.zeros_(layer.bias)
    else:
        for parameter in model.get_submodule(last).parameters():
            parameter.copy_(parameter[rows])
    return [note] if note else []


def set_two_views(model: Any, tokenizer: Any, reg_loss_wgt: float, masking_prob: float) -> None:
    """Turn R-Drop, and with `masking_prob` cutoff, on or off. Raises UserError if cutoff lacks an unknown token."""
    config = model.config
    config.reg_loss_wgt, config.masking_prob = reg_loss_wgt, masking_prob
    for name in ("unk_token_id", "special_token_ids"):
        config.__dict__.pop(name, None)
    if masking_prob:
        if tokenizer.unk_token_id is None:
            raise UserError("--masking_prob: the tokenizer has no unknown token to replace others with.")
        config.unk_token_id = tokenizer.unk_token_id
        config.special_token_ids = sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id})


@torch.no_grad()
def base_fingerprint(model: Any) -> str:
    """A hash of the encoder's frozen weights, from up to 64 numbers of each tensor: milliseconds for 1.5B parameters.

    The same in fp32 and bf16, merged or not. It tells checkpoints apart, but not a copy with a few numbers changed.
    """
    return sampled_fingerprint({n: p for n, p in unmerged_parameters(model.base_model).items() if not is_added(n)})


@torch.no_grad()
def sampled_fingerprint(state: dict[str, Any]) -> str:
    """A hash of tensors with their names and shapes, from up to 64 numbers of each."""
    samples, names = [], []
    for name, parameter in sorted(state.items()):
        numbers = plain(parameter).reshape(-1)
        samples.append(numbers[:: max(1, numbers.numel() // 64)][:64].to(torch.bfloat16))
        names.append(f"{name} {list(parameter.shape)}")
    sampled = torch.cat(samples).view(torch.int16).cpu().numpy().tobytes()
    return hashlib.sha256("\n".join(names).encode() + sampled).hexdigest()[:16]


def head_names(model: Any) -> list[str]:
    """Names of the parameters outside the encoder; a bare encoder has none."""
    prefix = encoder_prefix_in(model)
    return [name for name, _ in model.named_parameters() if not name.startswith(prefix)]


def encoder_prefix_in(model: Any) -> str:
    """What the names of the encoder's parameters start with in a model: "roberta."; "" in a bare encoder."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."
