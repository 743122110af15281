#pragma once
#include <cstdint>
void emu_ldsm(void const* row, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, bool trans);
void emu_cp_async(void const* from, void* to, bool pred);
void emu_commit();
void emu_wait(int n);
void emu_mma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
             uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3, bool bf16);
float emu_shfl_xor(float x, int m);
void emu_sync();
struct EmuIdx { unsigned x; };
extern EmuIdx emu_thread, emu_block;
#define threadIdx emu_thread
#define blockIdx emu_block
#define __shfl_xor_sync(mask, x, m) emu_shfl_xor(x, m)
#define __syncthreads() emu_sync()
