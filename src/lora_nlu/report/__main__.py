"""Tables of runs, a submission to the GLUE server, and the similarity of two adapters.

  python -m lora_nlu.report runs RUN... [--out FOLDER]             runs over seeds to the paper's table and pictures
  python -m lora_nlu.report methods RUN... [--out FOLDER]          methods compared, and which differ by more than seeds
  python -m lora_nlu.report submission RUN... --out glue.zip       the file for the GLUE test server
  python -m lora_nlu.report similarity ADAPTER1 ADAPTER2           whether two adapters learned the same directions

Each has its own help: python -m lora_nlu.report runs -h. Without a command, `runs` is assumed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_nlu.errors import UserError, printable_lines
from lora_nlu.report.collect import cells_of
from lora_nlu.report.records import RECORDS, training_records, write_records
from lora_nlu.report.submission import write_submission
from lora_nlu.report.tables import write_report

RUNS = """Tables of runs over seeds, in the form of the paper's. Runs that differ in nothing but the seed are one line.

example: python -m lora_nlu.report runs output/seeds --out report
"""
METHODS = """Methods compared, each at the learning rate that runs with --validation_from_train choose: figures,
differences and whether seeds explain them, pictures and one page. compare_methods.sh makes the runs.

example: python -m lora_nlu.report methods output/methods --out report
"""
SUBMISSION = """The zip file for the GLUE test server, made of the predictions of runs with --do_predict. Of
several runs on one task, the one with the best dev figure counts.

example: python -m lora_nlu.report submission output/seeds --out glue.zip
"""
SIMILARITY = """Whether two LoRA adapters learned the same directions: the subspace similarity of the LoRA paper
(section 7.2), beside that of random matrices.

example: python -m lora_nlu.report similarity output/r8/seed_0 output/r64/seed_1 --out similarity
"""


def main(argv: list[str] | None = None, command: str | None = None) -> int:
    """Run a command; without one it is the first word of the command line, or `runs`."""
    words = argparse.ArgumentParser(add_help=False).parse_known_args(argv)[1]  # those of the program without `argv`
    args = _parser().parse_args([command, *words] if command else _with_command(words))
    try:
        for line in args.lines(args):
            print(printable_lines(line))
    except (UserError, OSError) as e:
        print(f"lora_nlu.report: error: {printable_lines(e)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    folder = "an output folder of run_glue.py, or a folder above some"
    form: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m lora_nlu.report", description=__doc__, **form)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    runs = commands.add_parser("runs", description=RUNS, help="tables and pictures of runs", **form)
    runs.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"{folder}, or a {RECORDS} file")
    out = f"write report.md, report.csv, report.tex, pictures and {RECORDS}, the runs' records in one file"
    runs.add_argument("--out", type=Path, metavar="FOLDER", help=out)
    runs.set_defaults(lines=_runs)

    methods = commands.add_parser("methods", description=METHODS, help="compare methods", **form)
    methods.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"{folder}, or a {RECORDS} file")
    with_which = "method to compare the others with: its name in the table, or a run's folder; default: plain LoRA"
    methods.add_argument("--reference", metavar="NAME", help=with_which)
    out = f"write report.md, report.html, report.csv, pictures and {RECORDS}"
    methods.add_argument("--out", type=Path, metavar="FOLDER", help=out)
    methods.set_defaults(lines=_methods)

    submission = commands.add_parser("submission", description=SUBMISSION, help="the zip for the GLUE server", **form)
    submission.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=folder)
    submission.add_argument("--out", type=Path, required=True, metavar="ZIP", help="the file to write")
    submission.add_argument("--partial", action="store_true", help="leave out tasks that no run predicts")
    submission.set_defaults(lines=lambda args: write_submission(args.runs, args.out, args.partial))

    similarity = commands.add_parser("similarity", description=SIMILARITY, help="compare two LoRA adapters", **form)
    adapter = "a published .bin, an adapter or output folder, or a Hub id"
    similarity.add_argument("adapters", nargs=2, metavar="ADAPTER", help=adapter)
    similarity.add_argument("--layers", help="layers to show beside the mean over all, such as 0,5,11")
    similarity.add_argument("--modules", help="modules to compare, such as query,value; default: all")
    similarity.add_argument("--out", type=Path, metavar="FOLDER", help="write similarity.png and similarity.csv")
    similarity.set_defaults(lines=_similarity)
    return parser


def _with_command(words: list[str]) -> list[str]:
    """The command line with its command first; `runs` is the default.

    A first word that is both a command and a folder is the command if operands follow that the command can take.
    """
    flags = argparse.ArgumentParser(add_help=False)
    for flag in ("--out", "--layers", "--modules", "--reference"):
        flags.add_argument(flag)
    operands = [word for word in flags.parse_known_args(words)[1] if not word.startswith("-")]
    first, asks_for_help = "".join(operands[:1]), bool({"-h", "--help"} & {*words})
    if first not in ("runs", "methods", "submission", "similarity"):
        return words if not words or asks_for_help else ["runs", *words]
    if first != "submission" and Path(first).is_dir() and not asks_for_help:
        if len(operands) <= {"runs": 1, "methods": 1, "similarity": 2}[first]:
            print(f"lora_nlu.report: {first!r} is taken as the folder of that name.", file=sys.stderr)
            return ["runs", *words]
        note = f"{first!r} is taken as the command, not as the folder of that name; ./{first} is the folder."
        print(f"lora_nlu.report: {printable_lines(note)}", file=sys.stderr)
    i = words.index(first)
    return [first, *words[:i], *words[i + 1 :]]


def _runs(args: argparse.Namespace) -> list[str]:
    records, notes = training_records(args.runs)
    text = write_report(*cells_of(records, notes, args.runs), args.out)
    if not args.out:
        return [text.removesuffix("\n")]
    write_records(args.out / RECORDS, records)
    return [text, f"Written to {args.out}."]


def _methods(args: argparse.Namespace) -> list[str]:
    from lora_nlu.report.comparison import write_comparison  # needs numpy, which the other commands do not

    text = write_comparison(*training_records(args.runs), args.runs, args.reference, args.out)
    return [text, f"Written to {args.out}."] if args.out else [text.removesuffix("\n")]


def _similarity(args: argparse.Namespace) -> list[str]:
    from lora_nlu.report.similarity import write_similarity  # needs torch, which the other commands do not

    return [write_similarity(args.adapters, args.layers, args.modules, args.out)]


if __name__ == "__main__":
    sys.exit(main())
