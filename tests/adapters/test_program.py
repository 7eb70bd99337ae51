"""python -m lora_nlu.adapters: what inspect prints, and what the documents show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conversions import ALPHA, CONFIGS, LABELS, R, inspected, run_program, trained_by
from helpers import CLASSIFIERS, assert_close, randomise_, tiny_config, tiny_deberta_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_nlu.adapters.adapter import LAYERS
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.methods.marking import mark_only_lora_as_trainable

ROOT = Path(__file__).parents[2]


def fresh_theirs(base: Path, labels: int) -> nn.Module:
    """transformers' RoBERTa of a folder with a head for as many labels."""
    return transformers.RobertaForSequenceClassification.from_pretrained(
        base, num_labels=labels, ignore_mismatched_sizes=True
    )


def test_inspect_prints_layers_rank_alpha_labels_base_metric_size_and_values_that_are_not_finite(
    case, tmp_path, capsys
):
    model, base, adapter = case
    code, out, _ = run_program(capsys, "inspect", adapter)
    table = dict(line.strip().split("  ", 1) for line in out.splitlines())
    table = {name: value.strip() for name, value in table.items()}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert code == 0 and table["layers with LoRA"] == "2" and table["modules with LoRA"] == "4: query, value"
    assert table["rank"] == "4" and table["alpha"] == "6"
    assert table["parameters"] == f"{count:,}, {lora:,} of them in the encoder" and table["not finite"] == "none"
    assert table["labels"] == "yes, no, perhaps" and table["base model"] == str(base) and table["accuracy"] == "0.8750"
    assert int(table["bytes"].replace(",", "")) == sum(path.stat().st_size for path in adapter.iterdir())
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    name = next(iter(state))
    torch.save(state | {name: state[name] * float("nan")}, tmp_path / "broken.bin")
    code, out, _ = run_program(capsys, "inspect", tmp_path / "broken.bin")
    assert code == 0 and f"1 tensors, {name} first" in out and "the file doesn't record it" in out


@pytest.mark.parametrize("to", ["peft", "bin", "merged"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_converted(to, value, case, tmp_path, capsys):
    _, base, adapter = case
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name][0, 1] = value
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    metadata = json.loads((adapter / "run_metadata.json").read_text())
    del metadata["weights_fingerprint"]  # an older folder has none
    (adapter / "run_metadata.json").write_text(json.dumps(metadata))
    code, _, err = run_program(capsys, "convert", adapter, tmp_path / "new", "--to", to)
    assert code == 1 and "not finite" in err and f"{name[17:-7]} first" in err and not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------- other models' adapters


def test_inspect_says_that_no_model_here_reads_another_models_adapter(other, capsys):
    name, folder = other
    said_of_it = inspected(capsys, folder)["model"]
    assert said_of_it.startswith(f"none here: no RoBERTa or DeBERTa-V2 has the layer {name}."), said_of_it


@pytest.mark.parametrize("to", ["peft", "bin", "merged"])
def test_another_models_adapter_is_not_converted(to, other, tmp_path, capsys):
    name, folder = other
    code, _, err = run_program(capsys, "convert", folder, tmp_path / "new", "--to", to)
    assert code == 1 and f"no RoBERTa or DeBERTa-V2 has the layer {name}." in err and not (tmp_path / "new").exists()


def test_a_published_file_of_a_bert_or_of_two_models_at_once_fits_no_model_here(tmp_path, capsys):
    place = "{}.encoder.layer.0.attention.self.{}.lora_{}"

    def file(path: Path, *layers: tuple[str, str]) -> Path:
        shapes = {"A": (R, 32), "B": (32, R)}
        torch.save({place.format(*layer, m): torch.ones(shapes[m]) for layer in layers for m in shapes}, path)
        return path

    bert = file(tmp_path / "bert.bin", ("bert", "query"), ("bert", "value"))
    both = file(tmp_path / "both.bin", ("roberta", "query"), ("bert", "value"))
    mixed = file(tmp_path / "mixed.bin", ("roberta", "query_proj"), ("roberta", "value_proj"))
    for path, layer in ((bert, "bert."), (both, "bert."), (mixed, "roberta.encoder.layer.0.attention.self.query_proj")):
        assert f"none here: no RoBERTa or DeBERTa-V2 has the layer {layer}" in inspected(capsys, path)["model"]
        for to in ("peft", "bin", "merged"):
            code, _, err = run_program(capsys, "convert", path, tmp_path / "new", "--to", to, "--lora_alpha", ALPHA)
            assert code == 1 and f"has the layer {layer}" in err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_deberta_config(), tiny_deberta_config(share_att_key=False, embedding_size=16)],
    ids=["roberta", "deberta", "deberta with more layers"],
)
def test_the_supported_layers_are_the_linear_layers_of_the_models_encoder(config):
    model = CLASSIFIERS[config.model_type][0](config)
    prefix = model.base_model_prefix
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{prefix}.")}
    assert len(linear) >= 12 and all(LAYERS[prefix].fullmatch(name) for name in linear)


