"""The fused kernel in CUDA C++, for TensorRT and for direct launches.

Why CUDA C++ and not Triton: the kernel must be *executed* where there is no
GPU, and shipped where there is no compiler. This source is written as blocks
of phases, so a C++ compiler turns the very same tiling, reductions and carry
logic into a host library that tests check against float64 (Triton's
interpreter executes Triton's semantics, not the code a GPU would run, and its
cubins need ptxas at build time and scratch arguments at run time). nvcc
compiles it ahead for every supported compute capability into one library with
a plain C interface that needs the driver alone.

16-bit tensors of width 32 and more use tensor cores (TF32 operands, float32
sums) from compute capability 8.0 on. The host executes the same fragments,
multiplied by the layout of the PTX manual.

What the host build cannot execute: the GPU's own shuffles, barriers, matrix
instruction, conversions and fast exponentials. Each is one wrapper in
``cuda/block.h``, ``cuda/row.h`` or ``cuda/mma.h`` with a host twin.
"""
