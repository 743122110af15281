import sys; sys.path.insert(0, "wip/v3")
from c2 import *
import v3_check
from dataclasses import replace
from unittest import mock
from triflash import tuning
orig = tuning.v3_forward
for (d, causal), vs in v3_check.VARIANTS.items():
    for n, ch in vs.items():
        if len(sys.argv) > 1 and not any(a in f"d{d}{'c' if causal else 'f'} {n}" for a in sys.argv[1:]): continue
        with mock.patch.object(tuning, "v3_forward", lambda s, t: replace(orig(s, t), **ch)):
            try:
                c, dt, l = compile_call(headdim=d, causal=causal)
                s = report(f"d{d}{'c' if causal else 'f'} {n}", c, dt)
                open(f"/tmp/w/v3/v_{d}{'c' if causal else 'f'}_{n}.sass", "w").write(s)
            except Exception as ex:
                print(d, causal, n, "FAILED", type(ex).__name__, str(ex)[-300:])
