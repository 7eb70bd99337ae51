"""What it costs to share a step among processes of one machine, beside transformers + PEFT in as many.

    python benchmarks/processes.py [--rounds 3]

RoBERTa-base's shape with random weights, sentence pairs, 16 examples a step, as run_glue.py's own commands: one process
with two threads; the same with its batch made up of two; two processes of one thread each under DDP and FSDP2 (gloo).
The peer is startup.py's, under torchrun with DDP. All end with `train_runtime`, the seconds of 12 steps, the first one
with its caches included; commands take turns.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import HERE, RESULTS, machine, spread
from startup import TRAINING, commands, peer, write_model, write_pairs

STEPS, BATCH = 12, 16
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FSDP = ["--fsdp", "--fsdp_config", str(HERE.parent / "configs" / "fsdp2.json")]
# what: launcher, threads, flags beside the common ones
WAYS: dict[str, tuple[list[str], int, list[str]]] = {
    "one process, two threads": ([], 2, []),
    "the same, 2 x 8 accumulated": (
        [],
        2,
        ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"],
    ),
    "two processes, DDP": (TWO, 1, ["--per_device_train_batch_size", "8"]),
    "two processes, FSDP2": (TWO, 1, ["--per_device_train_batch_size", "8", *FSDP]),
}
PEER = "transformers + PEFT, two processes, DDP"
HEADER = """| way | s a step (least to most) | of one process's time |
|---|---|---|"""


def seconds_a_step(command: list[str], threads: int, cache: Path) -> float:
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | settings | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = re.findall(r"'train_runtime': '?([0-9.]+)", done.stdout)  # ours says it with every loss, the sum last
    if done.returncode or not said:
        raise SystemExit(done.stdout + done.stderr)
    return float(said[-1]) / STEPS


def measure(rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "train.csv")
        write_model(folder / "model")
        _, *ours = commands(folder)[0]
        todo = {way: ([*launcher, *ours, *flags], threads) for way, (launcher, threads, flags) in WAYS.items()}
        todo[PEER] = ([*TWO, __file__, "--peer", str(folder)], 1)
        times: dict[str, list[float]] = {way: [] for way in todo}
        for counted in range(1 + rounds):
            for way, (command, threads) in todo.items():
                seconds = seconds_a_step([sys.executable, *command], threads, folder / "cache")
                if counted:  # the first fills caches
                    times[way].append(seconds)
    return {"seconds_a_step": {way: spread(taken) for way, taken in times.items()}, "machine": machine(2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="be the other side, on the files of this folder")
    args = parser.parse_args()
    TRAINING.update(max_steps=STEPS, per_device_train_batch_size=BATCH // 2 if args.peer else BATCH, use_cpu=True)
    if args.peer:
        peer(args.peer)
        return
    result = measure(args.rounds)
    print(HEADER)
    alone = next(iter(result["seconds_a_step"].values()))["median"]
    for way, taken in result["seconds_a_step"].items():
        share = f"{100 * taken['median'] / alone:.0f} %"
        print(f"| {way} | {taken['median']:.2f} ({taken['min']:.2f} to {taken['max']:.2f}) | {share} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "processes.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
