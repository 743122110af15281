"""bh.py TREE OUT [names]: hashes of the PTX of the launches of v3's backward, kernels around too."""
import os, sys, hashlib, json, re
os.environ["TRITON_INTERPRET"] = "0"
tree = sys.argv[1]
sys.path[:0] = [f"{tree}/tests", f"{tree}/src"]
import test_v3 as T, test_mods, aot, torch
test_mods.FEATURED.update({"w1024": {"window_size": (1024, 0)}, "w200": {"window_size": (200, 0)}, "w2000": {"window_size": (2000, 0)},
  "w sinks": {"window_size": (200, 0), "sinks": torch.float32}, "w softcap": {"window_size": (200, 0), "softcap": 3.0}})
W = dict(headdim=128, causal=True, feature="w200")
EXTRA = {
 "x 96 w": {**W, "headdim": 96}, "x 64 w": {**W, "headdim": 64}, "x 256 w": {**W, "headdim": 256}, "x 128/64 w": {**W, "headdim_v": 64}, "x 64/128 w": {**W, "headdim": 64, "headdim_v": 128},
 "x w2000": {**W, "feature": "w2000", "seqlen": 4096}, "x right": {**W, "causal": False, "feature": "right"}, "x few keys": {**W, "seqlen_k": 1000}, "x few keys det": {**W, "seqlen_k": 1000, "deterministic": True},
 "x packed w": {**W, "packed": True}, "x softcap w": {**W, "feature": "w softcap"}, "x sinks w": {**W, "feature": "w sinks"}, "x split w": {**W, "nheads_k": 1}, "x 120 w both det": {**W, "causal": False, "feature": "both", "headdim": 120, "deterministic": True},
}
TABLE = {**EXTRA, **T.BACKWARD_CALLS,
 "w gqa": {**W, "nheads_k": 2, "batch": 64}, "w long k": {**W, "seqlen_k": 1500}, "w fp16 dlse": {**W, "dtype": torch.float16, "dlse": True}, "w tail": {**W, "seqlen": 1000, "seqlen_k": 1100, "nheads_k": 2, "batch": 64}, "w det": {**W, "deterministic": True}, "w": W, "w 120": {**W, "headdim": 120}, "w1024": {**W, "feature": "w1024", "seqlen": 8192, "batch": 2}}
