"""CUDA C++ to machine code while Python runs: by NVRTC, which needs neither nvcc nor a GPU.

The optional packages (`pip install triflash[cuda]`) are imported inside the functions, so that this
module can be imported without them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

from triflash.target import user_cache_dir

# What the headers are, one of them, where wheels put them (package, folder), and the name under
# which cuda-pathfinder finds them in other installations, as those of conda or of a toolkit.
_HEADERS = (
    ("CUTLASS", "cute/tensor.hpp", "cutlass_library", "source/include", "cutlass"),
    ("CUDA runtime", "cuda_fp16.h", "nvidia", "cu13/include", "cudart"),
    ("CCCL", "cuda/std/limits", "nvidia", "cu13/include/cccl", "cccl"),
)
# Headers that say which version an include directory holds, for the key of the cache.
_VERSIONS = ("cutlass/version.h", "cuda.h", "cuda/std/__cccl/version.h")
_VERSION = re.compile(r"^#define \w*VERSION\w* .*$|^#define CUTLASS_\w+ .*$", re.MULTILINE)


def load_cubin(
    source: Path, macros: tuple[tuple[str, str], ...], arch: str, opt_level: int = 3
) -> bytes:
    """`source` compiled with `macros` for `arch` ("sm_90"), from the user's cache if it is there.

    The key is all that decides the machine code: source, macros, options, architecture, and the
    versions of compiler and headers.

    Raises:
        ImportError: a package is missing; the message names the extra that brings it.
        Exception: what cuda-core raises on an error of the compiler, with the compiler's log.
    """
    code = source.read_text()
    key = hashlib.sha256(repr((code, macros, arch, opt_level, _toolchain())).encode()).hexdigest()
    path = user_cache_dir() / "cuda" / f"{source.stem}-{arch}-{key[:32]}.cubin"
    cubin = _read(path)
    if cubin is None:
        cubin = compile_cubin(code, macros, arch, opt_level)
        _write(path, cubin)
    return cubin


def compile_cubin(
    code: str,
    macros: tuple[tuple[str, str], ...],
    arch: str,
    opt_level: int = 3,
    name: str = "forward.cu",
) -> bytes:
    """CUDA C++ to a cubin. Raises as `load_cubin`."""
    include = include_directories()
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=name,
        arch=arch,
        std="c++17",
        include_path=[str(directory) for directory in include],
        define_macro=list(macros) or None,
        device_as_default_execution_space=True,  # what CUTLASS's own headers need under NVRTC
        ftz=True,  # exp2f becomes one instruction
        ptxas_options=[f"--opt-level={opt_level}"],
    )
    return bytes(Program(code, "c++", options).compile("cubin").code)


@lru_cache(maxsize=1)
def include_directories() -> tuple[Path, ...]:
    """Where the headers of CUTLASS, CUDA and CCCL are; ImportError names what is missing."""
    return tuple(_find(*header) for header in _HEADERS)


def _find(what: str, header: str, package: str, folder: str, pathfinder_name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is not None:
        for location in spec.submodule_search_locations or ():
            if (Path(location) / folder / header).is_file():
                return Path(location) / folder
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        found = find_nvidia_header_directory(pathfinder_name)
    except (ImportError, RuntimeError):  # RuntimeError: a pathfinder that knows no such name
        found = None
    if found is None or not (Path(found) / header).is_file():
        raise ImportError(f"No headers of {what} ({header}) found: pip install triflash[cuda].")
    return Path(found)


@lru_cache(maxsize=1)
def _toolchain() -> tuple[object, ...]:
    from cuda.bindings import nvrtc

    headers = [
        _VERSION.findall((directory / header).read_text())
        for directory in include_directories()
        for header in _VERSIONS
        if (directory / header).is_file()
    ]
    this = Path(__file__).read_text()  # the options above
    return (nvrtc.nvrtcVersion()[1:], headers, this)


def _read(path: Path) -> bytes | None:
    """The cubin, unless there is none or it is damaged: a digest of it comes first in the file."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, cubin = data[:32], data[32:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    """Under a name of its own first, so that another process never reads half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"triflash cannot keep a compiled kernel in {path.parent} ({error}); it will be "
            "compiled again in the next process.",
            RuntimeWarning,
            stacklevel=2,
        )
