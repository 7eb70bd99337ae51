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
OF_ANOTHER = ["a folder of another user", "a library of another user"] if os.geteuid() == 0 else []


@pytest.mark.parametrize(
    "kind",
    ["a folder that a group may write to", "a folder that all may write to", "a folder that is a link",
     "a library that all may write to", "a library that is a link", *OF_ANOTHER],
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
    accused = folder if "folder" in kind else library
    if "link" in kind:
        accused.rename(elsewhere)
        accused.symlink_to(elsewhere)
    elif "another" in kind:
        os.chown(accused, 12345, 12345)
    else:
        accused.chmod(0o770 if "group" in kind else 0o777)
    assert ctypes.CDLL(str(compiling.compiled())).answer() == 42 and not ran.exists()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{accused}: not used: a link, another user's, or others may write to it.")
    if kind == "a library that all may write to":  # what was planted would have run
        accused.chmod(0o700)
        assert ctypes.CDLL(str(compiling.compiled())).answer() == 666 and ran.exists()


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
