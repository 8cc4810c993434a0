// Rows of q, k and v: how threads share them, φ, and sums over tokens.
#ifndef FLOWEXPORT_ROW_H_
#define FLOWEXPORT_ROW_H_

#include "block.h"

namespace flowexport {

// What every kernel is given. Offsets into the workspace are pointers here; null when unused.
struct Args {
  const void *q, *k, *v;
  void* out;
  int64_t batch, sinks, sources, heads;
  int width, value_width;
  int splits;                           // token segments; partial sums are kept for each
  int64_t sinks_a_split, sources_a_split;
  bool relu, clamped, vector_qk, vector_v;
  float low, high, eps, outer_eps;
  // Partial column sums, (batch·heads, splits, P): Σφ(k), Σφ(q), Σ k/O, Σ q/I.
  float *sum_k, *sum_q, *flow_k, *flow_q;
  // Numbers a token, (batch·heads, tokens): row scales of the output, logits or weights of the
  // competition, and the causal n/I and n/O.
  float *row_scale, *row_weight, *row_x, *row_y;
  // Partial contexts (batch·heads, splits, P·P) with their maximum and Σ weight; the final ones.
  float *part_context, *part_max, *part_sum, *context;
};

// Tensor cores need compute capability 8.0; the host build executes either path.
#if defined(FLOWEXPORT_HOST_PLAIN) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
constexpr bool kTensorCores = false;
#else
constexpr bool kTensorCores = true;
#endif

// One width P (D and M rounded up to it) and one element type.
template <class T, int P_>
struct Tile {
  using Element = T;
  static constexpr int P = P_;
  static constexpr int kVec = 16 / static_cast<int>(sizeof(T));  // one 16-byte access
  static constexpr int kLanes = P / kVec;                        // threads that share a row
  static constexpr int kRows = kThreads / kLanes;                // rows a sweep of the block
  static constexpr int kTokens = 4096 / P;                       // rows of a shared-memory tile
  static constexpr int kColumns = P < 64 ? P : 64;  // output columns of a block at a time
  static constexpr bool kMma = kTensorCores && sizeof(T) == 2 && P >= 32;
  // Rows of shared tiles lie this far apart, so that a warp's fragment meets 32 banks.
  static constexpr int kPitchContext = P + (kMma ? 8 : 0);
  static constexpr int kPitchRows = P + (kMma ? 4 : 0);
  static constexpr int kPitchColumns = kColumns + (kMma ? 8 : 0);
  // Shared floats of the largest layout, see Shared.
  static constexpr int kArena = 5120 + (P == 128 ? 128 * 72 : 5120);
  struct alignas(16) Vec {
    float x[kVec];
  };
};

constexpr int kMaxWidth = 128;

// A block's shared memory. a and b are one arena, b 5,120 floats after a.
struct Shared {
  static constexpr int kFixed = kWarps + 4 * kMaxWidth + 512 + 2 * kThreads;
  float *reduce, *rows, *scratch, *a, *b;
  float (*vectors)[kMaxWidth];

  FX_DEVICE explicit Shared(float* base)
      : reduce(base + 4 * kMaxWidth + 512 + 2 * kThreads),
        rows(base + 4 * kMaxWidth),
        scratch(rows + 512),
        a(base + kFixed),
        b(a + 5120),
        vectors(reinterpret_cast<float (*)[kMaxWidth]>(base)) {}
};

FX_DEVICE float fast_exp(float x, float) { return expf(x); }
#ifdef __CUDACC__
template <class T>
FX_DEVICE float fast_exp(float x, T) {
  return __expf(x);
}
FX_DEVICE float sigmoid(float x, float) { return 1.0f / (1.0f + expf(-x)); }
template <class T>
FX_DEVICE float sigmoid(float x, T) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}
#else
template <class T>
inline float fast_exp(float x, T) {
  return expf(x);
}
template <class T>
inline float sigmoid(float x, T) {
  return 1.0f / (1.0f + expf(-x));
}
#endif

// Read columns [column, column + kVec) of a row; columns from `width` on read as zero.
template <class K>
FX_DEVICE typename K::Vec load_row(const typename K::Element* row, int column, int width,
                                   bool vector) {
  using T = typename K::Element;
  typename K::Vec result;
  if (vector && column + K::kVec <= width) {
    struct alignas(16) Raw {
      T x[K::kVec];
    };
    const Raw raw = *reinterpret_cast<const Raw*>(row + column);
    for (int i = 0; i < K::kVec; ++i) result.x[i] = to_float(raw.x[i]);
  } else {
    for (int i = 0; i < K::kVec; ++i)
      result.x[i] = column + i < width ? to_float(row[column + i]) : 0.0f;
  }
  return result;
}

// φ of a row's columns; zero from `width` on.
template <class K>
FX_DEVICE typename K::Vec load_feature(const Args& a, const typename K::Element* row, int column) {
  typename K::Vec x = load_row<K>(row, column, a.width, a.vector_qk);
  for (int i = 0; i < K::kVec; ++i) {
    const float y =
        a.relu ? fmaxf(x.x[i], 0.0f) + a.eps : sigmoid(x.x[i], typename K::Element());
    x.x[i] = column + i < a.width ? y : 0.0f;
  }
  return x;
}

template <class K>
FX_DEVICE typename K::Vec zero_vec() {
  typename K::Vec x;
  for (int i = 0; i < K::kVec; ++i) x.x[i] = 0.0f;
  return x;
}

