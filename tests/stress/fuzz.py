"""Damage small adapter files at random and read them: a refusal or the right tensors, never anything else.

    OMP_NUM_THREADS=1 nice python tests/stress/fuzz.py --mutations 100000 [--seed 0] [--keep DIR] [--formats zip,legacy]

Formats, in turn: `zip` (what torch.save writes: a zip archive with a CRC-32 of each entry), `pickle in zip` (the pickle
inside is damaged, and the archive packed again with right checksums), `legacy` (torch.save before 1.6: pickles and raw
storages, no checksum), `safetensors` (in an adapter folder as PEFT writes it; no checksum) and `run` (the same in a
folder of ours, whose metadata has a hash of the tensors). Each case is read by `read_adapter` and, where that succeeds,
`load_adapter` into a tiny model.

    refused   a UserError of three lines at most that names the file; the model is as it was
    same      every tensor is bit-equal to the original: the damage was in padding or in what isn't read
    changed   right names and shapes, other values. Allowed only where nothing in the format could tell.
    UNSEEN    the same for `zip` and `run`, whose checksums do tell
    anything else (another exception, no memory, a message that is no good, a model changed by a refusal, a crash, a
    hang of 10 s) is a failure; exit code 1 if there are any, or any UNSEEN

Cases run in a forked process under a limit of 2 GiB more memory than it starts with; if it dies, the next case goes on
in a new one. Case N of a seed and a format is always the same, but for the addresses that `legacy` has as names of its
storages; --keep writes the first file of each kind of failure.
"""

import argparse
import io
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import forked  # noqa: E402, F401
import torch  # noqa: E402
from helpers import randomise_, tiny_config  # noqa: E402

from lora_nlu.adapters.attaching import load_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

FORMATS = ("zip", "pickle in zip", "legacy", "safetensors", "run")
SECONDS, MEMORY = 10, 2**31
FINE = {"refused", "same", "changed"}
LENGTHS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)


def tiny_model(seed: int = 0) -> Any:
    """Hidden 8, 2 layers, LoRA of rank 2: most bytes of its files are structure, not values."""
    config = tiny_config(
        apply_lora=True, lora_r=2, lora_alpha=4, hidden_size=8, num_attention_heads=2, intermediate_size=8
    )
    model = randomise_(RobertaForSequenceClassification(config), seed)
    mark_only_lora_as_trainable(model)
    return model.eval()


