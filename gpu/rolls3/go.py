"""Rolling producers everywhere: bits, then times, beside what ships. go.py HALF OF DEADLINE"""
import json, multiprocessing as mp, os, random, statistics, sys, time
T0 = time.time()
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
from dataclasses import replace
from functools import lru_cache
import torch, triflash
import triflash.kernels.v3.forward as F3, triflash.block_mask, triflash.kernels.common.blocks
from triflash import attention, flash_attn_varlen_func, mods, tuning_v3
from triflash.bench import variants as BV, variant_mods
HALF, OF, DEADLINE = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
OUT = os.environ.get("OUT", "/tmp"); BF = torch.bfloat16
TUNED, PREPARE = tuning_v3.forward, F3._prepare.__wrapped__
R = dict(rolling=True)
FIELDS = {"base": None, "based": dict(dynamic=True), "roll": R, "rt": {**R, "turns": True}, "rh": {**R, "hold": False}, "rk3": {**R, "stages_k": 3}, "rs2": {**R, "stages": 2, "stages_k": 3}, "rnq": {**R, "q_in_registers": False}, "rq4": {**R, "slots_q": 4, "stages_k": 3}, "rd": {**R, "dynamic": True}, "rdt": {**R, "dynamic": True, "turns": True}, "rst": {**R, "dynamic": False}, "rsec": {**R, "section": 1}, "rsec4": {**R, "section": 4}, "rsecall": {**R, "section": 1 << 20}}
def prepared(fields):
    @lru_cache(4096)
    def prepare(*a):
        tuning_v3.forward = (lambda s, t: replace(TUNED(s, t), **fields)) if fields else TUNED
        return PREPARE(*a)
    return prepare
PREPARES = {name: prepared(f) for name, f in FIELDS.items()}
def use(name): F3._prepare = PREPARES[name]
def jobs():
    out = []
    B = dict(batch=2, n=8192, h=16, d=128, causal=True)
    def add(name, vs, **more): out.append((name, {**B, **more}, vs.split()))
    add("d96 8192", "base roll rt rh rk3 rs2 rnq rq4 rsec rsec4 rsecall rst", d=96)
    add("d96 full", "base based roll rd rdt rk3 rs2 rnq rq4", d=96, causal=False)
    add("d96 4096", "base roll rt rk3 rs2", d=96, n=4096, batch=4)
    add("d80 full", "base based roll rd", d=80, causal=False)
    add("d96 full 1024", "base roll rd", d=96, n=1024, batch=16, causal=False)
    add("fp16 d96", "base roll rt", d=96, fp16=1)
    add("c B4 n128 h16", "base roll rst", batch=4, n=128)
    add("c B1 n1024 h16", "base roll rst", batch=1, n=1024)
    add("c B1 n512 h16 d64", "base roll rst", batch=1, n=512, d=64)
    add("f B2 n1024 h16", "base roll rd", batch=2, n=1024, causal=False)
    add("f B1 n1024 h16", "base roll rd", batch=1, n=1024, causal=False)
    add("full window 512", "base roll rd", window_size=(512, 512), causal=False)
    add("d64 full window 512", "base roll rd", window_size=(512, 512), causal=False, d=64, h=32)
    add("full window 128", "base roll rd", window_size=(128, 128), causal=False)
    add("full alibi", "base roll rd", alibi=1, causal=False)
    add("d192 full", "base roll rd", d=192, h=8, causal=False)
    return out[HALF::OF]
