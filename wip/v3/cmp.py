# machine code of the measured variants (002f004) beside that of the defaults
import sys,os,dataclasses,re
root,tag=sys.argv[1:3]
sys.path[:0]=[root+'/src',root+'/tests']
os.chdir(root)
import torch, aot, triton
from unittest import mock
from triflash import registry, tuning
from triflash.spec import make_spec
from triflash.kernels.common.launch import Launch
import importlib
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.backends.compiler import GPUTarget
gpu,target,_=aot.TARGETS['sm_90']
B=importlib.import_module('triflash.kernels.v3.backward'); F=importlib.import_module('triflash.kernels.v3.forward')
TY={torch.float16:'fp16',torch.bfloat16:'bf16',torch.float32:'fp32',torch.int32:'i32'}
def comp(d,causal,back,change):
    q=torch.empty(2,4096,4,d,dtype=torch.bfloat16,device='meta')
    spec=make_spec(q,q,q,None,causal,False,False)
    name='v3_backward' if back else 'v3_forward'
    mod=B if back else F
    cfg=dataclasses.replace(getattr(tuning,name)(spec,target),**change)
    ls=[]
    def rec(l,*t): ls.append((l,t))
    mod._prepare.cache_clear()
    with mock.patch.object(Launch,'__call__',rec),mock.patch.object(mod,'target_of',return_value=target),mock.patch.object(tuning,name,return_value=cfg):
        if back: B.backward(torch.empty_like(q),None,q,q,q,torch.empty_like(q),torch.empty(2,4,4096,device='meta'),[],spec)
        else: F.forward(q,q,q,spec)
    [(l,t)]=[(l,t) for l,t in ls if l.kernel.is_gluon()]
    sig,const,attrs={},{},{}
    for i,(p,v) in enumerate(zip(l.kernel.params,(*t,*l.scalars,*l.constexprs),strict=True)):
        if p.is_constexpr: sig[p.name]='constexpr'; const[(i,)]=v
        elif isinstance(v,TensorDescriptor): sig[p.name]=f"tensordesc<{TY[v.base.dtype]}{v.block_shape},{v.layout!r}>"
        elif isinstance(v,torch.Tensor): sig[p.name]='*'+TY[v.dtype]; attrs[(i,)]=[['tt.divisibility',16]]
        elif isinstance(v,float): sig[p.name]='fp32'
        else: sig[p.name]='i32'
    c=triton.compile(GluonASTSource(l.kernel,sig,const,attrs),target=gpu,options={'num_warps':4,'num_stages':1})
    return aot.sass(c.asm['cubin'])
old=tag=='old'
jobs={'b64':(64,False,True,dict(round_p=False)),'b64c':(64,True,True,dict(round_p=False)),'b128':(128,False,True,dict(late_dv=True)),'b128c':(128,True,True,dict(late_dv=True)),
 'f64':(64,False,False,dict(lane_sum=True)),'f64c':(64,True,False,dict(lane_sum=True)),'f128c':(128,True,False,dict(lane_sum=True)),'f256c':(256,True,False,dict(lane_sum=True)),'f128':(128,False,False,dict(lane_sum=True,pin=False)),'f256':(256,False,False,dict(lane_sum=True,pin=False))}
for n,(d,c,b,ch) in jobs.items():
    s=comp(d,c,b,ch if old else {})
    s=re.sub(r'/\*[0-9a-f]{4,5}\*/','',s)
    open(f'/tmp/w/v3/cmp_{n}_{tag}.sass','w').write(s)
