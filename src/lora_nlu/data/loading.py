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
    kinds: Sequence[str],
    expected_labels: Sequence[str] | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    expected_by: str = "",
) -> Examples:
    """Load the splits of these kinds (train, validation, test) of a GLUE task, or of a user's own `files`.

    The other arguments are those of `load_files` and of the GLUE loaders. Raises UserError for a split that the task
    lacks or that can't be read.
    """
    if task_name is None:
        chosen = {kind: files[kind] for kind in kinds}
        return load_files(chosen, expected_labels, text_columns, label_column or LABEL, expected_by)
    task = TASKS[task_name]
    for kind in kinds:
        if not task.splits[kind]:
            raise UserError(f"{task_name} has no {kind} set. It is for --do_predict with an adapter trained on mnli.")
    splits = [split for kind in kinds for split in task.splits[kind]]
    if glue_dir is not None:
        return load_glue_folder(glue_dir, task, splits)
    return load_glue_hub(task, splits, cache_dir, token)


def with_diagnostics(
    examples: Examples, glue_dir: str | None, cache_dir: str | None = None, token: str | None = None
) -> tuple[Examples, str]:
    """MNLI's examples with GLUE's diagnostic set (AX), which an MNLI model predicts, as split `test_ax`.

    If the set can't be loaded, the examples are returned unchanged, with the reason; otherwise the reason is "".
    """
    try:
        diagnostics = load_examples("ax", glue_dir, {}, ["test"], cache_dir=cache_dir, token=token)
    except UserError as e:
        return examples, str(e).splitlines()[0]
    splits = examples.splits | {"test_ax": diagnostics.splits["test"]}
    return replace(examples, splits=splits, columns=examples.columns | {"test_ax": diagnostics.columns["test"]}), ""
