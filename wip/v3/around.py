import os; os.environ["TRITON_INTERPRET"]="1"
import torch, sys
# gluon asserts under the interpreter: take the two Triton kernels' source alone
import re, types
src=open("src/triflash/kernels/v3/backward.py").read()
parts=["import triton, torch\nimport triton.language as tl\nfrom triflash.kernels.common.softmax import lse_to_log2\n"]
for n in ("before_kernel","after_kernel"):
    i=src.index("def "+n); i=src.rindex("@triton.jit",0,i); j=src.find("\n\n\n",i); parts.append(src[i:j]+"\n\n")
open("/tmp/w/v3b/around_mod.py","w").write("".join(parts)); sys.path.insert(0,"/tmp/w/v3b")
import around_mod as A
def pack(part): return part.reshape(4,2,8,8,4,2).permute(3,0,2,4,1,5).reshape(-1)
for (d,dv,BM,W,Sq,H,Bt) in ((64,64,128,64,200,3,2),(128,128,64,128,100,2,2),(40,72,64,128,70,2,1),(16,8,128,64,5,2,1)):
    out=torch.randn(Bt,Sq,H,dv).half(); do=torch.randn(Bt,Sq,H,dv).half(); lse=torch.randn(Bt,H,Sq); lse[0,0,2]=-float("inf"); dl=torch.randn(Bt,H,Sq)
    tm=-(-Sq//BM); tiles=tm*H*Bt
    stats=torch.full((tiles,2*BM),float("nan")); sums=torch.full((tiles*BM*W//128,128),float("nan"))
    A.before_kernel[(tiles,)](out,do,lse,dl,stats,sums,*out.stride()[:3],*do.stride()[:3],H,Sq,dv,BM,W,True)
    assert (sums==0).all()
    st=stats.view(Bt,H,tm,2,BM).transpose(2,3).reshape(Bt,H,2,tm*BM)
    want=torch.full((Bt,H,tm*BM),float("inf")); want[...,:Sq]=torch.where(lse==-float("inf"),float("inf"),lse*1.4426950408889634)
    torch.testing.assert_close(st[:,:,0],want)
    w=torch.zeros(Bt,H,tm*BM); w[...,:Sq]=-((out.float()*do.float()).sum(-1).transpose(1,2)-dl)
    torch.testing.assert_close(st[:,:,1],w,atol=1e-4,rtol=1e-4)
    g=torch.randn(Bt,H,tm*BM,W)
    P=BM//64*(W//64); flat=[]
    for t in g.view(-1,BM,W):
        for p in range(P):
            r,c=p//(W//64),p%(W//64); flat.append(pack(t[r*64:r*64+64,c*64:c*64+64]))
    sums=torch.stack(flat); dq=torch.full((Bt,Sq,H,d),float("nan")).half()
    A.after_kernel[(tiles*P,)](sums,dq,0.3,H,Sq,d,BM,W)
    torch.testing.assert_close(dq,(g[:,:,:Sq,:d]*0.3).transpose(1,2).half())
print("ok")
