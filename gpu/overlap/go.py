import json, multiprocessing as mp, os, random, statistics, sys, time
T0 = time.time()
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
from dataclasses import replace
import torch, triton
import triton.language as tl
import triflash.kernels.v3.forward as F3, triflash.reference, triflash.block_mask, triflash.kernels.common.blocks
from triflash import attention, flash_attn_varlen_func, mods, tuning_v3
from triflash.bench import variants as BV, variant_mods
from triflash.kernels.common.launch import kinds
from triflash.kernels.v3.packed import list_blocks, most_blocks
from triflash.spec import NOT_PACKED, Sequences, make_varlen_spec
from triflash.target import target_of
from triflash.testing import Case, compare, make_inputs, run_case
from vs import CELLS, CHECKED, CHECKS
OUT = os.environ.get("OUT", "/tmp/overlap-out"); BF = torch.bfloat16
TUNED = tuning_v3.forward
def use(fields):
    tuning_v3.forward = lambda s, t: replace(TUNED(s, t), **fields)
    F3._prepare.cache_clear()
@triton.jit
def gaps(b, h, q_idx, kv_idx, aux): return (q_idx // aux[0] == kv_idx // aux[0]) & (q_idx // aux[0] != 1)
def gaps_reference(b, h, q_idx, kv_idx, aux): return (q_idx // aux[0] == kv_idx // aux[0]) & (q_idx // aux[0] != 1)
@triton.jit
def stripes(b, h, q_idx, kv_idx, aux): return (q_idx // aux[0] + kv_idx // aux[0] + b) % 3 == 0
def stripes_reference(b, h, q_idx, kv_idx, aux): return (q_idx // aux[0] + kv_idx // aux[0] + b) % 3 == 0
DOC = dict(mask_mod=variant_mods.SAME_DOCUMENT, make_aux=BV._ids, block_size=(128, 128))
MASKED = {"documents": dict(batch=2, seqlen_q=1024, seqlen_k=1024, nheads=4, nheads_k=2, headdim=128, causal=True, **DOC),
          "gaps": dict(batch=2, seqlen_q=1000, seqlen_k=1000, nheads=8, nheads_k=8, headdim=128, mask_mod=mods.mask_mod(gaps, reference=gaps_reference), make_aux=lambda c, d: (200,), block_size=(128, 128)),
          "stripes": dict(batch=3, seqlen_q=1100, seqlen_k=1200, nheads=8, nheads_k=4, headdim=128, mask_mod=mods.mask_mod(stripes, reference=stripes_reference), make_aux=lambda c, d: (100,), block_size=(128, 256))}
def case_of(options):
    o = dict(MASKED[options] if isinstance(options, str) else options); o["dtype"] = getattr(torch, o.get("dtype", "bfloat16")); return Case(**o)
def check_one(name, fields, options, growth):
    case = case_of(options); inputs = make_inputs(case, "cuda"); inputs.k[:, :3] *= growth
    use(fields); runs = [run_case(case, inputs, "v3", False) for _ in range(4)]
    bad = [f"{r.name} {r.error:.2e}>{r.allowed:.2e}" for r in compare(case, inputs, runs[0]) if not r.ok]
    if not all(torch.equal(runs[0]["out"], r["out"]) for r in runs[1:]): bad.append("runs differ")
    if any(r["out"].isnan().any() for r in runs): bad.append("NaN")
    return bad
def check_packed(fields, causal, growth):
    torch.manual_seed(0); lens = [0, 1, 63, 64, 65, 700, 1500, 128, 129, 300] * 6
    cu = torch.tensor([0] + lens).cumsum(0).int().cuda(); n = sum(lens)
    q, k, v = (torch.randn(n, h, 128, device="cuda", dtype=BF) for h in (8, 2, 2)); k[70:80] *= growth
    def run(f, used=None):
        use(f); return flash_attn_varlen_func(q, k, v, cu, cu, max(lens), max(lens), causal=causal, implementation="v3")
    outs = [run(fields) for _ in range(4)]; bad = []
    if not all(torch.equal(outs[0], x) for x in outs[1:]): bad.append("runs differ")
    worst = 0
    for a, b in list(zip(cu.tolist(), cu.tolist()[1:]))[:14]:
        if a == b: continue
        want = attention(q[None, a:b].double().float(), k[None, a:b].float(), v[None, a:b].float(), causal=causal, implementation="reference")[0]
        worst = max(worst, ((outs[0][a:b].float() - want).norm() / want.norm()).item())
    if not worst < 6e-3: bad.append(f"error {worst:.1e}")
    return bad
def check(name, fields, cases, deadline):
    jobs = [("packed", c, g) for c, g in ((True, 1.0), (True, 40.0), (False, 1.0))] if cases == "packed" else cases
    for job in jobs:
        if time.time() > deadline: print("LATE", name, flush=True); continue
        print("begin", name, job, flush=True)
        try:
            bad = check_packed(fields, *job[1:]) if cases == "packed" else check_one(name, fields, *job)
            torch.cuda.synchronize()
            print("BAD" if bad else "ok", name, str(job)[:150], *bad, f"at {time.time()-T0:.0f} s", flush=True)
        except Exception as e:
            while e.__cause__ is not None: e = e.__cause__
            print("BAD", name, str(job)[:120], type(e).__name__, str(e)[-250:].replace("\n", " "), flush=True)
            if "CUDA" in str(e): os._exit(1)
def worker(tasks, at, path, deadline):
    f = open(path, "w", buffering=1); os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2); sys.stdout = sys.stderr = f
    while True:
        with at.get_lock(): i = at.value; at.value += 1
        if i >= len(tasks): break
        kind, *task = tasks[i]
        if kind == "check": check(*task, deadline)
        elif time.time() < deadline: build(*task)
KEEP = []
FEATURES = {"causal": {}, "full": {"causal": False}, "window": {"window_size": (1024, 0)}, "window 256": {"window_size": (256, 0)}, "documents": DOC, "packed": {}, "softcap": {"softcap": 30.0}, "alibi": {"alibi": "heads"}, "d64 causal": {}}
def inputs_of(kind, S, B):
    d = 64 if "d64" in kind else 128
    case = Case(batch=B, seqlen_q=S, seqlen_k=S, nheads=2048 // d, nheads_k=2048 // d, headdim=d, dtype=BF, **{"causal": True, **FEATURES[kind]})
    inputs = make_inputs(case, "cuda")
    features, extras = mods.features_of(**inputs.extras)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v)); seqs = NOT_PACKED
    if kind == "packed":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v)); cu, longest = BV.cu_seqlens(case, q.device); seqs = Sequences(cu, cu)
        spec = make_varlen_spec(q, k, v, seqs, longest, longest, None, True, False, False)
    else: spec = case.spec_of(inputs.q, inputs.k, inputs.v, inputs.extras)
    return q, k, v, spec, tuple(e.detach() for e in extras), seqs
