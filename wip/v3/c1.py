import sys; sys.path.insert(0, "wip/v3")
from v3_aot import *
c, dt = build(d=int(sys.argv[1]), consumers=int(sys.argv[2]), causal=sys.argv[3]=="c", dynamic=sys.argv[3]=="c")
s = report(" ".join(sys.argv[1:]), c, dt)
open("/tmp/w/v3/out.sass","w").write(s); open("/tmp/w/v3/out.ptx","w").write(c.asm["ptx"]); open("/tmp/w/v3/out.ttgir","w").write(c.asm["ttgir"])
