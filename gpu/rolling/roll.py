"""Plain calls with and without a rolling producer, at short lengths. One H200, <= 60 s."""
import json, os, random, statistics, sys, time, multiprocessing
T0 = time.time()
sys.path[:0] = ["src", "tests"]
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
from dataclasses import replace
from unittest import mock
import torch, triton
from triflash import mods, tuning, spec as S
from triflash.kernels.v3 import forward as F
from triflash.kernels.common.launch import kinds
from triflash.target import target_of
OUT = os.environ.get("OUT", "/tmp")
def say(*a): print(*a, flush=True)
KEEP = []
def launcher(q, k, v, causal, roll):
    features, extras = mods.features_of()
    target = target_of(q.device)
    sp = S.make_spec(q, k, v, None, bool(causal), False, False, True, features, extras)
    config = replace(tuning.v3_forward(sp, target), rolling=roll)
    with mock.patch.object(tuning, "v3_forward", return_value=config):
        launch, behind, _ = F._prepare.__wrapped__(sp, target, q.device, q.stride(), k.stride(), v.stride(), kinds(*extras), S.NOT_PACKED.given, False)
    out = torch.full_like(q, float("nan")); lse = torch.full(sp.lse_shape(q), float("nan"), dtype=torch.float32, device=q.device)
    counter = torch.zeros(32, dtype=torch.int32, device=q.device)
    KEEP.append((out, lse, counter, q, k, v))
    def call():
        launch(q, k, v, out, q, k, v, out, lse, counter, None, *extras)
        if behind is not None: behind(q, k, v, out, q, k, v, out, lse, counter, None, *extras)
        return out
    return call
CELLS = [(d, c, n) for n in (1024, 512, 2048, 4096) for d in (128, 64, 256) for c in (1, 0)]
def tensors(d, n):
    h = max(1, 2048 // d)
    return [torch.randn(16384 // n, n, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
JOBS = [(*cell, r) for cell in CELLS for r in (False, True)]
def child(i, n, path):
    f = open(path, "w"); os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2); sys.stdout = os.fdopen(1, "w", buffering=1)
    for d, c, m, r in JOBS[i::n]:
        try:
            q, k, v = tensors(d, m); a = launcher(q, k, v, c, r)()
            want = torch.nn.functional.scaled_dot_product_attention(*(x[:2].float().transpose(1, 2) for x in (q, k, v)), is_causal=bool(c)).transpose(1, 2)
            e = (a[:2].float() - want).abs().max().item(); bad = KEEP[-1][0].isnan().any().item() or KEEP[-1][1].isnan().any().item()
            print("ok" if e < .03 and not bad else "BAD", d, c, m, r, f"{e:.1e}"); KEEP.clear()
        except Exception as ex: print("BAD", d, c, m, r, type(ex).__name__, str(ex)[-200:].replace("\n", " "))
if __name__ == "__main__":
    ctx = multiprocessing.get_context("fork"); n = 12; ps = []
    for i in range(n):
        p = ctx.Process(target=child, args=(i, n, f"{OUT}/r{i}.txt")); p.start(); ps.append(p)
    while time.time() < T0 + 32 and any(p.is_alive() for p in ps): time.sleep(.1)
    [p.kill() for p in ps if p.is_alive()]
    lines = [l for i in range(n) for l in open(f"{OUT}/r{i}.txt").read().splitlines()]
    bad = [l for l in lines if not l.startswith("ok")]
    say(f"checks: {len(lines)-len(bad)} ok of {len(JOBS)}, {len(bad)} other at {time.time()-T0:.0f} s")
    for l in bad[:8]: say(l[:220])
    try: from fa3_fwd_interface import flash_attn_func as fa3
    except Exception as e: fa3 = None; say("no fa3", str(e)[:80])
    table = {}
    for d, c, m in CELLS:
        if time.time() > T0 + 54: say("no time for", d, c, m); continue
        KEEP.clear(); q, k, v = tensors(d, m)
        calls = {"base": launcher(q, k, v, c, False), "rolling": launcher(q, k, v, c, True)}
        if fa3 is not None: calls["fa3"] = lambda: fa3(q, k, v, causal=bool(c))
        got = {x: [] for x in calls}; est = {}
        for x, fn in calls.items():
            fn(); a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab"); a.record(); [fn() for _ in range(5)]; b.record(); b.synchronize(); est[x] = max(a.elapsed_time(b) / 5e3, 1e-5)
        for r in range(5):
            order = list(calls); random.shuffle(order)
            for x in order:
                fn = calls[x]
                for _ in range(int(.01 / est[x]) + 1): fn()
                k_ = int(.04 / est[x]) + 1
                a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab"); a.record()
                for _ in range(k_): fn()
                b.record(); b.synchronize(); got[x].append(a.elapsed_time(b) / k_)
        med = {x: statistics.median(y) for x, y in got.items()}
        table[f"d{d}{'fc'[c]} {m}"] = got
        say(f"d{d}{'fc'[c]} {m}: base {med['base']*1e3:.1f} us; of base:", " ".join(f"{x} {med['base'] / y:.3f}" for x, y in med.items() if x != "base"))
    json.dump(table, open(f"{OUT}/rolling.json", "w"))
    say(f"ends at {time.time()-T0:.0f}")
