"""Compile v3's forward for sm_90a without a GPU and report on its machine code."""
import os, re, subprocess, sys, tempfile, time
os.environ.setdefault("TRITON_CACHE_DIR", "/tmp/w/v3/cache")
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"

def layout(rows, d):
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, d], gl.bfloat16)

def desc(rows, d, ty="bf16"):
    return f"tensordesc<{ty}[1, 1, {rows}, {d}],{layout(rows, d)!r}>"

def sass_of(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin); f.flush()
        s = subprocess.run([BIN / "nvdisasm", "-c", f.name], capture_output=True, text=True).stdout
        u = subprocess.run([BIN / "cuobjdump", "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
    return s, re.search(r"REG:(\d+) STACK:(\d+)", u)

def build(d=128, dv=None, block_n=128, stages=2, consumers=2, causal=False, check=False, sign=1, dynamic=None, extra=None, ty="bf16", kernel=None):
    from triflash.kernels.v3 import forward
    kernel = kernel or forward.forward_kernel
    dv = dv or d
    names = [p.name for p in kernel.params]
    sig = dict(Q=desc(64, d, ty), K=desc(block_n, d, ty), V=desc(block_n, dv, ty), Out=desc(64, dv, ty),
               Lse="*fp32", Counter="*i32", softmax_scale="fp32")
    const = dict(BLOCK_N=block_n, STAGES=stages, CONSUMERS=consumers, CAUSAL=causal, CHECK_KEYS=check,
                 SCALE_SIGN=sign, DYNAMIC=causal if dynamic is None else dynamic)
    const.update(extra or {})
    for n in names:
        if n in const: sig[n] = "constexpr"
        elif n not in sig: sig[n] = "i32"
    sig = {n: sig[n] for n in names}
    consts = {(i,): const[n] for i, n in enumerate(names) if n in const}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in ("Lse", "Counter")}
    src = GluonASTSource(kernel, sig, consts, attrs)
    t = time.time()
    c = triton.compile(src, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return c, time.time() - t

def report(name, c, dt):
    s, u = sass_of(c.asm["cubin"])
    print(f"{name}: {dt:.1f}s shared {c.metadata.shared} reg/stack {u[1]}/{u[2]} HGMMA {s.count('HGMMA')} "
          f"BAR {len(re.findall(r'BAR.SYNC', s))} USETMAXREG {s.count('USETMAXREG')} STL {s.count('STL')} LDL {s.count('LDL')} "
          f"WARPSYNC {s.count('WARPSYNC')} lines {s.count(chr(10))}", flush=True)
    return s
