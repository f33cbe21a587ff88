"""Where the code runs: device, number format, platform, seeds, quiet libraries, and safe writing of files."""
from __future__ import annotations

import ctypes
import difflib
import importlib.util
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Runtime", "Measurement", "setup", "detect", "quiet_libraries", "generator", "data_dir", "keep_freed_memory",
           "measure", "memory_advice", "is_out_of_memory", "atomic_write", "atomic_folder", "closest"]

DEVICES = ("cuda", "npu", "mps", "cpu")
DTYPES = ("float32", "float16", "bfloat16")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4             # malloc.h
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")    # of cuda, npu, mps; of the CPU
_MEMORY_ADVICE = ("no memory left. What to turn on, the first that helps: low_memory=True in load and in edit_prompt; "
                  "a smaller size; fewer prompts (targets, pictures) at once; record=None")
PLATFORMS = ("colab", "kaggle", "modelarts", "local")


@dataclass(frozen=True)
class Runtime:
    """Where and how a lesson runs: what `setup` found or was told."""

    device: str             # "cpu", "cuda", "cuda:1", "npu", "mps"
    dtype: torch.dtype      # of the model's weights
    platform: str           # "colab", "kaggle", "modelarts" or "local"
    seed: int

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}, {self.platform}, seed {self.seed}"


def setup(seed: int = 0, device: str | None = None, dtype: torch.dtype | str | None = None) -> Runtime:
    """Prepare a notebook: quiet the libraries, seed every random source and choose the device.

    Parameters
    ----------
    seed : int
        Seed of Python's, NumPy's and PyTorch's global random sources.
    device : str, optional
        "cuda", "cuda:1", "npu", "mps" or "cpu"; the environment variable P2P_DEVICE wins over it.
        By default the first of cuda, npu, mps, cpu that works here.
    dtype : torch.dtype or str, optional
        By default float16 on cuda and npu, float32 on cpu and mps.

    Raises
    ------
    ValueError
        If the device or the platform (P2P_PLATFORM) is unknown, or the device is not present.
    """
    quiet_libraries()
    keep_freed_memory()
    import numpy as np
    import torch

    runtime = detect(seed, device, dtype)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return runtime


def detect(seed: int = 0, device: str | None = None, dtype: torch.dtype | str | None = None) -> Runtime:
    """Find device, number format and platform as `setup` does, without changing anything."""
    device = _pick_device(os.environ.get("P2P_DEVICE") or device)
    return Runtime(device, _pick_dtype(dtype, device), _pick_platform(), seed)


def quiet_libraries() -> None:
    """Silence transformers' and diffusers' notes and loading bars; warnings of anyone else still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")    # read when transformers is first imported
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed instead of giving it back to the system at once.

    On a CPU a network frees and allocates its large activations in every layer; giving them back costs a page
    fault per 4 KiB, which is most of the time of a training step. Elsewhere than on glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)                    # large blocks from the heap as well
    libc.mallopt(_M_TRIM_THRESHOLD, 2 ** 31 - 1)    # bytes at the heap's end before it shrinks


def generator(seed: int, device: str = "cpu") -> torch.Generator:
    """A random generator of its own; on the CPU by default, so that results agree between devices."""
    import torch

    return torch.Generator(device).manual_seed(int(seed))


def data_dir() -> Path:
    """The folder of bundled models and pictures: inside an installed package, or `data/` of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_data", package.parent / "data"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("the bundled data is neither in the package (p2p_helpers/_data) nor beside it "
                            "(data/); install the package again or run from a complete checkout")


