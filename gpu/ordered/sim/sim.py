"""The turns of v3's ordered backward, with the kernels' own index arithmetic. No GPU, no Triton."""
import heapq, itertools, random, sys
BM, BN = 64, 128
cdiv = lambda a, b: -(-a // b)
def tdiv(a, b):  # C's division, as the kernels have it
    q = abs(a) // abs(b); return q if (a < 0) == (b < 0) else -q
ccdiv = lambda a, b: tdiv(a + (b - 1), b)  # tl.cdiv
class P: pass
def key_range(start_m, sq, sk):
    shift = sk - sq
    return None, min(sk, max(0, start_m + BM + shift))
def query_range(start_n, sq, sk):
    shift = sk - sq
    return tdiv(max(0, start_n - shift), BM) * BM
def query_end(start_n, sq, sk, wl):
    last = start_n - (sk - sq) + wl
    return min(sq, max(0, last + BN))
def last_visit(n, sq, sk):
    start_n = (n + 1) * BN
    return query_range(start_n, sq, sk) if start_n < sk else sq
def end_of_earlier(n, sq, sk, wl):
    return query_end((n - 1) * BN, sq, sk, wl) if n > 0 else 0
def locate(pid, S):
    tiles_n = cdiv(S.sk, BN)
    n, row = pid % tiles_n, pid // tiles_n
    n = tiles_n - 1 - n
    batch, hk = row // S.hk, row % S.hk
    start = query_range(n * BN, S.sq, S.sk)
    end = max(start, query_end(n * BN, S.sq, S.sk, S.wl))
    return n, batch, hk, start, cdiv(end - start, BM)
def steps(pid, S):
    """(row, start_m, turn, ends) of every step, and that consumers say the same of ends."""
    n, batch, hk, start, blocks = locate(pid, S)
    g = S.h // S.hk
    tiles_m = cdiv(S.sq, BM)
    ending = end_of_earlier(n, S.sq, S.sk, S.wl)
    m = 0
    for i in range(g * blocks):
        head = hk * g + i // blocks
        assert m == i % blocks
        start_m = start + m * BM
        row = (batch * S.h + head) * tiles_m + start_m // BM
        turn = cdiv(key_range(start_m, S.sq, S.sk)[1], BN) - 1 - n
        ends = start_m >= ending
        assert ends == (m >= ccdiv(ending - start, BM)), (n, m)
        assert turn >= 0
        # whole-heads-like threshold agrees with the turn
        assert (turn > 0) == (start_m >= last_visit(n, S.sq, S.sk)), (n, start_m)
        yield row, start_m, turn, ends, n
        m += 1
        m = m if m < blocks else 0
def oracle(S):
    """Which tiles of keys add to a tile of queries, by looking at every pair of rows' ranges."""
    tiles_m = cdiv(S.sq, BM)
    want = []
    for t in range(tiles_m):
        keys = set()
        for r in range(t * BM, min(S.sq, t * BM + BM)):
            p = r + S.sk - S.sq
            lo, hi = max(0, p - S.wl), p
            if hi >= lo: keys |= set(range(lo // BN, hi // BN + 1))
        want.append(keys)
    return want
def run(S, sms, seed=None, ordered=True, T=1.0, after=0.35, late=0.6):
    """Event simulation; returns (makespan, waited). after: from handing dq on to its being in memory."""
    rnd = random.Random(seed)
    programs = cdiv(S.sk, BN) * S.hk * S.b
    tiles = cdiv(S.sq, BM) * S.h * S.b
    turn_of = [0] * tiles
    contributions = [[] for _ in range(tiles)]
    stored = [0] * tiles
    waiting = {}   # (row, turn) -> generator waiting
    clock, events, count = 0.0, [], itertools.count()
    waited = [0.0]
    def program(pid, begin):
        t = begin + 1.5 * T
        free = t            # consumers may begin the step
        before = None       # (row, time at which it is in memory)
        for row, start_m, turn, ends, n in steps(pid, S):
            jitter = 1 + (0.3 * rnd.random() if seed is not None else 0)
            lent = t if not ends else None
            if ordered and turn > 0:
                t0 = t
                t = yield ("turn", row, turn, t)
                waited[0] += t - t0
            if before is not None:
                t = max(t, before[1])
                yield ("pass", before[0], t)
            if ends: lent = t + 0.3 * T   # the sums come by TMA
            done = max(free + T * jitter, lent)
            t = max(t, done)
            free = done
            if ordered: assert turn_of[row] == turn, "not its turn"
            contributions[row].append(n)
            if turn == 0: assert len(contributions[row]) == 1 or not ordered
            if ends: stored[row] += 1
            before = (row, t + after * T)
        if before is not None:
            t = max(t, before[1])
            yield ("pass", before[0], t)
        yield ("end", t + 1.0 * T)
    next_pid = 0
    def push(g, value):
        nonlocal next_pid, clock
        while True:
            try: kind, *rest = g.send(value)
            except StopIteration: return
            if kind == "turn":
                row, turn, t = rest
                if turn_of[row] == turn: value = max(t, passed.get((row, turn), 0.0))
                else:
                    assert turn_of[row] < turn, "passed by"
                    assert (row, turn) not in waiting
                    waiting[row, turn] = (g, t); return
            elif kind == "pass":
                row, t = rest
                heapq.heappush(events, (t, next(count), "pass", row)); value = None
                # go on: what comes behind has later times
            else:
                heapq.heappush(events, (rest[0], next(count), "end", None)); return
    passed = {}
    # Programs run ahead of the clock as generators; a wait for a turn is met when that turn's event is processed.
    running = 0
    while next_pid < programs and running < sms:
        g = program(next_pid, 0.0); next_pid += 1; running += 1; push(g, None)
    ended = 0
    while events:
        clock, _, kind, row = heapq.heappop(events)
        if kind == "pass":
            turn_of[row] += 1
            passed[row, turn_of[row]] = clock
            if (row, turn_of[row]) in waiting:
                g, t = waiting.pop((row, turn_of[row]))
                push(g, max(t, clock))
        else:
            ended += 1
            if next_pid < programs:
                g = program(next_pid, clock); next_pid += 1; push(g, None)
    assert ended == programs and not waiting, f"deadlock: {ended} of {programs}, {len(waiting)} wait"
    want = oracle(S)
    tiles_m = cdiv(S.sq, BM)
    for row in range(tiles):
        keys = sorted(want[row % tiles_m], reverse=True)
        got = contributions[row] if ordered else sorted(contributions[row], reverse=True)
        assert got == keys, (row, got, keys)
        assert stored[row] == 1, row
        assert turn_of[row] == len(keys)
    return clock, waited[0] / max(1e-9, clock * min(sms, programs))
def make(b, h, hk, sq, sk, wl):
    S = P(); S.b, S.h, S.hk, S.sq, S.sk, S.wl = b, h, hk, sq, sk, wl; return S
if __name__ == "__main__":
    rnd = random.Random(1)
    n = 0
    lengths = [1, 2, 63, 64, 65, 100, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300, 500, 700, 1000, 1500]
    for sq in lengths:
        for sk in lengths:
            if sk < sq: continue
            for wl in (0, 1, 62, 63, 64, 65, 100, 126, 127, 128, 129, 191, 300, 1000, 1024):
                S = make(1, 2, 1 + (n % 2), sq, sk, wl)
                for sms in (1, 2, 132): run(S, sms)
                n += 1
    for _ in range(1500):
        sq = rnd.randint(1, 900); sk = sq + rnd.choice([0, rnd.randint(0, 900)])
        hk = rnd.randint(1, 3); S = make(rnd.randint(1, 3), hk * rnd.randint(1, 4), hk, sq, sk, rnd.choice([rnd.randint(0, 200), rnd.randint(0, 1024)]))
        run(S, rnd.choice([1, 2, 3, 5, 7, 13, 132]), seed=rnd.random()); n += 1
    print("cases", n, "all turns right, no deadlock")
