"""What docs/scaling.md says that a run costs, against the models, the launcher, docs/speed.md and measured files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model, RobertaConfig, RobertaModel

from lora_nlu.methods.marking import count_parameters, mark_trainable
from lora_nlu.models import modeling_deberta_v2, modeling_roberta

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import expected  # noqa: E402
from common import XXLARGE  # noqa: E402

DOC = (ROOT / "docs" / "scaling.md").read_text()
RECIPES = {recipe.script: recipe for recipe in expected.recipes()}
SHARED = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}  # the Hub's config.json
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
CONFIGS = {
    "roberta-base": (RobertaConfig, SHARED),
    "roberta-large": (RobertaConfig, SHARED | LARGE),
    "microsoft/deberta-v2-xxlarge": (DebertaV2Config, XXLARGE),
}


def config(name: str, **more: object):
    kind, settings = CONFIGS[name]
    return kind(**settings, **more)


def test_the_program_prints_the_documents_tables():
    """Four of its six tables are in the document, and five rows each of the two with a row for every script."""
    command = [sys.executable, str(ROOT / "benchmarks" / "expected.py")]
    tables = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n\n")
    assert len(tables) == 6
    for table in tables:
        header, rule, *rows = table.splitlines()
        shown = DOC.partition(f"\n\n{header}\n{rule}\n")[2].partition("\n\n")[0].splitlines()
        is_long = len(rows) == len(RECIPES)
        assert shown == ([row for row in rows if row in shown] if is_long else rows), header
        assert len(shown) == (5 if is_long else len(rows)), header


def test_it_needs_no_torch():
    program = "import sys; sys.path.insert(0, 'benchmarks'); import expected; expected.tables('rte', [1, 2], 100, 10)"
    program += "; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_every_script_has_its_rows():
    published, baselines = (
        [line.split("\t") for line in (ROOT / "tests" / f"{name}.tsv").read_text().splitlines()[1:]]
        for name in ("hyperparameters", "baselines")
    )
    names = [script.removesuffix(".sh") for script, *_ in published]
    names += [f"{Path(script).stem}_{task}" for script, _, _, task, *_ in baselines]
    assert len(names) == 44 and list(RECIPES) == names


@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_has_as_many_parameters_as_transformers_gives_it(name):
    with torch.device("meta"):
        is_roberta = name.startswith("roberta")
        model = RobertaModel(config(name), add_pooling_layer=False) if is_roberta else DebertaV2Model(config(name))
    ours, layers = expected.MODELS[name], model.encoder.layer
    assert ours.frozen == sum(p.numel() for p in model.parameters())
    assert ours.layers * ours.layer == sum(p.numel() for p in layers.parameters())
    assert ours.layers * ours.matrices == sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    assert ours.vocabulary * ours.hidden == model.embeddings.word_embeddings.weight.numel()


@pytest.mark.parametrize(
    "script, added",
    [
        ("roberta_base_mnli", 294_912),  # the paper's and docs/methods.md's figures
        ("roberta_base_stsb", 294_912),
        ("roberta_large_rte", 786_432),
        ("deberta_v2_xxlarge_cola", 4_718_592),
        ("mnli.rdrop", 4_718_592),
        ("adapter_houlsby_roberta_large_mnli", 835_968),
        ("adapter_pfeiffer_roberta_large_mnli", 811_392),
        ("bitfit_roberta_base_cola", 102_144),
        ("full_roberta_base_stsb", 124_055_040),
    ],
)
def test_as_many_parameters_train_as_in_the_model(script, added):
    recipe = RECIPES[script]
    name = next(name for name, model in expected.MODELS.items() if model is recipe.model)
    method: dict[str, object] = {"apply_lora": True, "lora_r": 16 if "deberta" in name else 8, "lora_alpha": 16}
    if "adapter" in script:
        kind = script.split("_")[1]
        method = {"apply_adapter": True, "adapter_type": kind, "adapter_size": {"houlsby": 8, "pfeiffer": 16}[kind]}
    if script.startswith(("bitfit", "full")):
        method = {"apply_bitfit": script.startswith("bitfit")}
    settings = config(name, num_labels=len(recipe.task.labels) or 1, **method)
    module = modeling_roberta if name.startswith("roberta") else modeling_deberta_v2
    with torch.device("meta"):
        model = getattr(module, f"{'Roberta' if module is modeling_roberta else 'DebertaV2'}ForSequenceClassification")(
            settings
        )
    mark_trainable(model)
    counts = count_parameters(model)
    assert counts.encoder == added
    assert recipe.trained == counts.trainable
    assert recipe.trained + recipe.still == counts.total


def test_operations_are_those_of_the_measured_limit():
    """limit.py's list of dense products, which the limit of train_step.py is made of; it has no relative table."""
    program = (
        "import sys, json; sys.path.insert(0, 'benchmarks'); import limit, sides\n"
        "flops = lambda name, layers, train: sum(2 * n * o * i for n, o, i, *_ in "
        "limit.products(sides.configure(name, layers), 700, 9, train))\n"
        "print(json.dumps([flops(n, l, t) for n, l in (('roberta-base', 12), ('deberta-xxlarge-3-layers', 48))"
        " for t in (True, False)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    base, xxlarge = expected.MODELS["roberta-base"], expected.MODELS["microsoft/deberta-v2-xxlarge"]
    # distances: twice the longest length, which is twice the mean; two projections [H, H] in each of 48 layers
    table = 2 * (2 * 2 * 700 / 9) * 2 * 1536**2 * 48
    got = [model.operations(700, 9, train) for model in (base, xxlarge) for train in (True, False)]
    assert [*got[:2], got[2] - table, got[3] - table] == pytest.approx(json.loads(done.stdout), rel=1e-12)


def test_operations_and_rates_fit_what_was_measured_otherwise():
    # docs/speed.md: the dense layers of xxlarge take 7.3 s for 254 tokens at 186 to 192 GFLOP/s; the table is 8 % more
    xxlarge = expected.MODELS["microsoft/deberta-v2-xxlarge"]
    assert xxlarge.operations(254, 4) == pytest.approx(1.08 * 7.3 * 189e9, rel=0.03)
    # train_step.py's own: our share of the fastest matmul's rate, medians of ratios
    shares = {row["name"]: row for row in json.loads((ROOT / "benchmarks" / "results" / "train.json").read_text())}
    rates = [*expected.cpu_rates(False), *expected.cpu_rates(True)]
    assert len(rates) == 9
    for row in rates:
        of = shares[row["name"]]
        rate = 1e9 * of["share_of_fastest_matmul"]["median"] * of["fastest_matmul_gflops"]["median"]
        assert row["rate"] == pytest.approx(rate, rel=0.1), row["name"]


def test_tokens_are_those_of_the_benchmarks_readme():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for task, name in (("rte", "RTE mean"), ("sst2", "SST-2"), ("cola", "CoLA"), ("stsb", "STS-B")):
        assert f"{name} {RECIPES[f'roberta_base_{task}'].tokens:.0f}" in text
    assert f"mean {RECIPES['roberta_base_mrpc'].tokens} and deviation" in text.replace("\n", " ")
    for task in ("mnli", "qqp"):
        assert f"{task.upper()}'s {expected.MEANS[task]}" in DOC.replace(
            "\n  ", " "
        )  # the page says that it is assumed
    assert RECIPES["deberta_v2_xxlarge_cola"].longest == 47 and RECIPES["roberta_large_stsb"].longest == 125
    short = RECIPES["roberta_large_stsb"], RECIPES["roberta_base_stsb"]
    assert short[0].tokens == short[1].tokens  # nothing is longer than 128


def test_a_step_that_the_launcher_refuses_has_no_time():
    recipe = RECIPES["deberta_v2_xxlarge_qnli"]  # 48 examples a step
    assert recipe.gpu_seconds(5, 10) is None and recipe.gpu_seconds(3, 10) is not None


def test_a_full_fine_tuning_step_takes_three_forward_passes_and_bitfits_two():
    full, bitfit = RECIPES["full_roberta_base_rte"], RECIPES["bitfit_roberta_base_rte"]
    assert full.micro(16) == 3 * full.micro(16, train=False) and bitfit.micro(16) == 2 * bitfit.micro(16, train=False)
    assert full.still == 0 and full.kept == 1 and bitfit.kept == 16 and RECIPES["roberta_base_rte"].kept == 80


def test_waiting_evaluations_and_memory():
    assert expected.waiting("rte", 32, 1) == 1.0
    assert 1 < expected.waiting("rte", 32, 2) < expected.waiting("rte", 32, 8) < expected.waiting("rte", 4, 8) < 2
    rte, cola = RECIPES["roberta_base_rte"], RECIPES["deberta_v2_xxlarge_cola"]
    assert rte.evaluated == (80 + 1) * 277 and rte.steps == 800
    assert cola.steps == 2680 and cola.evaluated == (134 + 1) * 1043
    assert RECIPES["roberta_base_mnli"].evaluated == 30 * 9815 + 9815 + 9832
    for recipe in RECIPES.values():
        held = {backend: [recipe.held(backend, n) for n in (1, 2, 4)] for backend in expected.ENGINES}
        assert held["DDP"][0] == held["DDP"][2]
        assert all(held[backend] == sorted(held[backend], reverse=True) for backend in expected.ENGINES)
        assert held["ZeRO-2"][0] - held["ZeRO-2"][2] == 12 * recipe.trained * 3 / 4
    # an R-Drop step runs its examples twice: twice the products, but for none more
    mnli, rdrop = RECIPES["deberta_v2_xxlarge_mnli"], RECIPES["mnli.rdrop"]
    assert rdrop.micro(8) == pytest.approx(2 * mnli.micro(8)) and rdrop.micro(8, False) == mnli.micro(8, False)
    assert rdrop.activations(40) == 2 * mnli.activations(40)


def test_the_worked_example_and_the_sentences_figures_are_the_programs():
    text, rte = re.sub(r"\s+", " ", DOC), RECIPES["roberta_base_rte"]
    training, evaluation = rte.run()
    rate = next(row["rate"] for row in expected.cpu_rates(False) if row["tokens"] == 2048)
    last, all_of_it = rte.model.operations(0, 1), rte.model.frozen + rte.trained - rte.added
    threads = {p["x"]: p["seconds"]["median"] for p in expected.measured("scaling")["threads"]}
    xxlarge = RECIPES["deberta_v2_xxlarge_mnli"]
    for sentence in (
        f"x {rte.tokens:.1f} tokens = {2490 * 80 * rte.tokens / 1e6:.1f} million tokens",
        f"{rte.model.operations(1, 0) / 1e6:.0f} million, and each example {last / 1e6:.0f} million",
        f"in the last layer: {training / 1e15:.2f} PFLOP. Evaluation on 277 examples 81 times: {evaluation / 1e15:.2f}",
        f"batch of 32 has {32 * rte.tokens:,.0f} tokens; the measured step of 2,048 reached {rate / 1e9:.0f} GFLOP/s",
        f"= {round(rte.cpu_seconds(2), -2):,.0f} s, or {rte.cpu_seconds(2) / 3600:.1f} hours",
        f"4 x {rte.model.frozen:,} + 16 x {rte.trained:,} bytes = {rte.held('DDP', 1) / 1e9:.2f} GB",
        f"59 x 12 x 768 x 2,246 = {rte.activations(rte.tokens) / 1e9:.1f} GB",
        f"Batch: {expected.kept_bytes():.0f} bytes a token, layer and hidden unit",
        f"one core takes {threads[1] / threads[2]:.2f} times as long",
        f"xxlarge's fp32 weights are {4 * xxlarge.model.frozen / 1e9:.1f} GB",
        f"eight of xxlarge take {8 * 4 * xxlarge.model.frozen / 1e9:.0f} GB",
        f"{2 * xxlarge.model.layers * xxlarge.model.matrices / 1e9:.1f} GB of xxlarge (not on a CPU",
        f"16 bytes for every parameter: {16 * all_of_it / 1e9:.1f} GB for RoBERTa-base",
    ):  # fmt: skip
        assert sentence in text, sentence
