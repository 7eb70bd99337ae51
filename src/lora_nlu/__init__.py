"""LoRA fine-tuning of RoBERTa on GLUE: the update written into the model, real tokens only, adapter files as output."""

__version__ = "0.1.0"
