"""Our flags, as three dataclasses (the model, its data, the run), and the flags whose text is a list.

`parsing.py` adds transformers' own flags to those of the run: importing this module needs no library.
"""

import csv
import math
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UsageError, UserError
from lora_nlu.labels import check_label, label_number
from lora_nlu.methods.description import choices_of, method_flags


def flag(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """The model and what is trained in it."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a RoBERTa, DeBERTa-V2 or other encoder"})
    config_name: str | None = flag("Folder or Hub id of the configuration, if another")
    tokenizer_name: str | None = flag("Folder or Hub id of the tokenizer, if another")
    cache_dir: str | None = flag("Where downloads and tokenised data are kept")
    use_fast_tokenizer: bool = flag("Ignored: the fast tokenizer is used wherever there is one", True)
    model_revision: str = flag("Branch, tag or commit of the Hub model", "main")
    token: str | None = flag("Access token for private Hub models")
    reg_loss_wgt: float = flag("R-Drop: weight of the distance between two passes with dropout", 0.0)
    masking_prob: float = flag("Cutoff: share of tokens hidden from the second of the two passes", 0.0)
    class_weights: str | None = flag("Weigh the loss by class: balanced, or numbers, class 0 first")
    cls_dropout: float | None = flag("Dropout of the head; default: the model's hidden_dropout_prob")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The flags of the methods, which `model_arguments` adds."""

    @property
    def path_flag(self) -> str:
        """The flag that names the adapter that the run starts from or evaluates; "" without one."""
        return next((f.name for f in method_flags() if not f.in_config and getattr(self, f.name)), "")

    @property
    def adapter_source(self) -> str | None:
        """The adapter that the run starts from or evaluates."""
        return getattr(self, self.path_flag) if self.path_flag else None

    @property
    def hub(self) -> dict[str, Any]:
        """How to read from the Hub, as arguments of `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "token": self.token, "revision": self.model_revision}


def model_arguments() -> type[ModelArguments]:
    """`ModelArguments` with the flags of all methods of the table."""
    added = []
    for f in method_flags():
        kind = f.kind if f.default is not None else f.kind | None
        choices = {"choices": choices_of(f)} if choices_of(f) else {}
        added.append((f.name, kind, flag(f.help, f.default, **f.options, **choices)))
    return make_dataclass("ModelArguments", added, bases=(ModelArguments,))


@dataclass
class DataArguments:
    """The examples: a GLUE task, from the Hub or --glue_dir, or files of your own."""

    task_name: str | None = flag("GLUE task", choices=[*TASKS])
    glue_dir: str | None = flag("Folder of the standard GLUE download (CoLA/, ...), not the Hub")
    max_seq_length: int = flag("Longer inputs are truncated to this many tokens", 128)
    overwrite_cache: bool = flag("Tokenise again, and parse your files and GLUE folders again", False)
    pad_to_max_length: bool = flag("Pad every batch to max_seq_length; results are the same", False)
    max_train_samples: int | None = flag("Train on the first so many examples")
    max_eval_samples: int | None = flag("Evaluate on the first so many examples (of each set)")
    max_predict_samples: int | None = flag("Predict the first so many examples (of each set)")
    sample_seed: int | None = flag("Seed: the train and eval samples are drawn at random")
    validation_from_train: int | None = flag("Evaluate on so many training rows, kept out of training")
    train_file: str | None = flag("CSV, TSV or JSON lines with a text column (or two) and 'label'")
    validation_file: str | None = flag("The same, to evaluate on")
    test_file: str | None = flag("The same, to predict; 'label' not needed")
    text_columns: str | None = flag("One or two columns of your files with the text: a or a,b")
    label_column: str | None = flag("Column of your files that holds the labels; default: label")
    labels: str | None = flag(
        "Class names, class 0 first, such as no,yes: of your training file (default: sorted), or of a trained head "
        "that records none"
    )

    @property
    def task(self) -> str:
        """The GLUE task, or "custom" for files of the user's own."""
        return self.task_name or "custom"


@dataclass
class OurRunArguments:
    """The flags of the run beside transformers' `TrainingArguments`, or in their place."""

    overwrite_output_dir: bool = flag("Start afresh: remove the run that is in the folder", False)
    write_eval_predictions: bool = flag("Also write the answer to each validation example", False)
    logging_dir: str | None = flag("Folder of the TensorBoard logs")
    log_on_each_node: bool = flag("Print losses and scores once a machine, not once in all", False)
    early_stopping_patience: int | None = flag("Stop after so many evaluations in a row without improvement")
    early_stopping_threshold: float = flag("Smallest change of the metric that counts as an improvement", 0.0)
    logging_nan_inf_filter: bool = flag("Ignored: training stops at a loss that is not finite, and logs it", False)
    loraplus_lr_ratio: float | None = flag("LoRA+: B learns so many times as fast as A")
    head_learning_rate: float | None = flag("Learning rate of the head, if another")
    cuda_graphs: bool = flag("On a GPU, replay training steps that were recorded once", True)


def parse_names(flag: str, text: str | None) -> tuple[str, ...] | None:
    """`a,b,c` to names without blanks around them; one that holds a comma stands in quotes. Raises UsageError."""
    if text is None:
        return None
    try:
        names = tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []))
        for name in names if flag == "labels" else ():
            check_label("--labels", name)
    except csv.Error:  # a line break outside of quotes
        names = ()
    except UserError as e:
        raise UsageError(str(e)) from e
    if not names or "" in names or len({*names}) < len(names):
        raise UsageError(f"--{flag} {text}: give different names with commas between them.")
    return names


def parse_weights(text: str) -> list[float] | None:
    """The numbers of --class_weights; None for `balanced`, which the training rows decide. Raises UsageError."""
    if text == "balanced":
        return None
    try:
        weights = [label_number(number) for number in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UsageError(
            f"--class_weights {text}: give balanced, or a number for each class with commas between them, each 0 or "
            "more and not all 0."
        )
    return weights
