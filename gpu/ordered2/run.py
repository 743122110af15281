import multiprocessing as mp, os, sys, time
T0 = float(os.environ.get("T0", time.time()))
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
import torch, triton
import triflash.reference
from common import *
OUT = os.environ.get("OUT", "out"); os.makedirs(OUT, exist_ok=True)
def C(sq, sk=None, d=128, h=4, hk=2, b=1, **f):
    return Case(batch=b, seqlen_q=sq, seqlen_k=sk or sq, nheads=h, nheads_k=hk, headdim=d, with_dlse=True, **{"dtype": torch.bfloat16, "causal": True, **f})
# Some 4 GB a case in float64; a process's cases share their kernels.
CHECKS = [
    [(f"w{w}", C(2100, **W(w)), ORD) for w in (0, 63, 64, 1024, 2000)] + [("MQA", C(1000, hk=1, **W(100)), ORD)],
    [("w2048", C(2560, h=2, **W(2048)), ORD), ("many tiles", C(640, b=4, h=16, hk=16, **W(128)), ORD), ("104", C(1024, d=104, h=2, **W(100)), ORD),
     ("112/128", C(1024, d=112, headdim_v=128, h=2, **W(300)), ORD), ("odd heads", C(1024, b=3, h=5, hk=5, **W(127)), ORD)],
    [("fp16", C(1000, dtype=torch.float16, **W(50)), ORD), ("sinks", C(1000, sinks=torch.float32, **W(100)), ORD), ("a tile", C(65, **W(10)), ORD)],
    [("longer keys", C(512, 2000, **W(200)), ORD), ("longer keys, as shipped", C(512, 2000, **W(200)), {}), ("main's", C(2100, **W(300)), MAIN)],
]
V = [("causal,", dict())]
ORDERS = {"late dp": dict(late_dp=True, late_dv=False, fold=True), "late dv": dict(fold=True), "release": dict(release=True)}
def arms(name, *more, **options):
    V.extend([(f"{name}, main", {**options, "over": MAIN}), (f"{name}, shipped", {**options, "over": {}})])
    V.extend((f"{name}, {n}", {**options, "over": {**ORD, **ORDERS[n]}}) for n in more)
arms("w1024", *ORDERS, **W(1024))
arms("w2048", "late dp", "release", **W(2048))
arms("w512", **W(512))
arms("w256", "late dp", "release", **W(256))
arms("w1024 d112", D=112, **W(1024))
arms("w1024 d104", D=104, **W(1024))
arms("4096 w2048", S=4096, B=4, **W(2048))
arms("16/4 w1024", HK=4, **W(1024))
V += [(f"512 of 8192 w1024, {n}", dict(S=512, SK=8192, B=8, over=o, **W(1024))) for n, o in (("shipped", {}), ("ordered", ORD))]  # shipped is main's
if DRY:
    V = [(n, {**o, "S": min(o.get("S", 2560), 2560), "B": 8 if "HK" in o else 1, "H": 16 if "HK" in o else 2}) for n, o in V]
def comp(i, n):
    """Each process begins with a kernel that no other begins with."""
    for v in sorted(V, key=lambda v: v[0].split(",")[0] not in ("causal", "w1024", "16/4 w1024"))[i::n]:
        make([v], True); torch.cuda.empty_cache()
    print("compiled", i, f"{time.time() - T0:.0f}")
def to(name, f, *a):
    fd = open(f"{OUT}/{name}.txt", "w", buffering=1); sys.stdout = sys.stderr = fd
    f(*a)
def read(name): return open(f"{OUT}/{name}.txt").read() if os.path.exists(f"{OUT}/{name}.txt") else ""
def lines(name, n): return [l for i in range(n) for l in read(f"{name}{i}").splitlines()]
if __name__ == "__main__":
    ctx = mp.get_context("fork")
    def go(jobs, limit):
        """Runs them, and ends what hangs."""
        for p in jobs: p.start()
        for p in jobs:
            p.join(max(0.1, limit - (time.time() - T0)))
            if p.is_alive(): p.kill(); print("killed", p.name, flush=True)
    if DRY:
        make(V, True); print([(n, call(**o).config.ordered) for n, o in V]); sys.exit()
    K, N = len(CHECKS), 8
    go([ctx.Process(target=to, args=(f"check{i}", check, CHECKS[i], T0 + 20), name=f"check{i}") for i in range(K)]
       + [ctx.Process(target=to, args=(f"compile{i}", comp, i, N), name=f"compile{i}") for i in range(N)], 24)
    found = lines("check", K)
    print(f"checks: {sum(l.startswith('ok') for l in found)} ok of {sum(map(len, CHECKS))}; {time.time() - T0:.0f} s")
    print("\n".join(l[:260] for l in found if not l.startswith("ok"))[:2500])
    done = {l[5:] for l in lines("compile", N) if l.startswith("done ")}
    print("not compiled:", [n for n, _ in V if n not in done], *[l for l in lines("compile", N) if l.startswith("FAIL")][:3], flush=True)
    while not os.path.exists(f"{OUT}/pytest.done") and time.time() - T0 < 26: time.sleep(0.1)  # times are of a GPU that nobody shares
    p = ctx.Process(target=to, args=("times", measure, [v for v in V if v[0] in done], 11, 9, 12, 25), name="times"); go([p], 41)
    print(read("times")[-5500:], f"{time.time() - T0:.0f} s", flush=True)
