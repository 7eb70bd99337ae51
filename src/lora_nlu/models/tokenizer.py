"""The tokenizer of a checkpoint, and a fingerprint of what it does."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils.hub import cached_file

from lora_nlu.errors import UserError, first_line, printable
from lora_nlu.files import weights_file_problem
from lora_nlu.models.loading import longest_input

# Mixed case, accents, punctuation, blanks, numbers: where tokenizers of one vocabulary differ
_PROBE = "Ünïcode, CamelCase & naïve; ÉCOLE? don't  stop: 3.14% of «Straße» #tag @user it's-all_well… (yes!)"


def _keep_files(tokenizer: Any) -> None:
    """Let a tokenizer written in Python save the vocabulary files that it read.

    BertweetTokenizer's own method drops a column of the merges: loaded again, it would give other tokens.
    """
    kinds = {name: getattr(tokenizer, kind, None) for kind, name in tokenizer.vocab_files_names.items()}
    contents = {name: Path(path).read_bytes() for name, path in kinds.items() if path and Path(path).is_file()}

    def save_vocabulary(folder: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        paths = {Path(folder, f"{filename_prefix}-" * bool(filename_prefix) + name): name for name in contents}
        for path, name in paths.items():
            path.write_bytes(contents[name])
        return tuple(map(str, paths))

    tokenizer.save_vocabulary = save_vocabulary


def _check_names(pairs: list[tuple[str, Any]]) -> None:
    """Raise ValueError for a name in a JSON object that the tokenizers library would print as it is."""
    for name, _ in pairs:
        if not name.isprintable():
            raise ValueError(f"the name {printable(name)}")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the tokens by id and of the ids of a pair of texts: tens of ms for 128k tokens."""
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    words = " ".join(tokens[:: max(1, len(tokens) // 64)])  # a small vocabulary may have no word of the probe
    read = tokenizer(f"{_PROBE} {words}", words.title(), verbose=False)["input_ids"]
    return hashlib.sha256("\n".join([*tokens, str(read)]).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def check_tokenizer(source: str, metadata: dict[str, Any], fingerprint: str, remedy: str) -> None:
    """Raise UserError if the run of `metadata` was trained with another tokenizer; older metadata records none."""
    if (trained := metadata.get("tokenizer_fingerprint", fingerprint)) != fingerprint:
        raise UserError(
            f"{source}: was trained with another tokenizer (fingerprint {printable(trained)}; this one has "
            f"{fingerprint}): it would read other words.\n{remedy}"
        )


def load_tokenizer(name: str, config: Any, **hub: Any) -> tuple[Any, list[str]]:
    """The tokenizer of a folder or Hub id, set for a model of `config`; and notes for the log.

    Whatever its files set, it pads and truncates on the right, up to the model's limit. Raises UserError if there is
    none, if it has more tokens than the model, or no token to pad with.
    """
    try:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if found := cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub):
                json.loads(Path(found).read_text(encoding="utf-8"), object_pairs_hook=_check_names)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
        is_empty = len(tokenizer) <= len(set(tokenizer.all_special_ids))
    except Exception as e:  # transformers raises errors of many kinds for missing or damaged files
        for path in sorted(Path(name).glob("*.model")):  # SentencePiece's
            if text := weights_file_problem(path, "tokens"):
                raise UserError(f"{path}: {text}") from e
        if "trust_remote_code" in str(e):
            raise UserError(
                f"{name}: its tokenizer_config.json has an auto_map, which asks to run code of the checkpoint; that is "
                "refused.\nGive --tokenizer_name."
            ) from e
        kind = f"{type(e).__name__}: " if isinstance(e, KeyError) else ""  # whose text is a name alone
        raise UserError(
            f"No tokenizer in {name} that can be read ({kind}{first_line(e)}). Give --tokenizer_name."
        ) from e
    if is_empty:  # transformers makes one up where the files are missing
        raise UserError(f"No tokenizer in {name} (it has no vocabulary). Give --tokenizer_name.")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"The tokenizer of {name} has {len(tokenizer)} tokens, the model only {config.vocab_size}.")
    if tokenizer.pad_token_id is None:
        raise UserError(f"The tokenizer of {name} has no padding token: set pad_token in its tokenizer_config.json.")
    names, notes = tokenizer.model_input_names, []
    if "token_type_ids" in names and config.type_vocab_size == 1:
        names = [input_name for input_name in names if input_name != "token_type_ids"]
        notes.append(f"{name}: token_type_ids are left out: the model has only one token type.")
    tokenizer.model_input_names = names if "attention_mask" in names else [*names, "attention_mask"]
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = int(min(longest_input(config), VERY_LARGE_INTEGER))
    if not tokenizer.is_fast:
        _keep_files(tokenizer)
        logging.getLogger("transformers.tokenization_python").setLevel(logging.ERROR)  # a warning for each pair it cuts
        if getattr(tokenizer, "normalization", False) and tokenizer.demojizer is None:
            notes.append(f"{name}: emojis are not converted to words; that needs: pip install emoji==0.6.0")
    return tokenizer, notes
