"""Package metadata and dependencies, once; tool settings are in pyproject.toml, tested versions in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="lora-nlu",
    version="0.1.0",
    description="LoRA fine-tuning of RoBERTa and DeBERTa-V2 on GLUE, with the update written into the model",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"lora_nlu.ops": ["*.cpp"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.20,<6",
        "datasets>=4",
        "scikit-learn",
        "scipy",
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
        + ["parameterized"],  # transformers' own tests need it (tests/foreign)
    },
)
