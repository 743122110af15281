"""d256 without a mask at 512 and 1024: does placement, the draw, or company make it 0.120 or 0.146 ms? One GPU, 40 s. PYTHONPATH=src:peers"""
import json, os, random, statistics, time
from functools import lru_cache
import torch
import triflash.kernels.v3.forward as F3
from triflash import attention, tuning_v3
PREPARE, DRAWS = F3._prepare.__wrapped__, tuning_v3._draws
def prepared(draws):
    @lru_cache(4096)
    def prepare(*a):
        tuning_v3._draws = (lambda *_: draws) if draws is not None else DRAWS
        return PREPARE(*a)
    return prepare
P = {"static": prepared(False), "drawn": prepared(True)}
try: from fa3_fwd_interface import flash_attn_func as fa3
except Exception: fa3 = None
OUT = os.environ.get("OUT", "/tmp"); T0 = time.time(); rows = []
for n in (512, 1024):
    for trial in range(8):
        keep = [torch.empty(random.randrange(1, 64) << 20, device="cuda", dtype=torch.uint8) for _ in range(trial)]
        q, k, v = (torch.randn(16384 // n, n, 8, 256, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        def ours(name): F3._prepare = P[name]; return attention(q, k, v, implementation="v3")
        calls = {"static": lambda: ours("static"), "drawn": lambda: ours("drawn")}
        if fa3: calls["fa3"] = lambda: fa3(q, k, v)
        got = {x: [] for x in calls}
        for x in calls: calls[x]()
        for r in range(5):
            order = list(calls); random.shuffle(order)
            for x in order:
                for _ in range(150): calls[x]()
                a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab"); a.record()
                for _ in range(500): calls[x]()
                b.record(); b.synchronize(); got[x].append(a.elapsed_time(b) / 500 * 1e3)
        rows.append((n, trial, got))
        print(n, trial, hex(q.data_ptr()), {x: (round(statistics.median(y), 1), round(min(y), 1), round(max(y), 1)) for x, y in got.items()}, round(time.time() - T0), flush=True)
        del keep, q, k, v; torch.cuda.empty_cache()
json.dump(rows, open(f"{OUT}/puzzle.json", "w"))
