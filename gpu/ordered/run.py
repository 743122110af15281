import multiprocessing as mp, os, sys, time
T0 = float(os.environ.get("T0", time.time()))
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
import torch, triton
import triflash.reference
from common import *
OUT = os.environ.get("OUT", "out"); os.makedirs(OUT, exist_ok=True)
PORT = sys.argv[1:] == ["port"]  # the form that was measured in the fifth session, from port/src
def C(sq, sk=None, d=128, h=16, hk=8, b=2, **f):
    return Case(batch=b, seqlen_q=sq, seqlen_k=sk or sq, nheads=h, nheads_k=hk, headdim=d, with_dlse=True, **{"dtype": torch.bfloat16, "causal": True, **f})
CASES = [(f"w{w}", C(2100, **W(w)), ORD) for w in (0, 63, 64, 100, 300, 1024, 2000)]
CASES += [("longer keys", C(1024, 2000, **W(200)), ORD), ("far longer keys", C(100, 1500, **W(300)), ORD), ("a tile", C(65, **W(10)), ORD),
          ("short, many heads", C(70, h=200, hk=100, **W(20)), ORD), ("fp16", C(1000, dtype=torch.float16, **W(50)), ORD), ("120", C(1000, d=120, **W(100)), ORD),
          ("sinks", C(1000, sinks=torch.float32, **W(100)), ORD), ("MQA", C(1000, b=1, hk=1, **W(100)), ORD), ("odd heads", C(700, 1100, b=3, h=5, hk=5, **W(128)), ORD),
          ("not fold", C(1500, **W(300)), {**ORD, "fold": False}), ("many tiles", C(2048, b=8, hk=16, **W(128)), ORD),
          # not ordered: code that was touched, machine code that should be the same
          ("few keys", C(2000, 1500, **W(1024)), {}), ("both sides", C(1500, causal=False, **W(100, 200)), {}), ("96", C(1000, d=96, **W(100)), {}), ("causal", C(2100), {}), ("whole heads", C(512, b=33, h=8, hk=8), {}), ("main's", C(2100, **W(300)), MAIN)]
L = dict(over=MAIN); O = dict(over={})
V = [("causal,", dict())]
def arms(name, more=(), **options):
    global V
    V += [(f"{name}, main", {**options, **L}), (f"{name}, ordered", {**options, "over": dict(ORD)})] + [(f"{name}, {n}", {**options, "over": {**ORD, **o}}) for n, o in more]
arms("w1024", () if PORT else [("ordered not fold", dict(fold=False)), ("ordered late dv not fold", dict(fold=False, late_dp=False, late_dv=True)), ("ordered release", dict(release=True))], **W(1024))
arms("w256", **W(256))
arms("2048 w256", S=2048, B=8, **W(256))
if not PORT:
    arms("w128", **W(128)); arms("w2048", **W(2048)); arms("w4096", **W(4096))
    arms("512 of 8192 w1024", S=512, SK=8192, B=8, **W(1024)); arms("2048 of 8192 w1024", S=2048, SK=8192, B=8, **W(1024))
    arms("16/4 w1024", HK=4, **W(1024)); arms("1024 w1024/2", S=1024, B=16, **W(512))
    V += [("w1024 det, main", dict(deterministic=True, over={**MAIN, "backwards": True}, **W(1024))), ("w1024 det, ordered", dict(deterministic=True, over=ORD, **W(1024)))]
if DRY:
    V = [(n, {**o, "S": min(o.get("S", 256), 256), "SK": min(o.get("SK", 256), 512) if "SK" in o else None, "B": 1, "H": 4, "HK": 2 if "HK" in o else None, **({"window_size": (min(100, o["window_size"][0]), 0)} if "window_size" in o else {})}) for n, o in V]
def comp(i, n): make(V[i::n], True); print("compiled", i, f"{time.time()-T0:.0f}")
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
    if PORT:
        print("the form of the fifth session:", flush=True)
        p = ctx.Process(target=to, args=("port", measure, V, 4, 7, 25, 40), name="port"); go([p], 58.5)
        print(read("port")[-1200:], f"{time.time() - T0:.0f} s", flush=True); sys.exit()
    K, N = 8, 6
    go([ctx.Process(target=to, args=(f"check{i}", check, CASES, i, K, T0 + 27), name=f"check{i}") for i in range(K)]
       + [ctx.Process(target=to, args=(f"compile{i}", comp, i, N), name=f"compile{i}") for i in range(N)], 31)
    found = lines("check", K)
    print(f"checks: {sum(l.startswith('ok') for l in found)} ok of {len(CASES)}; {time.time() - T0:.0f} s")
    print("\n".join(l[:260] for l in found if not l.startswith("ok"))[:2500])
    done = {l[5:] for l in lines("compile", N) if l.startswith("done ")}
    print("not compiled:", [n for n, _ in V if n not in done], *[l for l in lines("compile", N) if l.startswith("FAIL")][:3], flush=True)
    p = ctx.Process(target=to, args=("times", measure, [v for v in V if v[0] in done], 13), name="times"); go([p], 49)
    print(read("times")[-4500:], f"{time.time() - T0:.0f} s", flush=True)
