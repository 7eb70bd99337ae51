"""Start run_seeds.py several times at once over one folder: together they must leave what one leaves.

    nice python tests/stress/at_once.py [--schedulers 4] [--rounds 10] [--train] [--seed 0]

In each round so many processes are given the same command, up to 0.3 s apart. When they and all runs have ended, every
run was started once, its log is that of a command that ran alone, but for numbers, and no process printed a traceback;
one that met a run of another says so, and ends with code 1. The same command once more finds every run done, and the
folder then has the same files with the same bits as that of the command that ran alone.
Runs are copies of finished ones (as in every_call.py); with --train they are trained. Exit code 1 if anything failed.
"""

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import every_call  # noqa: E402
import forked  # noqa: E402

NUMBER = re.compile(r"-?\d[\d.:]*(e-?\d+)?")


def start(work: Path, folder: Path, number: int, python: Path, delay_s: float = 0.0) -> int:
    def main() -> None:
        time.sleep(delay_s)
        every_call.run_seeds(work, folder / "output", python)

    return forked.launch(main, Path(f"{folder}-{number}"))


def logs(folder: Path) -> dict[str, str]:
    """The logs of the runs by name, without numbers and the folder's path."""
    paths = (folder / "output").rglob("*.log")
    return {path.name: NUMBER.sub("0", path.read_text().replace(str(folder), "FOLDER")) for path in paths}


def wrong_in_round(work: Path, folder: Path, python: Path, delays_s: list[float]) -> list[str]:
    """Run a round in a fresh folder; what is wrong with how its processes ended."""
    every_call.fresh(folder)
    pids = [start(work, folder, number, python, delay) for number, delay in enumerate(delays_s)]
    codes, wrong = [forked.finish(pid) for pid in pids], []
    every_call.wait_for_runs(folder)
    for number, code in enumerate(codes):
        err = every_call.printed(Path(f"{folder}-{number}"), "err")
        met = "can't start: another command is running it" in err
        if code != met or "Traceback" in err:
            wrong.append(f"exit code {code}: {err}")
    code, err = forked.finish(start(work, folder, 0, python)), every_call.printed(Path(f"{folder}-0"), "err")
    return wrong + ([f"once more: {code}, {err}"] if code or err != "2 of 2 are done already\n" else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedulers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work, begun = Path(tempfile.mkdtemp(prefix="lora-nlu-at-once-", dir=every_call.in_memory())), time.monotonic()
    failures, met = 0, 0
    try:
        every_call.commands(work)
        python = Path(sys.executable) if args.train else work / "python"
        alone, together, rng = work / "alone", work / "together", random.Random(args.seed)
        if wrong := wrong_in_round(work, alone, python, [0.0]):
            raise SystemExit(f"the command alone: {wrong}")
        results, texts = every_call.results(alone, False), logs(alone)
        for number in range(args.rounds):
            delays_s = [rng.random() * 0.3 for _ in range(args.schedulers)]
            wrong = wrong_in_round(work, together, python, delays_s)
            wrong += every_call.differences(every_call.results(together, False), results)
            wrong += [f"the log {name} is another's" for name, text in logs(together).items() if text != texts[name]]
            met += sum("another" in every_call.printed(Path(f"{together}-{i}"), "err") for i in range(args.schedulers))
            failures += bool(wrong)
            if wrong:
                print(f"round {number}, delays {delays_s}: {'; '.join(wrong)}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(
        f"{args.rounds} rounds of {args.schedulers} at once, {met} met a run of another, "
        f"{time.monotonic() - begun:.0f} s, {failures} failures"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
