"""What the pictures show."""

import os
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from run_folders import (
    BITFIT,
    FULL,
    HEAD,
    HEADINGS,
    HOULSBY,
    LORA,
    PFEIFFER,
    SMALL,
    WHERE,
    notes_of,
    rows_of,
    write,
    write_run,
    write_seeds,
    write_sweep,
)

import lora_nlu.report
from lora_nlu import files
from lora_nlu.methods.table import METHODS
from lora_nlu.report import pictures
from lora_nlu.report.__main__ import main
from lora_nlu.report.collect import EARLIER, Cell, collect
from lora_nlu.report.grids import grids, lines_over
from lora_nlu.report.tables import methods_of, write_report


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
        marker = line.get_markersize() / 2 * figure.dpi / 72 if line.get_marker() not in ("None", "|", "_") else 0
        inside = line.axes.bbox.padded(1 - marker).count_contains(on_screen)
        assert inside == len(on_screen) > 0, f"{line.get_label()} is out of view, or its marker is"
    texts = [figure._suptitle]
    for ax in figure.axes:
        texts += [ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]
        assert len({*ax.get_legend_handles_labels()[1]}) <= 7
    for axis in (axis for ax in figure.axes if ax.axison for axis in (ax.xaxis, ax.yaxis)):
        texts += labels_in_view(axis)
    shown = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    legends = figure.legends or [ax.get_legend() for ax in figure.axes if ax.axison]
    shown += [(f"the legend {i}", legend.get_window_extent()) for i, legend in enumerate(legends)]
    for text in (text for text in texts if "\n" in text.get_text()):
        first, *_, last = text.get_text().split("\n")
        assert len(last) >= 0.5 * len(first), f"the last line of {text.get_text()!r} is short"
    letters = [ax._left_title.get_text() for ax in figure.axes if ax.axison]
    assert letters == ([""] if len(letters) == 1 else [*"abcdefghijklmnopqrstuvwxyz"][: len(letters)])
    panels = [(f"the panel {ax.get_title()}", ax.get_window_extent()) for ax in figure.axes if ax.axison]
    for name, box in shown:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 and 0 <= box.y0 < box.y1 <= figure.bbox.y1, f"{name} is cut off"
    for (one, box), (other, box2) in (*combinations(shown, 2), *((a, b) for a in shown for b in panels)):
        assert not box.padded(-2).overlaps(box2.padded(-2)), f"{one} lies on {other}"


def title_of(figure: Figure) -> str:
    return " ".join(figure._suptitle.get_text().split())


def legend_of(figure: Figure) -> list[str]:
    """The labels of the legend; of panels with one each, all of them."""
    legends = figure.legends or [ax.get_legend() for ax in figure.axes if ax.axison]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


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
    assert [ax.get_title() for ax in figure.axes if ax.axison] == ["CoLA", "QNLI", "STS-B"]
    assert [ax.get_ylabel() for ax in figure.axes if ax.axison] == [
        "Matthews correlation (%)",
        "Accuracy (%)",
        "Pearson correlation (%)",
    ]
    assert {ax.get_xlabel() for ax in figure.axes if ax.axison} == {"training step"}
    assert legend_of(figure) == ["fine-tuning", "head alone", "BitFit", "LoRA r=8"]
    assert "median and range over up to 3 seeds" in title_of(figure)
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
    assert {ax.get_xlabel() for ax in figure.axes if ax.axison} == {"parameters trained in the encoder"}
    assert bars_of(panel(figure, "CoLA"))["head alone"] == [pytest.approx((0, 42, 8**0.5))]  # of 40 and 44
    assert legend_of(figure) == methods_of(plain)
    tidy(figure)


def test_beside_the_papers_medians_stand_ours_task_by_task_for_every_method_that_it_has(plain):
    figure = pictures.against_paper("roberta-base", plain, methods_of(plain))
    assert [ax.get_title() for ax in figure.axes if ax.axison] == ["CoLA", "QNLI", "STS-B"]
    assert tick_labels(figure.axes[0], "y") == ["LoRA r=8", "BitFit", "fine-tuning"]  # from below
    found = bars_of(panel(figure, "CoLA"))
    by_place = {name: sorted((round(y), x, bar) for x, y, bar in found[name]) for name in found}
    assert by_place == {
        "here": [pytest.approx((0, 72, 2)), pytest.approx((1, 62, 2)), pytest.approx((2, 82, 2))],
        "paper": [pytest.approx((0, 63.4, 1.2)), pytest.approx((1, 62.0, 0)), pytest.approx((2, 63.6, 0))],
    }
    assert legend_of(figure) == ["here", "paper"]
    assert "best epoch" in title_of(figure) and "over 3 seeds here, 5 in" in title_of(figure)
    tidy(figure)


