// Non-causal Flow-Attention over the tokens of each (batch, head) pair.
//
//   sums     Σφ(q), Σφ(k)                       reads q, k
//   flows    I, O and Σ q/I, Σ k/O              reads q, k
//   context  weights and Σ kᵀ(w v)              reads k, v
//   output   1/I, allocation, q·context         reads q, writes the result
//
// Every sum over tokens is a sum of segments, so the tokens of a pair spread over many blocks;
// a pair that fits one block runs all four in one kernel.
#ifndef FLOWEXPORT_NONCAUSAL_H_
#define FLOWEXPORT_NONCAUSAL_H_

#include "mma.h"
#include "row.h"

namespace flowexport {

// Where the competition's weights come from.
enum class Weights {
  kFlow,    // Ô from k here, then exp
  kLogits,  // Ô from row_weight, then exp
  kGiven,   // final weights from row_weight
};

FX_DEVICE float clamped_flow(const Args& a, float flow) {
  return a.clamped ? fminf(fmaxf(flow, a.low), a.high) : flow;
}

template <class K>
struct ContextFma {
  static constexpr int kEdge = K::P == 128 ? 8 : 4;  // a thread owns kEdge × kEdge results
  static constexpr int kAcross = K::P / kEdge;
  static constexpr int kCells = kAcross * kAcross;
  static constexpr int kSlices = kThreads / kCells;  // threads that share a result, by token
  struct C {
    float x[kEdge][kEdge];
  };


  // Σ over one tile of a[token][i]·b[token][j], scaled in: total = total·factor + sum.
  static FX_DEVICE void add_tile(const float* a, const float* b, float factor,
                                 PerThread<C>& total) {
    FX_THREADS(t) {
      const int cell = t % kCells;
      const int i0 = cell / kAcross * kEdge, j0 = cell % kAcross * kEdge;
      C sum = {};
      for (int token = t / kCells; token < K::kTokens; token += kSlices) {
        float x[kEdge], y[kEdge];
        for (int e = 0; e < kEdge; e += 4) {
          const Float4 x4 = load4(a + token * K::P + i0 + e), y4 = load4(b + token * K::P + j0 + e);
          for (int f = 0; f < 4; ++f) x[e + f] = x4.x[f], y[e + f] = y4.x[f];
        }
        for (int i = 0; i < kEdge; ++i)
          for (int j = 0; j < kEdge; ++j) sum.x[i][j] += x[i] * y[j];
      }
      for (int i = 0; i < kEdge; ++i)
        for (int j = 0; j < kEdge; ++j)
          total[t].x[i][j] = total[t].x[i][j] * factor + sum.x[i][j];
    }
  }

