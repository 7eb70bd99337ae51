"""What is in an adapter, and its other forms.

  python -m lora_nlu.adapters inspect ADAPTER                              print what an adapter contains
  python -m lora_nlu.adapters convert ADAPTER DESTINATION --to merged      write it as a PEFT folder, .bin or model

Each has its own help: python -m lora_nlu.adapters convert -h.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_nlu.errors import UsageError, UserError, printable_lines
from lora_nlu.methods.targets import RELATIVE_QUERY

INSPECT = """Print what an adapter contains: method, layers, rank, alpha, labels, base model, metrics, parameters, and
whether all its numbers are finite.

example: python -m lora_nlu.adapters inspect output/roberta_base_rte
"""
CONVERT = """Write an adapter in another form. Nothing is written over; repeated, it leaves what is there.

  --to peft    a folder with a model card, ready for the Hub; peft.PeftModel.from_pretrained loads it (LoRA)
  --to bin     one file in the layout of microsoft/LoRA's published files (LoRA on query and value)
  --to merged  a plain model with the update in its weights, for transformers alone

example: python -m lora_nlu.adapters convert output/roberta_base_rte rte-model --to merged
"""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)  # answers --help, so what imports torch is imported below
    try:
        print(printable_lines(args.text(args)))
    except (UserError, OSError) as e:
        print(f"lora_nlu.adapters: error: {printable_lines(e)}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    form: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    adapter: Any = {"metavar": "ADAPTER", "help": "a published .bin, an adapter or output folder, or a Hub id"}
    parser = argparse.ArgumentParser(prog="python -m lora_nlu.adapters", description=__doc__, **form)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspecting = commands.add_parser("inspect", description=INSPECT, help="print what an adapter contains", **form)
    inspecting.add_argument("adapter", **adapter)
    inspecting.set_defaults(text=_inspect)

    converting = commands.add_parser("convert", description=CONVERT, help="write an adapter in another form", **form)
    converting.add_argument("adapter", **adapter)
    add = converting.add_argument
    add("destination", type=Path, metavar="DESTINATION", help="the folder or file to write")
    add("--to", required=True, choices=["peft", "bin", "merged"], help="the form; see above")
    add("--lora_alpha", type=float, metavar="ALPHA", help="of a .bin, which doesn't record it (published RoBERTa: 16)")
    add("--base", metavar="MODEL", help="the base model to merge into or to record; default: the one that is recorded")
    query = "of a DeBERTa .bin: it was trained with LoRA on the relative positions' query too, as in PEFT (both)"
    add("--lora_relative_query", nargs="?", const="both", choices=RELATIVE_QUERY, help=query)
    converting.set_defaults(text=_convert)
    return parser


def _look_for_hub(name: str | None) -> None:
    """Before what may be a Hub id is read."""
    from lora_nlu.hub import look_for_hub

    for line in look_for_hub(name):
        print(line, file=sys.stderr)


def _inspect(args: argparse.Namespace) -> str:
    from lora_nlu.adapters.model_card import inspect
    from lora_nlu.adapters.reading import read_adapter

    _look_for_hub(args.adapter)
    return inspect(read_adapter(args.adapter))


def _convert(args: argparse.Namespace) -> str:
    from lora_nlu.adapters.adapter import with_relative_query
    from lora_nlu.adapters.converting import convert
    from lora_nlu.adapters.reading import read_adapter

    _look_for_hub(args.adapter)
    adapter = read_adapter(args.adapter)
    if args.to == "merged" or args.base:
        _look_for_hub(args.base or adapter.metadata.get("base_model"))
    if args.lora_relative_query and adapter.records_relative_query:
        raise UsageError(f"--lora_relative_query: {adapter.source} is no DeBERTa .bin; leave it out.")
    adapter = with_relative_query(adapter, args.lora_relative_query)
    return convert(adapter, args.destination.absolute(), args.to, args.lora_alpha, args.base)


if __name__ == "__main__":
    sys.exit(main())
