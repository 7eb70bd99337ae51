"""Runs over seeds to the paper's table, as text, CSV, LaTeX and pictures.

python -m lora_nlu.report RUN... [--out FOLDER]
python -m lora_nlu.report submission RUN... --out glue.zip    # the file for the GLUE test server, see submission.py

RUN is an output folder of run_glue.py, or a folder that holds some. Runs that differ in nothing but the seed are one
line of the table.
"""

import argparse
import sys
from pathlib import Path

from lora_nlu.errors import UserError
from lora_nlu.report.collect import collect
from lora_nlu.report.submission import write_submission
from lora_nlu.report.tables import write_report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lora_nlu.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an output folder, or one that holds some")
    parser.add_argument(
        "--out", type=Path, help="a folder for report.md, report.csv, report.tex and pictures; the zip of a submission"
    )
    parser.add_argument("--partial", action="store_true", help="submission: leave out tasks that no run predicts")
    args = parser.parse_args(argv)
    runs = args.runs[1:] if (submits := args.runs[0] == Path("submission")) else args.runs
    if submits != bool(submits and runs and args.out) or (args.partial and not submits):
        parser.error("give: submission RUN... --out glue.zip [--partial], or RUN... [--out FOLDER].")
    try:
        if submits:
            print(*write_submission(runs, args.out, args.partial), sep="\n")
        else:
            text = write_report(*collect(runs), args.out)
            print(text, *([f"Written to {args.out}."] if args.out else []), sep="\n", end="\n" if args.out else "")
    except (UserError, OSError) as e:
        print(f"lora_nlu.report: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
