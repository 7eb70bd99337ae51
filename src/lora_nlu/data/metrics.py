"""The metrics of GLUE, by name, from scikit-learn and scipy."""

from collections.abc import Callable, Sequence
from functools import partial

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


def compute_metrics(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score logits [N, C] against labels [N]; several metrics also give `combined_score`, their mean, as GLUE does."""
    predictions = predicted(logits)
    result = {name: float(METRICS[name](labels, predictions)) for name in names}
    if len(result) > 1 and "mse" not in result:
        result["combined_score"] = float(np.mean(list(result.values())))
    return result
