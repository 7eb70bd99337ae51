"""Files of adapters that ask for more than they contain: refused before memory is taken for it."""

import io
import json
import multiprocessing
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from adapters.small_models import ALPHA, copied, lora_model, published, refused, trained
from helpers import tiny_config
from torch import Tensor

from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

LAYER = "roberta.encoder.layer.{}.attention.self.query"


def growth(path: Path, pipe) -> None:
    """Send the message with which a file is refused, "" if it is not, and by how many MiB the process grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = ""
    try:
        adapter = read_adapter(str(path))
        adapter.check_values()
    except UserError as e:
        message = str(e)
    pipe.send((message, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def read_apart(path: Path) -> tuple[str, float]:
    """What `growth` sends from a process of its own."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=growth, args=(path, send))
    process.start()
    send.close()
    answer = receive.recv()
    process.join()
    return answer


def repeating(count: int, rows: int, columns: int) -> dict[str, Tensor]:
    """LoRA matrices of stride 0, each from a number of its own."""
    state = {}
    for i in range(count):
        state[f"{LAYER.format(i)}.lora_A"] = torch.ones(1).expand(rows, columns)
        state[f"{LAYER.format(i)}.lora_B"] = torch.ones(1).expand(columns, rows)
    return state


def sharing(count: int, size: int) -> dict[str, Tensor]:
    """LoRA matrices that overlap in one storage."""
    numbers = torch.ones(size * 8 + 2 * count)
    state = {}
    for i in range(count):
        state[f"{LAYER.format(i)}.lora_A"] = numbers[i:].as_strided((8, size), (size, 1))
        state[f"{LAYER.format(i)}.lora_B"] = numbers[i:].as_strided((size, 8), (8, 1))
    return state


ASKING = {
    "a stride of 0, 1.6 TB": repeating(1, 8, 2**36),
    "many of 256 MB": repeating(12, 8, 2**23),
    "many of 30 MB": repeating(100, 8, 2**20),
    "a shared storage": sharing(400, 2**14),
    "halves": {name: tensor.half() for name, tensor in repeating(40, 8, 4).items()} | repeating(20, 8, 2**22),
}


@pytest.mark.parametrize("what", ASKING)
def test_tensors_that_are_larger_than_their_file_are_refused_before_they_are_copied(what, tmp_path):
    path = tmp_path / "hostile.bin"
    if what == "halves":
        torch.save({n: t.half() if t.stride(0) else t for n, t in ASKING[what].items()}, path)
    else:
        published(path, ASKING[what])
    message, mebibytes = read_apart(path)
    assert "the file contains fewer numbers" in message and message.startswith(str(path))
    assert mebibytes < 64


class Large:
    """Pickled as a call of bytearray, which torch.load allows."""

    def __reduce__(self):
        return bytearray, (2_000_000_000,)


@pytest.mark.parametrize("as_archive", [True, False])
def test_a_call_that_takes_memory_is_refused_before_it_is_made(as_archive, tmp_path):
    path = tmp_path / "hostile.bin"
    torch.save({"weight": Large()}, path, _use_new_zipfile_serialization=as_archive)
    message, mebibytes = read_apart(path)
    assert message == f"{path}: refused: it calls bytearray, which takes memory that no tensor of it needs."
    assert mebibytes < 64


def test_tied_weights_and_views_of_one_storage_are_read(tmp_path):
    state = trained(lora_model())
    flat, views, place = torch.cat([tensor.reshape(-1) for tensor in state.values()]), {}, 0
    for name, tensor in state.items():
        views[name] = flat[place : place + tensor.numel()].view(tensor.shape)
        place += tensor.numel()
    adapter = read_adapter(str(published(tmp_path / "views.bin", views)))
    assert all(torch.equal(adapter.state[name], tensor) for name, tensor in state.items())
    tied = {
        "lm_head.decoder.weight": torch.randn(100, 32),
        **{n: t.clone() for n, t in lora_model().state_dict().items()},
    }
    tied["lm_head.twin.weight"] = tied["lm_head.decoder.weight"]
    assert read_adapter(str(published(tmp_path / "tied.bin", tied))).base_weights


