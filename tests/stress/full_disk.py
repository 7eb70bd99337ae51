"""Train onto a disk that fills up in mid-save: earlier saves stay complete, and with free space the run resumes.

    OMP_NUM_THREADS=1 nice python tests/stress/full_disk.py --disks 20 [--seed 0]

As root: the output folder of each run is a tmpfs of a size of its own, 200 to 600 KiB, on which checkpoints of about
80 KiB pile up, so that the disk is full in another file each time. Then the run must have ended with code 1, a message
of three lines at most without a traceback that names the last complete checkpoint, and nothing of the broken save on
the disk; every checkpoint must load and equal that of a run with space. Given space, the same command must finish,
bit-equal.

The last line sums up; exit code 1 if anything failed, 77 if no tmpfs can be mounted here.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forked  # noqa: E402
import kill_and_resume  # noqa: E402


def mount(folder: Path, options: str) -> str:
    """Mount a tmpfs; what went wrong, or an empty string."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    return done.stderr.strip() or ("" if done.returncode == 0 else f"exit code {done.returncode}")


def fill(command: list[object], disk: Path, alone: Path, log: Path) -> tuple[list[str], str]:
    """Run until the disk is full, then with room; what was wrong, and at which file the disk was full."""
    code, wrong = forked.finish(forked.start(command, log)), []
    err = Path(f"{log}.err").read_text()
    message = err[err.find("run_glue.py: error:") :].strip()
    if code != 1 or "Traceback" in err or "run_glue.py: error:" not in err or message.count("\n") > 2:
        return [f"exit code {code}, {err[-1500:]}"], ""
    found = forked.call(kill_and_resume.inspect, str(disk), str(alone))
    wrong += found["wrong"] + [f"{name} lacks files" for name in found["torn"]]
    if not found["chosen"] or f"{found['chosen']} is complete" not in message:
        wrong.append(f"the last complete checkpoint is {found['chosen']}, the message says: {message}")
    left = [path.name for path in disk.iterdir() if path.name.startswith(".")]
    wrong += [f"left behind: {name}" for name in left]
    if problem := mount(disk, "remount,size=64m"):
        return [*wrong, problem], message
    if code := forked.finish(forked.start(command, log)):
        return [*wrong, f"with free space: exit code {code}, {Path(f'{log}.err').read_text()[-600:]}"], message
    if f"Resuming from {found['chosen']}." not in kill_and_resume.printed_by(log):
        wrong.append("with free space, it did not resume from the last complete checkpoint")
    # without --save_total_limit all checkpoints are kept
    return wrong + forked.call(kill_and_resume.compare, str(disk), str(alone)), message


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disks", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun, rng, failures, messages = time.monotonic(), random.Random(args.seed), 0, set()
    work = Path(tempfile.mkdtemp(prefix="lora-nlu-disk-"))
    disk = work / "disk"
    disk.mkdir()
    try:
        if problem := mount(disk, "size=1m"):
            print(f"no tmpfs can be mounted here: {problem}")
            return 77
        subprocess.run(["umount", disk], check=True)
        glue, model = forked.prepare(work)
        flags_by_folder = {}
        for output in (work / "alone", disk):
            flags_by_folder[output] = forked.flags(glue, model, output, work / "cache", kill_and_resume.STEPS, 6)
        if code := forked.finish(forked.start(flags_by_folder[work / "alone"], work / "log")):
            print(f"the run with room ended with {code}: {Path(f'{work}/log.err').read_text()[-2000:]}")
            return 1
        for number in range(args.disks):
            size = 4 * rng.randint(50, 150)
            if problem := mount(disk, f"size={size}k"):
                print(problem)
                return 1
            try:
                wrong, message = fill(flags_by_folder[disk], disk, work / "alone", work / "log")
            finally:
                subprocess.run(["umount", disk], check=True)
            messages.add(message.replace(str(disk), "DISK"))
            failures += bool(wrong)
            for what in wrong:
                print(f"FAILED on disk {number} of {size} KiB: {what}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(
        f"{args.disks} disks filled, {len(messages)} different messages, {time.monotonic() - begun:.0f} s, "
        f"{failures} failures"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
