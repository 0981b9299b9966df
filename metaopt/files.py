"""Files: atomic writes, safe loading of tensors, folders of runs, and the fingerprint of a model's weights."""

import errno
import hashlib
import io
import math
import os
import pickle
import secrets
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.errors import CheckpointError, OutputError

_CODE_MARKERS = ("Unsupported global", "unsupported GLOBAL", "Unsupported class", "TorchScript")
"""Parts of torch's messages for a file that would run code or build foreign objects, as opposed to a broken one."""

_PICKLE_START = b"\x80"

_LARGEST_PICKLE = 4 * 2**20
"""Bytes of names and primitives beside the tensors: of ten thousand tensors it is half of that."""

_LARGEST_VIEW = 16
"""How many times a file's own bytes its tensors may come to: some share memory, as tied weights do."""

_SMALL = 2**20
"""Bytes that any file counts as at least, there."""


def atomic_write_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write ``content`` so that ``path`` holds either the old content or all of the new one, never a part.

    A temporary file beside it is written, flushed to disk and renamed. Missing parent folders are made.

    Raises:
        OutputError: the folder or the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        with suppress(OSError):  # flush the rename to disk too, where the system can: Windows cannot open folders
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        why = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write '{target}' ({why}); give a path in a folder that can be written") from error
    finally:
        # Gone after a successful rename; left over after an error or an interrupt. A parent that is no folder raises.
        with suppress(OSError, ValueError):
            temporary.unlink()


def atomic_write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write ``text`` as UTF-8, like `atomic_write_bytes`."""
    atomic_write_bytes(text.encode("utf-8"), path)


def atomic_save(obj: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` of tensors and primitives, like `atomic_write_bytes`."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    atomic_write_bytes(buffer.getvalue(), path)


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Take away what writes of ``path`` left beside it where their process was killed; for no other is writing now."""
    target = Path(path)
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"cannot read '{path}' ({error.strerror or error}); give a file that can be read"
        ) from error


def safe_load(path: str | os.PathLike[str], *, checksums: bool = False) -> Any:
    """Load a file of ``torch.save`` on the CPU, without ever running code that it may hold.

    Sizes that the file declares are compared with its own before anything of that size is made.

    Args:
        path: the file.
        checksums: also compare the stored checksums, which torch does not; a file without any has nothing to compare.

    Raises:
        CheckpointError: the file is missing, unreadable, broken, or holds more than tensors and primitives.
    """
    source = existing_file(path, "written by torch.save")
    try:
        if zipfile.is_zipfile(source):  # else of an old torch, which is left to say what is wrong with it
            _check_archive(source, checksums)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is TorchScript: refused below
            loaded = torch.load(source, map_location="cpu", weights_only=True)
        _check_tensors(loaded, source.stat().st_size)
        return loaded
    except (pickle.UnpicklingError, RuntimeError) as error:
        if _would_run_code(source, str(error)):
            raise CheckpointError(
                f"'{source}' holds pickled code or foreign objects and was not loaded; only tensors and primitives are "
                "allowed: save the model's state_dict() and give that file"
            ) from error
        raise _broken(source, error) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        # EINVAL: torch seeks by what a damaged file says, before its start.
        if not isinstance(error, OSError) or error.errno == errno.EINVAL:
            raise _broken(source, error) from error
        raise _unreadable(source, error) from error


def says(values: Any, key: str, wanted: str | int) -> bool:
    """Whether what a file held is a mapping with that plain value there; other types, such as tensors, are not it."""
    found = values.get(key) if isinstance(values, Mapping) else None
    return type(found) is type(wanted) and found == wanted


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass and without a copy; integers never are."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = (tensor if tensor.element_size() > 1 else tensor.float()).detach().aminmax()  # NaN comes through
    return math.isfinite(low.item()) and math.isfinite(high.item())


def existing_file(path: str | os.PathLike[str], kind: str) -> Path:
    """The path, where a plain file is there.

    Args:
        path: the file.
        kind: what it should be, for messages: "written by torch.save".

    Raises:
        CheckpointError: it is missing, a folder or a device, or its path cannot be looked at.
    """
    source = Path(path)
    try:
        mode = os.stat(source).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"no file '{source}'; give the path of an existing file {kind}") from error
    except (OSError, ValueError) as error:  # too long, closed, or with a zero byte in it
        raise _unreadable(source, error) from error
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "no plain file"
        raise CheckpointError(f"'{source}' is {found}; give the path of a file {kind}")
    return source


