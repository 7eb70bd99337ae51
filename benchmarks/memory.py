"""Peak memory of training above the weights, side by side with transformers + PEFT.

    python benchmarks/memory.py [--only RTE] [--batches 3]

Each figure is of a fresh process: after one tiny step, which brings in libraries, thread pools and optimizer state,
its resident memory is noted; then it takes three steps on a batch of real lengths, and the highest mark in them counts.
The peer pads to the longest of the batch. Medians over batches; ratios are of the same batch.
"""

import argparse
import json
from dataclasses import asdict

from common import RESULTS, draw_lengths, machine, spread, workers
from compare import Work

STEPS = 3
WARM_UP = {"do": "train", "lengths": [4, 4], "padded": 0, "seed": 0}
ROBERTA, DEBERTA, LONGEST = "roberta-base", "deberta-base", 0
WORKS = [
    Work("RTE B16", ROBERTA, "rte", 16, LONGEST),
    Work("SST-2 B16", ROBERTA, "sst2", 16, LONGEST),
    Work("CoLA B32", ROBERTA, "cola", 32, LONGEST),
    Work("64 tokens each B16", ROBERTA, "equal-64", 16, LONGEST),
    Work("256 tokens each B8", ROBERTA, "equal-256", 8, LONGEST),
    Work("DeBERTa RTE B16", DEBERTA, "rte", 16, LONGEST),
]
HEADER = """| work | real tokens | ours, MB | peer, MB | ours / peer (least to most) |
|---|---|---|---|---|"""


def measure(work: Work, batches: int) -> dict:
    tokens, ours_mb, peer_mb = [], [], []
    for seed in range(batches):
        lengths = draw_lengths(work.lengths, work.batch, seed)
        tokens.append(float(sum(lengths)))
        with workers(work.model, "ours", "peer") as sides:
            threads = sides[0].threads
            for worker, taken, padded in zip(sides, (ours_mb, peer_mb), (0, work.peer_pads_to), strict=True):
                worker.ask(**WARM_UP)
                got = worker.ask(do="memory", lengths=lengths, padded=padded, seed=seed, steps=STEPS)
                taken.append((got["peak_bytes"] - got["weights_bytes"]) / 1e6)
    return asdict(work) | {
        "ours_of_peer": spread([mine / theirs for mine, theirs in zip(ours_mb, peer_mb, strict=True)]),
        "ours_mb": spread(ours_mb),
        "peer_mb": spread(peer_mb),
        "real_tokens": spread(tokens),
        "machine": machine(threads),
    }


def row(result: dict) -> str:
    ratio, low, high = (result["ours_of_peer"][key] for key in ("median", "min", "max"))
    tokens, ours, peer = (f"{result[key]['median']:.0f}" for key in ("real_tokens", "ours_mb", "peer_mb"))
    return f"| {result['name']} | {tokens} | {ours} | {peer} | {ratio:.2f} ({low:.2f} to {high:.2f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this text; nothing is then written to file")
    parser.add_argument("--batches", type=int, default=3)
    args = parser.parse_args()
    print(HEADER)
    results = []
    for work in WORKS:
        if args.only in work.name:
            results.append(measure(work, args.batches))
            print(row(results[-1]), flush=True)
    if not args.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "memory.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