def test_the_model_type_of_an_adapter_is_that_of_its_model(case, capsys):
    model, _, adapter = case
    names = {"roberta": "RoBERTa", "deberta-v2": "DeBERTa-V2"}
    assert inspected(capsys, adapter)["model"] == names[model.config.model_type]


# -------------------------------------------------------------------------------------------------- what inspect prints


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"head_only": True}, {"method": "head"}),
        ({"apply_bitfit": True}, {"method": "bitfit", "biases": None}),
        (
            {"apply_adapter": True, "adapter_type": "houlsby", "adapter_size": 5},
            {"method": "houlsby", "adapter size": "5", "layers with adapters": "2", "adapters": "4"},
        ),
        (
            {"apply_adapter": True, "adapter_type": "pfeiffer", "adapter_size": 3},
            {"method": "pfeiffer", "adapter size": "3", "layers with adapters": "2", "adapters": "2"},
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and "method" not in value else "",
)
def test_inspect_of_the_other_methods_counts_what_they_train(settings, rows, kind, tmp_path, capsys):
    model, folder = trained_by(tmp_path / "adapter", kind, **settings)
    got = inspected(capsys, folder)
    encoder = {n: p for n, p in model.base_model.named_parameters() if p.requires_grad}
    total, within = (sum(p.numel() for p in ps if p.requires_grad) for ps in (model.parameters(), encoder.values()))
    assert got["parameters"] == f"{total:,}, {within:,} of them in the encoder"
    assert "layers with LoRA" not in got and "alpha" not in got
    for name, value in rows.items():
        assert got[name] == (value or f"{within:,} in {len(encoder)} tensors")
    if rows["method"] != "bitfit":
        assert "biases" not in got


def test_conversion_of_a_deberta_without_lora_assumes_nothing_about_lora(tmp_path, capsys):
    _, folder = trained_by(tmp_path / "adapter", "deberta", apply_bitfit=True)
    code, out, err = run_program(capsys, "convert", folder, tmp_path / "peft", "--to", "peft")
    assert code == 0 and "relative query" not in out + err, out + err


def test_several_alphas_and_ranks_and_rslora_are_all_printed(tmp_path, capsys):
    settings = {
        "rank_pattern": {"value": 2},
        "alpha_pattern": {r"layer\.1\..*": 4.5},
        "use_rslora": True,
        "bias": "all",
    }
    lora = LoraConfig(task_type="SEQ_CLS", r=R, lora_alpha=ALPHA, target_modules=["query", "value"], **settings)
    get_peft_model(transformers.RobertaForSequenceClassification(tiny_config()), lora).save_pretrained(tmp_path)
    rows = inspected(capsys, tmp_path)
    assert (
        rows["alpha"] == "4.5, 6"
        and rows["rank"] == "2, 4"
        and rows["scaling"].endswith("(alpha / sqrt(rank), rslora)")
    )
    assert rows["layers with LoRA"] == "2" and rows["modules with LoRA"] == "4: query, value"
    assert rows["biases"].endswith("tensors")
    code, _, err = run_program(capsys, "convert", tmp_path, tmp_path / "lora.bin", "--to", "bin")
    assert code == 1 and "contains rslora; the published layout is LoRA's" in err


def test_layers_are_counted_apart_from_the_modules_in_them(tmp_path, capsys):
    """RoBERTa-base's published file: 12 layers, 24 modules, 48 matrices."""
    trained_by(tmp_path, apply_lora=True, lora_r=2, lora_alpha=4, num_hidden_layers=12)
    rows = inspected(capsys, tmp_path)
    assert rows["layers with LoRA"] == "12" and rows["modules with LoRA"] == "24: query, value"


HOSTILE = "\x1b[31mred\x07\n| a | b |\n---\n\u202e" + "x" * 1_000_000


