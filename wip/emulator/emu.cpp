#include <cuda_runtime.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cmath>
#include <algorithm>
#include "emu.h"
using std::min; using std::max;
#undef __global__
#define __global__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__
#undef __align__
#define __align__(n)
#include "forward.cu"
#include <ucontext.h>
#include <vector>
#include <deque>
#include <functional>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
constexpr int SH = (BLOCK_M + 2*STAGES*BLOCK_N)*HEADDIM*2;
alignas(1024) unsigned char shared[SH];
EmuIdx emu_thread, emu_block;
constexpr int T = kThreads;
static ucontext_t sched, ctx[T];
static std::vector<char> stacks[T];
static bool done_[T]; static int cur;
static void yield() { int me=cur; swapcontext(&ctx[me], &sched); }
static bool lazy_;
static std::mt19937 rng(1);
// rendezvous
struct Warp { int arrived=0; unsigned gen=0; void* args[32]; int kind=0; };
static Warp warps[NUM_WARPS]; static int block_arrived; static unsigned block_gen; static int live;
template <class F> static void collective(void* args, int kind, F f) {
  Warp& w = warps[cur/32]; unsigned g = w.gen; int me=cur;
  if (w.arrived==0) w.kind=kind; else if (w.kind!=kind) { fprintf(stderr,"divergent warp op\n"); abort(); }
  w.args[me%32]=args;
  if (++w.arrived==32) { f(w.args); w.arrived=0; ++w.gen; }
  else while (w.gen==g) yield();
  
}
static void check_shared(void const* p, int bytes) { auto c=(unsigned char const*)p; if (c<shared||c+bytes>shared+SH){fprintf(stderr,"shared OOB %ld\n",(long)(c-shared));abort();} if ((uintptr_t)p%bytes){fprintf(stderr,"misaligned smem\n");abort();}}
static long conflicts=0, ldsms=0;
long emu_conflicts(){return conflicts;}
struct L { void const* row; uint32_t* d[4]; };
static void do_ldsm(void** args, bool trans) {
  uint16_t m[4][8][8];
  for (int i=0;i<4;++i){ bool used[32]={}; ++ldsms;
    for (int r=0;r<8;++r){ L* l=(L*)args[i*8+r]; check_shared(l->row,16); memcpy(m[i][r],l->row,16);
      int bank=((unsigned char const*)l->row-shared)/4%32; if (used[bank]) ++conflicts; used[bank]=true; } }
  for (int lane=0;lane<32;++lane){ L* l=(L*)args[lane];
    for(int i=0;i<4;++i){ uint16_t lo,hi; if(!trans){lo=m[i][lane/4][lane%4*2];hi=m[i][lane/4][lane%4*2+1];} else {lo=m[i][lane%4*2][lane/4];hi=m[i][lane%4*2+1][lane/4];}
      *l->d[i]=lo|(uint32_t(hi)<<16);} }
}
void emu_ldsm(void const* row, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, bool trans) {
  L l{row,{&a,&b,&c,&d}}; collective(&l,1+trans,[&](void** args){do_ldsm(args,trans);}); }
struct M { uint32_t a[4], b[2]; float c[4]; float* d[4]; };
static float cv(uint16_t h,bool bf){ if(bf){uint32_t u=uint32_t(h)<<16;float f;memcpy(&f,&u,4);return f;} __half_raw r; r.x=h; return __half2float(__half(r)); }
static void do_mma(void** args,bool bf){
  static float A[16][16],B[16][8],C[16][8];
  for(int l=0;l<32;++l){ M*m=(M*)args[l]; int g=l/4,t=l%4;
    for(int i=0;i<4;++i){int r=g+(i%2)*8,c=t*2+(i/2)*8; A[r][c]=cv(m->a[i]&0xffff,bf);A[r][c+1]=cv(m->a[i]>>16,bf);}
    for(int i=0;i<2;++i){int k=t*2+i*8; B[k][g]=cv(m->b[i]&0xffff,bf);B[k+1][g]=cv(m->b[i]>>16,bf);}
    C[g][t*2]=m->c[0];C[g][t*2+1]=m->c[1];C[g+8][t*2]=m->c[2];C[g+8][t*2+1]=m->c[3]; }
  for(int i=0;i<16;++i)for(int j=0;j<8;++j){float s=C[i][j];for(int k=0;k<16;++k)s+=A[i][k]*B[k][j];C[i][j]=s;}
  for(int l=0;l<32;++l){ M*m=(M*)args[l]; int g=l/4,t=l%4; *m->d[0]=C[g][t*2];*m->d[1]=C[g][t*2+1];*m->d[2]=C[g+8][t*2];*m->d[3]=C[g+8][t*2+1]; }
}
void emu_mma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
             uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3, bool bf){
  M m{{a0,a1,a2,a3},{b0,b1},{c0,c1,c2,c3},{&d0,&d1,&d2,&d3}}; collective(&m,3+bf,[&](void**a){do_mma(a,bf);}); }
