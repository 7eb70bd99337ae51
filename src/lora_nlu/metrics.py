"""The metrics of GLUE, by name, from scikit-learn and scipy."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error


def _correlation(measure: Callable) -> Callable:
    """`measure`, but 0 where one side is constant: there is nothing to correlate, and NaN would win no comparison."""

    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return measure(labels, predictions)[0]

    return score


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
    "mse": mean_squared_error,
}


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