def test_the_picture_of_ranks_has_a_line_for_each_set_of_layers_over_ranks_evenly_apart_by_doubling(swept):
    figure = pictures.over_number("roberta-base", swept, "rank", lines_over("rank", swept))
    (ax,) = figure.axes
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("RTE", "LoRA rank r", "Accuracy (%)")
    assert tick_labels(ax, "x") == ["1", "2", "4", "8", "64"] and ax.get_xscale() == "log"
    assert [line.get_label() for line in ax.lines] == legend_of(figure) == [f"LoRA on {where}" for where in WHERE]
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
        assert "one seed" in title_of(figure) and "median" not in title_of(figure)
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


def settings_of_line(line: Any) -> tuple[Any, ...]:
    return line.get_color(), line.get_marker(), line.get_fillstyle(), str(line._unscaled_dash_pattern)


def looks_in(figure: Figure) -> dict[str, tuple[Any, ...]]:
    """The look of each label in the panels: the same in all of them."""
    looks: dict[str, tuple[Any, ...]] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            line = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
            look = settings_of_line(line)[: 3 if isinstance(handle, ErrorbarContainer) else 4]
            assert looks.setdefault(label, look) == look
    return looks


def test_settings_of_a_method_have_its_marker_and_its_colour_from_light_to_dark_and_differ_in_fill_and_line():
    looks = [*pictures.looks_of_settings({"LoRA": ("#D55E00", "s")}, {str(i): "LoRA" for i in range(7)}).values()]
    assert {look["marker"] for look in looks} == {"s"} and looks[0]["color"].upper() == "#D55E00"
    hues, _, lightness = zip(*(rgb_to_hsv(to_rgb(look["color"])) for look in looks), strict=True)
    assert np.ptp(hues) < 0.01 and np.all(np.diff(lightness) < -0.05)
    assert len({(look["fillstyle"], str(look["linestyle"])) for look in looks}) == 7
    assert [look["fillstyle"] for look in looks[:2]] == ["none", "full"]


def test_the_looks_of_earlier_versions_methods_are_those_that_runs_record_now():
    assert {name: (row.label, row.color, row.marker) for name, row in METHODS.items() if name in EARLIER} == EARLIER
    looks = [(row.color, row.marker) for row in METHODS.values()]
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    assert {marker for _, marker in looks} <= {*Line2D.filled_markers}  # open and filled ones look different


def test_every_method_has_one_colour_and_marker_in_all_pictures_and_each_of_its_settings_a_fill(tmp_path):
    """Two methods that recorded the same look, or none, get looks that no other has."""
    lora = LORA | {"label": "LoRA", "color": "#D55E00", "marker": "s"}
    same, none = {"name": "x", "label": "x", "color": "#D55E00", "marker": "s"}, {"name": "y"}
    for rank, method, encoder in (
        (1, HEAD, 0), (4, lora, 10), (8, lora, 20), (1, BITFIT, 5), (1, same, 7), (1, none, 8),
    ):  # fmt: skip
        write_run(tmp_path / f"{method['name']}{rank}", method=method, rank=rank, encoder=encoder)
    cells, _ = collect([tmp_path])
    looks = looks_in(pictures.curves("roberta-base", cells, methods_of(cells)))
    in_curves = {name: look[:3] for name, look in looks.items()}
    assert looks_in(pictures.sizes("roberta-base", cells, methods_of(cells))) == in_curves
    unknown = {in_curves.pop(name)[0] for name in ("x", "y")}
    assert len(unknown) == 2 and not unknown & {"#56b4e9", "#e69f00", "#d55e00"}
    assert in_curves == {
        "head alone": ("#56b4e9", "P", "none"),
        "BitFit": ("#e69f00", "v", "none"),
        "LoRA r=4": ("#d55e00", "s", "none"),
        "LoRA r=8": (pictures.darker("#d55e00", 0.35), "s", "full"),
    }
    over_ranks = looks_in(pictures.over_number("roberta-base", cells, "rank", lines_over("rank", cells)))
    assert over_ranks["LoRA"][:3] == in_curves["LoRA r=4"]


