"""The table of methods: its rows' functions exist, and one more row is all that a new method needs."""

import json
import re
import runpy
from typing import Any

import pytest
import torch
from runs import SCRIPT, cut_off, write_glue, write_models
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_nlu.adapters.__main__ import main as adapters
from lora_nlu.methods import METHODS, Flag, Method
from lora_nlu.ops.kernels import Linear


class ScaledLinear(Linear):
    """A frozen linear layer whose output has a trained factor for each feature."""

    method = "toy"

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.toy_scale = nn.Parameter(torch.ones(out_features))

    def reset_added_parameters(self, normal_std: float | None = None) -> None:
        nn.init.ones_(self.toy_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.toy_scale * super().forward(x)


def scales(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("toy_scale")}


class Counter:
    """What the toy does after a step: it counts, and sees the gradients that the step used."""

    def __init__(self, model: Any) -> None:
        self.model, self.count, self.steps = model, 0, []
        COUNTERS.append(self)

    def step(self, number: int, total: int) -> None:
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in scales(self.model).values())
        self.count += 1
        self.steps.append((number, total))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


COUNTERS: list[Counter] = []
STARTED: list[list[float]] = []
TERMS: list[float] = []
RATES: list[list[float]] = []


def new_layer(trained: Any, target: str, layer: int, in_features: int, out_features: int) -> Any:
    return ScaledLinear(in_features, out_features) if target == "query" else None


def start(model: Any) -> None:
    STARTED.append([p.mean().item() for p in scales(model).values()])
    for p in scales(model).values():
        nn.init.constant_(p, 0.9)


def loss_term(model: Any) -> Tensor:
    term = sum(((p - 1) ** 2).sum() for p in scales(model).values()) * 0.1 + 0.01
    TERMS.append(term.item())
    return term


def parameter_groups(model: Any, groups: list[dict[str, Any]], learning_rate: float) -> list[dict[str, Any]]:
    own = {id(p) for p in scales(model).values()}
    rest = [group | {"params": [p for p in group["params"] if id(p) not in own]} for group in groups]
    RATES.append([learning_rate, 3 * learning_rate])
    return [*rest, {"params": [*scales(model).values()], "lr": 3 * learning_rate, "weight_decay": 0.0}]


def rebuild(model: Any, adapter: Any, lora_alpha: float | None) -> None:
    for name, module in [*model.named_modules()]:
        if re.search(r"self\.query(_proj)?$", name) and not isinstance(module, ScaledLinear):
            new = ScaledLinear(module.in_features, module.out_features)
            new.weight, new.bias = module.weight, module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)


TOY = Method(
    "toy",
    "Toy",
    "#123456",
    "X",
    part="scales",
    chosen_by={"apply_toy": True},
    flags=(Flag("apply_toy", "Train a factor of each feature of the query", bool, False), METHODS["head"].flags[1]),
    added=r"\.toy_scale$",
    state=r"\.toy_scale$",
    layer=new_layer,
    start=start,
    loss_term=loss_term,
    after_step=Counter,
    parameter_groups=parameter_groups,
    peft_types=("TOY",),
    rebuild=rebuild,
    to_peft=lambda adapter: {"toy_layers": len([name for name in adapter.state if "toy_scale" in name])},
    describe=lambda model: {"scales": len(scales(model))},
)


@pytest.mark.parametrize("name", METHODS)
def test_every_function_that_a_row_names_exists(name):
    row = METHODS[name]
    for field in ("read", "layer", "block", "start", "rebuild", "to_config", "merge", "describe"):
        if (value := getattr(row, field)) is not None:
            with pytest.raises(TypeError, match="argument"):  # found, and called with too many arguments
                value(*range(9))
    assert row.label and re.fullmatch("#[0-9A-F]{6}", row.color) and len(row.marker) == 1


def test_no_two_methods_look_the_same_in_a_plot():
    assert len({(row.color, row.marker) for row in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("kind", ["roberta", "deberta"])
def test_a_new_row_is_all_that_a_new_method_needs(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "toy", TOY)
    for log in (COUNTERS, STARTED, TERMS, RATES):
        log.clear()
    glue = write_glue(tmp_path / "glue")
    base = write_models(tmp_path / "models", glue)[kind]
    main = runpy.run_path(str(SCRIPT))["main"]
    flags = ["--task_name", "rte", "--glue_dir", glue, "--model_name_or_path", base, "--max_seq_length", "32"]
    flags += ["--learning_rate", "1e-2", "--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "8"]

    def call(folder: str, *more: Any) -> None:
        main([*map(str, flags), "--output_dir", str(tmp_path / folder), "--do_eval", *map(str, more)])

    call("run", "--do_train", "--apply_toy")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["method"] == {"name": "toy", "label": "Toy", "color": "#123456", "marker": "X", "scales": 2}
    assert record["parameters"]["encoder"] == 2 * 32
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert sum("toy_scale" in name for name in tensors) == 2
    assert all((t - 0.9).abs().max() > 1e-3 for name, t in tensors.items() if "toy_scale" in name)
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["toy_layers"] == 2
    assert COUNTERS[-1].count == 4 and COUNTERS[-1].steps == [(i, 4) for i in (1, 2, 3, 4)]
    assert STARTED == [[1.0, 1.0]]  # once, with the new layers
    assert len(TERMS) == 4 and RATES == [[1e-2, 3e-2]]
    state = torch.load(tmp_path / "run" / "checkpoint-2" / "method_state.pt", weights_only=True)
    assert state == {"toy": {"count": 2}}

    cut_off(tmp_path / "run", tmp_path / "resumed", 2)
    call("resumed", "--do_train", "--apply_toy")
    assert COUNTERS[-1].count == 4 and COUNTERS[-1].steps == [(3, 4), (4, 4)]
    again = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.items()) and again.keys() == tensors.keys()

    call("evaluated", "--adapter_path", tmp_path / "run")
    assert STARTED == 3 * [[1.0, 1.0]]  # an adapter's layers are started too, before its tensors are copied
    scores = [json.loads((tmp_path / f / "eval_results.json").read_text()) for f in ("run", "evaluated")]
    assert scores[0]["eval_loss"] == scores[1]["eval_loss"]
    capsys.readouterr()
    assert adapters(["inspect", str(tmp_path / "run")]) == 0
    assert re.search(r"method +toy", capsys.readouterr().out)
