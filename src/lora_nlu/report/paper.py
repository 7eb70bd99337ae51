"""The LoRA paper's Table 2."""

from dataclasses import dataclass

from lora_nlu.data.tasks import REPORTED


@dataclass(frozen=True)
class Published:
    """One line of the LoRA paper's Table 2 (arXiv 2106.09685): medians over 5 seeds of each run's best epoch, percent.

    method:  as `methods.describe_method` names it, with the adapters' size; MRPC, RTE and STS-B of "lora" start from
             the MNLI adapter, those of "lora, no MNLI start" don't.
    figures: (median, standard deviation or None) by task; MNLI on both validation sets together.
    """

    model: str
    method: str
    trainable: str
    figures: dict[str, tuple[float, float | None]]


def _line(model: str, method: str, trainable: str, figures: str) -> Published:
    by_task = {}
    for task, figure in zip(REPORTED, figures.split(), strict=True):
        median, _, deviation = figure.partition("±")
        by_task[task] = (float(median), float(deviation) if deviation else None)
    return Published(model, method, trainable, by_task)


PAPER = (
    _line("roberta-base", "full", "125.0M", "87.6 94.8 90.2 63.6 92.8 91.9 78.7 91.2"),
    _line("roberta-base", "bitfit", "0.1M", "84.7 93.7 92.7 62.0 91.8 84.0 81.5 90.8"),
    _line("roberta-base", "lora", "0.3M", "87.5±.3 95.1±.2 89.7±.7 63.4±1.2 93.3±.3 90.8±.1 86.6±.7 91.5±.2"),
    _line("roberta-large", "full", "355.0M", "90.2 96.4 90.9 68.0 94.7 92.2 86.6 92.4"),
    _line("roberta-large", "lora", "0.8M", "90.6±.2 96.2±.5 90.9±1.2 68.2±1.9 94.9±.3 91.6±.1 87.4±2.5 92.6±.2"),
    _line("roberta-large", "pfeiffer 64", "3.0M", "90.2±.3 96.1±.3 90.2±.7 68.3±1.0 94.8±.2 91.9±.1 83.8±2.9 92.1±.7"),
    _line("roberta-large", "pfeiffer 16", "0.8M", "90.5±.3 96.6±.2 89.7±1.2 67.8±2.5 94.8±.3 91.7±.2 80.1±2.9 91.9±.4"),
    _line("roberta-large", "houlsby 64", "6.0M", "89.9±.5 96.2±.3 88.7±2.9 66.5±4.4 94.7±.2 92.1±.1 83.4±1.1 91.0±1.7"),
    _line("roberta-large", "houlsby 8", "0.8M", "90.3±.3 96.3±.3 87.7±1.7 66.3±2.0 94.7±.2 91.5±.1 72.9±2.9 91.5±.5"),
    _line("roberta-large", "lora, no MNLI start", "0.8M",
          "90.6±.2 96.2±.5 90.2±1.0 68.2±1.9 94.8±.3 91.6±.2 85.2±1.1 92.3±.5"),
    _line("deberta-v2-xxlarge", "full", "1500M", "91.8 97.2 92.0 72.0 96.0 92.7 93.9 92.9"),
    _line("deberta-v2-xxlarge", "lora", "4.7M", "91.9±.2 96.9±.2 92.6±.6 72.4±1.1 96.0±.1 92.9±.1 94.9±.4 93.0±.2"),
)  # fmt: skip
LORA_RANKS = {"roberta-base": 8, "roberta-large": 8, "deberta-v2-xxlarge": 16}  # of the paper's "lora" lines
