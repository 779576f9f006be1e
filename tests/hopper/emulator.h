// The machine that mixer_roles.h runs on without a GPU: what struct Gpu of mixer_kernel.cuh does with one instruction
// each, on a cluster of cluster.h. It knows nothing of the roles beyond these operations, and can be told to leave out
// or damage single ones of them: a test of the roles is worth what it says about damaged ones.
//
// Not modelled: what the compiler does (registers, whether branches meet again by themselves), scopes of memory order
// (all are the cluster), races in global memory, time.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/mixer_roles.h"
#include "cluster.h"

namespace hopper_test {

enum class Damage {
  kNone,
  kSkipFull,   // waits for a stage's bytes
  kSkipEmpty,  // waits for a stage to be free
  kSkipPlanesFull,
  kSkipPlanesEmpty,
  kSkipPanel,        // the meeting between finishing x and convolving it
  kSkipWarp,         // __syncwarp where all lanes have done alike
  kSkipConvergence,  // __syncwarp where they have not
  kSkipFence,        // before products
  kSkipCommit,
  kSkipProducts,       // waits for products, all of them
  kSkipOlderProducts,  // waits that leave products in flight
  kEarlyRelease,       // a stage is released when products with it are issued
  kOwnRelease,         // in the own block only, and only those are counted
  kOwnEmpty,           // block 1 copies when its own warps are done with a stage
  kSkipRemoteArrival,  // of one warp, counted all the same
  kSkipArrival,        // of one thread at barriers of its own block
  kTwoArrivals,        // of the same
  kHalfBytes,          // expected
  kNoBytes,
  kParityFull,
  kParityEmpty,
  kParityPlanesFull,
  kParityPlanesEmpty,
  kUnicast,            // tokens to the own block only
  kSkipCopyFence,      // between reading planes and copying over them
  kShiftedCopy,        // a line too far
  kShiftedColumn,      // tokens of other input channels
  kDescriptorStride,   // groups of 8 lines 512 bytes apart
  kDescriptorSwizzle,  // none
  kDescriptorAddress,  // another 16 input channels of a
  kStepAdded,          // every first product adds to what was there
  kNotTransposed,      // the planes' 8 x 8 matrices
  kStartApart,         // no meeting of the cluster before,
  kEndApart,           // or after the roles
  kCount
};
// clang-format off
constexpr const char* kDamages[] = {
    "none", "skip_full", "skip_empty", "skip_planes_full", "skip_planes_empty", "skip_panel", "skip_warp",
    "skip_convergence", "skip_fence", "skip_commit", "skip_products", "skip_older_products", "early_release",
    "own_release", "own_empty", "skip_remote_arrival", "skip_arrival", "two_arrivals", "half_bytes", "no_bytes",
    "parity_full", "parity_empty", "parity_planes_full", "parity_planes_empty", "unicast", "skip_copy_fence",
    "shifted_copy", "shifted_column", "descriptor_stride", "descriptor_swizzle", "descriptor_address", "step_added",
    "not_transposed", "start_apart", "end_apart",
};
// clang-format on
static_assert(sizeof kDamages / sizeof *kDamages == size_t(Damage::kCount));

// What all machines of a launch share.
struct Launch {
  Cluster cluster;
  TensorMap matrices, tokens;
  hopper::Shape shape;
  hopper::Arguments arguments;
  int index = 0, clusters = 1;  // of this cluster, in the grid
  Damage damage = Damage::kNone;
  void (*roles)(Launch&, int) = nullptr;
};

class Machine {
 public:
  Machine(Launch& launch, int fiber) : launch_(launch), c_(launch.cluster), f_(fiber) {}

  int thread() const { return f_ % kBlockThreads; }
  int lane() const { return f_ % 32; }
  int rank() const { return f_ / kBlockThreads; }
  int cluster() const { return launch_.index; }
  int clusters() const { return launch_.clusters; }
  int warp() {  // by __shfl_sync
    c_.together(f_, {"shfl_sync", false}, [] {});
    return thread() / 32;
  }

  // ---- barriers ----

