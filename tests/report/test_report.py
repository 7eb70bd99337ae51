"""The report on runs over seeds: every number of its tables, what is missing, and what its pictures show."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import lora_nlu.report
from lora_nlu import files
from lora_nlu.errors import UserError
from lora_nlu.report import pictures
from lora_nlu.report.__main__ import main
from lora_nlu.report.collect import Cell, collect
from lora_nlu.report.submission import find_runs
from lora_nlu.report.tables import (
    PROTOCOL,
    latex,
    markdown,
    methods_of,
    one_decimal,
    rank_cells,
    rank_table,
    run_lines,
    spread,
    write_report,
)

LORA = {"name": "lora", "targets": ["query", "value"], "layers": None, "lora_dropout": 0.0}
HOULSBY, PFEIFFER = {"name": "houlsby", "adapter_size": 8}, {"name": "pfeiffer", "adapter_size": 64}
BITFIT, FULL, HEAD = {"name": "bitfit"}, {"name": "full"}, {"name": "head"}
METRICS = {"cola": "matthews_correlation", "stsb": "pearson"}  # of the others accuracy
HEADINGS = {  # in the order of the paper's columns
    "mnli": "MNLI accuracy", "sst2": "SST-2 accuracy", "mrpc": "MRPC accuracy", "cola": "CoLA Matthews",
    "qnli": "QNLI accuracy", "qqp": "QQP accuracy", "rte": "RTE accuracy", "stsb": "STS-B Pearson",
}  # fmt: skip
# roberta-large's two lines for LoRA in the paper's table 2, and both averages as printed there
LARGE = {
    "from MNLI": ["90.6 ± 0.2", "96.2 ± 0.5", "90.9 ± 1.2", "68.2 ± 1.9", "94.9 ± 0.3", "91.6 ± 0.1", "87.4 ± 2.5",
                  "92.6 ± 0.2", "89.0"],
    "not": ["90.6 ± 0.2", "96.2 ± 0.5", "90.2 ± 1.0", "68.2 ± 1.9", "94.8 ± 0.3", "91.6 ± 0.2", "85.2 ± 1.1",
            "92.3 ± 0.5", "88.6"],
}  # fmt: skip


def write_run(
    folder: Path,
    task: str = "cola",
    seed: int = 0,
    figures: Any = (0.25, 0.75, 0.5),
    *,
    state: str = "done",
    model: str = "roberta-base",
    base: str = "0123456789abcdef",
    method: dict[str, Any] = LORA,
    rank: int = 8,
    scaling: float = 2.0,
    relative: bool = False,
    start: str | None = None,
    encoder: int = 294_912,
    overall: float | None = None,
    measured: dict[str, float] | None = None,
    **hyper: Any,
) -> Path:
    """An output folder of run_glue.py, of 10 epochs with one evaluation after each 100 steps and one at the end.

    state: done; unevaluated, trained without --do_eval; stopped, with checkpoints; or begun, without.
    """
    folder.mkdir(parents=True)
    metric, trained = f"eval_{METRICS.get(task, 'accuracy')}", state in ("done", "unevaluated")
    log: list[dict[str, float]] = [{"step": 10, "loss": 0.7}]
    log += [{"step": 100 * i, "epoch": i, metric: figure} for i, figure in enumerate(figures, 1)]
    is_lora = method["name"] == "lora"
    known = {
        "task": task, "labels": [], "base_model": f"/models/{model}", "base_fingerprint": base, "started_from": start,
        "lora": {"ranks": [rank] * is_lora, "scalings": [scaling] * is_lora, "lora_relative_query": relative},
        "method": method, "parameters": {"encoder": encoder, "trainable": encoder + 1538, "total": 125_000_000},
        "hyperparameters": {"seed": seed, "data_seed": None, "learning_rate": 5e-4, "num_train_epochs": 10.0,
                            "train_samples": 8551, "reg_loss_wgt": 0.0, "masking_prob": 0.0} | hyper,
    } | ({"trained": True} if trained else {})  # fmt: skip
    write(folder / "run.json", known)
    for step in (50, 150, 1000) if state == "stopped" else ():
        write(folder / f"checkpoint-{step}" / "trainer_state.json", {"epoch": step / 400, "log_history": log})
    if trained:
        write(folder / "trainer_state.json", {"epoch": 10.0, "log_history": log})
        write(folder / "train_results.json", {"train_seconds": 100.0, "peak_memory_gib": 2.0} | (measured or {}))
    if state == "done":
        both = {f"{metric}_mm": 0.1, f"{metric}_overall": overall} if overall else {}
        write(folder / "eval_results.json", {metric: figures[-1], "eval_loss": 0.5} | both)
    return folder


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def write_seeds(folder: Path, task: str, ends: Any, **settings: Any) -> None:
    """A run for each figure, seeds from 0, evaluated twice: the first time lower by 0.1."""
    for seed, end in enumerate(ends):
        write_run(folder / f"{task}_{seed}", task, seed, (end - 0.1, end), **settings)


def read(*folders: Path) -> str:
    return write_report(*collect(folders), None)


def rows_of(text: str) -> list[list[str]]:
    """The cells of every line of Markdown tables, headings among them."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def values(text: str, method: str, which: str = "best epoch") -> dict[str, str]:
    """What the line of a method says, by heading; which: best epoch, last or paper."""
    heading, *rows = rows_of(text)
    name = ""
    for row in rows:
        name = row[0] or name
        if name == method and row[2] == which:
            return dict(zip(heading, row, strict=True))
    raise AssertionError(f"no line {which!r} of {method!r} in\n{text}")


