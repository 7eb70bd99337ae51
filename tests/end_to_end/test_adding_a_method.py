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
# each run of run_glue.py, or of the converter, in one process; a run is cut off in between
PROGRAM = """
import json, runpy, sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
from runs import cut_off

for argv in json.loads(sys.argv[1]):
    if argv[0] == "cut_off":
        cut_off(*map(Path, argv[1:]), 3)
        continue
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
    (methods / "lora_xs.py").write_text(file)
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
        names = {"roberta-base": base, "output/lora_xs": folder / model / "run"}
        for line in PAGE.partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ").splitlines():
            words = line.replace("python -m", "python").split()[1:]
            for name, path in names.items():
                words = [word.replace(name, str(path)) for word in words]
            if "--task_name" in words:
                words[0] = str(SCRIPT)
                words += ["--glue_dir", str(glue), "--max_seq_length", "64", "--disable_tqdm", "true"]
                words += ["--num_train_epochs", "2", "--per_device_train_batch_size", "16", "--save_steps", "3"]
            commands.append(words)
        trains = next(words for words in commands if "--do_train" in words and str(folder / model / "run") in words)
        resumed = str(folder / model / "run_resumed")  # after the third of its six steps
        commands += [["cut_off", str(folder / model / "run"), resumed], [*trains, "--output_dir", resumed]]
    assert len(commands) == 2 * 5
    env = environment | {"PYTHONPATH": str(package)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands), str(Path(__file__).parent)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{2 * 2 * 4 * 4} of them R") == 3 * 2  # two projections of two layers, of rank 4
    assert len(re.findall("checkpoint-3", done.stdout)) >= 2, done.stdout
    return folder


@pytest.mark.parametrize("model", ["roberta", "deberta"])
def test_the_pages_method_trains_is_evaluated_again_and_merged(model, followed, glue):
    folder, base = followed / model, followed / "models" / model
    first, again = (json.loads((folder / name / "eval_results.json").read_text()) for name in ("run", "run_again"))
    assert first["eval_loss"] == again["eval_loss"] and first["eval_accuracy"] == again["eval_accuracy"]
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record["method"]["name"] == "lora_xs" and record["method"]["xs_r"] == 4

    trained = load_file(folder / "run" / "adapter_model.safetensors")
    R = {name.removesuffix(".xs_R"): t for name, t in trained.items() if name.endswith(".xs_R")}
    assert len(R) == 4 and all(t.abs().max() > 1e-3 for t in R.values())  # from 1e-5
    assert not any("xs_A" in name or "xs_B" in name for name in trained)
    resumed = load_file(folder / "run_resumed" / "adapter_model.safetensors")
    assert resumed.keys() == trained.keys() and all(torch.equal(t, resumed[name]) for name, t in trained.items())

    # the merged weight is the paper's formula
    weights, merged_weights = (load_file(path / "model.safetensors") for path in (base, folder / "run_merged"))
    for name, own in R.items():
        key = f"{name.removeprefix('base_model.model.')}.weight"
        W, merged = weights[key].double(), merged_weights[key].double()
        U, S, V = torch.linalg.svd(W)
        signs = torch.diag(V[:4].sum(1).sign())
        expected = W + U[:, :4] @ torch.diag(S[:4]) @ signs @ own.double() @ signs @ V[:4]
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)

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
