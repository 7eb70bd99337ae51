"""Files appear complete or not at all; folders of runs are found; incomplete JSON is refused by name."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from lora_nlu.errors import UserError
from lora_nlu.files import atomic_write, flush_and_rename, folders_containing, read_json, write_json, write_text


def touch(start: Path, *names: str) -> None:
    for name in names:
        (start / name).parent.mkdir(parents=True, exist_ok=True)
        (start / name).touch()


# ------------------------------------------------------------------------------------------------------------- writing


def test_what_is_written_reads_back_and_nothing_else_is_left(tmp_path):
    write_text(tmp_path / "a.txt", "± 1\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc2\xb1 1\n"
    write_json(tmp_path / "b.json", {"figure": 0.5, "name": "±"})
    assert read_json(tmp_path / "b.json") == {"figure": 0.5, "name": "±"}
    assert (tmp_path / "b.json").read_text().endswith("\n}\n")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.json"]


def fails(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_earlier_file_as_it_was_and_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "run.json"
    write_json(path, {"trained": True})
    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"trained": False})
    assert json.loads(path.read_text()) == {"trained": True} and os.listdir(tmp_path) == ["run.json"]


def test_a_value_that_json_cannot_represent_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "run.json", {"path": tmp_path})
    assert not os.listdir(tmp_path)


def test_a_folder_and_all_its_files_are_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    touch(tmp_path / "partial", "a", "below/b")
    expected = {path.stat().st_ino for path in (tmp_path / "partial", *(tmp_path / "partial").rglob("*"))}
    synced, rename = set(), os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))

    def checked(old, new):
        assert synced == expected
        rename(old, new)
        synced.clear()

    monkeypatch.setattr(os, "replace", checked)
    flush_and_rename(tmp_path / "partial", tmp_path / "final")
    assert synced == {tmp_path.stat().st_ino}  # the new name too
    assert os.listdir(tmp_path) == ["final"] and (tmp_path / "final" / "below" / "b").is_file()


def test_a_published_file_takes_the_place_of_the_one_before(tmp_path):
    (tmp_path / "final").write_text("old")
    (tmp_path / "partial").write_text("new")
    flush_and_rename(tmp_path / "partial", tmp_path / "final")
    assert os.listdir(tmp_path) == ["final"] and (tmp_path / "final").read_text() == "new"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),  # as a write raises it, without a path
        OSError(28, "No space left on device", "/x/.lora_nlu-1.partial/a.bin", None, "/x/a.bin"),
        RuntimeError("[enforce fail at inline_container.cc:672] . No space left on device"),
        RuntimeError("basic_ios::clear: iostream error, No space left on device"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_an_error_of_writing_names_the_file_whoever_raises_it(tmp_path, error):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a.bin"):
        raise error
    assert caught.value.filename == str(tmp_path / "a.bin") and "No space left" in caught.value.strerror
    assert str(caught.value).endswith(f"'{tmp_path / 'a.bin'}'") and not os.listdir(tmp_path)


def test_another_error_while_writing_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes differ"), atomic_write(tmp_path / "deep" / "a.bin"):
        raise RuntimeError("shapes differ")
    assert not os.listdir(tmp_path / "deep")


def test_a_write_follows_no_link_that_waits_under_the_name_or_a_temporary_name(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    for name in ("run.json", ".run.json.partial"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    write_json(tmp_path / "run" / "run.json", {"trained": True})
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "run" / "run.json").is_symlink()
    assert read_json(tmp_path / "run" / "run.json") == {"trained": True}


def write_many(path: Path, content: list[int]) -> None:
    for _ in range(300):
        write_json(path, {"content": content})


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    contents = [[number] * 5000 for number in range(4)]
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_many, args=(tmp_path / "run.json", content)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not (tmp_path / "run.json").exists() or read_json(tmp_path / "run.json")["content"] in contents
    assert [writer.exitcode for writer in writers] == [0] * 4 and os.listdir(tmp_path) == ["run.json"]


def test_what_a_killed_process_left_is_removed_after_a_day_and_what_another_is_writing_now_stays(tmp_path):
    for days in (0, 2):
        folder = tmp_path / f".lora_nlu-{days}.partial"
        touch(folder, "run.json")
        os.utime(folder, (time.time() - days * 86400,) * 2)
    touch(tmp_path / ".lora_nlu-x.partial.txt", "run.json")
    write_text(tmp_path / "a.txt", "a")
    assert sorted(os.listdir(tmp_path)) == [".lora_nlu-0.partial", ".lora_nlu-x.partial.txt", "a.txt"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a.txt", "a")
    with atomic_write(tmp_path / "folder") as partial:
        partial.mkdir()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask()


def umask() -> int:
    before = os.umask(0o022)
    os.umask(before)
    return before


# ------------------------------------------------------------------------------------------------------------- finding


def test_folders_are_found_at_any_depth_the_start_among_them_in_order(tmp_path):
    touch(tmp_path, "run.json", "b/run.json", "a/deep/er/run.json", "a/run.json/other", "c/run.json.txt")
    found = [tmp_path, tmp_path / "a" / "deep" / "er", tmp_path / "b"]
    assert folders_containing("run.json", tmp_path) == (found, [])


def test_checkpoints_and_hidden_folders_are_not_looked_into_unless_one_is_the_start(tmp_path):
    touch(
        tmp_path,
        "a/run.json",
        "a/checkpoint-10/run.json",
        "a/.saving/x/run.json",
        ".cache/run.json",
        "checkpoints/run.json",
    )
    assert folders_containing("run.json", tmp_path)[0] == [tmp_path / "a", tmp_path / "checkpoints"]
    assert folders_containing("run.json", tmp_path / "a" / "checkpoint-10")[0] == [tmp_path / "a" / "checkpoint-10"]


def test_links_to_folders_are_followed_at_the_start_only(tmp_path):
    touch(tmp_path, "there/run.json", "here/x")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    assert folders_containing("run.json", tmp_path / "here")[0] == []
    assert folders_containing("run.json", tmp_path / "here" / "link")[0] == [tmp_path / "here" / "link"]


@pytest.mark.parametrize("name", ["gone", "file"])
def test_a_start_that_is_no_folder_is_refused(tmp_path, name):
    touch(tmp_path, "file")
    with pytest.raises(UserError, match=f"{name}: no such folder. Give an output folder of run_glue.py"):
        folders_containing("run.json", tmp_path / name)


def test_a_folder_that_can_not_be_listed_is_named_and_an_error_if_it_is_the_start(tmp_path, monkeypatch):
    touch(tmp_path, "a/run.json", "b/run.json")
    scan = os.scandir

    def scandir(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found, notes = folders_containing("run.json", tmp_path)
    assert found == [tmp_path / "a"] and notes == [f"left out: {tmp_path}/b: can't be read (Permission denied)."]
    with pytest.raises(PermissionError, match="Permission denied.*b"):
        folders_containing("run.json", tmp_path / "b")


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("content", "expected_message"),
    [
        (b'{"a": ', "can't be read"),
        (b"", "can't be read"),
        (b"\xff\xfe", "can't be read"),
        (b"[" * 200_000, "can't be read"),  # deeper than Python's stack
        (b"[1, 2]", "contains a JSON list; expected an object."),
        (b"null", "contains a JSON NoneType; expected an object."),
    ],
    ids=["cut", "empty", "not UTF-8", "too deep", "list", "null"],
)
def test_json_that_is_no_complete_object_is_refused_and_the_file_named(tmp_path, content, expected_message):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: {expected_message}")


def test_a_file_that_is_not_there_is_refused_naming_it(tmp_path):
    with pytest.raises(UserError, match="gone.json: can't be read .*No such file"):
        read_json(tmp_path / "gone.json")
