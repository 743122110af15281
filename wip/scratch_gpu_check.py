"""cuda_v1 on a GPU: many shapes against float64, then times. Not committed.

    PYTHONPATH=src:<carry>/site python3 scratch_gpu_check.py [check] [time] [sweep]
"""
import itertools, math, os, sys, time, threading
from concurrent.futures import ProcessPoolExecutor
import multiprocessing as mp

ARGS = set(sys.argv[1:]) or {"check", "time", "sweep"}
ARCH = os.environ.get("CHECK_ARCH", "sm_90")


def compile_one(job):
    import hashlib
    from pathlib import Path
    import torch
    from triflash.kernels.cuda import compile as c, forward as f
    config, level = job
    t = time.time()
    try:
        if level is None:
            return config, level, c.load_cubin(f._SOURCE, config.macros, ARCH), time.time() - t
        from cuda.core import Program, ProgramOptions
        options = ProgramOptions(name="forward.cu", arch=ARCH, std="c++17", ftz=True,
            include_path=[str(d) for d in c.include_directories()], define_macro=list(config.macros),
            device_as_default_execution_space=True, ptxas_options=[f"--opt-level={level}"])
        return config, level, bytes(Program(f._SOURCE.read_text(), "c++", options).compile("cubin").code), time.time() - t
    except Exception as e:
        return config, level, f"{type(e).__name__}: {str(e)[:1500]}", time.time() - t


