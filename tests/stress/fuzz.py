"""Damage small adapter files and read them: a refusal or the right tensors, never anything else.

    OMP_NUM_THREADS=1 nice python tests/stress/fuzz.py --mutations 100000 [--seed 0] [--keep DIR] [--formats zip,legacy]

Formats, in turn: `zip` (what torch.save writes: a zip archive with a CRC-32 of each entry), `repacked zip` (the pickle
inside or the list of entries is damaged, and packed again with right checksums), `legacy` (torch.save before 1.6:
pickles and raw storages, no checksum), `safetensors` (in an adapter folder as PEFT writes it; no checksum), `run` (the
same in a folder of ours, whose metadata has a hash of the tensors), and that folder's `adapter_config.json` and
`run_metadata.json`.
Each case is read by `read_adapter` and, where that succeeds, `load_adapter` into a tiny model.

Half of the damages are random bytes (all of those of `zip`). The other half keep the form and change what it holds: a
value, a name or an order in JSON (that of safetensors' header too, with the right length before it), an instruction or
its argument in a pickle, an entry of an archive, with the right checksums.

    refused   a UserError of three lines at most that names the file; the model is as it was
    same      every tensor is bit-equal to the original: the damage was in padding or in what isn't read
    changed   right names and shapes, other values. Allowed only where nothing in the format could tell.
    UNSEEN    the same for `zip` and `run`, whose checksums do tell
    anything else (another exception, no memory, a message that is no good, a model changed by a refusal, a crash, a
    read of over 2 s of computing) is a failure; exit code 1 if there are any, or any UNSEEN

Cases run in a forked process under a limit of 256 MiB more memory than it starts with; if it dies, the next case goes
on in a new one. Case N of a seed and a format is always the same, but for the addresses that `legacy` has as names of
its storages; --keep writes the first file of each kind of failure.
"""

import argparse
import io
import json
import math
import mmap
import os
import pickletools
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
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

FORMATS = ("zip", "repacked zip", "legacy", "safetensors", "run", ADAPTER_CONFIG, RUN_METADATA)
SECONDS, MEMORY = 2, 2**28  # of computing, of more memory
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
    if kind in ("safetensors", "run", ADAPTER_CONFIG, RUN_METADATA):
        save_adapter(model, folder, {"task": "custom", "labels": ["a", "b", "c"]})
        if kind == "safetensors":
            (folder / RUN_METADATA).unlink()
        return folder, folder / (kind if kind.endswith(".json") else ADAPTER_WEIGHTS), state
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


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**29, 10**400, 0.5, -0.0, 1e308, math.inf, math.nan,
    "", " ", "query", "../../etc/passwd", "\0", "\x1b[31m", "a\nb", "\ud800", "(a+)+$", "([a-z.0-9]+)+!", ".*",
    "(?<=a)b", "(a)\\1", "[", "x" * 10_000, "LORA", "F64", "BF16", "U8", "float8", [], {}, [[]], [None], [0], [-1],
    [2**40, 2**40], [1] * 1000, {"a": 1}, {"": {}}, {"([a-z.0-9]+)+!": 4}, {"query": 2**40}, [["query"]] * 3,
    ["query", "query"],
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every list or dict in a JSON value with every index or key."""
    inner = [*enumerate(value)] if isinstance(value, list) else [*value.items()] if isinstance(value, dict) else []
    return [place for key, item in inner for place in [(value, key), *places(item)]]


def change_json(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One to three changes of values, names or order in JSON; sometimes a name twice, or lists in lists in lists."""
    value, done = json.loads(content), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, key = rng.choice(places(value) or [([value], 0)])
        other, other_key = rng.choice(places(value) or [([value], 0)])
        kind = rng.choice(("set", "set", "set", "delete", "rename", "swap", "copy", "text"))
        new = rng.choice(VALUES)
        if kind == "delete":
            del at[key]
        elif kind == "rename" and isinstance(at, dict):
            at[rng.choice((str(new)[:200], f"{key}x", str(key).upper(), str(other_key)))] = at.pop(key)
        elif kind == "swap":
            at[key], other[other_key] = other[other_key], at[key]
        elif kind == "copy":
            at[key] = json.loads(json.dumps(other[other_key], default=str)) if not cyclic(other[other_key]) else None
        elif kind == "text" and isinstance(at[key], str):
            at[key] = damage(at[key].encode(errors="replace"), rng)[0].decode(errors="replace")
        else:
            at[key] = json.loads(json.dumps(new))
        if cyclic(value):
            return change_json(content, rng)
        done.append(f"{kind} {str(key)[:40]!r}")
    text = json.dumps(value)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + ", " + text[1:]
        done.append("every name twice")
    if rng.random() < 0.02:
        text = "[" * 100_000
        done.append("100,000 lists")
    return text.encode(), "; ".join(done)


def cyclic(value: Any) -> bool:
    try:
        json.dumps(value)
    except ValueError:
        return True
    return False


