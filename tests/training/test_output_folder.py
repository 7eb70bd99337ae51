"""An output folder: the lock of the run that trains into it, what of it a new start may take up."""

import fcntl
import json
import os
from errno import EBADF, ENOLCK
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_nlu.errors import UserError
from lora_nlu.training.output_folder import check_output_dir, locked, recorded, remaining


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
            assert [*tmp_path.iterdir()] == [tmp_path / "_lock"]
        assert not [*tmp_path.iterdir()] and capsys.readouterr().out == ""


def test_somebodys_file_under_the_name_of_the_lock_stays(tmp_path):
    (tmp_path / "_lock").write_text("a key")
    with locked(tmp_path), pytest.raises(UserError, match="or evaluates"), locked(tmp_path):
        pass
    assert (tmp_path / "_lock").read_text() == "a key"


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
            (tmp_path / "_lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(UserError, match="another run"), locked(tmp_path):
            pass


def test_what_a_killed_run_left_is_locked_again_and_is_no_content(tmp_path):
    (tmp_path / "_lock").touch()
    check_output_dir(str(tmp_path), overwrite=False)
    with locked(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_no_file_elsewhere_is_made_or_removed_for_a_lock(kind, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "_lock").symlink_to(tmp_path / "other") if kind == "link" else (output / "_lock").mkdir()
    with pytest.raises(UserError, match=r"_lock: can't be locked .* Remove it"), locked(output):
        pass
    assert not (tmp_path / "other").exists() and os.path.lexists(output / "_lock")


def checkpoint(path: Path) -> Path:
    """As little of a complete checkpoint of a full model as counts for one."""
    path.mkdir(parents=True)
    state = json.dumps({"global_step": int(path.name.removeprefix("checkpoint-"))})
    (path / "trainer_state.json").write_text(state)
    (path / "files.json").write_text(json.dumps({"trainer_state.json": len(state)}))
    return path


def start(folder: Path, resume: object) -> Any:
    args = SimpleNamespace(
        output_dir=str(folder), resume_from_checkpoint=resume and str(resume), metric_for_best_model=0
    )
    return SimpleNamespace(args=args, metadata={"hyperparameters": {"seed": 0}}, check_backend=lambda checkpoint: None)


def test_a_run_does_not_start_afresh_among_the_checkpoints_of_another(tmp_path):
    """The highest steps would be kept and resumed, which are the earlier run's."""
    left = checkpoint(tmp_path / "checkpoint-9")
    (tmp_path / "run.json").write_text(json.dumps({"hyperparameters": {"seed": 0}}))
    assert remaining(start(tmp_path, None))[0] == str(left)
    with pytest.raises(UserError, match="checkpoint-9 is there, of an earlier run"):
        remaining(start(tmp_path, "false"))


def test_a_checkpoint_is_compared_with_the_run_or_refused(tmp_path):
    """A full model's has no record of its run in it; the folder that it is in may have."""
    other = checkpoint(tmp_path / "other" / "checkpoint-5")
    with pytest.raises(UserError, match="no run.json is beside it"):
        remaining(start(tmp_path / "o", other))
    for seed in (1, 0):
        (tmp_path / "other" / "run.json").write_text(json.dumps({"hyperparameters": {"seed": seed}}))
        if seed:
            with pytest.raises(UserError, match="other settings: seed 1, now 0"):
                remaining(start(tmp_path / "o", other))
    assert remaining(start(tmp_path / "o", other))[0] == str(other)


def test_what_a_record_of_a_run_contains_is_printed_as_text_and_cut(tmp_path):
    checkpoint(tmp_path / "checkpoint-9")
    text = "\x1b[2J\nforged: " + "x" * 100_000
    (tmp_path / "run.json").write_text(json.dumps({"task": text, "hyperparameters": {"seed": text, "\n": 1}}))
    with pytest.raises(UserError, match="contains a run with other settings") as error:
        remaining(start(tmp_path, None))
    lines = str(error.value).split("\n")
    assert len(lines) == 2 and len(lines[0]) < 4000 and all(map(str.isprintable, lines))


@pytest.mark.parametrize("run", [{"hyperparameters": []}, {"method": 5}, {"labels": "yes"}])
def test_a_record_with_a_value_of_another_type_is_refused_by_name(tmp_path, run):
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match=rf"run\.json: {next(iter(run))} is .*; expected"):
        recorded(tmp_path)
