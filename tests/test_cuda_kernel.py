"""The CUDA C++ forward: what it compiles to, its cache, and the ways it reads memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import aot
import pytest
import torch
from helpers import GPU

from triflash import attention, registry
from triflash.kernels.cuda import compile as cuda_compile
from triflash.kernels.cuda import forward as cuda_forward
from triflash.target import Target
from triflash.testing import Case

ROW = registry.get("cuda_v1")
FP16, BF16 = torch.float16, torch.bfloat16
WIDTHS = cuda_forward._WIDTHS

needs_extra = pytest.mark.skipif(
    not all(registry._installed(package) for package in ROW.packages),
    reason="needs the optional packages: pip install triflash[cuda]",
)


def config(arch="sm_90", headdim=64, headdim_v=None, dtype=FP16, aligned=True):
    spec = Case(headdim=headdim, headdim_v=headdim_v or headdim, dtype=dtype).spec()
    return cuda_forward.kernel_config(spec, Target("cuda", arch, 132), aligned)


# ---- What it compiles to. No GPU is needed.

COMPILED = [
    *(("sm_90", width, FP16, True) for width in WIDTHS),
    *(("sm_90", width, BF16, True) for width in (64, 128)),
    *((arch, width, FP16, True) for arch in ("sm_80", "sm_89") for width in (64, 128, 192, 256)),
    *(("sm_90", width, FP16, False) for width in (64, 256)),
]


@needs_extra
@pytest.mark.parametrize(("arch", "headdim", "dtype", "aligned"), COMPILED, ids=str)
def test_compiles_without_spills_to_tensor_cores(arch, headdim, dtype, aligned):
    chosen = config(arch, headdim, dtype=dtype, aligned=aligned)
    cubin = cuda_compile.load_cubin(
        cuda_forward._SOURCE, chosen.macros, arch, chosen.tiles.opt_level
    )
    registers, stack = aot.resources(cubin)
    threads = 32 * chosen.tiles.num_warps
    assert registers * threads * chosen.tiles.min_blocks <= 65536
    assert stack == 0, f"{chosen} spills {stack} bytes a thread"
    sass = aot.sass(cubin)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert re.search(r"HMMA\.16816\.F32\.BF16" if dtype == BF16 else r"HMMA\.16816\.F32 ", sass), (
        "no tensor cores"
    )
    assert "LDSM.16.M88.4" in sass, "no ldmatrix"
    assert "LDSM.16.MT88.4" in sass, "no transposing ldmatrix"
    assert ("LDGSTS" in sass) == aligned, "cp.async only for rows of whole vectors"
    assert re.search(r"STG\.E(\.\w+)*\.128", sass) or not aligned, "no 16-byte stores"


@pytest.mark.parametrize("arch", [name for name in aot.TARGETS if name.startswith("sm_")])
@pytest.mark.parametrize("aligned", [True, False])
def test_every_configuration_fits_shared_memory(arch, aligned):
    for headdim in range(1, 257):
        chosen = config(arch, headdim, 257 - headdim, aligned=aligned)
        assert chosen.width >= max(headdim, 257 - headdim)
        assert chosen.shared_bytes <= aot.TARGETS[arch][2]
        assert chosen.tiles.block_m % (16 * chosen.tiles.num_warps) == 0
        vectors_a_row = (64 if chosen.width % 64 == 0 else 32) // 8
        for rows in (chosen.tiles.block_m, chosen.tiles.block_n):
            assert rows % (32 * chosen.tiles.num_warps // vectors_a_row) == 0


def test_the_launch_passes_what_the_kernel_takes():
    source = cuda_forward._SOURCE.read_text()
    declared = re.search(r"attention_forward\(([^)]*)\)", source)[1].split(",")
    kinds = ["pointer" if "*" in p else p.split()[0] for p in declared]
    spec = Case(batch=2, seqlen_q=300, seqlen_k=500, nheads=6, nheads_k=2, causal=True).spec()
    launch = cuda_forward._prepare(
        spec, Target("cuda", "sm_90", 132), 0, (1, 2, 3), (4, 5, 6), (7, 8, 9), True
    )
    passed = ["double" if isinstance(x, float) else "int64_t" for x in launch.scalars]
    assert kinds == ["pointer"] * 5 + passed
    assert launch.blocks == 3 * 6 * 2
    assert launch.scalars[1:] == (*range(1, 10), 6, 3, 300, 500, spec.headdim, spec.headdim_v, 1)


# ---- Which rows are whole vectors.


def test_alignment():
    x = torch.zeros(2, 5, 3, 64, dtype=FP16)
    aligned = cuda_forward.rows_are_vectors
    assert aligned(x, x, x)
    assert aligned(x[:, ::2], x[..., 8:24], x.expand(2, 5, 3, 64))
    assert not aligned(x[..., 1:33], x, x), "the base"
    assert not aligned(x, x[..., :36], x), "the length of a row"
    odd = torch.zeros(2, 5, 3, 67, dtype=FP16)[..., :64]
    assert not aligned(x, x, odd), "the stride of a row"
    one = torch.zeros(64, dtype=FP16).as_strided((1, 1, 1, 64), (7, 3, 5, 1))
    assert aligned(one, one, one), "strides of dimensions of size 1 mean nothing"


# ---- The registry's sentences.


@pytest.mark.parametrize(
    ("case", "target", "sentence"),
    [
        (Case(dtype=torch.float32), Target("cuda", "sm_90"), "cuda_v1 takes float16, bfloat16"),
        (Case(dtype=FP16, headdim=264), Target("cuda", "sm_90"), "up to 256, not 264"),
        (Case(dtype=FP16), Target("cpu", interpreter=True), "NVIDIA GPUs only, and q is on cpu"),
        (Case(dtype=FP16), Target("hip", "gfx942"), "NVIDIA GPUs only, and q is on hip"),
        (Case(dtype=FP16), Target("cuda", "sm_75"), "sm_80 (Ampere) or later, not sm_75"),
    ],
)
def test_refusals(case, target, sentence, monkeypatch):
    monkeypatch.setattr(registry, "_installed", lambda _: True)
    assert sentence in ROW.supports(case.spec(), target)
    assert ROW.supports(Case(dtype=FP16).spec(), Target("cuda", "sm_90")) is None


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(registry, "_installed", lambda package: package != "cuda.core")
    reason = ROW.supports(Case(dtype=FP16).spec(), Target("cuda", "sm_90"))
    assert reason == "cuda_v1 needs the optional packages: pip install triflash[cuda]."


def test_the_module_imports_without_the_extra():
    code = (
        "import sys\n"
        "sys.modules['cuda'] = sys.modules['cutlass_library'] = None\n"
        "import triflash.kernels.cuda.forward\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- The cache.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that only counts."""
    compiled: list[tuple] = []

    def compile_cubin(code, macros, arch, opt_level):
        compiled.append((code, macros, arch))
        return f"{len(compiled)}".encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_compile, "compile_cubin", compile_cubin)
    monkeypatch.setattr(cuda_compile, "_toolchain", lambda: ("13.0",))
    source = tmp_path / "kernel.cu"
    source.write_text("first")
    return source, compiled, tmp_path / "cache" / "triflash" / "cuda"


