"""Methods compared: the table, which differences are more than seeds explain, and the page."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from run_folders import BITFIT, HEAD, HOULSBY, LORA, rows_of, write, write_run
from scipy.stats import false_discovery_control, pearsonr, ttest_rel
from sklearn.metrics import accuracy_score, matthews_corrcoef

from lora_nlu.errors import UserError
from lora_nlu.report.collect import collect
from lora_nlu.report.comparison import (
    LEVEL,
    differences_from,
    error_of_rows,
    holm,
    paired_p,
    resampled,
    write_comparison,
)
from lora_nlu.report.records import training_records, write_records

RATES = (5e-4, 1e-3, 2e-3)


def compare(*paths, reference=None, out=None) -> str:
    return write_comparison(*training_records(paths), paths, reference, out)


def write_study(folder, **figures) -> None:
    """Final runs of LoRA and BitFit over seeds and, of each, one run at each rate that chooses."""
    for name, method in (("lora", LORA), ("bitfit", BITFIT)):
        sizes = {"encoder": 294_912 if name == "lora" else 83_000}
        for i, rate in enumerate(RATES):
            out = folder / "choosing" / name / str(rate)
            out.parent.mkdir(parents=True, exist_ok=True)
            chosen = {"learning_rate": rate, "validation_from_train": 1000}
            write_run(out, "cola", 0, (0.1 * i,), method=method, **sizes, **chosen)
        for seed, figure in enumerate(figures[name]):
            out = folder / "final" / name / str(seed)
            out.parent.mkdir(parents=True, exist_ok=True)
            measured = {"num_input_tokens_seen": 50_000}
            write_run(out, "cola", seed, (0.9, figure), method=method, measured=measured, learning_rate=2e-3, **sizes)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_p_of_paired_seeds_is_scipys(size):
    rng = np.random.default_rng(size)
    mine, other = rng.normal(0.3, 1, size), rng.normal(0, 1, size)
    assert paired_p(mine - other) == pytest.approx(ttest_rel(mine, other).pvalue, rel=1e-9)
    assert paired_p([0.0] * size) == 1.0 and paired_p([2.0] * size) is None
    assert paired_p([2.0]) is None


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0])
def test_equal_methods_whose_figures_are_shares_of_few_examples_are_told_apart_in_at_most_a_twentieth(size, spread):
    rng, one = np.random.default_rng(0), 100 / 277  # RTE's examples
    figures = one * np.round(rng.normal(70, spread, (2, 2000, size)) / one)
    p_values = [paired_p(differences) for differences in figures[0] - figures[1]]
    assert np.mean([p is not None and p < LEVEL for p in p_values]) < LEVEL + 0.01


def test_more_seeds_for_near_methods_keep_the_chance_of_a_false_claim():
    """The rule of compare_methods.sh: five seeds if the medians of three are within 2 points, else three."""
    rng, draws, false_claims = np.random.default_rng(0), 4000, 0
    for base, *others in rng.normal(50, 3, (draws, 4, 5)):
        near = [abs(np.median(other[:3]) - np.median(base[:3])) <= 2 for other in others]
        p_values = [
            paired_p((other - base)[: 5 if is_near else 3]) for other, is_near in zip(others, near, strict=True)
        ]
        false_claims += min(holm(p_values)) < LEVEL
    assert false_claims / draws < LEVEL + 0.01


def test_holms_p_values_are_those_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    p = [0.001, 0.2, 0.02, 0.5]  # never below Hochberg's, never above Bonferroni's
    assert all(a >= b for a, b in zip(holm(p), false_discovery_control(p), strict=True))
    assert all(a <= min(4 * b, 1) for a, b in zip(holm(p), p, strict=True))


def drawn(cells, rng, shifts):
    """The cells with figures of their seeds drawn anew, normal around one mean, or shifted from it."""
    return [
        replace(
            cell, done=tuple(replace(run, last=50 + shifts.get(cell.method, 0) + rng.normal()) for run in cell.done)
        )
        for cell in cells
    ]


def test_equal_methods_are_told_apart_in_at_most_a_twentieth_of_draws_and_different_ones_are_found(tmp_path):
    for r in (8, 1, 2, 4, 16, 32, 64):
        for seed in range(5):
            write_run(tmp_path / f"{r}_{seed}", "cola", seed, (0.5,), rank=r, scaling=16 / r)
    cells, _ = collect([tmp_path])
    rng, draws, false_claims, found = np.random.default_rng(0), 1000, 0, 0
    for shifts in ({}, {"LoRA r=64": 8.0}):
        for _ in range(draws):
            differences = differences_from("LoRA r=8", drawn(cells, rng, shifts), {})
            told = {method for (method, _), difference in differences.items() if difference.is_told}
            false_claims += bool(told - {*shifts})
            found += bool(told & {*shifts})
    assert false_claims / (2 * draws) <= LEVEL
    assert found / draws > 0.9


@pytest.mark.parametrize("metric", ["accuracy", "matthews_correlation", "pearson"])
def test_a_metric_of_resampled_rows_is_sklearns_and_scipys_on_the_rows_repeated(metric):
    rng = np.random.default_rng(1)
    expected, given = rng.integers(0, 2, (2, 40))
    if metric == "pearson":
        expected, given = rng.normal(3, 1, (2, 40))
    weights = rng.multinomial(40, [1 / 40] * 40, 20)
    score = {"accuracy": accuracy_score, "matthews_correlation": matthews_corrcoef,
             "pearson": lambda *pair: pearsonr(*pair)[0]}[metric]  # fmt: skip
    direct = [score(np.repeat(expected, w), np.repeat(given, w)) for w in weights]
    assert resampled(metric, expected, given, weights.astype(float)) == pytest.approx(direct, rel=1e-9)


def test_the_error_of_rows_is_that_of_a_mean_of_paired_differences():
    rng = np.random.default_rng(2)
    expected, mine, other = rng.integers(0, 2, (3, 4000))
    difference = (mine == expected).astype(float) - (other == expected)
    closed_form = 100 * difference.std() / len(difference) ** 0.5
    assert error_of_rows("accuracy", [(expected, mine, other)]) == pytest.approx(closed_form, rel=0.07)
    assert error_of_rows("accuracy", [(expected, mine, mine)]) == 0


def test_the_table_has_median_rate_and_seeds_and_the_words_say_what_differs(tmp_path):
    write_study(tmp_path, lora=(0.60, 0.61, 0.62, 0.60, 0.61), bitfit=(0.50, 0.49, 0.50))
    text = compare(tmp_path)
    rows = rows_of(text)
    by_name = {row[0]: row for row in rows if len(row) > 2}
    assert by_name["LoRA r=8"][3:] == ["61.0 ± 0.8", "61.0", "500", "2.0 GiB"]
    assert by_name["BitFit"][1] == "83,000" and by_name["BitFit"][3] == "50.0 ± 0.6"
    rates = [row[3] for row in rows if "rate (seeds)" in row]
    assert rates == ["2e-3 (3)", "2e-3 (5)"]  # fewest parameters first
    assert "- LoRA r=8 on CoLA: 2e-3 is the highest rate that was tried; higher ones were not" in text
    difference = next(row for row in rows if row[0] == "BitFit" and len(row) == 2)[1]
    mean, p = -100 * (0.10 + 0.12 + 0.12) / 3, ttest_rel([50, 49, 50], [60, 61, 62]).pvalue
    assert difference == f"{mean:.1f} ± 0.7 (p {p:.3f})"
    assert "- CoLA. below LoRA r=8 by more than seeds explain: BitFit." in text
    assert "6 runs to choose the rates trained for 0:10:00, 8 runs at the chosen rates trained for 0:13:20" in text


def test_the_page_is_one_file_with_the_same_tables_and_pictures_and_needs_nothing_else(tmp_path):
    write_study(tmp_path / "runs", lora=(0.60, 0.61), bitfit=(0.50, 0.49))
    text, out = compare(tmp_path / "runs", out=tmp_path / "report"), tmp_path / "report"
    compare(tmp_path / "runs", out=out)
    page = (out / "report.html").read_text()
    cells = re.findall("<t[dh]>(.*?)</t[dh]>", page)
    assert cells == [cell for row in rows_of(text) for cell in row]
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    names = [f"roberta-base_{name}.png" for name in ("learning_rates", "parameters", "differences")]
    assert pictures == [(out / name).read_bytes() for name in names]
    assert not re.search(r"<script|https?:|<link|@import|url\(", page)
    # the records alone make it again
    compare(out / "runs.jsonl", out=tmp_path / "again")
    assert (tmp_path / "again" / "report.html").read_text() == page


def test_names_in_the_page_are_escaped(tmp_path):
    method = LORA | {"name": "mine", "label": "<script>alert(1)</script>"}
    for seed in (0, 1):
        write_run(tmp_path / f"lora_{seed}", "cola", seed, (0.5,))
        write_run(tmp_path / f"mine_{seed}", "cola", seed, (0.4,), method=method)
    compare(tmp_path, out=tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_answers_are_read_kept_in_the_records_and_give_the_error_of_rows(tmp_path):
    rng = np.random.default_rng(3)
    expected = rng.integers(0, 2, 200)
    for name, method in (("lora", LORA), ("head", HEAD)):
        for seed in (0, 1):
            given = np.where(rng.random(200) < 0.8, expected, 1 - expected)
            figure = np.mean(given == expected)
            folder = write_run(tmp_path / f"{name}_{seed}", "sst2", seed, (figure,), method=method)
            run = json.loads((folder / "run.json").read_text())
            write(folder / "run.json", run | {"labels": ["negative", "positive"]})
            names = [("negative", "positive")[i] for i in expected], [("negative", "positive")[i] for i in given]
            lines = [json.dumps({"expected": e, "label": g}) for e, g in zip(*names, strict=True)]
            (folder / "eval_predictions_sst2.jsonl").write_text("\n".join(lines) + "\n")
    text = compare(tmp_path, out=tmp_path / "report")
    assert re.search(r"rows ± [1-9]\.\d", text)
    assert compare(tmp_path / "report" / "runs.jsonl") == text.split("![")[0].rstrip() + "\n"
    path = tmp_path / "lora_0" / "eval_predictions_sst2.jsonl"
    lines = path.read_text().splitlines()
    wrong = '{"expected": "negative", "label": "positive"}'
    for content, why in (
        ('{"expected": "other", "label": "negative"}', "KeyError: 'other'"),
        ("\n".join([wrong] * 200), "ValueError: their accuracy is 0.0000, the run's 0."),
        ("\n".join(lines[:100] + [wrong] * 5), "ValueError: their accuracy is"),
        ("", "ValueError: 0 expected answers, 0 given"),
        ("[" * 5000, "RecursionError: "),
    ):
        path.write_text(content)
        text = compare(tmp_path)
        assert f"left out, answers that are not the run's: {path} ({why}" in text.replace("\\", "")
        assert "; rows" not in text


@pytest.mark.parametrize(
    "answers",
    [
        {"expected": [0, 1, 1], "given": [0, 1]},
        {"expected": [0, 1], "given": [1e300, 1e308]},
        {"expected": [0] * 200_000, "given": [0] * 200_000},
        {"expected": [0, 1]},
        {"expected": [], "given": []},
        {},
    ],
)
def test_answers_in_records_that_are_damaged_are_left_out_with_their_line(tmp_path, answers):
    for name, method in (("lora", LORA), ("head", HEAD)):
        for seed in (0, 1):
            write_run(tmp_path / "runs" / f"{name}_{seed}", "stsb", seed, (0.5 + 0.1 * seed,), method=method)
    compare(tmp_path / "runs", out=tmp_path)
    lines = [json.loads(line) | {"answers": answers} for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = compare(tmp_path / "mine.jsonl").replace("\\", "")
    assert "; rows" not in text and "mine.jsonl:1 (" in text


def test_the_answers_to_both_sets_of_mnli_give_the_error_of_their_common_figure(tmp_path):
    rng, labels = np.random.default_rng(4), ["entailment", "neutral", "contradiction"]
    for name, method in (("lora", LORA), ("head", HEAD)):
        for seed in (0, 1):
            expected = rng.integers(0, 3, 300)
            given = np.where(rng.random(300) < 0.8, expected, (expected + 1) % 3)
            right = given == expected
            folder = tmp_path / f"{name}_{seed}"
            write_run(folder, "mnli", seed, (right[:200].mean(),), method=method, overall=right.mean())
            write(folder / "run.json", json.loads((folder / "run.json").read_text()) | {"labels": labels})
            lines = [
                json.dumps({"expected": labels[e], "label": labels[g]}) for e, g in zip(expected, given, strict=True)
            ]
            (folder / "eval_predictions_mnli.jsonl").write_text("\n".join(lines[:200]) + "\n")
            (folder / "eval_predictions_mnli-mm.jsonl").write_text("\n".join(lines[200:]) + "\n")
    compare(tmp_path, out=tmp_path / "report")
    records = [json.loads(line) for line in (tmp_path / "report" / "runs.jsonl").read_text().splitlines()]
    assert [len(record["answers"]["given"]) for record in records] == [300] * 4


def test_what_can_not_be_compared_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no training run on a GLUE task. .*\n?missing: .*nowhere"):
        compare(tmp_path / "nowhere")
    write_run(tmp_path / "own" / "choosing", "custom", 0, (0.5,), validation_from_train=10)
    with pytest.raises(UserError, match=r"no training run on a GLUE task.*\nleft out, not a GLUE task: .*choosing"):
        compare(tmp_path / "own")
    write_run(tmp_path / "bitfit", "cola", 0, (0.5,), method=BITFIT)
    with pytest.raises(UserError, match="no runs of plain LoRA to compare with"):
        compare(tmp_path)
    write_run(tmp_path / "lora", "cola", 0, (0.5,))
    with pytest.raises(
        UserError, match="--reference DoRA: no finished run has this method. There are: BitFit, LoRA r=8."
    ):
        compare(tmp_path, reference="DoRA")
    assert "not tested, with one seed or the same difference in each: BitFit" in compare(tmp_path)
    write_run(tmp_path / "other", "cola", 1, (0.5,), model="roberta-large")
    with pytest.raises(UserError, match="runs of several models: roberta-base, roberta-large"):
        compare(tmp_path)
    write_run(tmp_path / "choosing" / "lora", "cola", 0, (0.5,), validation_from_train=10)
    with pytest.raises(UserError, match="all of these keep training rows for it"):
        compare(tmp_path / "choosing")
    records = tmp_path / "cut" / "runs.jsonl"
    records.parent.mkdir()
    write_records(records, training_records([tmp_path / "choosing"])[0])
    line = records.read_text()
    records.write_text(line + line[:-100])
    with pytest.raises(UserError, match=r"all of these keep .*\nleft out: .*runs.jsonl:2: not the record of a run"):
        compare(records)
    records.write_text("")
    with pytest.raises(UserError, match="runs.jsonl: the file is empty"):
        compare(records)


def test_settings_of_one_method_are_two_lines_with_one_name_on_every_task_whatever_their_rates(tmp_path):
    for task, rates in {"cola": (1e-3, 2e-3), "rte": (1e-3, 1e-3)}.items():
        for rate, decay in zip(rates, (0.0, 0.1), strict=True):
            setting = {"learning_rate": rate, "weight_decay": decay}
            for seed in (0, 1):
                write_run(tmp_path / "final" / f"{task}_{decay}_{seed}", task, seed, (0.5 + 0.1 * decay,), **setting)
            for tried in (rate, 5 * rate):
                folder = tmp_path / "choosing" / f"{task}_{decay}_{tried}"
                write_run(folder, task, 0, (rate / tried,), **setting | {"learning_rate": tried},
                          validation_from_train=100)  # fmt: skip
    speed = write_run(tmp_path / "speed", "cola", 0, (0.9,), max_steps=20, validation_from_train=100)
    part = {"eval_samples": 64, "eval_set_samples": 100}
    write(speed / "eval_results.json", json.loads((speed / "eval_results.json").read_text()) | part)
    text = compare(tmp_path, reference=str(tmp_path / "final" / "cola_0.0_0"), out=tmp_path / "report")
    names = [f"LoRA r=8 (weight_decay {decay})" for decay in (0.0, 0.1)]
    assert [row[0] for row in rows_of(text) if row[0].startswith("LoRA")] == [*names, names[1]]
    assert f"## Differences from {names[0]}" in text and "with one seed.\n" in text
    assert "rate 0.005, scored on training rows" in (tmp_path / "report" / "report.csv").read_text()


def test_several_rates_of_one_method_are_several_lines(tmp_path):
    for rate in (1e-3, 2e-3):
        for seed in (0, 1):
            write_run(tmp_path / "runs" / f"{rate}_{seed}", "cola", seed, (0.5,), learning_rate=rate)
    text = compare(tmp_path, reference="LoRA r=8 (learning_rate 0.001)", out=tmp_path / "report")
    assert "not told apart: LoRA r=8 (learning_rate 0.002)." in text and "No runs here chose between rates." in text


def test_the_report_says_which_rates_were_not_chosen_on_rows_kept_out_of_training(tmp_path):
    write_study(tmp_path, lora=(0.60, 0.61), bitfit=(0.50, 0.49))  # at the rate with the best figure
    write_run(tmp_path / "head", "cola", 0, (0.5,), method=HEAD)
    write_run(tmp_path / "houlsby", "cola", 0, (0.5,), method=HOULSBY, learning_rate=1e-2)
    write_run(tmp_path / "houlsby_c", "cola", 0, (0.5,), method=HOULSBY, learning_rate=1e-3, validation_from_train=10)
    write_run(tmp_path / "bitfit_c", "rte", 0, (0.5,), method=BITFIT, learning_rate=1e-3)
    for rate, figure in ((1e-3, 0.5), (2e-3, 0.6)):
        chosen = {"learning_rate": rate, "validation_from_train": 10}
        write_run(tmp_path / f"bitfit_{rate}", "rte", 0, (figure,), method=BITFIT, **chosen)
    exceptions = ["head alone on CoLA (none was tried)", "Houlsby 8 on CoLA (another was tried)",
                  "BitFit on RTE (another was better)"]  # fmt: skip
    sentence = re.search("with one seed, except for (.*)\\.\n", compare(tmp_path))
    assert sentence and {*sentence[1].split(", ")} == {*exceptions}


def test_runs_on_different_examples_and_rates_that_no_picture_can_show_are_no_traceback(tmp_path):
    for name, method in (("lora", LORA), ("head", HEAD)):
        for rate in (0.0, 1e-3):
            folder = write_run(tmp_path / f"{name}_{rate}", "cola", 0, (0.5,), method=method, learning_rate=rate,
                               validation_from_train=10)  # fmt: skip
        folder = write_run(tmp_path / name, "cola", 0, (0.5,), method=method)
        scores = json.loads((folder / "eval_results.json").read_text())
        write(folder / "eval_results.json", scores | {"eval_data": name})
    text = compare(tmp_path, out=tmp_path / "report")
    places = ", ".join(str(tmp_path / name) for name in ("head", "lora"))
    assert f"compared, but evaluated on different examples: {places}" in text.replace("\\", "")
    run = json.loads((tmp_path / "lora" / "run.json").read_text())
    write(tmp_path / "lora" / "run.json", run | {"hyperparameters": run["hyperparameters"] | {"learning_rate": "x"}})
    with pytest.raises(UserError, match="learning_rate is not a number"):
        compare(tmp_path / "lora")


def test_a_comparison_whose_choosing_runs_all_diverged_is_still_reported(tmp_path):
    folder = write_run(tmp_path / "choosing", "cola", 0, (0.5,), validation_from_train=10)
    write(folder / "run.json", json.loads((folder / "run.json").read_text()) | {"diverged": "the loss is nan"})
    write_run(tmp_path / "final", "cola", 0, (0.5,))
    text = compare(tmp_path)
    assert (
        "the runs to choose the rates (1): each diverged" in text.replace("\\", "")
        and "No runs here chose between rates." in text
    )
