"""Kill training again and again at random moments, resume it by the same command, and compare with a run left alone.

    OMP_NUM_THREADS=1 nice python tests/stress/kill_and_resume.py --kills 200 [--seed 0] [--work DIR]

A tiny RoBERTa trains 60 steps on RTE in a process of its own, saves and evaluates at every step or every second, and is
ended by SIGKILL: at a moment spread over the attempt, inside a save, right after one (while old checkpoints are
removed), or as soon as it writes its first file. After each kill: every checkpoint that `complete_checkpoints` lists
loads completely and equals, bit for bit, that of the run left alone at that step; so does the best model; the one that
resume takes is the last. After each finished run: final and best adapter, every evaluation and the step count are equal
to those of the run left alone. A SIGKILL leaves what the kernel has taken: a power cut, which loses that, isn't tested.

The last line sums up; exit code 1 if anything failed. Failures are printed as they occur; 100 of them end it.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import forked  # noqa: E402
import torch  # noqa: E402
from transformers.trainer_pt_utils import safe_globals  # noqa: E402

from lora_nlu.adapters.reading import read_adapter
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.training import checkpoints
from lora_nlu.training.checkpoints import STATE, complete_checkpoints
from lora_nlu.training.output_folder import find_checkpoint

STEPS = 60
SAVING = checkpoints.SAVING
FILES = {
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA, STATE, "optimizer.pt", "scheduler.pt", "rng_state.pth"
}  # fmt: skip
MOMENTS = ("any time", "in a save", "in a save", "in a save", "after a save", "at the start")  # the last: new runs only


@dataclass
class Tally:
    kills: int = 0
    inside: int = 0  # a .saving folder was found after the kill
    removing: int = 0  # a checkpoint folder lacked files after the kill: old ones were being removed
    finished: int = 0
    failures: list[str] = field(default_factory=list)
    moments: Counter = field(default_factory=Counter)

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print(f"FAILED after {self.kills} kills: {what.strip()}", flush=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Tensors and numbers in nested lists and dicts, by where they are."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors(item, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in tensors(item, f"{name}/{i}").items()}
    return {name: value}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def evaluations(state: dict[str, Any]) -> list[tuple]:
    """(step, loss, accuracy) of every evaluation, in order."""
    return [(e["step"], e["eval_loss"], e["eval_accuracy"]) for e in state["log_history"] if "eval_loss" in e]


def differences(checkpoint: Path, alone: Path) -> list[str]:
    """What is wrong with a checkpoint, given the folder of the run left alone, which kept all of its own."""
    wrong = []
    if missing := FILES - {path.name for path in checkpoint.iterdir()}:
        return [f"{checkpoint.name} lacks {', '.join(sorted(missing))}"]
    want = alone / checkpoint.name
    if not read_adapter(str(checkpoint)).ranks:
        wrong.append("no LoRA matrices")
    if digest(checkpoint / ADAPTER_WEIGHTS) != digest(want / ADAPTER_WEIGHTS):
        wrong.append("another adapter")
    with safe_globals():
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            got, right = (tensors(torch.load(folder / file, weights_only=True)) for folder in (checkpoint, want))
            if got.keys() != right.keys():
                wrong.append(f"{file}: other contents")
                continue
            wrong += [f"{file}: {key} differs" for key in right if not same(got[key], right[key])]
    got, right = (json.loads((folder / STATE).read_text()) for folder in (checkpoint, want))
    if evaluations(got) != evaluations(right) or got["best_global_step"] != right["best_global_step"]:
        wrong.append("other evaluations or another best step")
    return [f"{checkpoint.name}: {what}" for what in wrong]


def inspect(output: str, alone: str) -> dict[str, Any]:
    """What a killed run left: what is wrong, the checkpoint that resume takes, and those that lack files."""
    folder, wrong = Path(output), []
    complete = complete_checkpoints(output)
    for checkpoint in complete:
        try:
            wrong += differences(checkpoint, Path(alone))
        except Exception as e:  # whatever it is, this checkpoint doesn't load
            wrong.append(f"{checkpoint.name} is listed as complete and doesn't load: {type(e).__name__}: {e}")
    chosen = find_checkpoint(output, None)
    if chosen != (str(complete[-1]) if complete else None):
        wrong.append(f"resume takes {chosen}, the last complete one is {complete[-1:]}")
    if complete:
        best = json.loads((complete[-1] / STATE).read_text())["best_model_checkpoint"]
        if not best or Path(best) not in complete:
            wrong.append(f"the best model, {best}, is not among the complete checkpoints")
    torn = [p.name for p in folder.glob("checkpoint-*") if FILES - {file.name for file in p.iterdir()}]
    return {"wrong": wrong, "chosen": chosen, "torn": torn}


def compare(output: str, alone: str, limit: int = STEPS) -> list[str]:
    """How a finished run, which keeps `limit` checkpoints, differs from the one left alone."""
    folder, want = Path(output), Path(alone)
    wrong = inspect(output, alone)["wrong"]
    if digest(folder / ADAPTER_WEIGHTS) != digest(want / ADAPTER_WEIGHTS):
        wrong.append("another final adapter")
    got, right = (json.loads((f / STATE).read_text()) for f in (folder, want))
    if got["global_step"] != STEPS or evaluations(got) != evaluations(right):
        wrong.append("other evaluations or another number of steps")
    bests = [Path(state["best_model_checkpoint"]) for state in (got, right)]
    if bests[0].name != bests[1].name or digest(bests[0] / ADAPTER_WEIGHTS) != digest(bests[1] / ADAPTER_WEIGHTS):
        wrong.append("another best model")
    scores = [json.loads((f / "eval_results.json").read_text()) for f in (folder, want)]
    if any(scores[0][key] != scores[1][key] for key in ("eval_loss", "eval_accuracy", "eval_samples")):
        wrong.append("other final scores")
    if len(complete_checkpoints(output)) > limit:
        wrong.append("more checkpoints than --save_total_limit")
    left = [path for path in folder.rglob("*") if path.name == SAVING or path.name.endswith(".partial")]
    return wrong + [f"left behind: {path.relative_to(folder)}" for path in left]


def wait_until(condition: Callable[[], bool], pid: int, seconds: float) -> bool:
    """Whether the condition came true; False if the process ended or the time was up first."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or ended(pid):
            return False
        time.sleep(0.0002)
    return True


