"""Check v3's backward against float64, then time its variants: one run on the GPU machine.

PYTHONPATH=src python wip/v3/v3_bwd_check.py [--no-time] [--cases SUBSTRING] [--cells d128c,...]
Workers are subprocesses with a watchdog; whatever hangs is killed and reported as HANG.
"""
import argparse, json, os, queue, signal, subprocess, sys, threading, time
from pathlib import Path

HERE = Path(__file__).resolve()
OUT = Path(os.environ.get("OUT", "/tmp"))
WORKERS = 10
QUIET_LIMIT = 45  # seconds without a line before a worker counts as hung (start and compile included)
MOST = 128  # largest head dimension that the backward takes


def cases():
    import torch
    from triflash.testing import Case
    h, b = torch.float16, torch.bfloat16
    L = []
    def add(det=False, **kw): L.append((Case(**kw), det))
    for d in (64, 128):
        add(headdim=d, dtype=b, seqlen_q=384, seqlen_k=384)
        add(headdim=d, dtype=b, seqlen_q=384, seqlen_k=384, causal=True)
        add(headdim=d, dtype=b, seqlen_q=1024, seqlen_k=1024, causal=True, nheads=4, nheads_k=2, batch=3)
        add(headdim=d, dtype=b, seqlen_q=2048, seqlen_k=2048, nheads=8, nheads_k=8, batch=2)          # many programs
        add(headdim=d, dtype=b, seqlen_q=2048, seqlen_k=2048, nheads=12, nheads_k=12, batch=2, causal=True)
        add(headdim=d, dtype=b, seqlen_q=1000, seqlen_k=1000)
        add(headdim=d, dtype=b, seqlen_q=777, seqlen_k=333)
        add(headdim=d, dtype=b, seqlen_q=333, seqlen_k=777, causal=True)
        add(headdim=d, dtype=b, seqlen_q=777, seqlen_k=333, causal=True)      # rows without keys
        add(headdim=d, dtype=b, seqlen_q=1, seqlen_k=1)
        add(headdim=d, dtype=b, seqlen_q=1, seqlen_k=1, causal=True)
        add(headdim=d, dtype=b, seqlen_q=65, seqlen_k=129, causal=True, with_dlse=True)
        add(headdim=d, dtype=b, seqlen_q=130, seqlen_k=1, nheads=8, nheads_k=1)
        add(headdim=d, dtype=h, seqlen_q=500, seqlen_k=640, with_dlse=True)
        add(headdim=d, dtype=h, seqlen_q=640, seqlen_k=500, causal=True, nheads=6, nheads_k=2)
        add(headdim=d, dtype=b, seqlen_q=300, seqlen_k=300, causal=True, layout="sliced")
        add(headdim=d, dtype=b, seqlen_q=300, seqlen_k=200, layout="transposed")
        add(headdim=d, dtype=b, seqlen_q=200, seqlen_k=200, layout="junk_strides", batch=1, nheads=1, nheads_k=1)
        add(headdim=d, dtype=b, seqlen_q=200, seqlen_k=300, softmax_scale=-0.3)
        add(headdim=d, dtype=b, seqlen_q=300, seqlen_k=300, softmax_scale=0.0, causal=True)
        add(headdim=d, dtype=b, seqlen_q=200, seqlen_k=300, softmax_scale=2.0)
        add(headdim=d, dtype=b, seqlen_q=1000, seqlen_k=1100, nheads=8, nheads_k=8, batch=4, det=True)
        add(headdim=d, dtype=b, seqlen_q=1100, seqlen_k=1000, nheads=8, nheads_k=2, batch=4, causal=True, det=True)
    for d, dv in ((96, 96), (32, 32), (40, 72), (64, 128), (128, 64), (16, 8)) + (((256, 256), (192, 128)) if MOST > 128 else ()):
        for causal in (False, True):
            add(headdim=d, headdim_v=dv, dtype=b, seqlen_q=400, seqlen_k=450, causal=causal)
    return L


VARIANTS = {
    (64, False): {"base": {}, "late": dict(late_dv=True), "s3": dict(stages=3)},
    (64, True): {"base": {}, "late": dict(late_dv=True)},
    (128, False): {"base": {}, "early": dict(late_dv=False), "s3": dict(stages=3)},
    (128, True): {"base": {}, "early": dict(late_dv=False)},
}


