"""The flags of a model and of its data, as two dataclasses, and the flags whose text is a list.

transformers' own group of flags is in `run_arguments.py`: this module can be imported without any library.
"""

import csv
from dataclasses import dataclass, field
from typing import Any

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UsageError
from lora_nlu.methods.description import ADAPTER_TYPES, target_names


def flag(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """The model and what is trained in it."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a RoBERTa or DeBERTa-V2 checkpoint"})
    config_name: str | None = flag("Folder or Hub id of the configuration, if another")
    tokenizer_name: str | None = flag("Folder or Hub id of the tokenizer, if another")
    cache_dir: str | None = flag("Where downloads and tokenised data are kept")
    use_fast_tokenizer: bool = flag("Ignored: the fast tokenizer is used wherever there is one", True)
    model_revision: str = flag("Branch, tag or commit of the Hub model", "main")
    token: str | None = flag("Access token for private Hub models")
    apply_lora: bool = flag("Train LoRA in the query and value projections, and the head; freeze the rest", False)
    lora_r: int | None = flag("Rank of the update; 0 is plain fine-tuning")
    lora_alpha: float | None = flag("The update is scaled by lora_alpha / lora_r")
    lora_path: str | None = flag("Adapter to start from or evaluate: a published .bin, an adapter or output folder")
    lora_relative_query: bool | None = flag(
        "DeBERTa: LoRA also on the relative positions' query, as in PEFT; an adapter knows", nargs="?", const=True
    )
    lora_target_modules: str | None = flag(
        "Layers with LoRA, of query,key,value,dense (attention) and intermediate,output (feed-forward); "
        "default: query,value"
    )
    lora_layers: str | None = flag("Encoder layers with LoRA, from 0, such as 0-3,11; default: all")
    lora_dropout: float | None = flag("Dropout of what the update reads; the reference has none")
    apply_bitfit: bool = flag("Train the encoder's biases, and the head (BitFit)", False)
    apply_adapter: bool = flag("Train bottleneck adapters, and the head", False)
    adapter_type: str | None = flag("Where adapters go and what they read", choices=[*ADAPTER_TYPES])
    adapter_size: int | None = flag("Width of the adapters' bottleneck")
    adapter_path: str | None = flag("The same as --lora_path for what the other methods trained")
    head_only: bool = flag("Train the head alone, on the frozen encoder", False)
    reg_loss_wgt: float = flag("R-Drop: weight of the distance between two passes with their own dropout", 0.0)
    masking_prob: float = flag("Cutoff: share of tokens hidden from the second of the two passes", 0.0)
    cls_dropout: float | None = flag("Dropout of the classification head; default: the model's hidden_dropout_prob")

    @property
    def adapter_source(self) -> str | None:
        """The adapter that the run starts from or evaluates."""
        return self.lora_path or self.adapter_path

    @property
    def hub(self) -> dict[str, Any]:
        """How to read from the Hub, as arguments of `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "token": self.token, "revision": self.model_revision}


@dataclass
class DataArguments:
    """The examples: a GLUE task, from the Hub or --glue_dir, or files of your own."""

    task_name: str | None = flag("GLUE task", choices=[*TASKS])
    glue_dir: str | None = flag("Folder with the standard GLUE download (CoLA/train.tsv, ...) instead of the Hub")
    max_seq_length: int = flag("Longer inputs are truncated to this many tokens", 128)
    overwrite_cache: bool = flag("Tokenise again", False)
    pad_to_max_length: bool = flag("Pad every batch to max_seq_length; results are the same", False)
    max_train_samples: int | None = flag("Train on the first so many examples")
    max_eval_samples: int | None = flag("Evaluate on the first so many examples (of each set)")
    max_predict_samples: int | None = flag("Predict the first so many examples (of each set)")
    sample_seed: int | None = flag("Seed: --max_train_samples and --max_eval_samples take a random sample")
    train_file: str | None = flag("CSV, TSV or JSON lines with a text column (or two) and 'label'")
    validation_file: str | None = flag("The same, to evaluate on")
    test_file: str | None = flag("The same, to predict; 'label' not needed")
    text_columns: str | None = flag("Columns of your files that hold the text, one or two: --text_columns a,b")
    label_column: str | None = flag("Column of your files that holds the labels; default: label")
    labels: str | None = flag(
        "Class names, class 0 first, such as negative,positive: for a trained head that records none, or for training "
        "on your own files (default: sorted)"
    )

    @property
    def task(self) -> str:
        """The GLUE task, or "custom" for files of the user's own."""
        return self.task_name or "custom"


def parse_targets(text: str | None) -> list[str] | None:
    """`query,value` to names of `lora.TARGETS`, in their order; `query_proj` is `query`. Raises UsageError."""
    if text is None:
        return None
    try:
        return target_names(text)
    except ValueError as e:
        raise UsageError(f"--lora_target_modules {text}: {e}") from e


def parse_layers(text: str | None, count: int) -> list[int] | None:
    """`0-3,11` to the numbers of those of `count` encoder layers, from 0. Raises UsageError."""
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UsageError(f"--lora_layers {text}: give numbers and ranges from 0, such as 0-3,{count - 1}.")
        if int(last) >= count:
            raise UsageError(f"--lora_layers {text}: the model has {count} layers, 0 to {count - 1}.")
        numbers |= set(range(int(first), int(last) + 1))
    return sorted(numbers)


def parse_names(flag: str, text: str | None) -> tuple[str, ...] | None:
    """`a,b,c` to names without blanks around them; one that holds a comma stands in quotes. Raises UsageError."""
    if text is None:
        return None
    names = tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []))
    if not names or "" in names or len({*names}) < len(names):
        raise UsageError(f"--{flag} {text}: give different names with commas between them.")
    return names
