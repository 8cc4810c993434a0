// Planning and launching: which kernels, over how many blocks, with which workspace.
#include "flow_attention.h"

#include "causal.h"
#include "heads.h"

#ifndef __CUDACC__
#include <cstdlib>
#include <limits>
#include <vector>
#endif

namespace flowexport {
namespace {

using Problem = flowexport_flow_attention_problem;

constexpr int64_t kWantedBlocks = 528;   // four for each of 132 multiprocessors
constexpr int64_t kLongestSegment = 4096;  // tokens; bounds what a thread adds up on its own
constexpr int64_t kWholeElements = 32768;  // padded q elements of a pair that one block takes
constexpr int64_t kMostSplits = 128;

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

int padded_width(const Problem& p) {
  const int width = p.width > p.value_width ? p.width : p.value_width;
  int padded = 8;
  while (padded < width) padded *= 2;
  return padded;
}

const char* check(const Problem* p) {
  if (p == nullptr) return "problem is null";
  if (p->batch < 1 || p->heads < 1 || p->sinks < 1 || p->sources < 1)
    return "batch, heads, sinks and sources must be at least 1";
  if (p->width < 1 || p->width > kMaxWidth || p->value_width < 1 || p->value_width > kMaxWidth)
    return "width and value_width must be 1 to 128";
  if (p->dtype < FLOWEXPORT_FLOAT32 || p->dtype > FLOWEXPORT_BFLOAT16)
    return "dtype must be 0 (float32), 1 (float16) or 2 (bfloat16)";
  if (p->feature_map != FLOWEXPORT_SIGMOID && p->feature_map != FLOWEXPORT_RELU)
    return "feature_map must be 0 (sigmoid) or 1 (relu)";
  if (p->clamped && !(p->clamp_low < p->clamp_high)) return "clamp_low must be below clamp_high";
  if (!(p->eps >= 0.0f) || !(p->outer_eps >= 0.0f)) return "eps and outer_eps must be at least 0";
  if ((p->causal || p->flow_over_heads) && p->sinks != p->sources)
    return "a causal variant, and one that sums over heads, needs as many sinks as sources";
  if (p->causal && (p->flow_over_heads || p->competition_over_heads))
    return "a causal variant sums over tokens only";
  if (p->splits < 0 || p->splits > 65536) return "splits must be 0 to 65536";
  if (p->batch > (int64_t{1} << 31) / p->heads) return "batch times heads must be at most 2^31";
  const int64_t tokens = larger(p->sinks, p->sources);
  if (tokens > (int64_t{1} << 31) || p->batch * p->heads * ceil_div(tokens, 256) > (int64_t{1} << 31))
    return "the tensors are too large for one launch";
  return nullptr;
}

struct Plan {
  bool whole;  // one block a (batch, head) pair does everything
  int splits;
  int64_t sinks_a_split, sources_a_split;
};

Plan plan(const Problem& p) {
  const int64_t tile = 4096 / padded_width(p), pairs = p.batch * p.heads;
  const int64_t tokens = larger(p.sinks, p.sources);
  Plan result = {};
  int64_t splits = p.splits;
  if (splits == 0) {
    const int64_t fewest = ceil_div(tokens, kLongestSegment);
    const int64_t most = larger(fewest, smaller(kMostSplits, ceil_div(tokens, tile)));
    splits = smaller(most, larger(fewest, ceil_div(kWantedBlocks, pairs)));
    if (tokens * padded_width(p) <= kWholeElements && !p.causal) splits = 1;
  }
  result.sinks_a_split = ceil_div(ceil_div(p.sinks, splits), tile) * tile;
  result.sources_a_split = ceil_div(ceil_div(p.sources, splits), tile) * tile;
  result.splits = static_cast<int>(larger(ceil_div(p.sinks, result.sinks_a_split),
                                          ceil_div(p.sources, result.sources_a_split)));
  result.whole = result.splits == 1 && !p.causal && !p.flow_over_heads &&
                 !p.competition_over_heads;
  return result;
}

// Lays out the workspace; with a null base it only counts. `segments` is batch·heads·splits.
class Layout {
 public:
  explicit Layout(void* base) : base_(static_cast<char*>(base)) {}
  float* take(bool needed, int64_t floats) {
    if (!needed) return nullptr;
    float* result = base_ == nullptr ? nullptr : reinterpret_cast<float*>(base_ + used_);
    used_ += static_cast<size_t>(ceil_div(floats, 64) * 256);
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

size_t lay_out(const Problem& p, int64_t segments, void* base, Args& a) {
  const int64_t width = padded_width(p), pairs = p.batch * p.heads;
  const int64_t sinks = pairs * p.sinks, sources = pairs * p.sources;
  const bool token_flows = !p.flow_over_heads;
  Layout l(base);
  a.context = l.take(!p.causal, pairs * width * width);
  a.sum_k = l.take(token_flows, segments * width);
  a.sum_q = l.take(token_flows, segments * width);
  a.flow_k = l.take(token_flows, segments * width);
  a.flow_q = l.take(token_flows, segments * width);
  a.part_context = l.take(true, segments * width * width);
  a.part_max = l.take(true, segments);
  a.part_sum = l.take(true, segments);
  a.row_scale = l.take(p.causal || p.flow_over_heads, sinks);
  a.row_weight = l.take(p.causal || p.flow_over_heads || p.competition_over_heads, sources);
  a.row_x = l.take(p.causal, sinks);
  a.row_y = l.take(p.causal, sinks);
  return l.used();
}

// The most segments of any problem that is no larger in batch, heads and tokens.
int64_t most_segments(const Problem& p) {
  const int64_t pairs = p.batch * p.heads;
  if (p.splits > 0) return pairs * p.splits;
  const int64_t fewest = ceil_div(larger(p.sinks, p.sources), kLongestSegment);
  return larger(pairs * fewest, kWantedBlocks - 1 + pairs);
}

#ifdef __CUDACC__

using Stream = cudaStream_t;

template <class Kernel, int kFloats>
__global__ void __launch_bounds__(kThreads) enter(const Args a) {
  extern __shared__ __align__(16) float memory[];
  Shared s(memory);
  Kernel::run(a, blockIdx.x, s);
}

template <class Kernel, int kArena>
int launch(const Args& a, int64_t blocks, Stream stream) {
  constexpr int kFloats = Shared::kFixed + kArena;
  constexpr int kBytes = kFloats * static_cast<int>(sizeof(float));
  const auto function = enter<Kernel, kFloats>;
  if (kBytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (status != cudaSuccess) return status;
  }
  function<<<static_cast<unsigned>(blocks), kThreads, kBytes, stream>>>(a);
  return cudaGetLastError();
}

#else

using Stream = void*;

// Every block starts with NaN in its shared memory: a value that was never written shows.
template <class Kernel, int kArena>
int launch(const Args& a, int64_t blocks, Stream) {
  constexpr size_t kFloats = Shared::kFixed + kArena;
#pragma omp parallel
  {
    std::vector<Float4> memory((kFloats + 3) / 4);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      for (auto& x : memory) x = {{nan, nan, nan, nan}};
      Shared s(memory[0].x);
      Kernel::run(a, block, s);
    }
  }
  return 0;
}

#endif

#define FX_LAUNCH(kernel, arena, blocks)                          \
  do {                                                            \
    const int status_ = launch<kernel, arena>(a, blocks, stream); \
    if (status_ != 0) return status_;                             \
  } while (false)

template <class K, Weights W>
int launch_context(const Args& a, Stream stream) {
  const int64_t pairs = a.batch * a.heads;
  using Context = ContextKernel<K, W>;
  using Join = JoinKernel<K, W != Weights::kGiven>;
  FX_LAUNCH(Context, 10240, pairs * a.splits);
  FX_LAUNCH(Join, 0, pairs * Join::kBlocks);
  return 0;
}

template <class K>
int launch_flow_attention(const Args& a, const Problem& p, bool whole, Stream stream) {
  const int64_t pairs = a.batch * a.heads, segments = pairs * a.splits;
  int status = 0;
  if (whole) {
    FX_LAUNCH(WholeKernel<K>, K::kArena, pairs);
    return 0;
  }
  if (!p.flow_over_heads) FX_LAUNCH(SumsKernel<K>, 4096, segments);
  if (p.causal) {
    using Flows = PrefixKernel<K, 0>;
    using Conserved = PrefixKernel<K, 1>;
    using Context = ContextKernel<K, Weights::kGiven>;
    using Prefix = ContextPrefixKernel<K>;
    using Output = CausalOutputKernel<K>;
    FX_LAUNCH(Flows, 10240, segments);
    FX_LAUNCH(Conserved, 10240, segments);
    FX_LAUNCH(CompetitionKernel<K>, 4 * kThreads, segments);
    FX_LAUNCH(Context, 10240, segments);
    FX_LAUNCH(Prefix, 0, pairs * Prefix::kBlocks);
    FX_LAUNCH(Output, Output::kArena, segments);
    return 0;
  }
  if (p.flow_over_heads) {
    FX_LAUNCH(HeadFlowsKernel<K>, 0, HeadFlowsKernel<K>::blocks(a));
  } else {
    FX_LAUNCH(FlowsKernel<K>, 4096, segments);
    if (p.competition_over_heads) FX_LAUNCH(LogitsKernel<K>, 0, segments);
  }
  if (p.competition_over_heads) {
    FX_LAUNCH(HeadSoftmaxKernel, 0, ceil_div(a.batch * a.sources, kThreads));
    status = launch_context<K, Weights::kGiven>(a, stream);
  } else if (p.flow_over_heads) {
    status = launch_context<K, Weights::kLogits>(a, stream);
  } else {
    status = launch_context<K, Weights::kFlow>(a, stream);
  }
  if (status != 0) return status;
  using FromFlows = OutputKernel<K, false>;
  using FromRows = OutputKernel<K, true>;
  if (p.flow_over_heads) {
    FX_LAUNCH(FromRows, K::kArena, segments);
  } else {
    FX_LAUNCH(FromFlows, K::kArena, segments);
  }
  return 0;
}

template <class T>
int launch_width(const Args& a, const Problem& p, bool whole, Stream stream) {
  switch (padded_width(p)) {
    case 8: return launch_flow_attention<Tile<T, 8>>(a, p, whole, stream);
    case 16: return launch_flow_attention<Tile<T, 16>>(a, p, whole, stream);
    case 32: return launch_flow_attention<Tile<T, 32>>(a, p, whole, stream);
    case 64: return launch_flow_attention<Tile<T, 64>>(a, p, whole, stream);
    default: return launch_flow_attention<Tile<T, 128>>(a, p, whole, stream);
  }
}

bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && bytes % 16 == 0;
}

}  // namespace
}  // namespace flowexport