def main():
    import torch
    from triflash.kernels.cuda import forward as F
    from triflash.testing import Case
    from triflash.target import Target
    import dataclasses
    KC = F.KernelConfig
    target = Target("cuda", ARCH, 132)

    def chosen(d, dtype=torch.float16, aligned=True):
        return F.kernel_config(Case(headdim=d, headdim_v=d, dtype=dtype).spec(), target, aligned)

    jobs = [(chosen(d, dt, al), None) for d in F._WIDTHS for dt in (torch.float16, torch.bfloat16) for al in (True, False)]
    sweep = []
    if "sweep" in ARGS:
        grid = {
            32: [(128, 128, 4, 2, 1, 1), (128, 64, 4, 2, 1, 1), (128, 64, 4, 3, 1, 1), (128, 64, 4, 2, 2, 1)],
            64: [(128, 64, 4, 2, 1, 1), (128, 64, 4, 2, 2, 1), (128, 64, 4, 2, 1, 0), (128, 128, 4, 2, 1, 0), (128, 32, 4, 2, 2, 1), (64, 64, 4, 3, 1, 1), (128, 96, 4, 2, 1, 0)],
            96: [(128, 64, 4, 2, 1, 0), (128, 64, 4, 2, 2, 0), (128, 32, 4, 2, 2, 0)],
            128: [(128, 64, 4, 2, 1, 0), (128, 64, 4, 2, 2, 0), (128, 32, 4, 2, 1, 0), (128, 32, 4, 2, 2, 0), (128, 64, 8, 1, 1, 1), (128, 128, 8, 1, 1, 1), (64, 64, 4, 3, 1, 1)],
            192: [(128, 64, 8, 1, 1, 0), (128, 64, 8, 1, 1, 1), (64, 64, 4, 2, 1, 0), (128, 64, 8, 1, 2, 0), (128, 32, 8, 1, 2, 0)],
            256: [(128, 64, 8, 1, 1, 0), (64, 64, 4, 2, 1, 0), (128, 32, 8, 1, 2, 0), (64, 32, 4, 2, 1, 0), (128, 64, 8, 1, 2, 0)],
        }
        for d, rows in grid.items():
            for bm, bn, w, mb, st, qr in rows:
                c = KC(torch.float16, d, bm, bn, w, mb, st, bool(qr), True)
                if c.shared_bytes <= 227 * 1024:
                    sweep += [(c, 1), (c, 3)]
    t0 = time.time()
    with ProcessPoolExecutor(min(14, os.cpu_count()), mp.get_context("spawn")) as pool:
        done = list(pool.map(compile_one, jobs + sweep))
    print(f"compiled {len(done)} in {time.time()-t0:.0f} s; one took {sorted(r[3] for r in done)[len(done)//2]:.1f} s (median)")
    failed = [r for r in done if isinstance(r[2], str)]
    for r in failed[:3]:
        print("FAILED", r[0], r[1], r[2])
    print("failed:", len(failed))
    if not torch.cuda.is_available():
        print("no GPU"); return
    import importlib.metadata as md
    print(torch.__version__, torch.cuda.get_device_name(), {p: md.version(p) for p in ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")})
    from triflash import attention
    dev = "cuda"

    def ref(q, k, v, causal, scale):
        return attention(q.double(), k.double(), v.double(), causal=causal, softmax_scale=scale, return_lse=True, implementation="reference")

    if "check" in ARGS:
        bad = n = 0
        worst = {}
        def one(b, sq, sk, h, hk, d, dv, causal, dtype, scale=None, base=0, pad=0):
            nonlocal bad, n
            n += 1
            torch.manual_seed(n)
            def mk(s, hh, dd):
                buf = torch.full((base + b * s * hh * (dd + pad) + 64,), float("nan"), device=dev, dtype=dtype)
                t = buf[base:base + b * s * hh * (dd + pad)].view(b, s, hh, dd + pad)[..., :dd]
                t.copy_(torch.randn(b, s, hh, dd, device=dev))
                return t
            q, k, v = mk(sq, h, d), mk(sk, hk, d), mk(sk, hk, dv)
            o, l = attention(q, k, v, causal=causal, softmax_scale=scale, return_lse=True, implementation="cuda_v1")
            torch.cuda.synchronize()
            ro, rl = ref(q, k, v, causal, scale)
            eo = (o.double() - ro).abs().max().item() if o.numel() else 0.0
            inf = rl.isinf()
            el = (l.double() - rl)[~inf].abs().max().item() if (~inf).any() else 0.0
            tol = 4e-3 if dtype == torch.float16 else 3e-2
            ok = eo < tol and el < 2e-3 and bool((l[inf] == -math.inf).all()) and bool(o.isfinite().all())
            worst[dtype] = max(worst.get(dtype, 0), eo)
            if not ok:
                bad += 1
                print("BAD", dict(b=b, sq=sq, sk=sk, h=h, hk=hk, d=d, dv=dv, causal=causal, dtype=str(dtype), scale=scale, base=base, pad=pad), f"out {eo:.2e} lse {el:.2e}", flush=True)
        for dtype, causal in itertools.product((torch.float16, torch.bfloat16), (False, True)):
            for d in (32, 64, 96, 128, 192, 256):
                for sq, sk in ((1, 1), (128, 128), (113, 203), (203, 113), (799, 3), (3, 799), (1024, 1023), (2048, 2048), (1, 4097), (5, 0), (2049, 777)):
                    one(2, sq, sk, 4, 2, d, d, causal, dtype)
            for d in (1, 2, 8, 16, 33, 40, 80, 160, 200, 255):
                one(1, 300, 333, 2, 1, d, d, causal, dtype)
            for d, dv in ((192, 128), (128, 192), (64, 8), (24, 40), (256, 16)):
                one(1, 300, 333, 2, 2, d, dv, causal, dtype)
            for base, pad in ((8, 8), (1, 0), (2, 6), (0, 1)):
                for d in (33, 64, 128, 256):
                    one(2, 200, 333, 4, 2, d, d, causal, dtype, base=base, pad=pad)
            for scale in (-1.0, -0.1, 0.0, 2.0, 1e-30):
                one(1, 300, 303, 2, 2, 64, 64, causal, dtype, scale=scale)
        one(70000, 1, 17, 1, 1, 32, 32, False, torch.float16)  # past 65535 blocks
        print(f"checked {n}, bad {bad}, worst {worst}")
        # 64-bit offsets: one tensor past 2^31 elements
        b, s, h, d = 2, 1 << 16, 132, 128
        q = torch.zeros(b, 256, h, d, device=dev, dtype=torch.float16).normal_()
        k = torch.empty(b, s, h, d, device=dev, dtype=torch.float16).normal_()
        o, l = attention(q, k, k, return_lse=True, implementation="cuda_v1")
        e, el = attention(q[-1:, :, -1:], k[-1:, :, -1:].contiguous(), k[-1:, :, -1:].contiguous(), return_lse=True, implementation="v2")
        print("large tensor:", k.numel() > 2**31, (o[-1:, :, -1:] - e).abs().max().item(), (l[-1:, -1:] - el).abs().max().item())
        del q, k, o, l
        q = torch.randn(2, 300, 2, 64, device=dev, dtype=torch.float16)
        want = attention(q, q, q, causal=True, implementation="cuda_v1")
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            got = attention(q, q, q, causal=True, implementation="cuda_v1")
        g.replay(); torch.cuda.synchronize()
        print("graph", torch.equal(got, want))
        res = []
        th = threading.Thread(target=lambda: res.append(attention(q, q, q, causal=True, implementation="cuda_v1")))
        th.start(); th.join(); torch.cuda.synchronize()
        print("thread", torch.equal(res[0], want))
        runs = [attention(q, q, q, causal=True, implementation="cuda_v1") for _ in range(20)]
        print("repeatable", all(torch.equal(r, want) for r in runs))
        x = q.clone().requires_grad_()
        attention(x, x, x, causal=True, implementation="cuda_v1").sum().backward()
        print("backward", bool(x.grad.isfinite().all()))
        t0 = time.perf_counter()
        for _ in range(2000):
            attention(q, q, q, implementation="cuda_v1")
        t1 = time.perf_counter(); torch.cuda.synchronize()
        print(f"host time a call {1e6*(t1-t0)/2000:.1f} us (v2:", end=" ")
        attention(q, q, q, implementation="v2"); torch.cuda.synchronize()
        t0 = time.perf_counter()
        for _ in range(2000):
            attention(q, q, q, implementation="v2")
        print(f"{1e6*(time.perf_counter()-t0)/2000:.1f} us)"); torch.cuda.synchronize()

    from triton.testing import do_bench

    def ms(f):
        return do_bench(f, warmup=20, rep=80, return_mode="median")

    def tf(b, s, h, d, causal, t):
        return 4 * b * h * s * s * d * (0.5 if causal else 1) / t / 1e9

    if "time" in ARGS:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        import torch.nn.functional as nnf
        shapes = [(32, 512, 512 // d, d) for d in (64, 128)] + [(16, 1024, 512 // d, d) for d in (64, 128)] \
            + [(8, 2048, 512 // d, d) for d in (64, 128)] + [(4, 4096, 512 // d, d) for d in (64, 128)] \
            + [(4, 4096, 16, d) for d in (32, 64, 96, 128, 192, 256)]
        names = [n for n in ("v1", "v2", "v3") if n in __import__("triflash").implementations()]
        for dtype in (torch.float16, torch.bfloat16):
            for causal in (False, True):
                print(f"{str(dtype)[6:]} causal={causal}: batch seqlen heads headdim | cuda_v1 ms TFLOP/s | sdpa-flash |", *names)
                for b, s, h, d in shapes:
                    q, k, v = (torch.randn(b, s, h, d, device=dev, dtype=dtype) for _ in range(3))
                    t = ms(lambda: attention(q, k, v, causal=causal, implementation="cuda_v1"))
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
                        ts = ms(lambda: nnf.scaled_dot_product_attention(qt, kt, vt, is_causal=causal))
                    line = f"{b:3} {s:5} {h:3} {d:4} | {t:.4f} {tf(b,s,h,d,causal,t):6.1f} | {ts:.4f} {tf(b,s,h,d,causal,ts):6.1f} |"
                    for n in names:
                        try:
                            tn = ms(lambda: attention(q, k, v, causal=causal, implementation=n))
                            line += f" {n} {tn:.4f} {tf(b,s,h,d,causal,tn):6.1f}"
                        except Exception as e:
                            line += f" {n} {type(e).__name__}"
                    print(line, flush=True)

    if "sweep" in ARGS:
        from cuda.bindings import driver
        from cuda.core import ObjectCode
        print("sweep: width bm bn warps min_blocks stages q_in_regs ptxas | TFLOP/s full, causal at 4x4096x16; blocks of 512")
        for config, level, cubin, _ in done[len(jobs):]:
            if isinstance(cubin, str):
                continue
            kernel = ObjectCode.from_cubin(cubin).get_kernel("attention_forward")
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.cuKernelSetAttribute(attribute, config.shared_bytes, kernel.handle, 0)
            line = []
            for (b, s, h), causal in itertools.product(((4, 4096, 16), (32, 512, 8)), (False, True)):
                d = config.width
                q, k, v = (torch.randn(b, s, h, d, device=dev, dtype=config.dtype) for _ in range(3))
                spec = Case(batch=b, seqlen_q=s, seqlen_k=s, nheads=h, nheads_k=h, headdim=d, headdim_v=d, dtype=config.dtype, causal=causal).spec()
                base = F._prepare(spec, target, 0, q.stride()[:3], k.stride()[:3], v.stride()[:3], True)
                launch = dataclasses.replace(base, config=config, blocks=math.ceil(s / config.block_m) * h * b)
                out, lse = torch.empty_like(q), torch.empty(b, h, s, device=dev)
                from cuda.core import launch as go
                stream = F._stream(torch.cuda.current_stream().cuda_stream)
                grid = F._grid(launch.blocks, config)
                args = [t.data_ptr() for t in (q, k, v, out, lse)]
                try:
                    t = ms(lambda: go(stream, grid, kernel, *args, *launch.scalars))
                    line.append(f"{tf(b,s,h,d,causal,t):6.1f}")
                    if s == 512:
                        e = attention(q, k, v, causal=causal, implementation="cuda_v1")
                        if (e - out).abs().max() > 4e-3: line.append("WRONG")
                except Exception as e:
                    line.append(f"{type(e).__name__} {e}")
            print(config.width, config.block_m, config.block_n, config.num_warps, config.min_blocks, config.stages, int(config.q_in_registers), f"O{level}", "|", *line, flush=True)


if __name__ == "__main__":
    main()
