"""What a training step of RoBERTa-base costs against tokens, sequence length, layers and threads.

    python benchmarks/scaling.py            # minutes; writes results/scaling.json and results/scaling.png
    python benchmarks/scaling.py --plot     # the figure again, from the file

Medians of 5 steps after 2 that are not counted. The points of a panel take turns, so that a machine that slows down
slows all of them. The ideal: proportional to tokens and layers, constant in the length at a constant number of tokens,
1/threads; beside the length also the time of the step's dense products alone, by the fastest matmul there is.
"""

import argparse
import json
import os
from contextlib import ExitStack, closing
from typing import Any

from common import RESULTS, Worker, machine, spread

MODEL, WARM, STEPS = "roberta-base", 2, 5
EACH = 64  # tokens of a sequence, unless the panel is about them
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS, TOKENS = (16, 32, 64, 128, 256, 512), 2048
LAYERS = (1, 2, 4, 8, 12)
BATCH = 16  # of the panels on layers and threads
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # told apart by colour-blind readers too


def measure(points: list[tuple[int, Worker, list[int]]]) -> list[dict]:
    """Seconds of a step at each point: place on the axis, process that takes the steps, lengths of its batch."""
    times: list[list[float]] = [[] for _ in points]
    for step in range(WARM + STEPS):
        for (_, worker, lengths), taken in zip(points, times, strict=True):
            taken.append(worker.ask(do="train", lengths=lengths, padded=0, seed=step)["seconds"])
    return [{"x": point[0], "seconds": spread(taken[WARM:])} for point, taken in zip(points, times, strict=True)]


def run() -> dict[str, Any]:
    results: dict[str, Any] = {}
    with closing(Worker("ours", MODEL).ready()) as worker, closing(Worker("limit", MODEL).ready()) as limit:
        results["machine"] = machine(worker.threads)
        results["tokens"] = measure([(batch * EACH, worker, [EACH] * batch) for batch in BATCHES])
        batches = [[length] * (TOKENS // length) for length in LENGTHS]
        results["length"] = measure([(lengths[0], worker, lengths) for lengths in batches])
        for point, lengths in zip(results["length"], batches, strict=True):
            point["limit_s"] = limit.ask(do="train", lengths=lengths)["fastest_s"]
    cpus = len(os.sched_getaffinity(0))
    threads = sorted({cpus, *(2**n for n in range(cpus.bit_length()))})
    with ExitStack() as stack:
        points = []
        for layers in LAYERS:
            points.append(
                (layers, stack.enter_context(closing(Worker("ours", MODEL, str(layers)).ready())), [EACH] * BATCH)
            )
        results["layers"] = measure(points)
    with ExitStack() as stack:
        points = []
        for n in threads:
            points.append((n, stack.enter_context(closing(Worker("ours", MODEL, threads=n).ready())), [EACH] * BATCH))
        results["threads"] = measure(points)
    return results


def table(results: dict[str, Any]) -> str:
    lines = ["| against | at | s a step (least to most) |", "|---|---|---|"]
    for panel in ("tokens", "length", "layers", "threads"):
        for point in results[panel]:
            median, low, high = (point["seconds"][key] for key in ("median", "min", "max"))
            lines.append(f"| {panel} | {point['x']} | {median:.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join(lines)


def plot(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    pyplot.rcParams.update({"font.size": 13, "axes.titlesize": 14, "legend.fontsize": 12, "lines.linewidth": 2})
    figure, axes = pyplot.subplots(2, 2, figsize=(9.5, 8), layout="constrained")
    machine = results["machine"]
    figure.suptitle(
        f"RoBERTa-base, one training step, fp32, {machine['cpu']}, {machine['threads']} threads", fontsize=14
    )
    panels = (
        ("tokens", f"tokens in the batch (sequences of {EACH})", "proportional", "upper left"),
        ("length", f"tokens of a sequence ({TOKENS} in the batch)", "constant", "lower left"),
        ("layers", f"layers ({BATCH} sequences of {EACH} tokens)", "proportional", "upper left"),
        ("threads", f"threads ({BATCH} sequences of {EACH} tokens)", "1 / threads", "upper right"),
    )
    for letter, axis, (panel, label, ideal_name, place) in zip("abcd", axes.flat, panels, strict=True):
        points = results[panel]
        x = [point["x"] for point in points]
        y = [point["seconds"]["median"] for point in points]
        low = [point["seconds"]["median"] - point["seconds"]["min"] for point in points]
        high = [point["seconds"]["max"] - point["seconds"]["median"] for point in points]
        ideal = {
            "tokens": [y[-1] * n / x[-1] for n in x],
            "length": [min(y)] * len(x),
            "layers": [y[-1] * n / x[-1] for n in x],
            "threads": [y[0] * x[0] / n for n in x],
        }[panel]
        axis.plot(x, ideal, "--", color=ORANGE, label=f"ideal: {ideal_name}")
        if panel == "length":
            axis.plot(x, [point["limit_s"] for point in points], ":", color=GREY, label="dense products alone")
        axis.errorbar(x, y, (low, high), marker="o", color=BLUE, capsize=4, label="measured (least to most)")
        if panel != "layers":
            axis.set_xscale("log", base=2)
        if panel == "tokens":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axis.set_ylim(0, 1.15 * max(*y, *ideal))
        axis.set_xticks(x, [str(n) for n in x])
        axis.minorticks_off()
        axis.set(xlabel=label, ylabel="seconds a step")
        axis.set_title(letter, loc="left", fontweight="bold")
        axis.grid(alpha=0.3)
        axis.legend(loc=place)
    figure.savefig(RESULTS / "scaling.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="draw the figure from results/scaling.json again")
    args = parser.parse_args()
    path = RESULTS / "scaling.json"
    if not args.plot:
        results = run()
        print(table(results))
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    plot(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
