"""Files of tensors read; checks and hashes of tensors, wherever they came from: a model, a checkpoint, an adapter."""

import hashlib
import mmap
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_nlu.errors import UserError, printable


def load_torch_file(path: Path, device: str = "cpu") -> Any:
    """The tensors and plain values that `torch.save` wrote; runs no code from the file. "meta": without the numbers.

    Raises UserError for a file that is damaged or asks for more memory than its size, and torch's errors.
    """
    _check_archive(path)
    content = torch.load(path, map_location=device, weights_only=True)
    size, bytes_in_file, seen, found = 0, path.stat().st_size, set(), [(path.name, content)]
    while found:
        name, value = found.pop()
        if isinstance(value, Tensor):
            size += value.numel() * value.element_size()
            if size > 4 * bytes_in_file:  # views may share numbers, as tied weights do, or repeat a few
                shape = list(value.shape)
                raise UserError(f"{path}: {printable(name)} has shape {shape}, but the file contains fewer numbers.")
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:  # one may be in another many times
            seen.add(id(value))
            found += value.items() if isinstance(value, dict) else [(name, item) for item in value]
    return content


def _check_archive(path: Path) -> None:
    """Compare a zip archive, such as `torch.save` writes, with its checksums, which `torch.load` doesn't.

    Raises UserError if a byte differs, or if the file calls `bytearray`, which `torch.load` allows and which takes any
    amount of memory. Files of the older format, and archives without checksums, are only searched for that.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray") >= 0:
            raise UserError(f"{path}: refused: it calls bytearray, which takes memory that no tensor of it needs.")
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch stores uncompressed files. If the directory declares compression or a folder (attribute 0x10), torch
        # reads other bytes than those that the checksum covers.
        invalid = [e.filename for e in entries if e.compress_size != e.file_size or e.external_attr & 0x10]
        if not invalid and sum(e.file_size for e in entries) > path.stat().st_size:
            raise UserError(f"{path}: refused: its entries overlap, so that they are more than the file.")
        damaged = invalid[0] if invalid else None
        if damaged is None and any(entry.CRC for entry in entries):
            damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{path}: damaged: {printable(damaged)} in it is not what was saved (checksum or length).")


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


def check_moments(optimizer: Any) -> None:
    """Raise ValueError where Adam's moments have other shapes than its parameters: a file has them by number."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps torch's
    is_adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)  # fused, it would write beyond the tensor
    for parameter, moments in optimizer.state.items() if is_adam else ():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.dim() and moment.shape != parameter.shape:
                raise ValueError(f"{name} is {list(moment.shape)} for a parameter {list(parameter.shape)}")