def launcher(dout, q, k, v, out, lse, spec, change):
    """The whole backward under a changed configuration."""
    from dataclasses import replace
    from unittest import mock
    import torch
    from triflash import tuning
    from triflash.kernels.v3 import backward as B
    from triflash.target import target_of
    target = target_of(q.device)
    config = replace(tuning.v3_backward(spec, target), **change)
    with mock.patch.object(tuning, "v3_backward", return_value=config):
        plan = B._prepare.__wrapped__(spec, target, q.device, q.stride(), k.stride(), v.stride(), dout.stride(), (), False)
    def call():
        with mock.patch.object(B, "_prepare", return_value=plan):
            return B.backward(dout, None, q, k, v, out, lse, [], spec)
    return call


def say(*a):
    print(*a, flush=True)


def grads_of(case, inputs, det):
    import torch, triflash
    from triflash import testing
    q, k, v = (t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    with testing.poisoned():
        out, lse = triflash.attention(q, k, v, causal=case.causal, softmax_scale=case.softmax_scale, return_lse=True,
                                      deterministic=det, implementation="v3")
        outs, gs = [out], [inputs.dout]
        if inputs.dlse is not None: outs, gs = [out, lse], [inputs.dout, inputs.dlse]
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(outs, (q, k, v), gs)))


def work_case(i, case_det):
    import torch
    from triflash import testing
    case, det = case_det
    inputs = testing.make_inputs(case, "cuda")
    t = time.time()
    runs = []
    for _ in range(3):
        runs.append(grads_of(case, inputs, det))
        torch.cuda.synchronize()
    dt = time.time() - t
    fixed = ("dq", "dk", "dv") if det else ("dk", "dv")
    same = all(torch.equal(runs[0][n], r[n]) for r in runs[1:] for n in fixed)
    spread = max((runs[0]["dq"].double() - r["dq"].double()).abs().max().item() for r in runs[1:])
    records = testing.compare(case, inputs, runs[0])
    ok = all(r.ok for r in records) and same
    text = " ".join(f"{r.name} {r.error:.2e}/{r.allowed:.2e}" for r in records) + f" dq spread {spread:.1e}"
    if not ok:
        exp = testing.oracle(case, inputs)
        allowed = {r.name: r.allowed for r in records}
        for n in ("dq", "dk", "dv"):
            bad = ~((runs[0][n].double() - exp[n]).abs().nan_to_num(posinf=9, nan=9) <= allowed[n])
            idx = bad.nonzero()
            text += f" | {n} bad {len(idx)}/{bad.numel()} nan {int(runs[0][n].isnan().sum())} first {idx[:3].tolist()} last {idx[-2:].tolist()}"
        text += f" | repeats equal {same}"
    say(f"CASE {i} {'ok  ' if ok else 'FAIL'} {case}{' det' if det else ''} [{dt:.1f}s] {text}")


