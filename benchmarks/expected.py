"""What each launch script will cost: arithmetic from the models' shapes, the recipes and what was measured on a CPU.

    python benchmarks/expected.py [--only rte] [--gpus 1,2,4,8,16] [--gpu_tflops 124.8] [--gpu_fp32_tflops 7.8]

Prints the tables of docs/scaling.md, which says what to make of them. No GPU was measured: their rates are assumptions,
40 % of an A100's published peaks, and yours are flags. A product of [N, I] with [O, I] is 2 N I O operations; GB are
10^9 bytes.
"""

import argparse
import csv
import json
import math
import random
import statistics
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from common import HERE, RESULTS, XXLARGE

from lora_nlu.data.tasks import TASKS
from lora_nlu.training.launch import share

# Mean tokens an example where lengths.json has no counts: MRPC and QNLI were counted once, MNLI and QQP are ASSUMED
MEANS = {"mrpc": 53, "qnli": 51, "mnli": 40, "qqp": 30}
LAYER_MS = 1.0  # ASSUMED: least time of a layer's forward and backward on a GPU, however few tokens; evaluation half
LONGEST = 2  # times the mean: the longest of a micro-batch, whose distances DeBERTa projects; 1.4 to 2.7 were counted
LIVE = 1e9  # parameters that ZeRO-3 may keep gathered by default: stage3_max_live_parameters, stage3_max_reuse_distance
ENGINES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")


@dataclass(frozen=True)
class Model:
    """An encoder's sizes; `tables` are embedding rows beside the vocabulary's, `kernel` the width of a convolution."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    tables: int
    kernel: int = 0

    @property
    def matrices(self) -> int:
        """Elements of a layer's matrices: query, key, value, output 4 H^2, feed-forward 2 H I."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.inner

    @property
    def layer(self) -> int:
        """All parameters of a layer: matrices, five biases of H and one of I, two norms of 2 H."""
        return self.matrices + 9 * self.hidden + self.inner

    @property
    def rest(self) -> int:
        """Parameters in no layer but words and head: tables, norm 2 H; DeBERTa's k H^2 + H and two norms more."""
        return (self.tables + 2) * self.hidden + (self.kernel * self.hidden + 5) * self.hidden * bool(self.kernel)

    @property
    def frozen(self) -> int:
        return self.layers * self.layer + self.vocabulary * self.hidden + self.rest

    def operations(
        self,
        tokens: float,
        sequences: float,
        train: bool = True,
        views: int = 1,
        below: bool = False,
        all: bool = False,
    ) -> float:
        """Dense products of a micro-batch: 2 a matrix element and token forward, 2 more backward, into the inputs.

        Frozen weights take no gradient; if `all` train, 2 more. Of the last layer only key and value see all tokens,
        the rest first tokens; no gradient flows into the convolution, nor below the first layer's query, key and value
        unless something trains there (`below`). DeBERTa projects the distances that occur, twice the longest, for
        key and query, in each layer, a set a view. Not counted, a few percent: attention, norms, head and the update.
        """
        square, narrow = self.hidden**2, sequences * (self.matrices - 2 * self.hidden**2)
        forward = tokens * ((self.layers - 1) * self.matrices + (2 + self.kernel) * square) + narrow
        backward = tokens * ((self.layers - 1) * self.matrices + (2 if below else 2 - 3) * square) + narrow
        table = views * 2 * LONGEST * tokens / sequences * 2 * square * self.layers if self.kernel else 0
        return 2 * (forward + table + (backward if train else 0) + (forward + table if all else 0))