def closest(word: str, known) -> str:
    """The end of an error message about an unknown word: the nearest known word, and all there are."""
    known = [str(name) for name in known]
    near = difflib.get_close_matches(str(word), known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + "known: " + ", ".join(known)


def _pick_device(wanted: str | None) -> str:
    if not wanted:
        return next(device for device in DEVICES if _device_count(device))
    kind, _, index = wanted.partition(":")
    if kind not in DEVICES:
        raise ValueError(f"device {wanted!r} is unknown; {closest(kind, DEVICES)}")
    if ":" in wanted and not index.isdigit():
        raise ValueError(f"device {wanted!r} is unknown; write {kind!r} or '{kind}:0'")
    if int(index or 0) >= _device_count(kind):
        present = [device for device in DEVICES if _device_count(device)]
        raise ValueError(f"device {wanted!r} is not present on this machine; present: {', '.join(present)}")
    return wanted


def _device_count(kind: str) -> int:
    import torch

    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "npu" and importlib.util.find_spec("torch_npu"):
        import torch_npu  # noqa: F401  registers torch.npu

        return torch.npu.device_count()
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int(kind == "cpu")


def _pick_dtype(dtype: torch.dtype | str | None, device: str) -> torch.dtype:
    import torch

    if dtype is None:
        return torch.float16 if device.startswith(("cuda", "npu")) else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; {closest(name, DTYPES)}")
    return getattr(torch, name)


def _pick_platform() -> str:
    wanted = os.environ.get("P2P_PLATFORM")
    if wanted:
        if wanted not in PLATFORMS:
            raise ValueError(f"P2P_PLATFORM is {wanted!r}; {closest(wanted, PLATFORMS)}")
        return wanted
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):    # first: Kaggle's image derives from Colab's
        return "kaggle"
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "colab"
    if "MA_JOB_DIR" in os.environ or "MA_MOUNT_PATH" in os.environ:
        return "modelarts"
    tools = any(importlib.util.find_spec(name) for name in ("moxing", "modelarts"))
    return "modelarts" if tools and os.path.isdir("/home/ma-user/work") else "local"


@dataclass
class Measurement:
    """What a block cost: filled in when the block of `measure` ends."""

    seconds: float = 0.0
    peak_bytes: int | None = None       # None where the system does not tell
    where: str = "cpu"

    def report(self) -> str:
        """The memory and time report: one line."""
        kind = "peak on" if self.where != "cpu" else "peak of the process on"
        memory = "unknown" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.0f} MiB"
        return f"time {self.seconds:.2f} s, memory {memory} ({kind} {self.where})"


@contextmanager
def measure(device: str = "cpu") -> Iterator[Measurement]:
    """Measure a block's seconds and its peak of memory.

    On cuda and npu the peak is that of the tensors allocated within the block (`max_memory_allocated`);
    elsewhere it is the largest resident size that the whole process has had so far.
    """
    import torch

    kind = device.partition(":")[0]
    accelerator = getattr(torch, kind) if kind in ("cuda", "npu") else None
    measurement = Measurement(where=device)
    if accelerator:
        accelerator.synchronize(device)
        accelerator.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        yield measurement
    finally:
        if accelerator:
            accelerator.synchronize(device)
        measurement.seconds = time.perf_counter() - start
        measurement.peak_bytes = (accelerator.max_memory_allocated(device) if accelerator
                                  else _peak_of_process())


@contextmanager
def memory_advice() -> Iterator[None]:
    """Say what to turn on when the block runs out of memory: the same error, with advice.

    The tensors that the failed functions held are let go, so that a notebook can try again without a restart.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error) or _MEMORY_ADVICE in str(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise type(error)(f"{_MEMORY_ADVICE}\n({error})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error tells of a device's memory being full; where PyTorch has no type for it, by its words."""
    import torch

    plain = type(error) is RuntimeError and any(words in str(error) for words in _OUT_OF_MEMORY)
    return plain or isinstance(error, torch.OutOfMemoryError)


def _peak_of_process() -> int | None:
    try:
        import resource
    except ImportError:                                         # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024    # bytes on macOS, KiB elsewhere


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name to write to, and move the file to `path` once the block has succeeded.

    Whatever stood at `path` stays untouched if the block fails. Missing parent folders are made.

    Raises
    ------
    OSError
        If the folder cannot be written to; the message names it.
    """
    path = Path(path)
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)      # mkstemp makes files that only their owner reads
        with _writable(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """The same for a folder: fill a temporary one, which then takes the place of `path`."""
    path = Path(path)
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    new.mkdir()
    try:
        yield new
        with _writable(path):
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path.name!r}, its folder does not take files "
                          f"({error.strerror}); choose another folder", str(path.parent)) from error