def test_the_cache_compiles_once(cache):
    source, compiled, folder = cache
    a = (("A", "1"),)
    assert cuda_compile.load_cubin(source, a, "sm_90") == b"1"
    assert cuda_compile.load_cubin(source, a, "sm_90") == b"1"
    assert len(compiled) == 1
    assert len(list(folder.iterdir())) == 1, "nothing but the result is left behind"


def test_the_cache_knows_what_decides_the_code(cache, monkeypatch):
    source, compiled, _ = cache
    a, b = (("A", "1"),), (("A", "2"),)
    cuda_compile.load_cubin(source, a, "sm_90")
    cuda_compile.load_cubin(source, b, "sm_90")
    cuda_compile.load_cubin(source, a, "sm_80")
    cuda_compile.load_cubin(source, a, "sm_90", 1)
    source.write_text("second")
    cuda_compile.load_cubin(source, a, "sm_90")
    monkeypatch.setattr(cuda_compile, "_toolchain", lambda: ("13.1",))
    cuda_compile.load_cubin(source, a, "sm_90")
    assert len(compiled) == 6


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: d + b"x"])
def test_a_damaged_file_is_compiled_anew(cache, damage):
    source, compiled, folder = cache
    cuda_compile.load_cubin(source, (), "sm_90")
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cuda_compile.load_cubin(source, (), "sm_90") == b"2"
    assert cuda_compile.load_cubin(source, (), "sm_90") == b"2"
    assert len(compiled) == 2


