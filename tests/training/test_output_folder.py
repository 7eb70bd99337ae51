"""An output folder: the lock of the run that trains into it."""

import fcntl
import os
from errno import EBADF, ENOLCK

import pytest

from lora_nlu.errors import UserError
from lora_nlu.training.output_folder import locked, prepare_output_dir


def flock_of_nfs(descriptor: int, operation: int, flock=fcntl.flock) -> None:
    """An exclusive lock needs a file that is open for writing: flock(2), NFS details."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(EBADF, os.strerror(EBADF))
    flock(descriptor, operation)


def test_a_folder_on_a_network_disk_is_locked_as_any_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    for _ in range(2):
        with locked(tmp_path):
            with pytest.raises(UserError, match="another run trains into it now"), locked(tmp_path):
                pass
            assert [*tmp_path.iterdir()] == [tmp_path / ".lock"]
        assert not [*tmp_path.iterdir()] and capsys.readouterr().out == ""


def test_a_disk_without_locks_is_named_in_a_line(tmp_path, monkeypatch, capsys):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path):
        assert capsys.readouterr().out == f"{tmp_path}: its disk has no locks (No locks available). " + (
            "Start no second run into it.\n"
        )
    assert not [*tmp_path.iterdir()]


def test_a_lock_that_another_run_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """The other run ends between this one's opening of the file and its lock."""
    calls = []

    def flock(descriptor: int, operation: int, flock=fcntl.flock) -> None:
        flock(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(UserError, match="another run"), locked(tmp_path):
            pass


def test_what_a_killed_run_left_is_locked_again_and_is_no_content(tmp_path):
    (tmp_path / ".lock").touch()
    prepare_output_dir(str(tmp_path), overwrite=False)
    with locked(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_no_file_elsewhere_is_made_or_removed_for_a_lock(kind, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / ".lock").symlink_to(tmp_path / "other") if kind == "link" else (output / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock: can't be locked .* Remove it"), locked(output):
        pass
    assert not (tmp_path / "other").exists() and os.path.lexists(output / ".lock")
