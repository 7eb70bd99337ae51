"""docs/adding_a_method.md, followed word for word in a copy of the package."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from runs import SCRIPT, write_models
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()
# each run of run_glue.py, or of the converter, in one process
PROGRAM = """
import json, runpy, sys

for argv in json.loads(sys.argv[1]):
    sys.argv = argv
    module = argv[0] == "lora_nlu.adapters"
    try:
        runpy.run_module(argv[0], run_name="__main__") if module else runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (argv, end.code)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The sources with the page's file and row in them."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "src" / "lora_nlu", folder / "lora_nlu", ignore=shutil.ignore_patterns("__pycache__"))
    file, row = re.findall(r"^```(?:python|text)\n(.*?)^```", PAGE, re.M | re.S)
    methods = folder / "lora_nlu" / "methods"
    (methods / "rescaling.py").write_text(file)
    table = (methods / "table.py").read_text()
    last = '    Method("full", "fine-tuning"'
    assert table.count(last) == 1
    (methods / "table.py").write_text(table.replace(last, row + last))
    return folder


@pytest.fixture(scope="module")
def followed(package, glue, environment, tmp_path_factory) -> Path:
    """What the page's commands wrote for each model, in folders of the models' names."""
    folder = tmp_path_factory.mktemp("followed")
    commands = []
    for model, base in write_models(folder / "models", glue).items():
        names = {"roberta-base": base, "output/rescaling": folder / model / "run"}
        for line in PAGE.partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ").splitlines():
            words = line.replace("python -m", "python").split()[1:]
            for name, path in names.items():
                words = [word.replace(name, str(path)) for word in words]
            if "--task_name" in words:
                words[0] = str(SCRIPT)
                words += ["--glue_dir", str(glue), "--max_seq_length", "64", "--disable_tqdm", "true"]
                words += ["--num_train_epochs", "2", "--per_device_train_batch_size", "16"]
            commands.append(words)
    assert len(commands) == 2 * 3
    env = environment | {"PYTHONPATH": str(package)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{2 * 2 * 32} of them factors") == 2 * 2  # two projections of two layers, 32 wide
    return folder


@pytest.mark.parametrize("model", ["roberta", "deberta"])
def test_the_pages_method_trains_is_evaluated_again_and_merged(model, followed, glue):
    folder, base = followed / model, followed / "models" / model
    first, again = (json.loads((folder / name / "eval_results.json").read_text()) for name in ("run", "run_again"))
    assert first["eval_loss"] == again["eval_loss"] and first["eval_accuracy"] == again["eval_accuracy"]
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record["method"]["name"] == "rescaling"

    trained = load_file(folder / "run" / "adapter_model.safetensors")
    factors = [t for name, t in trained.items() if name.endswith(".factor")]
    assert len(factors) == 4 and all(t.abs().min() > 0 for t in factors)

    # the merged model in transformers' own class has the run's loss
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "run_merged").eval()
    rows = [line.split("\t")[1:] for line in (glue / "RTE" / "dev.tsv").read_text().splitlines()[1:]]
    texts = [[row[i] for row in rows] for i in (0, 1)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    batch = tokenizer(*texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    labels = torch.tensor([["entailment", "not_entailment"].index(row[2]) for row in rows])
    with torch.no_grad():
        loss = merged(**batch, labels=labels).loss.item()
    assert loss == pytest.approx(first["eval_loss"], rel=1e-5)
