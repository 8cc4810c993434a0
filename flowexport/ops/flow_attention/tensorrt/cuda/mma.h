// The two matrix products on tensor cores: TF32 operands, float32 accumulation.
//
// For 16-bit tensors of width 32 and more, from compute capability 8.0 on. TF32 keeps float16's
// 10 bits and float32's range, so no feature map, weight or variant can overflow it. The host build
// executes the same fragments; its mma_step multiplies by the layout that the PTX manual gives
// for mma.m16n8k8.tf32 (lane = 4·g + t): A a0 (g, t), a1 (g+8, t), a2 (g, t+4), a3 (g+8, t+4);
// B b0 (t, g), b1 (t+4, g); C c0 (g, 2t), c1 (g, 2t+1), c2 (g+8, 2t), c3 (g+8, 2t+1).
#ifndef FLOWEXPORT_MMA_H_
#define FLOWEXPORT_MMA_H_

#include "row.h"

namespace flowexport {

struct FragmentA {
  float x[4];
};
template <int kN>
struct FragmentB {
  float x[kN][2];
};
template <int kN>
struct FragmentC {
  float x[kN][4];
};

// c += a·b for kN column tiles of 8; each warp on its own.
#ifdef __CUDACC__
template <int kN>
FX_DEVICE void mma_step(PerThread<FragmentC<kN>>& c, PerThread<FragmentA>& a,
                        PerThread<FragmentB<kN>>& b) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const uint32_t a0 = __float_as_uint(a.value.x[0]), a1 = __float_as_uint(a.value.x[1]);
  const uint32_t a2 = __float_as_uint(a.value.x[2]), a3 = __float_as_uint(a.value.x[3]);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    float* y = c.value.x[n];
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(y[0]), "+f"(y[1]), "+f"(y[2]), "+f"(y[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(__float_as_uint(b.value.x[n][0])),
          "r"(__float_as_uint(b.value.x[n][1])));
  }
#endif
}
#else
template <int kN>
inline void mma_step(PerThread<FragmentC<kN>>& c, PerThread<FragmentA>& a,
                     PerThread<FragmentB<kN>>& b) {
  for (int warp = 0; warp < kThreads; warp += kWarp) {
    float x[16][8], y[8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) x[g + i % 2 * 8][t + i / 2 * 4] = a[warp + lane].x[i];
    }
    for (int n = 0; n < kN; ++n) {
      for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < 2; ++i) y[lane % 4 + 4 * i][lane / 4] = b[warp + lane].x[n][i];
      for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
          float sum = 0.0f;
          for (int k = 0; k < 8; ++k) sum += x[row][k] * y[k][column];
          c[warp + lane].x[n][i] += sum;
        }
    }
  }
}
#endif

// Σ over tokens of a[token][i]·b[token][j] for a P × P result: a warp owns 16 rows and, by width,
// a quarter of the tokens (32), half of the columns (64) or all columns (128).
template <class K>
struct ContextMma {
  static constexpr int kRowTiles = K::P / 16;
  static constexpr int kShares = kWarps / kRowTiles;
  static constexpr int kSlices = K::P == 32 ? kShares : 1;
  static constexpr int kN = K::P == 64 ? 4 : K::P / 8;
  using C = FragmentC<kN>;

  static FX_DEVICE int row(int t) { return t / kWarp % kRowTiles * 16; }
  static FX_DEVICE int slice(int t) { return kSlices > 1 ? t / kWarp / kRowTiles : 0; }
  static FX_DEVICE int column(int t) { return kSlices > 1 ? 0 : t / kWarp / kRowTiles * kN * 8; }

  static FX_DEVICE void add_tile(const float* a, const float* b, float factor,
                                 PerThread<C>& total) {
    constexpr int kPitch = K::kPitchContext;
    PerThread<FragmentA> x;
    PerThread<FragmentB<kN>> y;
    PerThread<C> sum;
    FX_THREADS(t) { sum[t] = {}; }
    for (int step = 0; step < K::kTokens / kSlices; step += 8) {
      FX_THREADS(t) {
        const int g = t % kWarp / 4, token = slice(t) * (K::kTokens / kSlices) + step + t % 4;
        const float* p = a + token * kPitch + row(t) + g;
        x[t] = {{p[0], p[8], p[4 * kPitch], p[4 * kPitch + 8]}};
        const float* q = b + token * kPitch + column(t) + g;
        for (int n = 0; n < kN; ++n) {
          y[t].x[n][0] = q[8 * n];
          y[t].x[n][1] = q[4 * kPitch + 8 * n];
        }
      }
      mma_step<kN>(sum, x, y);
    }
    FX_THREADS(t) {
      for (int n = 0; n < kN; ++n)
        for (int i = 0; i < 4; ++i) total[t].x[n][i] = total[t].x[n][i] * factor + sum[t].x[n][i];
    }
  }

  // Each slice's share of the result, slice after slice.
  static FX_DEVICE void store(PerThread<C>& total, float* result) {
    FX_THREADS(t) {
      float* p = result + slice(t) * K::P * K::P;
      for (int n = 0; n < kN; ++n)
        for (int i = 0; i < 4; ++i) {
          const int d = row(t) + t % kWarp / 4 + i / 2 * 8;
          p[d * K::P + column(t) + 8 * n + t % 4 * 2 + i % 2] = total[t].x[n][i];
        }
    }
  }
};

// a[row][d]·b[d][column] for one tile of rows: a warp owns 16 rows and a share of the columns.
template <class K>
struct OutputMma {
  static constexpr int kRowTiles = K::kTokens / 16;
  static constexpr int kN = K::kColumns / 8 / (kWarps / kRowTiles);

  // Leaves row·scale[row] in a, once every warp has read it.
  static FX_DEVICE void multiply(float* a, const float* b, const float* scale) {
    PerThread<FragmentA> x;
    PerThread<FragmentB<kN>> y;
    PerThread<FragmentC<kN>> sum;
    FX_THREADS(t) { sum[t] = {}; }
    for (int step = 0; step < K::P; step += 8) {
      FX_THREADS(t) {
        const int g = t % kWarp / 4, d = step + t % 4;
        const float* p = a + (row(t) + g) * K::kPitchRows + d;
        x[t] = {{p[0], p[8 * K::kPitchRows], p[4], p[8 * K::kPitchRows + 4]}};
        const float* q = b + d * K::kPitchColumns + column(t) + g;
        for (int n = 0; n < kN; ++n) {
          y[t].x[n][0] = q[8 * n];
          y[t].x[n][1] = q[4 * K::kPitchColumns + 8 * n];
        }
      }
      mma_step<kN>(sum, x, y);
    }
    FX_SYNC();
    FX_THREADS(t) {
      for (int n = 0; n < kN; ++n)
        for (int i = 0; i < 4; ++i) {
          const int r = row(t) + t % kWarp / 4 + i / 2 * 8;
          a[r * K::kPitchRows + column(t) + 8 * n + t % 4 * 2 + i % 2] = sum[t].x[n][i] * scale[r];
        }
    }
    FX_SYNC();
  }

  static FX_DEVICE int row(int t) { return t / kWarp % kRowTiles * 16; }
  static FX_DEVICE int column(int t) { return t / kWarp / kRowTiles * kN * 8; }
};

}  // namespace flowexport

#endif