def original(kind: str, folder: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Write the undamaged adapter: what `read_adapter` is given, the file to damage, and the right tensors."""
    model = tiny_model()
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("safetensors", "run"):
        save_adapter(model, folder, {"task": "custom", "labels": ["a", "b", "c"]})
        if kind == "safetensors":
            (folder / RUN_METADATA).unlink()
        return folder, folder / ADAPTER_WEIGHTS, state
    path = folder / "adapter.bin"
    torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    return path, path, state


# --------------------------------------------------------------------------------------------------------- mutations


def damage(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One to three random changes, and what they were."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not content:
            break
        content, what = rng.choice(CHANGES)(content, rng)
        done.append(what)
    return content, "; ".join(done)


def _place(content: bytes, rng: random.Random, size: int = 1) -> int:
    """Anywhere, or near either end, where headers are."""
    last = max(0, len(content) - size)
    near = min(last, 300)
    return rng.choice((rng.randint(0, last), rng.randint(0, last), rng.randint(0, near), last - rng.randint(0, near)))


def flip(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, bit = _place(content, rng), rng.randrange(8)
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :], f"bit {bit} of byte {at} flipped"


def overwrite(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, size = _place(content, rng), rng.choice((1, 1, 2, 4, 16))
    new = rng.choice((rng.randbytes(size), b"\0" * size, b"\xff" * size))
    return content[:at] + new + content[at + size :], f"bytes from {at} made {new.hex()}"


def length(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    form = rng.choice(("<H", "<I", "<I", "<Q"))
    size = struct.calcsize(form)
    at = rng.choice((0, _place(content, rng, size), _place(content, rng, size)))
    value = (rng.choice(LENGTHS) + rng.choice((-1, 0, 0, 1))) % 2 ** (8 * size)
    return content[:at] + struct.pack(form, value) + content[at + size :], f"number {value} ({form}) at {at}"


def digit(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A digit in text (offsets and shapes of safetensors, keys of storages) made another."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if not places:
        return flip(content, rng)
    at, new = rng.choice(places), rng.choice(b"0123456789-.eE")
    return content[:at] + bytes([new]) + content[at + 1 :], f"digit at {at} made {chr(new)}"


def truncate(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = _place(content, rng)
    return content[:at], f"cut to {at} bytes"


def insert(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, new = _place(content, rng), rng.randbytes(rng.choice((1, 2, 4, 64, 1000)))
    return content[:at] + new + content[at:], f"{len(new)} bytes inserted at {at}"


def delete(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, size = _place(content, rng), rng.choice((1, 2, 4, 64, 1000))
    return content[:at] + content[at + size :], f"{size} bytes deleted at {at}"


def swap(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    size = min(rng.choice((1, 4, 8, 64, 512)), len(content) // 2)
    one = rng.randint(0, len(content) - 2 * size)
    two = rng.randint(one + size, len(content) - size)
    parts = content[:one], content[two : two + size], content[one + size : two], content[one : one + size]
    return b"".join(parts) + content[two + size :], f"{size} bytes at {one} and {two} swapped"


def copy(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    size = min(rng.choice((1, 4, 8, 64, 512)), len(content))
    source, at = rng.randint(0, len(content) - size), _place(content, rng, size)
    return content[:at] + content[source : source + size] + content[at + size :], f"{size} bytes of {source} at {at}"


CHANGES = (flip, flip, flip, overwrite, overwrite, length, length, digit, truncate, insert, delete, swap, copy)


def mutant(kind: str, content: bytes, rng: random.Random) -> tuple[bytes, str]:
    if kind != "pickle in zip":
        return damage(content, rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(packed, "w") as new:
        what = ""
        for name in archive.namelist():
            entry = archive.read(name)
            if name.endswith("/data.pkl"):
                entry, what = damage(entry, rng)
            new.writestr(zipfile.ZipInfo(name), entry)
    return packed.getvalue(), f"data.pkl: {what}"


# ----------------------------------------------------------------------------------------------------------- reading


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bits(one) == bits(other)


class Reader:
    """Reads damaged files into one model, which it puts back after each."""

    def __init__(self, kind: str, source: Path, right: dict[str, torch.Tensor]) -> None:
        self.kind, self.source, self.right = kind, source, right
        self.model = tiny_model(seed=1)
        self.parameters = dict(self.model.named_parameters())
        self.before = {name: p.detach().clone() for name, p in self.parameters.items()}

    def untouched(self) -> bool:
        return all(equal(self.parameters[name], tensor) for name, tensor in self.before.items())

    def outcome(self) -> str:
        try:
            adapter = read_adapter(str(self.source))
            load_adapter(self.model, adapter, allow_new_head=False)
        except UserError as e:
            if not self.untouched():
                return "a refusal changed the model"
            message = str(e)
            if message.count("\n") > 2 or str(self.source) not in message:
                return "refused, by a message that names no file or has more than three lines"
            return "refused"
        except MemoryError:
            return "MemoryError"
        except Exception as e:
            return f"{type(e).__name__} ({_where(e)})"
        try:
            if adapter.state.keys() != self.right.keys():
                return "other names accepted"
            if any(adapter.state[name].shape != tensor.shape for name, tensor in self.right.items()):
                return "other shapes accepted"
            for name, tensor in adapter.state.items():
                if not equal(self.parameters[name], tensor.to(torch.float32)):
                    return "the model has other values than the file"
            if all(equal(adapter.state[name], tensor) for name, tensor in self.right.items()):
                return "same"
            return "UNSEEN" if self.kind in ("zip", "run") else "changed"
        finally:
            with torch.no_grad():
                for name in self.right:
                    self.parameters[name].copy_(self.before[name])


def _where(error: Exception) -> str:
    """Function and message, without numbers and names that come from the damaged bytes."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.name}"


def _work(kind: str, seed: int, first: int, count: int, folder: Path, shared: mmap.mmap, tell: int) -> None:
    """Cases first..count-1; the number under way stands in `shared`, what came of it goes to `tell` line by line."""
    warnings.simplefilter("ignore")
    source, file, right = original(kind, folder)
    undamaged = folder / "whole"
    if not undamaged.exists():  # a legacy file is another one in each process
        undamaged.write_bytes(file.read_bytes())
    content = undamaged.read_bytes()
    reader = Reader(kind, source, right)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, in C as well
    with os.fdopen(tell, "w", buffering=1) as out:
        for case in range(first, count):
            bytes_, what = mutant(kind, content, random.Random(f"{seed} {kind} {case}"))
            file.write_bytes(bytes_)
            shared[:8] = struct.pack("<Q", case)
            signal.alarm(SECONDS)
            outcome = reader.outcome()
            signal.alarm(0)
            if not reader.untouched():
                raise RuntimeError("the model can't be put back")
            out.write(json.dumps([case, outcome, what]) + "\n")
        shared[:8] = struct.pack("<Q", count)


def fuzz(kind: str, seed: int, count: int, folder: Path, keep: Path | None) -> tuple[Counter, dict[str, str]]:
    """How often each outcome came about, and the first case of each that isn't fine."""
    counts: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    shared = mmap.mmap(-1, 8)
    first = 0
    while first < count:
        shared[:8] = struct.pack("<Q", first)
        read, write = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            code = 70
            try:
                os.close(read)
                _work(kind, seed, first, count, folder, shared, write)
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read) as lines:
            for line in lines:
                case, outcome, what = json.loads(line)
                counts[outcome] += 1
                if outcome not in FINE and outcome not in firsts:
                    firsts[outcome] = f"case {case}: {what}"
                    _keep(kind, seed, case, outcome, folder, keep)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            break
        case = struct.unpack("<Q", shared[:8])[0]
        outcome = f"a hang of {SECONDS} s" if code == -signal.SIGALRM else f"a crash (exit code {code})"
        counts[outcome] += 1
        firsts.setdefault(outcome, f"case {case}: seed {seed}")
        _keep(kind, seed, case, outcome, folder, keep)
        first = case + 1
    return counts, firsts