_XXLARGE = [XXLARGE[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")]
MODELS = {
    "roberta-base": Model(12, 768, 3072, 50265, 514 + 1),
    "roberta-large": Model(24, 1024, 4096, 50265, 514 + 1),
    "microsoft/deberta-v2-xxlarge": Model(*_XXLARGE, 2 * XXLARGE["position_buckets"], XXLARGE["conv_kernel_size"]),
}
STEPS_OF = {"roberta-base": MODELS["roberta-base"]}  # models of train.json: name to sizes
STEPS_OF["deberta-xxlarge-3-layers"] = replace(MODELS["microsoft/deberta-v2-xxlarge"], layers=3)


class Recipe:
    """A line of tests/hyperparameters.tsv or baselines.tsv, and what follows from it."""

    def __init__(self, line: dict[str, str]) -> None:
        def number(name: str, default: int = 0) -> int:
            return int(line.get(name) or default)

        # a baseline's script takes a task: named as its output folder, script_task
        folder, _, script = line["script"].removesuffix(".sh").rpartition("/")
        self.script, self.task = script + f"_{line['task_name']}" * bool(folder), TASKS[line["task_name"]]
        self.model, self.half = MODELS[line["model_name_or_path"]], bool(line.get("fp16"))
        self.gpus, self.batch = number("num_gpus"), number("per_device_train_batch_size")
        self.epochs, self.views = (
            number("num_train_epochs"),
            2 if line.get("reg_loss_wgt") else 1,
        )  # R-Drop, cutoff: twice
        self.eval_batch, cut = number("per_device_eval_batch_size", 8), number("max_seq_length")
        self.examples = self.gpus * self.batch  # a step
        self.steps = self.epochs * math.ceil(self.task.rows["train"] / self.examples)
        # real tokens an example, cut at --max_seq_length, and the longest, which is the cut where none was counted
        histogram = {min(n, cut): 0 for n in counted(self.task.name)} or {cut: 0}
        self.longest, sizes = max(histogram), counted(self.task.name).items()
        total = sum(min(n, cut) * times for n, times in sizes)
        self.tokens = total / sum(times for _, times in sizes) if sizes else MEANS[self.task.name]
        # trained beside the encoder: LoRA's A [r, H] and B [H, r] of query and value, or adapters [H, m], [m, H] and
        # biases; of it: BitFit's 7 biases of H and one of I a layer and one of H, or all; and the head
        H, size, labels = self.model.hidden, number("adapter_size"), len(self.task.labels) or 1
        places = {"": 0, "pfeiffer": 1, "houlsby": 2}[line.get("adapter_type", "")]
        self.added = self.model.layers * (4 * H * number("lora_r") + places * (2 * H * size + size + H))
        self.full = not self.added and not line.get("apply_bitfit")
        biases = self.model.layers * (7 * H + self.model.inner) + H
        own = self.model.frozen if self.full else 0 if self.added else biases
        self.still = self.model.frozen - own  # what stays frozen
        self.trained = self.added + own + H * H + H + labels * (H + 1)
        # evaluations and checkpoints: one an epoch or every so many steps and at the end; then all validation sets
        self.saves = math.ceil(self.steps / number("save_steps")) if line.get("save_steps") else self.epochs
        self.kept = number("save_total_limit", self.saves)
        sets = [rows for name, rows in self.task.rows.items() if name.startswith("validation")]
        self.evaluated = self.saves * sets[0] + sum(sets)

    def micro(self, examples: float, train: bool = True) -> float:
        """Operations of so many examples run at once."""
        rows = examples * (self.views if train else 1)
        views = self.views if train else 1
        return self.model.operations(rows * self.tokens, rows, train, views, not self.added, train and self.full)

    def run(self) -> tuple[float, float]:
        """Operations of the whole run in the script's batches: rows x epochs of training, and evaluation."""
        seen = self.epochs * self.task.rows["train"]
        evaluation = self.evaluated / self.eval_batch * self.micro(self.eval_batch, train=False)
        return seen / self.batch * self.micro(self.batch), evaluation

    def cpu_seconds(self, threads: int) -> float:
        """Operations by the rate of the measured step nearest in tokens; threads as scaling.json compares them."""
        tokens = self.batch * self.views * self.tokens
        nearest = min(cpu_rates(bool(self.model.kernel)), key=lambda row: abs(math.log(row["tokens"] / tokens)))
        times = {point["x"]: point["seconds"]["median"] for point in measured("scaling")["threads"]}
        return sum(self.run()) / nearest["rate"] * times[threads] / times[nearest["threads"]]

    def gpu_seconds(self, processes: int, tflops: float, at_once: bool = False) -> tuple[float, float] | None:
        """Seconds of a step and of the run, `at_once` without accumulation; None where a step can't be shared.

        step = accumulation x max(operations of a micro-batch / rate x waiting, layers x LAYER_MS)
        run = steps x step + evaluation batches / processes x max(operations of one / rate, layers x LAYER_MS / 2)
        """
        if not (shares := share(self.examples, self.batch, processes)):
            return None
        batch, accumulation = (self.examples // processes, 1) if at_once else shares
        rate, least = 1e12 * tflops, self.model.layers * LAYER_MS / 1e3
        late = waiting(self.task.name, batch * accumulation, processes)
        step = accumulation * max(self.micro(batch) / rate * late, least)
        evaluation = max(self.micro(self.eval_batch, train=False) / rate, least / 2)
        return step, self.steps * step + self.evaluated / self.eval_batch / processes * evaluation

    def activations(self, length: float) -> float:
        """Bytes that a micro-batch of examples of this length keeps: bytes a token, layer and unit x those."""
        return kept_bytes() * self.model.layers * self.model.hidden * self.batch * self.views * length

    def held(self, engine: str, processes: int) -> float:
        """Bytes of weights and of what trains in a process: all of it under DDP, 4 frozen + 16 trained.

        16 are weight, gradient and two moments. --fp16: autocast keeps a half-precision copy of each layer's matrices,
        FSDP2 gathers halves, DeepSpeed turns the model into halves. FSDP2 gathers words or two layers, and the rest.
        """
        model, number = self.model, 2 if self.half else 4
        if engine == "FSDP2":
            gathered = max(model.vocabulary * model.hidden, 2 * model.layer) + model.rest
            return (4 * self.still + 16 * self.trained) / processes + number * gathered
        if engine == "ZeRO-3":
            return (number * self.still + 16 * self.trained) / processes + number * min(model.frozen, LIVE)
        if engine == "ZeRO-2":  # the weights of what trains stay whole
            return number * self.still + (4 + 12 / processes) * self.trained
        return 4 * self.still + 16 * self.trained + (2 * model.layers * model.matrices if self.half else 0)

    def sent(self, engine: str, processes: int) -> float:
        """Bytes a process sends in a step: a ring's (N - 1) / N of what is exchanged.

        DDP: 4-byte gradients twice, summed and spread. FSDP2: all weights forward, the layers' again backward, in each
        micro-batch, and gradients once.
        """
        gathered = (2 if self.half else 4) * (self.model.frozen + self.model.layers * self.model.layer)
        _, accumulation = share(self.examples, self.batch, processes) or (0, 0)
        exchanged = 8 * self.trained if engine == "DDP" else accumulation * gathered + 4 * self.trained
        return exchanged * (processes - 1) / processes


@lru_cache
def measured(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


@lru_cache
def counted(task: str) -> dict[int, int]:
    """How often each token count occurs in a task's training set; nothing where it was not counted."""
    return {int(n): times for n, times in json.loads((HERE / "lengths.json").read_text()).get(task, {}).items()}


@lru_cache
def waiting(task: str, each: int, processes: int) -> float:
    """Tokens of the process with most of a step, by their mean, lengths dealt at random: the mean of 200 seeded draws.

    A step ends with the last process. Where lengths were not counted, they vary as RTE's.
    """
    lengths, draw, shares = counted(task) or counted("rte"), random.Random(f"{task} {each} {processes}"), [1.0]
    for _ in range(200 * (processes > 1)):
        sums = [sum(draw.choices([*lengths], [*lengths.values()], k=each)) for _ in range(processes)]
        shares.append(max(sums) * processes / sum(sums))
    return statistics.mean(shares[1:] or shares)


@lru_cache
def kept_bytes() -> float:
    """Median of memory.json's bytes above the weights by tokens, layers and hidden size; its models have 12 of 768."""
    return statistics.median(
        1e6 * row["ours_mb"]["median"] / row["real_tokens"]["median"] / (12 * 768) for row in measured("memory")
    )


@lru_cache
def cpu_rates(deberta: bool) -> list[dict[str, Any]]:
    """Our measured training steps: operations of the median of tokens by the median of seconds."""
    rates = []
    for row in measured("train"):
        model, tokens, seconds = row["model"], row["real_tokens"]["median"], row["ours_s"]["median"]
        if not row["peer_pads_to"] and model in STEPS_OF and bool(STEPS_OF[model].kernel) == deberta:
            operations = STEPS_OF[model].operations(tokens, row["batch"])
            rates.append({"name": row["name"], "tokens": tokens, "operations": operations, "seconds": seconds,
                          "rate": operations / seconds, "threads": row["machine"]["threads"]})  # fmt: skip
    return rates


def recipes(only: str = "") -> list[Recipe]:
    lines: list[dict[str, str]] = []
    for name in ("hyperparameters", "baselines"):
        with (HERE.parent / "tests" / f"{name}.tsv").open() as file:
            lines += csv.DictReader(file, delimiter="\t")
    return [r for line in lines if only in (r := Recipe(line)).script]


def table(header: str, rows: list[list[str]]) -> str:
    lines = [f"| {header} |", "|---" * (header.count("|") + 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def short(x: float) -> str:
    """Two figures, or a whole number: nothing here is known better."""
    return f"{x:,.0f}" if x >= 10 else f"{float(f'{x:.2g}'):g}"


def tables(only: str, gpus: list[int], half: float, full: float) -> list[str]:
    """The tables of docs/scaling.md: runs, measured rates, hours, waiting, memory by engine, network."""
    runs, hours, held, sent, late, several = [], [], [], [], [], [n for n in gpus if n > 1]
    for r in recipes(only):
        training, evaluation = (x / 1e15 for x in r.run())
        parts = (r.held("DDP", 1) / 1e9, r.activations(r.tokens) / 1e9, r.activations(r.longest) / 1e9)
        tokens = r.epochs * r.task.rows["train"] * r.views * r.tokens
        runs.append([r.script, f"{r.gpus} x {r.batch} = {r.examples}", f"{r.steps:,}", f"{r.tokens:.0f}",
                     short(tokens / 1e6), f"{short(training)} + {short(evaluation)}",
                     f"{parts[0]:.1f} + {parts[1]:.1f} to {parts[2]:.1f}",
                     short(r.kept * 12 * r.trained / 1e9)])  # fmt: skip
        rate = half if r.half else full
        times = [(r.cpu_seconds(n),) for n in (1, 2)] + [r.gpu_seconds(n, rate) for n in gpus]
        times.append(r.gpu_seconds(1, rate, at_once=True))
        hours.append([r.script, "fp16" if r.half else "fp32", *(short(t[-1] / 3600) if t else "-" for t in times)])
    for r in (r for r in recipes("_mnli") if r.script.startswith(("roberta", "deberta"))):
        held.append([r.script, *(" / ".join(f"{r.held(e, n) / 1e9:.2f}" for n in several) for e in ENGINES)])
        step, exchanged = (r.gpu_seconds(8, half if r.half else full) or (0,))[0], [r.sent(e, 8) for e in ENGINES[:2]]
        sent.append([r.script, f"{1e3 * step:.0f}", *(f"{b / 1e6:,.0f}" for b in exchanged),
                     *(short(b / step / 1e9) for b in exchanged)])  # fmt: skip
    for each in (4, 8, 16, 32):
        late.append([f"{each}", *(f"{waiting('rte', each, n):.2f}" for n in several)])
    rates = [[row["name"], f"{row['tokens']:.0f}", f"{row['operations'] / 1e9:.0f}", f"{row['seconds']:.3f}",
              f"{row['rate'] / 1e9:.0f}"] for deberta in (False, True) for row in cpu_rates(deberta)]  # fmt: skip
    return [
        table("script | examples a step | steps | tokens an example | tokens, million | PFLOP: training + evaluation | "
              "memory, GB: model + batch, mean to longest | checkpoints, GB", runs),
        table("measured step | real tokens | GFLOP | seconds | GFLOP/s", rates),
        table(f"hours of | on GPUs in | 1 core | 2 cores | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in gpus)} | "
              "1 GPU, step at once", hours),
        table(f"examples a process | {' | '.join(f'{n} GPUs' for n in several)}", late),
        table(f"GB a process, of {' / '.join(map(str, several))} | {' | '.join(ENGINES)}", held),
        table("on 8 GPUs | step, ms | DDP sends, MB | FSDP2 sends, MB | GB/s to send it in a step's time: DDP | FSDP2",
              sent),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="scripts whose name holds this text")
    parser.add_argument("--gpus", default="1,2,4,8,16", help="numbers of GPUs, by commas")
    parser.add_argument("--gpu_tflops", type=float, default=0.4 * 312, help="a GPU's rate in a script with --fp16")
    parser.add_argument("--gpu_fp32_tflops", type=float, default=0.4 * 19.5, help="and in one without")
    args = parser.parse_args()
    gpus = [int(n) for n in args.gpus.split(",")]
    print("\n\n".join(tables(args.only, gpus, args.gpu_tflops, args.gpu_fp32_tflops)))


if __name__ == "__main__":
    main()