// This thread's share of (φ + ε)·(Σ + ε); `sum_eps` holds Σ + ε, zero from the width on.
template <class K>
FX_DEVICE float dot_share(const typename K::Vec& x, const float* sum_eps, float eps) {
  float result = 0.0f;
  for (int i = 0; i < K::kVec; ++i) result += (x.x[i] + eps) * sum_eps[i];
  return result;
}

template <class K>
FX_DEVICE void store_vec(float* p, const typename K::Vec& x) {
  for (int i = 0; i < K::kVec; i += 4) {
    const Float4 v = {{x.x[i], x.x[i + 1], x.x[i + 2], x.x[i + 3]}};
    store4(p + i, v);
  }
}

// As a tensor core's operand: float32 rounded to TF32, to nearest. Unchanged where there is none.
#ifdef __CUDACC__
FX_DEVICE float to_tf32(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
#else
  return x;
#endif
}
#else
inline float to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
#endif
template <class K>
FX_DEVICE void store_operand(float* p, typename K::Vec x) {
  if (K::kMma)
    for (int i = 0; i < K::kVec; ++i) x.x[i] = to_tf32(x.x[i]);
  store_vec<K>(p, x);
}

// Where a (batch, head) pair's rows begin in a (batch, tokens, heads, width) tensor.
template <class T>
FX_DEVICE const T* head_rows(const void* x, const Args& a, int64_t pair, int64_t tokens,
                             int width) {
  const int64_t b = pair / a.heads, h = pair % a.heads;
  return static_cast<const T*>(x) + (b * tokens * a.heads + h) * width;
}

struct Range {
  int64_t begin, end;
};
FX_BOTH int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
FX_DEVICE Range segment(int64_t split, int64_t size, int64_t tokens) {
  return {smaller(split * size, tokens), smaller(split * size + size, tokens)};
}

// Add up what the rows' threads hold, column by column, in a fixed order: total[P].
template <class K>
FX_DEVICE void reduce_columns(PerThread<typename K::Vec>& partial, float* scratch, float* total) {
  FX_THREADS(t) {
    store_vec<K>(scratch + (t / K::kLanes) * K::P + (t % K::kLanes) * K::kVec, partial[t]);
  }
  FX_SYNC();
  for (int rows = K::kRows / 2; rows > 0; rows /= 2) {
    FX_THREADS(t) {
      for (int e = t; e < rows * K::P; e += kThreads) scratch[e] += scratch[e + rows * K::P];
    }
    FX_SYNC();
  }
  FX_THREADS(t) {
    if (t < K::P) total[t] = scratch[t];
  }
  FX_SYNC();
}

// Σφ over [range): total[P]. `scratch` holds kRows·P floats.
template <class K>
FX_DEVICE void column_sums(const Args& a, const typename K::Element* x, Range range,
                           float* scratch, float* total) {
  PerThread<typename K::Vec> sum;
  FX_THREADS(t) { sum[t] = zero_vec<K>(); }
  const int64_t stride = a.heads * a.width;
  for (int64_t first = range.begin; first < range.end; first += K::kRows) {
    FX_THREADS(t) {
      const int64_t row = first + t / K::kLanes;
      if (row < range.end) {
        const auto y = load_feature<K>(a, x + row * stride, (t % K::kLanes) * K::kVec);
        for (int i = 0; i < K::kVec; ++i) sum[t].x[i] += y.x[i];
      }
    }
  }
  reduce_columns<K>(sum, scratch, total);
}

// Σ φ / ((φ + ε)·sum_eps + outer) over [range): total[P]; sum_eps is another sum, ε added.
template <class K>
FX_DEVICE void flow_sums(const Args& a, const typename K::Element* x, const float* sum_eps,
                         Range range, float* scratch, float* total) {
  PerThread<typename K::Vec> sum, y;
  PerThread<float> flow;
  FX_THREADS(t) { sum[t] = zero_vec<K>(); }
  const int64_t stride = a.heads * a.width;
  for (int64_t first = range.begin; first < range.end; first += K::kRows) {
    FX_THREADS(t) {
      const int64_t row = first + t / K::kLanes;
      const int column = (t % K::kLanes) * K::kVec;
      y[t] = row < range.end ? load_feature<K>(a, x + row * stride, column) : zero_vec<K>();
      flow[t] = dot_share<K>(y[t], sum_eps + column, a.eps);
    }
    group_sum<K::kLanes>(flow);
    FX_THREADS(t) {
      if (first + t / K::kLanes < range.end) {
        const float inverse = 1.0f / (flow[t] + a.outer_eps);
        for (int i = 0; i < K::kVec; ++i) sum[t].x[i] += y[t].x[i] * inverse;
      }
    }
  }
  reduce_columns<K>(sum, scratch, total);
}

// Add the partial vectors of segments [0, count) and `eps`; zero from the width on.
template <class K>
FX_DEVICE void total_vector(const Args& a, const float* partial, int count, float eps,
                            float* scratch, float* total) {
  constexpr int kGroups = kThreads / K::P;
  FX_THREADS(t) {
    float sum = 0.0f;
    for (int s = t / K::P; s < count; s += kGroups) sum += partial[s * K::P + t % K::P];
    scratch[t] = sum;
  }
  FX_SYNC();
  for (int groups = kGroups / 2; groups > 0; groups /= 2) {
    FX_THREADS(t) {
      if (t < groups * K::P) scratch[t] += scratch[t + groups * K::P];
    }
    FX_SYNC();
  }
  FX_THREADS(t) {
    if (t < K::P) total[t] = t < a.width ? scratch[t] + eps : 0.0f;
  }
  FX_SYNC();
}

}  // namespace flowexport

#endif