def _keep(kind: str, seed: int, case: int, outcome: str, folder: Path, keep: Path | None) -> None:
    """Write the damaged file again for a person to look at."""
    if keep is not None:
        content, _ = mutant(kind, (folder / "whole").read_bytes(), random.Random(f"{seed} {kind} {case}"))
        keep.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in f"{kind} {outcome[:60]} {case}")
        (keep / f"{name}{'.safetensors' if kind == 'safetensors' else '.bin'}").write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--keep", type=Path, help="a folder for the first damaged file of each kind of failure")
    args = parser.parse_args()
    begun, bad, total, formats = time.monotonic(), 0, 0, args.formats.split(",")
    if unknown := {*formats} - {*FORMATS}:
        parser.error(f"--formats: no {', '.join(unknown)}; choose from {', '.join(FORMATS)}")
    with tempfile.TemporaryDirectory(prefix="lora-nlu-fuzz-") as work:
        for i, kind in enumerate(formats):
            count = (args.mutations + i) // len(formats)
            started = time.monotonic()
            counts, firsts = fuzz(kind, args.seed, count, Path(work, kind.replace(" ", "-")), args.keep)
            total += counts.total()
            bad += sum(n for outcome, n in counts.items() if outcome not in FINE)
            counted = ", ".join(f"{outcome} {n}" for outcome, n in counts.most_common())
            print(f"{kind}: {counts.total()} mutations: {counted}; {time.monotonic() - started:.0f} s", flush=True)
            for outcome, case in firsts.items():
                print(f"  {outcome}: {case}", flush=True)
    print(f"{total} mutations, {bad} failures, {time.monotonic() - begun:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