def said(text: str) -> list[str]:
    """The remarks below the tables."""
    return [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")]


def names(folder: Path) -> list[str]:
    """The methods that the table of these runs has, in its order."""
    return [row[0] for row in rows_of(read(folder))[1:] if row[0]]


def refusal(*folders: Path) -> str:
    with pytest.raises(UserError) as caught:
        collect(folders)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ every number


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two tasks, three seeds; one run unfinished, two never begun. The figures below are of these."""
    folder = tmp_path_factory.mktemp("small")
    for seed, (best, last) in enumerate([(0.60, 0.58), (0.67, 0.67), (0.62, 0.60)]):
        measured = {"train_seconds": [50.0, 3700.0, 70.6][seed], "peak_memory_gib": 2.0 + seed}
        write_run(folder / f"lora_cola_{seed}", "cola", seed, (0.1, best, last), measured=measured)
    for seed, figures in enumerate([(0.5, 0.8), (0.9, 0.7)]):
        write_run(folder / f"lora_qnli_{seed}", "qnli", seed, figures, measured={"peak_gpu_memory_gib": 11.3})
    write_run(folder / "lora_qnli_2", "qnli", 2, state="stopped", measured={"train_seconds": 9e9})
    write_run(folder / "bitfit_cola_1", "cola", 1, (0.5,), method=BITFIT, encoder=102_144)
    return folder


SMALL = """
| method   | trainable |            | CoLA Matthews | QNLI accuracy       | average | training               | memory   |
| BitFit   | 102,144   | best epoch | 50.0 (1 of 3) | -                   | -       | 0:01:40 (1 of 2 tasks) | 2.0 GiB  |
|          |           | last       | 50.0 (1 of 3) | -                   | -       |                        |          |
|          | 0.1M      | paper      | 62.0          | -                   | -       |                        |          |
| LoRA r=8 | 294,912   | best epoch | 62.0 ± 3.6    | 85.0 ± 7.1 (2 of 3) | -       | 0:02:51                | 11.3 GiB |
|          |           | last       | 60.0 ± 4.7    | 75.0 ± 7.1 (2 of 3) | -       |                        |          |
|          | 0.3M      | paper      | 63.4 ± 1.2    | 93.3 ± 0.3          | 78.4    |                        |          |
"""  # noqa: E501


def test_the_table_is_the_one_worked_out_by_hand(small):
    # sample deviations: of 60, 62, 67 sqrt(26 / 2), of 58, 60, 67 sqrt(134 / 3 / 2), of 80, 90 and 80, 70 sqrt(50);
    # time: 70.6 + 100 s, the medians; memory: the GPU's where there is one; the paper: (63.4 + 93.3) / 2 = 78.35
    text = read(small)
    assert rows_of(text) == rows_of(SMALL) and text.startswith("## roberta-base, 3 seeds\n\n| method   | trainable |")
    assert said(text) == [
        f"unfinished: {small}/lora_qnli_2, its last checkpoint at epoch 2.5 of 10",
        "missing, seeds 0, 2: BitFit on CoLA (roberta-base)",
        "evaluated once, so that the best epoch is the last: runs of CoLA",
    ]
    assert "`best epoch` takes each run's best evaluation while training, the paper's protocol" in text


def test_the_markdown_is_a_table_of_even_columns():
    assert markdown([["a", "", "b"], ["ccc", "dd", ""]]) == "| a   |    | b |\n|-----|----|---|\n| ccc | dd |   |"


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray], np.ndarray]:
    """A method on eight tasks over five seeds: where, random figures [seeds, epochs] by task, MNLI's overall."""
    folder, rng = tmp_path_factory.mktemp("glue"), np.random.default_rng(0)
    figures, overall = {task: rng.uniform(0.3, 0.9, (5, 4)) for task in HEADINGS}, rng.uniform(0.3, 0.9, 5)
    for task in reversed(HEADINGS):  # the order on disk is another
        for seed in range(5):
            on_both = {"overall": overall[seed]} if task == "mnli" else {}
            seconds = {"train_seconds": 1000.0 * len(task) + seed}
            place = folder / task / str(seed)
            write_run(place, task, seed, figures[task][seed], method=FULL, measured=seconds, **on_both)
    return folder, figures, overall


def test_medians_sample_deviations_and_averages_over_all_tasks_are_numpys(glue):
    folder, figures, overall = glue
    text, medians = read(folder), {"best epoch": [], "last": []}
    for task, heading in HEADINGS.items():
        last = overall if task == "mnli" else figures[task][:, -1]
        for which, of_seeds in (("best epoch", figures[task].max(axis=1)), ("last", last)):
            shown = f"{100 * np.median(of_seeds):.1f} ± {100 * np.std(of_seeds, ddof=1):.1f}"
            assert values(text, "fine-tuning", which)[heading] == shown, (task, which)
            medians[which].append(100 * np.median(of_seeds))
    for which, each in medians.items():
        assert values(text, "fine-tuning", which)["average"] == f"{np.mean(each):.1f}"
    # 1000 s a letter of the tasks' names, 30 in all, and the middle seed's 2 s a task
    assert values(text, "fine-tuning")["training"] == "8:20:16"


def test_tasks_stand_in_the_papers_order_whatever_the_folders_and_others_after_them(glue, tmp_path):
    write_run(tmp_path / "a", "wnli", method=FULL)
    headings = rows_of(read(tmp_path, glue[0]))[0]
    wanted = [*HEADINGS.values(), "WNLI accuracy"]
    assert headings == ["method", "trainable", "", *wanted, "average", "training", "memory"]


def test_mnlis_last_is_on_both_validation_sets_and_its_best_epoch_on_the_matched_alone(tmp_path):
    write_run(tmp_path / "a", "mnli", 0, (0.70, 0.80, 0.75), overall=0.85)
    text = read(tmp_path)
    assert values(text, "LoRA r=8")["MNLI accuracy"] == "80.0"
    assert values(text, "LoRA r=8", "last")["MNLI accuracy"] == "85.0"
    assert (
        "MNLI: `last` is on both validation sets together, as the paper's; the best epoch is on the matched."
        in said(text)
    )


def test_the_evaluation_after_training_counts_for_the_best_epoch_where_no_step_before_had_one(tmp_path):
    write_run(tmp_path / "a", "cola", 0, (0.4, 0.5))
    write(tmp_path / "a" / "eval_results.json", {"eval_matthews_correlation": 0.625})
    assert values(read(tmp_path), "LoRA r=8")["CoLA Matthews"] == "62.5"
    write(tmp_path / "a" / "trainer_state.json", {"epoch": 10.0, "log_history": []})
    assert values(read(tmp_path), "LoRA r=8")["CoLA Matthews"] == "62.5"


def test_stsb_is_pearsons_correlation_in_percent(tmp_path):
    for seed, figures in enumerate([(0.9123, 0.8), (float("nan"), 0.5, 0.4), (0.7, 0.6)]):
        write_run(tmp_path / str(seed), "stsb", seed, figures)  # an evaluation without a number is none
    text = read(tmp_path)
    assert values(text, "LoRA r=8")["STS-B Pearson"] == "70.0 ± 20.6"  # 91.23, 50, 70
    assert values(text, "LoRA r=8", "last")["STS-B Pearson"] == "60.0 ± 20.0"  # 80, 40, 60


@pytest.mark.parametrize(
    ("file", "broken", "why"),
    [
        ("eval_results.json", {"eval_matthews_correlation": 0.99, "eval_loss": float("nan")}, "eval_loss nan"),
        ("eval_results.json", {"eval_matthews_correlation": float("nan")}, "eval_matthews_correlation nan"),
        ("train_results.json", {"train_seconds": 1.0, "train_loss": float("inf")}, "train_loss inf"),
        ("trainer_state.json", {"log_history": [{"step": 1, "loss": 0.0, "grad_norm": float("nan")}]}, "grad_norm nan"),
    ],
)
def test_a_diverged_run_is_left_out_by_name_and_in_no_median(tmp_path, file, broken, why):
    for seed, end in enumerate((0.4, 0.5, 0.6)):
        write_run(tmp_path / str(seed), "cola", seed, (end,))
    write(tmp_path / "2" / file, broken)
    text = read(tmp_path)
    assert f"left out, diverged ({why}): {tmp_path / '2'}" in said(text)
    assert values(text, "LoRA r=8")["CoLA Matthews"] == "45.0 ± 7.1"  # 40, 50
    assert f"left out, diverged ({why}): {tmp_path / '2'}" in refusal(tmp_path / "2")


def test_settings_at_their_default_that_older_versions_did_not_record_divide_no_line(tmp_path):
    """Two seeds of an older version and one of this are one line; a setting that is not at its default has its own."""
    write_seeds(tmp_path, "cola", (0.6, 0.7))
    more = {"neftune_noise_alpha": None, "lr_scheduler_kwargs": None, "dataloader_drop_last": False}
    for seed, settings in ((2, more), (0, more | {"neftune_noise_alpha": 5.0})):
        folder = write_run(tmp_path / f"new_{seed}", "cola", seed, (0.5, 0.65), **settings)
        run = json.loads((folder / "run.json").read_text())
        run["left_at_default"] = [name for name, value in more.items() if settings[name] == value]
        write(folder / "run.json", run)
    line = "LoRA r=8 (neftune_noise_alpha not recorded)"
    assert sorted(names(tmp_path)) == ["LoRA r=8 (neftune_noise_alpha 5.0)", line]
    assert values(read(tmp_path), line)["CoLA Matthews"].startswith("65.0 ")


def test_a_run_that_stopped_where_it_diverged_is_left_out_by_name(tmp_path):
    write_run(tmp_path / "a", "cola", 0)
    run = write_run(tmp_path / "b", "cola", 1, state="stopped")
    write(run / "checkpoint-1000" / "trainer_state.json", {"log_history": [{"step": 1000, "loss": float("nan")}]})
    assert f"left out, diverged (loss nan): {run}" in said(read(tmp_path))


def test_a_run_that_recorded_that_it_diverged_is_left_out_for_that_reason_of_report_and_submission(tmp_path):
    write_run(tmp_path / "a", "cola", 0)
    run = write_run(tmp_path / "b", "cola", 1, state="begun")
    known = json.loads((run / "run.json").read_text())
    assert f"unfinished: {run}, no checkpoint yet" in said(read(tmp_path))
    write(run / "run.json", known | {"diverged": "the loss is nan at step 12"})
    assert f"left out, diverged (the loss is nan at step 12): {run}" in said(read(tmp_path))
    assert [one.figures.diverged for one in find_runs([run])] == ["the loss is nan at step 12"]


def test_the_training_data_divide_no_line_and_are_no_setting_but_other_ones_in_a_line_are_said(tmp_path):
    for task in ("cola", "rte"):
        for seed, data in enumerate(({"train_data": f"{task}1"}, {}, {"train_data": f"{task}1"})):
            write_run(tmp_path / f"{task}_{seed}", task, seed, (0.5,), **data)
    text = read(tmp_path)
    assert names(tmp_path) == ["LoRA r=8"] and "train_data" not in text and "examples that differ" not in text
    other = write_run(tmp_path / "rte_3", "rte", 3, (0.5,), train_data="rte2")
    assert names(tmp_path) == ["LoRA r=8"]
    line = f"in one line, but trained on examples that differ: {tmp_path / 'rte_2'}, {other}"
    assert line in said(read(tmp_path))


def test_the_figure_by_which_a_submission_chooses_is_the_reports_last(tmp_path):
    """One function reads both; the report says the rule."""
    for seed, figures in enumerate([(0.9, 0.6), (0.8, 0.7)]):
        write_run(tmp_path / str(seed), "mnli", seed, figures, overall=figures[-1] + 0.01)
    cells, _ = collect([tmp_path])
    assert {run.seed: run.last for run in cells[0].done} == {
        run.seed: 100 * run.figures.last for run in find_runs([tmp_path]) if run.figures.last is not None
    }
    assert "That model makes the predictions, and by `last` a submission chooses among seeds." in read(tmp_path)


def test_halves_are_rounded_to_the_even_digit_whatever_the_nearest_binary_number():
    assert spread([92.35]) == "92.4" and spread([92.25]) == "92.2"
    ties = {86.35: "86.4", 85.15: "85.2", 89.05: "89.0"}  # three averages of the paper's table, and as it prints them
    assert {value: one_decimal(value) for value in ties} == ties
    assert spread([10.0, 12.25, 14.5]) == "12.2 ± 2.2"  # sqrt(2 x 2.25^2 / 2) = 2.25


def test_a_method_whose_runs_train_differently_many_parameters_shows_all_counts(tmp_path):
    for task, encoder in (("cola", 102_144), ("rte", 999)):
        write_run(tmp_path / task, task, method=BITFIT, encoder=encoder)
    assert values(read(tmp_path), "BitFit")["trainable"] == "999/102,144"


def test_methods_stand_by_what_they_train_with_fine_tuning_first(tmp_path):
    sizes = [(LORA, 294_912), (FULL, 124_055_040), (HOULSBY, 300_000), (HEAD, 0), (BITFIT, 102_144)]
    for i, (method, encoder) in enumerate(sizes):
        write_run(tmp_path / str(i), method=method, encoder=encoder)
    assert names(tmp_path) == ["fine-tuning", "head alone", "BitFit", "LoRA r=8", "Houlsby 8"]


def test_runs_without_time_or_memory_show_none(tmp_path):
    write_run(tmp_path / "a")
    write(tmp_path / "a" / "train_results.json", {"train_loss": 0.5})
    line = values(read(tmp_path), "LoRA r=8")
    assert (line["training"], line["memory"]) == ("-", "-")


# ------------------------------------------------------------------------------------------------------ CSV and LaTeX


def test_the_csv_has_a_line_for_each_run_finished_or_not_with_the_same_figures(small):
    table = list(csv.reader(io.StringIO(run_lines(collect([small])[0]))))
    assert table[0] == [
        "model", "method", "task", "metric", "seed", "state", "best_percent", "last_percent", "paper_median_percent",
        "trainable_in_encoder", "train_seconds", "peak_memory_gib", "folder",
    ]  # fmt: skip
    cola, qnli = "cola,matthews_correlation", "qnli,accuracy"
    stopped = "its last checkpoint at epoch 2.5 of 10"
    assert [row[:3] for row in table[1:]] == [
        *[["roberta-base", "BitFit", "cola"]] * 1, *[["roberta-base", "LoRA r=8", "cola"]] * 3,
        *[["roberta-base", "LoRA r=8", "qnli"]] * 3,
    ]  # fmt: skip
    assert sorted(",".join(row) for row in table[1:]) == [
        f"roberta-base,BitFit,{cola},1,done,50.0,50.0,62.0,102144,100.0,2.0,{small}/bitfit_cola_1",
        f"roberta-base,LoRA r=8,{cola},0,done,60.0,58.0,63.4,294912,50.0,2.0,{small}/lora_cola_0",
        f"roberta-base,LoRA r=8,{cola},1,done,67.0,67.0,63.4,294912,3700.0,3.0,{small}/lora_cola_1",
        f"roberta-base,LoRA r=8,{cola},2,done,62.0,60.0,63.4,294912,70.6,4.0,{small}/lora_cola_2",
        f"roberta-base,LoRA r=8,{qnli},0,done,80.0,80.0,93.3,294912,100.0,11.3,{small}/lora_qnli_0",
        f"roberta-base,LoRA r=8,{qnli},1,done,90.0,70.0,93.3,294912,100.0,11.3,{small}/lora_qnli_1",
        f"roberta-base,LoRA r=8,{qnli},2,{stopped},,,93.3,294912,,,{small}/lora_qnli_2",
    ]


def test_names_with_commas_stay_one_field_of_the_csv(tmp_path):
    write_run(tmp_path / "a, b", method=LORA | {"targets": ["query", "key"]})
    (row,) = csv.DictReader(io.StringIO(run_lines(collect([tmp_path])[0])))
    assert (row["method"], row["folder"]) == ("LoRA r=8 on query, key", f"{tmp_path}/a, b")


def read_latex(text: str) -> list[list[list[str]]]:
    """The rows of each tabular, its form checked: nothing but \\hline and rows, each of the columns declared."""
    tables = []
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    blocks = re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\n\\end\{tabular\}", code, flags=re.DOTALL)
    assert len(blocks) == code.count("\\begin") == code.count("\\end")
    for columns, content in blocks:
        lines = content.split("\n")
        assert [i for i, line in enumerate(lines) if line == r"\hline"] == [0, 2, len(lines) - 1]
        rows = [line for line in lines if line != r"\hline"]
        assert all(row.endswith(r" \\") and not row.startswith("[") for row in rows)
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)&", row.removesuffix(r"\\"))] for row in rows]
        assert {len(row) for row in cells} == {len(columns)}
        for cell in (cell for row in cells for cell in row):
            bare = re.sub(r"\\[&%$#_{}]|\\text\w+\{\}|\$\\pm\$", "", cell)
            assert not re.search(r"[&%$#_{}~^\\]|[^\x00-\x7f]", bare), cell
        tables.append(cells)
    return tables