def test_an_archive_whose_entries_overlap_is_refused_before_they_are_read(tmp_path):
    path = tmp_path / "overlap.bin"
    published(path, trained(lora_model()))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        start = archive.start_dir
    largest = max(entries, key=lambda entry: entry.file_size)
    place = start
    for entry in entries:  # the directory: every tensor is the largest one's bytes
        name, extra, comment = struct.unpack("<HHH", content[place + 28 : place + 34])
        if "/data/" in entry.filename:
            struct.pack_into("<III", content, place + 16, largest.CRC, largest.compress_size, largest.file_size)
            struct.pack_into("<I", content, place + 42, largest.header_offset)
        place += 46 + name + extra + comment
    path.write_bytes(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert sum(entry.file_size for entry in archive.infolist()) > len(content)
    message, mebibytes = read_apart(path)
    assert message and mebibytes < 64


def test_a_compressed_archive_is_refused(tmp_path):
    path = published(tmp_path / "right.bin", repeating(1, 8, 8))
    bomb = tmp_path / "bomb.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(2**28) if name.endswith("/data/0") else old.read(name))
    assert bomb.stat().st_size < 2**20
    message, mebibytes = read_apart(bomb)
    assert "damaged" in message and mebibytes < 64


@pytest.mark.parametrize("header", [2**63 - 1, 2**40, 100_000_001, 2**20])
def test_a_safetensors_header_longer_than_the_file_is_refused(header, tmp_path):
    save_adapter(lora_model(), tmp_path, {})
    path = tmp_path / ADAPTER_WEIGHTS
    path.write_bytes(struct.pack("<Q", header) + path.read_bytes()[8:])
    message, mebibytes = read_apart(tmp_path)
    assert ADAPTER_WEIGHTS in message and mebibytes < 64


def test_pickles_of_nested_or_huge_values_are_refused(tmp_path):
    tuples: tuple = ()
    for _ in range(60):
        tuples = (tuples, tuples)
    values = [tuples, {"a": tuples}, "x" * 10_000_000, {"x" * 10_000_000: torch.ones(1)}]
    for number, value in enumerate(values):
        path = tmp_path / f"{number}.bin"
        torch.save(value, path)
        message, mebibytes = read_apart(path)
        assert str(path) in message and len(message) < 500 and mebibytes < 128


def test_base_weights_of_other_shapes_are_refused_before_they_are_compared(tmp_path):
    model = lora_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = f"{LAYER.format(0)}.weight"
    state[name] = torch.ones(3000, 1, 1)
    base = RobertaForSequenceClassification(tiny_config())
    with pytest.raises(UserError, match=rf"{name} is \[3000, 1, 1\] in the file, \[32, 32\] in the model"):
        attach_adapter(base, read_adapter(str(published(tmp_path / "c.bin", state))), ALPHA, allow_new_head=False)


# --------------------------------------------------------------------------------------------------------------- JSON


@pytest.fixture
def folder(tmp_path):
    save_adapter(lora_model(), tmp_path / "right", {"task": "custom", "labels": ["a", "b", "c"]})
    copied(tmp_path / "right", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, RUN_METADATA])
@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ('"seed": 1' + "0" * 400, "an integer of 401 digits"),
        ('"seed": 1' + "0" * 5000, "an integer of 5001 digits"),
        ('"peft_type": "LORA", "peft_type": "IA3"', "'peft_type' occurs twice|peft_type occurs twice"),
        ('"a": {"b": 1, "b": 2}', "the name b occurs twice"),
        ('"a": ' + "[" * 100_000 + "]" * 100_000, "can't be read"),
        ('"a": "' + "x" * 2**24 + '"', "at most 16,777,216 are read"),
    ],
    ids=["400 digits", "5,000 digits", "twice", "twice inside", "deep", "huge"],
)
def test_json_that_is_ambiguous_or_huge_is_refused_naming_the_file(name, more, problem, folder, capsys):
    path = folder / name
    path.write_text(path.read_text().rstrip().removesuffix("}").rstrip() + f", {more}}}")
    message = refused(folder)
    assert name in message
    if name == RUN_METADATA and "peft_type" in more:
        assert "occurs twice" in message
    else:
        assert any(text in message for text in problem.split("|")), message
    assert main(["inspect", str(folder)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("depth", range(900, 1000, 5))
def test_json_nested_almost_too_deeply_is_read_or_refused_without_a_traceback(depth, folder):
    path = folder / ADAPTER_CONFIG
    path.write_text(path.read_text().rstrip().removesuffix("}") + ', "task_type": ' + "[" * depth + "]" * depth + "}")
    config = path.read_text().replace('"task_type": "SEQ_CLS",', "")
    path.write_text(config)
    try:
        read_adapter(str(folder))
    except UserError as e:
        assert str(folder) in str(e)


def test_metrics_of_any_size_are_printed(folder, capsys):
    metadata = json.loads((folder / RUN_METADATA).read_text())
    metrics = {
        "eval_loss": 10**28,
        "eval_a": -(10**28),
        "eval_b": float("nan"),
        "eval_c": float("inf"),
        "eval_d": 1e300,
    }
    (folder / RUN_METADATA).write_text(json.dumps(metadata | {"metrics": metrics, "seed": 10**28}))
    assert main(["inspect", str(folder)]) == 0
    assert "1000000" in capsys.readouterr().out


def test_a_pickle_that_runs_code_is_never_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "old.bin").write_bytes(pickle.dumps({"a": Planted()}))
    torch.save({"a": Planted()}, tmp_path / "new.bin")
    for name in ("old.bin", "new.bin"):
        assert "refused" in refused(tmp_path / name)
    assert not (tmp_path / "ran").exists()
