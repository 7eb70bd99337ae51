"""Examples to token ids, cached on disk."""

import hashlib
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from datasets import Dataset
from datasets.utils import tqdm

from lora_nlu.data.cache import cached_table
from lora_nlu.data.examples import LABEL, Examples, column
from lora_nlu.data.texts import encode
from lora_nlu.errors import UserError

_LENGTH = "tokens_uncut"  # column of the cached tables: the number of tokens before truncation
_TYPES = {"input_ids": pa.int32()}  # of the ids; those of masks and token types fit a byte
_BATCH = 1_000


def tokenize(
    examples: Examples, tokenizer: Any, max_length: int, cache_dir: str | None = None, overwrite_cache: bool = False
) -> tuple[dict[str, Dataset], list[str]]:
    """Encode text to input_ids (and token_type_ids, attention_mask, label), truncated to `max_length`, unpadded.

    Returns the tables, and a line for each split of which examples were truncated. Cached in `cache_dir` (or the
    datasets library's cache) under a name made of text, tokenizer, its libraries' versions and length, as
    `cached_table` says. Raises UserError if most words are unknown to the tokenizer.
    """
    versions = f"{transformers.__version__} {tokenizers.__version__}"
    settings = f"{versions} {type(tokenizer).__name__} {tokenizer.truncation_side} {tokenizer.model_input_names}"
    identity = f"{settings} {_tokenizer_identity(tokenizer)} {max_length} {_LENGTH}"
    encoded, notes = {}, []
    for split, table in examples.splits.items():
        key = f"{table._fingerprint} {len(table)} {identity}"
        batches = partial(_encoded, table, tokenizer, max_length, split)
        tokens = cached_table(split, key, batches, cache_dir, overwrite_cache)
        lengths = tokens.data.column(_LENGTH).to_numpy()
        if count := int((lengths > max_length).sum()):
            note = f"{split}: {count} of {len(lengths)} examples are cut at --max_seq_length {max_length}"
            notes.append(f"{note}; the longest has {lengths.max()} tokens.")
        encoded[split] = tokens.remove_columns(_LENGTH)
    return encoded, notes


def _encoded(table: Dataset, tokenizer: Any, max_length: int, split: str) -> Iterator[pa.RecordBatch]:
    """The tokens of a table, in batches, with a progress bar on a terminal after five seconds."""
    _check_vocabulary(table, tokenizer, split)
    with tqdm(total=len(table), desc=f"Tokenising {split}", unit=" rows", delay=5, disable=None) as bar:
        for batch in table.iter(_BATCH):
            pairs = batch.get("text_pair")
            ids, lengths = encode(batch["text"], pairs, tokenizer, max_length)
            arrays = {name: pa.array(rows, pa.list_(_TYPES.get(name, pa.int8()))) for name, rows in ids.items()}
            if LABEL in batch:
                arrays[LABEL] = pa.array(batch[LABEL], table.features.arrow_schema.field(LABEL).type)
            yield pa.RecordBatch.from_pydict(arrays | {_LENGTH: pa.array(lengths, pa.int64())})
            bar.update(len(lengths))


def _tokenizer_identity(tokenizer: Any) -> str:
    """What decides the tokens: the JSON of a fast tokenizer, or the files that a tokenizer in Python saves."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # settings that earlier calls left behind
        tokenizer.backend_tokenizer.no_padding()
        return tokenizer.backend_tokenizer.to_str()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())]
    return f"{digests} emojis in words {getattr(tokenizer, 'demojizer', None) is not None}"


def _check_vocabulary(table: Dataset, tokenizer: Any, split: str) -> None:
    """A wrong tokenizer class for a vocabulary silently makes words unknown, drops or joins some. Raises UserError."""
    texts = [text[:200] for text in table[:100]["text"]]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    decoded_words = sum(len(tokenizer.decode(row, skip_special_tokens=True).split()) for row in ids)
    lost_words = sum(len(text.split()) for text in texts) - decoded_words
    if lost_words > max(10, decoded_words):
        raise UserError(
            f"Almost all words of the {split} examples are unknown to the tokenizer ({type(tokenizer).__name__}).\n"
            "Its files don't fit its class: set tokenizer_class in tokenizer_config.json, or give --tokenizer_name."
        )


def token_count(table: Dataset) -> int:
    """The number of tokens in a tokenised table, which has no padding."""
    return pc.sum(pc.list_value_length(column(table, "input_ids"))).as_py()


def digest(table: Dataset) -> str:
    """16 hex digits that identify a tokenised table: its input_ids, token_type_ids if present, and labels, in order.

    The same for every source and storage of the table; scores count as the float32 that the loss reads.
    """
    sha = hashlib.sha256()
    for name in (name for name in ("input_ids", "token_type_ids", LABEL) if name in table.column_names):
        chunks = column(table, name).chunks
        if name != LABEL:  # lists of ids: all ids, then the lengths
            chunks = [chunk.flatten() for chunk in chunks] + [chunk.value_lengths() for chunk in chunks]
        dtype = np.float32 if name == LABEL else np.int32
        sha.update(name.encode())
        for chunk in chunks:
            sha.update(np.ascontiguousarray(chunk.to_numpy(zero_copy_only=False), dtype=dtype).data)
    return sha.hexdigest()[:16]