struct S { float x; float y; };
float emu_shfl_xor(float x,int m){ S s{x,0}; collective(&s,10+m,[&](void**a){ for(int l=0;l<32;++l)((S*)a[l])->y=((S*)a[l^m])->x;}); return s.y; }
void emu_sync(){ unsigned g=block_gen; if(++block_arrived==T){block_arrived=0;++block_gen;} else while(block_gen==g) yield(); }
struct Cp { void const* from; void* to; bool pred; };
static std::deque<std::vector<Cp>> groups[T]; static std::vector<Cp> open_[T];
static void run(Cp const& c){ if(c.pred) memcpy(c.to,c.from,16); else memset(c.to,0,16); }
void emu_cp_async(void const* from, void* to, bool pred){ check_shared(to,16); if(pred&&(uintptr_t)from%16){fprintf(stderr,"misaligned gmem\n");abort();}
  if(lazy_) open_[cur].push_back({from,to,pred}); else run({from,to,pred}); }
void emu_commit(){ groups[cur].push_back(std::move(open_[cur])); open_[cur].clear(); }
void emu_wait(int n){ if(n==0 && !open_[cur].empty()) emu_commit(); while((int)groups[cur].size()>n){ for(auto&c:groups[cur].front()) run(c); groups[cur].pop_front(); } }
static std::function<void()> body;
static void entry(int i){ body(); done_[i]=true; swapcontext(&ctx[i],&sched); }
extern "C" void launch(long grid, int lazy, int seed, void* q, void* k, void* v, void* out, void* lse, double scale, int64_t* st,
   int64_t nheads,int64_t group,int64_t sq,int64_t sk,int64_t hd,int64_t hdv,int64_t causal){
  lazy_=lazy; rng.seed(seed);
  body=[&]{ attention_forward((Element*)q,(Element*)k,(Element*)v,(Element*)out,(float*)lse,scale,st[0],st[1],st[2],st[3],st[4],st[5],st[6],st[7],st[8],nheads,group,sq,sk,hd,hdv,causal); };
  for(long b=0;b<grid;++b){ emu_block.x=b; memset(shared,0xff,SH); 
    for(int i=0;i<T;++i){ stacks[i].resize(512*1024); getcontext(&ctx[i]); ctx[i].uc_stack.ss_sp=stacks[i].data(); ctx[i].uc_stack.ss_size=stacks[i].size(); ctx[i].uc_link=&sched; done_[i]=false; makecontext(&ctx[i],(void(*)())entry,1,i); groups[i].clear(); open_[i].clear(); }
    int left=T; std::vector<int> order(T); for(int i=0;i<T;++i)order[i]=i; long spins=0; int wo[NUM_WARPS]; for(int i=0;i<NUM_WARPS;++i)wo[i]=i;
    while(left){ std::shuffle(wo,wo+NUM_WARPS,rng);
      for(int wi=0;wi<NUM_WARPS;++wi){ int reps=rng()%40; for(int rep=0;rep<=reps;++rep) for(int l=0;l<32;++l){ int i=wo[wi]*32+l; if(done_[i])continue; cur=i; emu_thread.x=i; swapcontext(&sched,&ctx[i]); if(done_[i])--left; } }
      if(++spins>100000000){fprintf(stderr,"deadlock\n");abort();} }
    for(int i=0;i<T;++i) if(!open_[i].empty()){fprintf(stderr,"uncommitted\n");}
  }
}
extern "C" long nconf(){return conflicts;}
