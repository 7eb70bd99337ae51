"""Tables cached as Arrow files that are memory-mapped and end in the SHA-256 of what precedes it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

from lora_nlu.errors import UserError
from lora_nlu.files import atomic_write, sha256_of

_DIGEST_BYTES = 32


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
    """The table of a file that `batches()` parses, and the SHA-256 of the file, whose table is cached.

    settings: what else decides the table; cached: `cached_table` without key and batches. Raises UserError.
    """
    digest = sha256_of(path)

    def batches_of_this_file() -> Iterator[pa.RecordBatch]:
        yield from batches()
        if sha256_of(path) != digest:
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
            file.write(bytes.fromhex(sha256_of(partial)))


def _is_intact(path: Path) -> bool:
    if not path.is_file() or (size := path.stat().st_size - _DIGEST_BYTES) <= 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        return file.read() == bytes.fromhex(sha256_of(path, size))


def record_batches(rows: Iterable[Any], types: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """Batches of 1,000 rows, each a sequence of its fields; types: of the columns, in the order of the fields."""
    rows = iter(rows)
    while some := [*islice(rows, 1_000)]:
        columns = zip(*some, strict=True)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, names=[*types])