def _check_archive(source: Path, checksums: bool) -> None:
    """Compare what an archive says of its members with what it holds.

    Raises:
        zipfile.BadZipFile: they differ, or there are too many primitives to be of any use.
    """
    with zipfile.ZipFile(source) as archive:
        members = archive.infolist()
        data = [member for member in members if member.filename.endswith("data.pkl") or "/data/" in member.filename]
        declared, own = sum(member.file_size for member in data), source.stat().st_size
        if declared > own:
            raise zipfile.BadZipFile(f"it declares {declared} bytes of data in a file of {own}")
        for member in data:
            if member.filename.endswith("data.pkl") and member.file_size > _LARGEST_PICKLE:
                raise zipfile.BadZipFile(f"{member.file_size} bytes of names, where {_LARGEST_PICKLE} are allowed")
        # Where torch was told to write no checksums, all are 0.
        if checksums and any(member.CRC for member in members) and (member := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"checksum of {member}")


def _check_tensors(loaded: Any, size: int) -> None:
    """Refuse tensors that hold no values of their own, before anybody reads them.

    Args:
        loaded: what torch read.
        size: of the file, bytes.

    Raises:
        ValueError: a tensor is not dense and on the CPU, or they are views of far more elements than were stored.
    """
    total = 0
    for tensor in _tensors(loaded):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
            raise ValueError(f"a {tensor.layout} tensor on {tensor.device}, where dense ones are allowed")
        total += tensor.numel() * tensor.element_size()
        if total > _LARGEST_VIEW * max(size, _SMALL):
            raise ValueError(f"tensors of more than {total} bytes in a file of {size}")


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and sequences, whatever their depth."""
    pending, seen = [tree], set[int]()
    while pending:
        node = pending.pop()
        if isinstance(node, Tensor):
            yield node
        elif isinstance(node, Mapping | list | tuple | set) and id(node) not in seen:
            seen.add(id(node))
            pending.extend(node.values() if isinstance(node, Mapping) else node)


def _would_run_code(path: Path, message: str) -> bool:
    """Whether torch refused a working file for what it holds; plain pickles fail at an opcode that torch lacks."""
    if any(marker in message for marker in _CODE_MARKERS):
        return True
    if "Unsupported operand" not in message:
        return False
    with open(path, "rb") as file:
        return file.read(1) == _PICKLE_START


def _broken(source: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [""])[0][:120]
    if isinstance(error, pickle.UnpicklingError):  # torch's advice is to load it as code
        reason = "it holds no tensors"
    return CheckpointError(
        f"'{source}' is no readable file of torch.save ({type(error).__name__}: {reason}); write or download it again"
    )


def _unreadable(source: Path, error: Exception) -> CheckpointError:
    why = getattr(error, "strerror", None) or error
    return CheckpointError(f"cannot read '{source}' ({why}); give a file that can be read")


def weights_sha256(weights: nn.Module | Mapping[str, Any], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over the sorted name, dtype, shape and bytes of every tensor of a module or a state_dict.

    BatchNorm's ``num_batches_tracked`` counters and entries that are no tensors do not count. Device and memory format
    make no difference.

    Args:
        weights: module or state_dict.
        dtype: what floating tensors are rounded to first; None: as they are.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        if not isinstance(tensor, Tensor) or name.rsplit(".", 1)[-1] == "num_batches_tracked":
            continue
        tensor = tensor.detach().cpu().contiguous()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def ensure_writable_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder where it is missing and try a write in it, before any long work starts.

    Raises:
        OutputError: it cannot be made or written.
    """
    folder = Path(path)
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise _not_writable(folder, error) from error
    return folder


def new_folder(parent: str | os.PathLike[str], name: str) -> Path:
    """Make a folder that nobody else has: ``name``, or where that is taken, ``name-2``, ``name-3`` and so on.

    Of several processes that ask at once, each gets another one.

    Raises:
        OutputError: it cannot be made.
    """
    home = ensure_writable_folder(parent)
    numbers = count(2)
    folder = home / name
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder = home / f"{name}-{next(numbers)}"
        except (OSError, ValueError) as error:
            raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: Exception) -> OutputError:
    why = getattr(error, "strerror", None) or error
    return OutputError(f"cannot write in the folder '{folder}' ({why}); give a folder that can be written")
