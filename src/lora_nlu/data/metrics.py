"""The metrics of GLUE, by name, from scikit-learn and scipy."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

# scikit-learn and scipy are imported where they are called, so that a run starts training sooner.


def _sklearn(function: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    import sklearn.metrics

    return getattr(sklearn.metrics, function)(labels, predictions)


def _scipy(function: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    """A correlation, but 0 if one side is constant, where scipy gives NaN, which no comparison can rank."""
    import scipy.stats

    is_constant = np.ptp(labels) == 0 or np.ptp(predictions) == 0
    return 0.0 if is_constant else getattr(scipy.stats, function)(labels, predictions)[0]


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": partial(_sklearn, "accuracy_score"),
    "f1": partial(_sklearn, "f1_score"),
    "matthews_correlation": partial(_sklearn, "matthews_corrcoef"),
    "pearson": partial(_scipy, "pearsonr"),
    "spearmanr": partial(_scipy, "spearmanr"),
    "mse": partial(_sklearn, "mean_squared_error"),
}


def greater_is_better(metric: str) -> bool:
    """Whether a greater figure of `metric` is better; its name may begin with `eval_`."""
    return metric.removeprefix("eval_") not in ("loss", "mse")


def predicted(logits: np.ndarray) -> np.ndarray:
    """Logits [N, C] to class ids [N]; logits [N, 1] (regression) to numbers [N]."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)


def answers_of(logits: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Of each row of logits [N, C] the label and the probability of each class; without labels, a regression's score.

    Numbers have six digits, about what float32 has.
    """
    if not labels:
        return [{"score": _six_digits(score)} for score in predicted(logits)]
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    return [
        {"label": labels[int(i)], "probabilities": dict(zip(labels, map(_six_digits, row), strict=True))}
        for i, row in zip(predicted(logits), probabilities, strict=True)
    ]


def _six_digits(number: float) -> float:
    return float(f"{number:.6g}") + 0.0  # which makes -0.0 0.0


def compute_metrics(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score logits [N, C] against labels [N]; several metrics also give `combined_score`, their mean, as GLUE does."""
    predictions = predicted(logits)
    result = {name: float(METRICS[name](labels, predictions)) for name in names}
    if len(result) > 1 and "mse" not in result:
        result["combined_score"] = float(np.mean(list(result.values())))
    return result
