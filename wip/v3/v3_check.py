"""Check v3's forward against float64, then time its variants: one run on the GPU machine.

PYTHONPATH=src python wip/v3/v3_check.py [--no-time] [--cases SUBSTRING] [--cells d128c,...]
Workers are subprocesses with a watchdog; whatever hangs is killed and reported as HANG.
"""
import argparse, json, os, queue, signal, subprocess, sys, threading, time
from pathlib import Path

HERE = Path(__file__).resolve()
OUT = Path(os.environ.get("OUT", "/tmp"))
WORKERS = 10
QUIET_LIMIT = 60  # seconds without a line before a worker counts as hung (start and compile included)


def cases():
    import torch
    from triflash.testing import Case
    h, b = torch.float16, torch.bfloat16
    L = []
    def add(**kw): L.append(Case(**kw))
    for d in (64, 128):
        add(headdim=d, dtype=b, seqlen_q=384, seqlen_k=384)
        add(headdim=d, dtype=b, seqlen_q=384, seqlen_k=384, causal=True)
        add(headdim=d, dtype=b, seqlen_q=1024, seqlen_k=1024, causal=True, nheads=4, nheads_k=2, batch=3)
        add(headdim=d, dtype=b, seqlen_q=2048, seqlen_k=2048, nheads=16, nheads_k=16, batch=2)          # many tiles a program
        add(headdim=d, dtype=b, seqlen_q=2048, seqlen_k=2048, nheads=24, nheads_k=24, batch=2, causal=True)
        add(headdim=d, dtype=b, seqlen_q=1000, seqlen_k=1000)
        add(headdim=d, dtype=b, seqlen_q=777, seqlen_k=333)
        add(headdim=d, dtype=b, seqlen_q=333, seqlen_k=777, causal=True)
        add(headdim=d, dtype=b, seqlen_q=777, seqlen_k=333, causal=True)      # rows without keys
        add(headdim=d, dtype=b, seqlen_q=1, seqlen_k=1)
        add(headdim=d, dtype=b, seqlen_q=1, seqlen_k=1, causal=True)
        add(headdim=d, dtype=b, seqlen_q=65, seqlen_k=129, causal=True)
        add(headdim=d, dtype=b, seqlen_q=130, seqlen_k=1, nheads=8, nheads_k=1)
        add(headdim=d, dtype=h, seqlen_q=500, seqlen_k=640)
        add(headdim=d, dtype=h, seqlen_q=640, seqlen_k=500, causal=True, nheads=6, nheads_k=2)
        add(headdim=d, dtype=b, seqlen_q=300, seqlen_k=300, causal=True, layout="sliced")
        add(headdim=d, dtype=b, seqlen_q=300, seqlen_k=200, layout="transposed")
        add(headdim=d, dtype=b, seqlen_q=200, seqlen_k=200, layout="junk_strides", batch=1, nheads=1, nheads_k=1)
        add(headdim=d, dtype=b, seqlen_q=200, seqlen_k=300, softmax_scale=-0.3)
        add(headdim=d, dtype=b, seqlen_q=300, seqlen_k=300, softmax_scale=0.0, causal=True)
        add(headdim=d, dtype=b, seqlen_q=200, seqlen_k=300, softmax_scale=2.0)
    for d, dv in ((96, 96), (192, 192), (256, 256), (192, 128), (32, 32), (40, 72), (64, 256), (256, 64), (16, 8)):
        for causal in (False, True):
            add(headdim=d, headdim_v=dv, dtype=b, seqlen_q=400, seqlen_k=450, causal=causal)
    add(headdim=256, dtype=b, seqlen_q=2048, seqlen_k=2048, nheads=16, nheads_k=16, causal=True, batch=2)
    add(headdim=256, dtype=b, seqlen_q=2048, seqlen_k=2048, nheads=16, nheads_k=16, batch=2)
    add(headdim=256, dtype=h, seqlen_q=777, seqlen_k=333, causal=True)
    return L


