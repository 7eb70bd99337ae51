"""What is in an adapter, and its other forms.

python -m lora_nlu.adapters inspect SOURCE
python -m lora_nlu.adapters convert SOURCE DESTINATION --to {peft,bin,merged} [--lora_alpha A] [--base MODEL]
                                               [--lora_relative_query]
"""

import argparse
import sys
from pathlib import Path

from lora_nlu.adapters.converting import convert
from lora_nlu.adapters.flags import with_relative_query
from lora_nlu.adapters.model_card import inspect
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.errors import UsageError, UserError


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
    converted.add_argument(
        "--lora_relative_query", action="store_true", help="of a DeBERTa .bin: it was trained as PEFT trains"
    )
    converted.add_argument("--base", help="the base model to merge into or to record, if not the one recorded")
    args = parser.parse_args(argv)
    try:
        adapter = read_adapter(args.source)
        if args.command == "inspect":
            print(inspect(adapter))
        else:
            if args.lora_relative_query and adapter.records_relative_query:
                raise UsageError(f"--lora_relative_query: {adapter.source} is no DeBERTa .bin; leave it out.")
            adapter = with_relative_query(adapter, args.lora_relative_query or None)
            print(convert(adapter, args.destination.absolute(), args.to, args.lora_alpha, args.base))
    except (UserError, OSError) as e:
        print(f"lora_nlu.adapters: error: {e}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
