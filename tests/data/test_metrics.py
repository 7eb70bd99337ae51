"""Metrics against confusion matrices counted by hand, scikit-learn and scipy."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from lora_nlu.data.metrics import METRICS, answers_of, compute_metrics, predicted

# Labels and predictions with 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
PREDICTIONS = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])


def logits_of(predictions: np.ndarray, classes: int = 2) -> np.ndarray:
    """Logits [N, classes] whose largest entry is the prediction's."""
    return np.eye(classes)[predictions] * 3.0 - 1.0


def test_accuracy_f1_and_matthews_equal_the_values_counted_by_hand():
    names = ["accuracy", "f1", "matthews_correlation"]
    result = compute_metrics(names, logits_of(PREDICTIONS), LABELS)
    assert result["accuracy"] == pytest.approx(7 / 10)
    assert result["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))  # 2 TP / (2 TP + FP + FN)
    assert result["matthews_correlation"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))


def test_classification_metrics_equal_scikit_learns_on_random_predictions():
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(0, 2, 200), generator.normal(size=(200, 2))
    want = logits.argmax(1)
    result = compute_metrics(["accuracy", "f1", "matthews_correlation"], logits, labels)
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, want))
    assert result["f1"] == pytest.approx(sklearn_metrics.f1_score(labels, want))
    assert result["matthews_correlation"] == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, want))


def test_matthews_of_three_classes_equals_scikit_learns():
    generator = np.random.default_rng(1)
    labels, logits = generator.integers(0, 3, 100), generator.normal(size=(100, 3))
    want = sklearn_metrics.matthews_corrcoef(labels, logits.argmax(1))
    assert compute_metrics(["matthews_correlation"], logits, labels) == {"matthews_correlation": pytest.approx(want)}


def test_correlations_and_squared_error_equal_scipys_and_numpys():
    generator = np.random.default_rng(2)
    labels = generator.uniform(0, 5, 50)
    logits = (labels + generator.normal(size=50))[:, None]
    result = compute_metrics(["pearson", "spearmanr", "mse"], logits, labels)
    assert result["pearson"] == pytest.approx(stats.pearsonr(labels, logits[:, 0]).statistic)
    assert result["spearmanr"] == pytest.approx(stats.spearmanr(labels, logits[:, 0]).statistic)
    assert result["mse"] == pytest.approx(np.mean((labels - logits[:, 0]) ** 2))


def test_spearman_is_one_for_any_rising_curve_and_pearson_is_the_hand_computed_value():
    result = compute_metrics(["pearson", "spearmanr"], np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert result["spearmanr"] == pytest.approx(1.0)
    # deviations (-1, 0, 1) and (-4, -1, 5) / 3: 3 / sqrt(2 * 42 / 9)
    assert result["pearson"] == pytest.approx(3 / math.sqrt(2 * 42 / 9))


@pytest.mark.parametrize("metric", ["pearson", "spearmanr"])
@pytest.mark.parametrize("constant", ["predictions", "labels", "both"])
def test_a_correlation_with_a_constant_is_zero_without_a_warning(metric, constant):
    varied, same = np.array([0.0, 1.0, 2.5]), np.array([1.5, 1.5, 1.5])
    labels = varied if constant == "predictions" else same
    predictions = varied if constant == "labels" else same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute_metrics([metric], predictions[:, None], labels) == {metric: 0.0}


@pytest.mark.parametrize("metric", ["f1", "matthews_correlation"])
def test_a_classifier_that_always_predicts_class_zero_scores_zero(metric):
    assert compute_metrics([metric], logits_of(np.zeros(10, dtype=int)), LABELS) == {metric: 0.0}


def test_the_combined_score_of_two_metrics_is_their_mean():
    result = compute_metrics(["accuracy", "f1"], logits_of(PREDICTIONS), LABELS)
    assert list(result) == ["accuracy", "f1", "combined_score"]
    assert result["combined_score"] == pytest.approx((0.7 + 2 / 3) / 2)


def test_a_single_metric_and_one_with_a_squared_error_have_no_combined_score():
    assert list(compute_metrics(["accuracy"], logits_of(PREDICTIONS), LABELS)) == ["accuracy"]
    numbers, labels = np.array([[1.0], [2.0]]), np.array([1.0, 3.0])
    assert list(compute_metrics(["pearson", "mse"], numbers, labels)) == ["pearson", "mse"]


def test_one_logit_is_the_predicted_number_and_several_give_the_largest_ones_place():
    assert predicted(np.array([[0.5], [-2.0]])).tolist() == [0.5, -2.0]
    assert predicted(np.array([[0.1, 0.2, 0.0], [5.0, -1.0, 4.0]])).tolist() == [1, 0]


def test_scores_are_plain_floats_that_json_can_write():
    for name in METRICS:
        labels = LABELS.astype(float) if name in ("pearson", "spearmanr", "mse") else LABELS
        logits = logits_of(PREDICTIONS) if labels is LABELS else np.linspace(0, 1, 10)[:, None]
        assert type(compute_metrics([name], logits, labels)[name]) is float


def test_answers_are_the_label_and_each_probability_or_the_score():
    logits = np.array([[1000.0, 1000.0 - np.log(3)], [-2.0, 5.0]])
    assert answers_of(logits, ["no", "yes"]) == [
        {"label": "no", "probabilities": {"no": 0.75, "yes": 0.25}},
        {"label": "yes", "probabilities": {"no": 0.000911051, "yes": 0.999089}},
    ]
    scores = answers_of(np.array([[3.14159274], [-0.0]], dtype=np.float32), [])
    assert scores == [{"score": 3.14159}, {"score": 0.0}] and str(scores[1]["score"]) == "0.0"
