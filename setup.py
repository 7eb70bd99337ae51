"""Package metadata and dependencies, once; tool settings are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).parent / "src" / "lora_nlu"

setup(
    name="lora-nlu",
    version=re.findall(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.M)[0],
    description="LoRA fine-tuning of RoBERTa and DeBERTa-V2 on GLUE, with the update written into the model",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"": ["*.cpp", "py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.17,<5.24",  # the tested range: private names of its Trainer are used
        "datasets>=4",
        "scikit-learn",
        "scipy>=1.12",
        "numpy",
        "accelerate>=1.1",
        "safetensors",
        "sentencepiece",  # the published DeBERTa tokenizers need both
        "protobuf",
    ],
    extras_require={
        "plots": ["matplotlib", "tensorboard"],
        "peft": ["peft"],  # a peer to test against, never imported by the package
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "peft", "matplotlib", "tensorboard"]
        + ["onnx", "onnxscript"]  # torch.onnx.export needs both
        + [
            "triton; platform_system == 'Linux' and platform_machine == 'x86_64'"
        ]  # its interpreter runs ops/packed_attention.py without a GPU
        + ["parameterized"],  # transformers' own tests need it (tests/foreign)
    },
)
