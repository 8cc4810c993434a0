/* Fused Flow-Attention (Wu et al., ICML 2022, arXiv 2202.06258): the plain C interface.
 *
 * Two libraries export these functions from one source: the CUDA build, whose pointers are device
 * pointers and whose `stream` is a cudaStream_t, and the host build, which executes the same
 * blocks, tiles and reductions on the CPU and ignores `stream`. Neither needs TensorRT.
 */
#ifndef FLOWEXPORT_FLOW_ATTENTION_H_
#define FLOWEXPORT_FLOW_ATTENTION_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FLOWEXPORT_API __attribute__((visibility("default")))
#else
#define FLOWEXPORT_API __declspec(dllexport)
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { FLOWEXPORT_FLOAT32 = 0, FLOWEXPORT_FLOAT16 = 1, FLOWEXPORT_BFLOAT16 = 2 };
enum { FLOWEXPORT_SIGMOID = 0, FLOWEXPORT_RELU = 1 };

/* q (batch, sinks, heads, width), k (batch, sources, heads, width),
 * v (batch, sources, heads, value_width), out (batch, sinks, heads, value_width): contiguous,
 * of `dtype`. Flags are 0 or 1. `splits` is 0, or a number of token segments to use instead of
 * the planned one (tests). */
typedef struct {
  int64_t batch, sinks, sources, heads;
  int32_t width, value_width, dtype, feature_map;
  int32_t clamped, causal, flow_over_heads, competition_over_heads;
  float clamp_low, clamp_high, eps, outer_eps;
  int32_t splits, reserved;
} flowexport_flow_attention_problem;

/* Bytes of scratch memory (256-byte aligned) that are enough for this problem and for every one
 * with a smaller batch, fewer heads or fewer tokens (so a profile's maximum serves its range);
 * 0 when the problem is invalid. */
FLOWEXPORT_API size_t
flowexport_flow_attention_workspace(const flowexport_flow_attention_problem* problem);

/* Why the problem cannot be computed, or NULL when it can. The text is static. */
FLOWEXPORT_API const char*
flowexport_flow_attention_check(const flowexport_flow_attention_problem* problem);

/* Enqueue on `stream`. 0: done; -1: the problem is invalid; -2: the workspace is missing, too
 * small or misaligned; a positive number: a cudaError_t. Results do not vary from run to run. */
FLOWEXPORT_API int flowexport_flow_attention_launch(
    const flowexport_flow_attention_problem* problem, const void* q, const void* k, const void* v,
    void* out, void* workspace, size_t workspace_bytes, void* stream);

/* The text of a status that launch returned. */
FLOWEXPORT_API const char* flowexport_flow_attention_status(int status);

/* 1 when this library computes on the host, 0 on a GPU. */
FLOWEXPORT_API int flowexport_flow_attention_is_host(void);

#ifdef __cplusplus
}
#endif
#endif
