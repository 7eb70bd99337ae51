"""The library of kernels.cpp: compiled once, kept in the user's cache, what is said where that fails."""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_nlu.ops import compiling

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no g++: nothing is compiled")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder that libraries are kept in, of a source that compiles in a moment."""
    (tmp_path / "source.cpp").write_text('extern "C" int answer() { return 42; }')
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(compiling, "SOURCE", tmp_path / "source.cpp")
    monkeypatch.setattr(compiling.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_nlu"


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Path:
    """g++ under a name of its own; a test may write another program over it."""
    path = tmp_path / "bin" / "g++"
    path.parent.mkdir()
    becomes(path, f'exec {COMPILER} "$@"')
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


def becomes(compiler: Path, script: str) -> None:
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)


def answer() -> int:
    return ctypes.CDLL(str(compiling.compiled())).answer()


def modified(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


def test_the_library_is_compiled_once_for_the_same_source_flags_and_compiler(cache, compiler, monkeypatch):
    assert answer() == 42
    first = modified(cache)
    assert answer() == 42 and modified(cache) == first and len(first) == 1
    monkeypatch.setattr(compiling, "FLAGS", [*compiling.FLAGS, "-g"])
    assert answer() == 42 and len(modified(cache)) == 2
    compiling.SOURCE.write_text('extern "C" int answer() { return 43; }')
    assert answer() == 43 and len(modified(cache)) == 3
    becomes(compiler, f'exec {COMPILER} -O1 "$@"')  # as after an upgrade
    assert answer() == 43 and len(modified(cache)) == 4 and first.items() <= modified(cache).items()


def test_without_a_compiler_the_library_in_the_cache_is_used(cache, monkeypatch, caplog):
    content = compiling.compiled().read_bytes()
    monkeypatch.setenv("PATH", str(cache))
    assert compiling.compiled().read_bytes() == content and not caplog.records
    monkeypatch.setattr(compiling, "FLAGS", [])
    with pytest.raises(RuntimeError, match="there is no g.*install it"):
        compiling.compiled()


def test_the_cache_is_where_the_environment_says_and_only_its_users(cache, tmp_path, monkeypatch):
    before = os.umask(0)
    try:
        for setting, folder in (
            (str(tmp_path / "cache"), cache),
            ("no/absolute/path", tmp_path / ".cache" / "lora_nlu"),
        ):
            monkeypatch.setenv("HOME", str(tmp_path))
            monkeypatch.setenv("XDG_CACHE_HOME", setting)
            compiling.compiled()
            (library,) = folder.iterdir()
            assert [oct(path.stat().st_mode & 0o777) for path in (folder, library)] == ["0o700", "0o700"]
    finally:
        os.umask(before)


@pytest.mark.parametrize("left", [0, 4, 5000, -1])
def test_a_library_cut_short_is_compiled_anew(cache, left):
    content = compiling.compiled().read_bytes()
    (path,) = cache.iterdir()
    path.write_bytes(content[:left])
    assert compiling.compiled().read_bytes() == content == path.read_bytes()


def test_the_folder_of_a_compilation_that_was_killed_is_removed_by_a_later_start(cache, compiler):
    becomes(compiler, "kill -9 $PPID")
    killed = subprocess.run(
        [sys.executable, "-c", "from lora_nlu.ops import compiling; compiling.compiled()"], cwd=cache.parents[1]
    )
    assert killed.returncode == -9
    (left,) = cache.iterdir()
    becomes(compiler, f'exec {COMPILER} "$@"')
    assert answer() == 42 and left.exists()  # another process may be compiling there
    os.utime(left, (time.time() - 7200,) * 2)
    assert answer() == 42 and not left.exists()


@pytest.mark.parametrize(
    ("script", "expected_message"),
    [
        (r"printf 'k.cpp: error: f\374r \033[31m\nand more\n' >&2; exit 1", "kernels.cpp: k.cpp: error: f.r .x1b.31m$"),
        ("exit 4", "compile kernels.cpp: exit code 4$"),
        ("sleep 9", "longer than 0.1 seconds"),
    ],
)  # fmt: skip
def test_a_compiler_that_fails_is_quoted_in_a_line_whatever_its_encoding(
    cache, compiler, monkeypatch, script, expected_message
):
    becomes(compiler, script)
    if "sleep" in script:
        monkeypatch.setattr(compiling, "_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=expected_message):
        compiling.compiled()
    assert not [*cache.iterdir()]


def test_a_full_disk_is_not_called_a_missing_compiler(cache, compiler, caplog):
    becomes(compiler, "echo as: it begins >&2; echo '/tmp/cc1.o: No space left on device' >&2; exit 1")
    with pytest.raises(OSError, match="/tmp/cc1.o: No space left on device"):
        compiling.compiled()
    assert "No space left on device. The kernels are compiled for this process alone" in caplog.text
    assert "install" not in caplog.text.lower() and not [*cache.iterdir()]


@pytest.mark.parametrize("kind", ["a file in its place", "full", "full at the linker's last write"])
def test_where_no_library_can_be_kept_one_is_compiled_for_the_process_alone(cache, compiler, tmp_path, caplog, kind):
    if kind == "full":
        becomes(
            compiler, f'case "$*" in *{cache}*) echo No space left on device >&2; exit 1; esac; exec {COMPILER} "$@"'
        )
    elif kind == "full at the linker's last write":
        becomes(compiler, f'{COMPILER} "$@"; for o; do :; done; case "$*" in *{cache}*) truncate -s -99 "$o"; esac')
    else:
        cache.parent.write_text("a file where a folder should be")
    assert answer() == 42
    (record,) = caplog.records
    assert str(cache.parent) in record.getMessage() and "XDG_CACHE_HOME" in record.getMessage()
    assert not [*(tmp_path / "temporary").iterdir()]


def test_a_user_without_a_home_folder_compiles_for_the_process_alone(cache, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without one
    assert answer() == 42
    (record,) = caplog.records
    assert record.getMessage().startswith("~/.cache/lora_nlu: there is no home folder. The kernels are compiled for")


def test_processes_that_compile_at_once_all_have_the_library(cache):
    code = f"""import ctypes; from lora_nlu.ops import compiling; from pathlib import Path
compiling.SOURCE = Path({str(compiling.SOURCE)!r}); assert ctypes.CDLL(str(compiling.compiled())).answer() == 42"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert [path.suffix for path in cache.iterdir()] == [".so"]