extern "C" {

const char* flowexport_flow_attention_check(const flowexport_flow_attention_problem* problem) {
  return flowexport::check(problem);
}

size_t flowexport_flow_attention_workspace(const flowexport_flow_attention_problem* problem) {
  if (flowexport::check(problem) != nullptr) return 0;
  flowexport::Args a = {};
  return flowexport::lay_out(*problem, flowexport::most_segments(*problem), nullptr, a);
}

int flowexport_flow_attention_launch(const flowexport_flow_attention_problem* problem,
                                     const void* q, const void* k, const void* v, void* out,
                                     void* workspace, size_t workspace_bytes, void* stream) {
  using namespace flowexport;
  if (check(problem) != nullptr || q == nullptr || k == nullptr || v == nullptr || out == nullptr)
    return -1;
  const Problem& p = *problem;
  const Plan plan = flowexport::plan(p);
  Args a = {};
  if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 256 != 0 ||
      lay_out(p, p.batch * p.heads * plan.splits, workspace, a) > workspace_bytes)
    return -2;
  const int64_t size = p.dtype == FLOWEXPORT_FLOAT32 ? 4 : 2;
  a.q = q, a.k = k, a.v = v, a.out = out;
  a.batch = p.batch, a.sinks = p.sinks, a.sources = p.sources, a.heads = p.heads;
  a.width = p.width, a.value_width = p.value_width;
  a.splits = plan.splits;
  a.sinks_a_split = plan.sinks_a_split, a.sources_a_split = plan.sources_a_split;
  a.relu = p.feature_map == FLOWEXPORT_RELU, a.clamped = p.clamped != 0;
  a.low = p.clamp_low, a.high = p.clamp_high, a.eps = p.eps, a.outer_eps = p.outer_eps;
  a.vector_qk = aligned(q, p.width * size) && aligned(k, p.width * size);
  a.vector_v = aligned(v, p.value_width * size) && aligned(out, p.value_width * size);
  const auto s = static_cast<Stream>(stream);
  switch (p.dtype) {
    case FLOWEXPORT_FLOAT32: return launch_width<float>(a, p, plan.whole, s);
    case FLOWEXPORT_FLOAT16: return launch_width<Half>(a, p, plan.whole, s);
    default: return launch_width<BFloat>(a, p, plan.whole, s);
  }
}

const char* flowexport_flow_attention_status(int status) {
  if (status == 0) return "done";
  if (status == -1) return "the problem is invalid or a pointer is null";
  if (status == -2) return "the workspace is missing, too small or not aligned to 256 bytes";
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  return "unknown";
#endif
}

int flowexport_flow_attention_is_host(void) {
#ifdef __CUDACC__
  return 0;
#else
  return 1;
#endif
}

}  // extern "C"
