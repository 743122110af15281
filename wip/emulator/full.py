import sys; sys.path.insert(0,"/tmp/w/cuda/src"); sys.path.insert(0,".")
import torch
torch.set_num_threads(1)
from emu import *
from triflash.kernels.cuda import forward as F
from triflash.target import Target
from triflash.testing import Case
bad=0
def cfg(d,arch,al,dt,**over):
    c=F.kernel_config(Case(headdim=d,headdim_v=d,dtype=dt).spec(),Target("cuda",arch,132),al)
    m={k:v for k,v in c.macros}; m.update(over); return m
jobs=[]
for dt in (torch.float16,torch.bfloat16):
    for d in (32,64,96,128,192,256):
        if dt==torch.bfloat16 and d not in (64,128): continue
        jobs.append((d,"sm_90",True,dt,{}))
        if dt==torch.float16: jobs.append((d,"sm_90",False,dt,{}))
jobs+=[(128,"sm_89",True,torch.float16,{}),(256,"sm_89",True,torch.float16,{}),(64,"sm_90",True,torch.float16,{"STAGES":"2"}),(128,"sm_90",True,torch.float16,{"STAGES":"2"}),(64,"sm_90",True,torch.float16,{"STAGES":"3","BLOCK_N":"32"})]
n=0
for d,arch,al,dt,over in jobs:
    m=cfg(d,arch,al,dt,**over); print(m,flush=True); lib=build(m)
    bm,bn=int(m["BLOCK_M"]),int(m["BLOCK_N"])
    low=next(w for w in (0,32,64,96,128,192) if True) 
    shapes=[(1,bm,3*bn,1,1,d,d,False),(1,bm+5,2*bn+7,2,1,d,d,True),(2,37,bn*2+1,2,2,max(d-8,8),d,True),(1,2*bm+1,bn-3,1,1,d,max(d-24,8),True),(1,1,bn+1,2,2,d,d,False),(1,5,0,1,1,d,d,False),(1,bm,1,1,1,d,d,False)]
    if not al: shapes=[(a,b,c,e,f,max(g-1,1),max(h-3,1),i) for a,b,c,e,f,g,h,i in shapes]
    for i,s in enumerate(shapes):
        n+=1
        ok=check(lib,m,*s,lazy=i%2,seed=i,pad=0 if al and s[5]%8==0 and s[6]%8==0 and i%3 else (8 if al else 1),offset=32 if al else 33,scale=None if i!=3 else -0.3,dtype=dt)
        bad+=not ok
    ok=check(lib,m,1,40,bn+9,1,1,shapes[0][5],shapes[0][6],True,scale=0.0,dtype=dt,pad=0 if al else 1,offset=32 if al else 33); bad+=not ok
print("checked",n,"bad",bad)
