"""A command line, or a JSON file of flags, to the three groups of flags."""

import difflib
import json
from collections.abc import MutableMapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.integrations import is_tensorboard_available

from lora_nlu.errors import UsageError, UserError
from lora_nlu.files import read_json
from lora_nlu.training.arguments import DataArguments, ModelArguments, model_arguments
from lora_nlu.training.checks import check_arguments
from lora_nlu.training.legacy_flags import translate
from lora_nlu.training.processes import say
from lora_nlu.training.run_arguments import RunArguments


def parse_arguments(
    argv: list[str], environ: MutableMapping[str, str]
) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Flags, or one JSON file of them, to the three groups; environ: as in `RunArguments`. Raises UsageError."""
    (model_args, data_args, args), notes = parse(argv, (model_arguments(), DataArguments, RunArguments), environ)
    if not model_args.use_fast_tokenizer:
        notes.append("--use_fast_tokenizer false is ignored: the fast tokenizer is used wherever there is one.")
    if args.logging_nan_inf_filter:
        notes.append("--logging_nan_inf_filter is ignored: training stops at a loss that is not finite.")
        args.logging_nan_inf_filter = False
    if args.batch_eval_metrics:
        notes.append("--batch_eval_metrics is ignored: metrics are always computed over all examples at once.")
        args.batch_eval_metrics = False
    if args.logging_dir and not is_tensorboard_available():
        notes.append(f"--logging_dir {args.logging_dir}: nothing is written there, tensorboard is not installed.")
    say(args, *(f"run_glue.py: {note}" for note in notes))
    check_arguments(model_args, data_args, args)
    return model_args, data_args, args


def parse(
    argv: list[str], groups: Any, environ: MutableMapping[str, str] | None = None
) -> tuple[tuple[Any, ...], list[str]]:
    """Read flags, or the JSON file that is the only argument, into one object of each dataclass of `groups`.

    Returns them and a line for each old flag that was translated. Raises UsageError; an unknown flag names near ones.
    """
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _from_json(Path(argv[0]))
    argv, notes = translate(argv)
    parser = _Parser(groups, allow_abbrev=False)
    try:
        values, unknown = parser.parse_known_args(argv)
        parsed = tuple(_group(kind, vars(values), environ) for kind in groups)
    except (ValueError, ImportError) as e:
        raise UsageError("\n".join(str(e).strip().splitlines()[:3])) from e
    if unknown:
        near = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=3)
        raise UsageError(f"unknown flag {unknown[0]}." + (f" Did you mean {' or '.join(near)}?" if near else ""))
    return parsed, notes


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _group(kind: Any, values: dict[str, Any], environ: MutableMapping[str, str] | None) -> Any:
    own = {field.name: values[field.name] for field in fields(kind) if field.init}
    return kind(**own, environ=environ) if kind is RunArguments else kind(**own)


def _from_json(path: Path) -> list[str]:
    """The flags of a JSON object: a list is several values, null or a list of none a flag left out."""
    try:
        settings = read_json(path)
    except UserError as e:
        raise UsageError(str(e)) from e
    argv = []
    for name, value in settings.items():
        if value not in (None, []):
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            argv += [f"--{name}", *map(str, values)]
    return argv
