"""Compile v3's backward kernels for what a call would launch; report. args: names"""
import sys, os; sys.path.insert(0, "wip/v3"); sys.path.insert(0, "tests")
from v3_aot import *
import torch, aot, dataclasses
from unittest import mock
from triflash import registry, spec as S, tuning
from triflash.kernels.common.launch import Launch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.compiler import ASTSource
TY = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
def record(dtype=torch.bfloat16, headdim=128, headdim_v=None, causal=False, batch=2, nheads=4, nheads_k=4, seqlen=1024, seqlen_k=None, softmax_scale=None, dlse=False, deterministic=False, change={}):
    import triflash.kernels.v3.backward as B
    target = aot.TARGETS["sm_90"][1]
    headdim_v = headdim_v or headdim; seqlen_k = seqlen_k or seqlen
    e = lambda *s: torch.empty(*s, dtype=dtype, device="meta")
    q, k, v = e(batch, seqlen, nheads, headdim), e(batch, seqlen_k, nheads_k, headdim), e(batch, seqlen_k, nheads_k, headdim_v)
    out = e(batch, seqlen, nheads, headdim_v); lse = torch.empty(batch, nheads, seqlen, device="meta")
    spec = S.make_spec(q, k, v, softmax_scale, causal, deterministic, False)
    ls = []
    def rec(l, *t): ls.append(aot.RecordedLaunch(l.kernel, l.grid, (*t, *l.scalars), l.constexprs, l.config))
    config = dataclasses.replace(tuning.v3_backward(spec, target), **change)
    B._prepare.cache_clear()
    with mock.patch.object(Launch, "__call__", rec), mock.patch.object(B, "target_of", return_value=target), mock.patch.object(tuning, "v3_backward", return_value=config):
        B.backward(torch.empty_like(out), torch.empty_like(lse) if dlse else None, q, k, v, out, lse, [], spec)
    return ls
def compile_launch(l):
    if not l.kernel.is_gluon(): 
        r = aot.compile_launch(l, GPUTarget("cuda", 90, 32)); return r
    sig, const, attrs = {}, {}, {}
    vals = (*l.args, *l.constexprs)
    assert len(vals) == len(l.kernel.params), (len(vals), len(l.kernel.params))
    for i, (p, v) in enumerate(zip(l.kernel.params, vals)):
        if p.is_constexpr: sig[p.name] = "constexpr"; const[(i,)] = v
        elif isinstance(v, TensorDescriptor): sig[p.name] = f"tensordesc<{TY[v.base.dtype]}{v.block_shape},{v.layout!r}>"
        elif isinstance(v, torch.Tensor): sig[p.name] = "*" + TY[v.dtype]; attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(v, float): sig[p.name] = "fp32"
        else: sig[p.name] = "i32"
    t = time.time()
    c = triton.compile(GluonASTSource(l.kernel, sig, const, attrs), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 1})
    return c, time.time() - t
def ptxas(ptx):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx); f.flush()
        return subprocess.run([BIN / "ptxas", "-v", "--gpu-name=sm_90a", f.name, "-o", "/dev/null"], capture_output=True, text=True).stderr
CALLS = {
    "d128": {}, "d128c": dict(causal=True), "d64": dict(headdim=64), "d64c": dict(headdim=64, causal=True),
    "d128tail": dict(seqlen=1000, seqlen_k=900), "d64gqa": dict(headdim=64, nheads_k=2, causal=True, seqlen=1000, dtype=torch.float16),
    "d128gqa": dict(nheads_k=2, causal=True, seqlen=1000, dtype=torch.float16, dlse=True),
    "d128cdet": dict(deterministic=True,causal=True), "d64tail": dict(headdim=64,seqlen_k=1000), "d64taildet": dict(headdim=64,seqlen_k=1000,causal=True,nheads_k=2,deterministic=True), "d128det": dict(deterministic=True), "d64det": dict(deterministic=True, headdim=64, causal=True), "d40": dict(headdim=40, headdim_v=72), "d16": dict(headdim=16, headdim_v=8),
}
VARIANTS = {"base": {}, "late": dict(late_dv=True), "early": dict(late_dv=False)}
if __name__ == "__main__":
    names = sys.argv[1].split(",") if len(sys.argv) > 1 else CALLS
    variants = sys.argv[2].split(";") if len(sys.argv) > 2 else ["base"]
    for name in names:
      for var in variants:
        try:
            for l in record(**CALLS[name], change=VARIANTS[var] if var in VARIANTS else eval(var)):
                r = compile_launch(l)
                if isinstance(r, tuple):
                    c, dt = r
                    s = report(f"{name} {var} {l.grid}", c, dt)
                    log = ptxas(c.asm["ptx"])
                    w = [x for x in log.splitlines() if "C75" in x or "serial" in x or "spill" in x or "arning" in x]
                    print("   ", {k: len(re.findall(r"\b"+k+r"\b", s)) for k in ("PRMT", "MOV", "F2FP", "MUFU", "FSEL", "LDS", "STS", "STSM")}, w)
                    open(f"/tmp/w/v3b/{name}_{var[:30]}.sass", "w").write(s); open(f"/tmp/w/v3b/{name}_{var[:30]}.ptx", "w").write(c.asm["ptx"])
                else: print("   ", r.name, "shared", r.shared, "regs", r.registers, "spills", r.spills)
        except Exception as ex:
            import traceback
            if os.environ.get("TB"): traceback.print_exc()
            print(name, var, "FAILED", type(ex).__name__, str(ex)[-700:])