@pytest.mark.parametrize("case", ["roberta"], indirect=True)
@pytest.mark.parametrize("where", ["task", "base_model", "base_fingerprint", "metrics", "base_model_name"])
def test_text_from_a_foreign_file_is_escaped_and_cut_before_it_is_printed(where, case, tmp_path, capsys):
    _, _, adapter = case
    if where == "base_model_name":
        (adapter / "run_metadata.json").unlink()
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": HOSTILE}))
    else:
        value = {"metrics": {HOSTILE: 10**20}}.get(where, HOSTILE)
        metadata = json.loads((adapter / "run_metadata.json").read_text())
        (adapter / "run_metadata.json").write_text(json.dumps(metadata | {where: value}))
    code, out, err = run_program(capsys, "inspect", adapter)
    printed = out + err
    assert code == 0 and len(printed) < 10_000 and all(c.isprintable() or c == "\n" for c in printed)
    assert run_program(capsys, "convert", adapter, tmp_path / "new", "--to", "peft")[0] == 0
    text = (tmp_path / "new" / "README.md").read_text()
    assert len(text) < 10_000 and all(c.isprintable() or c == "\n" for c in text)
    assert text.split("---\n")[1].count("\n") < 12, "it got into the card's header"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows), "it broke the card's table"


@pytest.mark.parametrize("case", ["roberta"], indirect=True)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", HOSTILE),
        ("init_lora_weights", HOSTILE),
        (HOSTILE, HOSTILE),
        ("bias", HOSTILE),
        ("lora_alpha", HOSTILE),
        ("target_modules", HOSTILE + "("),
        ("rank_pattern", {HOSTILE + "(": 2}),
        ("use_rslora", HOSTILE),
        ("layers_to_transform", HOSTILE),
        ("base_model_name_or_path", [HOSTILE]),
        ("task_type", "TOKEN_CLS" + HOSTILE),
    ],
    ids=lambda value: str(value)[:20].encode("unicode_escape").decode(),
)
def test_text_from_a_foreign_config_is_escaped_and_cut_in_the_error_message(key, value, case, capsys):
    _, _, adapter = case
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    code, _, err = run_program(capsys, "inspect", adapter)
    assert code == 1 and len(err) < 1000 and all(c.isprintable() or c == "\n" for c in err), err[:2000]
    assert err.strip().count("\n") < 3


SNIPPET = next(
    block for block in (ROOT / "docs" / "adapters.md").read_text().split("```python\n") if "read_adapter" in block
)


@pytest.mark.parametrize("case", ["roberta"], indirect=True)
@pytest.mark.parametrize("kind", ["folder", "bin", "regression"])
def test_the_python_of_the_page_on_adapters_is_right_for_a_folder_and_a_published_file(kind, case, tmp_path, capsys):
    model, base, adapter = case
    code, path = SNIPPET.split("```")[0], adapter
    if kind == "bin":
        path = tmp_path / "mnli.bin"
        assert run_program(capsys, "convert", adapter, path, "--to", "bin")[0] == 0
        line = next(line for line in code.splitlines() if line.startswith("# a published .bin records neither: "))
        said_there = line.partition(": ")[2].replace("), 16", f"), {ALPHA}").replace("mnli.bin", str(path))
        code = code.replace(line, said_there)
    elif kind == "regression":
        model = randomise_(
            CLASSIFIERS["roberta"][0](tiny_config(apply_lora=True, lora_r=R, lora_alpha=5, num_labels=1))
        )
        mark_only_lora_as_trainable(model)
        path = tmp_path / "scores"
        save_adapter(model, path, {"labels": []})
        encoder = {n: t for n, t in model.state_dict().items() if n.startswith("roberta.") and "lora_" not in n}
        theirs = transformers.RobertaForSequenceClassification(tiny_config())
        theirs.load_state_dict(encoder, strict=False)
        theirs.roberta.save_pretrained(base)
    assert '"roberta-base"' in code and '"output/roberta_base_rte"' in code
    names: dict = {}
    exec(code.replace('"output/roberta_base_rte"', f'"{path}"').replace('"roberta-base"', f'"{base}"'), names)
    with torch.no_grad():
        want = model.eval()(**names["batch"]).logits
        theirs = PeftModel.from_pretrained(fresh_theirs(base, want.shape[1]), str(path if kind != "bin" else adapter))
        assert_close(theirs.eval()(**names["batch"]).logits, want)
    assert torch.equal(names["logits"], want)
    labels = {"folder": LABELS, "bin": ["entailment", "neutral", "contradiction"]}.get(kind)
    assert capsys.readouterr().out.splitlines()[-1] == (labels[want.argmax()] if labels else str(names["logits"]))


@pytest.mark.parametrize("case", ["roberta"], indirect=True)  # the others are inspected in this process
def test_the_readmes_command_starts_the_program(case):
    command = [sys.executable, "-m", "lora_nlu.adapters", "inspect", str(case[2])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "layers with LoRA" in done.stdout, done.stderr