def change_header(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Safetensors with a changed header and its right length."""
    size = struct.unpack("<Q", content[:8])[0]
    header, what = change_json(content[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size :], f"header: {what}"


def change_pickle(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A pickle with one to three instructions left out, repeated, swapped, or with another argument."""
    starts = [place for _, _, place in pickletools.genops(content)]
    parts = [content[one:two] for one, two in zip(starts, [*starts[1:], len(content)], strict=True)]
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        one, two = rng.randrange(len(parts)), rng.randrange(len(parts))
        kind = rng.choice(("argument", "argument", "argument", "delete", "repeat", "swap", "copy"))
        if kind == "argument":
            parts[one] = argument(parts[one], rng)
        elif kind == "swap":
            parts[one], parts[two] = parts[two], parts[one]
        else:
            new = {"delete": b"", "repeat": parts[one] * rng.choice((2, 100)), "copy": parts[two]}[kind]
            parts[one] = new
        done.append(f"{kind} at {one}")
    return b"".join(parts), f"pickle: {'; '.join(done)}"


def argument(part: bytes, rng: random.Random) -> bytes:
    """An instruction of a pickle with another number, text or name."""
    code, number = part[:1], rng.choice(LENGTHS)
    if not part:
        return part
    if code in b"KMJ":
        new = {b"K": "<B", b"M": "<H", b"J": "<i"}[code]
        size = 8 * struct.calcsize(new)
        return code + (number % 2**size).to_bytes(size // 8, "little")
    if code == b"X":
        names = (b"cpu", b"cuda", b"meta", b"0", b"", b"x" * 5000, damage(part[5:], rng)[0])
        text = rng.choice(names)
        return code + struct.pack("<I", len(text)) + text
    if code == b"c":
        names = ("torch FloatStorage", "torch DoubleStorage", "torch._utils _rebuild_tensor_v2", "builtins bytearray")
        names += (
            "collections OrderedDict",
            "os system",
            "torch._utils _rebuild_parameter",
            "numpy ndarray",
            "builtins eval",
        )
        return b"c" + rng.choice(names).replace(" ", "\n").encode() + b"\n"
    if len(part) == 1:
        return bytes([rng.choice(b"K0)]}(tRQusbhqjN\x88\x89\x85\x86\x87.")]) + b"\x01" * rng.randint(0, 1)
    return code + damage(part[1:], rng)[0]


def change_legacy(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file of before torch 1.6 with one of its five pickles changed."""
    file, ends = io.BytesIO(content), [0]
    for _ in range(5):
        for _ in pickletools.genops(file):
            pass
        ends.append(file.tell())
    number = rng.randrange(5)
    changed, what = change_pickle(content[ends[number] : ends[number + 1]], rng)
    return content[: ends[number]] + changed + content[ends[number + 1] :], f"{number}: {what}"


def change_archive(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """An archive packed again with right checksums, its pickle changed (at random or by instruction) or its entries."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    if change := rng.choice((damage, damage, damage, change_pickle, change_pickle, None)):
        changed = {name: change(entry, rng) for name, entry in entries if name.endswith("/data.pkl")}
        entries = [(name, changed[name][0] if name in changed else entry) for name, entry in entries]
        what = "; ".join(what for _, what in changed.values())
    else:
        one, two = rng.randrange(len(entries)), rng.randrange(len(entries))
        what = rng.choice(("delete", "twice", "rename", "cut", "lengthen"))
        name, entry = entries[one]
        if what == "delete":
            del entries[one]
        elif what == "twice":
            entries.append((name, entries[two][1]))
        elif what == "rename":
            entries[one] = (
                rng.choice((entries[two][0], f"../{name}", f"/{name}", name.upper(), name + "x", "a\n")),
                entry,
            )
        else:
            size = rng.choice(LENGTHS[:12])
            entries[one] = (name, entry[:size] if what == "cut" else entry + bytes(size))
        what = f"entry {one}: {what}"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as new:
        for name, entry in entries:
            new.writestr(zipfile.ZipInfo(name), entry)
    return packed.getvalue(), what


def mutant(kind: str, content: bytes, rng: random.Random) -> tuple[bytes, str]:
    if kind == "repacked zip":
        return change_archive(content, rng)
    if kind == "zip" or rng.random() < 0.5:
        return damage(content, rng)
    change = {"legacy": change_legacy, ADAPTER_CONFIG: change_json, RUN_METADATA: change_json}
    return change.get(kind, change_header)(content, rng)


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
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)  # ends the process, in C as well
    with os.fdopen(tell, "w", buffering=1) as out:
        for case in range(first, count):
            bytes_, what = mutant(kind, content, random.Random(f"{seed} {kind} {case}"))
            file.write_bytes(bytes_)
            shared[:8] = struct.pack("<Q", case)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(60)
            outcome = reader.outcome()
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
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
        is_slow = code in (-signal.SIGALRM, -signal.SIGPROF)
        outcome = f"a read of over {SECONDS} s" if is_slow else f"a crash (exit code {code})"
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
        (keep / name).write_bytes(content)


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