def test_more_than_seven_methods_are_in_panels_of_at_most_seven_with_one_scale_and_a_legend_each(tmp_path):
    for size in range(1, 12):
        method = {"name": f"method {size}"}
        for task in ("cola", "rte"):
            write_run(
                tmp_path / f"{size}{task}", task, method=method, encoder=size * 10_000, figures=(0.4, 0.5 + size / 100)
            )
    cells, _ = collect([tmp_path])
    for draw in (pictures.curves, pictures.sizes):
        figure = draw("roberta-base", cells, methods_of(cells))
        assert [(ax.get_title(), len(ax.get_legend().get_texts())) for ax in figure.axes] == [
            ("CoLA", 5), ("CoLA", 6), ("RTE", 5), ("RTE", 6),
        ]  # fmt: skip
        assert legend_of(figure) == [f"method {size}" for size in range(1, 12)] * 2
        assert len(set(looks_in(figure).values())) == 11
        for one, other in zip(figure.axes[::2], figure.axes[1::2], strict=True):
            assert (one.get_xlim(), one.get_ylim()) == (other.get_xlim(), other.get_ylim())
        tidy(figure)


def test_methods_of_the_same_size_and_figure_stand_in_their_true_place_with_open_markers(tmp_path):
    for method in (HOULSBY, PFEIFFER, LORA):
        write_seeds(tmp_path / method["name"], "cola", (0.5, 0.6), method=method, encoder=811_008)
    cells, _ = collect([tmp_path])
    figure = pictures.sizes("roberta-base", cells, methods_of(cells))
    tidy(figure)
    (ax,) = figure.axes
    assert tick_labels(ax, "x") == ["500k", "1M"]
    for line in (bar.lines[0] for bar in ax.containers):
        assert line.get_transform() == ax.transData and list(line.get_xdata()) == [811_008]
        assert list(line.get_ydata()) == pytest.approx([55]) and line.get_fillstyle() == "none"
    caps = [bar.lines[1][0].get_markersize() for bar in ax.containers]
    assert len(set(caps)) == 3


@pytest.mark.parametrize("figures", [(-0.00004, -0.00001), (0.5, 0.5), (0.0, 0.0), (-0.3, -0.2)])
def test_figures_that_are_equal_or_negative_have_a_scale_of_two_percent_or_more_and_no_negative_zero(tmp_path, figures):
    for seed in range(2):
        write_run(tmp_path / "a" / str(seed), seed=seed, figures=figures)
        write_run(tmp_path / "b" / str(seed), seed=seed, figures=figures, method=BITFIT, encoder=5)
    cells, _ = collect([tmp_path])
    for draw in (pictures.curves, pictures.sizes, pictures.against_paper):
        figure = draw("roberta-base", cells, methods_of(cells))
        tidy(figure)
        ticks = tick_labels(figure.axes[0], "x" if draw == pictures.against_paper else "y")
        assert len(ticks) >= 3 and not {"-0", "-0.0", "\N{MINUS SIGN}0", "\N{MINUS SIGN}0.0"} & {*ticks}
        low, high = figure.axes[0].get_ylim()
        assert high - low >= 2
    text = write_report(cells, [], tmp_path / "out")
    assert "-0.0 " not in text and "-0.0," not in (tmp_path / "out" / "report.csv").read_text()


def test_a_grid_is_drawn_against_each_number_that_was_varied(tmp_path):
    for rank in (4, 8):
        for rate in (1e-4, 2e-4, 1e-3):
            write_seeds(
                tmp_path / f"{rank}-{rate}",
                "rte",
                (0.5 + 100 * rate,),
                rank=rank,
                scaling=16 / rank,
                learning_rate=rate,
            )
    for alpha in (8, 32):
        write_seeds(tmp_path / f"alpha{alpha}", "rte", (0.6,), rank=8, scaling=alpha / 8, learning_rate=1e-4)
    cells, _ = collect([tmp_path])
    found = {
        name: {line.difference: [x for x, _ in line.points] for line in lines} for name, lines in grids(cells).items()
    }
    assert found == {
        "rank": {"learning_rate 0.0001, alpha 8": [8], "learning_rate 0.0001, alpha 16": [4, 8],
                 "learning_rate 0.0001, alpha 32": [8], "learning_rate 0.001": [4, 8], "learning_rate 0.0002": [4, 8]},
        "alpha": {"": [8, 16, 32]},
        "learning_rate": {"rank 4": [1e-4, 2e-4, 1e-3], "rank 8": [1e-4, 2e-4, 1e-3]},
    }  # fmt: skip
    figure = pictures.over_number("roberta-base", cells, "learning_rate", grids(cells)["learning_rate"])
    (ax,) = figure.axes
    assert ax.get_xlabel() == "learning rate" and tick_labels(ax, "x") == ["1e-4", "2e-4", "1e-3"]
    assert legend_of(figure) == ["LoRA (rank 4)", "LoRA (rank 8)"]
    tidy(figure)
    names = pictures.draw(cells, methods_of(cells), tmp_path / "out")
    assert [name.partition("_")[2] for name in names] == [
        "curves", "parameters", "ranks", "alphas", "learning_rates",
    ]  # fmt: skip


