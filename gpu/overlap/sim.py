"""Producer and warpgroups of v3's forward with overlap as coroutines over mbarriers that know parities alone.

Checks under random delays: no deadlock; no slot is written while it is read, or read with other contents than those meant;
fields and out likewise; the hardware's barriers of turns complete by one sync and one arrive. sim.py RUNS SEED
"""
import random, sys
from dataclasses import dataclass, replace
class Bad(Exception): pass
class Bar:
    def __init__(s, count): s.count = count; s.left = count; s.tx = 0; s.phase = 0
    def done(s):
        if s.left == 0 and s.tx == 0: s.phase += 1; s.left = s.count
        if s.left < 0: raise Bad("more arrivals than the barrier counts")
    def arrive(s): s.left -= 1; s.done()
    def expect(s): s.left -= 1; s.tx += 1  # pending count and bytes
    def land(s): s.tx -= 1; s.done()
    def ok(s, parity): return s.phase & 1 != parity
class Slot:
    def __init__(s, name): s.name = name; s.what = None; s.readers = 0; s.loading = False
    def begin_load(s, what):
        if s.readers: raise Bad(f"{s.name}: loaded while {s.readers} read {s.what}")
        if s.loading: raise Bad(f"{s.name}: loaded twice")
        s.loading = True; s.next = what; s.what = None
    def land(s): s.loading = False; s.what = s.next
    def read(s, what):  # until unread
        if s.loading or s.what != what: raise Bad(f"{s.name}: has {s.what}{' loading' if s.loading else ''}, not {what}")
        s.readers += 1
    def unread(s): s.readers -= 1
class Named:
    def __init__(s): s.arrived = 0; s.synced = 0; s.gen = 0
    def add(s, kind):
        if kind == "a": s.arrived += 1
        else: s.synced += 1
        if s.arrived + s.synced == 2:
            if s.arrived != 1: raise Bad(f"a turn of {s.arrived} arrivals and {s.synced} syncs")
            s.arrived = s.synced = 0; s.gen += 1