def call_of(o):
    torch.manual_seed(1)
    o = dict(o); dt = torch.float16 if o.pop("fp16", 0) else BF
    b, n, h, d = (o.pop(x) for x in ("batch", "n", "h", "d")); nk = o.pop("nk", n); hk = o.pop("hk", h)
    q = torch.randn(b, n, h, d, device="cuda", dtype=dt); k, v = (torch.randn(b, nk, hk, d, device="cuda", dtype=dt) for _ in "kv")
    if o.pop("alibi", 0): o["alibi_slopes"] = torch.tensor([2.0 ** (-8 * (i + 1) / h) for i in range(h)], device="cuda")
    if o.pop("sinks", 0): o["sinks"] = torch.randn(h, device="cuda")
    if o.pop("mod", 0): o["score_mod"] = variant_mods.SOFT_SIGN; o["aux"] = (30.0,)
    if o.pop("packed", 0):
        lens = torch.randint(200, 1800, (14,)).tolist(); lens.append(16384 - sum(lens)); cu = torch.tensor([0] + lens).cumsum(0).int().cuda()
        q, k, v = (x.reshape(b * n, -1, d) for x in (q, k, v)); c = o["causal"]
        return lambda: flash_attn_varlen_func(q, k, v, cu, cu, max(lens), max(lens), causal=c, implementation="v3")
    if o.pop("docs", 0):
        ids = (torch.arange(n, device="cuda") // 1000).int().expand(b, n).contiguous()
        c = o.pop("causal")
        o["block_mask"] = triflash.create_block_mask(variant_mods.SAME_DOCUMENT, b, None, n, n, causal=c, aux=(ids,))
    return lambda: attention(q, k, v, implementation="v3", **o)
def child(i, n, path):
    f = open(path, "w"); os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2); sys.stdout = os.fdopen(1, "w", buffering=1)
    for name, o, vs in LIST[i::n]:
        print("begin", name)
        try:
            call = call_of(o); got = {}
            for x in vs:
                use(x); a = [call() for _ in range(3)]; torch.cuda.synchronize()
                a = [y[0] if isinstance(y, tuple) else y for y in a]
                got[x] = a[0]
                if not (torch.equal(a[0], a[1]) and torch.equal(a[0], a[2])): print("BAD runs differ", name, x)
                if not a[0].isfinite().all(): print("BAD nan", name, x)
            for x in vs[1:]: print("ok" if torch.equal(got[vs[0]], got[x]) else "BAD", name, x, (got[vs[0]].float() - got[x].float()).abs().max().item())
        except Exception as ex: print("BAD", name, type(ex).__name__, str(ex)[-250:].replace("\n", " "))
        call = got = a = None; torch.cuda.empty_cache()
LIST = jobs()
if len(sys.argv) > 4:
    name, o, vs = next(j for j in LIST if j[0] == sys.argv[4]); call = call_of(o); use(sys.argv[5])
    for _ in range(4): call()
    torch.cuda.synchronize(); sys.exit()
if __name__ == "__main__":
    ctx = mp.get_context("fork"); n = 20; ps = []
    for i in range(n):
        p = ctx.Process(target=child, args=(i, n, f"{OUT}/c{HALF}_{i}.txt")); p.start(); ps.append(p)
    while time.time() < T0 + 45 and any(p.is_alive() for p in ps): time.sleep(.1)
    dead = [p for p in ps if p.is_alive()]; [p.kill() for p in dead]
    lines = [l for i in range(n) for l in open(f"{OUT}/c{HALF}_{i}.txt").read().splitlines()]
    bad = [l for l in lines if not l.startswith(("ok", "begin"))]
    print(f"half {HALF}: {sum(l.startswith('ok') for l in lines)} ok of {sum(len(j[2]) - 1 for j in LIST)}, {len(bad)} other, {len(dead)} killed at {time.time()-T0:.0f} s", flush=True)
    for l in bad[:8]: print(l[:260])
    table = {}
    for name, o, vs in LIST:
        if time.time() > T0 + DEADLINE - 2: print("no time for", name); continue
        try: call = call_of(o)
        except Exception as ex: print("no", name, str(ex)[:100]); continue
        est, got = {}, {x: [] for x in vs}
        for x in vs:
            use(x); call(); a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab"); a.record(); [call() for _ in range(5)]; b.record(); b.synchronize(); est[x] = max(a.elapsed_time(b) / 5e3, 2e-5)
        for r in range(9):
            order = list(vs); random.shuffle(order)
            for x in order:
                use(x)
                for _ in range(int(.012 / est[x]) + 1): call()
                m = int(.035 / est[x]) + 1
                a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab"); a.record()
                for _ in range(m): call()
                b.record(); b.synchronize(); got[x].append(a.elapsed_time(b) / m)
        med = {x: statistics.median(y) for x, y in got.items()}
        wins = {x: sum(p < q for p, q in zip(got[x], got[vs[0]])) for x in vs}
        table[name] = got
        print(f"{name:22s} {vs[0]} {med[vs[0]]*1e3:7.1f} us", " ".join(f"{x} {med[vs[0]] / y:.3f} ({wins[x]}/9)" for x, y in med.items() if x != vs[0]), flush=True)
    json.dump(table, open(f"{OUT}/rolls{HALF}.json", "w"))
    print(f"half {HALF} ends at {time.time()-T0:.0f}")
