"""Atomic replacement of files in a directory: at any time either the old or the new ones, complete."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_SCRATCH = re.compile(r"\.fastlora-save-[0-9a-f]{32}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Errors of a system that cannot replace the directory, although it may be able to replace its files.
_NOT_AS_A_WHOLE = (errno.EACCES, errno.EBUSY, errno.EPERM, errno.EROFS, errno.EXDEV)


def replace_files(directory: Path, contents: Mapping[str, bytes], stale: Iterable[str] = ()) -> None:
    """Put files into a directory so that readers find either the old ones or the new ones, complete.

    The last of ``contents`` makes the others valid: a directory without it counts as empty, so it can be
    written last. If it is unchanged, as the configuration is in repeated saves, the others are renamed into
    place one by one. Otherwise all have to change at once: a new directory is filled, with hard links to the
    other files of the old one, and takes its place in one step. Where that is impossible (the directory is a
    mount point, or its parent is not writable), the last file is missing for a moment.

    Args:
        directory: created if it does not exist. contents: by name. stale: files that become obsolete.

    Raises:
        OSError: the files cannot be written; the previous contents are left unchanged.
    """
    directory.mkdir(parents=True, exist_ok=True)
    *others, last = contents
    old = directory / last
    with one_at_a_time(directory) as alone:
        if alone:
            _remove_scratch(directory)
        same = old.exists() and old.read_bytes() == contents[last]
        if old.exists() and not same:
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))
            if not os.path.ismount(directory):
                try:
                    _replace_directory(directory, contents, {*contents, *stale})
                    return
                except OSError as error:
                    if error.errno not in _NOT_AS_A_WHOLE:
                        raise
            _replace_one_by_one(directory, contents)
        else:
            for name in others:
                replace_file(directory / name, contents[name])
            if not same:
                replace_file(old, contents[last])
        for name in stale:
            (directory / name).unlink(missing_ok=True)


@contextmanager
def one_at_a_time(target: Path) -> Iterator[bool]:
    """Make processes that save here take turns; yields False if the system has no such locks.

    The lock is on the parent, because the file or directory itself may be replaced.
    """
    try:
        descriptor = os.open(target.parent, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return False
    return True


def _scratch(parent: Path) -> Path:
    return parent / f".fastlora-save-{uuid.uuid4().hex}"


def _is_scratch(name: str) -> bool:
    return _SCRATCH.fullmatch(name) is not None


def _remove_scratch(directory: Path) -> None:
    """Remove what interrupted saves left behind: files in the directory, directories next to it."""
    for path in directory.iterdir():
        if _is_scratch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
    for path in directory.parent.iterdir():
        if _is_scratch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def replace_file(target: Path, contents: bytes) -> None:
    """Write a file so that readers find the old contents or the new ones, even after a power failure."""
    scratch = _scratch(target.parent)
    try:
        _write(scratch, contents)
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _write(path: Path, contents: bytes) -> None:
    """Write a file that is on disk when this returns."""
    path.write_bytes(contents)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's entries, are on disk."""
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot open directories.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_one_by_one(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Replace file by file: the last one is removed first and put back last, once all are written."""
    written: dict[Path, Path] = {}
    last, aside = directory / [*contents][-1], _scratch(directory)
    try:
        for name, content in contents.items():
            written[directory / name] = scratch = _scratch(directory)
            _write(scratch, content)
        os.rename(last, aside)
        _sync(directory)
        for number, (target, scratch) in enumerate(written.items()):
            try:
                os.replace(scratch, target)
            except OSError:
                if number == 0:  # The old files are still complete.
                    os.rename(aside, last)
                raise
            _sync(directory)
    finally:
        for scratch in (*written.values(), aside):
            scratch.unlink(missing_ok=True)


def _replace_directory(directory: Path, contents: Mapping[str, bytes], left: Iterable[str]) -> None:
    """Replace the whole directory; ``left``: names that are not carried over."""
    cwd = _cwd_inside(directory)
    scratch = old = _scratch(directory.parent)
    os.mkdir(scratch)
    try:
        for name, content in contents.items():
            _write(scratch / name, content)
        _carry_over(directory, scratch, left)
        old = _exchange(scratch, directory)
        if cwd:
            os.chdir(cwd)
        _carry_over(old, directory, left)  # Files that others have added since.
        _sync(directory.parent)
    finally:
        for path in (scratch, old):
            shutil.rmtree(path, ignore_errors=True)


def _cwd_inside(directory: Path) -> Path | None:
    """The working directory if it is ``directory`` or inside it."""
    try:
        cwd = Path.cwd()
    except FileNotFoundError:
        return None
    return cwd if cwd == directory or directory in cwd.parents else None


def _carry_over(source: Path, target: Path, left: Iterable[str] = (), top: bool = True) -> None:
    """Link a tree's files, except those ``left`` at its top, into another under the same names if free."""
    for entry in os.scandir(source):
        name = target / entry.name
        if top and (entry.name in left or _is_scratch(entry.name)):
            continue
        if entry.is_dir(follow_symlinks=False):
            name.mkdir(exist_ok=True)
            _carry_over(Path(entry.path), name, top=False)
        elif not os.path.lexists(name):
            _link(entry.path, name)
    shutil.copystat(source, target)
    _sync(target)


def _link(source: str, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        pass  # Removed by another process since.
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(scratch: Path, directory: Path) -> Path:
    """Give a new directory the old one's name in one step, or in two renames if the system cannot.

    Between the two renames the name is missing, and both directories are complete next to it.

    Returns:
        The old directory's new name.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        code = errno.ENOSYS
    else:
        failed = renameat2(_AT_FDCWD, bytes(scratch), _AT_FDCWD, bytes(directory), _RENAME_EXCHANGE)
        code = ctypes.get_errno() if failed else 0
    if code == 0:
        return scratch
    if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(directory))
    aside = directory.with_name(f"{directory.name}.old-{uuid.uuid4().hex}")
    os.rename(directory, aside)
    try:
        os.rename(scratch, directory)
    except BaseException:
        os.rename(aside, directory)
        raise
    return aside
