"""Files and folders of files appear whole or not at all; tensors are kept in safetensors files."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; it appears whole or not at all."""
    with whole_file(path) as temporary:
        # Copies: tensors that share memory are refused, and so are other layouts.
        save_file(
            {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            },
            temporary,
            metadata,
        )


def load_tensors(
    path: str | os.PathLike[str], form: str, writer: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors and the metadata of what :func:`save_tensors` wrote, onto the CPU.

    Args:
        path: the file.
        form: what the file's metadata must have as ``"format"``.
        writer: the public function that writes such files, for the error message.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a truncated file, a folder, or a file of another format.
    """
    if Path(path).is_dir():
        raise ValueError(f"path must be a safetensors file, {os.fspath(path)!r} is a folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"path must be a whole safetensors file, {os.fspath(path)!r} is not: {error}") from error
    if metadata.get("format") != form:
        raise ValueError(f"path must be a file written by {writer}, {os.fspath(path)!r} holds {sorted(tensors)}")
    return tensors, metadata


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes ``path``'s place when the block ends without an error.

    An interrupted block leaves what stood at ``path`` before. The temporary file of a process that was killed is
    removed by the next block for the same path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path, f".{path.stem}-", path.suffix)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    temporary = Path(name)
    try:
        _lock(descriptor)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would lock out the colleagues who read the file
        if os.name == "nt":  # where an open file cannot be moved
            os.close(descriptor)
            descriptor = -1
        os.replace(temporary, path)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; its files appear at ``path`` when the block ends without an error.

    A folder that stands there already keeps its other files. Opening the block creates the temporary folder, so a
    place that cannot be written to shows before the work and not after it.

    Raises:
        ValueError: there is a file at ``path``.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"path must be a folder or free, {os.fspath(path)!r} is a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path, f".{path.name}-", "")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    descriptor = os.open(temporary, os.O_RDONLY) if fcntl is not None else -1
    try:
        _lock(descriptor)
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            _move_into(temporary, path)
        else:
            temporary.rename(path)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def _lock(descriptor: int) -> None:
    """Lock a temporary file or folder for as long as this process has it open, that is, lives."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(path: Path, prefix: str, suffix: str) -> None:
    """Remove the temporary files or folders of ``path`` that no living process holds."""
    if fcntl is None:
        return
    made_here = re.compile(re.escape(prefix) + "[a-z0-9_]{8}" + re.escape(suffix))
    for found in path.parent.iterdir():
        if not made_here.fullmatch(found.name):
            continue
        try:
            descriptor = os.open(found, os.O_RDONLY)
        except OSError:  # gone, or another user's
            continue
        try:
            _lock(descriptor)
            if found.is_dir():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)
        except OSError:  # held
            pass
        finally:
            os.close(descriptor)


def _move_into(source: Path, target: Path) -> None:
    """Move the files of ``source`` to the same places in ``target``; none, where one of them cannot go."""
    files = [file.relative_to(source) for file in sorted(source.rglob("*")) if file.is_file()]
    for file in files:
        in_the_way = [target / folder for folder in file.parents if (target / folder).is_file()]
        in_the_way += [target / file] if (target / file).is_dir() else []
        if in_the_way:
            raise FileExistsError(f"{in_the_way[0]} is in the way of {target / file}; move it or choose another")
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
