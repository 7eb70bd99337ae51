"""Where the time of a step goes, operation by operation.

    python benchmarks/profile_step.py [--side ours-bf16] [--model deberta-base] [--task rte] [--do evaluate]

Prints a Markdown table of the operations' own time, in percent of all of it, over three steps after two warm ones.
"""

import argparse

from common import draw_lengths
from sides import Side, configure, make_batch, new_side
from torch.profiler import ProfilerActivity, profile
from worker import ANSWERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["ours", "ours-bf16", "peer", "peer-bf16"], default="ours")
    parser.add_argument("--model", default="roberta-base")
    parser.add_argument("--task", default="rte")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--do", choices=["train", "evaluate"], default="train")
    args = parser.parse_args()
    config = configure(args.model)
    model, autocast = new_side(args.side, config)
    side = Side(model, config.pad_token_id)
    batches = [make_batch(draw_lengths(args.task, args.batch, n), 0, n, side.pad) for n in range(3)]
    step = getattr(side, args.do)
    for batch in batches[:2]:
        step(batch, autocast)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for batch in batches:
            step(batch, autocast)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print("| operation | % of the step | calls a step |\n|---|---|---|", file=ANSWERS)
    for event in events[:14]:
        print(f"| `{event.key}` | {100 * event.self_cpu_time_total / total:.1f} | {event.count // 3} |", file=ANSWERS)


if __name__ == "__main__":
    main()