VARIANTS = {
    (64, False): {"base": {}, "nopin": dict(pin=False), "2wg": dict(consumers=2)},
    (64, True): {"base": {}, "nopin": dict(pin=False), "2wg": dict(consumers=2), "3wg": dict(consumers=3)},
    (128, False): {"base": {}, "pin": dict(pin=True), "dynamic": dict(dynamic=True), "dynpin": dict(dynamic=True, pin=True)},
    (128, True): {"base": {}, "nopin": dict(pin=False)},
    (256, False): {"base": {}, "pin": dict(pin=True), "dynamic": dict(dynamic=True)},
    (256, True): {"base": {}, "nopin": dict(pin=False)},
}


def launcher(q, k, v, spec, change):
    """A call of v3's kernel under a changed configuration."""
    from dataclasses import replace
    from unittest import mock
    from triflash import tuning
    from triflash.kernels.v3 import forward as F
    from triflash.target import target_of
    target = target_of(q.device)
    config = replace(tuning.v3_forward(spec, target), **change)
    with mock.patch.object(tuning, "v3_forward", return_value=config):
        launch, views = F._prepare.__wrapped__(spec, target, q.device, q.stride(), k.stride(), v.stride())
    def call():
        out = q.new_empty((spec.batch, spec.seqlen_q, spec.nheads, spec.headdim_v))
        lse = q.new_empty((spec.batch, spec.nheads, spec.seqlen_q), dtype=__import__("torch").float32)
        launch(F.at(views[0], q), F.at(views[1], k), F.at(views[2], v), F.at(views[3], out), lse, F._counter(q.device))
        return out
    return call


def say(*a):
    print(*a, flush=True)


def work_case(i, case):
    import torch
    from triflash import testing
    inputs = testing.make_inputs(case, "cuda")
    t = time.time()
    runs = []
    for _ in range(3):
        runs.append(testing.run_case(case, inputs, "v3", backward=False))
        torch.cuda.synchronize()
    dt = time.time() - t
    same = all(torch.equal(runs[0][n], r[n]) for r in runs[1:] for n in r)
    records = testing.compare(case, inputs, runs[0])
    ok = all(r.ok for r in records) and same
    text = " ".join(f"{r.name} {r.error:.2e}/{r.allowed:.2e}" for r in records)
    if not ok:
        exp = testing.oracle(case, inputs)
        for n in ("out", "lse"):
            bad = ~((runs[0][n].double() - exp[n]).abs().nan_to_num(posinf=9, nan=9) <= 0.05)
            bad &= ~(runs[0][n].double() == exp[n])
            idx = bad.nonzero()
            text += f" | {n} bad {len(idx)}/{bad.numel()} nan {int(runs[0][n].isnan().sum())} first {idx[:3].tolist()} last {idx[-2:].tolist()}"
        text += f" | repeats equal {same}"
    say(f"CASE {i} {'ok  ' if ok else 'FAIL'} {case} [{dt:.1f}s] {text}")


