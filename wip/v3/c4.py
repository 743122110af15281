import sys; sys.path.insert(0, "wip/v3")
from c2 import *
c, dt, l = compile_call(causal=True)
ptx = c.asm["ptx"]; open("/tmp/w/v3/d128c.ptx", "w").write(ptx)
L = ptx.splitlines()
for i, x in enumerate(L):
    if "atom" in x:
        print("\n".join(L[i-8:i+22])); print("-----")
print([x.strip() for x in L if "setmaxnreg" in x])
import triton.runtime.jit as J
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
backend = make_backend(GPUTarget("cuda", 90, 32))
print([J.native_specialize_impl(backend.__class__ if 0 else backend, a, False, True, True) for a in l.args])