def call_of(given, fields):
    q, k, v, spec, extras, seqs = given
    use(fields)
    launch, behind, lists = F3._prepare(spec, target_of(q.device), q.device, q.stride(), k.stride(), v.stride(), kinds(*extras), seqs.given, seqs is not NOT_PACKED)
    out = q.new_full(q.shape, float("nan")); lse = q.new_empty(spec.lse_shape(q), dtype=torch.float32); counter = torch.zeros(32, dtype=torch.int32, device=q.device)
    blocks = None if lists is None else list_blocks(lists, q, k, seqs, most_blocks(q.shape[0], spec.batch, 64 * launch.config.consumers), q.shape[0])
    arguments = (q, k, v, out, q, k, v, out, lse, counter[:1], blocks, *extras)
    KEEP.append((arguments, counter))
    def call():
        launch(*arguments)
        if behind is not None: behind(*arguments)
        return out
    return call
def builds():
    seen = set()
    for label, kind, S, B, variants in CELLS:
        for name, fields in variants.items():
            key = (kind if kind != "window 256" else "window", name)
            if key not in seen and key not in CHECKED: seen.add(key); yield label, kind, S, name, fields
def build(label, kind, S, name, fields):
    try: call_of(inputs_of(kind, S, 1), fields)(); torch.cuda.synchronize(); print("done", label, name, f"{time.time()-T0:.0f}")
    except Exception as e: print("FAIL", label, name, type(e).__name__, str(e)[-200:])
    KEEP.clear(); torch.cuda.empty_cache()