def test_the_latex_is_a_plain_tabular_with_the_cells_of_the_markdown_and_says_the_protocol(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    write_run(tmp_path / "runs" / "a", "cola", 1, method=BITFIT, encoder=102_144, learning_rate=1e-4)
    write_report(*collect([small, tmp_path / "runs"]), tmp_path)
    text = (tmp_path / "report.tex").read_text()
    (table,) = read_latex(text)
    expected = rows_of((tmp_path / "report.md").read_text())
    assert table == [[cell.replace("±", r"$\pm$").replace("_", r"\_") for cell in row] for row in expected]
    assert any(row[0] == r"BitFit (learning\_rate 0.0001)" for row in table)
    assert f"% {PROTOCOL}" in text and f"% unfinished: {small}/lora_qnli_2" in text


def test_every_character_that_latex_takes_for_its_own_is_escaped():
    ((_, row),) = read_latex(latex([["", "x"], [r"50% of a_b & {c} #1 $ ~ ^ \ ±", "y"]]))
    escaped = r"50\% of a\_b \& \{c\} \#1 \$ \textasciitilde{} \textasciicircum{} \textbackslash{} $\pm$"
    assert row == [escaped, "y"]


# -------------------------------------------------------------------------------------------------- the paper's figures

SAME = [
    ("roberta-base", {"method": LORA}, "63.4 ± 1.2"),
    ("roberta-base", {"method": BITFIT}, "62.0"),
    ("roberta-base", {"method": FULL}, "63.6"),
    ("roberta-large", {"method": LORA}, "68.2 ± 1.9"),
    ("roberta-large", {"method": FULL}, "68.0"),
    ("roberta-large", {"method": HOULSBY}, "66.3 ± 2.0"),
    ("roberta-large", {"method": HOULSBY | {"adapter_size": 64}}, "66.5 ± 4.4"),
    ("roberta-large", {"method": PFEIFFER}, "68.3 ± 1.0"),
    ("roberta-large", {"method": PFEIFFER | {"adapter_size": 16}}, "67.8 ± 2.5"),
    ("deberta-v2-xxlarge", {"method": LORA, "rank": 16}, "72.4 ± 1.1"),
    ("deberta-v2-xxlarge", {"method": FULL}, "72.0"),
]
OTHER = [
    ("roberta-base", {"rank": 4}),
    ("deberta-v2-xxlarge", {"rank": 8}),
    ("deberta-v2-xxlarge", {"rank": 16, "relative": True}),
    ("roberta-base", {"method": LORA | {"targets": ["query"]}}),
    ("roberta-base", {"method": LORA | {"layers": [0, 1]}}),
    ("roberta-base", {"method": LORA | {"lora_dropout": 0.1}}),
    ("roberta-base", {"method": LORA | {"biases": True}}),
    ("roberta-base", {"reg_loss_wgt": 1.0}),
    ("deberta-v2-xxlarge", {"rank": 16, "reg_loss_wgt": 1.0, "masking_prob": 0.1}),
    ("deberta-v2-xxlarge", {"method": FULL, "reg_loss_wgt": 0.5}),
    ("roberta-base", {"start": "output/roberta_base_mnli"}),
    ("roberta-large", {"start": "output/roberta_large_mnli"}),
    ("roberta-base", {"method": HEAD}),
    ("roberta-base", {"method": HOULSBY}),
    ("roberta-large", {"method": BITFIT}),
    ("roberta-large", {"method": PFEIFFER | {"adapter_size": 8}}),
    ("encoder", {}),
    ("deberta-v2-xlarge", {"rank": 16}),
]


@pytest.mark.parametrize(("model", "settings", "figure"), SAME)
def test_the_papers_line_stands_under_a_method_with_its_settings(tmp_path, model, settings, figure):
    write_run(tmp_path / "a", model=model, **settings)
    *_, line = rows_of(read(tmp_path))
    assert line[2:4] == ["paper", figure]


@pytest.mark.parametrize(("model", "settings"), OTHER)
def test_other_settings_than_the_papers_have_no_line_of_it(tmp_path, model, settings):
    write_run(tmp_path / "a", model=model, **settings)
    assert [row[2] for row in rows_of(read(tmp_path))[1:]] == ["best epoch", "last"]


@pytest.mark.parametrize(("task", "figure"), [("mrpc", "89.7 ± 0.7"), ("rte", "86.6 ± 0.7"), ("stsb", "91.5 ± 0.2")])
def test_where_the_papers_lora_starts_from_mnlis_adapter_runs_that_do_not_have_no_figure_of_it(tmp_path, task, figure):
    write_run(tmp_path / "base" / "from", task, start="mnli/adapter_model.safetensors")
    assert values(read(tmp_path), "LoRA r=8", "paper")[HEADINGS[task]] == figure
    write_run(tmp_path / "not", task, model="other-base")
    write_run(tmp_path / "not_either", task, 1)
    text = read(tmp_path / "not", tmp_path / "not_either")
    assert "| paper" not in text


@pytest.mark.parametrize("starts", LARGE)
def test_of_roberta_larges_two_lora_lines_the_one_with_the_same_start_stands_whole(tmp_path, starts):
    for task in HEADINGS:
        start = "mnli.bin" if starts == "from MNLI" and task in ("mrpc", "rte", "stsb") else None
        write_run(tmp_path / task, task, model="roberta-large", start=start, encoder=786_432)
    line = values(read(tmp_path), "LoRA r=8", "paper")
    assert [line[heading] for heading in (*HEADINGS.values(), "average")] == LARGE[starts]
    assert line["trainable"] == "0.8M"


def test_starts_of_both_kinds_have_their_own_figures_and_no_average_of_the_papers(tmp_path):
    for task, start in (("qnli", None), ("mrpc", "mnli.bin"), ("rte", None)):
        write_run(tmp_path / task, task, model="roberta-large", start=start)
    line = values(read(tmp_path), "LoRA r=8", "paper")
    figures = [line[HEADINGS[task]] for task in ("mrpc", "qnli", "rte")]
    assert figures == ["90.9 ± 1.2", "94.9 ± 0.3", "85.2 ± 1.1"] and line["average"] == "-"


def test_a_task_that_the_paper_has_not_gets_no_figure_and_the_papers_line_no_average(tmp_path):
    for task in ("wnli", "cola"):
        write_run(tmp_path / task, task)
    line = values(read(tmp_path), "LoRA r=8", "paper")
    assert (line["CoLA Matthews"], line["WNLI accuracy"], line["average"]) == ("63.4 ± 1.2", "-", "-")


# ------------------------------------------------------------------------------------------------------ what is one row


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "LoRA r=8"),
        ({"rank": 4}, "LoRA r=4"),
        ({"method": LORA | {"targets": ["query", "key", "value", "dense"]}}, "LoRA r=8 on query, key, value, dense"),
        ({"method": LORA | {"layers": [10, 11], "lora_dropout": 0.05}}, "LoRA r=8 layers 10, 11 dropout 0.05"),
        ({"method": LORA | {"biases": True}}, "LoRA r=8 and biases"),
        ({"relative": True}, "LoRA r=8 and relative query"),
        ({"reg_loss_wgt": 0.5}, "LoRA r=8 R-Drop 0.5"),
        ({"reg_loss_wgt": 1.0, "masking_prob": 0.1}, "LoRA r=8 cutoff 1"),
        ({"method": HOULSBY}, "Houlsby 8"),
        ({"method": PFEIFFER}, "Pfeiffer 64"),
        ({"method": PFEIFFER | {"biases": True}}, "Pfeiffer 64 and biases"),
        ({"method": BITFIT}, "BitFit"),
        ({"method": HEAD}, "head alone"),
        ({"method": FULL}, "fine-tuning"),
    ],
)
def test_a_method_is_named_with_all_that_makes_it_another(tmp_path, settings, name):
    write_run(tmp_path / "a", **settings)
    assert names(tmp_path) == [name]


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path):
    for seed in (3, 1, 2):
        write_run(tmp_path / str(seed), seed=seed, data_seed=seed)
    (cell,), absent = collect([tmp_path])
    assert [run.seed for run in cell.done] == [1, 2, 3] and not absent


