"""Peak memory of training above the weights, side by side with transformers + PEFT; the weights; both in bf16 too.

    python benchmarks/memory.py [--only RTE] [--batches 3]

Each figure is of a fresh process: after one tiny step, which brings in libraries, thread pools and optimizer state,
its resident memory is noted; then it takes three steps on a batch of real lengths, and the highest mark in them counts.
The weights are what became resident from before the model was built until after the tiny step.
The peer pads to the longest of the batch. Medians over batches; ratios are of the same batch.
"""

from dataclasses import asdict

from common import argument_parser, draw_lengths, machine, spread, workers, write_results
from compare import Work, middle, smoked, spread_of

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
HEADER = """| work | real tokens | above the weights: ours, MB | ours in bf16, MB | peer, MB | \
ours / peer (least to most) | bf16 / fp32 | weights: ours, MB | ours in bf16, MB | bf16 / fp32 |
|---|---|---|---|---|---|---|---|---|---|"""
SIDES = ("ours", "ours-bf16", "peer")


def measure(work: Work, batches: int) -> dict:
    above: dict[str, list[float]] = {side: [] for side in SIDES}
    weights: dict[str, list[float]] = {side: [] for side in SIDES}
    tokens = []
    for seed in range(batches):
        lengths = draw_lengths(work.lengths, work.batch, seed)
        tokens.append(float(sum(lengths)))
        for side in SIDES:
            with workers(work.model, side) as (worker,):
                worker.ask(**WARM_UP)
                padded = work.peer_pads_to if side == "peer" else 0
                bytes_of = worker.ask(do="memory", lengths=lengths, padded=padded, seed=seed, steps=STEPS)
                above[side].append(bytes_of["above_weights_bytes"] / 1e6)
                weights[side].append(bytes_of["weights_bytes"] / 1e6)
                threads = worker.threads

    def ratio(of: dict[str, list[float]], side: str, other: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(of[side], of[other], strict=True)])

    return asdict(work) | {
        "ours_of_peer": ratio(above, "ours", "peer"),
        "bf16_of_fp32": ratio(above, "ours-bf16", "ours"),
        "weights_bf16_of_fp32": ratio(weights, "ours-bf16", "ours"),
        **{f"{side.replace('-', '_')}_mb": spread(values) for side, values in above.items()},
        **{f"{side.replace('-', '_')}_weights_mb": spread(values) for side, values in weights.items()},
        "real_tokens": spread(tokens),
        "machine": machine(threads, "fp32 and bf16"),
    }


def row(result: dict) -> str:
    cells = [result["name"], *(middle(result, name) for name in ("real_tokens", "ours_mb", "ours_bf16_mb", "peer_mb"))]
    cells += [spread_of(result, "ours_of_peer"), middle(result, "bf16_of_fp32", "{:.2f}")]
    cells += [middle(result, "ours_weights_mb"), middle(result, "ours_bf16_weights_mb")]
    return f"| {' | '.join(cells)} | {middle(result, 'weights_bf16_of_fp32', '{:.2f}')} |"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--batches", type=int, default=3)
    args = parser.parse_args()
    works = [work for work in WORKS if args.only in work.name]
    if args.smoke:
        works, args.batches = [smoked(work) for work in works[:1]], 1
    print(HEADER)
    results = []
    for work in works:
        results.append(measure(work, args.batches))
        print(row(results[-1]), flush=True)
    write_results(args, "memory", results)


if __name__ == "__main__":
    main()
