"""cc.py TREE names: what the tests ask, registers too, of v3's backward."""
import os, sys, re
os.environ["TRITON_INTERPRET"] = "0"
tree, names = sys.argv[1], sys.argv[2:]
sys.path[:0] = [f"{tree}/tests", f"{tree}/src", "/tmp/w/ord6"]
import triton
import bh_extra as X
T, aot = X.T, X.aot
if __name__ == "__main__":
    print(triton.__version__)
    gpu, target, _ = aot.TARGETS["sm_90"]
    for name in names:
        for l in T.launches_of(target, True, **X.TABLE[name]):
            if not l.kernel.is_gluon(): print("  ", l.kernel.__name__); continue
            try: r = T.code_of(l, True)
            except Exception as e:
                while e.__cause__: e = e.__cause__
                print(name, type(e).__name__, str(e)[-900:]); continue
            sp = [x.strip() for x in r["log"].splitlines() if "spill" in x or "C75" in x or "serial" in x or "Used" in x]
            import re as R
            c = aot.compile_launch(l, gpu)
            print(name, "shared", r["shared"], "hgmma", r["hgmma"], r["hgmma_expected"], "stack", r["stack"], "local", r["local"], r["local_in_loops"], sp, "setmaxnreg", R.findall(r"setmaxnreg.\w+.sync.aligned.u32 (\d+)", c.asm["ptx"]), flush=True)
            if os.environ.get("SASS"): open(os.environ["SASS"], "w").write(aot.sass(c.asm["cubin"]))
