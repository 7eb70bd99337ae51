"""kernels.cpp compiled by g++ for this machine, once, and kept in the user's cache.

To load a library is to run it: none is loaded that another user can have written.
"""

import errno
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from pathlib import Path

from lora_nlu.errors import printable
from lora_nlu.files import atomic_write, remove_leftovers

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_FULL = re.compile("No space left on device|Disk quota exceeded")
_SECONDS = 300  # that a compilation may take
_SECONDS_LEFT = 3600  # after which the temporary folder of one that was killed is removed


def compiled() -> Path:
    """The library of kernels.cpp, open in this process: the one in the user's cache, else one for this process alone.

    Raises OSError if no folder can be written, RuntimeError if it can't be compiled.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (cache if cache.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "lora_nlu"
    try:
        if not folder.is_absolute():  # a user without an entry in /etc/passwd, as in containers, and without HOME
            raise FileNotFoundError(errno.ENOENT, "there is no home folder", str(folder))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _close_to_others(folder)
        return _compiled_in(folder)
    except OSError as e:
        logger.warning(
            "%s: %s. The kernels are compiled for this process alone, in seconds; XDG_CACHE_HOME=FOLDER keeps them "
            "in another folder.", e.filename, e.strerror
        )  # fmt: skip
        remove_leftovers(Path(tempfile.gettempdir()), older_than_s=_SECONDS_LEFT)
        with tempfile.TemporaryDirectory(".partial", ".lora_nlu-") as own:
            return _compiled_in(Path(own))


def _compiled_in(folder: Path) -> Path:
    """The library in a folder, compiled unless it is there; a compiler of another version compiles another.

    Raises OSError also for a folder or a library that another user can have written.
    """
    _check_own(folder, folder.lstat())
    remove_leftovers(folder, older_than_s=_SECONDS_LEFT)
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    cpu_flags = [line for line in cpu if line.startswith(("flags", "Features"))]
    start = f"kernels-{_digest(SOURCE.read_text(), *FLAGS, platform.machine(), *cpu_flags[:1])}-"
    if compiler := shutil.which("g++"):
        path, file = Path(compiler).resolve(), Path(compiler).stat()
        paths = [folder / f"{start}{_digest(path, file.st_size, file.st_mtime_ns)}.so"]
    else:
        paths = sorted(folder.glob(f"{start}*.so"))
    for path in paths:
        if library := _opened(path):
            return library
    if not compiler:
        raise RuntimeError("there is no g++; install it")
    with atomic_write(paths[0]) as partial:
        _compile(compiler, partial)
    if library := _opened(paths[0]):
        return library
    raise OSError(errno.EIO, "was written, but is not complete", str(paths[0]))


def _digest(*content: object) -> str:
    return hashlib.sha256("\n".join(map(str, content)).encode()).hexdigest()[:16]


def _close_to_others(folder: Path) -> None:
    """Take a folder of this user's that others may write to, as earlier versions made it under umask 002, from them.

    Its libraries, which they may have changed, are removed. A folder that contains others' files is left as it is.
    """
    status, user = folder.lstat(), os.geteuid()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == user and status.st_mode & 0o022:
        if all(path.lstat().st_uid == user for path in folder.iterdir()):
            folder.chmod(0o700)
            for library in folder.glob("kernels-*.so"):
                library.unlink()


def _check_own(path: Path, status: os.stat_result) -> None:
    """Raise PermissionError for a link, and for what another user can have written."""
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "not used: a link, another user's, or others may write to it", str(path))


def _opened(path: Path) -> Path | None:
    """A path to a library that this process has opened, which nobody can replace; None if it isn't there, complete."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    _check_own(path, os.fstat(descriptor))
    library = Path(f"/proc/self/fd/{descriptor}")
    content = library.read_bytes()
    is_complete = len(content) > 8 and content[-8:] == (len(content) - 8).to_bytes(8, "little")
    return library if is_complete else None


def _compile(compiler: str, library: Path) -> None:
    """Raises OSError for a full disk, RuntimeError for another failure, each with a line of the compiler's."""
    command = ["env", "LC_ALL=C", compiler, *FLAGS, str(SOURCE), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as e:
        raise RuntimeError(f"g++ took longer than {_SECONDS} seconds") from e
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        if full := [line for line in lines if _FULL.search(line)]:
            raise OSError(errno.ENOSPC, f"g++: {printable(full[0], 150)}")
        raise RuntimeError(f"g++ can't compile kernels.cpp: {printable(lines[0], 150)}")
    sections, size, count = struct.unpack_from("<Q10xHH", library.read_bytes(), 40)  # of the header: a table at the end
    if library.stat().st_size < sections + size * count:  # the linker exits with 0 if its last write fails
        raise OSError(errno.ENOSPC, "g++: its last write failed, as on a full disk")
    with library.open("ab") as file:  # it ends in its length: loading a truncated library would kill the process
        file.write(file.tell().to_bytes(8, "little"))
    library.chmod(0o700)  # whatever the umask
