"""Checks and hashes of tensors, wherever they came from: a model, a checkpoint, an adapter."""

import hashlib

import torch
from torch import Tensor


def is_loaded(parameter: Tensor) -> bool:
    """Whether `from_pretrained` found a parameter in the checkpoint."""
    return getattr(parameter, "_is_hf_initialized", False)


def is_same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same shape and, in y's dtype, the same numbers."""
    return x.shape == y.shape and not x.is_meta and not y.is_meta and torch.equal(x.to(y), y)


def fingerprint(state: dict[str, Tensor]) -> str:
    """A hash of tensors with their names, dtypes and shapes; the format of their file doesn't matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that contain NaN, infinity or numbers too large for fp32."""
    numbers = ((name, x.float() if x.is_floating_point() else x) for name, x in state.items())
    return [name for name, x in numbers if not x.sum().isfinite() and not x.isfinite().all()]  # the sum alone is faster
