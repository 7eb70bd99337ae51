"""What each lever is worth: a training or evaluation step with and without it, in turn, on the same batches.

    python benchmarks/levers.py [--pairs 5]

Prints by how many percent a step takes longer without the lever, the median over pairs. `onednn` and `kernels` are the
dense products and all of kernels.cpp; the others are parts of the latter.
"""

import argparse
import json

from common import RESULTS, draw_lengths, spread, workers

LEVERS = ["onednn", "kernels", "attention", "norm", "low-rank", "dropout", "gelu"]
WORKS = [
    ("train RTE B16", "train", "roberta-base", "rte", 16),
    ("train SST-2 B16", "train", "roberta-base", "sst2", 16),
    ("evaluate SST-2 B32", "evaluate", "roberta-base", "sst2", 32),
    ("train DeBERTa RTE B16", "train", "deberta-base", "rte", 16),
]
WARM = 1


def slower_without(lever: str, do: str, model: str, task: str, batch: int, pairs: int) -> dict[str, float]:
    percent = []
    with workers(model, "ours", f"ours-without-{lever}") as (ours, without):
        for pair in range(WARM + pairs):
            request = {"do": do, "lengths": draw_lengths(task, batch, pair), "padded": 0, "seed": pair}
            ratio = without.ask(**request)["seconds"] / ours.ask(**request)["seconds"]
            if pair >= WARM:
                percent.append(100 * (ratio - 1))
    return spread(percent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    print("| without | " + " | ".join(name for name, *_ in WORKS) + " |")
    print("|---|" + "---|" * len(WORKS))
    results: dict[str, dict] = {}
    for lever in LEVERS:
        results[lever] = {name: slower_without(lever, *work, pairs) for name, *work in WORKS}
        cells = [f"{result['median']:+.0f} %" for result in results[lever].values()]
        print(f"| {lever} | {' | '.join(cells)} |", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "levers.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
