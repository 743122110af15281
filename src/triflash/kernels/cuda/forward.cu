// FlashAttention forward (arXiv:2205.14135) in CUDA C++ with CuTe, for sm_80 and later.
//
// One block of threads owns BLOCK_M queries of a head and walks over the keys that they see,
// BLOCK_N at a time. Scores stay in registers; of every row only a running maximum and sum are kept
// (online softmax, base 2), and the output is normalised once, at the end (arXiv:2307.08691).
//
// What it shows beside the Triton versions is what Triton does unasked: cp.async fills a ring of
// swizzled K and V tiles while the tensor cores (mma.m16n8k16) work on older ones, ldmatrix reads
// them without bank conflicts, and each warp keeps its rows of scores and output in registers.
//
// FLOPs: 4 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Bytes: q, out and lse
// once; k and v once for each block of queries, mostly from L2.
// Measured (H200, fp16, SEEDS 3.4's shapes, docs/perf-log.md): 1.08 to 1.17 times as fast as v1 under
// sustained load and 1.01 to 1.08 times in bursts, 1.06 to 1.15 times as SDPA's flash backend; v2, with
// Hopper's own instructions, is 1.1 to 1.4 times as fast as this.
//
// The host compiles this file for one configuration at a time and passes it as macros:
//   ELEMENT          cute::half_t or cute::bfloat16_t
//   HEADDIM          width of a tile: headdim and headdim_v rounded up, a multiple of 32
//   BLOCK_M, BLOCK_N queries and keys a step
//   NUM_WARPS        each owns BLOCK_M / NUM_WARPS of the rows
//   MIN_BLOCKS       blocks of threads that must fit on a multiprocessor: bounds the registers
//   STAGES           tiles of K, and of V, in flight or in use
//   Q_IN_REGISTERS   keep q in registers instead of reading it from shared memory at every step
//   ALIGNED          rows of q, k, v and out start and end at multiples of 16 bytes

#include <cuda/std/limits>
#include <cuda/std/tuple>

// CuTe looks up elements of tuples thousands of times; answering the frequent cases directly cuts
// the time of compilation. Must precede the first use, so CuTe's own header.
namespace cute {
template <class... T>
struct tuple;
}
namespace cuda::std {
template <class T0, class... T>
struct tuple_element<0, cute::tuple<T0, T...>> { using type = T0; };
template <class T0, class T1, class... T>
struct tuple_element<1, cute::tuple<T0, T1, T...>> { using type = T1; };
template <class T0, class T1, class T2, class... T>
struct tuple_element<2, cute::tuple<T0, T1, T2, T...>> { using type = T2; };
}  // namespace cuda::std

#include <cute/tensor.hpp>

using namespace cute;

using Element = ELEMENT;

constexpr float kInfinity = cuda::std::numeric_limits<float>::infinity();
constexpr float kLowest = cuda::std::numeric_limits<float>::lowest();
constexpr int kThreads = 32 * NUM_WARPS;
constexpr int kVector = 8;                           // elements in 16 bytes
constexpr int kTilesM = BLOCK_M / (16 * NUM_WARPS);  // tiles of 16 rows that a warp owns
constexpr int kRows = 2 * kTilesM;                   // rows of which a thread holds a part
static_assert(HEADDIM % 32 == 0 && BLOCK_M % (16 * NUM_WARPS) == 0 && BLOCK_N % 16 == 0);

// A tile in shared memory: (row, column) -> offset. Rows of 128 (or 64) bytes whose 16-byte vectors
// are permuted by an exclusive or with the row's number, so that the same vector of eight rows,
// which ldmatrix reads at once, lies in different banks.
constexpr int kWidth = HEADDIM % 64 == 0 ? 64 : 32;
using SwizzledRows = decltype(composition(Swizzle<kWidth == 64 ? 3 : 2, 3, 3>{},
                                          Layout<Shape<_8, Int<kWidth>>, Stride<Int<kWidth>, _1>>{}));
template <int ROWS>
using SharedTile = decltype(tile_to_shape(SwizzledRows{}, Shape<Int<ROWS>, Int<HEADDIM>>{}));

// Element (row + i, column + j) of a tile, from the offset of (row, column) and without swizzling
// again, so that one register serves many addresses. i is a multiple of 8, which leaves the
// permutation as it is; j sets only bits that column leaves 0, so that adding it within a row is an
// exclusive or as well.
template <int ROWS>
CUTE_DEVICE Element& element(Element* tile, int offset, int i, int j) {
  return (tile + (offset ^ j % kWidth))[SharedTile<ROWS>{}(i, j / kWidth * kWidth)];
}