def test_a_cache_that_cannot_be_written_is_said_and_survived(cache):
    source, _, folder = cache
    folder.parent.parent.mkdir()
    folder.parent.write_text("a file where a folder should be")
    with pytest.warns(RuntimeWarning, match="compiled again"):
        assert cuda_compile.load_cubin(source, (), "sm_90") == b"1"


@needs_extra
def test_an_error_of_the_compiler_shows_its_log():
    with pytest.raises(Exception, match="does_not_exist"):
        cuda_compile.compile_cubin(
            'extern "C" __global__ void k() { does_not_exist(); }', (), "sm_90"
        )


def test_missing_headers_are_named():
    with pytest.raises(ImportError, match=r"CUTLASS \(cute/no.hpp\).*triflash\[cuda\]"):
        cuda_compile._find("CUTLASS", "cute/no.hpp", "triflash", "kernels", "no-such-name")


# ---- On a GPU.


@pytest.fixture
def run(device):
    """Compare with float64 and return out and lse."""
    reason = ROW.supports(Case(dtype=FP16).spec(), Target("cuda", "sm_90")) if GPU else "no GPU"
    if reason is not None:
        pytest.skip(reason)

    def run(q, k, v, **options):
        out, lse = attention(q, k, v, return_lse=True, implementation="cuda_v1", **options)
        expected, expected_lse = attention(
            q.double(), k.double(), v.double(), return_lse=True, implementation="reference",
            **options,
        )  # fmt: skip
        tolerance = 4e-3 if q.dtype == FP16 else 3e-2
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-3)
        return out, lse

    return run


def _inside(shape, device, dtype=FP16, base=0, pad=0, filler=float("nan")):
    """A view of `shape` in memory full of `filler`, `base` elements in, rows `pad` apart."""
    *rows, headdim = shape
    numbers = torch.randn(shape, device=device).to(dtype)
    memory = torch.full((base + numbers.numel() // headdim * (headdim + pad) + 64,), filler,
                        device=device, dtype=dtype)  # fmt: skip
    view = memory[base : base + numbers.numel() // headdim * (headdim + pad)]
    view = view.view(*rows, headdim + pad)[..., :headdim]
    view.copy_(numbers)
    return view


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("headdim", [33, 40, 64, 128, 250, 256])
@pytest.mark.parametrize(("base", "pad"), [(0, 0), (8, 8), (1, 0), (2, 6), (0, 1)])
def test_every_alignment(run, device, headdim, base, pad, causal):
    torch.manual_seed(0)
    q = _inside((2, 200, 4, headdim), device, base=base, pad=pad)
    k = _inside((2, 333, 2, headdim), device, base=base, pad=pad)
    v = _inside((2, 333, 2, headdim), device, base=base, pad=pad)
    out, _ = run(q, k, v, causal=causal)
    packed, _ = run(q.clone(), k.clone(), v.clone(), causal=causal)
    torch.testing.assert_close(out, packed, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
def test_first_call_in_a_thread(run, device):
    """A new thread has no CUDA context until somebody makes one current."""
    q = torch.randn(1, 64, 1, 64, device=device, dtype=FP16)
    expected, _ = run(q, q, q)
    torch.cuda.synchronize()
    got: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: got.append(attention(q, q, q, implementation="cuda_v1"))
    )
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(got[0], expected)


@pytest.mark.gpu
def test_captured_in_a_graph(run, device):
    q = torch.randn(2, 300, 2, 64, device=device, dtype=FP16)
    run(q, q, q, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, q, q, causal=True, implementation="cuda_v1")
    for _ in range(2):
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.testing.assert_close(out, run(q, q, q, causal=True)[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_a_new_process_finds_what_the_last_one_compiled(run, tmp_path):
    code = (
        "import torch\n"
        "from triflash import attention\n"
        "q = torch.randn(1, 64, 1, 32, device='cuda', dtype=torch.float16)\n"
        "attention(q, q, q, implementation='cuda_v1')\n"
        "torch.cuda.synchronize()\n"
    )

    def files() -> dict[Path, float]:
        folder = tmp_path / "triflash" / "cuda"
        return {path: path.stat().st_mtime for path in folder.iterdir()}

    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    first = files()
    assert len(first) == 1
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert files() == first
