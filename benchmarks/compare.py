"""Ours and a peer in turn, pair by pair, with the machine's limit beside them: what train_step.py and eval.py run."""

import argparse
import json
from dataclasses import asdict, dataclass

from common import RESULTS, draw_lengths, machine, spread, workers

WARM = 1  # pairs not counted: memory is still being taken from the system


@dataclass
class Work:
    """One row of the table: a batch of `batch` sequences of a task's lengths, the peer's padded to `peer_pads_to`."""

    name: str
    model: str
    lengths: str
    batch: int
    peer_pads_to: int  # 0: the longest of the batch, the best a user has


def compare(do: str, work: Work, pairs: int) -> dict:
    ratios, of_torch, of_fastest, tokens, ours_s, peer_s, rates = [], [], [], [], [], [], []
    with workers(work.model, "ours", "peer", "limit") as (ours, peer, limit):
        for pair in range(WARM + pairs):
            lengths = draw_lengths(work.lengths, work.batch, pair)
            request = {"do": do, "lengths": lengths, "seed": pair}
            mine = ours.ask(**request, padded=0)["seconds"]
            theirs = peer.ask(**request, padded=work.peer_pads_to)["seconds"]
            if pair < WARM:
                continue
            best = limit.ask(**request)
            ratios.append(theirs / mine)
            of_torch.append(best["torch_s"] / mine)
            of_fastest.append(best["fastest_s"] / mine)
            rates.append((best["flops"] / best["torch_s"] / 1e9, best["flops"] / best["fastest_s"] / 1e9))
            tokens.append(sum(lengths))
            ours_s.append(mine)
            peer_s.append(theirs)
        threads = ours.threads
    return asdict(work) | {
        "times_as_fast": spread(ratios),
        "share_of_torch_matmul": spread(of_torch),
        "share_of_fastest_matmul": spread(of_fastest),
        "torch_matmul_gflops": spread([rate for rate, _ in rates]),
        "fastest_matmul_gflops": spread([rate for _, rate in rates]),
        "ours_s": spread(ours_s),
        "peer_s": spread(peer_s),
        "real_tokens": spread([float(n) for n in tokens]),
        "machine": machine(threads),
    }


def row(result: dict) -> str:
    ratio, low, high = (result["times_as_fast"][key] for key in ("median", "min", "max"))
    shares = [f"{100 * result[f'share_of_{kind}_matmul']['median']:.0f} %" for kind in ("torch", "fastest")]
    rates = [f"{result[f'{kind}_matmul_gflops']['median']:.0f}" for kind in ("torch", "fastest")]
    return (
        f"| {result['name']} | {result['real_tokens']['median']:.0f} | {1e3 * result['ours_s']['median']:.0f} | "
        f"{1e3 * result['peer_s']['median']:.0f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {' | '.join(shares)} | "
        f"{' / '.join(rates)} |"
    )


HEADER = """| work | real tokens | ours, ms | peer, ms | times as fast (least to most) | of torch's matmul rate | \
of the fastest matmul's | those rates, GFLOP/s |
|---|---|---|---|---|---|---|---|"""


def main(do: str, works: list[Work], doc: str | None) -> None:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this text; nothing is then written to file")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    print(HEADER)
    results = []
    for work in works:
        if args.only in work.name:
            results.append(compare(do, work, args.pairs))
            print(row(results[-1]), flush=True)
    if not args.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{do}.json").write_text(json.dumps(results, indent=1) + "\n")