// Tensor cores: a warp multiplies 16 x 16 by 16 x 8. Of the result, lane l holds columns
// l % 4 * 2 + {0, 1} of rows l / 4 + {0, 8}; these layouts name what a thread holds of a result of
// BLOCK_M x COLUMNS, whose rows go to the warps 16 at a time.
using Mma = MMA_Atom<conditional_t<is_same_v<Element, half_t>, SM80_16x8x16_F32F16F16F32_TN,
                                   SM80_16x8x16_F32BF16BF16F32_TN>>;
template <int COLUMNS>
using Result = Layout<Shape<Shape<_2, _2>, Int<kTilesM>, Int<COLUMNS / 8>>>;
template <int COLUMNS>  // by (row, column)
using ResultByRow = Layout<Shape<Shape<_2, Int<kTilesM>>, Shape<_2, Int<COLUMNS / 8>>>,
                           Stride<Stride<_2, _4>, Stride<_1, Int<4 * kTilesM>>>>;
template <int COLUMNS>  // as a first operand: two 16 x 8 results side by side are one of 16 x 16
using ResultAsOperand =
    Layout<Shape<Shape<_2, _2, _2>, Int<kTilesM>, Int<COLUMNS / 16>>,
           Stride<Stride<_1, _2, Int<4 * kTilesM>>, _4, Int<8 * kTilesM>>>;

// Between global and shared memory, neighbouring threads move neighbouring 16-byte vectors. Calls
// visit(i, j) for the rows and columns that lie between a thread's first vector of a tile and others.
constexpr int kThreadsARow = kWidth / kVector;
template <int ROWS, class Visit>
CUTE_DEVICE void for_each_vector(Visit visit) {
  constexpr int kRowsAtOnce = kThreads / kThreadsARow;
  static_assert(ROWS % kRowsAtOnce == 0);
  CUTE_UNROLL
  for (int i = 0; i < ROWS; i += kRowsAtOnce) {
    CUTE_UNROLL
    for (int j = 0; j < HEADDIM; j += kWidth) {
      visit(i, j);
    }
  }
}

// Starts to load a tile, of which this thread's first vector is at `source` and at `offset` in
// shared memory, and of which `rows` and `columns` exist from there on. What does not exist is never
// read and becomes 0, so that nothing behind a tensor can reach the result.
template <int ROWS>
CUTE_DEVICE void load_tile(Element* tile, int offset, Element const* source, int64_t stride,
                           int rows, int columns) {
  for_each_vector<ROWS>([&](int i, int j) {
    Element const* const from = source + i * stride + j;
    uint128_t& to = reinterpret_cast<uint128_t&>(element<ROWS>(tile, offset, i, j));
    if constexpr (ALIGNED) {
      SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>::copy(
          reinterpret_cast<uint128_t const&>(*from), to, i < rows && j < columns);
    } else {
      alignas(16) Element vector[kVector];
      CUTE_UNROLL
      for (int n = 0; n < kVector; ++n) {
        vector[n] = i < rows && j + n < columns ? from[n] : Element(0.0f);
      }
      to = reinterpret_cast<uint128_t const&>(vector);
    }
  });
}

// The reverse, for as much of the tile as exists in `target`.
template <int ROWS>
CUTE_DEVICE void store_tile(Element* tile, int offset, Element* target, int64_t stride, int rows,
                            int columns) {
  for_each_vector<ROWS>([&](int i, int j) {
    Element* const to = target + i * stride + j;
    Element const* const from = &element<ROWS>(tile, offset, i, j);
    if constexpr (ALIGNED) {
      if (i < rows && j < columns) {
        *reinterpret_cast<uint128_t*>(to) = *reinterpret_cast<uint128_t const*>(from);
      }
    } else {
      CUTE_UNROLL
      for (int n = 0; n < kVector; ++n) {
        if (i < rows && j + n < columns) {
          to[n] = from[n];
        }
      }
    }
  });
}

// ldmatrix: four 8 x 8 matrices, one register each. Lanes 8 i to 8 i + 7 point to matrix i's rows.
template <class Operation>
CUTE_DEVICE void load_matrices(Element const& row, Element& registers) {
  uint32_t* const to = reinterpret_cast<uint32_t*>(&registers);
  Operation::copy(reinterpret_cast<uint128_t const&>(row), to[0], to[1], to[2], to[3]);
}

