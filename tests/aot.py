"""Compile the launches of a call to machine code for a GPU that is not there.

A host function runs on meta tensors with `launch` replaced by a recorder, so what is compiled is
what the configuration for that target would launch, with the same specialisation of arguments.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from triflash import mods, registry
from triflash.kernels.common.launch import Launch
from triflash.spec import PLAIN, Features, Sequences, make_spec, make_varlen_spec
from triflash.target import Target
from triflash.testing import Case

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Target("cuda", "sm_80", 108), 163 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), Target("cuda", "sm_86", 84), 99 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), Target("cuda", "sm_89", 128), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), Target("cuda", "sm_90", 132), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), Target("cuda", "sm_100", 148), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), Target("cuda", "sm_120", 170), 99 * 1024),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), Target("hip", "gfx90a", 110), 64 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Target("hip", "gfx942", 304), 64 * 1024),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), Target("hip", "gfx1100", 96), 64 * 1024),
}
_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@dataclass
class RecordedLaunch:
    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constexprs: tuple[Any, ...]
    config: Any


@dataclass
class Compiled:
    name: str
    config: Any
    shared: int
    registers: int = 0
    spills: int = 0
    overwritten: list[str] = field(default_factory=list)
    asm: Any = None


@contextmanager
def recorded(target: Target, row: registry.Implementation):
    """Collect the row's launches for `target` instead of running them."""
    launches: list[RecordedLaunch] = []
    paths = filter(None, (row.forward, row.backward))
    modules = [importlib.import_module(path.split(":")[0]) for path in paths]

    def record(launch, *tensors, programs=None):
        args = tuple(launch.arguments(tensors)[: -len(launch.constexprs)])
        grid = launch.grid if programs is None else (programs, 1, 1)
        launches.append(RecordedLaunch(launch.kernel, grid, args, launch.constexprs, launch.config))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launch, "__call__", record))
        for module in modules:
            if hasattr(module, "target_of"):
                stack.enter_context(mock.patch.object(module, "target_of", return_value=target))
            for function in vars(module).values():  # tests patch the tuning that these remember
                if callable(clear := getattr(function, "cache_clear", None)):
                    clear()
        yield launches


def record_call(
    target: Target,
    implementation: str = "v2",
    dtype: torch.dtype = torch.bfloat16,
    headdim: int = 64,
    headdim_v: int | None = None,
    causal: bool = False,
    batch: int = 2,
    nheads: int = 4,
    nheads_k: int = 4,
    seqlen: int = 1024,
    seqlen_k: int | None = None,
    allow_tf32: bool = False,
    softmax_scale: float | None = None,
    dlse: bool = False,
    feature: str | None = None,
    packed: bool = False,
    seqused: bool = False,
) -> list[RecordedLaunch]:
    """The launches of forward and backward for one call on `target`.

    `feature` is one of `test_mods.FEATURED`, but for causal. Packed, there are `batch` sequences of
    at most `seqlen` queries and `seqlen_k` keys.
    """
    headdim_v = headdim if headdim_v is None else headdim_v
    seqlen_k = seqlen if seqlen_k is None else seqlen_k

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q = empty(batch, seqlen, nheads, headdim)
    k = empty(batch, seqlen_k, nheads_k, headdim)
    v = empty(batch, seqlen_k, nheads_k, headdim_v)
    features, extras = PLAIN, ()
    if feature is not None:
        of = Case(batch, seqlen, seqlen_k, nheads, nheads_k, headdim, dtype=dtype, causal=causal)
        features, extras = features_for(of, feature)
    options = (softmax_scale, causal, False, allow_tf32, True, features, extras)
    keywords = {}
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="meta")
        used = torch.empty(batch, dtype=torch.int32, device="meta") if seqused else None
        sequences = Sequences(cu_seqlens, cu_seqlens, used, used)
        spec = make_varlen_spec(q, k, v, sequences, seqlen, seqlen_k, *options)
        keywords = {"sequences": sequences}
    else:
        spec = make_spec(q, k, v, *options)
    given = [extras] if extras else []
    row = registry.get(implementation)
    with recorded(target, row) as launches:
        out, lse, saved = row.load_forward()(q, k, v, spec, *given, **keywords)
        if row.backward is not None:
            gradient = torch.empty_like(lse) if dlse else None
            arguments = (torch.empty_like(out), gradient, q, k, v, out, lse, saved, spec)
            row.load_backward()(*arguments, *given, **keywords)
    return launches


def features_for(case: Case, feature: str) -> tuple[Features, tuple[torch.Tensor, ...]]:
    """The features of the case with those of `test_mods.FEATURED`, but for causal."""
    import test_mods  # here, so that its functions are what this process makes of them

    case = replace(case, **{**test_mods.FEATURED[feature], "causal": case.causal})
    features, extras = mods.features_of(**case.extras(torch.device("meta")))
    return replace(features, with_grad=mods.differentiable(features, extras)), extras


