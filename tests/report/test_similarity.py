"""Subspace similarity: values by hand, an independent reference, and the command that tabulates and draws it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close
from matplotlib.figure import Figure
from PIL import Image
from scipy.linalg import subspace_angles
from torch import Tensor

from lora_nlu.adapters.adapter import Adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import write_adapter
from lora_nlu.report.__main__ import main
from lora_nlu.report.similarity import compare, short_names, subspace_similarity, table

HIDDEN, LAYERS, MODULES = 32, 5, ("query", "value")
FILES = ["similarity.csv", "similarity.png"]


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got: Tensor, want: object) -> None:
    """Equal to 1e-10: singular vectors are exact to rounding over the gap between their singular values."""
    want = torch.as_tensor(want, dtype=torch.float64)
    assert_close(got, want.expand(got.shape), 1e-10, scale=1.0)


# ------------------------------------------------------------------------------------------------------ the function


def test_a_matrix_has_similarity_1_to_itself_for_every_i_and_j():
    A = random_matrix(6, 20, 0)
    same(subspace_similarity(A, A), 1.0)


def test_rows_orthogonal_to_each_other_have_similarity_0():
    basis = torch.linalg.qr(random_matrix(20, 20, 0)).Q
    one, two = random_matrix(3, 8, 1) @ basis[:8], random_matrix(5, 12, 2) @ basis[8:]
    same(subspace_similarity(one, two), 0.0)


def test_a_subspace_inside_another_has_similarity_1_to_all_of_it():
    outer = random_matrix(6, 20, 0)
    inner = random_matrix(2, 6, 1) @ outer
    phi = subspace_similarity(inner, outer)
    same(phi[:, -1], 1.0)
    assert phi[0, 0] < 0.99 and (phi[0].diff() > -1e-12).all(), "more vectors of the outer one cover no less"


def test_two_planes_at_an_angle_give_the_values_worked_out_by_hand():
    # Top vectors: e1, e2 against e1, then e2 turned by the angle towards e3.
    cos, sin = 0.6, 0.8
    one = torch.tensor([[3.0, 0, 0, 0], [0, 2, 0, 0]])
    two = torch.tensor([[5.0, 0, 0, 0], [0, 4 * cos, 4 * sin, 0], [0, 0, 0, 1]])
    phi = subspace_similarity(one, two)
    assert phi.dtype == torch.float64
    # float32 represents 0.6 to 3e-8
    assert_close(phi, torch.tensor([[1.0, 1, 1], [1, (1 + cos**2) / 2, (1 + cos**2) / 2]]).double(), 1e-7)


@pytest.mark.parametrize(("r1", "r2", "columns"), [(4, 8, 32), (5, 5, 12), (7, 2, 9), (1, 1, 3)])
def test_every_entry_is_the_mean_squared_cosine_of_the_principal_angles_that_scipy_finds(r1, r2, columns):
    A1, A2 = random_matrix(r1, columns, 3), random_matrix(r2, columns, 4)
    bases = [torch.linalg.svd(A).Vh.T.numpy() for A in (A1, A2)]
    phi = subspace_similarity(A1, A2)
    assert phi.shape == (r1, r2)
    for i in range(1, r1 + 1):
        for j in range(1, r2 + 1):
            cosines = torch.from_numpy(subspace_angles(bases[0][:, :i], bases[1][:, :j])).cos()  # min(i, j) of them
            same(phi[i - 1, j - 1], cosines.square().mean())


def test_scaling_and_an_orthogonal_matrix_on_the_left_change_nothing_and_swapping_transposes():
    A1, A2 = random_matrix(4, 16, 5), random_matrix(6, 16, 6)
    phi = subspace_similarity(A1, A2)
    turned = torch.linalg.qr(random_matrix(6, 6, 7)).Q @ A2
    same(subspace_similarity(-1e-6 * A1, 1e6 * turned), phi)
    same(subspace_similarity(A2, A1).T, phi)


def test_random_matrices_give_max_of_i_and_j_over_the_columns_on_average():
    draws = [subspace_similarity(random_matrix(3, 40, 2 * n), random_matrix(5, 40, 2 * n + 1)) for n in range(300)]
    mean = torch.stack(draws).mean(0)
    expected = torch.maximum(torch.arange(1, 4)[:, None], torch.arange(1, 6)) / 40
    assert (mean / expected - 1).abs().max() < 0.2, mean  # one entry's own spread over 300 draws is 8% at most


def test_after_its_rank_a_matrix_stands_for_the_span_of_its_rows():
    full, other = random_matrix(3, 16, 8), random_matrix(4, 16, 9)
    deficient = torch.cat([full, full[:1] - full[1:2], torch.zeros(1, 16, dtype=torch.float64)])  # 5 rows of rank 3
    same(subspace_similarity(deficient, deficient), 1.0)
    phi = subspace_similarity(deficient, other)
    assert phi.shape == (5, 4)
    same(phi[3:], phi[2].expand(2, 4))
    basis = torch.linalg.svd(deficient).Vh[:3].T.numpy()
    for j in range(1, 5):
        angles = subspace_angles(basis, torch.linalg.svd(other).Vh[:j].T.numpy())
        same(phi[4, j - 1], torch.from_numpy(angles).cos().square().mean())


def test_a_rank_above_the_number_of_columns_is_no_error():
    phi = subspace_similarity(random_matrix(6, 4, 10), random_matrix(2, 4, 11))
    assert phi.shape == (6, 2)
    same(phi[3:], 1.0)  # four vectors span everything


def test_a_zero_matrix_has_similarity_0():
    same(subspace_similarity(torch.zeros(2, 8), random_matrix(3, 8, 12)), 0.0)
    same(subspace_similarity(torch.zeros(2, 8), torch.zeros(2, 8)), 0.0)


def test_half_precision_parameters_are_compared_in_float64_and_without_a_graph():
    A = random_matrix(4, 16, 13).bfloat16().requires_grad_()
    phi = subspace_similarity(A, A.detach().double())
    assert not phi.requires_grad
    same(phi, 1.0)


def test_matrices_of_different_inputs_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\[2, 8\].*\[3, 9\]"):
        subspace_similarity(torch.ones(2, 8), torch.ones(3, 9))


# ------------------------------------------------------------------------------------------------------- the command


def layer_name(layer: int, module: str) -> str:
    return f"roberta.encoder.layer.{layer}.attention.self.{module}"


def lora_state(rank: int, seed: int, names: list[str] | None = None, columns: int = HIDDEN) -> dict[str, Tensor]:
    """Random matrices for these layers; by default query and value of 5 layers."""
    names = names or [layer_name(layer, module) for layer in range(LAYERS) for module in MODULES]
    state = {}
    for n, name in enumerate(names):
        state[f"{name}.lora_A"] = random_matrix(rank, columns, 1000 * seed + n).float()
        state[f"{name}.lora_B"] = torch.zeros(columns, rank)
    return state


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path)
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """An adapter folder of rank 4 and a published file of rank 8."""
    write_adapter(Adapter(Path(), lora_state(4, 1), 8.0), tmp_path / "four")
    return tmp_path / "four", saved(tmp_path / "eight.bin", lora_state(8, 2))


def run_program(capsys, *argv: object) -> tuple[int, str, str]:
    code = main(["similarity", *map(str, argv)])
    return code, *capsys.readouterr()


def refused(capsys, *argv: object) -> str:
    """The message with which the command ends; fails if it printed or wrote anything else."""
    code, out, err = run_program(capsys, *argv)
    assert code == 1 and not out and err.startswith("lora_nlu.report: error: ") and err.count("\n") <= 3
    return err


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    saved_figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: saved_figures.append(self) or save(self, *a, **k))
    return saved_figures


def test_the_csv_contains_every_number_of_the_function_for_every_layer(files, tmp_path, capsys):
    assert run_program(capsys, *files, "--out", tmp_path / "out")[0] == 0
    with open(tmp_path / "out" / "similarity.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    one, two = lora_state(4, 1), lora_state(8, 2)
    expected = [["layer", "module", "i", "j", "phi"]]
    for module in MODULES:
        for layer in range(LAYERS):
            name = f"{layer_name(layer, module)}.lora_A"
            for i, row in enumerate(subspace_similarity(one[name], two[name]).tolist(), 1):
                expected += [[str(layer), module, str(i), str(j), repr(phi)] for j, phi in enumerate(row, 1)]
    assert len(expected) == 1 + 2 * 5 * 4 * 8
    assert rows == expected


def test_the_picture_is_a_png_and_nothing_half_written_is_left(files, tmp_path, capsys, figures):
    out = tmp_path / "new" / "out"
    code, text, _ = run_program(capsys, *files, "--out", out)
    assert code == 0 and all(name.removeprefix("similarity") in text for name in FILES) and str(out) in text
    assert sorted(path.name for path in out.iterdir()) == FILES
    with Image.open(out / "similarity.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 800
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 50, "no heat maps in it"
    # first, middle, last, the mean and random matrices, of query and value; the colour bar
    assert [len(figure.axes) for figure in figures] == [(3 + 2) * 2 + 1]


def test_all_heat_maps_have_the_scale_of_their_data_and_the_random_level_is_drawn(files, tmp_path, capsys, figures):
    assert run_program(capsys, *files, "--modules", "query", "--out", tmp_path / "out")[0] == 0
    *maps, bar = figures[0].axes
    assert [ax.get_ylabel() for ax in maps] == ["layer 0", "layer 2", "layer 4", "mean of all", "random"]
    assert [ax._left_title.get_text() for ax in maps] == [*"abcde"]
    drawn = [ax.images[0].get_array() for ax in maps]
    low, high = min(map(np.min, drawn)), max(map(np.max, drawn))
    for ax in maps:
        assert low - 0.1 < ax.images[0].norm.vmin <= low < high <= ax.images[0].norm.vmax < high + 0.1
    pairs = compare(*map(read_adapter, map(str, files)), "query")
    random = torch.stack([pair.random for pair in pairs]).mean(0)
    assert np.allclose(drawn[-1], random.numpy(), atol=1e-12)
    (line,) = (line for line in bar.lines if line.get_color() == "white")
    assert list(line.get_ydata()) == pytest.approx([float(random.mean())] * 2)


def test_layers_and_modules_choose_what_is_drawn_and_the_csv_keeps_every_layer(files, tmp_path, capsys, figures):
    out = tmp_path / "out"
    code, text, _ = run_program(capsys, *files, "--layers", "3, 1", "--modules", "value", "--out", out)
    assert code == 0 and "query" not in text
    assert [line.split("  ")[2] for line in text.splitlines() if "layer " in line] == ["layer 1", "layer 3"]
    assert [len(figure.axes) for figure in figures] == [(2 + 2) * 1 + 1]
    with open(out / "similarity.csv", newline="", encoding="utf-8") as file:
        assert {(row["layer"], row["module"]) for row in csv.DictReader(file)} == {(str(n), "value") for n in range(5)}


def test_the_table_has_the_means_over_layers_at_powers_of_two_and_beside_them_those_of_random_matrices(files, capsys):
    code, text, _ = run_program(capsys, *files)
    assert code == 0 and "four, rank 4" in text and "eight.bin, rank 8" in text and "Left out" not in text
    lines = text[text.index("phi") :].splitlines()
    assert lines[0].split("lora_A")[1].split() == ["i", "=", "1", "i", "=", "2", "i", "=", "4"]
    one, two = lora_state(4, 1), lora_state(8, 2)
    for start, module in zip((1, 3), MODULES, strict=True):
        names = [f"{layer_name(layer, module)}.lora_A" for layer in range(LAYERS)]
        mean = torch.stack([subspace_similarity(one[name], two[name]) for name in names]).mean(0)
        assert lines[start].split() == [
            f"{module},", "mean", "of", "5", "layers", *[f"{mean[i - 1, i - 1]:.3f}" for i in (1, 2, 4)],
        ]  # fmt: skip
        random = [float(cell) for cell in lines[start + 1].split()[2:]]
        # i / 32 on average; the mean of 5 draws at i = 4 spreads by about 0.015
        assert random[2] == pytest.approx(4 / 32, abs=0.06) and random[0] < random[2]
    assert run_program(capsys, *files)[1] == text, "the random matrices are the same ones every time"


def test_an_adapter_against_itself_gives_1_in_every_column_and_random_matrices_do_not(files, capsys):
    code, text, _ = run_program(capsys, files[0], files[0])
    lines = text.splitlines()
    assert code == 0 and [line.split()[-3:] for line in lines if "mean of" in line] == [["1.000"] * 3] * 2
    random = [float(cell) for line in lines if "random" in line for cell in line.split()[-3:]]
    assert len(random) == 6 and max(random) < 0.3


def test_layers_of_one_adapter_only_are_counted_and_left_out(files, tmp_path, capsys):
    names = [layer_name(layer, "query") for layer in (0, 2, 8)]
    code, text, _ = run_program(capsys, files[0], saved(tmp_path / "few.bin", lora_state(2, 3, names)))
    assert code == 0 and "  Left out: 9 layers with LoRA in only one" in text  # 8 of the first, 1 of the second
    assert "query, mean of 2 layers" in text and "value" not in text


def test_modules_outside_attention_and_layers_without_a_number_have_distinct_names(tmp_path, capsys):
    ends = ["attention.output.dense", "intermediate.dense", "output.dense", "attention.self.query_proj"]
    names = [f"deberta.encoder.layer.{layer}.{end}" for layer in (2, 10) for end in ends] + ["pooler.dense"]
    path = saved(tmp_path / "all.bin", lora_state(2, 4, names))
    code, text, err = run_program(capsys, path, path, "--out", tmp_path / "out", "--layers", "10")
    assert code == 0, err
    modules = [line.split(",")[0].strip() for line in text.splitlines() if "mean of" in line]
    assert modules == ["attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense", "query_proj"]
    with open(tmp_path / "out" / "similarity.csv", newline="", encoding="utf-8") as file:
        layers = [(row["layer"], row["module"]) for row in csv.DictReader(file)]
    assert list(dict.fromkeys(layers))[-3:] == [("", "pooler.dense"), ("2", "query_proj"), ("10", "query_proj")]
    alone = saved(tmp_path / "alone.bin", lora_state(2, 4, ["pooler.dense"]))
    assert run_program(capsys, alone, alone, "--out", tmp_path / "out")[0] == 0
    assert "have none" in refused(capsys, alone, alone, "--layers", "0")


def test_the_mean_goes_as_far_as_the_smallest_rank_where_layers_differ():
    names = [layer_name(layer, "query") for layer in (0, 1)]
    state = lora_state(2, 5, names[:1]) | lora_state(4, 6, names[1:])
    adapter = Adapter(Path("mixed"), state)
    header, mean, _, first, second = table(compare(adapter, adapter), ["0", "1"]).splitlines()
    assert header.count("i = ") == 3
    assert [line.count("1.000") for line in (mean, first, second)] == [2, 2, 3]


def test_adapters_of_the_same_name_are_distinguished_by_their_parent_folders(tmp_path):
    assert short_names(["run/a", "run/b.bin"]) == ["a", "b.bin"]
    assert short_names(["one/lora", "/x/two/lora/"]) == ["one/lora", "two/lora"]
    assert short_names(["a/lora", "a/lora"]) == ["lora", "lora"]


def test_a_name_with_dollar_signs_is_drawn_as_it_is(tmp_path, capsys):
    path = saved(tmp_path / f"$\\frac{'long' * 20}$.bin", lora_state(2, 7))  # not TeX
    assert run_program(capsys, path, path, "--out", tmp_path / "out")[0] == 0


def test_adapters_without_a_common_layer_are_refused_naming_both(files, tmp_path, capsys):
    other = saved(tmp_path / "other.bin", lora_state(4, 8, ["deberta.encoder.layer.0.attention.self.query_proj"]))
    message = refused(capsys, files[0], other)
    assert str(files[0]) in message and str(other) in message
    assert layer_name(0, "query") in message and "query_proj" in message


def test_another_hidden_size_is_refused_naming_layer_and_shapes(files, tmp_path, capsys):
    wide = saved(tmp_path / "wide.bin", lora_state(2, 9, columns=64))
    message = refused(capsys, files[0], wide, "--out", tmp_path / "out")
    assert layer_name(0, "query") in message and "[4, 32]" in message and "[2, 64]" in message
    assert not (tmp_path / "out").exists()


def test_an_unknown_layer_or_module_is_refused_with_a_list_of_those_there_are(files, capsys):
    message = refused(capsys, *files, "--layers", "0,7,x")
    assert "no 7, x" in message and "0, 1, 2, 3, 4" in message
    message = refused(capsys, *files, "--modules", "query,keys")
    assert "no keys" in message and "query, value" in message


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "tensor",
    [f"{layer_name(3, 'value')}.lora_A", f"{layer_name(0, 'query')}.lora_B", "classifier.out_proj.bias"],
)
def test_an_adapter_with_numbers_that_are_not_finite_is_refused_naming_the_tensor(
    files, tmp_path, capsys, tensor, number
):
    state = lora_state(4, 10)
    state["classifier.out_proj.bias"] = torch.zeros(2)
    state[tensor].view(-1)[1] = number
    message = refused(capsys, files[0], saved(tmp_path / "nan.bin", state))
    assert "nan.bin" in message and tensor in message


def test_a_missing_adapter_and_a_folder_that_is_a_file_are_errors_of_one_line(files, tmp_path, capsys):
    assert "nowhere" in refused(capsys, files[0], tmp_path / "nowhere")
    assert files[1].name in refused(capsys, *files, "--out", files[1])


def test_without_matplotlib_the_table_is_printed_and_pictures_are_refused_with_the_remedy(
    files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_program(capsys, *files)[0] == 0
    assert "pip install 'lora-nlu[plots]'" in refused(capsys, *files, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_module_runs_as_a_program_without_a_display(files, tmp_path):
    command = [sys.executable, "-m", "lora_nlu.similarity", *map(str, files), "--out", str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "mean of 5 layers" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


@pytest.mark.parametrize("method", ["bitfit", "vera"])
def test_a_folder_of_another_method_is_refused_and_the_message_names_its_method(method, files, tmp_path, capsys):
    names = {"bitfit": ["bias"], "vera": ["vera_lambda_d", "vera_lambda_b"]}
    state = {f"{layer_name(0, 'query')}.{name}": torch.zeros(HIDDEN) for name in names[method]}
    other = tmp_path / "other"
    write_adapter(Adapter(tmp_path, state, method=method, settings={"vera_seed": 0}), other)
    for pair in ((files[0], other), (other, files[0]), (other, other)):
        message = refused(capsys, *pair)
        assert f"{other}: contains {method}, which trains no LoRA matrices" in message
