"""Record v3's launch on meta tensors and compile it: what a user's call would compile."""
import sys, os; sys.path.insert(0, "wip/v3"); sys.path.insert(0, "tests")
from v3_aot import *
import torch, aot
from triflash import registry, spec as S
from triflash.target import Target
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
TY = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
def compile_call(**kw):
    _, target, _ = aot.TARGETS["sm_90"]
    [l] = aot.record_call(target, "v3", **kw) if 0 else rec(target, **kw)
    sig, const, attrs = {}, {}, {}
    vals = (*l.args, *l.constexprs)
    assert len(vals) == len(l.kernel.params), (len(vals), len(l.kernel.params))
    for i, (p, v) in enumerate(zip(l.kernel.params, vals)):
        if p.is_constexpr: sig[p.name] = "constexpr"; const[(i,)] = v
        elif isinstance(v, TensorDescriptor):
            sig[p.name] = f"tensordesc<{TY[v.base.dtype]}{v.block_shape},{v.layout!r}>"
        elif isinstance(v, torch.Tensor): sig[p.name] = "*" + TY[v.dtype]; attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(v, float): sig[p.name] = "fp32"
        else: sig[p.name] = "i32"
    t = time.time()
    c = triton.compile(GluonASTSource(l.kernel, sig, const, attrs), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 1})
    return c, time.time() - t, l
def rec(target, dtype=torch.bfloat16, headdim=128, headdim_v=None, causal=False, batch=2, nheads=4, nheads_k=4, seqlen=1024, seqlen_k=None, softmax_scale=None):
    import triflash.kernels.v3.forward as F
    headdim_v = headdim_v or headdim; seqlen_k = seqlen_k or seqlen
    e = lambda *s: torch.empty(*s, dtype=dtype, device="meta")
    q, k, v = e(batch, seqlen, nheads, headdim), e(batch, seqlen_k, nheads_k, headdim), e(batch, seqlen_k, nheads_k, headdim_v)
    spec = S.make_spec(q, k, v, softmax_scale, causal, False, False)
    row = registry.get("v3"); assert row.supports(spec, target) is None, row.supports(spec, target)
    with aot.recorded(target, row) as ls:
        F.forward(q, k, v, spec)
    return ls
if __name__ == "__main__":
    for name, kw in {
        "d128": {}, "d64cb": dict(headdim=64, causal=True), "d64h": dict(headdim=64, dtype=torch.float16), "d128h": dict(dtype=torch.float16), "d128c": dict(causal=True), "d64": dict(headdim=64), "d64c tail": dict(headdim=64, causal=True, seqlen=1000, dtype=torch.float16, nheads_k=2),
        "d128 tail": dict(seqlen_k=1000), "d96": dict(headdim=96), "neg": dict(headdim=64, softmax_scale=-.5), "zero": dict(headdim=64, softmax_scale=0.0, causal=True),
        "d256": dict(headdim=256), "d256c": dict(headdim=256, causal=True), "192/128": dict(headdim=192, headdim_v=128, causal=True), "d32": dict(headdim=32), "d16/8": dict(headdim=16, headdim_v=8), "64/256": dict(headdim=64, headdim_v=256), "256/64": dict(headdim=256, headdim_v=64),
    }.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]: continue
        try:
            c, dt, l = compile_call(**kw)
            s = report(f"{name} {l.grid} {l.config}", c, dt)
            print("   ", {k: len(re.findall(r"\b"+k+r"\b", s)) for k in ("PRMT", "MOV", "F2FP", "MUFU", "FSEL", "ISETP", "SHFL")})
            open(f"/tmp/w/v3/{name.replace('/','_').replace(' ','_')}.sass", "w").write(s)
        except Exception as ex:
            print(name, "FAILED", type(ex).__name__, str(ex)[-300:])
