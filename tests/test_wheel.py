"""The package as a wheel: what is in it, and that it works where only the wheel is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lora_nlu

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lora_nlu"


def run(*command: object, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build writes into the folder of its source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(PACKAGE, source / "src" / "lora_nlu", ignore=shutil.ignore_patterns("__pycache__"))
    wheels = tmp_path_factory.mktemp("wheels")
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source)
    (path,) = wheels.glob("*.whl")
    return path


def test_the_wheel_has_every_file_of_the_package(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.partition("/")[0].endswith(".dist-info")}
    files = {f"lora_nlu/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*") if path.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}
    assert {name.rpartition(".")[2] for name in packed} == {"py", "cpp", "typed"}


def test_every_folder_of_the_package_has_an_init_file():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_wheels_version_is_the_packages(wheel):
    assert wheel.name.split("-")[1] == lora_nlu.__version__


TRAINING_STEP = """
import torch
from transformers import RobertaConfig

import lora_nlu
from lora_nlu import RobertaForSequenceClassification, mark_trainable

torch.manual_seed(0)
sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
config = RobertaConfig(**sizes, max_position_embeddings=40, apply_lora=True, lora_r=4, lora_alpha=8)
model = RobertaForSequenceClassification(config).train()
mark_trainable(model)
ids, mask, labels = [[5, 6, 7], [8, 9, 1]], [[1, 1, 1], [1, 1, 0]], [0, 1]
loss = model(torch.tensor(ids), torch.tensor(mask), labels=torch.tensor(labels)).loss
loss.backward()
print(lora_nlu.__file__)
print(loss.item())
"""


def test_a_training_step_from_the_installed_wheel_compiles_the_kernels_and_has_the_same_loss(wheel, tmp_path):
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": "", "HF_HUB_OFFLINE": "1"}  # an empty cache of compiled kernels
    file, loss = run("-c", TRAINING_STEP, PYTHONPATH=str(tmp_path / "site"), **home).splitlines()
    assert Path(file) == tmp_path / "site" / "lora_nlu" / "__init__.py"
    if shutil.which("g++"):
        assert len([*(tmp_path / ".cache" / "lora_nlu").glob("kernels-*.so")]) == 1
    assert loss == run("-c", TRAINING_STEP, PYTHONPATH=str(ROOT / "src")).splitlines()[1]
    help_text = run("-m", "lora_nlu.adapters", "convert", "--help", PYTHONPATH=str(tmp_path / "site"))
    assert "merged" in help_text