def test_runs_that_start_from_the_adapters_of_different_seeds_are_one_row(tmp_path):
    write_seeds(tmp_path, "rte", (0.7,), start="mnli/seed_0/adapter_model.safetensors")
    write_run(tmp_path / "other", "rte", 1, start="mnli/seed_1/adapter_model.safetensors")
    assert names(tmp_path) == ["LoRA r=8"]


@pytest.mark.parametrize(
    ("one", "other", "rows"),
    [
        ({"learning_rate": 1e-4}, {"learning_rate": 4e-4}, ["learning_rate 0.0001", "learning_rate 0.0004"]),
        ({"scaling": 1.0}, {"scaling": 0.25}, ["scaling 0.25", "scaling 1"]),
        ({"lr": 1, "fp16": True}, {"lr": 2, "fp16": False}, ["lr 1, fp16 True", "lr 2, fp16 False"]),
        ({"bf16": True}, {}, ["bf16 True", "bf16 not recorded"]),
        ({"start": "mnli.bin"}, {}, ["started from an adapter", "started from the base model"]),
    ],
)  # fmt: skip
def test_runs_that_differ_in_a_setting_are_rows_that_name_it(tmp_path, one, other, rows):
    write_run(tmp_path / "a", "rte", 0, (0.5, 0.6), **one)
    write_run(tmp_path / "b", "rte", 0, (0.7, 0.8), **other)
    write_run(tmp_path / "c", "cola", 0)
    assert sorted(names(tmp_path)) == ["LoRA r=8", *(f"LoRA r=8 ({row})" for row in rows)]
    figures = sorted(values(read(tmp_path), f"LoRA r=8 ({row})")["RTE accuracy"] for row in rows)
    assert figures == ["60.0", "80.0"]