  void wait(int i, int parity) {
    c_.fibers.step(kSynchronises);
    const bool is_full = i < hopper::kStages, is_empty = !is_full && i < 2 * hopper::kStages;
    const bool planes_full = i == hopper::kPlanesFull, planes_empty = i == hopper::kPlanesEmpty;
    c_.waited(f_);
    if (is_full) stage_ = i;
    if (is(Damage::kSkipFull, is_full) || is(Damage::kSkipEmpty, is_empty)) return;
    if (is(Damage::kSkipPlanesFull, planes_full) || is(Damage::kSkipPlanesEmpty, planes_empty)) return;
    if (is(Damage::kParityFull, is_full) || is(Damage::kParityEmpty, is_empty)) parity ^= 1;
    if (is(Damage::kParityPlanesFull, planes_full) || is(Damage::kParityPlanesEmpty, planes_empty)) parity ^= 1;
    Barrier& b = c_.barrier(rank(), i, f_, clock());
    while (!b.over(parity)) {
      // A thread that looks for a phase too late may find a later one of the same parity: it looks again when it runs.
      b.waiting.push_back(f_);
      c_.fibers.block({Cluster::kWaits, i, parity});
    }
    clock().join(b.done);
  }
  void arrive(int i) {
    c_.fibers.step(kSynchronises);
    const bool chosen = thread() == 0 || warp_of_thread() == kProductWarps;
    if (is(Damage::kSkipArrival, chosen)) return;
    arrive_now(i, 0);
    if (is(Damage::kTwoArrivals, chosen)) arrive_now(i, 0);
  }
  void arrive_at(int i, int rank) {
    c_.fibers.step(kSynchronises);
    if (is(Damage::kEarlyRelease) || is(Damage::kOwnRelease, rank != this->rank())) return;
    if (is(Damage::kOwnEmpty, rank == 1 && this->rank() == 0)) return;
    if (is(Damage::kSkipRemoteArrival, rank != this->rank() && warp_of_thread() == 3)) return;
    release(i, rank);
  }
  void arrive_expecting(int i, int bytes) {
    c_.fibers.step(kSynchronises);
    arrive_now(i, is(Damage::kHalfBytes) ? bytes / 2 : is(Damage::kNoBytes) ? 0 : bytes);
  }

  void sync_warp() {
    c_.fibers.step(kSynchronises);
    if (launch_.damage == Damage::kSkipWarp || launch_.damage == Damage::kSkipConvergence) {
      bool alike = true;  // decided together, or lanes would part
      c_.together(f_, {"(sync_warp)", false}, [&] { alike_of_warp() = c_.converged(f_); });
      alike = alike_of_warp();
      if (is(Damage::kSkipWarp, alike) || is(Damage::kSkipConvergence, !alike)) return;
    }
    c_.sync_warp(f_);
  }
  void sync_panel(int panel) {
    c_.fibers.step(kSynchronises);
    if (!is(Damage::kSkipPanel)) c_.sync_named(f_, 1 + panel, 32 * hopper::kDepthwiseWarps / hopper::kPanels);
  }

  // ---- the copy engine ----

  void fence_copies() {
    if (!is(Damage::kSkipCopyFence)) c_.fence_copies(f_);
  }

  void copy_matrix(int to, int i, int column, int row, int matrix) {
    copy(launch_.matrices, to, i, {column, row, matrix}, rank(), "matrix");
  }
  void copy_tokens(int to, int i, int channel, int row, int image) {
    copy(launch_.tokens, to, i, {channel, 0, row, image}, rank(), "tokens");
  }
  void copy_tokens_to_cluster(int to, int i, int channel, int row, int image) {
    if (is(Damage::kShiftedColumn)) channel += 8;
    copy(launch_.tokens, to, i, {channel, 0, row, image}, is(Damage::kUnicast) ? rank() : -1, "tokens");
  }

  // ---- tensor cores ----

  void begin_products(float (&)[128]) {
    c_.fibers.step(kSynchronises);
    c_.together(f_, {"wgmma.fence", true}, [&] {
      if (!is(Damage::kSkipFence)) c_.cores(f_).fence();
    });
  }
  void multiply(float (&sums)[128], int matrix, int tokens, bool accumulate) {
    static float* lanes[Fibers::kCount / 32][32];
    auto& mine = lanes[f_ / 32];
    mine[lane()] = sums;
    const uint32_t base = c_.blocks[rank()].base;
    if (is(Damage::kDescriptorAddress)) matrix ^= hopper::kPartBytes;
    if (is(Damage::kStepAdded)) accumulate = true;
    c_.together(f_, {"wgmma.mma_async", true, matrix, tokens, accumulate}, [&] {
      for (int half = 0; half < hopper::kHalves; ++half) {
        const int columns = tokens + half * hopper::kColumns * hopper::kLineBytes;
        c_.issue(
            f_,
            {damaged(hopper::descriptor(base + matrix)), damaged(hopper::descriptor(base + columns)), half, accumulate},
            mine);
      }
    });
  }
  void end_products() {
    if (!is(Damage::kSkipCommit)) c_.together(f_, {"wgmma.commit_group", true}, [&] { c_.commit(f_); });
    if (is(Damage::kEarlyRelease, lane() < kBlocks)) release(hopper::kStages + stage_, lane());
  }
  template <int kLeft>
  void wait_products(float (&)[128]) {
    c_.fibers.step(kSynchronises);
    if (is(Damage::kSkipProducts) || is(Damage::kSkipOlderProducts, kLeft > 0)) return;
    c_.together(f_, {"wgmma.wait_group", true, kLeft}, [&] { c_.wait_products(f_, kLeft); });
  }