def work_warm(i, d, causal, name, change):
    """Compile a variant for the timing, and hold it against v2."""
    import torch
    from triflash.spec import make_spec
    from triflash.kernels.v3 import forward as F
    from triflash.kernels.v2 import backward as B2
    q, k, v, dout = (torch.randn(2, 2048, 2048 // d, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    spec = make_spec(q, k, v, None, causal, False, False)
    out, lse, _ = F.forward(q, k, v, spec)
    if name == "v2":
        for s in (512, 1024, 2048, 4096, 16384):
            x = torch.randn(16384 // s, s, 2048 // d, d, device="cuda", dtype=torch.bfloat16)
            o, l, _ = F.forward(x, x, x, make_spec(x, x, x, None, causal, False, False))
            B2.backward(x, None, x, x, x, o, l, [], make_spec(x, x, x, None, causal, False, False))
        torch.cuda.synchronize()
        return say(f"CASE {i} ok   warm v2 d{d} {'c' if causal else 'f'}")
    got = launcher(dout, q, k, v, out, lse, spec, change)()
    torch.cuda.synchronize()
    ref = B2.backward(dout, None, q, k, v, out, lse, [], spec)
    err = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, ref)]
    say(f"CASE {i} {'ok  ' if max(err) < 0.02 else 'FAIL'} warm d{d} {'c' if causal else 'f'} {name}: max difference to v2 / largest: " + " ".join(f"{e:.4f}" for e in err))


def jobs():
    L = [("case", c) for c in cases()]
    warm = [("warm", d, c, n, ch) for (d, c), vs in VARIANTS.items() for n, ch in [*vs.items(), ("v2", None)]]
    return L + warm


def worker(indices):
    J = jobs()
    say("START")
    for i in indices:
        kind, *rest = J[i]
        say(f"BEGIN {i} {kind} {' '.join(map(str, rest))}")
        try:
            work_case(i, *rest) if kind == "case" else work_warm(i, *rest)
        except Exception as e:
            import traceback
            say(f"CASE {i} FAIL {' '.join(map(str, rest))}: {type(e).__name__}: {str(e)[-400:]} @ {traceback.format_exc().splitlines()[-4:-1]}".replace("\n", " "))
            if "CUDA" in str(e) or "illegal" in str(e):
                raise
    say("END")


def drive(indices, results, lock, deadline):
    """Run a worker over indices; restart it behind whatever hangs or dies."""
    todo = list(indices)
    while todo:
        p = subprocess.Popen([sys.executable, str(HERE), "--worker", ",".join(map(str, todo))], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, start_new_session=True)
        lines = queue.Queue()
        threading.Thread(target=lambda: ([lines.put(x) for x in p.stdout], lines.put(None)), daemon=True).start()
        err = []
        threading.Thread(target=lambda: err.extend(p.stderr), daemon=True).start()
        current, done = None, False
        while True:
            try:
                line = lines.get(timeout=max(1, min(QUIET_LIMIT, deadline - time.time())))
            except queue.Empty:
                os.killpg(p.pid, signal.SIGKILL)
                with lock:
                    results[current] = f"CASE {current} HANG"
                    say(f"CASE {current} HANG (killed) {begun if current is not None else ''}")
                break
            if line is None:
                break
            line = line.strip()
            if line.startswith("BEGIN"):
                current = int(line.split()[1])
                begun = line
            elif line.startswith("CASE"):
                with lock:
                    results[int(line.split()[1])] = line
                    if " ok " not in line: say(line)
            elif line == "END":
                done = True
        p.wait()
        if done: return
        if current is None:
            with lock: say("worker did not start:", "".join(err)[-1500:])
            return
        if current not in results:
            with lock:
                results[current] = f"CASE {current} DIED"
                say(f"CASE {current} DIED {begun}: {''.join(err)[-600:]}")
        todo = todo[todo.index(current) + 1:]
        if time.time() > deadline: return


def timing(cells):
    import statistics, torch, triflash
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from triflash.spec import make_spec
    from triflash.kernels.v2 import backward as B2
    from triflash.kernels.v3 import backward as B3
    from triflash.kernels.v3 import forward as F
    from triflash.target import target_of
    records = []
    for (d, causal), variants in VARIANTS.items():
        if cells and f"d{d}{'c' if causal else 'f'}" not in cells: continue
        for s in (512, 1024, 2048, 4096, 16384):
            q, k, v, dout = (torch.randn(16384 // s, s, 2048 // d, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
            spec = make_spec(q, k, v, None, causal, False, False)
            out, lse, _ = F.forward(q, k, v, spec)
            qh, kh, vh = (t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v))
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                oh = torch.nn.functional.scaled_dot_product_attention(qh, kh, vh, is_causal=causal)
            doh = dout.transpose(1, 2)
            calls = {n: launcher(dout, q, k, v, out, lse, spec, ch) for n, ch in variants.items()}
            if s == 4096:
                from dataclasses import replace
                dspec = replace(spec, deterministic=True)
                calls["det"] = lambda: B3.backward(dout, None, q, k, v, out, lse, [], dspec)
            plan = B3._prepare(spec, target_of(q.device), q.device, q.stride(), k.stride(), v.stride(), dout.stride(), (), False)
            sums, stats, dq = q.new_empty(plan.sums, dtype=torch.float32), q.new_empty(plan.stats, dtype=torch.float32), torch.empty_like(q)
            calls["around"] = lambda: (plan.before(out, dout, lse, lse, stats, sums), plan.after(sums, dq))  # the two small kernels alone
            calls["v2"] = lambda: B2.backward(dout, None, q, k, v, out, lse, [], spec)
            calls["cudnn"] = lambda: torch.autograd.grad(oh, (qh, kh, vh), doh, retain_graph=True)
            flops = 10 * 16384 * s * 2048 * (0.5 if causal else 1)
            n, times = {}, {}
            for name in list(calls):
                try:
                    calls[name](); torch.cuda.synchronize()
                    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    a.record(); [calls[name]() for _ in range(4)]; b.record(); b.synchronize()
                    n[name] = max(3, int((20 if name == "around" else 100) / (a.elapsed_time(b) / 4)) + 1); times[name] = []
                except Exception as e:
                    say(f"TIME {name} d{d} {causal} {s}: {type(e).__name__} {str(e)[:150]}"); del calls[name]
            order = list(calls)
            for r in range(4):
                for name in order:
                    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    a.record()
                    for _ in range(n[name]): calls[name]()
                    b.record(); b.synchronize()
                    if r: times[name].append(a.elapsed_time(b) / n[name])  # the first round settles
                order = order[1:] + order[:1]
            around = statistics.median(times.pop("around", [0]))
            row = {m: flops / statistics.median(t) / 1e9 for m, t in times.items()}
            total = statistics.median(times["base"]) if "base" in times else float("nan")
            records.append(dict(d=d, causal=causal, s=s, tflops=row, ms=times, around_ms=around))
            best = max(x for m, x in row.items() if m not in ("v2", "cudnn"))
            say(f"TIME d{d:3d} {'causal' if causal else 'full  '} {s:5d}: " + " ".join(f"{m} {x:.0f}" for m, x in row.items())
                + f"  base/cudnn {row.get('base', 0) / row.get('cudnn', float('nan')):.3f} best/cudnn {best / row.get('cudnn', float('nan')):.3f}"
                + f"  total {total * 1e3:.0f} us, small kernels {around * 1e3:.0f} us")
            (OUT / "v3_bwd_times.json").write_text(json.dumps(records, indent=1))
    q, k, v, dout = (torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    spec = make_spec(q, k, v, None, True, False, False)
    out, lse, _ = F.forward(q, k, v, spec)
    for name, call in {"v3.backward": lambda: B3.backward(dout, None, q, k, v, out, lse, [], spec), "v2.backward": lambda: B2.backward(dout, None, q, k, v, out, lse, [], spec)}.items():
        for _ in range(200): call()
        torch.cuda.synchronize(); best = 1e9
        for _ in range(5):
            t = time.perf_counter(); [call() for _ in range(300)]; best = min(best, (time.perf_counter() - t) / 300 * 1e6); torch.cuda.synchronize()
        say(f"HOST {name}: {best:.1f} us a call")


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--worker"); a.add_argument("--timer", action="store_true"); a.add_argument("--no-time", action="store_true")
    a.add_argument("--cases", default=""); a.add_argument("--cells", default="")
    a = a.parse_args()
    if a.worker is not None: return worker([int(x) for x in a.worker.split(",")])
    if a.timer: return timing([c for c in a.cells.split(",") if c])
    t0 = time.time()
    J = jobs()
    if a.no_time: J = [j for j in J if j[0] == "case"]
    mine = [i for i, j in enumerate(J) if not a.cases or a.cases in str(j[1][0] if j[0] == "case" else "") or j[0] == "warm"]
    results, lock = {}, threading.Lock()
    threads = [threading.Thread(target=drive, args=(mine[w::WORKERS], results, lock, t0 + 75)) for w in range(WORKERS)]
    [t.start() for t in threads]; [t.join() for t in threads]
    good = sum(" ok " in r for r in results.values())
    for i in sorted(x for x in results if x is not None):
        if i % 6 == 0 or "det" in results[i] or "warm" in results[i]: say(results[i])
    say(f"== {good} of {len(mine)} ok, {len(mine) - len(results)} not reached, {time.time() - t0:.0f} s")
    (OUT / "v3_bwd_cases.txt").write_text("\n".join(results[i] for i in sorted(x for x in results if x is not None)))
    bad = [i for i in mine if " ok " not in results.get(i, "")]
    if not a.no_time:
        p = subprocess.Popen([sys.executable, str(HERE), "--timer", "--cells", a.cells], start_new_session=True)
        try:
            p.wait(timeout=max(30, 145 - (time.time() - t0)))
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL); say("timing killed")
    say(f"== done in {time.time() - t0:.0f} s; failures: {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
