"""Calls of v3's backward with fields of its configuration changed, their times and their errors."""
from __future__ import annotations
import os, random, statistics, sys, time
from dataclasses import replace
from functools import lru_cache
import torch, triton
import triton.language as tl
from triflash import mods, tuning_v3
from triflash.testing import Case, make_inputs, check_case
from triflash.kernels.v3 import backward as B3, forward as F3
DRY = os.environ.get("DRY")  # no GPU: launches do nothing
DEVICE = "cpu" if DRY else "cuda"
tuned = tuning_v3.backward
prepare = B3._prepare.__wrapped__
if DRY:
    from triflash.kernels.common.launch import Launch
    from triflash.target import Target
    Launch.__call__ = lambda self, *tensors, programs=None: self.arguments(tensors)
    F3.target_of = B3.target_of = lambda _: Target("cuda", "sm_90", 132)
    torch.cuda.synchronize = lambda: None
def use(over, cache=None):
    """From now on v3's backward runs with these fields of its config changed."""
    tuning_v3.backward = lambda s, t: replace(tuned(s, t), **over)
    B3._prepare = cache if cache is not None else lru_cache(prepare)
# What main has for windows, and what the branch has.
MAIN = dict(ordered=False, late_dp=False, late_dv=True, fold=True)
ORD = dict(ordered=True, late_dp=False, late_dv=True, fold=False, backwards=False, splits=1)
def W(left, right=0): return {"window_size": (left, right)}
def call(S=8192, SK=None, B=2, H=16, HK=None, D=128, deterministic=False, over={}, **fields):
    case = Case(batch=B, seqlen_q=S, seqlen_k=SK or S, nheads=H, nheads_k=HK or H, headdim=D, dtype=torch.bfloat16, **{"causal": True, **fields})
    inputs = make_inputs(case, DEVICE)
    spec = case.spec_of(inputs.q, inputs.k, inputs.v, inputs.extras)
    out, lse, _ = F3.forward(inputs.q, inputs.k, inputs.v, spec)
    spec = replace(spec, deterministic=deterministic)
    cache = lru_cache(prepare)
    args = (inputs.dout, None, inputs.q, inputs.k, inputs.v, out, lse, [], spec)
    def run():
        use(over, cache); return B3.backward(*args)
    use(over)
    run.config = tuning_v3.backward(spec, B3.target_of(inputs.q.device))
    return run
def make(V, tell=False):
    vs = []
    for name, options in V:
        try:
            f = call(**options); f(); torch.cuda.synchronize(); vs.append((name, f))
            if tell: print("done", name, flush=True)
        except Exception as e:
            while e.__cause__ is not None: e = e.__cause__
            print("FAIL", name, type(e).__name__, str(e)[-250:].replace("\n", " "), flush=True)
    return vs
@triton.jit
def probe_kernel(Out):
    x = tl.zeros([1], tl.int32)
    cycles, ns = tl.inline_asm_elementwise("""{.reg .u64 g0, g1, c0, c1; .reg .pred p;
        mov.u64 g0, %globaltimer; mov.u64 c0, %clock64;
        SPIN: mov.u64 g1, %globaltimer; sub.u64 g1, g1, g0; setp.lt.u64 p, g1, 30000; @p bra SPIN;
        mov.u64 c1, %clock64; sub.u64 c1, c1, c0; cvt.u32.u64 $0, c1; cvt.u32.u64 $1, g1; add.u32 $0, $0, $2;}""",
        "=r,=r,r", [x], dtype=(tl.int32, tl.int32), is_pure=False, pack=1)
    tl.store(Out + tl.arange(0, 1), cycles)
    tl.store(Out + 1 + tl.arange(0, 1), ns)
SEEN = {}
def turn(f, ms, name=None):
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(); t = time.time(); f(); f(); torch.cuda.synchronize(); one = (time.time() - t) / 2
    n = max(1, round(ms / 1000 / one)); a.record()
    for _ in range(n): f()
    b.record()
    if name is not None:
        out = torch.zeros(2, dtype=torch.int32, device="cuda")
        probe_kernel[(1,)](out, num_warps=1); c, ns = out.tolist(); SEEN.setdefault(name, []).append(1000 * c / ns)
    torch.cuda.synchronize(); return a.elapsed_time(b) / n
def measure(V, seconds, rounds=9, settle=25, ms=40):
    """Each name is "group, arm", in turns; times of the group's arms main and shipped over this one's."""
    vs = make(V)
    end = time.time() + seconds
    for n, f in vs[:3]: turn(f, 60)
    times = {n: [] for n, _ in vs}
    for r in range(rounds):
        if time.time() > end: break
        random.Random(r).shuffle(vs)
        for n, f in vs: turn(f, settle); times[n].append(turn(f, ms, n))
    for name, _ in V:
        if not times.get(name): continue
        m, text = statistics.median(times[name]), ""
        for base in ("main", "shipped"):
            other = times.get(f"{name.split(',')[0]}, {base}")
            if other and not name.endswith(f" {base}"):
                won = sum(a < b for a, b in zip(times[name], other))
                text += f" | {base}/it {statistics.median(other) / m:.3f} faster in {won}"
        print(f"{name:28s} {m:7.4f} ms ({min(times[name]):.4f} {max(times[name]):.4f}) n{len(times[name])} {statistics.median(SEEN[name]):.0f} MHz{text}", flush=True)
def check(cases, deadline):
    """CASES of (name, case, changes): twice within the budget on poisoned memory, and the bits of gradients 20 times."""
    for name, case, over in cases:
        if time.time() > deadline: print("LATE", name, case, flush=True); continue
        t = time.time()
        try:
            use(over)
            for again in range(2):
                records = check_case(case, "v3", DEVICE)
                bad = [f"{r.name} {r.error:.2e}>{r.allowed:.2e}" for r in records if not r.ok]
                if bad: break
            if over.get("ordered") and not bad:
                inputs = make_inputs(case, DEVICE)
                spec = case.spec_of(inputs.q, inputs.k, inputs.v, inputs.extras)
                _, extras = mods.features_of(**inputs.extras)
                extras = tuple(e.detach() for e in extras)
                out, lse, _ = F3.forward(inputs.q, inputs.k, inputs.v, spec, extras)
                args = (inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v, out, lse, [], spec, extras)
                use(over)
                first = B3.backward(*args)
                for again in range(20):
                    bad = [n for n, x, y in zip(("dq", "dk", "dv"), first, B3.backward(*args)) if not torch.equal(x, y)]
                    if bad: bad = [f"other bits of {bad} in run {again}"]; break
            del records; torch.cuda.empty_cache()
            print("BAD" if bad else "ok", name, case, *bad, f"{time.time() - t:.1f}s", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
        except Exception as e:
            while e.__cause__ is not None: e = e.__cause__
            print("BAD", name, case, type(e).__name__, str(e)[-300:].replace("\n", " "), flush=True)
