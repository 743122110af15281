"""Variants, check groups and timing cells. A variant is fields of v3's forward configuration."""
ROLL = dict(rolling=True)
OV = dict(overlap=True, rolling=True)                                   # q in registers behind the first product
OVN = dict(overlap=True)                                                # without rolling: what pmx was
S4 = dict(rolling=True, q_in_registers=False, half_q=False, alias=True, slots_q=4)   # q from shared memory, out through it; no overlap
OVS = dict(S4, overlap=True)
OVT = dict(OV, turns=True)
MODS = dict(overlap=True, rolling=True, alias=True, slots_q=4)          # where modifications have q in shared memory anyway
W3Q = dict(overlap=True, rolling=True, alias=True, slots_q=6)           # windows: three of 64 keys, half of q in registers
W3S = dict(W3Q, q_in_registers=False, half_q=False)
W2 = dict(consumers=2, block_n=128, stages=2, stages_k=3, slots_q=2, half_q=False, q_in_registers=True)
W2OV = dict(W2, **OV)
W2S = dict(W2, **OVS)
D64 = dict(overlap=True)
D64R = dict(overlap=True, rolling=True)
D96 = dict(OVS)
KEPT = dict(kept=True)
# label, kind of call, S, batch, {variant: fields}; the first variant is the base
def P(*names): return {n: dict({"base": {}, "roll": ROLL, "ov": OV, "ovn": OVN, "ovs": OVS, "ovt": OVT, "s": S4}[n], **KEPT) for n in names}
CELLS = [
    ("d128 causal 1024", "causal", 1024, 16, P("base", "roll", "ov", "ovn", "ovs", "ovt")),
    ("d128 causal 8192", "causal", 8192, 2, P("base", "roll", "ov", "ovn", "ovs", "s")),
    ("window 1024 8192", "window", 8192, 2, {"base": KEPT, "w3q": dict(W3Q, **KEPT), "w3s": dict(W3S, **KEPT), "w2ov": dict(W2OV, **KEPT), "w2s": dict(W2S, **KEPT)}),
    ("documents 8192", "documents", 8192, 2, {"base": {}, "ov": MODS}),
    ("packed documents 8192", "packed", 8192, 2, {"base": KEPT, "ov": dict(OV, **KEPT), "ovs": dict(OVS, **KEPT)}),
    ("d128 causal 512", "causal", 512, 32, P("base", "roll", "ov", "ovn", "ovs", "ovt")),
    ("d128 full 512", "full", 512, 32, P("base", "roll", "ov", "ovs")),
    ("d128 full 2048", "full", 2048, 8, P("base", "ov", "ovs")),
    ("d128 full 16384", "full", 16384, 1, P("base", "ov", "ovs")),
    ("d128 causal 2048", "causal", 2048, 8, P("base", "roll", "ov", "ovs")),
    ("d128 causal 16384", "causal", 16384, 1, P("base", "ov", "ovs")),
    ("softcap 8192", "softcap", 8192, 2, {"base": {}, "ov": MODS}),
    ("ALiBi 8192", "alibi", 8192, 2, {"base": KEPT, "ov": dict(MODS, **KEPT)}),
    ("d64 causal 1024", "d64 causal", 1024, 16, {"base": KEPT, "ov": dict(D64, **KEPT), "ovr": dict(D64R, **KEPT)}),
    ("window 256 8192", "window 256", 8192, 2, {"base": KEPT, "w3q": dict(W3Q, **KEPT), "w3s": dict(W3S, **KEPT)}),
    ("d128 causal 4096", "causal", 4096, 4, P("base", "roll", "ov", "ovs")),
]
# Checks: (name, fields, [(case options, growth of the first keys)])
def C(b, m, n, h=4, hk=None, d=128, **f): return dict(batch=b, seqlen_q=m, seqlen_k=n, nheads=h, nheads_k=hk or h, headdim=d, **f)
# Sizes so that cases of a group share kernels with each other and with the cells, where they can.
WHOLE = [C(16, 512, 512, 16, causal=True), C(2, 1024, 1024, 8, 2, causal=True), C(70, 128, 128, 8, causal=True), C(1, 2048, 2304, 4, causal=True), C(33, 256, 256, 8, causal=True)]
EDGES = [C(2, 1000, 1100, 8, 4, causal=True), C(3, 333, 777, causal=True), C(2, 777, 333, causal=True), C(1, 2049, 2100, 4, 2, causal=True), C(40, 65, 70, 8, causal=True)]
FULL = [C(16, 512, 512, 16), C(33, 300, 384, 8, 4), C(2, 65, 1024), C(40, 1, 128, 16), C(2, 1100, 128)]
TAIL = [C(33, 300, 411, 8, 4), C(2, 65, 1000), C(40, 1, 64, 16)]
WIN = [C(2, 1536, 1536, 8, 4, causal=True, window_size=(w, 0)) for w in (0, 63, 64, 100, 300, 1024)] + [C(2, 1024, 1600, causal=True, window_size=(200, 0)), C(40, 64, 64, 8, causal=True, window_size=(20, 0)), C(2, 1000, 1024 + 40, causal=True, window_size=(300, 0))]
BOTH = [C(2, 1000, 1500, window_size=(100, 200)), C(2, 900, 700, window_size=(100, 64)), C(2, 1000, 1500, window_size=(None, 200))]
grown = lambda cases: [(c, g) for c in cases[:2] for g in (1.0, 40.0)] + [(c, 1.0) for c in cases[2:]]
ones = lambda cases: [(c, 1.0) for c in cases]
CHECKS = [
    ("ov causal", dict(OV, **KEPT), grown(WHOLE)), ("ovs causal", dict(OVS, **KEPT), grown(WHOLE)), ("ovn causal", dict(OVN, **KEPT), ones(WHOLE)), ("ovt causal", dict(OVT, **KEPT), ones(WHOLE)),
    ("w3q window", dict(W3Q, **KEPT), grown(WIN)), ("w3s window", dict(W3S, **KEPT), ones(WIN)), ("w2ov window", dict(W2OV, **KEPT), ones(WIN[:6])), ("w2s window", dict(W2S, **KEPT), ones(WIN[:6])),
    ("ov documents", MODS, [("documents", 1.0), ("gaps", 1.0), ("stripes", 1.0)]), ("ov packed", dict(OV, **KEPT), "packed"), ("ovs packed", dict(OVS, **KEPT), "packed"),
    ("ov full", dict(OV, **KEPT), grown(FULL)), ("ovs full", dict(OVS, **KEPT), grown(FULL)), ("ov edges", OV, ones(EDGES)), ("ovs edges", OVS, ones(EDGES)), ("ov tail", OV, ones(TAIL)),
    ("ov softcap", MODS, ones([C(2, 1024, 1024, causal=True, softcap=20.0), C(16, 200, 256, causal=True, softcap=30.0)])),
    ("ov alibi", dict(MODS, **KEPT), ones([C(2, 1024, 1024, causal=True, alibi="heads"), C(20, 384, 384, 8, causal=True, alibi="heads")])),
    ("ov d64", dict(D64, **KEPT), grown([C(16, 512, 512, 16, d=64, causal=True), C(33, 192, 192, 8, d=64, causal=True)])), ("ovr d64", dict(D64R), ones([C(2, 1000, 1100, 8, 2, d=64, causal=True), C(33, 300, 411, 8, d=64)])),
    ("w3s both", W3S, ones(BOTH)), ("ov d96", dict(D96, **KEPT), ones([C(2, 1024, 1024, d=96, causal=True), C(9, 256, 512, d=96, causal=True)])),
    ("ovs fp16", dict(OVS, turns=True), ones([C(4, 1000, 1000, 8, causal=True, dtype="float16"), C(33, 300, 300, causal=True, dtype="float16")])),
]
CHECKED = {("causal", n) for n in ("ov", "ovs", "ovn", "ovt")} | {("window", n) for n in ("w3q", "w3s", "w2ov", "w2s")} | {("documents", "ov"), ("packed", "ov"), ("packed", "ovs"), ("full", "ov"), ("full", "ovs"), ("softcap", "ov"), ("alibi", "ov"), ("d64 causal", "ov")}