  // ---- data ----

  // stmatrix.m8n8.x4.trans: thread t has, of matrix i, the values of row t / 4 at columns 2 (t % 4) and after in
  // register i; row j of what is stored, a column of these, goes where thread 8 i + j says.
  void store_transposed(int to, const uint32_t (&bits)[4]) {
    static struct {
      int to;
      uint32_t bits[4];
    } lanes[Fibers::kCount / 32][32];
    auto& warp = lanes[f_ / 32];
    warp[lane()].to = to;
    std::memcpy(warp[lane()].bits, bits, sizeof bits);
    c_.together(f_, {"stmatrix", true}, [&] {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int row = 0; row < 8; ++row) {
          uint16_t values[8];
          for (int i = 0; i < 8; ++i) {
            const int from = is(Damage::kNotTransposed) ? row : i, at = is(Damage::kNotTransposed) ? i : row;
            values[i] = uint16_t(warp[from * 4 + at / 2].bits[matrix] >> at % 2 * 16);
          }
          const int lane = 8 * matrix + row;
          c_.store(f_ / 32 * 32 + lane, warp[lane].to, values, sizeof values);
        }
      }
    });
  }
  uint32_t shared(int at) {
    c_.fibers.step(1);
    return c_.load(f_, at);
  }
  void set_shared(int at, uint32_t bits) {
    c_.fibers.step(1);
    c_.store(f_, at, &bits, sizeof bits);
  }
  float load(const float* p) { return c_.global.load<float>(p, sizeof(float)); }
  uint32_t load_one(const uint16_t* p) { return c_.global.load<uint16_t>(p, 2); }
  uint32_t load_two(const uint16_t* p) { return c_.global.load<uint32_t>(p, 2); }
  void store(uint16_t* p, uint32_t bits) { c_.global.store_two(p, bits); }

 private:
  static constexpr int kSynchronises = 16;  // as costly as so many accesses: how often others run

  bool is(Damage damage, bool here = true) const { return launch_.damage == damage && here; }
  int warp_of_thread() const { return thread() / 32; }
  Clock& clock() { return c_.clocks[f_]; }
  bool& alike_of_warp() {
    static bool alike[Fibers::kCount / 32];
    return alike[f_ / 32];
  }
  void arrive_now(int i, int bytes) {
    c_.arrive(rank(), i, f_, clock(), bytes);
    c_.tick(f_);
  }
  void release(int i, int rank) {
    c_.arrive_later(rank, i, f_);
    c_.tick(f_);
  }
  void copy(const TensorMap& map, int to, int i, std::vector<int> start, int only, const char* what) {
    c_.fibers.step(kSynchronises);
    c_.waited(f_);
    c_.copy(f_, map, to + (is(Damage::kShiftedCopy) ? kLine : 0), i, std::move(start), only, what);
  }
  uint64_t damaged(uint64_t descriptor) const {
    if (is(Damage::kDescriptorStride)) return descriptor - (uint64_t(512 >> 4) << 32);
    return is(Damage::kDescriptorSwizzle) ? descriptor & ~(uint64_t(3) << 62) : descriptor;
  }

  Launch& launch_;
  Cluster& c_;
  const int f_;
  int stage_ = 0;  // waited for last
};

// mixer_kernel of mixer_kernel.cuh.
template <class Value, int kKernel, int kWidth>
void kernel(Launch& launch, int fiber) {
  Cluster& c = launch.cluster;
  Machine machine(launch, fiber);
  if (machine.thread() == 0) {
    for (int i = 0; i < hopper::kBarriers; ++i) {
      const bool own =
          launch.damage == Damage::kOwnRelease || (launch.damage == Damage::kOwnEmpty && machine.rank() == 1);
      const bool halved = own && i >= hopper::kStages && i < 2 * hopper::kStages;
      c.blocks[machine.rank()].barriers[i].init(hopper::arrivals(i, launch.shape.product) / (halved ? 2 : 1),
                                                c.now(fiber));
    }
  }
  if (launch.damage != Damage::kStartApart) c.sync_cluster(fiber);
  if (machine.warp() < hopper::kProductWarps) {
    hopper::product_role<Value>(machine, launch.shape, launch.arguments);
  } else {
    hopper::depthwise_role<Value, kKernel, kWidth>(machine, launch.shape, launch.arguments);
  }
  c.sync_warp(fiber);
  if (launch.damage != Damage::kEndApart) c.sync_cluster(fiber);
  c.leave(fiber);
}

}  // namespace hopper_test
