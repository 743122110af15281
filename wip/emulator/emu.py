import subprocess,ctypes,torch,os,math,hashlib,sys,itertools
INC="/tmp/w/cuda-venv/lib/python3.11/site-packages/"
D="/tmp/w/cuda-scratch/emu"
SRC="/tmp/w/cuda/src/triflash/kernels/cuda"
def build(m):
    key=hashlib.sha1((repr(sorted(m.items()))+open(SRC+"/forward.cu").read()+open(D+"/emu.cpp").read()).encode()).hexdigest()[:12]
    so=f"{D}/{key}.so"
    if not os.path.exists(so):
        cmd=["g++","-std=c++17","-O2","-fno-strict-aliasing","-w","-fPIC","-shared","-fpermissive",f"-I{D}",f"-I{SRC}",f"-I{INC}cutlass_library/source/include",f"-I{INC}nvidia/cu13/include",f"-I{INC}nvidia/cu13/include/cccl"]+[f"-D{k}={v}" for k,v in m.items()]+[D+"/emu.cpp","-o",so]
        r=subprocess.run(cmd,capture_output=True,text=True)
        if r.returncode: print(r.stderr[:4000]); sys.exit(1)
    return ctypes.CDLL(so)
def run(lib,m,q,k,v,scale,causal,lazy=1,seed=0):
    B,sq,H,hd=q.shape; sk,Hk,hdv=v.shape[1:]
    out=torch.full((B*sq*H*hdv+64,),float("nan"),dtype=q.dtype); lse=torch.full((B*H*sq+64,),float("nan"))
    st=(ctypes.c_int64*9)(*q.stride()[:3],*k.stride()[:3],*v.stride()[:3])
    grid=-(-sq//int(m["BLOCK_M"]))*B*H
    p=ctypes.c_void_p
    i=ctypes.c_int64
    lib.launch(ctypes.c_long(grid),lazy,seed,p(q.data_ptr()),p(k.data_ptr()),p(v.data_ptr()),p(out.data_ptr()+64),p(lse.data_ptr()+64),ctypes.c_double(scale*math.log2(math.e)),st,i(H),i(H//Hk),i(sq),i(sk),i(hd),i(hdv),i(int(causal)))
    assert out[:32].isnan().all() and out[-32:].isnan().all(), "out guard"
    assert lse[:16].isnan().all() and lse[-48:].isnan().all(), "lse guard"
    return out[32:-32].view(B,sq,H,hdv), lse[16:-48].view(B,H,sq)
def ref(q,k,v,scale,causal):
    q,k,v=[x.double().transpose(1,2) for x in (q,k,v)]
    g=q.shape[1]//k.shape[1]; k=k.repeat_interleave(g,1); v=v.repeat_interleave(g,1)
    s=q@k.transpose(-1,-2)*scale
    sq,sk=s.shape[-2:]
    if causal:
        mask=torch.arange(sk)[None]>torch.arange(sq)[:,None]+sk-sq
        s=s.masked_fill(mask,-math.inf)
    lse=torch.logsumexp(s,-1) if sk else torch.full(s.shape[:-1],-math.inf,dtype=torch.double)
    p=torch.exp(s-torch.where(lse.isinf(),0.,lse)[...,None])
    return (p@v).transpose(1,2), lse
def guarded(shape,dtype,stride_pad=0,offset=32):
    "tensor whose surroundings are NaN; rows padded by stride_pad elements"
    B,S,H,D=shape
    n=B*S*H*(D+stride_pad)
    buf=torch.full((n+2*offset+64,),float("nan"),dtype=dtype)
    t=buf[offset:offset+n].view(B,S,H,D+stride_pad)[...,:D]
    t.copy_(torch.randn(shape))
    return t
def check(lib,m,B,sq,sk,H,Hk,hd,hdv,causal,scale=None,lazy=1,seed=0,pad=0,offset=32,dtype=None):
    torch.manual_seed(seed)
    dtype=dtype or (torch.float16 if "half" in m["ELEMENT"] else torch.bfloat16)
    scale=hd**-0.5 if scale is None else scale
    q,k,v=guarded((B,sq,H,hd),dtype,pad,offset),guarded((B,sk,Hk,hd),dtype,pad,offset),guarded((B,sk,Hk,hdv),dtype,pad,offset)
    o,l=run(lib,m,q,k,v,scale,causal,lazy,seed)
    ro,rl=ref(q,k,v,scale,causal)
    eo=(o.double()-ro).abs().max().item() if o.numel() else 0
    fin=~rl.isinf()
    el=(l.double()-rl)[fin].abs().max().item() if fin.any() else 0
    okinf=bool((l[~fin]==-math.inf).all()) and not o.isnan().any()
    tol=4e-3 if dtype==torch.float16 else 3e-2
    good=eo<tol and el<2e-3 and okinf
    print("ok " if good else "BAD",dict(B=B,sq=sq,sk=sk,H=H,Hk=Hk,hd=hd,hdv=hdv,causal=causal,scale=round(scale,3),lazy=lazy,pad=pad,offset=offset),f"out {eo:.1e} lse {el:.1e} conflicts {lib.nconf()}",flush=True)
    return good
def mk(el,d,bm,bn,w,s,qr,al,mb=1):
    return dict(ELEMENT=f"cute::{el}",HEADDIM=d,BLOCK_M=bm,BLOCK_N=bn,NUM_WARPS=w,STAGES=s,MIN_BLOCKS=mb,Q_IN_REGISTERS=int(qr),ALIGNED=int(al))
if __name__=="__main__":
    import time
    t=time.time(); m=mk("half_t",64,64,32,4,1,1,1); lib=build(m); print("build",time.time()-t)
    t=time.time(); check(lib,m,1,64,64,1,1,64,64,False); print(time.time()-t)
    check(lib,m,1,64,64,1,1,64,64,True)
    check(lib,m,2,100,77,4,2,64,64,True)