def event(): return torch.cuda.Event(enable_timing=True)
def timer(path, bad, deadline, rounds=4, settle=15, ms=60):
    f = open(path, "w", buffering=1); os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2); sys.stdout = sys.stderr = f
    table = {}
    rng = random.Random(0)
    for label, kind, S, B, variants in CELLS:
        if time.time() > deadline: print("no time for", label); continue
        print("begin", label, file=open(path + ".at", "w"), flush=True)
        try: given = inputs_of(kind, S, B)
        except Exception as e: print("FAIL", label, type(e).__name__, str(e)[:150]); continue
        calls, est, note, first = {}, {}, {}, None
        for name, fields in variants.items():
            if (kind, name) in bad: note[name] = "left out"; continue
            try:
                call = call_of(given, fields); out = call().clone(); torch.cuda.synchronize()
                if first is None: first = out
                note[name] = "" if torch.equal(out, first) else f" DIFFERS {(out.float() - first.float()).abs().max().item():.1e}"
                a, b = event(), event(); a.record(); call(); call(); b.record(); b.synchronize(); est[name] = max(a.elapsed_time(b) / 2, 1e-2); calls[name] = call
            except Exception as e: print("FAIL", label, name, type(e).__name__, str(e)[:150])
        times = {n: [] for n in calls}
        for r in range(rounds):
            if r >= 3 and time.time() > deadline: break
            order = list(calls); rng.shuffle(order)
            for n in order:
                for _ in range(int(settle / est[n]) + 1): calls[n]()
                k = int(ms / est[n]) + 1; a, b = event(), event(); a.record()
                for _ in range(k): calls[n]()
                b.record(); b.synchronize(); times[n].append(a.elapsed_time(b) / k)
        med = {n: statistics.median(x) for n, x in times.items()}; base = next(iter(med.values()), 1)
        table[label] = times; json.dump(table, open(f"{OUT}/times.json", "w"))
        print(f"{label:22s}" + " ".join(f"{n} {m:.4f} x{base / m:.3f}±{(max(times[n]) - min(times[n])) / m / 2:.0%}{note[n]}" for n, m in med.items()))
        KEEP.clear(); del given, calls; torch.cuda.empty_cache()
if __name__ == "__main__":
    os.makedirs(OUT, exist_ok=True); ctx = mp.get_context("fork"); n = 15
    tasks = [("check", *x) for x in CHECKS[:11]] + [("build", *x) for x in builds()] + [("check", *x) for x in CHECKS[11:]]; at = ctx.Value("i", 0)
    ps = [ctx.Process(target=worker, args=(tasks, at, f"{OUT}/w{i}.txt", T0 + 30), name=f"w{i}") for i in range(n)]
    for p in ps: p.start()
    for p in ps:
        p.join(max(0.05, T0 + 33 - time.time()))
        if p.is_alive(): p.kill(); p.join(3); print("killed", p.name)
    said = [open(f"{OUT}/w{i}.txt").read().splitlines() for i in range(n)]; lines = sum(said, [])
    ok = [l for l in lines if l.startswith("ok")]; bad = [l for l in lines if l.startswith("BAD")]
    hang = [next(l for l in reversed(x) if l.startswith("begin")) for x in said if [l for l in x if l.startswith(("begin", "ok", "BAD"))][-1:] and [l for l in x if l.startswith(("begin", "ok", "BAD"))][-1].startswith("begin")]
    late = {l for l in lines if l.startswith("LATE")}
    print(f"checks: {len(ok)} ok, {len(bad)} BAD, {len(hang)} begun and not ended, late: {', '.join(sorted(l[5:] for l in late)) or 'none'}; {sum(l.startswith('done') for l in lines)} builds; {time.time() - T0:.0f} s", flush=True)
    print("groups ok:", *sorted({l.split()[1] + " " + l.split()[2] for l in ok}), sep=" | ")
    for l in bad[:10] + [f"NOT ENDED {x}" for x in hang] + [l for l in lines if l.startswith("FAIL")]: print(l[:260])
    for l in [l for l in lines if not l.startswith(("ok", "BAD", "begin", "LATE", "done", "FAIL"))][-3:]: print("?", l[:200])
    bad = {tuple(reversed(l.split()[1:3])) for l in bad + hang}
    bad |= CHECKED - {tuple(reversed(l.split()[1:3])) for l in ok} - {("d64 causal", l.split()[1]) for l in ok if l.split()[2] == "d64"}  # nothing that was not checked is timed
    bad |= {("window 256", name) for kind, name in bad if kind == "window"} | {("d64 causal", name) for kind, name in bad if kind == "d64"}
    p = ctx.Process(target=timer, args=(f"{OUT}/times.txt", bad, T0 + 62)); p.start(); p.join(max(0.1, T0 + 66 - time.time()))
    if p.is_alive(): p.kill(); print("killed while timing:", open(f"{OUT}/times.txt.at").read().strip())
    print(open(f"{OUT}/times.txt").read()[:3800], f"ends at {time.time() - T0:.0f} s", flush=True)
