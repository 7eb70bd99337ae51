"""Tables cached as Arrow files that are memory-mapped and end in a digest of what precedes it."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

from lora_nlu.errors import UserError
from lora_nlu.files import atomic_write

_DIGEST_BYTES = 32
_BLOCK_BYTES = 2**21


def key_digest(key: str) -> str:
    """32 hex digits that stand for `key` in file names and fingerprints of tables."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def cached_table(
    name: str,
    key: str,
    batches: Callable[[], Iterable[pa.RecordBatch]],
    cache_dir: str | None = None,
    overwrite: bool = False,
) -> Dataset:
    """The table that is cached under `name` and a digest of `key`; made of `batches()` if it is missing or damaged.

    cache_dir: None is the datasets library's; overwrite: make the table even if it is cached. Several processes may
    make it at once: each writes a file of its own and renames it.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "lora_nlu")
    digest = key_digest(key)
    path = folder / f"{name}-{digest}.arrow"
    if overwrite or not _is_intact(path):
        _write(path, batches())
    table = Dataset.from_file(str(path))
    table._fingerprint = digest
    return table


def cached_file(
    path: Path, settings: str, batches: Callable[[], Iterable[pa.RecordBatch]], cached: Callable[..., Dataset]
) -> tuple[Dataset, str]:
    """The table of a file that `batches()` parses, and a digest of the file, whose table is cached.

    settings: what else decides the table; cached: `cached_table` without key and batches. Raises UserError.
    """
    digest = _file_digest(path)

    def batches_of_this_file() -> Iterator[pa.RecordBatch]:
        yield from batches()
        if _file_digest(path) != digest:
            raise UserError(f"{path}: was changed while it was read. Start again.")

    return cached(f"{settings} {digest}", batches_of_this_file), digest


def _write(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with atomic_write(path) as partial:
        writer: pa.RecordBatchStreamWriter | None = None
        with partial.open("wb") as file:
            for batch in batches:
                writer = writer or pa.ipc.new_stream(file, batch.schema)
                writer.write_batch(batch)
            assert writer is not None  # every table has rows
            writer.close()
        with partial.open("ab") as file:
            file.write(bytes.fromhex(_file_digest(partial)))


def _is_intact(path: Path) -> bool:
    if not path.is_file() or (size := path.stat().st_size - _DIGEST_BYTES) <= 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        return file.read() == bytes.fromhex(_file_digest(path, size))


def _file_digest(path: Path, size: int | None = None) -> str:
    """The SHA-256 of the SHA-256s of a file's blocks, or of those of its first `size` bytes; several threads read."""
    size = path.stat().st_size if size is None else size
    with path.open("rb") as file, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:

        def of_block(start: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), min(_BLOCK_BYTES, size - start), start)).digest()

        return hashlib.sha256(b"".join(pool.map(of_block, range(0, size, _BLOCK_BYTES)))).hexdigest()


def record_batches(rows: Iterable[Any], types: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """Batches of 1,000 rows, each a sequence of its fields; types: of the columns, in the order of the fields."""
    rows = iter(rows)
    while some := [*islice(rows, 1_000)]:
        columns = zip(*some, strict=True)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, names=[*types])
