"""A library that another user can have put into the cache of compiled kernels is never loaded: that would run it."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lora_nlu.ops import compiling

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++: nothing is compiled")
PLANTED = """#include <fcntl.h>
__attribute__((constructor)) static void run() { creat("%s", 0600); }
extern "C" int answer() { return 666; }"""
OF_ANOTHER = [
    "a folder of another user",
    "a library of another user",
    "a folder of a group with another user's library",
]
OF_ANOTHER = OF_ANOTHER if os.geteuid() == 0 else []


@pytest.mark.parametrize(
    "kind",
    ["a folder that is a link", "a library that all may write to", "a library that is a link", *OF_ANOTHER],
)  # fmt: skip
def test_a_planted_library_does_not_run(kind, tmp_path, monkeypatch, caplog):
    ran, folder, elsewhere = tmp_path / "ran", tmp_path / "lora_nlu", tmp_path / "elsewhere"
    (tmp_path / "source.cpp").write_text('extern "C" int answer() { return 42; }')
    (tmp_path / "planted.cpp").write_text(PLANTED % ran)
    monkeypatch.setattr(compiling, "SOURCE", tmp_path / "source.cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiling.compiled()
    (library,) = folder.iterdir()
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "planted.cpp"), "-o", str(library)], check=True)
    with library.open("ab") as file:
        file.write(file.tell().to_bytes(8, "little"))
    accused = folder if kind.startswith("a folder") else library
    if "link" in kind:
        accused.rename(elsewhere)
        accused.symlink_to(elsewhere)
    elif "another" in kind:
        os.chown(library if "library" in kind else folder, 12345, 12345)
        folder.chmod(0o770 if "group" in kind else 0o700)
    else:
        accused.chmod(0o777)
    assert ctypes.CDLL(str(compiling.compiled())).answer() == 42 and not ran.exists()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{accused}: not used: a link, another user's, or others may write to it.")
    if kind == "a library that all may write to":  # what was planted would have run
        accused.chmod(0o700)
        assert ctypes.CDLL(str(compiling.compiled())).answer() == 666 and ran.exists()


@pytest.mark.parametrize("mode", [0o775, 0o777])
def test_a_folder_that_others_may_write_to_is_taken_from_them_and_its_libraries_are_not_used(
    mode, tmp_path, monkeypatch, caplog
):
    """As an earlier version left it under umask 002; refused for ever, the kernels would be compiled at every start."""
    folder = tmp_path / "lora_nlu"
    (tmp_path / "source.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(compiling, "SOURCE", tmp_path / "source.cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiling.compiled()
    (library,) = folder.iterdir()
    (folder / "kernels-0.so").write_text("of an earlier version")
    (folder / "notes.txt").write_text("not a library")
    compiled_first = library.stat().st_mtime_ns
    folder.chmod(mode)
    for _ in range(2):
        assert ctypes.CDLL(str(compiling.compiled())).answer() == 42
        assert {*folder.iterdir()} == {library, folder / "notes.txt"} and folder.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mtime_ns != compiled_first and not caplog.records


def test_what_belongs_to_another_user_is_refused(tmp_path, monkeypatch):
    compiling._check_own(tmp_path, tmp_path.lstat())
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="another user's"):
        compiling._check_own(tmp_path, tmp_path.lstat())


def test_the_library_that_was_checked_is_the_one_that_is_loaded(tmp_path, monkeypatch):
    """Whoever can rename the cache's parent could put another file there between the two."""
    (tmp_path / "source.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(compiling, "SOURCE", tmp_path / "source.cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library: Path = compiling.compiled()
    (tmp_path / "lora_nlu").rename(tmp_path / "renamed")
    assert ctypes.CDLL(str(library)).answer() == 42