@dataclass(frozen=True)
class C:
    consumers: int; block_n: int; stages: int; stages_k: int; slots_q: int
    causal: bool; edges: bool; rolling: bool; overlap: bool; alias: bool; registers: bool  # all of q in registers
    turns: bool; packed: bool; lists: bool; left: object; right: object
    bug: str = ""
    @property
    def stages_q(s): return -(-s.slots_q // s.consumers)
ROWS = 64
cdiv = lambda a, b: -(-a // b)
tdiv = lambda a, b: int(a / b) if a % b == 0 else (a // b if (a >= 0) == (b > 0) else -(-a // b) if False else int(a / b))
def blocks_of(start, sq, sk, c, m):
    n = c.block_n; shift = sk - sq
    if c.causal or c.right is not None:
        shift += 0 if c.causal else c.right
        end = min(sk, max(0, start + m + shift)); full = min(sk, max(0, start + 1 + shift))
    else: end = full = sk
    full = full // n
    end = max(cdiv(end, n), 1)
    begin = inner = 0
    if c.left is not None:
        f = start + sk - sq - c.left
        begin = max(0, f) // n * n; inner = cdiv(max(0, f + m - 1), n) * n
        begin = min(begin // n, end - 1); inner //= n
    return begin, inner, full, end
def full_of_q(t, w, c): return t % c.stages_q * c.consumers + w, t // c.stages_q & 1
def slot_of_q(t, w, c):
    if c.slots_q % c.consumers == 0: return full_of_q(t, w, c)
    x = t * c.consumers + w
    return x % c.slots_q, x // c.slots_q & 1
class World:
    def __init__(w, c, tiles, rng):
        w.c, w.tiles, w.rng = c, tiles, rng
        w.k = [Slot(f"k{i}") for i in range(c.stages_k)]; w.v = [Slot(f"v{i}") for i in range(c.stages)]
        w.q = [Slot(f"q{i}") for i in range(c.slots_q)]; w.o = w.q if c.alias else [Slot(f"o{i}") for i in range(c.consumers)]
        w.fields = [None] * c.slots_q
        w.q_full = [Bar(1) for _ in range(c.stages_q * c.consumers)]; w.q_empty = [Bar(1) for _ in range(c.slots_q)]
        w.k_full = [Bar(1) for _ in range(c.stages_k)]; w.k_empty = [Bar(c.consumers) for _ in range(c.stages_k)]
        w.v_full = [Bar(1) for _ in range(c.stages)]; w.v_empty = [Bar(c.consumers) for _ in range(c.stages)]
        w.turn = [Named() for _ in range(c.consumers)]
        w.flying = []  # loads and stores under way: functions that end them
        w.done = {}  # (tile, warpgroup): blocks of k, blocks of v
        w.storing = [[] for _ in range(c.consumers)]
    def load(w, slot, what, bar):
        slot.begin_load(what); bar.expect()
        def land(): slot.land(); bar.land()
        w.flying.append(land)
def wait(bar, parity, pred=True):
    if pred:
        yield lambda: bar.ok(parity)
    else: yield None
def range_of(w, T):  # first, last of a tile; its list of blocks
    c = w.c; start, sq, sk, count = w.tiles[T]
    if c.lists: return 0, max(count, 1)
    b, _, _, e = blocks_of(start, sq, sk, c, ROWS * c.consumers)
    return b, e
def producer(w):
    c = w.c; n = 0; prev = None
    def fill_k(T, i, n):
        yield from wait(w.k_empty[n % c.stages_k], n // c.stages_k & 1 ^ 1)
        w.load(w.k[n % c.stages_k], ("k", T, i), w.k_full[n % c.stages_k])
    def fill_v(x, p):
        yield from wait(w.v_empty[p % c.stages], p // c.stages & 1 ^ 1)
        w.load(w.v[p % c.stages], ("v", *x), w.v_full[p % c.stages])
    for T in range(len(w.tiles)):
        first, last = range_of(w, T); blocks = last - first
        for i in range(blocks if c.rolling else blocks + 1):
            at = last - 1 - i
            if c.rolling:
                yield from fill_k(T, at, n)
                if not c.overlap or c.bug != "q before v":
                    if n > 0: yield from fill_v(prev, n - 1)
                    prev = (T, at)
            elif i < blocks: yield from fill_k(T, at, n)
            if i == 0:
                for W in range(c.consumers):
                    slot, phase = slot_of_q(T, W, c)
                    if c.bug != "q unasked": yield from wait(w.q_empty[slot], phase ^ 1)
                    w.fields[slot] = T
                    ready, _ = full_of_q(T, W, c)
                    yield None
                    w.load(w.q[slot], ("q", T, W), w.q_full[ready])
            if c.rolling and c.overlap and c.bug == "q before v":
                if n > 0: yield from fill_v(prev, n - 1)
                prev = (T, at)
            if not c.rolling and i > 0: yield from fill_v((T, last - i), n - 1)
            n += 1
        if not c.rolling: n -= 1
    if c.rolling and n > 0: yield from fill_v(prev, n - 1)
    t = len(w.tiles)
    for W in range(c.consumers):
        slot, phase = slot_of_q(t, W, c)
        yield from wait(w.q_empty[slot], phase ^ 1)
        w.fields[slot] = -1
        ready, _ = full_of_q(t, W, c)
        yield None
        w.q_full[ready].arrive()
def await_turn(w, W):
    b = w.turn[W]; gen = b.gen; b.add("s")
    yield lambda: b.gen != gen
def pass_turn(w, W): w.turn[(W + 1) % w.c.consumers].add("a")
def store_wait(w, W):
    mine = w.storing[W]
    yield lambda: not mine
def walked(w, T, W):
    c = w.c
    if T < 0: start, sq, sk = -1, *(w.tiles[0][1:3] if not c.packed else (0, 0)); count = 1
    else: start, sq, sk, count = w.tiles[T]
    first, _, _, last = blocks_of(start, sq, sk, c, ROWS * c.consumers)
    begin, _, _, end = blocks_of(start + W * ROWS, sq, sk, c, ROWS)
    if c.lists: first = begin = 0; last = end = max(count, 1)
    return start, sq, first, last, begin, end
def write(w, W, t, T):
    c = w.c
    o = slot_of_q(t, W, c)[0] if c.alias else W
    if not c.alias: yield from store_wait(w, W)
    slot = w.o[o]
    if slot.readers or slot.loading: raise Bad(f"out written to {slot.name}: {slot.readers} readers, loading {slot.loading}, {slot.what}")
    slot.what = ("o", T, W)
    yield None
    slot.read(("o", T, W)); w.storing[W].append(1)
    def stored(): slot.unread(); w.storing[W].pop()
    w.flying.append(stored)
    if T < 0: raise Bad("out of a tile that is not there")
def step_loop(w, W, T, n, end, begin, q, kd, vd):
    c = w.c
    for i in range(1, end - begin):
        yield from wait(w.k_full[(n + 1) % c.stages_k], (n + 1) // c.stages_k & 1)
        if c.turns: yield from await_turn(w, W)
        ks, vs = w.k[(n + 1) % c.stages_k], w.v[n % c.stages]
        ks.read(("k", T, end - 1 - i)); kd.append(end - 1 - i)
        if q: q.read(("q", T, W))
        yield from wait(w.v_full[n % c.stages], n // c.stages & 1)
        vs.read(("v", T, end - i)); vd.append(end - i)
        if c.turns: pass_turn(w, W)
        yield None
        ks.unread(); q and q.unread()
        w.k_empty[(n + 1) % c.stages_k].arrive()
        yield None
        vs.unread(); w.v_empty[n % c.stages].arrive()
        n += 1
    return n
def base(w, W):
    c = w.c; t = n = 0
    if c.turns and W == 0: pass_turn(w, c.consumers - 1)
    yield from wait(w.q_full[W], 0)
    T = w.fields[W]
    def pass_by(count, n):
        for _ in range(count):
            yield from wait(w.k_full[n % c.stages_k], n // c.stages_k & 1); w.k_empty[n % c.stages_k].arrive()
            yield from wait(w.v_full[n % c.stages], n // c.stages & 1); w.v_empty[n % c.stages].arrive()
            if c.turns: yield from await_turn(w, W); pass_turn(w, W)
            n += 1
        return n
    while T >= 0:
        if T != t: raise Bad(f"fields of {T}, not of {t}")
        qs, _ = slot_of_q(t, W, c); q = w.q[qs]
        start, sq, first, last, begin, end = walked(w, T, W)
        if start + W * ROWS >= sq: begin, end = first, first + 1
        n = yield from pass_by(last - end, n)
        q.read(("q", T, W)); yield None; q.unread()
        if c.registers: w.q_empty[qs].arrive(); q = None
        kd, vd = [], []
        yield from wait(w.k_full[n % c.stages_k], n // c.stages_k & 1)
        if c.turns: yield from await_turn(w, W)
        ks = w.k[n % c.stages_k]; ks.read(("k", T, end - 1)); kd.append(end - 1); q and q.read(("q", T, W))
        if c.turns: pass_turn(w, W)
        yield None
        ks.unread(); q and q.unread(); w.k_empty[n % c.stages_k].arrive()
        n = yield from step_loop(w, W, T, n, end, begin, q, kd, vd)
        if not c.alias and not c.registers: w.q_empty[qs].arrive()
        yield from wait(w.v_full[n % c.stages], n // c.stages & 1)
        vs = w.v[n % c.stages]; vs.read(("v", T, begin)); vd.append(begin); yield None; vs.unread()
        w.v_empty[n % c.stages].arrive(); n += 1
        if c.left is not None: n = yield from pass_by(begin - first, n)
        yield from write(w, W, t, T)
        if c.alias: yield from store_wait(w, W); w.q_empty[slot_of_q(t, W, c)[0]].arrive()
        w.done[T, W] = kd, vd
        t += 1
        ready, phase = full_of_q(t, W, c)
        yield from wait(w.q_full[ready], phase)
        T = w.fields[slot_of_q(t, W, c)[0]]
    yield from store_wait(w, W)
def ahead(w, W):
    c = w.c; t = n = 0
    if c.turns and W == 0: pass_turn(w, c.consumers - 1)
    window = c.left is not None or c.right is not None
    diagonal = c.causal and (c.edges or c.block_n % (ROWS * c.consumers) != 0)
    def pass_k(count, n):
        for _ in range(count):
            yield from wait(w.k_full[n % c.stages_k], n // c.stages_k & 1); w.k_empty[n % c.stages_k].arrive()
            if c.turns: yield from await_turn(w, W); pass_turn(w, W)
            n += 1
        return n
    def begun(t, n):
        ready, phase = full_of_q(t, W, c)
        yield from wait(w.q_full[ready], phase)
        qs, _ = slot_of_q(t, W, c)
        T = w.fields[qs]
        if T != (t if t < len(w.tiles) else -1): raise Bad(f"fields of {T}, not of {t}")
        start, sq, first, last, begin, end = walked(w, T, W)
        middle = 0; before = 0
        if start + W * ROWS >= sq:
            if c.bug == "no skip": before = last - 1 - first; begin, end = first, first + 1
            else: middle = last - 1 - first; first = begin = last - 1; end = last
        passed = 0
        if ((window or diagonal) and not c.lists) or c.bug == "no skip":
            if start >= 0: passed = last - end
        elif start >= 0 and last != end: raise Bad("blocks to pass by that were said not to be")
        n = yield from pass_k(passed, n)
        q = w.q[qs]
        yield from wait(w.k_full[n % c.stages_k], n // c.stages_k & 1, start >= 0)
        if c.turns: yield from await_turn(w, W)
        ks = w.k[n % c.stages_k]
        if T >= 0: ks.read(("k", T, end - 1)); q and q.read(("q", T, W))
        if c.turns: pass_turn(w, W)
        yield None
        return n, passed, T, q, ks, first, middle, begin, end
    def seen(T, q, ks, n):  # waited for
        if T >= 0: ks.unread(); q and q.unread()
        w.k_empty[n % c.stages_k].arrive()
    def pass_v(count, n):
        for _ in range(count):
            yield from wait(w.v_full[n % c.stages], n // c.stages & 1); w.v_empty[n % c.stages].arrive()
            n += 1
    n, passed, T, q, ks, first, middle, begin, end = yield from begun(0, 0)
    seen(T, q, ks, n)
    if c.bug != "first v": yield from pass_v(passed, n - passed)
    while T >= 0:
        kd, vd = [end - 1], []
        yield None
        qs, _ = slot_of_q(t, W, c)
        if c.registers: q.read(("q", T, W)); yield None; q.unread(); w.q_empty[qs].arrive(); q = None
        if c.alias:
            if c.bug != "no store wait": yield from store_wait(w, W)
            if t > 0: w.q_empty[slot_of_q(t + c.stages_q - 1, W, c)[0]].arrive()
        n = yield from step_loop(w, W, T, n, end, begin, q, kd, vd)
        v_at = begin
        for i in range(middle):
            yield from wait(w.v_full[n % c.stages], n // c.stages & 1); w.v_empty[n % c.stages].arrive()
            n += 1; v_at -= 1
            yield from wait(w.k_full[n % c.stages_k], n // c.stages_k & 1); w.k_empty[n % c.stages_k].arrive()
            if c.turns: yield from await_turn(w, W); pass_turn(w, W)
        if not c.registers and not c.alias: w.q_empty[qs].arrive()
        yield from wait(w.v_full[n % c.stages], n // c.stages & 1)
        vs = w.v[n % c.stages]; vs.read(("v", T, v_at)); vd.append(v_at)
        next_n = n + 1
        if c.left is not None: next_n = yield from pass_k(begin - first, next_n)
        next_n, passed, T2, q2, ks2, first, middle, begin, end = yield from begun(t + 1, next_n)
        w.most = max(w.most, next_n - n - 1)
        if c.bug != "early v": yield None; vs.unread()
        w.v_empty[n % c.stages].arrive()
        if c.bug == "early v": yield None; yield None; vs.unread()
        yield from pass_v(next_n - n - 1, n + 1)
        n = next_n
        yield from write(w, W, t, T)
        w.done[T, W] = kd, vd
        t += 1
        seen(T2, q2, ks2, n)
        T, q = T2, q2
    yield from store_wait(w, W)
def run(c, tiles, rng):
    w = World(c, tiles, rng); w.most = 0
    agents = [producer(w)] + [(ahead if c.overlap else base)(w, W) for W in range(c.consumers)]
    conds = [next(a, "end") for a in agents]
    speed = [rng.choice((1, 1, 3, 10)) for _ in agents]; fly = rng.choice((.1, 1, 5))
    while True:
        ready = [i for i, x in enumerate(conds) if x != "end" and (x is None or x())]
        if not ready and not w.flying:
            if all(x == "end" for x in conds): break
            raise Bad(f"deadlock: {[i for i, x in enumerate(conds) if x != 'end']} wait")
        weights = [speed[i] for i in ready] + [fly] * len(w.flying)
        j = rng.choices(range(len(weights)), weights)[0]
        if j >= len(ready): w.flying.pop(j - len(ready))(); continue
        try: conds[ready[j]] = next(agents[ready[j]])
        except StopIteration: conds[ready[j]] = "end"
    for T in range(len(tiles)):
        for W in range(c.consumers):
            start, sq, first, last, begin, end = walked(w, T, W)
            if start + W * ROWS < sq:
                want = list(range(end - 1, begin - 1, -1))
                if w.done[T, W] != (want, want): raise Bad(f"tile {T} warpgroup {W} did {w.done[T, W]}, not {want}")
            elif (T, W) not in w.done: raise Bad("a tile was left out")
    for b in w.turn:
        if c.turns and (b.synced or b.arrived > 1): raise Bad("turns are not even")
    return w.most
def random_config(rng, overlap=True):
    consumers, block_n, stages, stages_k = rng.choice([(2, 128, 2, 3), (2, 128, 2, 2), (2, 64, 4, 5), (3, 64, 4, 4), (3, 128, 4, 4), (4, 64, 6, 6), (2, 64, 2, 2), (3, 64, 2, 2), (2, 128, 3, 3)])
    registers = rng.random() < .5
    alias = not registers and rng.random() < .5
    slots_q = consumers * (1 if registers and rng.random() < .7 else 2)
    kind = rng.choice(("full", "causal", "whole", "window", "packed", "packed causal", "lists"))
    left = right = None
    causal = "causal" in kind or kind == "whole" or (kind in ("window", "lists") and rng.random() < .6)
    if kind == "window":
        left = rng.choice((0, 10, 63, 64, 100, 128, 200, 500)) if rng.random() < .8 else None
        if not causal and (left is None or rng.random() < .6): right = rng.choice((0, 10, 64, 100, 300))
    N, M = block_n, 64 * consumers
    whole = kind == "whole"
    tiles = []
    def tile(sq, sk):
        start = rng.randrange(cdiv(max(sq, 1), M)) * M
        return start, sq, sk, rng.choice((0, 1, 2, 3, 7))
    if kind.startswith("packed"):
        for _ in range(rng.randrange(0, 7)):
            sq = rng.choice((1, 64, 65, 128, 300, 700)); sk = rng.choice((0, 1, 64, 128, 300, 900))
            tiles.append(tile(sq, sk))
    else:
        sq = rng.choice((1, 64, 65, 128, 300, 512, 700, 1000)); sk = rng.choice((1, 64, 128, 300, 512, 1000))
        if whole: sk = sq + N * rng.randrange(3)
        for _ in range(rng.randrange(1, 8)): tiles.append(tile(sq, sk))
    turns = rng.random() < .3
    c = C(consumers, block_n, stages, stages_k, slots_q, causal, causal and not whole, rng.random() < .7, overlap, alias, registers, turns, kind.startswith("packed"), kind == "lists", left, right)
    return c, tiles, kind
if __name__ == "__main__":
    runs, seed = int(sys.argv[1]), int(sys.argv[2]); bug = sys.argv[3] if len(sys.argv) > 3 else ""
    from collections import Counter
    seen, bad, most = Counter(), Counter(), 0
    for r in range(runs):
        rng = random.Random(seed * 10**6 + r)
        c, tiles, kind = random_config(rng, overlap=bug != "base")
        c = replace(c, bug=bug)
        if not tiles: tiles = tiles
        if c.stages * c.block_n <= (c.consumers - 1) * 64 and bug != 'few': continue
        try: most = max(most, run(c, tiles, rng)); seen[kind] += 1
        except Bad as e:
            bad[str(e)[:40]] += 1
            if sum(bad.values()) <= 3: print("BAD", r, e, c, tiles)
    print("runs", dict(seen), "bad", sum(bad.values()), dict(bad.most_common(4)), "most passed", most)
