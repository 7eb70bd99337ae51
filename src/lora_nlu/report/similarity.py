"""Whether two adapters learned the same directions: the subspace similarity of the LoRA paper (section 7.2, eq. 4).

A row of `lora_A` is a direction of the layer's input; the right-singular vectors order the space of these rows by
weight. phi(i, j) is the share of the smaller of two such spaces that lies in the larger, from 0 (none) to 1 (all): the
first is spanned by the top i vectors of adapter 1, the second by the top j of adapter 2. Independent random matrices
give max(i, j) / in on average.
"""

import csv
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_nlu.adapters.adapter import Adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.errors import UserError
from lora_nlu.escaping import csv_cell
from lora_nlu.files import atomic_write

_MOST_NUMBERS = 2**24  # of the similarities of all layers; LoRA of rank 64 on 144 layers has 2**19


def write_similarity(paths: list[str], layers: str | None, modules: str | None, out: Path | None) -> str:
    """The similarity of the adapters at two paths as a table; given `out`, also a CSV file and a picture there.

    layers, modules: comma-separated, to show and to compare; None for the table's means alone, and for all modules.
    Raises UserError.
    """
    adapters = [read_adapter(path) for path in paths]
    pairs = compare(adapters[0], adapters[1], modules)
    numbers = sorted({pair.layer for pair in pairs if pair.layer}, key=int)
    shown = [] if layers is None else _choose("--layers", layers, numbers)
    names = short_names(paths)
    ranks = [", ".join(map(str, sorted(set(adapter.ranks.values())))) for adapter in adapters]
    if out:
        first_middle_last = dict.fromkeys([*numbers[:1], *numbers[(len(numbers) - 1) // 2 :][:1], *numbers[-1:]])
        draw(pairs, shown or [*first_middle_last], names, ranks, out)
        write_csv(pairs, out / "similarity.csv")
    lines = [f"  adapter {i}: {name}, rank {rank}" for i, name, rank in zip((1, 2), names, ranks, strict=True)]
    if count := len(adapters[0].ranks.keys() ^ adapters[1].ranks.keys()):
        lines.append(f"  Left out: {count} layers with LoRA in only one of them.")
    lines += ["", table(pairs, shown)]
    lines += ["", "  phi(i, i) is the share of the first i directions that both learned: 0 is none, 1 is all."]
    lines += ["", f"  {out}: similarity.png and, with every number, similarity.csv."] if out else []
    return "\n".join(lines)


class Pair(NamedTuple):
    """One layer of two adapters: its number ("" if its name has none), its module, and the similarities [R1, R2]."""

    layer: str
    module: str
    phi: Tensor
    random: Tensor  # of two Gaussian matrices of the same shapes


def compare(one: Adapter, two: Adapter, modules: str | None = None) -> list[Pair]:
    """The layers with LoRA in both adapters, by module, then number; `modules` is a comma-separated choice.

    Raises UserError if there are none, for an unknown module and for matrices that can't be compared.
    """
    for adapter in (one, two):
        if not adapter.ranks or "lora_A" not in adapter.row.tensors:
            raise UserError(f"{adapter.source}: contains {adapter.method}, which trains no LoRA matrices to compare.")
        adapter.check_values()
    places = {name: _place(name) for name in one.ranks if name in two.ranks}
    if not places:
        names = (next(iter(adapter.ranks)) for adapter in (one, two))
        raise UserError(
            f"{one.source} and {two.source} have no layer in common.\nTheir first layers: {', '.join(names)}."
        )
    chosen = _choose("--modules", modules, sorted({module for _, module in places.values()}))
    ranks = [(one.ranks[name], two.ranks[name]) for name, (_, module) in places.items() if module in chosen]
    if (numbers := sum(r1 * r2 for r1, r2 in ranks)) > _MOST_NUMBERS:
        raise UserError(
            f"{one.source} and {two.source}: {len(ranks)} layers with ranks up to {max(map(max, ranks)):,} give "
            f"{numbers:,} similarities; at most {_MOST_NUMBERS:,} are computed.\nChoose fewer layers with --modules."
        )
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for name, (layer, module) in sorted(places.items(), key=lambda item: (item[1][1], int(item[1][0] or -1))):
        if module not in chosen:
            continue
        A1, A2 = (adapter.state[f"{name}.lora_A"] for adapter in (one, two))
        if A1.shape[1] != A2.shape[1]:
            raise UserError(
                f"{name}.lora_A is {list(A1.shape)} in {one.source}, {list(A2.shape)} in {two.source}.\n"
                "Compare adapters of base models of the same size."
            )
        noise = [torch.randn(A.shape, generator=generator, dtype=torch.float64) for A in (A1, A2)]
        pairs.append(Pair(layer, module, subspace_similarity(A1, A2), subspace_similarity(*noise)))
    return pairs


def _place(name: str) -> tuple[str, str]:
    """(number, module) of a layer: `roberta.encoder.layer.3.attention.self.query` is ("3", "query")."""
    match = re.search(r"\.layer\.(\d+)\.(?:attention\.self\.)?(.+)", name)
    return (match[1], match[2]) if match else ("", name)


def _choose(flag: str, value: str | None, choices: list[str]) -> list[str]:
    """The choices in a flag's comma-separated value; all without a value. Raises UserError for any other."""
    if value is None:
        return choices
    names = [name.strip() for name in value.split(",")]
    if unknown := [name for name in names if name not in choices]:
        raise UserError(f"{flag} {value}: no {', '.join(unknown)}; both adapters have {', '.join(choices) or 'none'}.")
    return [name for name in choices if name in names]


def subspace_similarity(A1: Tensor, A2: Tensor) -> Tensor:
    """phi(i, j) = ||U1_i^T U2_j||_F^2 / min(i, j), the columns of U_i being the top i right-singular vectors.

    An A of rank k < r has no vectors after the k-th: for i > k its space is the span of all its rows, and min(i, j)
    uses k instead of i, so the result does not depend on the vectors that the decomposition puts there. A zero matrix
    has similarity 0. A singular value counts as 0 below the rounding of float64.

    Args:    A1 [R1, in], A2 [R2, in], any real dtype, finite, on one device.
    Returns: [R1, R2] float64; entry (i - 1, j - 1) is phi(i, j), in [0, 1].
    Raises:  ValueError if `in` differs.
    """
    if A1.shape[1] != A2.shape[1]:
        raise ValueError(f"A1 is {list(A1.shape)} and A2 is {list(A2.shape)}; expected the same number of columns.")
    (U1, sizes1), (U2, sizes2) = _top_vectors(A1), _top_vectors(A2)
    overlap = (U1 @ U2.T).square()  # [R1, R2]; ||U1_i^T U2_j||_F^2 is the sum of its first i rows and j columns
    smaller = torch.minimum(sizes1[:, None], sizes2)  # [R1, R2]
    return (overlap.cumsum(0).cumsum(1) / smaller.clamp(min=1)).clamp(max=1)


def _top_vectors(A: Tensor) -> tuple[Tensor, Tensor]:
    """Right-singular vectors as rows [R, in], zeros after the rank of A; dimensions of the span of the top 1..R [R]."""
    _, values, vectors = torch.linalg.svd(A.detach().double(), full_matrices=False)
    rounding = max(A.shape) * torch.finfo(torch.float64).eps
    k = int((values > rounding * values[:1]).sum())
    U = torch.zeros(A.shape, dtype=torch.float64, device=A.device)
    U[:k] = vectors[:k]
    return U, torch.arange(1, len(A) + 1, device=A.device).clamp(max=k)


def short_names(paths: list[str]) -> list[str]:
    """The last part of each path, or as many parts as make the names differ."""
    parts = [Path(path).absolute().parts for path in paths]
    count = 1
    while len({path[-count:] for path in parts}) < len({*parts}):
        count += 1
    return ["/".join(path[-count:]) for path in parts]


def draw(pairs: list[Pair], layers: list[str], names: list[str], ranks: list[str], folder: Path) -> None:
    """Write similarity.png: heat maps of these layers, of the mean over all and of random matrices, on one scale.

    Raises UserError without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot, which opens windows and keeps global state
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        from lora_nlu.report.pictures import balanced, letters, save
    except ImportError as e:
        raise UserError("--out needs matplotlib, which is not installed: pip install 'lora-nlu[plots]'") from e
    modules = _by_module(pairs)
    rows = [*(f"layer {layer}" for layer in layers), "mean of all", "random"]
    height, width = len(rows), len(modules)
    panels: dict[tuple[int, int], Tensor] = {}  # by row and column
    for column, own in enumerate(modules.values()):
        of_layer = {pair.layer: pair.phi for pair in own}
        shown = [*map(of_layer.get, layers), _mean([pair.phi for pair in own]), _mean([pair.random for pair in own])]
        panels |= {(row, column): phi for row, phi in enumerate(shown) if phi is not None}
    random = [float(phi.mean()) for (row, _), phi in panels.items() if row == height - 1]
    low = math.floor(10 * min(float(phi.min()) for phi in panels.values())) / 10
    high = max(low + 0.1, math.ceil(10 * max(float(phi.max()) for phi in panels.values())) / 10)
    names = [name if len(name) <= 32 else f"{name[:15]}...{name[-14:]}" for name in names]
    with matplotlib.rc_context({"font.size": 12, "text.parse_math": False}):  # a name may contain dollar signs
        size = max(6.5, 2.6 + 2.6 * width), max(5.6, 1.8 + 1.7 * height)  # inches
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
        grid = figure.subplots(height, width, squeeze=False)
        letter = map(letters, itertools.count())
        for (row, column), axes in np.ndenumerate(grid):
            if column == 0:
                axes.set_ylabel(rows[row])
            if (row, column) not in panels:
                axes.set(xticks=[], yticks=[], frame_on=False)
                continue
            phi = panels[row, column]
            r1, r2 = phi.shape
            extent = (0.5, r2 + 0.5, r1 + 0.5, 0.5)  # cell (i, j) is centred on i and j
            style = {"cmap": "viridis", "aspect": "auto", "interpolation": "nearest"}
            image = axes.imshow(phi.numpy(), vmin=low, vmax=high, extent=extent, **style)
            for axis, rank in ((axes.xaxis, r2), (axes.yaxis, r1)):
                axis.set_ticks(sorted({1, *(-(-rank * quarter // 4) for quarter in (1, 2, 3, 4))}))
            axes.set_title(next(letter), loc="left", fontsize=12, fontweight="bold")
        for axes, module in zip(grid[0], modules, strict=True):
            axes.set_title(balanced(module, 22), fontsize=12)
        bar = figure.colorbar(image, ax=grid, pad=0.04 / width, shrink=min(1, 2.5 / height))
        bar.set_label("phi(i, j): share in common (white line: random)")
        bar.ax.axhline(sum(random) / len(random), color="white", linewidth=2.5)
        lines = [f"adapter {n}: {name}, rank {rank}" for n, name, rank in zip((1, 2), names, ranks, strict=True)]
        figure.suptitle("\n".join(["Subspace similarity of lora_A", *lines]), fontsize=13)
        figure.supylabel(f"i: top vectors of adapter 1, {names[0]}", fontsize=12)
        figure.supxlabel(f"j: top vectors of adapter 2, {names[1]}", fontsize=12)
        save(figure, folder, "similarity")


def _by_module(pairs: list[Pair]) -> dict[str, list[Pair]]:
    return {module: [p for p in pairs if p.module == module] for module in dict.fromkeys(p.module for p in pairs)}


def _mean(matrices: list[Tensor]) -> Tensor:
    """The mean over layers, cut to the smallest of them if their ranks differ."""
    rows, columns = (min(sizes) for sizes in zip(*(m.shape for m in matrices), strict=True))
    return torch.stack([m[:rows, :columns] for m in matrices]).mean(0)


def write_csv(pairs: list[Pair], path: Path) -> None:
    """Write every phi of every layer: layer, module, i, j, phi."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["layer", "module", "i", "j", "phi"])
        for pair in pairs:
            for i, row in enumerate(pair.phi.tolist(), 1):
                writer.writerows([pair.layer, csv_cell(pair.module), i, j, phi] for j, phi in enumerate(row, 1))


def table(pairs: list[Pair], layers: list[str]) -> str:
    """phi(i, i) for powers of two: for each module the mean over all layers, that of random matrices, then `layers`."""
    steps = [2**n for n in range(max(min(pair.phi.shape) for pair in pairs).bit_length())]
    rows = [("phi(i, i) of lora_A", [f"i = {i}" for i in steps])]
    for module, own in _by_module(pairs).items():
        lines = [(f"{module}, mean of {len(own)} layer{'s' * (len(own) > 1)}", _mean([pair.phi for pair in own]))]
        lines += [("  random matrices", _mean([pair.random for pair in own]))]
        lines += [(f"  layer {pair.layer}", pair.phi) for pair in own if pair.layer in layers]
        rows += [(label, [f"{m[i - 1, i - 1]:.3f}" for i in steps if i <= min(m.shape)]) for label, m in lines]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}" + "".join(f"{cell:>8}" for cell in cells) for label, cells in rows)
