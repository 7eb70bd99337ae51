"""Seconds of a training step of each variant of LoRA, against LoRA of the same layers and rank, ours and PEFT's.

    python benchmarks/variants.py [--only DoRA] [--pairs 5]

In one process, in turn: a step of LoRA and one of the variant on the same batch, ours and then PEFT's, with real
lengths and a new batch each pair; in fp32 and in bf16 (ours with held weights, PEFT under autocast). Query and value,
r 8 and random weights, or as a row says. `LoRA / variant` is the median over pairs of the ratio of their seconds.
VeRA's row also has the share of what its products allow: the step of LoRA with r 8 and VeRA's own products alone, by
VeRA's.
"""

import gc
import time
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from common import argument_parser, draw_lengths, machine, spread, write_results
from compare import middle, spread_of
from limit import Limit, Product, onednn
from sides import (
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_R,
    Side,
    base_file,
    build_ours,
    build_peer,
    configure,
    hold_in_bf16,
    make_batch,
)
from torch import Tensor

from lora_nlu.methods.description import methods_in
from lora_nlu.methods.table import METHODS
from lora_nlu.ops.frozen import has_bf16_products
from lora_nlu.training.learning_rates import with_rates

WARM = 1  # pairs not counted
STEPS = 1000  # of the run that the measured steps are the first of
WORKS = [("RTE B16", "rte", 16), ("SST-2 B16", "sst2", 16)]
RATIO = 16  # of LoRA+'s two learning rates


@dataclass
class Case:
    """What is measured of a variant: a model, a rank, further settings of ours and PEFT's config for the same."""

    note: str = ""
    model: str = "roberta-base"
    r: int = LORA_R
    ours: dict[str, Any] = field(default_factory=dict)
    peft: tuple[str, dict[str, Any]] | None = None  # class of PEFT's config, and settings; None where PEFT has none
    lora_dropout: float = 0.0
    has_alpha: bool = True
    ratio: float | None = None  # LoRA+: the rate of B by that of A


SCHEDULE = {"target_rank": 4, "init_warmup": 0, "final_warmup": 100, "mask_interval": 10, "reg_orth_coef": 0.1}
THEIR_SCHEDULE = {"init_r": LORA_R, "target_r": 4, "tinit": 0, "tfinal": 100, "deltaT": 10, "orth_reg_weight": 0.1}
CASES: dict[str, list[Case]] = {
    "rslora": [Case(peft=("LoraConfig", {"use_rslora": True}))],
    "pissa": [Case(peft=("LoraConfig", {"init_lora_weights": "pissa_niter_4"}))],
    "adalora": [Case(ours=SCHEDULE, peft=("AdaLoraConfig", THEIR_SCHEDULE | {"total_step": STEPS}))],
    "dora": [
        Case(peft=("LoraConfig", {"use_dora": True})),
        Case("lora_dropout 0.1", peft=("LoraConfig", {"use_dora": True}), lora_dropout=0.1),
    ],
    "vera": [
        Case("large, r 256", "roberta-large", 256, peft=("VeraConfig", {}), has_alpha=False),
        Case("r 1024", r=1024, peft=("VeraConfig", {}), has_alpha=False),
    ],
}


def cases() -> list[tuple[str, str, Case]]:
    """(label, lora_variant, case) of LoRA+, and of every variant in the methods' table."""
    rows = [row for row in METHODS.values() if row.chosen_by.get("lora_variant", "lora") != "lora"]
    found = [(row.label, row.name, case) for row in rows for case in CASES.get(row.name, [Case()])]
    return [("LoRA+", "lora", Case(peft=("LoraConfig", {}), ratio=RATIO)), *found]


class Ours(Side):
    """A step as the trainer takes it, with what the method adds to the loss, to the optimizer and after a step."""

    def __init__(self, model: torch.nn.Module, pad: int, ratio: float | None) -> None:
        self.rows, self.number, self.ratio = methods_in(model), 0, ratio
        super().__init__(model, pad)
        self.after = [row.after_step(model) for row in self.rows if row.after_step]
        for after in self.after:
            if hasattr(after, "begin"):
                after.begin(STEPS)

    def groups(self) -> list[dict[str, Any]]:
        groups = [{"params": self.trained, "weight_decay": 0.0}]
        for row in self.rows:
            if row.parameter_groups:
                groups = row.parameter_groups(self.model, groups, LEARNING_RATE)
        return with_rates(groups, self.model, Namespace(learning_rate=LEARNING_RATE, loraplus_lr_ratio=self.ratio))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return sum((row.loss_term(self.model) for row in self.rows if row.loss_term), super().loss(batch))

    def after_step(self) -> None:
        self.number += 1
        for after in self.after:
            after.step(self.number, STEPS)


class Peft(Side):
    """A step in PEFT, with what its documentation has one do for AdaLoRA and LoRA+."""

    def __init__(self, model: Any, pad: int, ratio: float | None) -> None:
        self.number = 0
        super().__init__(model, pad)
        self.allocate = getattr(model.base_model, "update_and_allocate", None)
        if ratio:
            from peft.optimizers import create_loraplus_optimizer

            options = {"lr": LEARNING_RATE, "loraplus_lr_ratio": ratio, "fused": True}
            self.optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)

    def after_step(self) -> None:
        self.number += 1
        if self.allocate:
            self.allocate(self.number)


