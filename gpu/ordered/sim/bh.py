"""bh.py TREE OUT [names]: hashes of the PTX of the launches of v3's backward, kernels around too."""
import os, sys, hashlib, json, re
os.environ["TRITON_INTERPRET"] = "0"
tree, out_file, names = sys.argv[1], sys.argv[2], sys.argv[3:]
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
def h(ptx):
    ptx = re.sub(r"^\s*(//|\.loc|\.file).*$", "", ptx, flags=re.M).split(".section")[0]
    ptx = re.sub(r"\s*//.*", "", ptx); ptx = re.sub(r"\$L__\w+", "L", ptx); ptx = "\n".join(l for l in ptx.splitlines() if l.strip())
    return hashlib.sha1(ptx.encode()).hexdigest()[:12]
if __name__ == "__main__":
    gpu, target, _ = aot.TARGETS["sm_90"]
    table = {**EXTRA, **T.BACKWARD_CALLS}
    out = {}
    for name in names or table:
        if name not in table: continue
        try: out[name] = [f"{l.kernel.__name__} {h(aot.compile_launch(l, gpu).asm['ptx'])} {l.grid[0]} {[c for c in l.constexprs if not hasattr(c, 'block_m')] if not l.kernel.is_gluon() else ''}" for l in T.launches_of(target, True, **table[name])]
        except Exception as e: out[name] = repr(e)[:200]
        print(name, out[name], flush=True)
        json.dump(out, open(out_file, "w"), indent=1)