def test_another_base_model_of_the_same_name_has_a_table_of_its_own(tmp_path):
    for place, base in (("a", "0123456789abcdef"), ("b", "fedcba9876543210")):
        write_run(tmp_path / place / "cola", "cola", 0, base=base)
        write_run(tmp_path / place / "rte", "rte", 0, base=base)
    titles = [line for line in read(tmp_path).splitlines() if line.startswith("## ")]
    assert titles == ["## roberta-base@01234567, 1 seed", "## roberta-base@fedcba98, 1 seed"]
    assert read(tmp_path / "a").startswith("## roberta-base, 1 seed\n")


def test_every_model_has_its_table_with_its_own_tasks_and_seeds(tmp_path):
    write_seeds(tmp_path / "a", "cola", (0.5, 0.6), model="roberta-large")
    write_seeds(tmp_path / "b", "rte", (0.7,), model="roberta-base")
    text = read(tmp_path)
    assert [line for line in text.splitlines() if line[:2] == "##"] == [
        "## roberta-base, 1 seed",
        "## roberta-large, 2 seeds",
    ]
    assert [row[3] for row in rows_of(text) if row[0] == "method"] == ["RTE accuracy", "CoLA Matthews"]
    assert not said(text)


def test_the_same_seed_twice_is_refused_naming_both_folders(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name, seed=7)
    assert refusal(tmp_path) == f"{tmp_path}/one and {tmp_path}/two are the same run with the same seed: name one."


def test_a_folder_given_twice_or_by_a_link_counts_once(tmp_path):
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    (cell,), _ = collect([tmp_path / "runs", tmp_path / "runs" / "a", tmp_path / "link"])
    assert len(cell.runs) == 1


# ----------------------------------------------------------------------------------------------- missing and unfinished


@pytest.mark.parametrize(
    ("state", "progress"),
    [
        ("stopped", "its last checkpoint at epoch 2.5 of 10"),
        ("begun", "no checkpoint yet"),
        ("unevaluated", "trained, not evaluated"),
    ],
)
def test_a_run_without_a_result_is_called_unfinished_and_says_how_far_it_got(tmp_path, state, progress):
    write_run(tmp_path / "a", state=state)
    write_run(tmp_path / "b", "rte")
    text = read(tmp_path)
    for which in ("best epoch", "last"):
        line = values(text, "LoRA r=8", which)
        assert (line["CoLA Matthews"], line["average"]) == ("unfinished", "-")
    assert f"unfinished: {tmp_path}/a, {progress}" in said(text)


def test_a_checkpoint_half_written_and_files_of_ones_own_are_not_progress(tmp_path):
    write_run(tmp_path / "a", state="stopped")
    write(tmp_path / "a" / "checkpoint-9000.saving" / "trainer_state.json", {"epoch": 9.9})
    write(tmp_path / "a" / "checkpoint-best" / "trainer_state.json", {"epoch": 9.9})
    (tmp_path / "a" / "checkpoint-9001").mkdir()
    assert "epoch 2.5 of 10" in said(read(tmp_path))[0]


def test_no_average_includes_a_method_that_lacks_a_seed_or_a_task(tmp_path):
    for method in (LORA, BITFIT, HEAD):
        for task in ("cola", "rte"):
            write_seeds(tmp_path / method["name"], task, (0.5, 0.6), method=method)
    text = read(tmp_path)
    assert {values(text, name)["average"] for name in names(tmp_path)} == {"55.0"}
    write(tmp_path / "bitfit" / "rte_1" / "run.json", {})
    for path in (tmp_path / "head").glob("rte_*/run.json"):
        path.unlink()
    text = read(tmp_path)
    assert [values(text, name)["average"] for name in ("LoRA r=8", "BitFit", "head alone")] == ["55.0", "-", "-"]
    assert [values(text, name)["RTE accuracy"] for name in ("BitFit", "head alone")] == ["50.0 (1 of 2)", "-"]
    assert values(text, "head alone")["training"] == "0:01:40 (1 of 2 tasks)"
    assert said(text) == ["missing, seed 1: BitFit on RTE (roberta-base)"]


def test_seeds_that_some_runs_have_and_others_lack_are_listed_together(tmp_path):
    write_seeds(tmp_path / "a", "cola", (0.5, 0.6, 0.7))
    write_seeds(tmp_path / "b", "rte", (0.5,), start="mnli")
    write_seeds(tmp_path / "c", "rte", (0.5,), method=BITFIT)
    write_run(tmp_path / "d", "cola", 1, state="begun", method=BITFIT)
    lines = said(read(tmp_path))
    where = "LoRA r=8 on RTE (roberta-base); BitFit on RTE (roberta-base)"
    assert f"missing, seeds 1, 2: {where}" in lines and "missing, seeds 0, 2: BitFit on CoLA (roberta-base)" in lines


