// Causal Flow-Attention: every sum is a prefix sum, carried from segment to segment.
//
//   sums         Σφ(q), Σφ(k) of each segment            (SumsKernel)
//   flows        x = n/I, y = n/O; Σ k·y, Σ q·x of each segment
//   conserved    row_scale = x·a/n; logits Ô; (max, Σ exp) of each segment
//   competition  c = exp(Ô)/prefix sum·n, in place
//   context      Σ kᵀ(c v) of each segment               (ContextKernel, given weights)
//   prefix       exclusive prefix of the contexts, in place
//   output       (q·state + masked (q kᵀ) c v)·row_scale, chunk by chunk
#ifndef FLOWEXPORT_CAUSAL_H_
#define FLOWEXPORT_CAUSAL_H_

#include "noncausal.h"

namespace flowexport {

// Inclusive prefix sums down a tile's columns, starting from carry[P]; both tiles at once.
template <class K>
FX_DEVICE void scan_columns(float* x, float* y, const float* carry_x, const float* carry_y,
                            float* scratch) {
  constexpr int kSlices = kThreads / K::P, kLength = K::kTokens / kSlices;
  FX_THREADS(t) {
    const int d = t % K::P, first = t / K::P * kLength;
    float sum_x = 0.0f, sum_y = 0.0f;
    for (int i = 0; i < kLength; ++i) {
      sum_x += x[(first + i) * K::P + d];
      sum_y += y[(first + i) * K::P + d];
    }
    scratch[t] = sum_x;
    scratch[kThreads + t] = sum_y;
  }
  FX_SYNC();
  FX_THREADS(t) {
    const int d = t % K::P, first = t / K::P * kLength;
    float sum_x = carry_x[d], sum_y = carry_y[d];
    for (int slice = 0; slice < t / K::P; ++slice) {
      sum_x += scratch[slice * K::P + d];
      sum_y += scratch[kThreads + slice * K::P + d];
    }
    for (int i = 0; i < kLength; ++i) {
      const int at = (first + i) * K::P + d;
      x[at] = sum_x += x[at];
      y[at] = sum_y += y[at];
    }
  }
  FX_SYNC();
}

// φ against the prefix sums of the other side. Step 0: plain sums give n/I and n/O. Step 1: sums
// weighted by those give the allocation and the conserved flow.
template <class K, int kStep>
struct PrefixKernel {
  static FX_DEVICE void run(const Args& a, int64_t index, Shared& s) {
    using T = typename K::Element;
    const int64_t pairs = a.batch * a.heads, pair = index % pairs, split = index / pairs;
    const T* q = head_rows<T>(a.q, a, pair, a.sinks, a.width);
    const T* k = head_rows<T>(a.k, a, pair, a.sinks, a.width);
    const int64_t stride = a.heads * a.width, all = pair * a.splits * K::P;
    const Range range = segment(split, a.sinks_a_split, a.sinks);
    float *row_x = a.row_x + pair * a.sinks, *row_y = a.row_y + pair * a.sinks;
    float *scale = a.row_scale + pair * a.sinks, *logit = a.row_weight + pair * a.sinks;
    float *carry_k = s.vectors[0], *carry_q = s.vectors[1];
    total_vector<K>(a, (kStep == 0 ? a.sum_k : a.flow_k) + all, static_cast<int>(split), 0.0f,
                    s.scratch, carry_k);
    total_vector<K>(a, (kStep == 0 ? a.sum_q : a.flow_q) + all, static_cast<int>(split), 0.0f,
                    s.scratch, carry_q);
    PerThread<typename K::Vec> xk, xq, sum_k, sum_q;
    PerThread<float> sink, source;
    FX_THREADS(t) { sum_k[t] = sum_q[t] = zero_vec<K>(); }
    for (int64_t first = range.begin; first < range.end; first += K::kTokens) {
      FX_THREADS(t) {
        for (int r = t / K::kLanes; r < K::kTokens; r += K::kRows) {
          const int64_t row = first + r;
          const int column = (t % K::kLanes) * K::kVec;
          auto y = zero_vec<K>(), z = zero_vec<K>();
          if (row < range.end) {
            y = load_feature<K>(a, k + row * stride, column);
            z = load_feature<K>(a, q + row * stride, column);
            if (kStep == 1) {
              const float wy = row_y[row], wx = row_x[row];
              for (int i = 0; i < K::kVec; ++i) y.x[i] *= wy, z.x[i] *= wx;
            }
          }
          store_vec<K>(s.a + r * K::P + column, y);
          store_vec<K>(s.b + r * K::P + column, z);
        }
      }
      FX_SYNC();
      scan_columns<K>(s.a, s.b, carry_k, carry_q, s.scratch);
      for (int r = 0; r < K::kTokens; r += K::kRows) {
        FX_THREADS(t) {
          const int tile_row = r + t / K::kLanes;
          const int64_t row = first + tile_row;
          const int column = (t % K::kLanes) * K::kVec;
          sink[t] = source[t] = 0.0f;
          xk[t] = xq[t] = zero_vec<K>();
          if (tile_row < K::kTokens && row < range.end) {
            xk[t] = load_feature<K>(a, k + row * stride, column);
            xq[t] = load_feature<K>(a, q + row * stride, column);
            const float *pk = s.a + tile_row * K::P + column, *pq = s.b + tile_row * K::P + column;
            for (int i = 0; i < K::kVec; ++i) {
              if (column + i < a.width) {
                sink[t] += (xq[t].x[i] + a.eps) * (pk[i] + a.eps);
                source[t] += (xk[t].x[i] + a.eps) * (pq[i] + a.eps);
              }
            }
          }
        }
        group_sum<K::kLanes>(sink);
        group_sum<K::kLanes>(source);
        FX_THREADS(t) {
          const int tile_row = r + t / K::kLanes;
          const int64_t row = first + tile_row;
          if (tile_row < K::kTokens && row < range.end) {
            const float n = static_cast<float>(row + 1);
            if (kStep == 0) {
              const float x = n / (sink[t] + a.outer_eps), y = n / (source[t] + a.outer_eps);
              for (int i = 0; i < K::kVec; ++i) {
                sum_k[t].x[i] += xk[t].x[i] * y;
                sum_q[t].x[i] += xq[t].x[i] * x;
              }
              if (t % K::kLanes == 0) row_x[row] = x, row_y[row] = y;
            } else if (t % K::kLanes == 0) {
              scale[row] = row_x[row] / n * sigmoid((sink[t] + a.outer_eps) / n, T());
              logit[row] = clamped_flow(a, (source[t] + a.outer_eps) / n);
            }
          }
        }
      }
      FX_THREADS(t) {
        if (t < K::P) {
          carry_k[t] = s.a[(K::kTokens - 1) * K::P + t];
          carry_q[t] = s.b[(K::kTokens - 1) * K::P + t];
        }
      }
      FX_SYNC();
    }
    const int64_t at = pair * a.splits + split;
    if (kStep == 0) {
      reduce_columns<K>(sum_k, s.a, a.flow_k + at * K::P);
      reduce_columns<K>(sum_q, s.a, a.flow_q + at * K::P);
    } else {
      FX_THREADS(t) {
        sink[t] = -INFINITY;
        for (int64_t row = range.begin + t; row < range.end; row += kThreads)
          sink[t] = fmaxf(sink[t], logit[row]);
      }
      const float maximum = block_max(sink, s.reduce);
      FX_SYNC();
      FX_THREADS(t) {
        source[t] = 0.0f;
        for (int64_t row = range.begin + t; row < range.end; row += kThreads)
          source[t] += expf(logit[row] - maximum);
      }
      const float sum = block_sum(source, s.reduce);
      FX_THREADS(t) {
        if (t == 0) {
          a.part_max[at] = maximum;
          a.part_sum[at] = sum;
        }
      }
    }
  }
};

// Σ exp(logit), kept relative to its own maximum, so that no prefix over- or underflows.
struct ExpSum {
  float maximum, sum;
};
FX_DEVICE ExpSum join(ExpSum x, ExpSum y) {
  const float maximum = fmaxf(x.maximum, y.maximum);
  if (maximum == -INFINITY) return x;
  return {maximum, x.sum * expf(x.maximum - maximum) + y.sum * expf(y.maximum - maximum)};
}

template <class K>
struct CompetitionKernel {
  static FX_DEVICE void run(const Args& a, int64_t index, Shared& s) {
    const int64_t pairs = a.batch * a.heads, pair = index % pairs, split = index / pairs;
    const Range range = segment(split, a.sinks_a_split, a.sinks);
    float* weight = a.row_weight + pair * a.sinks;
    const float *maxima = a.part_max + pair * a.splits, *sums = a.part_sum + pair * a.splits;
    ExpSum carry = {-INFINITY, 0.0f};
    for (int i = 0; i < split; ++i) carry = join(carry, {maxima[i], sums[i]});
    PerThread<float> logit;
    auto* buffer = reinterpret_cast<ExpSum*>(s.a);  // two of kThreads
    for (int64_t first = range.begin; first < range.end; first += kThreads) {
      FX_THREADS(t) {
        logit[t] = first + t < range.end ? weight[first + t] : -INFINITY;
        buffer[t] = {logit[t], first + t < range.end ? 1.0f : 0.0f};
      }
      FX_SYNC();
      ExpSum *from = buffer, *to = buffer + kThreads;
      for (int step = 1; step < kThreads; step *= 2) {
        FX_THREADS(t) { to[t] = t >= step ? join(from[t - step], from[t]) : from[t]; }
        FX_SYNC();
        ExpSum* old = from;
        from = to;
        to = old;
      }
      FX_THREADS(t) {
        if (first + t < range.end) {
          const ExpSum prefix = join(carry, from[t]);
          weight[first + t] = expf(logit[t] - prefix.maximum) / prefix.sum *
                              static_cast<float>(first + t + 1);
        }
      }
      carry = join(carry, from[kThreads - 1]);
      FX_SYNC();
    }
  }
};

// Replace each segment's context by the sum of those before it, with a compensated sum.
template <class K>
struct ContextPrefixKernel {
  static constexpr int kBlocks = K::P * K::P < kThreads ? 1 : K::P * K::P / kThreads;
  static FX_DEVICE void run(const Args& a, int64_t index, Shared&) {
    float* context = a.part_context + index / kBlocks * a.splits * K::P * K::P;
    FX_THREADS(t) {
      const int64_t e = index % kBlocks * kThreads + t;
      if (e < K::P * K::P) {
        float sum = 0.0f, lost = 0.0f;
        for (int i = 0; i < a.splits; ++i) {
          float* p = context + i * K::P * K::P + e;
          const float x = *p, next = sum + x, y = next - sum;
          *p = sum + lost;
          lost += (sum - (next - y)) + (x - y);
          sum = next;
        }
      }
    }
  }
};

template <class K>
struct CausalOutputKernel {
  static constexpr int kChunk = K::P <= 32 ? 64 : 2048 / K::P;
  static constexpr int kPitch = K::P + 4;  // rows of k apart by this meet different banks
  static constexpr int kArena =
      K::P * K::kColumns + kChunk * (2 * kPitch + K::kColumns + kChunk);