def test_a_sweep_among_other_methods_has_a_panel_for_each_of_its_lines(tmp_path, monkeypatch):
    write_sweep(tmp_path, "cola")
    for method in (BITFIT, FULL, HEAD):
        write_run(tmp_path / method["name"], method=method)
    drawn = {}
    monkeypatch.setattr(pictures, "save", lambda figure, folder, name: drawn.setdefault(name, figure) and name)
    cells, _ = collect([tmp_path])
    pictures.draw(cells, methods_of(cells), tmp_path)
    assert [*drawn] == [f"roberta-base_{kind}" for kind in ("curves", "parameters", "paper", "ranks")]
    for kind in ("curves", "parameters"):
        legends = [ax.get_legend() for ax in drawn[f"roberta-base_{kind}"].axes if ax.axison]
        labels = [[text.get_text() for text in legend.get_texts()] for legend in legends]
        assert labels == [
            ["fine-tuning", "BitFit", "head alone"],
            *([f"LoRA r={rank}{where}" for rank in (1, 2, 4, 8, 64)]
              for where in (" on query", "", " on query, key, value, dense")),
        ]  # fmt: skip
    assert legend_of(drawn["roberta-base_ranks"]) == [f"LoRA on {where}" for where in WHERE]
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
    for name, lines in grids(cells).items():
        tidy(pictures.over_number("deberta-v2-xxlarge", cells, name, lines))


PICTURES = [f"roberta-base_{name}" for name in ("curves", "parameters", "paper", "ranks")]


def test_a_report_with_out_is_tables_and_pictures_in_a_folder_and_nothing_else(written):
    expected = [f"{name}.png" for name in PICTURES]
    assert sorted(os.listdir(written)) == sorted([*expected, "report.csv", "report.md", "report.tex", "runs.jsonl"])
    text = (written / "report.md").read_text()
    assert re.findall(r"!\[(.*?)\]\((.*?)\)", text) == [(name, f"{name}.png") for name in PICTURES]


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_a_png_for_print_and_not_blank(written, name):
    pixels = image.imread(written / f"{name}.png")[..., :3]
    height, width, _ = pixels.shape
    assert width >= 600 and height >= 300
    assert (pixels[0, 0] == 1).all() and 0.005 < (pixels.min(axis=2) < 0.9).mean() < 0.5
    assert (np.ptp(pixels, axis=2) > 0.3).any(), "all of it is grey"


def test_the_same_runs_give_the_same_files(written, tmp_path):
    assert main([str(written.parents[1] / "runs"), "--out", str(tmp_path)]) == 0
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_a_picture_with_hundreds_of_panels_is_drawn_smaller(tmp_path):
    pictures.save(Figure(figsize=(1, 600)), tmp_path, "x")
    height, width, _ = image.imread(tmp_path / "x.png").shape
    assert (height, width) == (60_000, 100)


def test_a_picture_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(partial: Path, final: Path) -> None:
        assert partial.stat().st_size
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush_and_rename", full)
    with pytest.raises(OSError, match="No space left"):
        pictures.save(Figure(), tmp_path, "x")
    assert not os.listdir(tmp_path)


def test_links_to_pictures_work_for_a_model_with_a_space_in_its_name(tmp_path):
    write_run(tmp_path / "runs" / "a", model="my base", figures=(0.5, 0.6))
    text = write_report(*collect([tmp_path / "runs"]), tmp_path)
    assert "![my base_curves](my%20base_curves.png)" in text and (tmp_path / "my base_curves.png").is_file()


def test_without_matplotlib_the_report_is_written_and_says_what_its_pictures_need(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "lora_nlu.report.pictures")
    monkeypatch.delattr(lora_nlu.report, "pictures")
    text = write_report(*collect([small]), tmp_path)
    assert "no pictures: they need matplotlib (pip install 'lora-nlu[plots]')" in notes_of(text)
    assert rows_of(text) == rows_of(SMALL) and "![" not in text
    assert sorted(os.listdir(tmp_path)) == ["report.csv", "report.md", "report.tex"]
