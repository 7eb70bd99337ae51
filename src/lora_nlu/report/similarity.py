"""Whether two adapters learned the same directions: the subspace similarity of the LoRA paper (section 7.2, eq. 4).

python -m lora_nlu.similarity ADAPTER1 ADAPTER2 [--layers 0,5,11] [--modules query,value] [--out FOLDER]

A row of `lora_A` is a direction of the layer's input; its right-singular vectors order the space of these rows by
weight. phi(i, j) says how much of the smaller of two such spaces lies in the larger, from 0 (none) to 1 (all): the
first is spanned by the top i vectors of adapter 1, the second by the top j of adapter 2. Independent random matrices
give max(i, j) / in on average.
"""

import argparse
import csv
import io
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_nlu.adapters.adapter import Adapter
from lora_nlu.adapters.checks import check_values
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import atomic_write, write_text


def subspace_similarity(A1: Tensor, A2: Tensor) -> Tensor:
    """phi(i, j) = ||U1_i^T U2_j||_F^2 / min(i, j), the columns of U_i being the top i right-singular vectors.

    An A of rank k < r has no vectors after the k-th: from i = k on, its space is all of its rows' span, and k stands
    for i, also in min(i, j). The result is then the same whichever vectors the decomposition puts there. A zero matrix
    has similarity 0. A singular value counts as 0 from the rounding of float64 down.

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


class Pair(NamedTuple):
    """One layer of two adapters: its number ("" if its name has none), its module, and the similarities [R1, R2]."""

    layer: str
    module: str
    phi: Tensor
    random: Tensor  # of two Gaussian matrices of the same shapes


def _place(name: str) -> tuple[str, str]:
    """(number, module) of a layer: `roberta.encoder.layer.3.attention.self.query` is ("3", "query")."""
    match = re.search(r"\.layer\.(\d+)\.(?:attention\.self\.)?(.+)", name)
    return (match[1], match[2]) if match else ("", name)


def compare(one: Adapter, two: Adapter, modules: str | None = None) -> list[Pair]:
    """The layers that both adapters have, by module, then number; `modules` is a comma-separated list of those wanted.

    Raises UserError if there are none, for a module that is unknown and for matrices that can't be compared.
    """
    for adapter in (one, two):
        if not adapter.ranks:
            raise UserError(f"{adapter.source}: holds {adapter.method}, which has no LoRA matrices to compare.")
        check_values(adapter)
    places = {name: _place(name) for name in one.ranks if name in two.ranks}
    if not places:
        names = (next(iter(adapter.ranks)) for adapter in (one, two))
        raise UserError(
            f"{one.source} and {two.source} have no layer in common.\nTheir first ones: {', '.join(names)}."
        )
    wanted = _chosen("--modules", modules, sorted({module for _, module in places.values()}))
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for name, (layer, module) in sorted(places.items(), key=lambda item: (item[1][1], int(item[1][0] or -1))):
        if module not in wanted:
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


def _chosen(flag: str, given: str | None, known: list[str]) -> list[str]:
    """Those of `known` in a comma-separated list; all of them without one. Raises UserError for any other value."""
    if given is None:
        return known
    values = [value.strip() for value in given.split(",")]
    unknown = [value for value in values if value not in known]
    if unknown:
        raise UserError(f"{flag} {given}: no {', '.join(unknown)}; both adapters have {', '.join(known) or 'none'}.")
    return [value for value in known if value in values]


def _numbers(pairs: list[Pair]) -> list[str]:
    return sorted({pair.layer for pair in pairs if pair.layer}, key=int)


def _by_module(pairs: list[Pair]) -> dict[str, list[Pair]]:
    return {module: [p for p in pairs if p.module == module] for module in dict.fromkeys(p.module for p in pairs)}


def _mean(matrices: list[Tensor]) -> Tensor:
    """The mean over layers, as far as the smallest of them goes where their ranks differ."""
    rows, columns = (min(sizes) for sizes in zip(*(m.shape for m in matrices), strict=True))
    return torch.stack([m[:rows, :columns] for m in matrices]).mean(0)


def table(pairs: list[Pair], layers: list[str]) -> str:
    """phi(i, i) for powers of two: of each module the mean over all layers, the random one, then these layers."""
    steps = [2**n for n in range(max(min(pair.phi.shape) for pair in pairs).bit_length())]
    rows = [("phi(i, i) of lora_A", [f"i = {i}" for i in steps])]
    for module, mine in _by_module(pairs).items():
        lines = [(f"{module}, mean of {len(mine)} layer{'s' * (len(mine) > 1)}", _mean([pair.phi for pair in mine]))]
        lines += [("  random matrices", _mean([pair.random for pair in mine]))]
        lines += [(f"  layer {pair.layer}", pair.phi) for pair in mine if pair.layer in layers]
        rows += [(label, [f"{m[i - 1, i - 1]:.3f}" for i in steps if i <= min(m.shape)]) for label, m in lines]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}" + "".join(f"{cell:>8}" for cell in cells) for label, cells in rows)


def write_csv(pairs: list[Pair], path: Path) -> None:
    """Write every phi of every layer: layer, module, i, j, phi."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "module", "i", "j", "phi"])
    for pair in pairs:
        for i, row in enumerate(pair.phi.tolist(), 1):
            writer.writerows([pair.layer, pair.module, i, j, phi] for j, phi in enumerate(row, 1))
    write_text(path, text.getvalue())