def ours(case: Case, variant: str, r: int, bf16: bool, model: str) -> Ours:
    """Our side: LoRA (`lora_variant` lora) or the variant, in training."""
    is_lora = variant == "lora" and not case.ratio
    settings: dict[str, Any] = {"lora_r": r, "lora_dropout": case.lora_dropout}
    if is_lora or case.has_alpha:
        settings["lora_alpha"] = LORA_ALPHA
    config = configure(model)
    built: Any = build_ours(config, **settings, **({} if is_lora else {"lora_variant": variant} | case.ours))
    if not is_lora:
        for row in methods_in(built):
            if row.start:
                row.start(built)
            if row.before_steps:
                with base_file(built):
                    row.before_steps(built)
    if bf16:
        hold_in_bf16(built)
    return Ours(built, config.pad_token_id, None if is_lora else case.ratio)


def theirs(case: Case, is_lora: bool, model: str) -> Peft:
    kind, more = ("LoraConfig", {}) if is_lora or case.peft is None else case.peft
    settings: dict[str, Any] = {} if kind == "AdaLoraConfig" else {"r": case.r}
    settings |= {"vera_dropout" if kind == "VeraConfig" else "lora_dropout": case.lora_dropout}
    settings |= {} if kind == "VeraConfig" else {"lora_alpha": LORA_ALPHA}
    config = configure(model)
    built = build_peer(config, kind, **settings | more)
    return Peft(built, config.pad_token_id, None if is_lora else case.ratio)


def products_of_pair(config: Any, r: int, tokens: int, sequences: int) -> list[Product]:
    """VeRA's dense products of a training step: with A and B, which all layers share, and the same backward."""
    H, L, needed = config.hidden_size, config.num_hidden_layers, []  # noqa: N806
    for layer in range(L):
        for rows in (sequences if layer == L - 1 else tokens, tokens):  # query, value
            needed += [(rows, r, H, 0, False), (rows, H, r, 0, False), (rows, H, r, 0, True)]
            if layer:  # no gradient into the embeddings
                needed.append((rows, r, H, 0, True))
    return needed


def measure(label: str, variant: str, case: Case, args: Namespace, bf16: bool) -> list[dict[str, Any]]:
    """A result for each work, of one variant in one precision."""
    model = f"tiny-{case.model}" if args.smoke else case.model
    sides: dict[str, Side] = {
        "lora": ours(case, "lora", case.r, bf16, model),
        "variant": ours(case, variant, case.r, bf16, model),
    }
    if case.peft:
        sides |= {"peft_lora": theirs(case, True, model), "peft_variant": theirs(case, False, model)}
    if variant == "vera":
        sides["lora_of_r_8"] = ours(case, "lora", LORA_R, bf16, model)
    config, results = configure(model), []
    limit = Limit(config)
    for name, task, batch in WORKS:
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        pairs: list[float] = []
        for pair in range(WARM + args.pairs):
            lengths = draw_lengths(task, 4 if args.smoke else batch, pair)
            inputs = make_batch(lengths, 0, pair, config.pad_token_id)
            for side, step in sides.items():
                start = time.perf_counter()
                step.train(inputs, torch.bfloat16 if bf16 and side.startswith("peft") else None)
                if pair >= WARM:
                    seconds[side].append(time.perf_counter() - start)
            if variant == "vera" and pair >= WARM:
                needed = products_of_pair(config, case.r, sum(lengths), len(lengths))
                pairs.append(limit.seconds(needed, onednn, "bf16" if bf16 else "packed"))
        results.append(figures(seconds, pairs) | {
            "name": ", ".join(text for text in (label, case.note, name) if text),
            "precision": "bf16" if bf16 else "fp32",
            "machine": machine(torch.get_num_threads(), "bf16" if bf16 else "fp32"),
        })  # fmt: skip
    return results


def figures(seconds: dict[str, list[float]], pairs: list[float]) -> dict[str, Any]:
    def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
        return spread([a / b for a, b in zip(slow, fast, strict=True)])

    result: dict[str, Any] = {f"{side}_s": spread(values) for side, values in seconds.items()}
    result["lora_by_variant"] = ratio(seconds["lora"], seconds["variant"])
    if "peft_variant" in seconds:
        result["peft_lora_by_variant"] = ratio(seconds["peft_lora"], seconds["peft_variant"])
        result["times_as_fast"] = ratio(seconds["peft_variant"], seconds["variant"])
    if pairs:
        allowed = [a + b for a, b in zip(seconds["lora_of_r_8"], pairs, strict=True)]
        result |= {"products_s": spread(pairs), "share_of_allowed": ratio(allowed, seconds["variant"])}
    return result


HEADER = """| variant, work | precision | LoRA, ms | variant, ms | LoRA / variant (least to most) | PEFT's LoRA, ms | \
PEFT's variant, ms | PEFT's LoRA / variant | times as fast as PEFT's variant | of what its products allow |
|---|---|---|---|---|---|---|---|---|---|"""


def row(result: dict[str, Any]) -> str:
    times = [middle(result, f"{side}_s", factor=1e3) for side in ("lora", "variant", "peft_lora", "peft_variant")]
    cells = [result["name"], result["precision"], *times[:2], spread_of(result, "lora_by_variant"), *times[2:]]
    cells += [middle(result, "peft_lora_by_variant", "{:.2f}"), spread_of(result, "times_as_fast")]
    return f"| {' | '.join(cells)} | {middle(result, 'share_of_allowed', '{:.0f} %', 100)} |"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    if args.smoke:
        args.pairs = 1
    print(HEADER)
    results = []
    for label, variant, case in cases():
        if args.only not in ", ".join((label, case.note)):
            continue
        for bf16 in (False, True) if has_bf16_products() else (False,):
            for result in measure(label, variant, case, args, bf16):
                results.append(result)
                print(row(result), flush=True)
            gc.collect()
    write_results(args, "variants", results)


if __name__ == "__main__":
    main()
