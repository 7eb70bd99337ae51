"""Ours and a peer in turn, pair by pair, with the machine's limit beside them: what train_step.py and eval.py run."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import argument_parser, draw_lengths, machine, spread, workers, write_results

from lora_nlu.ops.frozen import has_bf16_products

WARM = 1  # pairs not counted: memory is still being taken from the system
PEER = ("peer", "peer-bf16")


@dataclass
class Work:
    """One row of the table: a batch of `batch` sequences of a task's lengths, the peer's padded to `peer_pads_to`."""

    name: str
    model: str
    lengths: str
    batch: int
    peer_pads_to: int  # 0: the longest of the batch, the best a user has
    is_in_bf16_table: bool = False


def compare(do: str, work: Work, pairs: int, bf16: bool, earlier: Path | None = None) -> dict:
    """Figures of ours and the peer in fp32, and with `bf16` of both in bf16 and of ours in an earlier source tree."""
    sides = ["ours", *(["ours-bf16"] * bf16), *(["earlier"] * (earlier is not None)), "peer", *(["peer-bf16"] * bf16)]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    limits, tokens = [], []
    with workers(work.model, *sides, "limit", earlier=earlier) as (*started, limit):
        for pair in range(WARM + pairs):
            lengths = draw_lengths(work.lengths, work.batch, pair)
            request = {"do": do, "lengths": lengths, "seed": pair}
            taken = [
                worker.ask(**request, padded=work.peer_pads_to if side in PEER else 0)["seconds"]
                for side, worker in zip(sides, started, strict=True)
            ]
            if pair < WARM:
                continue
            limits.append(limit.ask(**request, bf16=bf16))
            tokens.append(float(sum(lengths)))
            for side, value in zip(sides, taken, strict=True):
                seconds[side].append(value)
        threads = started[0].threads

    def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
        return spread([a / b for a, b in zip(slow, fast, strict=True)])

    def seconds_of_limit(kind: str) -> list[float]:
        return [answer[f"{kind}_s"] for answer in limits]

    def gflops(kind: str) -> dict[str, float]:
        return spread([answer["flops"] / answer[f"{kind}_s"] / 1e9 for answer in limits])

    ours = seconds["ours"]
    result = asdict(work) | {
        "times_as_fast": ratio(seconds["peer"], ours),
        "share_of_torch_matmul": ratio(seconds_of_limit("torch"), ours),
        "share_of_fastest_matmul": ratio(seconds_of_limit("fastest"), ours),
        **{f"{kind}_matmul_gflops": gflops(kind) for kind in ("torch", "onednn", "packed", "fastest")},
        **{f"{side.replace('-', '_')}_s": spread(values) for side, values in seconds.items()},
        "real_tokens": spread(tokens),
        "machine": machine(threads, "fp32 and bf16" if bf16 else "fp32"),
    }
    if bf16:
        result |= {
            "bf16_by_fp32": ratio(ours, seconds["ours-bf16"]),
            "bf16_by_peer_fp32": ratio(seconds["peer"], seconds["ours-bf16"]),
            "bf16_by_peer_bf16": ratio(seconds["peer-bf16"], seconds["ours-bf16"]),
            "share_of_bf16_matmul": ratio(seconds_of_limit("bf16"), seconds["ours-bf16"]),
            "bf16_matmul_gflops": gflops("bf16"),
        }
    if earlier:
        result["fp32_by_earlier"] = ratio(seconds["earlier"], ours)
        if bf16:
            result["bf16_by_earlier"] = ratio(seconds["earlier"], seconds["ours-bf16"])
    return result


def middle(result: dict, name: str, form: str = "{:.0f}", factor: float = 1.0) -> str:
    """The median of a figure; "-" if it was not measured."""
    return form.format(factor * result[name]["median"]) if name in result else "-"


def spread_of(result: dict, name: str) -> str:
    if name not in result:
        return "-"
    return "{median:.2f} ({min:.2f} to {max:.2f})".format(**result[name])


def row(result: dict) -> str:
    shares = [middle(result, f"share_of_{kind}_matmul", "{:.0f} %", 100) for kind in ("torch", "fastest")]
    rates = [middle(result, f"{kind}_matmul_gflops") for kind in ("torch", "fastest")]
    return (
        f"| {result['name']} | {middle(result, 'real_tokens')} | {middle(result, 'ours_s', factor=1e3)} | "
        f"{middle(result, 'peer_s', factor=1e3)} | {spread_of(result, 'times_as_fast')} | {' | '.join(shares)} | "
        f"{' / '.join(rates)} |"
    )


HEADER = """| work | real tokens | ours, ms | peer, ms | times as fast (least to most) | of torch's matmul rate | \
of the fastest matmul's | those rates, GFLOP/s |
|---|---|---|---|---|---|---|---|"""


def row_of_bf16(result: dict) -> str:
    times = [middle(result, f"{side}_s", factor=1e3) for side in ("earlier", "ours", "ours_bf16", "peer", "peer_bf16")]
    ratios = [spread_of(result, f"bf16_by_{of}") for of in ("earlier", "fp32", "peer_bf16")]
    shares = [middle(result, f"share_of_{kind}_matmul", "{:.0f} %", 100) for kind in ("fastest", "bf16")]
    rates = [middle(result, f"{kind}_matmul_gflops") for kind in ("torch", "onednn", "packed", "bf16")]
    cells = [result["name"], middle(result, "real_tokens"), *times, *ratios, *shares, " / ".join(rates)]
    return f"| {' | '.join(cells)} |"


HEADER_OF_BF16 = """| work | real tokens | earlier, fp32, ms | ours, fp32, ms | ours, bf16, ms | peer, fp32, ms | \
peer, bf16, ms | ours in bf16, times as fast as earlier (least to most) | as ours in fp32 | as the peer in bf16 | \
ours fp32 of the fastest fp32 matmul's rate | ours bf16 of the packed bf16 matmul's | \
torch / oneDNN / packed / bf16 packed, GFLOP/s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def smoked(work: Work) -> Work:
    """The same work of a tiny model, on 4 sequences."""
    return replace(work, model=f"tiny-{work.model}", batch=4, peer_pads_to=0)


def main(do: str, works: list[Work], doc: str | None) -> None:
    parser = argument_parser(doc)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="the rows that are measured in bf16 and fp32 side by side")
    parser.add_argument("--earlier", type=Path, metavar="FOLDER", help="ours of another source tree too, in fp32")
    args = parser.parse_args()
    works = [work for work in works if args.only in work.name and (work.is_in_bf16_table or not args.bf16)]
    if args.smoke:
        works, args.pairs = [smoked(work) for work in works[:1]], 1
    if args.bf16 and not has_bf16_products():
        print("This processor has no fast products in bf16: nothing is measured.")
        return
    print(HEADER_OF_BF16 if args.bf16 else HEADER)
    results = []
    for work in works:
        results.append(compare(do, work, args.pairs, args.bf16, args.earlier))
        print((row_of_bf16 if args.bf16 else row)(results[-1]), flush=True)
    write_results(args, f"{do}_bf16" if args.bf16 else do, results)
