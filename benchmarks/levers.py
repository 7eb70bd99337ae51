"""What each lever is worth: a step with and without it, in turn, on the same batches.

    python benchmarks/levers.py [--pairs 5]

Prints by how many percent a step takes longer without the lever, the median over rounds. `onednn` and `kernels` are the
dense products and all of kernels.cpp; the others are parts of the latter.
"""

import argparse
import json

from common import RESULTS, draw_lengths, spread, workers

LEVERS = ["onednn", "kernels", "attention", "low-rank", "dropout"]
WORKS = [  # name, what, task, batch
    ("train RTE B16", "train", "rte", 16),
    ("train SST-2 B16", "train", "sst2", 16),
    ("evaluate SST-2 B32", "evaluate", "sst2", 32),
]
MODELS = ["roberta-base", "deberta-base"]
WARM = 1


def slower_without(model: str, rounds: int) -> dict[str, dict[str, dict]]:
    """Of each lever and work: the percent that a step takes longer."""
    percent: dict = {lever: {name: [] for name, *_ in WORKS} for lever in LEVERS}
    with workers(model, "ours", *(f"ours-without-{lever}" for lever in LEVERS)) as (ours, *without):
        for name, do, task, batch in WORKS:
            for n in range(WARM + rounds):
                request = {"do": do, "lengths": draw_lengths(task, batch, n), "padded": 0, "seed": n}
                with_all = ours.ask(**request)["seconds"]
                for lever, worker in zip(LEVERS, without, strict=True):
                    ratio = worker.ask(**request)["seconds"] / with_all
                    if n >= WARM:
                        percent[lever][name].append(100 * (ratio - 1))
    return {lever: {name: spread(values) for name, values in by.items()} for lever, by in percent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    rounds = parser.parse_args().pairs
    results = {model: slower_without(model, rounds) for model in MODELS}
    columns = [(model, name) for model in MODELS for name, *_ in WORKS]
    print("| without | " + " | ".join(f"{model}, {name}" for model, name in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for lever in LEVERS:
        cells = [f"{results[model][lever][name]['median']:+.0f} %" for model, name in columns]
        print(f"| {lever} | {' | '.join(cells)} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "levers.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