// c += a b, 16 columns of a and rows of b at a time, which load(slice) fetches; the compiler starts
// the loads early.
template <class C, class A, class B, class Load>
CUTE_DEVICE void multiply(C& c, A const& a, B const& b, Load load) {
  CUTE_UNROLL
  for (int slice = 0; slice < size<2>(b); ++slice) {
    load(slice);
    gemm(Mma{}, a(_, _, slice), b(_, _, slice), c);
  }
}

// Two neighbouring columns of a result, rounded to q's precision.
CUTE_DEVICE uint32_t rounded(float const& low, float const& high) {
  if constexpr (is_same_v<Element, half_t>) {
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  } else {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  }
}

// A row of a result is spread over four neighbouring lanes.
CUTE_DEVICE float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

CUTE_DEVICE float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads / group_size, headdim[_v])
// by their strides in elements; out (batch, seqlen_q, nheads, headdim_v) and lse (batch, nheads,
// seqlen_q) are contiguous. Blocks of one head are neighbours, to share k and v in L2.
// signed_scale_log2 is softmax_scale * log2(e); a causal mask is aligned to the bottom right.
extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
attention_forward(Element const* q, Element const* k, Element const* v, Element* out, float* lse,
                  double signed_scale_log2, int64_t stride_qb, int64_t stride_qs,
                  int64_t stride_qh, int64_t stride_kb, int64_t stride_ks, int64_t stride_kh,
                  int64_t stride_vb, int64_t stride_vs, int64_t stride_vh, int64_t nheads,
                  int64_t group_size, int64_t seqlen_q_, int64_t seqlen_k_, int64_t headdim_,
                  int64_t headdim_v_, int64_t causal) {
  extern __shared__ __align__(128) unsigned char shared[];

  int const seqlen_q = seqlen_q_, seqlen_k = seqlen_k_;
  int const headdim = headdim_, headdim_v = headdim_v_;
  unsigned const thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int const tiles_m = (seqlen_q + BLOCK_M - 1) / BLOCK_M;
  int const batch_and_head = blockIdx.x / tiles_m;
  int const batch = batch_and_head / int(nheads);
  int const head = batch_and_head % int(nheads);
  int const head_k = head / int(group_size);
  // The longest first when causal, so that none is left over at the end.
  int const tile_m = causal ? tiles_m - 1 - blockIdx.x % tiles_m : blockIdx.x % tiles_m;
  int const start_m = tile_m * BLOCK_M;

  // Query i sees the keys below i + diagonal. Steps [0, full_steps) see all of their keys, those in
  // [full_steps, steps) need a mask.
  int const diagonal = causal ? seqlen_k - seqlen_q + 1 : seqlen_k;
  int const end_n = min(seqlen_k, max(0, start_m + BLOCK_M - 1 + diagonal));
  int const full_n = min(seqlen_k, max(0, start_m + diagonal));
  int const steps = (end_n + BLOCK_N - 1) / BLOCK_N;
  int const full_steps = full_n / BLOCK_N;

  // Shared memory holds q's tile, a ring of STAGES tiles of K and one of V.
  Element* const memory = reinterpret_cast<Element*>(shared);
  constexpr int kTileKV = BLOCK_N * HEADDIM;
  constexpr int kRingK = BLOCK_M * HEADDIM;
  constexpr int kRingV = kRingK + STAGES * kTileKV;

  // This thread's first vector of a tile. k and v move on with every tile that is loaded.
  int const copy_row = thread / kThreadsARow, copy_column = thread % kThreadsARow * kVector;
  int const copy_offset = SharedTile<BLOCK_M>{}(copy_row, copy_column);
  q += batch * stride_qb + head * stride_qh + (start_m + copy_row) * stride_qs + copy_column;
  k += batch * stride_kb + head_k * stride_kh + copy_row * stride_ks + copy_column;
  v += batch * stride_vb + head_k * stride_vh + copy_row * stride_vs + copy_column;
  // Every call is one group of copies, if only an empty one, so that counting groups tells which
  // tiles have arrived.
  auto issue_k = [&](int step) {
    if (step < steps) {
      load_tile<BLOCK_N>(memory + kRingK + step % STAGES * kTileKV, copy_offset, k, stride_ks,
                         seqlen_k - step * BLOCK_N - copy_row, headdim - copy_column);
      k += BLOCK_N * stride_ks;
    }
    cp_async_fence();
  };
  auto issue_v = [&](int step) {
    if (step < steps) {
      load_tile<BLOCK_N>(memory + kRingV + step % STAGES * kTileKV, copy_offset, v, stride_vs,
                         seqlen_k - step * BLOCK_N - copy_row, headdim_v - copy_column);
      v += BLOCK_N * stride_vs;
    }
    cp_async_fence();
  };
  // Tiles are used in the order K0 V0 K1 V1 ..., and 2 * STAGES - 1 are in flight. Waits for the
  // oldest; the barrier shows it to all threads, and tells that all have finished with the tile
  // before it, whose place the next copy takes.
  auto next_tile = [] {
    cp_async_wait<2 * STAGES - 2>();
    __syncthreads();
  };

  load_tile<BLOCK_M>(memory, copy_offset, q, stride_qs, seqlen_q - start_m - copy_row,
                     headdim - copy_column);
  CUTE_UNROLL
  for (int step = 0; step < STAGES; ++step) {
    issue_k(step);
    if (step + 1 < STAGES) {
      issue_v(step);
    }
  }

  // The maximum is taken before scaling, which needs a positive scale. A tiny one in the place of 0
  // gives the same weights, and keeps -inf * scale from being NaN.
  float const scale_log2 = fmaxf(fabsf(float(signed_scale_log2)), 1.2e-38f);
  if (signed_scale_log2 < 0) {
    cp_async_wait<0>();
    __syncthreads();
    for (int i = thread; i < BLOCK_M * HEADDIM / 2; i += kThreads) {
      reinterpret_cast<uint32_t*>(memory)[i] ^= 0x80008000u;  // the signs of two elements
    }
  }

  // Operands: 16 x 16 of q, and 16 x 16 of k or of v (transposed on the way), which are two 16 x 8
  // to the tensor cores. Each lane's row of the first such piece, from which the others are moved.
  Tensor rQ = make_tensor<Element>(Shape<Shape<_2, _2, _2>, Int<kTilesM>, Int<HEADDIM / 16>>{});
  Tensor rK = make_tensor<Element>(Shape<Shape<_2, _2>, Int<BLOCK_N / 8>, Int<HEADDIM / 16>>{});
  Tensor rV = make_tensor<Element>(Shape<Shape<_2, _2>, Int<HEADDIM / 8>, Int<BLOCK_N / 16>>{});
  int const piece_q = SharedTile<BLOCK_M>{}(warp * 16 + lane % 16, lane / 16 * 8);
  int const piece_k = SharedTile<BLOCK_N>{}(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
  int const piece_v = SharedTile<BLOCK_N>{}(lane % 16, lane / 16 * 8);
  auto load_q = [&](int slice) {
    CUTE_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      load_matrices<SM75_U32x4_LDSM_N>(
          element<BLOCK_M>(memory, piece_q, m * NUM_WARPS * 16, slice * 16), rQ(_0{}, m, slice));
    }
  };
  if constexpr (Q_IN_REGISTERS) {
    next_tile();
    CUTE_UNROLL
    for (int slice = 0; slice < HEADDIM / 16; ++slice) {
      load_q(slice);
    }
  }

  Tensor rO = make_tensor<float>(Result<HEADDIM>{});
  Tensor out_rows = make_tensor(rO.data(), ResultByRow<HEADDIM>{});
  // Maxima are in base-2 units, as are exponents. They start finite: in a row that has seen no key
  // yet, -inf - (-inf) would be NaN.
  float m_i[kRows], l_i[kRows];
  clear(rO);
  CUTE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    m_i[i] = kLowest;
    l_i[i] = 0.0f;
  }
  // The first of this thread's rows and columns of a result, and how far on the others are.
  int const first_row = warp * 16 + lane / 4, first_column = lane % 4 * 2;
  auto next_row = [](int i) { return i / 2 * (16 * NUM_WARPS) + i % 2 * 8; };
  auto next_column = [](int j) { return j / 2 * 8 + j % 2; };

  for (int step = 0; step < steps; ++step) {
    Tensor rS = make_tensor<float>(Result<BLOCK_N>{});
    Tensor scores = make_tensor(rS.data(), ResultByRow<BLOCK_N>{});
    clear(rS);
    next_tile();
    issue_v(step + STAGES - 1);
    Element* const tile_k = memory + kRingK + step % STAGES * kTileKV;
    multiply(rS, rQ, rK, [&](int slice) {
      if constexpr (!Q_IN_REGISTERS) {
        load_q(slice);
      }
      CUTE_UNROLL
      for (int n = 0; n < BLOCK_N; n += 16) {
        load_matrices<SM75_U32x4_LDSM_N>(element<BLOCK_N>(tile_k, piece_k, n, slice * 16),
                                         rK(_0{}, n / 8, slice));
      }
    });

    if (step >= full_steps) {
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        int const q_idx = start_m + first_row + next_row(i);
        int const seen = min(seqlen_k, q_idx + diagonal) - step * BLOCK_N;
        CUTE_UNROLL
        for (int j = 0; j < size<1>(scores); ++j) {
          if (first_column + next_column(j) >= seen) {
            scores(i, j) = -kInfinity;
          }
        }
      }
    }
    next_tile();
    issue_k(step + STAGES);

    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float m_new = scores(i, 0);
      CUTE_UNROLL
      for (int j = 1; j < size<1>(scores); ++j) {
        m_new = fmaxf(m_new, scores(i, j));
      }
      m_new = fmaxf(m_i[i], max_of_row(m_new) * scale_log2);
      float const alpha = exp2f(m_i[i] - m_new);
      m_i[i] = m_new;
      l_i[i] *= alpha;
      CUTE_UNROLL
      for (int d = 0; d < size<1>(out_rows); ++d) {
        out_rows(i, d) *= alpha;
      }
    }
    // Weights are made for 16 keys at a time, just before their product, so that exponentials
    // overlap with the tensor cores and few registers hold both scores and weights.
    Tensor rP = make_tensor<Element>(ResultAsOperand<BLOCK_N>{});
    Tensor weights = make_tensor(rP.data(), ResultByRow<BLOCK_N>{});
    Element* const tile_v = memory + kRingV + step % STAGES * kTileKV;
    multiply(rO, rP, rV, [&](int slice) {
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float p[4];
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) {
          p[j] = exp2f(fmaf(scores(i, 4 * slice + j), scale_log2, -m_i[i]));
        }
        reinterpret_cast<uint32_t&>(weights(i, 4 * slice)) = rounded(p[0], p[1]);
        reinterpret_cast<uint32_t&>(weights(i, 4 * slice + 2)) = rounded(p[2], p[3]);
        l_i[i] += (p[0] + p[1]) + (p[2] + p[3]);
      }
      CUTE_UNROLL
      for (int d = 0; d < HEADDIM; d += 16) {
        load_matrices<SM75_U16x8_LDSM_T>(element<BLOCK_N>(tile_v, piece_v, slice * 16, d),
                                         rV(_0{}, d / 8, slice));
      }
    });
  }

  lse += int64_t(batch_and_head) * seqlen_q;
  CUTE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    float const l = sum_of_row(l_i[i]);
    bool const empty = l == 0.0f;  // no key was seen: out 0, lse -inf
    float const normaliser = empty ? 1.0f : 1.0f / l;
    CUTE_UNROLL
    for (int d = 0; d < size<1>(out_rows); ++d) {
      out_rows(i, d) *= normaliser;
    }
    int const q_idx = start_m + first_row + next_row(i);
    if (first_column == 0 && q_idx < seqlen_q) {
      lse[q_idx] = empty ? -kInfinity : (m_i[i] + log2f(l)) * 0.6931471805599453f;
    }
  }

  // Through q's place in shared memory, so that stores to global memory are 16 bytes wide. Without
  // a step nothing has waited for q itself.
  cp_async_wait<0>();
  __syncthreads();
  int const first = SharedTile<BLOCK_M>{}(unsigned(first_row), unsigned(first_column));
  CUTE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CUTE_UNROLL
    for (int d = 0; d < size<1>(out_rows); d += 2) {
      reinterpret_cast<uint32_t&>(element<BLOCK_M>(memory, first, next_row(i), next_column(d))) =
          rounded(out_rows(i, d), out_rows(i, d + 1));
    }
  }
  __syncthreads();
  int64_t const stride_os = nheads * headdim_v;
  out += (int64_t(batch) * seqlen_q + start_m + copy_row) * stride_os +
         int64_t(head) * headdim_v + copy_column;
  store_tile<BLOCK_M>(memory, copy_offset, out, stride_os, seqlen_q - start_m - copy_row,
                      headdim_v - copy_column);
}
