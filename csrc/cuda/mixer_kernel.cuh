// The Hopper mixer on the GPU: mixer_roles.h on the instructions of ptx.h.
#pragma once
#include <type_traits>

#include "mixer_roles.h"
#include "ptx.h"

namespace spin::hopper {

// By value: the copy engine reads the maps from the kernel's parameters.
struct Launch {
  CUtensorMap matrices, tokens;  // (S, C, C) in boxes of 128 x 64; (B, H, W, C) in boxes of half a tile x 64
  Shape shape;
  Arguments arguments;
};

template <class Value>
struct Gpu {
  const Launch& launch;
  char* memory;  // shared, a multiple of kAlignment
  uint32_t base;

  __device__ int thread() const { return int(threadIdx.x); }
  __device__ int warp() const { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0); }  // known to be uniform
  __device__ int lane() const { return int(threadIdx.x) % 32; }
  __device__ int rank() const { return int(blockIdx.x) % kCluster; }
  __device__ int cluster() const { return int(blockIdx.x) / kCluster; }
  __device__ int clusters() const { return int(gridDim.x) / kCluster; }

  __device__ uint32_t barrier(int i) const { return base + kBarriersAt + 8 * i; }
  __device__ void wait(int i, int parity) const { ptx::barrier_wait(barrier(i), parity); }
  __device__ void arrive(int i) const { ptx::barrier_arrive(barrier(i)); }
  __device__ void arrive_at(int i, int rank) const { ptx::barrier_arrive_at(barrier(i), rank); }
  __device__ void arrive_expecting(int i, int bytes) const { ptx::barrier_arrive_expecting(barrier(i), bytes); }
  __device__ void fence_copies() const { ptx::copies_fence(); }
  __device__ void sync_warp() const { __syncwarp(); }
  __device__ void sync_panel(int panel) const { ptx::named_barrier(1 + panel, 32 * kDepthwiseWarps / kPanels); }

  __device__ void copy_matrix(int to, int i, int column, int row, int matrix) const {
    ptx::copy_box(base + to, &launch.matrices, barrier(i), column, row, matrix);
  }
  __device__ void copy_tokens(int to, int i, int channel, int row, int image) const {
    ptx::copy_box(base + to, &launch.tokens, barrier(i), channel, 0, row, image);
  }
  __device__ void copy_tokens_to_cluster(int to, int i, int channel, int row, int image) const {
    ptx::copy_box_to((1 << kCluster) - 1, base + to, &launch.tokens, barrier(i), channel, 0, row, image);
  }

  __device__ void begin_products(float (&sums)[128]) const {
    ptx::pin(sums);
    ptx::products_fence();
  }
  __device__ void multiply(float (&sums)[128], int matrix, int tokens, bool accumulate) const {
    static_assert(kHalves == 2);
    multiply_half<0>(sums, matrix, tokens, accumulate);
    multiply_half<1>(sums, matrix, tokens, accumulate);
  }
  template <int kHalf>
  __device__ void multiply_half(float (&sums)[128], int matrix, int tokens, bool accumulate) const {
    const uint64_t a = descriptor(base + matrix), b = descriptor(base + tokens + kHalf * kColumns * kLineBytes);
    if constexpr (std::is_same_v<Value, BFloat16>) {
      ptx::multiply_bf16<kHalf>(sums, a, b, accumulate);
    } else {
      ptx::multiply_f16<kHalf>(sums, a, b, accumulate);
    }
  }
  __device__ void end_products() const { ptx::products_commit(); }
  template <int kLeft>
  __device__ void wait_products(float (&sums)[128]) const {
    ptx::products_wait<kLeft>();
    ptx::pin(sums);
  }

  __device__ void store_transposed(int to, const uint32_t (&bits)[4]) const { ptx::store_transposed(base + to, bits); }
  __device__ uint32_t shared(int at) const { return *reinterpret_cast<const uint32_t*>(memory + at); }
  __device__ void set_shared(int at, uint32_t bits) const { *reinterpret_cast<uint32_t*>(memory + at) = bits; }
  __device__ float load(const float* p) const { return __ldg(p); }
  __device__ uint32_t load_one(const uint16_t* p) const { return __ldg(p); }
  __device__ uint32_t load_two(const uint16_t* p) const { return __ldg(reinterpret_cast<const unsigned int*>(p)); }
  __device__ void store(uint16_t* p, uint32_t bits) const { *reinterpret_cast<uint32_t*>(p) = bits; }
};

template <class Value, int kKernel, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) mixer_kernel(const __grid_constant__ Launch launch) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // other targets have no such instructions, and the dispatcher does not come here
  extern __shared__ char unaligned[];
  char* memory = unaligned + (kAlignment - ptx::shared_address(unaligned) % kAlignment) % kAlignment;
  Gpu<Value> gpu{launch, memory, ptx::shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kBarriers; ++i) ptx::barrier_init(gpu.barrier(i), arrivals(i, launch.shape.product));
    ptx::barrier_init_visible();
    ptx::prefetch_map(&launch.matrices);
    ptx::prefetch_map(&launch.tokens);
  }
  __syncwarp();
  ptx::cluster_sync();  // no block may be written to before its barriers are there

  const int warp = gpu.warp();
  if (warp < kProductWarps) {
    ptx::keep_registers_at_least<kProductRegisters>();
    product_role<Value>(gpu, launch.shape, launch.arguments);
  } else {
    ptx::keep_registers_at_most<kDepthwiseRegisters>();
    depthwise_role<Value, kKernel, kWidth>(gpu, launch.shape, launch.arguments);
  }
  __syncwarp();
  ptx::cluster_sync();  // nor leave while the other may still write to it
#endif
}

using Kernel = void (*)(const Launch);

// Null for sizes that none is compiled for.
template <class Value>
Kernel kernel_of(int64_t kernel_size, int width) {
  switch (kernel_size) {
    case 3:
      return width == 16 ? mixer_kernel<Value, 3, 16> : mixer_kernel<Value, 3, 0>;
    case 5:
      return width == 16 ? mixer_kernel<Value, 5, 16> : mixer_kernel<Value, 5, 0>;
    case 7:
      return width == 16 ? mixer_kernel<Value, 7, 16> : mixer_kernel<Value, 7, 0>;
    case 9:
      return width == 16 ? mixer_kernel<Value, 9, 16> : mixer_kernel<Value, 9, 0>;
    default:
      return nullptr;
  }
}

// Each in a file of its own, so that they compile at the same time.
extern template Kernel kernel_of<BFloat16>(int64_t, int);
extern template Kernel kernel_of<Float16>(int64_t, int);

}  // namespace spin::hopper
