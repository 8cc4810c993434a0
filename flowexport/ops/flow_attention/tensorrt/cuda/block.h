// The platform: one block of threads, on a GPU or executed step by step on the host.
//
// A kernel here is a sequence of phases. FX_THREADS(t) { ... } is one phase: on a GPU this
// thread's share of it, on the host a loop over all threads of the block. Values that live from
// one phase to the next are PerThread<T>. A phase must not read what another thread wrote in the
// same phase; FX_SYNC() between two phases orders them. The host build can run the threads in
// reverse (FLOWEXPORT_HOST_REVERSE): a result that differs betrays a missing FX_SYNC.
#ifndef FLOWEXPORT_BLOCK_H_
#define FLOWEXPORT_BLOCK_H_

#include <cmath>
#include <cstdint>

namespace flowexport {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

}  // namespace flowexport

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FX_DEVICE __device__ __forceinline__
#define FX_BOTH __host__ __device__ __forceinline__
#define FX_THREADS(t) if (const int t = static_cast<int>(threadIdx.x); true)
#define FX_SYNC() __syncthreads()

namespace flowexport {

using Half = __half;
using BFloat = __nv_bfloat16;

template <class T>
struct PerThread {
  T value;
  FX_DEVICE T& operator[](int) { return value; }
};

FX_DEVICE float to_float(float x) { return x; }
FX_DEVICE float to_float(Half x) { return __half2float(x); }
FX_DEVICE float to_float(BFloat x) { return __bfloat162float(x); }
FX_DEVICE void from_float(float x, float& y) { y = x; }
FX_DEVICE void from_float(float x, Half& y) { y = __float2half_rn(x); }
FX_DEVICE void from_float(float x, BFloat& y) { y = __float2bfloat16_rn(x); }

// Sum over each aligned group of W lanes; every lane gets it. Called by all threads.
template <int W>
FX_DEVICE void group_sum(PerThread<float>& x) {
#pragma unroll
  for (int lane = W / 2; lane > 0; lane /= 2)
    x.value += __shfl_xor_sync(0xffffffffu, x.value, lane);
}
template <int W>
FX_DEVICE void group_max(PerThread<float>& x) {
#pragma unroll
  for (int lane = W / 2; lane > 0; lane /= 2)
    x.value = fmaxf(x.value, __shfl_xor_sync(0xffffffffu, x.value, lane));
}

}  // namespace flowexport

#else  // the host

#include <cstring>

#define FX_DEVICE inline
#define FX_BOTH inline
#ifdef FLOWEXPORT_HOST_REVERSE
#define FX_THREADS(t) for (int t = flowexport::kThreads - 1; t >= 0; --t)
#else
#define FX_THREADS(t) for (int t = 0; t < flowexport::kThreads; ++t)
#endif
#define FX_SYNC() static_cast<void>(0)

namespace flowexport {

using Half = _Float16;
struct BFloat {
  uint16_t bits;
};

template <class T>
struct PerThread {
  T value[kThreads];
  T& operator[](int t) { return value[t]; }
};

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return static_cast<float>(x); }
inline float to_float(BFloat x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, Half& y) { y = static_cast<Half>(x); }
inline void from_float(float x, BFloat& y) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    y.bits = 0x7fc0;
  } else {
    y.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

// The butterfly of the GPU's shuffle, in its order, so that rounding is the same.
template <int W, class Combine>
inline void butterfly(PerThread<float>& x, Combine combine) {
  for (int lane = W / 2; lane > 0; lane /= 2) {
    PerThread<float> old = x;
    for (int t = 0; t < kThreads; ++t) x[t] = combine(old[t], old[t ^ lane]);
  }
}
template <int W>
inline void group_sum(PerThread<float>& x) {
  butterfly<W>(x, [](float a, float b) { return a + b; });
}
template <int W>
inline void group_max(PerThread<float>& x) {
  butterfly<W>(x, [](float a, float b) { return std::fmax(a, b); });
}

}  // namespace flowexport

#endif

namespace flowexport {

struct alignas(16) Float4 {
  float x[4];
};
FX_DEVICE Float4 load4(const float* p) { return *reinterpret_cast<const Float4*>(p); }
FX_DEVICE void store4(float* p, const Float4& v) { *reinterpret_cast<Float4*>(p) = v; }

// Sum or maximum over the block, combined in a fixed order. `scratch` holds kWarps floats and is
// free again after the next FX_SYNC.
FX_DEVICE float block_sum(PerThread<float>& x, float* scratch) {
  group_sum<kWarp>(x);
  FX_THREADS(t) {
    if (t % kWarp == 0) scratch[t / kWarp] = x[t];
  }
  FX_SYNC();
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += scratch[i];
  return total;
}
FX_DEVICE float block_max(PerThread<float>& x, float* scratch) {
  group_max<kWarp>(x);
  FX_THREADS(t) {
    if (t % kWarp == 0) scratch[t / kWarp] = x[t];
  }
  FX_SYNC();
  float result = scratch[0];
  for (int i = 1; i < kWarps; ++i) result = fmaxf(result, scratch[i]);
  return result;
}

}  // namespace flowexport

#endif