def test_folders_given_that_are_not_there_or_hold_no_training_are_listed(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "evaluated", state="begun", train_samples=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    text = read(tmp_path / "a", *(tmp_path / name for name in ("gone", "empty", "evaluated", "file")))
    assert said(text) == [
        f"missing: {tmp_path}/gone",
        f"missing: {tmp_path}/empty, no training run in it",
        f"missing: {tmp_path}/evaluated, no training run in it",
        f"missing: {tmp_path}/file",
    ]


def test_evaluations_beside_training_runs_are_left_out(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "evaluated", train_samples=0, state="begun")
    write(tmp_path / "evaluated" / "eval_results.json", {"eval_matthews_correlation": 0.9})
    assert len(rows_of(read(tmp_path))) == 4 and not said(read(tmp_path))


def test_runs_on_files_of_ones_own_are_left_out_and_listed(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "own", "custom")
    assert said(read(tmp_path)) == [f"left out, its task is none of GLUE's: {tmp_path}/own"]
    assert "no training run on a task of GLUE" in refusal(tmp_path / "own")


# ------------------------------------------------------------------------------------------------------------ ranks

WHERE = ("query", "query, value", "query, key, value, dense")


def write_sweep(
    folder: Path, task: str = "cola", seeds: int = 1, **settings: Any
) -> dict[tuple[str, int], list[float]]:
    """The paper's sweep: ranks by sets of layers, alpha the same. Returns the figures in percent."""
    figures = {}
    for i, where in enumerate(WHERE):
        targets = where.split(", ")
        for j, rank in enumerate((1, 2, 4, 8, 64)):
            figures[where, rank] = [50.0 + 10 * i + j + 0.25 * seed for seed in range(seeds)]
            method, encoder = LORA | {"targets": targets}, 1536 * 12 * rank * len(targets)
            write_seeds(
                folder / f"{where}-{rank}", task, [figure / 100 for figure in figures[where, rank]],
                method=method, rank=rank, scaling=16 / rank, encoder=encoder, **settings,
            )  # fmt: skip
    return figures


def test_a_sweep_gives_the_papers_table_of_ranks_with_the_medians_of_every_set_of_layers(tmp_path):
    figures = write_sweep(tmp_path, "rte", 3)
    write_sweep(tmp_path / "other", "mnli", 3)
    heading, *rows = rank_table(collect([tmp_path])[0])
    assert heading == ["task", "LoRA on", "r = 1", "r = 2", "r = 4", "r = 8", "r = 64"]
    assert [row[0] for row in rows] == ["MNLI"] * 3 + ["RTE"] * 3
    for row, where in zip(rows[3:], WHERE, strict=True):
        assert row == ["RTE", where, *(f"{np.median(figures[where, r]):.1f} ± 0.2" for r in (1, 2, 4, 8, 64))]
    text = read(tmp_path)
    assert f"### Ranks, best epoch\n\n{markdown([heading, *rows])}\n" in text


def test_a_table_of_ranks_says_what_is_unfinished_or_missing(tmp_path):
    write_seeds(tmp_path / "1", "cola", (0.5, 0.6), rank=1)
    write_seeds(tmp_path / "2", "cola", (0.5,), rank=2)
    write_run(tmp_path / "4", "cola", 0, rank=4, state="stopped")
    write_run(tmp_path / "8", "cola", 0, rank=8, method=LORA | {"targets": ["query"]})
    assert rank_table(collect([tmp_path])[0])[1:] == [
        ["CoLA", "query", "-", "-", "-", "75.0 (1 of 2)"],
        ["CoLA", "query, value", "55.0 ± 7.1", "50.0 (1 of 2)", "unfinished", "-"],
    ]


def test_runs_of_one_rank_make_no_table_of_ranks_and_other_methods_are_not_in_it(tmp_path):
    write_seeds(tmp_path / "1", "cola", (0.5,), rank=4)
    write_seeds(tmp_path / "2", "rte", (0.5,), rank=8)
    write_seeds(tmp_path / "3", "cola", (0.5,), method=HOULSBY)
    assert rank_table(collect([tmp_path])[0]) == [] and "### Ranks" not in read(tmp_path)
    write_seeds(tmp_path / "4", "cola", (0.5,), rank=8)
    assert len(rank_table(collect([tmp_path])[0])) == 2


def test_sweeps_with_other_settings_are_lines_of_their_own_and_a_lone_run_is_none(tmp_path):
    for name, settings in {"a": {}, "b": {"learning_rate": 1e-3}}.items():
        for rank in (1, 2):
            write_seeds(tmp_path / f"{name}{rank}", "rte", (0.5 + rank / 100,), rank=rank, **settings)
    write_seeds(tmp_path / "c", "rte", (0.9,), rank=2, start="mnli.bin")
    write_seeds(tmp_path / "d", "rte", (0.9,), rank=2, method=LORA | {"lora_dropout": 0.1})
    assert rank_table(collect([tmp_path])[0])[1:] == [
        ["RTE", "query, value (learning_rate 0.0005)", "51.0", "52.0"],
        ["RTE", "query, value (learning_rate 0.001)", "51.0", "52.0"],
    ]


# --------------------------------------------------------------------------------------------------------- the pictures


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    """Four methods on three tasks over three seeds; one run is unfinished."""
    folder = tmp_path_factory.mktemp("plain")
    methods = [(LORA, 294_912, 0.8), (BITFIT, 102_144, 0.7), (FULL, 124_055_040, 0.9), (HEAD, 0, 0.5)]
    for method, encoder, level in methods:
        for i, task in enumerate(("stsb", "cola", "qnli")):
            ends, start = [level - 0.1 * i + 0.01 * seed for seed in (0, 4, 2)], "mnli" if task == "stsb" else None
            write_seeds(folder / method["name"], task, ends, method=method, encoder=encoder, start=start)
    (folder / "head" / "cola_2" / "eval_results.json").unlink()
    return collect([folder])[0]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    folder = tmp_path_factory.mktemp("swept")
    write_sweep(folder, "rte", 3)
    return collect([folder])[0]


def labels_in_view(axis: Any) -> list[Any]:
    """The labels of those of an axis's ticks that are in view."""
    axis.get_ticklabels()  # brings ticks and labels up to date
    low, high = axis.get_view_interval()
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def tidy(figure: Figure) -> None:
    """All points are in view, nothing is cut off at the edges, and no text lies on another or on a panel."""
    FigureCanvasAgg(figure).draw()
    for line in (line for ax in figure.axes for line in ax.lines):
        on_screen = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
        inside = line.axes.bbox.padded(1).count_contains(on_screen)
        assert inside == len(on_screen) > 0, f"{line.get_label()} is out of view"
    texts = [figure._suptitle, *(text for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label))]
    for axis in (axis for ax in figure.axes if ax.axison for axis in (ax.xaxis, ax.yaxis)):
        texts += labels_in_view(axis)
    shown = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    shown.append(("the legend", figure.legends[0].get_window_extent()))
    panels = [(f"the panel {ax.get_title()}", ax.get_window_extent()) for ax in figure.axes if ax.axison]
    for name, box in shown:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 and 0 <= box.y0 < box.y1 <= figure.bbox.y1, f"{name} is cut off"
    for (one, box), (other, box2) in (*combinations(shown, 2), *((a, b) for a in shown for b in panels)):
        assert not box.padded(-2).overlaps(box2.padded(-2)), f"{one} lies on {other}"


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def panel(figure: Figure, title: str) -> Any:
    return next(ax for ax in figure.axes if ax.get_title() == title)


def tick_labels(ax: Any, which: str) -> list[str]:
    return [label.get_text() for label in labels_in_view(getattr(ax, f"{which}axis"))]


def band_of(collection: Any) -> dict[float, tuple[float, float]]:
    """The lowest and the highest edge of a band at each place."""
    corners = collection.get_paths()[0].vertices
    return {x: (min(corners[corners[:, 0] == x, 1]), max(corners[corners[:, 0] == x, 1])) for x in set(corners[:, 0])}


def bars_of(ax: Any) -> dict[str, list[tuple[float, float, float]]]:
    """The error bars of a panel by label: x, y, and half the bar's length, 0 for none."""
    bars: dict[str, list[tuple[float, float, float]]] = {}
    for container in (c for c in ax.containers if isinstance(c, ErrorbarContainer)):
        (x,), (y,) = container.lines[0].get_data()
        ends = container.lines[2][0].get_segments()[0] if container.lines[2] else np.zeros((2, 2))
        bars.setdefault(container.get_label(), []).append((x, y, np.ptp(ends, axis=0).max() / 2))
    return bars


def test_curves_show_the_median_at_every_evaluation_and_a_band_from_the_least_to_the_most_of_the_seeds(plain):
    figure = pictures.curves("roberta-base", plain, methods_of(plain))
    assert [ax.get_title() for ax in figure.axes] == ["CoLA", "QNLI", "STS-B"]
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "Matthews correlation (%)",
        "Accuracy (%)",
        "Pearson correlation (%)",
    ]
    assert {ax.get_xlabel() for ax in figure.axes} == {"step"}
    assert legend_of(figure) == ["fine-tuning", "head alone", "BitFit", "LoRA r=8"]
    assert "median and range over up to 3 seeds" in figure._suptitle.get_text()
    ax = panel(figure, "CoLA")
    drawn = {line.get_label(): (line, band) for line, band in zip(ax.lines, ax.collections, strict=True)}
    for name, handle in zip(legend_of(figure), figure.legends[0].legend_handles, strict=True):
        assert handle.get_color() == drawn[name][0].get_color()
    for name, at in {"LoRA r=8": 72, "head alone": 42}.items():  # of 70, 74, 72 and of 40, 44
        line, band = drawn[name]
        assert list(line.get_xdata()) == [100, 200] and line.get_ydata() == pytest.approx([at - 10, at])
        assert band_of(band) == {100: pytest.approx((at - 12, at - 8)), 200: pytest.approx((at - 2, at + 2))}
        assert band.get_facecolor()[0][:3] == pytest.approx(matplotlib.colors.to_rgb(line.get_color()))
    tidy(figure)


