"""Cycles of two warpgroups and a producer of v3 on one multiprocessor, with a tensor pipe they share. Durations are guesses that fit base."""
import heapq, random, sys
def run(tiles, mode, S=1000, F=1500, E=700, P=300, PV=120, rolling=False, L=800, LQ=1200, mma=512, sk=3, sv=2, draw=0, seed=0, fields=60):
    """tiles: blocks of each tile; mode base or ov"""
    rng = random.Random(seed)
    now = [0]; heap = []; cnt = [0]
    free = [0]; busy = [0]
    def at(t, f): cnt[0] += 1; heapq.heappush(heap, (t, cnt[0], f))
    kfull, vfull, qfull = {}, {}, {}     # landed
    krel, vrel, qrel = {}, {}, {}        # count of releases
    def land(d, key, lat): at(now[0] + lat * rng.uniform(.9, 1.3), lambda: d.__setitem__(key, True))
    starts = []; n = 0
    for b in tiles: starts.append(n); n += b
    def producer():
        prev = None; n = 0
        for t, b in enumerate(tiles):
            for i in range(b if rolling else b + 1):
                if i < b or rolling:
                    while n >= sk and krel.get(n - sk, 0) < 2: yield "w"
                    land(kfull, n, L); yield 40
                if rolling and n > 0:
                    while n - 1 >= sv and vrel.get(n - 1 - sv, 0) < 2: yield "w"
                    land(vfull, n - 1, L); yield 40
                if i == 0:
                    for w in range(2):
                        while t > 0 and qrel.get((t - 1, w), 0) < 1: yield "w"
                        yield 60; land(qfull, (t, w), LQ)
                if not rolling and i > 0:
                    while n - 1 >= sv and vrel.get(n - 1 - sv, 0) < 2: yield "w"
                    land(vfull, n - 1, L); yield 40
                if draw and i == (max(b - 3, 0) if rolling else max(b - 2, 1)): yield draw
                n += 1
            if not rolling: n -= 1
        if rolling:
            while n - 1 >= sv and vrel.get(n - 1 - sv, 0) < 2: yield "w"
            land(vfull, n - 1, L)
    def product(done):
        end = max(now[0], free[0]) + mma; free[0] = end; busy[0] += mma
        at(end, lambda: done.append(1))
    j = lambda x: x * rng.uniform(.93, 1.07)
    def rel(d, key): d[key] = d.get(key, 0) + 1
    def consumer(w):
        if w: yield 300
        s = None
        for t, b in enumerate(tiles):
            n = starts[t]
            if mode == "base" or t == 0:
                while (t, w) not in qfull: yield "w"
                yield P
                rel(qrel, (t, w))
                while n not in kfull: yield "w"
                s = []; product(s)
            while not s: yield "w"
            rel(krel, n)
            if mode != "base": rel(qrel, (t, w))
            yield j(F)
            for i in range(1, b):
                while n + 1 not in kfull: yield "w"
                s = []; product(s)
                while n not in vfull: yield "w"
                a = []; product(a); yield 30
                while not s: yield "w"
                rel(krel, n + 1); yield j(S)
                while not a: yield "w"
                rel(vrel, n); yield 60
                n += 1
            while n not in vfull: yield "w"
            a = []; product(a); yield 40
            if mode != "base" and t + 1 < len(tiles):
                while (t + 1, w) not in qfull: yield "w"
                yield PV
                while n + 1 not in kfull: yield "w"
                s = []; product(s)
            while not a: yield "w"
            rel(vrel, n); yield j(E)
        return
    agents = [producer(), consumer(0), consumer(1)]
    state = ["r"] * 3
    def step(i):
        try: x = next(agents[i])
        except StopIteration: state[i] = "end"; return
        if x == "w": state[i] = "w"
        else:
            state[i] = "t"
            def go(i=i): state[i] = "r"
            at(now[0] + x, go)
    while True:
        moved = True
        while moved:
            moved = False
            for i in range(3):
                if state[i] == "r": step(i); moved = True
        if not heap: break
        t, _, f = heapq.heappop(heap); now[0] = t; f()
        while heap and heap[0][0] == t: heapq.heappop(heap)[2]()
        for i in range(3):
            if state[i] == "w": state[i] = "r"
    assert state == ["end"] * 3, state
    return now[0], busy[0] / now[0]
if __name__ == "__main__":
    def causal(S, count=16):  # longest first, as a section of heads
        b = S // 128; per = [x for x in range(b, 0, -1)]
        return per if S >= 8192 else [x for x in per for _ in range(max(1, count // b))]
    T = {"causal 512": causal(512), "causal 1024": causal(1024), "causal 2048": causal(2048), "causal 8192": random.Random(1).choices(range(1, 65), k=16), "full 512": [4] * 16, "full 2048": [16] * 16, "full 16384": [128] * 4, "window 2x128": [9] * 16, "documents": random.Random(2).choices(range(1, 12), k=16)}
    for name, tiles in T.items():
        out = []
        for label, kw in (("base", dict(mode="base")), ("roll", dict(mode="base", rolling=True)), ("ovn", dict(mode="ov")), ("ov", dict(mode="ov", rolling=True))):
            r = [run(tiles, seed=s, draw=900 if "full" not in name else 0, **kw) for s in range(5)]
            out.append((label, sum(x[0] for x in r) / 5, sum(x[1] for x in r) / 5))
        b = out[0][1]
        print(f"{name:14s} {sum(tiles)} blocks " + "  ".join(f"{l} {c / len(tiles):.0f} a tile, x{b / c:.3f}, pipe {u:.2f}" for l, c, u in out))