def compile_launch(launch: RecordedLaunch, target: GPUTarget) -> Compiled:
    """Compile as Triton would at this launch; raises what Triton raises."""
    kernel = launch.kernel
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    values = (*launch.args, *launch.constexprs)
    assert len(values) == len(kernel.params)

    def describe(value: Any, path: tuple[int, ...], specialise: bool, align: bool) -> Any:
        """The type of an argument in the signature, as Triton's JIT finds it."""
        if isinstance(value, tuple):
            return tuple(describe(v, (*path, i), specialise, align) for i, v in enumerate(value))
        one = isinstance(value, int) and value == 1 and specialise
        if value is None or isinstance(value, JITFunction) or one:
            constants[path] = value
            return "constexpr"
        if hasattr(value, "layout") and hasattr(value, "block_shape"):  # Gluon's descriptor
            element = _TYPES[value.base.dtype]
            return f"tensordesc<{element}{value.block_shape},{value.layout!r}>"
        if isinstance(value, TensorDescriptor):
            shape = ",".join(map(str, value.block_shape))
            return f"tensordesc<{_TYPES[value.base.dtype]}[{shape}]>"
        if isinstance(value, torch.Tensor):
            if align:
                attrs[path] = [["tt.divisibility", 16]]
            return f"*{_TYPES[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and specialise:
            attrs[path] = [["tt.divisibility", 16]]
        return "i64" if value >= 2**31 else "i32"

    for i, (param, value) in enumerate(zip(kernel.params, values, strict=True)):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[(i,)] = value
        else:
            flags = (param.do_not_specialize, param.do_not_specialize_on_alignment)
            signature[param.name] = describe(value, (i,), *(not flag for flag in flags))
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    source_of = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source_of
    source = source_of(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=target, options=options)
    result = Compiled(kernel.__name__, launch.config, compiled.metadata.shared, asm=compiled.asm)
    result.overwritten = overwritten_too_early(compiled.asm["ttgir"], launch.config.num_stages)
    if target.backend == "cuda":
        result.registers, result.spills = resources(compiled.asm["cubin"])
    return result


def compile_call(name: str, with_ptx: bool = False, **call: Any) -> list[Compiled]:
    """Compile all launches of a call (see `record_call`) for the target called `name`.

    Runs in a process of its own, where Triton's interpreter is off; what is compiled stays there,
    but for the PTX if asked for.
    """
    gpu, target, _ = TARGETS[name]
    results = [compile_launch(launch, gpu) for launch in record_call(target, **call)]
    for result in results:
        result.asm = {"ptx": result.asm["ptx"]} if with_ptx else None
    return results


class Compiler:
    """A process in which kernels are compiled, not interpreted, and which LLVM may abort."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self._pool is None:
            # Spawned, so that it imports Triton anew, under the environment of the first call.
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
                return self._pool.submit(function, *arguments, **options).result()
        except BrokenProcessPool:
            self.close()
            pytest.fail("the compiler ended the process")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


_RING = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*\{pendings = (\d+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%\w+)(?:#\d+)?, (%\w+)(?:#\d+)?, ")
_COPY = re.compile(r"async_(?:copy_global_to_local %[\w#]+, |tma_copy_global_to_local .*\] )(%\w+)")


def overwritten_too_early(ttgir: str, num_stages: int) -> list[str]:
    """Copies into shared memory that an asynchronous product may still be reading.

    Triton 3.6 gives a tile one buffer less if not only Hopper's products read it, and yet lets them
    run on while the next tile is copied: results then differ from run to run (ADR 0008). A copy
    made `num_stages - 1` steps ahead, into a ring of n buffers, replaces what was read
    n - (num_stages - 1) steps ago.
    """
    found = []
    lines = ttgir.splitlines()
    buffers = {m[1]: int(m[2]) for m in _RING.finditer(ttgir)}
    for start, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        body = _indented(lines, start)
        ring: dict[str, str] = {}  # that a view is of
        for text in (*lines[:start], *body):
            if m := _VIEW.search(text):
                ring[m[1]] = ring.get(m[2], m[2])
        running: list[tuple[int, set[str]]] = []  # products: step, and rings that they read
        for step in range(2):
            for text in body:
                if m := _WAIT.search(text):
                    running = running[max(0, len(running) - int(m[1])) :]
                elif m := _PRODUCT.search(text):
                    running.append((step, {ring.get(name, name) for name in m.groups()}))
                elif m := _COPY.search(text):
                    target = ring.get(m[1], m[1])
                    age = buffers.get(target, 1) - (num_stages - 1)
                    if any(target in read and at <= step - age for at, read in running):
                        found.append(text.strip())
    return found


def _indented(lines: list[str], start: int) -> list[str]:
    """The lines after `start` that are indented more than it."""

    def depth(line: str) -> int:
        return len(line) - len(line.lstrip())

    return list(takewhile(lambda line: depth(line) > depth(lines[start]), lines[start + 1 :]))


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack a thread, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def sass(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Without an analysis that only adds comments.
        command = [_tool("nvdisasm"), "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
