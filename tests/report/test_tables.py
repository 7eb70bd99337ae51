"""Every number of the tables, as Markdown, CSV and LaTeX; the table of ranks."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import (
    BITFIT,
    FULL,
    HEAD,
    HEADINGS,
    HOULSBY,
    LORA,
    SMALL,
    WHERE,
    names,
    notes_of,
    read,
    refusal,
    rows_of,
    values,
    write,
    write_run,
    write_seeds,
    write_sweep,
)

from lora_nlu.methods import METHODS
from lora_nlu.report import pictures
from lora_nlu.report.collect import collect
from lora_nlu.report.submission import find_runs
from lora_nlu.report.tables import (
    PROTOCOL,
    csv_text,
    latex,
    markdown,
    one_decimal,
    rank_table,
    spread,
    table,
    write_report,
)


def test_the_table_is_the_one_worked_out_by_hand(small):
    # sample deviations: of 60, 62, 67 sqrt(26 / 2), of 58, 60, 67 sqrt(134 / 3 / 2), of 80, 90 and 80, 70 sqrt(50);
    # time: 70.6 + 100 s, the medians; memory: the GPU's where there is one; the paper: (63.4 + 93.3) / 2 = 78.35
    text = read(small)
    assert rows_of(text) == rows_of(SMALL) and text.startswith("## roberta-base, 3 seeds\n\n| method   | trainable |")
    assert notes_of(text) == [
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
    task_headings = [*HEADINGS.values(), "WNLI accuracy"]
    assert headings == ["method", "trainable", "", *task_headings, "average", "training", "memory"]


def test_mnlis_last_is_on_both_validation_sets_and_its_best_epoch_on_the_matched_alone(tmp_path):
    write_run(tmp_path / "a", "mnli", 0, (0.70, 0.80, 0.75), overall=0.85)
    text = read(tmp_path)
    assert values(text, "LoRA r=8")["MNLI accuracy"] == "80.0"
    assert values(text, "LoRA r=8", "last")["MNLI accuracy"] == "85.0"
    assert (
        "MNLI: `last` is on both validation sets together, as the paper's; the best epoch is on the matched."
        in notes_of(text)
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
    assert f"left out, diverged ({why}): {tmp_path / '2'}" in notes_of(text)
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
    assert f"left out, diverged (loss nan): {run}" in notes_of(read(tmp_path))


def test_a_run_that_recorded_that_it_diverged_is_left_out_for_that_reason_of_report_and_submission(tmp_path):
    write_run(tmp_path / "a", "cola", 0)
    run = write_run(tmp_path / "b", "cola", 1, state="begun")
    record = json.loads((run / "run.json").read_text())
    assert f"unfinished: {run}, no checkpoint yet" in notes_of(read(tmp_path))
    write(run / "run.json", record | {"diverged": "the loss is nan at step 12"})
    assert f"left out, diverged (the loss is nan at step 12): {run}" in notes_of(read(tmp_path))
    assert [one.figures.diverged for one in find_runs([run])[0]] == ["the loss is nan at step 12"]


def test_runs_with_other_training_data_share_a_line_and_the_report_says_so(tmp_path):
    for task in ("cola", "rte"):
        for seed, data in enumerate(({"train_data": f"{task}1"}, {}, {"train_data": f"{task}1"})):
            write_run(tmp_path / f"{task}_{seed}", task, seed, (0.5,), **data)
    text = read(tmp_path)
    assert names(tmp_path) == ["LoRA r=8"] and "train_data" not in text and "different examples" not in text
    other = write_run(tmp_path / "rte_3", "rte", 3, (0.5,), train_data="rte2")
    assert names(tmp_path) == ["LoRA r=8"]
    line = f"in one line, but trained on different examples: {tmp_path / 'rte_2'}, {other}"
    assert line in notes_of(read(tmp_path))


def test_the_figure_by_which_a_submission_chooses_is_the_reports_last(tmp_path):
    """One function reads both; the report says the rule."""
    for seed, figures in enumerate([(0.9, 0.6), (0.8, 0.7)]):
        write_run(tmp_path / str(seed), "mnli", seed, figures, overall=figures[-1] + 0.01)
    cells, _ = collect([tmp_path])
    assert {run.seed: run.last for run in cells[0].done} == {
        run.seed: 100 * run.figures.last for run in find_runs([tmp_path])[0] if run.figures.last is not None
    }
    assert "That model makes the predictions, and a submission chooses among seeds by `last`." in read(tmp_path)


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


def test_the_csv_has_a_line_for_each_run_finished_or_not_with_the_same_figures(small):
    table = list(csv.reader(io.StringIO(csv_text(collect([small])[0]))))
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
    (row,) = csv.DictReader(io.StringIO(csv_text(collect([tmp_path])[0])))
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


def test_the_latex_is_a_plain_tabular_with_the_cells_of_the_markdown_and_states_the_protocol(
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


def test_a_table_of_ranks_lists_what_is_unfinished_or_missing(tmp_path):
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


def variant(name: str, **settings: Any) -> dict[str, Any]:
    """What a run of a variant of LoRA records of its method."""
    row = METHODS[name]
    return LORA | {"name": name, "label": row.label, "color": row.color, "marker": row.marker} | settings


def test_variants_of_lora_are_lines_of_their_own_and_lora_alone_has_the_papers_figure(tmp_path):
    for name, end in (("lora", 0.5), ("rslora", 0.6), ("pissa", 0.7)):
        write_seeds(tmp_path / name, "cola", (end,), method=variant(name))
    cells, _ = collect([tmp_path])
    rows = [row[:4] for row in table(cells)]
    assert [row[0] for row in rows if row[0]] == ["LoRA r=8", "PiSSA r=8", "rsLoRA r=8"]
    assert [row[2] for row in rows] == ["best epoch", "last", "paper", "best epoch", "last", "best epoch", "last"]
    assert [row[3] for row in rows if row[2] == "best epoch"] == ["50.0", "70.0", "60.0"]


def test_a_variant_whose_ranks_fall_names_the_mean_of_its_end(tmp_path):
    adalora = variant("adalora", target_rank=1)
    write_seeds(tmp_path / "2", "cola", (0.5, 0.6), method=adalora, rank=2)
    cells, _ = collect([tmp_path])
    assert [(cell.method, len(cell.done)) for cell in cells] == [("AdaLoRA r=2 to 1", 2)]


def test_a_sweep_of_ranks_has_a_row_for_each_variant(tmp_path):
    for name, end in (("lora", 0.5), ("rslora", 0.6)):
        for rank in (4, 8):
            write_seeds(tmp_path / f"{name}{rank}", "cola", (end + rank / 100,), method=variant(name), rank=rank)
    assert rank_table(collect([tmp_path])[0])[1:] == [
        ["CoLA", "query, value (variant LoRA)", "54.0", "58.0"],
        ["CoLA", "query, value (variant rsLoRA)", "64.0", "68.0"],
    ]
