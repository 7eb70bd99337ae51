"""Only files that a run or a checkpoint lists are ever removed; without a list, results that read as the program's."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_nlu.training.checkpoints import clear_leftovers
from lora_nlu.training.file_list import list_files, listed_files, remove_checkpoint, written_files

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "runs" / "roberta_lora"


def names(paths: list[Path] | None) -> list[str]:
    return sorted(path.name for path in paths or ())


def checkpoint(path: Path, *files: str) -> Path:
    """A checkpoint that lists these files."""
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    (path / "files.json").write_text(json.dumps(dict.fromkeys(files, 1)))
    return path


def test_a_list_grows_by_the_names_that_are_written(tmp_path):
    assert listed_files(tmp_path) is None and written_files(tmp_path) == []
    list_files(tmp_path)
    assert listed_files(tmp_path) == []
    list_files(tmp_path, "b", "a")
    list_files(tmp_path, "a", "c")
    assert listed_files(tmp_path) == written_files(tmp_path) == [tmp_path / name for name in "abc"]


@pytest.mark.parametrize("content", ["", "[", "5", "[5]", "null", "[" * 100_000])
def test_a_damaged_list_names_nothing(tmp_path, content):
    (tmp_path / "files.json").write_text(content)
    assert listed_files(tmp_path) is None


def test_a_list_names_nothing_outside_of_its_folder(tmp_path):
    folder, other = checkpoint(tmp_path / "checkpoint-5", "a", "below/b"), tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    (folder / "link").symlink_to(other)
    wrong = [
        "../other/thesis.txt",
        str(other / "thesis.txt"),
        "link/thesis.txt",
        "",
        ".",
        "..",
        "/",
        "a\0",
        "below/../a",
    ]
    (folder / "files.json").write_text(json.dumps([*wrong, "a", "below/b"]))
    assert listed_files(folder) == [folder / "a", folder / "below" / "b"]
    remove_checkpoint(folder)
    assert (other / "thesis.txt").read_text() == "mine" and [*folder.iterdir()] == [folder / "link"]


def test_the_results_of_a_run_of_an_older_version_are_found_by_name_and_content(tmp_path):
    folder = shutil.copytree(OLD_RUN, tmp_path / "run")
    own = {path.name for path in folder.iterdir() if path.is_file()} - {"run.json", "README.md"}
    (folder / "my_paper_results.json").write_text((folder / "eval_results.json").read_text())
    (folder / "predict_results_mine.tsv").write_text("my notes\n")
    (folder / "eval_mm_results.json").write_text('{"mine": 1}')
    assert {*names(written_files(folder))} == own
    list_files(folder, "eval_results.json")  # a later evaluation writes the list
    assert {*names(listed_files(folder))} == own
    (folder / "run.json").unlink()
    (folder / "files.json").unlink()
    assert written_files(folder) == []  # another program's folder


def test_a_checkpoint_is_removed_by_its_list_and_other_files_in_it_stay(tmp_path):
    remove_checkpoint(checkpoint(tmp_path / "checkpoint-1", "a", "below/deep/b"))
    assert not (tmp_path / "checkpoint-1").exists()
    path = checkpoint(tmp_path / "checkpoint-2", "a", "below/b")
    (path / "below" / "notes.txt").write_text("mine")
    remove_checkpoint(path)
    assert [p for p in path.rglob("*") if p.is_file()] == [path / "below" / "notes.txt"]


@pytest.mark.parametrize("kind", ["no list", "link", "damaged list"])
def test_what_is_no_checkpoint_of_a_run_is_not_removed(tmp_path, kind):
    path = tmp_path / "checkpoint-9000"
    checkpoint(tmp_path / "elsewhere" if kind == "link" else path, "model.bin")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "no list":
        (path / "files.json").unlink()
    else:
        (path / "files.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError):
        remove_checkpoint(path)
    assert sorted(tmp_path.rglob("*")) == before and (path / "model.bin").read_text() == "x"


def killed_after(left: Iterator[int], original: Callable[..., None]) -> Callable[..., None]:
    """The function, which raises KeyboardInterrupt once `left` has no more items."""

    def call(*args: Any, **kwargs: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    return call


@pytest.mark.parametrize("calls", range(5))
def test_a_removal_that_was_killed_is_completed_by_the_next_start(tmp_path, monkeypatch, calls):
    path, left = checkpoint(tmp_path / "checkpoint-5", "a", "b"), iter(range(calls))
    with monkeypatch.context() as patched:
        for name in ("unlink", "rmdir"):
            patched.setattr(Path, name, killed_after(left, getattr(Path, name)))
        if calls < 4:
            with pytest.raises(KeyboardInterrupt):
                remove_checkpoint(path)
            assert path.exists() and not (path / "files.json").exists()
        else:
            remove_checkpoint(path)
    checkpoint(tmp_path / "checkpoint-copy", "a")
    clear_leftovers(str(tmp_path))
    assert not path.exists() and (tmp_path / "checkpoint-copy" / "a").exists()