def test_sizes_show_best_epochs_with_deviations_over_the_parameters_that_train_down_to_none(plain):
    figure = pictures.sizes("roberta-base", plain, methods_of(plain))
    bars = bars_of(panel(figure, "QNLI"))
    assert {name: [tuple(map(float, bar)) for bar in found] for name, found in bars.items()} == {
        "fine-tuning": [pytest.approx((124_055_040, 72, 2))], "head alone": [pytest.approx((0, 32, 2))],
        "BitFit": [pytest.approx((102_144, 52, 2))], "LoRA r=8": [pytest.approx((294_912, 62, 2))],
    }  # fmt: skip
    assert tick_labels(panel(figure, "QNLI"), "x") == ["0", "100k", "1M", "10M", "100M"]
    assert {ax.get_xlabel() for ax in figure.axes} == {"parameters trained in the encoder"}
    assert bars_of(panel(figure, "CoLA"))["head alone"] == [pytest.approx((0, 42, 8**0.5))]  # of 40 and 44
    assert legend_of(figure) == methods_of(plain)
    tidy(figure)


def test_beside_the_papers_medians_stand_ours_task_by_task_for_every_method_that_it_has(plain):
    figure = pictures.against_paper("roberta-base", plain, methods_of(plain))
    assert [ax.get_title() for ax in figure.axes] == ["CoLA", "QNLI", "STS-B"]
    assert tick_labels(figure.axes[0], "y") == ["LoRA r=8", "BitFit", "fine-tuning"]  # from below
    found = bars_of(panel(figure, "CoLA"))
    by_place = {name: sorted((round(y), x, bar) for x, y, bar in found[name]) for name in found}
    assert by_place == {
        "here": [pytest.approx((0, 72, 2)), pytest.approx((1, 62, 2)), pytest.approx((2, 82, 2))],
        "paper": [pytest.approx((0, 63.4, 1.2)), pytest.approx((1, 62.0, 0)), pytest.approx((2, 63.6, 0))],
    }
    assert legend_of(figure) == ["here", "paper"]
    assert "best epoch" in figure._suptitle.get_text() and "over 3 seeds here, 5 in" in figure._suptitle.get_text()
    tidy(figure)


def test_the_picture_of_ranks_has_a_line_for_each_set_of_layers_over_ranks_evenly_apart_by_doubling(swept):
    figure = pictures.ranks("roberta-base", rank_cells(swept))
    (ax,) = figure.axes
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("RTE", "rank r", "Accuracy (%)")
    assert tick_labels(ax, "x") == ["1", "2", "4", "8", "64"] and ax.get_xscale() == "log"
    assert [line.get_label() for line in ax.lines] == legend_of(figure) == [*WHERE]
    for i, line in enumerate(ax.lines):
        low = 50.0 + 10 * i + np.arange(5)
        assert list(line.get_xdata()) == [1, 2, 4, 8, 64]
        assert line.get_ydata() == pytest.approx(low + 0.25)
        band = band_of(ax.collections[i])
        assert [band[r] for r in (1, 2, 4, 8, 64)] == [pytest.approx((f, f + 0.5)) for f in low]
    tidy(figure)


def test_a_single_seed_has_neither_bands_nor_error_bars_and_the_titles_say_so(tmp_path):
    for method in (LORA, BITFIT):
        write_run(tmp_path / method["name"], "cola", 0, method=method)
    cells, _ = collect([tmp_path])
    for drawn in (pictures.curves, pictures.sizes, pictures.against_paper):
        figure = drawn("roberta-base", cells, methods_of(cells))
        assert not figure.axes[0].collections or drawn == pictures.against_paper  # there the paper's own
        assert "one seed" in figure._suptitle.get_text() and "median" not in figure._suptitle.get_text()
        assert {bar for _, _, bar in bars_of(figure.axes[0]).get("here", [])} <= {0}
        tidy(figure)


def test_curves_of_runs_evaluated_at_other_steps_show_those_that_all_seeds_have(tmp_path):
    write_run(tmp_path / "a", seed=0, figures=(0.1, 0.2, 0.3))
    write_run(tmp_path / "b", seed=1, figures=(0.3, 0.4))
    write_run(tmp_path / "c", "rte")
    write(tmp_path / "c" / "trainer_state.json", {"log_history": []})  # has no curve, and so no panel
    cells, _ = collect([tmp_path])
    (ax,) = pictures.curves("roberta-base", cells, methods_of(cells)).axes
    assert list(ax.lines[0].get_xdata()) == [100, 200] and ax.lines[0].get_ydata() == pytest.approx([20, 30])


def test_64_methods_look_different_each_and_the_first_eight_in_colour_and_marker_and_line():
    looks = [(look["color"], look["marker"], str(look["linestyle"])) for look in map(pictures.style, range(64))]
    assert len(set(looks)) == 64
    assert all(len(set(each)) == 8 for each in zip(*looks[:8], strict=True))


def test_eleven_methods_share_no_look_in_a_picture_and_all_stand_in_its_legend(tmp_path):
    for size in range(1, 12):
        method = {"name": "houlsby", "adapter_size": size}
        write_run(tmp_path / str(size), method=method, encoder=size * 10_000, figures=(0.4, 0.5 + size / 100))
    cells, _ = collect([tmp_path])
    figure = pictures.curves("roberta-base", cells, methods_of(cells))
    looks = {
        (line.get_color(), line.get_marker(), line._linestyle, str(line._unscaled_dash_pattern))
        for line in figure.axes[0].lines
    }
    assert len(looks) == 11 and legend_of(figure) == [f"Houlsby {size}" for size in range(1, 12)]
    tidy(figure)


def test_methods_of_about_the_same_size_stand_side_by_side_and_the_others_where_their_sizes_are(tmp_path):
    for size, encoder in {8: 811_008, 16: 811_008, 24: 811_008, 64: 6_000_000}.items():
        method = {"name": "houlsby", "adapter_size": size}
        write_seeds(tmp_path / str(size), "cola", (0.5, 0.6), method=method, encoder=encoder)
    cells, _ = collect([tmp_path])
    figure = pictures.sizes("roberta-base", cells, methods_of(cells))
    tidy(figure)
    (ax,) = figure.axes
    assert tick_labels(ax, "x") == ["500k", "1M", "2M", "5M", "10M"]
    aside = []
    for line in (bar.lines[0] for bar in ax.containers):
        drawn, true = (
            transform.transform((line.get_xdata()[0], 60))[0] for transform in (line.get_transform(), ax.transData)
        )
        aside.append((drawn - true) * 72 / figure.dpi)
    assert aside == pytest.approx([-9, 0, 9, 0])  # points: a marker's width


@pytest.mark.parametrize(
    ("places", "moved"),
    [
        ([], []),
        ([0, 9, 30], [0, 9, 30]),
        ([0, 0], [-4.5, 4.5]),
        ([0, 3, 30], [-3, 6, 30]),
        ([0, 8, 16], [-1, 8, 17]),
        ([0, 0, 0, 10], [-11, -2, 7, 16]),  # on average where they were
    ],
)
def test_places_move_apart_no_more_than_they_must(places, moved):
    assert pictures.apart(places, 9) == pytest.approx(moved)


def test_a_sweep_that_would_crowd_the_other_pictures_has_its_own(tmp_path, monkeypatch):
    write_sweep(tmp_path, "cola")
    for method in (BITFIT, HOULSBY):
        write_run(tmp_path / method["name"], method=method)
    drawn = {}
    monkeypatch.setattr(pictures, "save", lambda figure, folder, name: drawn.setdefault(name, figure) and name)
    cells, _ = collect([tmp_path])
    pictures.draw(cells, methods_of(cells), rank_cells(cells), tmp_path)
    kinds = ["curves", "ranks_curves", "parameters", "paper", "ranks"]
    assert [*drawn] == [f"roberta-base_{kind}" for kind in kinds]
    assert legend_of(drawn["roberta-base_curves"]) == ["BitFit", "Houlsby 8"]
    assert len(legend_of(drawn["roberta-base_ranks_curves"])) == 15
    assert legend_of(drawn["roberta-base_ranks"]) == [*WHERE]
    for figure in drawn.values():
        tidy(figure)


