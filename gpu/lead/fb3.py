"""fb3.py KIND LIMIT: paper, variants, overhead or other presets over the GPUs there are."""
import os, sys, time, subprocess, pathlib
out = pathlib.Path(os.environ["OUT"])
kind, limit = sys.argv[1], float(sys.argv[2])
n = int(os.environ["LEAD_GPUS"]) if kind != "overhead" else 1  # overhead: call with GPU index
if len(sys.argv) == 3 and kind != "none":
    t = time.time()
    procs = [subprocess.Popen([sys.executable, __file__, kind, str(limit), str(g)], env={**os.environ, "CUDA_VISIBLE_DEVICES": str(g), "OMP_NUM_THREADS": "4"}) for g in range(n)]
    [p.wait() for p in procs]
    print(kind, "all", round(time.time() - t, 1)); sys.exit()
g = int(sys.argv[3])
t0 = time.monotonic()
import torch
from dataclasses import replace
from triflash.bench import cases, runner, record
from triflash.bench.cases import Plan
PLANS = {"paper": Plan("sustained", rounds=5, round_ms=80, settle_ms=40), "variants": Plan("sustained", rounds=5, round_ms=60, settle_ms=40)}
def plan_of(p): return PLANS.get(p.name, p.plan)
session = runner.Session(torch.device("cuda"), plan_of, commit=os.environ["COMMIT"], deadline=t0 + limit)
def save():
    for name in {r["preset"] for r in session.records}:
        record.save(out / f"{name}_{g}.json", [r for r in session.records if r["preset"] == name])
session.on_record = save
work = []
if kind == "paper":
    paper = cases.PRESETS["paper"]
    names = ["v3", "v2", "sdpa_flash", "sdpa_cudnn", "fa3_fwd", "fa4"]
    UNITS = {
        0: [(64, False, 0, 6), (256, True, 0, 3)],
        1: [(64, True, 0, 6), (256, True, 3, 6)],
        2: [(128, False, 0, 6), (256, False, 0, 3)],
        3: [(128, True, 0, 6), (256, False, 3, 6)],
    }
    for k in range(g, 4, n):
        for d, causal, a, b in UNITS[k]:
            cells = [c for c in paper.cells() if c.case.headdim == d and c.case.causal == causal][a:b]
            work += runner.jobs([replace(paper, cells=lambda cells=cells: cells)], names, session.device, shrink=False)
elif kind == "variants":
    var = cases.PRESETS["variants"]
    cells = sorted(var.cells(), key=lambda c: -c.case.seqlen_q)[g::n]
    work += runner.jobs([replace(var, cells=lambda: cells)], None, session.device, shrink=False)
else:
    names = kind.split(",")
    peers = ["v3", "v2", "sdpa_flash", "sdpa_cudnn", "fa3_fwd", "fa4", "flex"] if kind == "overhead" else None
    for name in names[g::n]:
        work += runner.jobs([cases.PRESETS[name]], peers, session.device, shrink=False)
for job in work:
    t = time.time()
    try:
        with runner.device_context(session.device): runner.measure_job(job, session)
    except runner.OutOfTime:
        print(g, "out of time before", job.preset.name, job.cell.case, flush=True); break
    except Exception as e:
        print(g, job.cell.case, repr(e)[:300], flush=True)
    if time.time() - t > 12: print(g, job.preset.name, str(job.cell.case)[:60], round(time.time() - t, 1), flush=True)
print(g, kind, "done", round(time.monotonic() - t0, 1), len(session.records), flush=True)
