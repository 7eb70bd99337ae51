"""The examples that a command line asks for."""

from collections.abc import Sequence
from dataclasses import replace

from lora_nlu.data.examples import LABEL, Examples
from lora_nlu.data.glue import load_glue_folder, load_glue_hub
from lora_nlu.data.tasks import TASKS
from lora_nlu.data.user_files import load_files
from lora_nlu.errors import UserError


def load_examples(
    task_name: str | None,
    glue_dir: str | None,
    files: dict[str, str],
    wanted: Sequence[str],
    known_labels: Sequence[str] | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    named_by: str = "",
) -> Examples:
    """Load what a run needs: `wanted` of train, validation, test, of a GLUE task or from `files` and their columns.

    known_labels, named_by: as in `load_files`. Raises UserError if a wanted split is not to be had.
    """
    if task_name is None:
        own = {split: files[split] for split in wanted}
        return load_files(own, known_labels, text_columns, label_column or LABEL, named_by)
    task = TASKS[task_name]
    for split in wanted:
        if not task.splits[split]:
            raise UserError(f"{task_name} has no {split} set. It is for --do_predict with an adapter trained on mnli.")
    splits = [name for split in wanted for name in task.splits[split]]
    if glue_dir is not None:
        return load_glue_folder(glue_dir, task, splits)
    return load_glue_hub(task, splits, cache_dir, token)


def with_diagnostics(
    examples: Examples, glue_dir: str | None, cache_dir: str | None = None, token: str | None = None
) -> tuple[Examples, str]:
    """MNLI's examples with GLUE's diagnostic set (AX), which an MNLI model answers, as split `test_ax`.

    Without the set the examples are as they were, and the second value says why; otherwise that is "".
    """
    try:
        diagnostics = load_examples("ax", glue_dir, {}, ["test"], cache_dir=cache_dir, token=token)
    except UserError as e:
        return examples, str(e).splitlines()[0]
    splits = examples.splits | {"test_ax": diagnostics.splits["test"]}
    return replace(examples, splits=splits, columns=examples.columns | {"test_ax": diagnostics.columns["test"]}), ""
