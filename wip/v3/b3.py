import sys; sys.path.insert(0, "wip/v3")
from b1 import *
import v3_bwd_check
for (d, causal), vs in v3_bwd_check.VARIANTS.items():
    for n, ch in vs.items():
        for l in record(headdim=d, causal=causal, change=ch):
            r = compile_launch(l)
            if not isinstance(r, tuple): continue
            s = report(f"d{d}{'c' if causal else 'f'} {n}", *r); log = ptxas(r[0].asm["ptx"])
            open(f"/tmp/w/v3b/v_{d}{'c' if causal else 'f'}_{n}.sass", "w").write(s)
            print("   ", sorted(set(re.findall(r"C75\d\d", log))), re.findall(r"\d+ bytes spill \w+", log))