def ended(pid: int) -> bool:
    """Whether a child has ended; it stays a zombie until `forked.finish`."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_some_time(pid: int, output: Path, rng: random.Random, moment: str) -> bool:
    """Wait for the moment and kill; False if the process ended by itself before."""
    saving = output / SAVING
    if moment == "at the start":
        wait_until(lambda: output.is_dir() and any(os.scandir(output)), pid, 60)
        time.sleep(rng.choice((0, rng.uniform(0, 0.003), rng.uniform(0, 0.1))))
    elif moment == "any time":
        time.sleep(rng.uniform(0, 0.5))
        wait_until(lambda: False, pid, rng.uniform(0, 3))
    else:
        length = 0.01
        for _ in range(rng.randint(1, 15)):
            wait_until(saving.exists, pid, 60)
            begun = time.monotonic()
            wait_until(lambda: not saving.exists(), pid, 60)
            length = time.monotonic() - begun
        if moment == "in a save":
            wait_until(saving.exists, pid, 60)
            time.sleep(rng.uniform(0, length))
        else:
            time.sleep(rng.choice((0, rng.uniform(0, 0.004))))
    alive = not ended(pid)
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError as e:  # it has no session yet, or is gone
        if e.errno != errno.ESRCH:
            raise
        os.kill(pid, signal.SIGKILL)
    return alive


def printed_by(log: Path) -> str:
    return Path(f"{log}.out").read_text(errors="replace")


def one_run(work: Path, number: int, rng: random.Random, tally: Tally, most_kills: int) -> None:
    """One output folder, killed and resumed until it finishes; once there were kills enough it is left to finish."""
    save_steps = rng.choice((1, 2))
    glue, model, alone = work / "glue", work / "model", work / f"alone-{save_steps}"
    output, log = work / f"run-{number}", work / f"log-{number}"
    command = forked.flags(glue, model, output, work / f"cache-{number}", STEPS, save_steps)
    limit = rng.choice((2, 3))
    command += ["--save_total_limit", limit]
    chosen, patience = None, 40
    while True:
        pid = forked.start(command, log)
        moment = rng.choice(MOMENTS[: 6 if chosen is None else 5])
        killed = False
        if tally.kills < most_kills and patience:
            killed = kill_some_time(pid, output, rng, moment)
            patience -= 1
        code = forked.finish(pid)
        resumed = f"Resuming from {chosen}." if chosen else "Resuming"
        if code == 0 and "already trained" not in printed_by(log) and (resumed in printed_by(log)) != bool(chosen):
            tally.fail(f"run {number}: it should have been resumed from {chosen}: {printed_by(log)[:300]!r}")
        if killed and code == -signal.SIGKILL:
            tally.kills += 1
            tally.moments[moment] += 1
            tally.inside += (output / SAVING).exists()
            if output.is_dir():
                found = forked.call(inspect, str(output), str(alone))
                chosen = found["chosen"]
                tally.removing += bool(found["torn"])
                for wrong in found["wrong"]:
                    tally.fail(f"run {number}, killed {moment}: {wrong} (resume takes {chosen and Path(chosen).name})")
            continue
        if code:
            tally.fail(f"run {number}: exit code {code}: {Path(f'{log}.err').read_text()[-300:]}")
            return
        tally.finished += 1
        for wrong in forked.call(compare, str(output), str(alone), limit):
            tally.fail(f"run {number}, finished: {wrong}")
        shutil.rmtree(output)
        shutil.rmtree(work / f"cache-{number}")
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a folder for runs and logs, kept; default: a temporary one")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="lora-nlu-kill-"))
    work.mkdir(parents=True, exist_ok=True)
    begun, rng, tally = time.monotonic(), random.Random(args.seed), Tally()
    glue, model = forked.prepare(work)
    for save_steps in (1, 2):
        alone = work / f"alone-{save_steps}"
        shutil.rmtree(alone, ignore_errors=True)
        command = forked.flags(glue, model, alone, work / "cache", STEPS, save_steps)
        if code := forked.finish(forked.start(command, work / "log-alone")):
            print(Path(f"{work / 'log-alone'}.err").read_text())
            print(f"the run left alone ended with {code}")
            return 1
    number = 0
    while tally.kills < args.kills and len(tally.failures) < 100:
        for earlier in (work / f"run-{number}", work / f"cache-{number}"):
            shutil.rmtree(earlier, ignore_errors=True)
        one_run(work, number, rng, tally, args.kills)
        number += 1
    if not args.work:
        shutil.rmtree(work)
    moments = ", ".join(f"{count} {moment}" for moment, count in sorted(tally.moments.items()))
    print(
        f"{tally.kills} kills ({moments}), {tally.inside} inside a save, {tally.removing} while checkpoints were being "
        f"removed, {tally.finished} runs finished, {time.monotonic() - begun:.0f} s, {len(tally.failures)} failures"
    )
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