  // Each slice's share of the result, slice after slice.
  static FX_DEVICE void store(PerThread<C>& total, float* result) {
    FX_THREADS(t) {
      const int cell = t % kCells;
      const int i0 = cell / kAcross * kEdge, j0 = cell % kAcross * kEdge;
      float* p = result + (t / kCells) * K::P * K::P;
      for (int i = 0; i < kEdge; ++i)
        for (int j = 0; j < kEdge; ++j) p[(i0 + i) * K::P + j0 + j] = total[t].x[i][j];
    }
  }
};

template <class K, bool = K::kMma>
struct ContextProduct : ContextFma<K> {};
template <class K>
struct ContextProduct<K, true> : ContextMma<K> {};

// Write the P × P result, slices added in order. `scratch` holds kSlices·P·P floats if > 1.
template <class K>
FX_DEVICE void store_total(PerThread<typename ContextProduct<K>::C>& total, float* scratch,
                           float* result) {
  constexpr int kSlices = ContextProduct<K>::kSlices;
  ContextProduct<K>::store(total, kSlices > 1 ? scratch : result);
  FX_SYNC();
  if (kSlices > 1) {
    FX_THREADS(t) {
      for (int e = t; e < K::P * K::P; e += kThreads) {
        float sum = 0.0f;
        for (int s = 0; s < kSlices; ++s) sum += scratch[s * K::P * K::P + e];
        result[e] = sum;
      }
    }
    FX_SYNC();
  }
}

struct WeightTotal {
  float maximum, sum;
};

// Σ over the segment of kᵀ(w v), to result[P·P]; returns Σ w and what the weights are relative to.
template <class K>
FX_DEVICE WeightTotal context_segment(const Args& a, int64_t pair, Range range, Weights weights,
                                      const float* flow_q_eps, Shared& s, float* result) {
  using T = typename K::Element;
  const T* k = head_rows<T>(a.k, a, pair, a.sources, a.width);
  const T* v = head_rows<T>(a.v, a, pair, a.sources, a.value_width);
  const int64_t k_stride = a.heads * a.width, v_stride = a.heads * a.value_width;
  const float* given = a.row_weight == nullptr ? nullptr : a.row_weight + pair * a.sources;
  const bool online = weights != Weights::kGiven && !a.clamped;
  PerThread<typename ContextProduct<K>::C> total;
  PerThread<typename K::Vec> x;
  PerThread<float> share, weight_sum;
  FX_THREADS(t) {
    total[t] = {};
    weight_sum[t] = 0.0f;
  }
  // The clamp's upper bound is a maximum known beforehand.
  float maximum = a.clamped ? a.high : -INFINITY;
  for (int64_t first = range.begin; first < range.end; first += K::kTokens) {
    for (int r = 0; r < K::kTokens; r += K::kRows) {
      FX_THREADS(t) {
        const int64_t row = first + r + t / K::kLanes;
        const int column = (t % K::kLanes) * K::kVec;
        const bool inside = r + t / K::kLanes < K::kTokens && row < range.end;
        x[t] = inside ? load_feature<K>(a, k + row * k_stride, column) : zero_vec<K>();
        if (weights == Weights::kFlow) share[t] = dot_share<K>(x[t], flow_q_eps + column, a.eps);
      }
      if (weights == Weights::kFlow) group_sum<K::kLanes>(share);
      FX_THREADS(t) {
        const int tile_row = r + t / K::kLanes;
        const int64_t row = first + tile_row;
        if (tile_row < K::kTokens) {
          store_operand<K>(s.a + tile_row * K::kPitchContext + (t % K::kLanes) * K::kVec,
                           x[t]);
          if (t % K::kLanes == 0) {
            float value = -INFINITY;
            if (row < range.end)
              value = weights == Weights::kFlow ? clamped_flow(a, share[t] + a.outer_eps)
                                                : given[row];
            s.rows[tile_row] = value;
          }
        }
      }
    }
    FX_SYNC();
    float factor = 1.0f;
    if (online) {
      FX_THREADS(t) {
        share[t] = -INFINITY;
        for (int r = t; r < K::kTokens; r += kThreads) share[t] = fmaxf(share[t], s.rows[r]);
      }
      const float next = fmaxf(maximum, block_max(share, s.reduce));
      factor = expf(maximum - next);
      maximum = next;
      FX_THREADS(t) { weight_sum[t] *= factor; }
    }
    for (int r = 0; r < K::kTokens; r += K::kRows) {
      FX_THREADS(t) {
        const int tile_row = r + t / K::kLanes;
        const int64_t row = first + tile_row;
        if (tile_row < K::kTokens) {
          const int column = (t % K::kLanes) * K::kVec;
          auto y = zero_vec<K>();
          if (row < range.end) {
            const float weight =
                weights == Weights::kGiven ? s.rows[tile_row]
                                           : fast_exp(s.rows[tile_row] - maximum, T());
            if (column == 0) weight_sum[t] += weight;
            y = load_row<K>(v + row * v_stride, column, a.value_width, a.vector_v);
            for (int i = 0; i < K::kVec; ++i) y.x[i] *= weight;
          }
          store_operand<K>(s.b + tile_row * K::kPitchContext + column, y);
        }
      }
    }
    FX_SYNC();
    ContextProduct<K>::add_tile(s.a, s.b, factor, total);
    FX_SYNC();
  }
  const float sum = block_sum(weight_sum, s.reduce);
  store_total<K>(total, s.a, result);
  return {maximum, sum};
}

// Columns [block, block + kColumns) of a tile's rows: q·context by a thread's own sums.
template <class K>
FX_DEVICE void output_tile(const Args& a, Shared& s, typename K::Element* out, int64_t first,
                           int64_t end, int block) {
  using T = typename K::Element;
  constexpr int kLanesOut = K::kColumns / 4;
  constexpr int kGroups = kThreads / kLanesOut;
  constexpr int kRowsOut = K::kTokens / kGroups;
  // In float32, short runs are added up: rounding grows with the root of the longest chain.
  constexpr int kRun = sizeof(T) == 4 && K::P > 16 ? 16 : K::P;
  const int64_t out_stride = a.heads * a.value_width;
  FX_THREADS(t) {
    const int j = t % kLanesOut * 4, group = t / kLanesOut;
    float sum[kRowsOut][4] = {};
    for (int d0 = 0; d0 < K::P; d0 += kRun) {
      float part[kRowsOut][4] = {};
      for (int d = d0; d < d0 + kRun; d += 4) {
        Float4 c[4];
        for (int e = 0; e < 4; ++e) c[e] = load4(s.b + (d + e) * K::kColumns + j);
        for (int r = 0; r < kRowsOut; ++r) {
          const Float4 y = load4(s.a + (group + r * kGroups) * K::P + d);
          for (int e = 0; e < 4; ++e)
            for (int i = 0; i < 4; ++i) part[r][i] += y.x[e] * c[e].x[i];
        }
      }
      for (int r = 0; r < kRowsOut; ++r)
        for (int i = 0; i < 4; ++i) sum[r][i] += part[r][i];
    }
    for (int r = 0; r < kRowsOut; ++r) {
      const int tile_row = group + r * kGroups;
      const int64_t row = first + tile_row;
      if (row < end) {
        struct alignas(4 * sizeof(T)) Four {
          T x[4];
        } y;
        for (int i = 0; i < 4; ++i) from_float(sum[r][i] * s.rows[tile_row], y.x[i]);
        T* p = out + row * out_stride + block + j;
        if (a.vector_v && block + j + 4 <= a.value_width) {
          *reinterpret_cast<Four*>(p) = y;
        } else {
          for (int i = 0; i < 4; ++i)
            if (block + j + i < a.value_width) p[i] = y.x[i];
        }
      }
    }
  }
}

// The same columns from a tile in shared memory, 16 bytes a thread.
template <class K>
FX_DEVICE void store_rows(const Args& a, const float* tile, typename K::Element* out,
                          int64_t first, int64_t end, int block) {
  using T = typename K::Element;
  struct alignas(16) Raw {
    T x[K::kVec];
  };
  constexpr int kLanes = K::kColumns / K::kVec, kRows = kThreads / kLanes;
  const int64_t out_stride = a.heads * a.value_width;
  FX_THREADS(t) {
    const int column = t % kLanes * K::kVec;
    for (int r = t / kLanes; r < K::kTokens && first + r < end; r += kRows) {
      Raw y;
      for (int i = 0; i < K::kVec; ++i) from_float(tile[r * K::kPitchRows + column + i], y.x[i]);
      T* p = out + (first + r) * out_stride + block + column;
      if (a.vector_v && block + column + K::kVec <= a.value_width) {
        *reinterpret_cast<Raw*>(p) = y;
      } else {
        for (int i = 0; i < K::kVec; ++i)
          if (block + column + i < a.value_width) p[i] = y.x[i];
      }
    }
  }
}

// Rows [range) of the result. With `given`, row_scale holds S·a/I already.
template <class K>
FX_DEVICE void output_segment(const Args& a, int64_t pair, Range range, bool given,
                              const float* sum_k_eps, const float* flow_k_eps, Shared& s) {
  using T = typename K::Element;
  const T* q = head_rows<T>(a.q, a, pair, a.sinks, a.width);
  T* out = const_cast<T*>(head_rows<T>(a.out, a, pair, a.sinks, a.value_width));
  const int64_t q_stride = a.heads * a.width;
  const float* context = a.context + pair * K::P * K::P;
  const float ratio = static_cast<float>(a.sinks) / static_cast<float>(a.sources);
  PerThread<typename K::Vec> x;
  PerThread<float> incoming, conserved;
  for (int block = 0; block < K::P && block < a.value_width; block += K::kColumns) {
    FX_THREADS(t) {
      for (int e = 4 * t; e < K::P * K::kColumns; e += 4 * kThreads) {
        const int d = e / K::kColumns, column = e % K::kColumns;
        Float4 c = load4(context + d * K::P + block + column);
        if (K::kMma)
          for (int i = 0; i < 4; ++i) c.x[i] = to_tf32(c.x[i]);
        store4(s.b + d * K::kPitchColumns + column, c);
      }
    }
    for (int64_t first = range.begin; first < range.end; first += K::kTokens) {
      for (int r = 0; r < K::kTokens; r += K::kRows) {
        FX_THREADS(t) {
          const int64_t row = first + r + t / K::kLanes;
          const int column = (t % K::kLanes) * K::kVec;
          const bool inside = r + t / K::kLanes < K::kTokens && row < range.end;
          x[t] = inside ? load_feature<K>(a, q + row * q_stride, column) : zero_vec<K>();
          if (!given) {
            incoming[t] = dot_share<K>(x[t], sum_k_eps + column, a.eps);
            conserved[t] = dot_share<K>(x[t], flow_k_eps + column, a.eps);
          }
        }
        if (!given) {
          group_sum<K::kLanes>(incoming);
          group_sum<K::kLanes>(conserved);
        }
        FX_THREADS(t) {
          const int tile_row = r + t / K::kLanes;
          const int64_t row = first + tile_row;
          if (tile_row < K::kTokens) {
            store_operand<K>(s.a + tile_row * K::kPitchRows + (t % K::kLanes) * K::kVec, x[t]);
            if (t % K::kLanes == 0) {
              float scale = 0.0f;
              if (row < range.end)
                scale = given ? a.row_scale[pair * a.sinks + row]
                              : static_cast<float>(a.sources) / (incoming[t] + a.outer_eps) *
                                    sigmoid((conserved[t] + a.outer_eps) * ratio, T());
              s.rows[tile_row] = scale;
            }
          }
        }
      }
      FX_SYNC();
      if constexpr (K::kMma) {
        OutputMma<K>::multiply(s.a, s.b, s.rows);
        store_rows<K>(a, s.a, out, first, range.end, block);
      } else {
        output_tile<K>(a, s, out, first, range.end, block);
      }
      FX_SYNC();
    }
  }
}

// The kernels. `index` numbers the blocks; heads vary fastest, so that the heads of one token,
// which lie side by side in memory, are read at about the same time.

template <class K>
struct SumsKernel {
  static FX_DEVICE void run(const Args& a, int64_t index, Shared& s) {
    using T = typename K::Element;
    const int64_t pairs = a.batch * a.heads, pair = index % pairs, split = index / pairs;
    const int64_t at = (pair * a.splits + split) * K::P;
    column_sums<K>(a, head_rows<T>(a.k, a, pair, a.sources, a.width),
                   segment(split, a.sources_a_split, a.sources), s.a, a.sum_k + at);
    column_sums<K>(a, head_rows<T>(a.q, a, pair, a.sinks, a.width),
                   segment(split, a.sinks_a_split, a.sinks), s.a, a.sum_q + at);
  }
};

template <class K>
struct FlowsKernel {
  static FX_DEVICE void run(const Args& a, int64_t index, Shared& s) {
    using T = typename K::Element;
    const int64_t pairs = a.batch * a.heads, pair = index % pairs, split = index / pairs;
    const int64_t all = pair * a.splits * K::P, at = all + split * K::P;
    total_vector<K>(a, a.sum_k + all, a.splits, a.eps, s.scratch, s.vectors[0]);
    total_vector<K>(a, a.sum_q + all, a.splits, a.eps, s.scratch, s.vectors[1]);
    flow_sums<K>(a, head_rows<T>(a.k, a, pair, a.sources, a.width), s.vectors[1],
                 segment(split, a.sources_a_split, a.sources), s.a, a.flow_k + at);
    flow_sums<K>(a, head_rows<T>(a.q, a, pair, a.sinks, a.width), s.vectors[0],
                 segment(split, a.sinks_a_split, a.sinks), s.a, a.flow_q + at);
  }
};

template <class K, Weights W>
struct ContextKernel {
  static FX_DEVICE void run(const Args& a, int64_t index, Shared& s) {
    const int64_t pairs = a.batch * a.heads, pair = index % pairs, split = index / pairs;
    if (W == Weights::kFlow)
      total_vector<K>(a, a.flow_q + pair * a.splits * K::P, a.splits, a.eps, s.scratch,
                      s.vectors[0]);
    const int64_t at = pair * a.splits + split;
    const WeightTotal total =
        context_segment<K>(a, pair, segment(split, a.sources_a_split, a.sources), W, s.vectors[0],
                           s, a.part_context + at * K::P * K::P);
    FX_THREADS(t) {
      if (t == 0) {
        a.part_max[at] = total.maximum;
        a.part_sum[at] = total.sum;
      }
    }
  }
};

// Join the segments' contexts, relative to one maximum, and divide by Σ w unless weights are given.
template <class K, bool kNormalise>
struct JoinKernel {
  static constexpr int kBlocks = K::P * K::P < kThreads ? 1 : K::P * K::P / kThreads;
  static FX_DEVICE void run(const Args& a, int64_t index, Shared&) {
    const int64_t pair = index / kBlocks;
    const float *maxima = a.part_max + pair * a.splits, *sums = a.part_sum + pair * a.splits;
    FX_THREADS(t) {
      const int64_t e = index % kBlocks * kThreads + t;
      if (e < K::P * K::P) {
        float maximum = -INFINITY, weight = 0.0f, sum = 0.0f, lost = 0.0f;
        if (kNormalise)
          for (int i = 0; i < a.splits; ++i) maximum = fmaxf(maximum, maxima[i]);
        for (int i = 0; i < a.splits; ++i) {
          const float factor = kNormalise ? expf(maxima[i] - maximum) : 1.0f;
          weight += sums[i] * factor;
          const float x = a.part_context[(pair * a.splits + i) * K::P * K::P + e] * factor;
          const float next = sum + x, y = next - sum;  // a compensated sum
          lost += (sum - (next - y)) + (x - y);
          sum = next;
        }
        sum += lost;
        a.context[pair * K::P * K::P + e] = kNormalise ? sum / weight : sum;
      }
    }
  }
};

template <class K, bool kGiven>
struct OutputKernel {
  static FX_DEVICE void run(const Args& a, int64_t index, Shared& s) {
    const int64_t pairs = a.batch * a.heads, pair = index % pairs, split = index / pairs;
    const int64_t all = pair * a.splits * K::P;
    if (!kGiven) {
      total_vector<K>(a, a.sum_k + all, a.splits, a.eps, s.scratch, s.vectors[0]);
      total_vector<K>(a, a.flow_k + all, a.splits, a.eps, s.scratch, s.vectors[1]);
    }
    output_segment<K>(a, pair, segment(split, a.sinks_a_split, a.sinks), kGiven, s.vectors[0],
                      s.vectors[1], s);
  }
};

// Add ε to a total inside the block; zero from the width on.
template <class K>
FX_DEVICE void add_eps(const Args& a, float* total) {
  FX_THREADS(t) {
    if (t < K::P) total[t] = t < a.width ? total[t] + a.eps : 0.0f;
  }
  FX_SYNC();
}

// All of it for one (batch, head) pair in one block.
template <class K>
struct WholeKernel {
  static FX_DEVICE void run(const Args& a, int64_t pair, Shared& s) {
    using T = typename K::Element;
    const T* q = head_rows<T>(a.q, a, pair, a.sinks, a.width);
    const T* k = head_rows<T>(a.k, a, pair, a.sources, a.width);
    const Range sinks = {0, a.sinks}, sources = {0, a.sources};
    column_sums<K>(a, k, sources, s.a, s.vectors[0]);
    column_sums<K>(a, q, sinks, s.a, s.vectors[1]);
    add_eps<K>(a, s.vectors[0]);
    add_eps<K>(a, s.vectors[1]);
    flow_sums<K>(a, k, s.vectors[1], sources, s.a, s.vectors[2]);
    flow_sums<K>(a, q, s.vectors[0], sinks, s.a, s.vectors[3]);
    add_eps<K>(a, s.vectors[2]);
    add_eps<K>(a, s.vectors[3]);
    float* context = a.context + pair * K::P * K::P;
    const WeightTotal total =
        context_segment<K>(a, pair, sources, Weights::kFlow, s.vectors[3], s, context);
    FX_THREADS(t) {
      for (int e = t; e < K::P * K::P; e += kThreads) context[e] /= total.sum;
    }
    FX_SYNC();
    output_segment<K>(a, pair, sinks, false, s.vectors[0], s.vectors[2], s);
  }
};

}  // namespace flowexport

#endif
