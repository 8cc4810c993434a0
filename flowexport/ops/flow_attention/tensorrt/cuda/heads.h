// The variants that sum over heads: MobileAttention's flows and the LRA code's competition.
#ifndef FLOWEXPORT_HEADS_H_
#define FLOWEXPORT_HEADS_H_

#include "noncausal.h"

namespace flowexport {

// Flows summed over the heads of one token: a group of kLanes threads owns a token and walks its
// heads. Writes row_scale = S·a/I and row_weight = Ô.
template <class K>
struct HeadFlowsKernel {
  using T = typename K::Element;
  using Vec = typename K::Vec;

  static FX_DEVICE int64_t blocks(const Args& a) {
    return (a.batch * a.sinks + K::kRows - 1) / K::kRows;
  }

  static FX_DEVICE Vec load(const Args& a, const void* x, int64_t token, int64_t head, int t) {
    if (token >= a.batch * a.sinks) return zero_vec<K>();
    return load_feature<K>(a, static_cast<const T*>(x) + (token * a.heads + head) * a.width,
                           (t % K::kLanes) * K::kVec);
  }

  static FX_DEVICE float dot(const Args& a, const Vec& x, const Vec& total, int t) {
    float sum = 0.0f;
    for (int i = 0; i < K::kVec; ++i)
      if ((t % K::kLanes) * K::kVec + i < a.width) sum += (x.x[i] + a.eps) * (total.x[i] + a.eps);
    return sum;
  }

  static FX_DEVICE void run(const Args& a, int64_t index, Shared&) {
    PerThread<Vec> q, k, sum_q, sum_k, flow_q, flow_k;
    PerThread<float> incoming, outgoing, sink, source;
    const int64_t first = index * K::kRows;
    const float ratio = static_cast<float>(a.sinks) / static_cast<float>(a.sources);
    FX_THREADS(t) {
      sum_q[t] = sum_k[t] = flow_q[t] = flow_k[t] = zero_vec<K>();
      for (int64_t h = 0; h < a.heads; ++h) {
        q[t] = load(a, a.q, first + t / K::kLanes, h, t);
        k[t] = load(a, a.k, first + t / K::kLanes, h, t);
        for (int i = 0; i < K::kVec; ++i) {
          sum_q[t].x[i] += q[t].x[i];
          sum_k[t].x[i] += k[t].x[i];
        }
      }
    }
    for (int64_t h = 0; h < a.heads; ++h) {
      FX_THREADS(t) {
        q[t] = load(a, a.q, first + t / K::kLanes, h, t);
        k[t] = load(a, a.k, first + t / K::kLanes, h, t);
        incoming[t] = dot(a, q[t], sum_k[t], t);
        outgoing[t] = dot(a, k[t], sum_q[t], t);
      }
      group_sum<K::kLanes>(incoming);
      group_sum<K::kLanes>(outgoing);
      FX_THREADS(t) {
        const float x = 1.0f / (incoming[t] + a.outer_eps), y = 1.0f / (outgoing[t] + a.outer_eps);
        for (int i = 0; i < K::kVec; ++i) {
          flow_q[t].x[i] += q[t].x[i] * x;
          flow_k[t].x[i] += k[t].x[i] * y;
        }
      }
    }
    for (int64_t h = 0; h < a.heads; ++h) {
      FX_THREADS(t) {
        q[t] = load(a, a.q, first + t / K::kLanes, h, t);
        k[t] = load(a, a.k, first + t / K::kLanes, h, t);
        incoming[t] = dot(a, q[t], sum_k[t], t);
        sink[t] = dot(a, q[t], flow_k[t], t);
        source[t] = dot(a, k[t], flow_q[t], t);
      }
      group_sum<K::kLanes>(incoming);
      group_sum<K::kLanes>(sink);
      group_sum<K::kLanes>(source);
      FX_THREADS(t) {
        const int64_t token = first + t / K::kLanes;
        if (t % K::kLanes == 0 && token < a.batch * a.sinks) {
          const int64_t at = (token / a.sinks * a.heads + h) * a.sinks + token % a.sinks;
          a.row_scale[at] = static_cast<float>(a.sources) / (incoming[t] + a.outer_eps) *
                            sigmoid((sink[t] + a.outer_eps) * ratio, T());
          a.row_weight[at] = clamped_flow(a, source[t] + a.outer_eps);
        }
      }
    }
  }
};

// Ô of every source, to row_weight.
template <class K>
struct LogitsKernel {
  static FX_DEVICE void run(const Args& a, int64_t index, Shared& s) {
    using T = typename K::Element;
    const int64_t pairs = a.batch * a.heads, pair = index % pairs, split = index / pairs;
    const T* k = head_rows<T>(a.k, a, pair, a.sources, a.width);
    const Range range = segment(split, a.sources_a_split, a.sources);
    PerThread<float> flow;
    total_vector<K>(a, a.flow_q + pair * a.splits * K::P, a.splits, a.eps, s.scratch, s.vectors[0]);
    for (int64_t first = range.begin; first < range.end; first += K::kRows) {
      FX_THREADS(t) {
        const int64_t row = first + t / K::kLanes;
        const int column = (t % K::kLanes) * K::kVec;
        flow[t] = 0.0f;
        if (row < range.end)
          flow[t] = dot_share<K>(load_feature<K>(a, k + row * a.heads * a.width, column),
                                 s.vectors[0] + column, a.eps);
      }
      group_sum<K::kLanes>(flow);
      FX_THREADS(t) {
        const int64_t row = first + t / K::kLanes;
        if (t % K::kLanes == 0 && row < range.end)
          a.row_weight[pair * a.sources + row] = clamped_flow(a, flow[t] + a.outer_eps);
      }
    }
  }
};

// Softmax over the heads of one token, in place in row_weight: a thread owns a token.
struct HeadSoftmaxKernel {
  static FX_DEVICE void run(const Args& a, int64_t index, Shared&) {
    FX_THREADS(t) {
      const int64_t token = index * kThreads + t;
      if (token < a.batch * a.sources) {
        float* p = a.row_weight + token / a.sources * a.heads * a.sources + token % a.sources;
        float maximum = -INFINITY, sum = 0.0f;
        for (int64_t h = 0; h < a.heads; ++h) maximum = fmaxf(maximum, p[h * a.sources]);
        for (int64_t h = 0; h < a.heads; ++h) sum += expf(p[h * a.sources] - maximum);
        for (int64_t h = 0; h < a.heads; ++h)
          p[h * a.sources] = expf(p[h * a.sources] - maximum) / sum;
      }
    }
  }
};

}  // namespace flowexport

#endif