def test_unfinished_runs_alone_make_no_picture_and_unfinished_ones_are_in_none(tmp_path):
    write_run(tmp_path / "runs" / "a", state="stopped")
    write_report(*collect([tmp_path / "runs"]), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("report.*")) == ["report.csv", "report.md", "report.tex"]
    assert not [*tmp_path.glob("*.png")] and "![" not in (tmp_path / "report.md").read_text()


LONG = "query, key, value, attention.output.dense, intermediate.dense, output.dense"


@pytest.mark.parametrize("tasks", [1, 2, 5, 8])
def test_pictures_stay_tidy_with_long_names_and_any_number_of_panels(tmp_path, tasks):
    method = LORA | {"targets": LONG.split(", ")}
    for task in [*HEADINGS][:tasks]:
        for rank in (1, 2, 64):
            write_seeds(tmp_path / str(rank), task, (0.5, 0.6), method=method, rank=rank, model="deberta-v2-xxlarge")
        for rate in (1e-4, 2e-4):
            more = {"method": FULL, "learning_rate": rate, "warmup_steps": 1000, "weight_decay": rate}
            write_seeds(tmp_path / f"full{rate}", task, (0.7, 0.8), model="deberta-v2-xxlarge", **more)
    cells, _ = collect([tmp_path])
    methods, full = methods_of(cells), [cell for cell in cells if "fine" in cell.method]
    assert f"LoRA r=64 on {LONG}" in methods
    tidy(pictures.sizes("deberta-v2-xxlarge", cells, methods))
    tidy(pictures.against_paper("deberta-v2-xxlarge", full, methods))
    tidy(pictures.ranks("deberta-v2-xxlarge", rank_cells(cells)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a report with all kinds of pictures."""
    folder = tmp_path_factory.mktemp("written")
    for i, (method, rank) in enumerate([(LORA, 4), (LORA, 8), (BITFIT, 0)]):
        write_seeds(folder / "runs" / str(i), "cola", (0.5, 0.6), method=method, rank=rank, encoder=100_000 + i)
    assert main([str(folder / "runs"), "--out", str(folder / "new" / "report")]) == 0
    return folder / "new" / "report"


PICTURES = [f"roberta-base_{name}" for name in ("curves", "parameters", "paper", "ranks")]


def test_a_report_with_out_is_tables_and_pictures_in_a_folder_and_nothing_else(written):
    expected = [f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")]
    assert sorted(os.listdir(written)) == sorted([*expected, "report.csv", "report.md", "report.tex"])
    text = (written / "report.md").read_text()
    assert re.findall(r"!\[(.*?)\]\((.*?)\)", text) == [(name, f"{name}.png") for name in PICTURES]


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_a_png_for_print_and_an_svg_with_the_same_panels_and_neither_is_blank(written, name):
    pixels = image.imread(written / f"{name}.png")[..., :3]
    height, width, _ = pixels.shape
    assert width >= 600 and height >= 300
    assert (pixels[0, 0] == 1).all() and 0.005 < (pixels.min(axis=2) < 0.9).mean() < 0.5
    assert (np.ptp(pixels, axis=2) > 0.3).any(), "all of it is grey"
    groups = [group.get("id", "") for group in ElementTree.parse(written / f"{name}.svg").iter() if group.get("id")]
    assert sum(re.fullmatch(r"axes_\d+", group) is not None for group in groups) == 1
    assert sum(re.fullmatch(r"legend_\d+", group) is not None for group in groups) == 1


def test_the_same_runs_give_the_same_files(written, tmp_path):
    write_report(*collect([written.parents[1] / "runs"]), tmp_path)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_a_picture_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(partial: Path, final: Path) -> None:
        assert partial.stat().st_size
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush_and_rename", full)
    with pytest.raises(OSError, match="No space left"):
        pictures.save(Figure(), tmp_path, "x")
    assert not os.listdir(tmp_path)


def test_links_to_pictures_hold_for_a_model_with_a_space_in_its_name(tmp_path):
    write_run(tmp_path / "runs" / "a", model="my base", figures=(0.5, 0.6))
    text = write_report(*collect([tmp_path / "runs"]), tmp_path)
    assert "![my base_curves](my%20base_curves.png)" in text and (tmp_path / "my base_curves.png").is_file()


def test_without_matplotlib_the_report_comes_and_says_what_its_pictures_need(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "lora_nlu.report.pictures")
    monkeypatch.delattr(lora_nlu.report, "pictures")
    text = write_report(*collect([small]), tmp_path)
    assert "no pictures: they need matplotlib (pip install 'lora-nlu[plots]')" in said(text)
    assert rows_of(text) == rows_of(SMALL) and "![" not in text
    assert sorted(os.listdir(tmp_path)) == ["report.csv", "report.md", "report.tex"]


# ---------------------------------------------------------------------------------------------------------- the program


def test_the_program_prints_the_report_and_where_it_is(small, written, capsys):
    assert main([str(small)]) == 0
    printed = capsys.readouterr()
    assert printed.out == read(small) and not printed.err
    gone = written / "gone"
    assert main([str(written.parents[1] / "runs" / "0"), str(gone), "--out", str(written.parent / "again")]) == 0
    printed = capsys.readouterr().out
    assert f"- missing: {gone}\n" in printed and printed.endswith(f"Written to {written.parent}/again.\n")
    assert (written.parent / "again" / "report.md").read_text() in printed


BROKEN = {
    "cut": ("run.json", '{"task": "co', "run.json: can't be read"),
    "a list": ("run.json", "[]", "run.json: holds a JSON list; expected an object."),
    "cut results": ("eval_results.json", "{", "eval_results.json: can't be read"),
    "no figure": (
        "eval_results.json",
        '{"eval_loss": 1}',
        "no eval_matthews_correlation in it. Evaluate the run again",
    ),
    "cut state": ("trainer_state.json", "", "trainer_state.json: can't be read"),
    "not UTF-8": ("train_results.json", "\udcff", "train_results.json: can't be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_whole_ends_the_program_with_1_and_names_the_file(tmp_path, capsys, case):
    name, content, message = BROKEN[case]
    write_run(tmp_path / "a")
    (tmp_path / "a" / name).write_text(content, errors="surrogateescape")
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"lora_nlu.report: error: {tmp_path}/a/") and message in printed.err
    assert not printed.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["method", "parameters", "lora"])
def test_a_run_of_an_older_version_is_refused_naming_what_it_lacks(tmp_path, key):
    known = json.loads((write_run(tmp_path / "a") / "run.json").read_text())
    del known[key]
    write(tmp_path / "a" / "run.json", known)
    message = f"{tmp_path}/a/run.json: no '{key}' in it: an older run? Train it again, or leave it out."
    assert refusal(tmp_path) == message


def test_folders_without_any_run_and_an_out_that_is_a_file_end_the_program_with_1(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "gone")]) == 1
    why = f"missing: {tmp_path}, no training run in it\nmissing: {tmp_path}/gone"
    said = f"no training run on a task of GLUE. Give output folders of run_glue.py.\n{why}\n"
    assert capsys.readouterr().err == f"lora_nlu.report: error: {said}"
    write_run(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    assert main([str(tmp_path), "--out", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("arguments", [[], ["--out", "x"], ["a", "--partial"], ["a", "--what"]])
def test_a_command_line_that_is_wrong_ends_with_2_and_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: python -m lora_nlu.report" in capsys.readouterr().err


def test_the_module_runs_as_a_program_without_torch_and_without_a_display(tmp_path):
    write_run(tmp_path / "runs" / "a", figures=(0.5, 0.6))
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    command = [sys.executable, "-X", "importtime", "-m", "lora_nlu.report", "runs", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("Written to out.\n"), done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"lora_nlu.report.pictures", "matplotlib"} <= imported and not {"torch", "transformers"} & imported
    assert (tmp_path / "out" / "roberta-base_curves.png").is_file()