  static FX_DEVICE void run(const Args& a, int64_t index, Shared& s) {
    using T = typename K::Element;
    constexpr int kEdge = kChunk / 16, kLanesOut = K::kColumns / 4;
    const int64_t pairs = a.batch * a.heads, pair = index % pairs, split = index / pairs;
    const T* q = head_rows<T>(a.q, a, pair, a.sinks, a.width);
    const T* k = head_rows<T>(a.k, a, pair, a.sinks, a.width);
    const T* v = head_rows<T>(a.v, a, pair, a.sinks, a.value_width);
    T* out = const_cast<T*>(head_rows<T>(a.out, a, pair, a.sinks, a.value_width));
    const int64_t stride = a.heads * a.width, v_stride = a.heads * a.value_width;
    const Range range = segment(split, a.sinks_a_split, a.sinks);
    const float* before = a.part_context + (pair * a.splits + split) * K::P * K::P;
    const float *weight = a.row_weight + pair * a.sinks, *scale = a.row_scale + pair * a.sinks;
    float* state = s.a;                                // P × kColumns
    float* tile_q = state + K::P * K::kColumns;        // kChunk × kPitch
    float* tile_k = tile_q + kChunk * kPitch;          // kChunk × kPitch
    float* tile_v = tile_k + kChunk * kPitch;          // kChunk × kColumns
    float* score = tile_v + kChunk * K::kColumns;      // kChunk × kChunk
    for (int block = 0; block < K::P && block < a.value_width; block += K::kColumns) {
      FX_THREADS(t) {
        for (int e = t; e < K::P * K::kColumns; e += kThreads)
          state[e] = before[e / K::kColumns * K::P + block + e % K::kColumns];
      }
      for (int64_t first = range.begin; first < range.end; first += kChunk) {
        FX_THREADS(t) {
          const int column = (t % K::kLanes) * K::kVec;
          for (int r = t / K::kLanes; r < kChunk; r += K::kRows) {
            const int64_t row = first + r;
            const bool inside = row < range.end;
            store_vec<K>(tile_q + r * kPitch + column,
                         inside ? load_feature<K>(a, q + row * stride, column) : zero_vec<K>());
            store_vec<K>(tile_k + r * kPitch + column,
                         inside ? load_feature<K>(a, k + row * stride, column) : zero_vec<K>());
            if (column >= block && column < block + K::kColumns) {
              auto y = zero_vec<K>();
              if (inside) {
                y = load_row<K>(v + row * v_stride, column, a.value_width, a.vector_v);
                for (int i = 0; i < K::kVec; ++i) y.x[i] *= weight[row];
              }
              store_vec<K>(tile_v + r * K::kColumns + column - block, y);
            }
          }
        }
        FX_SYNC();
        FX_THREADS(t) {
          float sum[kEdge][kEdge] = {};
          for (int d = 0; d < K::P; d += 4) {
            Float4 y[kEdge];
            for (int j = 0; j < kEdge; ++j) y[j] = load4(tile_k + (t % 16 + 16 * j) * kPitch + d);
            for (int i = 0; i < kEdge; ++i) {
              const Float4 x = load4(tile_q + (t / 16 + 16 * i) * kPitch + d);
              for (int j = 0; j < kEdge; ++j)
                for (int e = 0; e < 4; ++e) sum[i][j] += x.x[e] * y[j].x[e];
            }
          }
          for (int i = 0; i < kEdge; ++i)
            for (int j = 0; j < kEdge; ++j) {
              const int row = t / 16 + 16 * i, column = t % 16 + 16 * j;
              score[row * kChunk + column] = column <= row ? sum[i][j] : 0.0f;
            }
        }
        FX_SYNC();
        FX_THREADS(t) {
          const int j = t % kLanesOut * 4;
          for (int r = t / kLanesOut; r < kChunk; r += kThreads / kLanesOut) {
            float sum[4] = {};
            for (int d = 0; d < K::P; ++d) {
              const Float4 y = load4(state + d * K::kColumns + j);
              for (int e = 0; e < 4; ++e) sum[e] += tile_q[r * kPitch + d] * y.x[e];
            }
            for (int c = 0; c <= r; ++c) {
              const Float4 y = load4(tile_v + c * K::kColumns + j);
              for (int e = 0; e < 4; ++e) sum[e] += score[r * kChunk + c] * y.x[e];
            }
            const int64_t row = first + r;
            if (row < range.end)
              for (int e = 0; e < 4; ++e)
                if (block + j + e < a.value_width)
                  from_float(sum[e] * scale[row], out[row * v_stride + block + j + e]);
          }
        }
        FX_SYNC();
        FX_THREADS(t) {
          for (int e = t; e < K::P * kLanesOut; e += kThreads) {
            const int d = e / kLanesOut, j = e % kLanesOut * 4;
            Float4 sum = {};
            for (int r = 0; r < kChunk; ++r) {
              const Float4 y = load4(tile_v + r * K::kColumns + j);
              for (int i = 0; i < 4; ++i) sum.x[i] += tile_k[r * kPitch + d] * y.x[i];
            }
            Float4 y = load4(state + d * K::kColumns + j);
            for (int i = 0; i < 4; ++i) y.x[i] += sum.x[i];
            store4(state + d * K::kColumns + j, y);
          }
        }
        FX_SYNC();
      }
      FX_SYNC();
    }
  }
};

}  // namespace flowexport

#endif