def work_warm(i, d, causal, name, change):
    """Compile a variant for the timing, and hold it against SDPA."""
    import torch
    from triflash.spec import make_spec
    import triflash
    q, k, v = (torch.randn(2, 4096, 2048 // d, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if name == "v2":
        with torch.no_grad():
            for s in (512, 1024, 2048, 4096, 16384):
                x = q.reshape(8192 // s or 1, -1, 2048 // d, d)
                triflash.attention(x, x, x, causal=causal, implementation="v2")
        torch.cuda.synchronize()
        return say(f"CASE {i} ok   warm v2 d{d} {'c' if causal else 'f'}")
    spec = make_spec(q, k, v, None, causal, False, False)
    call = launcher(q, k, v, spec, change)
    out = call()
    torch.cuda.synchronize()
    ref = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal).transpose(1, 2)
    err = (out - ref).abs().max().item()
    say(f"CASE {i} {'ok  ' if err < 0.02 else 'FAIL'} warm d{d} {'c' if causal else 'f'} {name}: max difference to SDPA {err:.4f}")


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
            say(f"CASE {i} FAIL {' '.join(map(str, rest))}: {type(e).__name__}: {str(e)[-400:]}")
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
                    say(f"CASE {current} HANG (killed)")
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
    records = []
    for (d, causal), variants in VARIANTS.items():
        if cells and f"d{d}{'c' if causal else 'f'}" not in cells: continue
        for s in (512, 1024, 2048, 4096, 16384):
            q, k, v = (torch.randn(16384 // s, s, 2048 // d, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            spec = make_spec(q, k, v, None, causal, False, False)
            qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
            calls = {n: launcher(q, k, v, spec, ch) for n, ch in variants.items()}
            calls["v2"] = lambda: triflash.attention(q, k, v, causal=causal, implementation="v2")
            def cudnn():
                with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                    return torch.nn.functional.scaled_dot_product_attention(qh, kh, vh, is_causal=causal)
            calls["cudnn"] = cudnn
            flops = 4 * 16384 * s * 2048 * (0.5 if causal else 1)
            n, times = {}, {}
            with torch.no_grad():
                for name in list(calls):
                    try:
                        calls[name](); torch.cuda.synchronize()
                        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                        a.record(); [calls[name]() for _ in range(5)]; b.record(); b.synchronize()
                        n[name] = max(3, int(110 / (a.elapsed_time(b) / 5)) + 1); times[name] = []
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
            row = {m: flops / statistics.median(t) / 1e9 for m, t in times.items()}
            records.append(dict(d=d, causal=causal, s=s, tflops=row, ms=times))
            best = max(x for m, x in row.items() if m not in ("v2", "cudnn"))
            say(f"TIME d{d:3d} {'causal' if causal else 'full  '} {s:5d}: " + " ".join(f"{m} {x:.0f}" for m, x in row.items())
                + f"  best/cudnn {best / row.get('cudnn', float('nan')):.3f}")
            (OUT / "v3_times.json").write_text(json.dumps(records, indent=1))
    from triflash.kernels.v3 import forward as F
    q, k, v = (torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    spec = make_spec(q, k, v, None, True, False, False)
    with torch.no_grad():
        for name, call in {"v3.forward": lambda: F.forward(q, k, v, spec), "attention(v3)": lambda: triflash.attention(q, k, v, causal=True, implementation="v3"),
                           "attention(v2)": lambda: triflash.attention(q, k, v, causal=True, implementation="v2")}.items():
            for _ in range(200): call()
            torch.cuda.synchronize(); best = 1e9
            for _ in range(5):
                t = time.perf_counter(); [call() for _ in range(400)]; best = min(best, (time.perf_counter() - t) / 400 * 1e6); torch.cuda.synchronize()
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
    mine = [i for i, j in enumerate(J) if not a.cases or a.cases in str(j[1]) or j[0] == "warm"]
    results, lock = {}, threading.Lock()
    threads = [threading.Thread(target=drive, args=(mine[w::WORKERS], results, lock, t0 + 100)) for w in range(WORKERS)]
    [t.start() for t in threads]; [t.join() for t in threads]
    good = sum(" ok " in r for r in results.values())
    for i in sorted(results):
        if i % 9 == 0: say(results[i])
    say(f"== {good} of {len(mine)} ok, {len(mine) - len(results)} not reached, {time.time() - t0:.0f} s")
    (OUT / "v3_cases.txt").write_text("\n".join(results[i] for i in sorted(results)))
    bad = [i for i in mine if " ok " not in results.get(i, "")]
    if not a.no_time:
        p = subprocess.Popen([sys.executable, str(HERE), "--timer", "--cells", a.cells], start_new_session=True)
        try:
            p.wait(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL); say("timing killed after 300 s")
    say(f"== done in {time.time() - t0:.0f} s; failures: {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
