// The instructions of sm_90a that C++ has no name for, one function each. Shared memory by its 32-bit address.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace spin::hopper::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- thread blocks of a cluster ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- barriers in shared memory ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// At the default scope of a block, as is usual: what it orders are reads of the tensor cores, which are over. A release
// to the cluster would be a fence of the whole GPU's memory at every stage.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "{.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  uint32_t over;
  do {
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!over);
}
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- the copy engine: a box of a tensor to shared memory, its bytes counted by a barrier ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y, int z,
                                         int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// To the same place of every block in the mask; each block's own barrier at that place counts.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                            int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "h"(blocks)
      : "memory");
}

// Between what a thread has read or written itself and copies to there, by whoever learns of it from this thread.
__device__ __forceinline__ void copies_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor cores ----

template <int kRegisters>
__device__ __forceinline__ void keep_registers_at_least() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void keep_registers_at_most() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps the compiler from moving what reads or writes the sums across products that it cannot see.
__device__ __forceinline__ void pin(float (&sums)[128]) {
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

#define SPIN_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPIN_SUMS_16(d, i) SPIN_SUMS_4(d, i), SPIN_SUMS_4(d, i + 4), SPIN_SUMS_4(d, i + 8), SPIN_SUMS_4(d, i + 12)
#define SPIN_SUMS_64(d, i) SPIN_SUMS_16(d, i), SPIN_SUMS_16(d, i + 16), SPIN_SUMS_16(d, i + 32), SPIN_SUMS_16(d, i + 48)
// clang-format off
#define SPIN_SUM_NAMES \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// clang-format on
// sums[64 kHalf ...] (64 x 128) (+)= a (64 x 16) b (128 x 16)^T, operands by their descriptors.
#define SPIN_PRODUCT(NAME, TYPE)                                                                     \
  template <int kHalf>                                                                               \
  __device__ __forceinline__ void NAME(float (&sums)[128], uint64_t a, uint64_t b, int accumulate) { \
    asm volatile(                                                                                    \
        "{.reg .pred add;\n"                                                                         \
        "setp.ne.b32 add, %66, 0;\n"                                                                 \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" SPIN_SUM_NAMES             \
        "}, %64, %65, add, 1, 1, 0, 0;}"                                                             \
        : SPIN_SUMS_64(sums, 64 * kHalf)                                                             \
        : "l"(a), "l"(b), "r"(accumulate));                                                          \
  }
SPIN_PRODUCT(multiply_bf16, "bf16")
SPIN_PRODUCT(multiply_f16, "f16")
#undef SPIN_PRODUCT
#undef SPIN_SUM_NAMES
#undef SPIN_SUMS_64
#undef SPIN_SUMS_16
#undef SPIN_SUMS_4

// Four 8 x 8 matrices of 2-byte values, transposed; lane i holds the address of line i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(uint32_t to, const uint32_t (&bits)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bits[0]),
               "r"(bits[1]), "r"(bits[2]), "r"(bits[3])
               : "memory");
}

}  // namespace spin::hopper::ptx
