from sim import *
import sim
print("mutations caught:", end=" ")
for name, f in {"end_of_earlier": lambda n, sq, sk, wl: (query_end((n-1)*BN, sq, sk, wl) if n > 0 else 0) + BM,
                "key_range": lambda s, sq, sk: (None, max(0, s + BM + sk - sq)),
                "query_end": lambda start_n, sq, sk, wl: min(sq, max(0, start_n - (sk - sq) + wl + BN - BM))}.items():
    old = getattr(sim, name); setattr(sim, name, f); bad = 0
    for sq, sk, wl in ((300, 300, 100), (500, 700, 65), (100, 1000, 300)):
        try: sim.run(make(1, 1, 1, sq, sk, wl), 132)
        except AssertionError: bad += 1
    setattr(sim, name, old); print(name, bad, "of 3;", end=" ")
print()
for args in ((2,16,16,8192,8192,1024),(2,16,16,8192,8192,256),(2,16,16,8192,8192,128),(8,16,16,2048,2048,256),(2,16,4,8192,8192,1024),(16,16,16,1024,1024,256),(16,16,16,1024,1024,1024),(32,16,16,512,512,256),(32,16,16,512,8192,1024),(16,16,16,1024,8192,1024),(8,16,16,2048,8192,1024),(2,16,16,8192,9000,1024),(1,4,4,8192,8192,1024)):
    S = make(*args)
    o, w = run(S, 132, seed=3); u, _ = run(S, 132, seed=3, ordered=False)
    print(args, f"ordered {o:.0f} steps, without turns {u:.0f}: {o/u:.3f}; waited {100*w:.1f}%")
