"""Files: atomic writes, safe loading of tensors, and the fingerprint of a model's weights."""

import errno
import hashlib
import io
import os
import pickle
import secrets
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.errors import CheckpointError, OutputError

_CODE_MARKERS = ("Unsupported global", "unsupported GLOBAL", "Unsupported class", "TorchScript")
"""Parts of torch's messages for a file that would run code or build foreign objects, as opposed to a broken one."""

_PICKLE_START = b"\x80"


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
    except OSError as error:
        raise OutputError(
            f"cannot write '{target}' ({error.strerror or error}); give a path in a folder that can be written"
        ) from error
    finally:
        # Gone after a successful rename; left over after an error or an interrupt. A parent that is no folder raises.
        with suppress(OSError):
            temporary.unlink()


def atomic_write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write ``text`` as UTF-8, like `atomic_write_bytes`."""
    atomic_write_bytes(text.encode("utf-8"), path)


def atomic_save(obj: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` of tensors and primitives, like `atomic_write_bytes`."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    atomic_write_bytes(buffer.getvalue(), path)


def safe_load(path: str | os.PathLike[str], *, checksums: bool = False) -> Any:
    """Load a file of ``torch.save`` on the CPU, without ever running code that it may hold.

    Args:
        path: the file.
        checksums: also compare the stored checksums, which torch does not: for files that `atomic_save` wrote.

    Raises:
        CheckpointError: the file is missing, unreadable, broken, or holds more than tensors and primitives.
    """
    source = Path(path)
    if not source.exists():
        raise CheckpointError(f"no file '{source}'; give the path of an existing file written by torch.save")
    if not source.is_file():
        raise CheckpointError(f"'{source}' is a folder; give the path of a file written by torch.save")
    try:
        if checksums and zipfile.is_zipfile(source):  # else not of atomic_save: torch says what it is
            with zipfile.ZipFile(source) as archive:
                if (member := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"checksum of {member}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is TorchScript: refused below
            return torch.load(source, map_location="cpu", weights_only=True)
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
        why = error.strerror or error
        raise CheckpointError(f"cannot read '{source}' ({why}); give a file that can be read") from error


def _would_run_code(path: Path, message: str) -> bool:
    """Whether torch refused a working file for what it holds; plain pickles fail at an opcode that torch lacks."""
    if any(marker in message for marker in _CODE_MARKERS):
        return True
    return "Unsupported operand" in message and path.read_bytes()[:1] == _PICKLE_START


def _broken(source: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [""])[0][:120]
    return CheckpointError(
        f"'{source}' is no readable file of torch.save ({type(error).__name__}: {reason}); write or download it again"
    )


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
    except OSError as error:
        raise OutputError(
            f"cannot write in the folder '{folder}' ({error.strerror or error}); give a folder that can be written"
        ) from error
    return folder