def draw(pairs: list[Pair], layers: list[str], names: list[str], ranks: list[str], folder: Path) -> None:
    """Write similarity.png and similarity.svg: a heat map for each of these layers and for the mean over all.

    Raises UserError if matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # no pyplot: no window, nothing global
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise UserError("--out draws with matplotlib, which is missing.\nGive: pip install 'lora-nlu[plots]'") from e

    folder.mkdir(parents=True, exist_ok=True)
    modules = _by_module(pairs)
    height, width = len(layers) + 1, len(modules)
    names = [name if len(name) <= 32 else f"{name[:15]}...{name[-14:]}" for name in names]
    with matplotlib.rc_context({"font.size": 12, "text.parse_math": False}):  # a name may hold dollar signs
        size = max(6.5, 2.6 + 2.6 * width), max(5.6, 1.8 + 1.9 * height)  # inches
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1))
        grid = figure.subplots(height, width, squeeze=False)
        for column, (module, mine) in enumerate(modules.items()):
            panels = [next((pair.phi for pair in mine if pair.layer == layer), None) for layer in layers]
            for row, phi in enumerate([*panels, _mean([pair.phi for pair in mine])]):
                axes = grid[row, column]
                if row == 0:
                    axes.set_title(textwrap.fill(module, 22), fontsize=12)
                if column == 0:
                    axes.set_ylabel(f"layer {layers[row]}" if row < len(layers) else "mean of all")
                if phi is None:
                    axes.set(xticks=[], yticks=[], frame_on=False)
                    continue
                r1, r2 = phi.shape
                extent = (0.5, r2 + 0.5, r1 + 0.5, 0.5)  # cell (i, j) is centred on i and j
                image = axes.imshow(
                    phi.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest"
                )
                for axis, rank in ((axes.xaxis, r2), (axes.yaxis, r1)):
                    axis.set_ticks(sorted({1, *(-(-rank * quarter // 4) for quarter in (1, 2, 3, 4))}))
        figure.colorbar(image, ax=grid, label="phi(i, j): share in common", pad=0.04 / width, shrink=min(1, 2 / height))
        lines = [f"adapter {n}: {name}, rank {rank}" for n, name, rank in zip((1, 2), names, ranks, strict=True)]
        figure.suptitle("\n".join(["Subspace similarity of lora_A", *lines]), fontsize=13)
        figure.supylabel(f"i: top vectors of adapter 1, {names[0]}", fontsize=12)
        figure.supxlabel(f"j: top vectors of adapter 2, {names[1]}", fontsize=12)
        for kind in ("png", "svg"):
            with atomic_write(folder / f"similarity.{kind}") as partial:
                figure.savefig(partial, format=kind, dpi=150)


def short_names(paths: list[str]) -> list[str]:
    """The last part of each path, or as many more as it takes to tell them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_nlu.similarity", description=(__doc__ or "").split("\n")[0])
    for number in (1, 2):
        parser.add_argument(f"adapter{number}", help="a published .bin, an adapter or output folder, or a Hub id")
    parser.add_argument("--layers", help="numbers of the layers to show beside the mean over all, as 0,5,11")
    parser.add_argument("--modules", help="the modules to compare, as query,value; without it, all")
    parser.add_argument("--out", type=Path, help="a folder for similarity.png, .svg and .csv")
    args = parser.parse_args(argv)
    paths = [args.adapter1, args.adapter2]
    try:
        adapters = [read_adapter(path) for path in paths]
        pairs = compare(adapters[0], adapters[1], args.modules)
        numbers = _numbers(pairs)
        shown = [] if args.layers is None else _chosen("--layers", args.layers, numbers)
        names = short_names(paths)
        ranks = [", ".join(map(str, sorted(set(adapter.ranks.values())))) for adapter in adapters]
        if args.out:
            few = [n for i, n in enumerate(numbers) if i in (0, (len(numbers) - 1) // 2, len(numbers) - 1)]
            draw(pairs, shown or few, names, ranks, args.out)
            write_csv(pairs, args.out / "similarity.csv")
        for number in (0, 1):
            print(f"  adapter {number + 1}: {names[number]}, rank {ranks[number]}")
        left_out = len(adapters[0].ranks.keys() ^ adapters[1].ranks.keys())
        if left_out:
            print(f"  {left_out} of their layers are in one adapter only and left out.")
        print(f"\n{table(pairs, shown)}")
        if args.out:
            print(f"\n  {args.out}: similarity.png, similarity.svg and, with every number, similarity.csv.")
    except (UserError, OSError) as e:
        print(f"lora_nlu.similarity: error: {e}", file=sys.stderr)
        return 1
    return 0
