#!/usr/bin/env bash
# nvcc makes four stores of one float4 for sm_80 and sm_90, and one of it for sm_100, from the same line.
#
# Guess: a store through a float4 pointer is one 16-byte instruction, on every GPU that the same nvcc compiles for.
# Seen, nvcc 13.5.37: where a row's address is rounded down to a multiple of 16 bytes by subtracting from the pointer
# (what a kernel does for rows of 30,522 words), the store becomes 4 x st.global.f32 up to sm_90. One nvcc has two
# compilers: up to sm_90 its PTX says "Based on NVVM 7.0.1", from sm_100 on "NVVM 23.0.0", and the older one loses what
# it knew of the alignment. The same line with __stwb, or an index into a float4 pointer, stays one instruction.
# So: look for STG.128 in what is compiled for each GPU; a report for one architecture says nothing of the others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nvidia-cuda-nvcc==13.5.37 nvidia-cuda-crt==13.5.37 nvidia-nvvm==13.5.37 \
  nvidia-cuda-runtime==13.5.37
cd "$folder"
cat > rows.cu <<'CUDA'
#include <stdint.h>

__device__ float4 doubled(float4 v) { return make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w); }

__device__ float* rounded_down(float* row) { return row - reinterpret_cast<uintptr_t>(row) % 16 / 4; }

__global__ void by_pointer(const float4* x, float* y, int64_t stride) {
  float* row = rounded_down(y + blockIdx.x * stride);
  *reinterpret_cast<float4*>(row + threadIdx.x * 4) = doubled(x[threadIdx.x]);
}

__global__ void by_index(const float4* x, float* y, int64_t stride) {
  float* row = rounded_down(y + blockIdx.x * stride);
  reinterpret_cast<float4*>(row)[threadIdx.x] = doubled(x[threadIdx.x]);
}

__global__ void by_intrinsic(const float4* x, float* y, int64_t stride) {
  float* row = rounded_down(y + blockIdx.x * stride);
  __stwb(reinterpret_cast<float4*>(row + threadIdx.x * 4), doubled(x[threadIdx.x]));
}
CUDA
nvcc=$(echo venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
for arch in 80 90 100; do
  "$nvcc" -std=c++17 -O3 -ptx -arch=sm_$arch rows.cu -o rows_$arch.ptx
done
python3 - <<'PYTHON'
import re

for arch in 80, 90, 100:
    text = open(f"rows_{arch}.ptx").read()
    stores = {}
    for kernel in re.split(r"\.entry _Z\d+", text)[1:]:
        name = re.match(r"by_[a-z]+?(?=PK)", kernel).group()
        stores[name] = re.findall(r"st\.global\.\S+", kernel)
    print(f"sm_{arch}, {re.search(r'Based on (NVVM [0-9.]+)', text).group(1)}:")
    for name, found in stores.items():
        print(f"    {name:14}{' '.join(found)}")
    split = arch < 100
    assert stores["by_pointer"] == ["st.global.f32"] * 4 if split else ".v4" in stores["by_pointer"][0], "changed"
    assert all(len(stores[name]) == 1 and ".v4" in stores[name][0] for name in ("by_index", "by_intrinsic")), "changed"
PYTHON
