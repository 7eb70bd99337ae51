"""Tensors read safely from untrusted files: code in them is never run, damaged files are refused."""

import pickle
import zipfile
from errno import EINVAL
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_nlu.errors import UserError, is_out_of_memory, printable
from lora_nlu.files import weights_file_problem


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a `torch.save`d state dict, on the CPU; runs no code from the file."""
    try:
        if problem := weights_file_problem(path):
            raise UserError(f"{path}: {problem}")
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path}: refused: it is no PyTorch file, or contains more than tensors and could run code.\n"
            "Save the state dict alone: torch.save(model.state_dict(), path), or use safetensors."
        ) from e
    except UserError:
        raise
    except Exception as e:  # a damaged file makes torch raise errors of many types
        problem = "damaged or cut short"
        if is_out_of_memory(e):
            problem = "there is not enough memory to read it"
        elif isinstance(e, OSError) and e.errno not in (None, EINVAL):  # torch raises these two for an incomplete file
            problem = "can't be read"
        reason = printable(str(e).splitlines()[0] if str(e) else type(e).__name__, 150)
        raise UserError(f"{path}: {problem} ({reason}).") from e
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and isinstance(k, str) for k, t in state.items()):
        raise UserError(f"{path}: contains a {type(state).__name__} that is no state dict (names to tensors).")
    _check_tensors(path, state)
    return state


def _check_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Raise UserError unless the names are printable and the tensors are ordinary ones."""
    for name, tensor in state.items():
        if not name.isprintable() or len(name) > 500:
            raise UserError(f"{path}: {printable(name)} is not a valid tensor name.")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
            raise UserError(f"{path}: {name} is not an ordinary tensor (sparse, quantised, nested or without values).")
        if tensor.nbytes > max(tensor.untyped_storage().nbytes(), 2**28):  # a view that repeats a few numbers
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, but the file contains fewer numbers.")


def check_archive(path: Path) -> None:
    """Compare a zip archive, such as `torch.save` writes, with its checksums, which `torch.load` doesn't.

    Raises UserError if a byte differs. Files of the older format, and archives written without checksums, pass.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch stores uncompressed files. If the directory declares compression or a folder (attribute 0x10), torch
        # reads other bytes than those that the checksum covers.
        invalid = [e.filename for e in entries if e.compress_size != e.file_size or e.external_attr & 0x10]
        damaged = invalid[0] if invalid else None
        if damaged is None and any(entry.CRC for entry in entries):
            damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{path}: damaged: {printable(damaged)} in it is not what was saved (checksum or length).")
