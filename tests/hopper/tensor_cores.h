// wgmma.m64n128k16 of one warp: its quarter of a warpgroup's products. They are computed when the warp waits for them,
// from what shared memory holds then; the hardware may read at any time from the issue on, so that all this while the
// detector has the operands as being read. The sums are NaN to the program until then.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace hopper_test {

// Of a K-major operand with the 128-byte swizzle: rows of 128 bytes, eight to a pattern, patterns `stride` bytes apart.
struct Operand {
  int64_t address = 0, stride = 0;

  // The matrix descriptor's fields as the PTX ISA lists them ("Matrix Descriptor Format"). Empty: fine.
  std::string decode(uint64_t descriptor) {
    const int mode = int(descriptor >> 62), offset = int(descriptor >> 49 & 7);
    constexpr uint64_t kUnused = 0x3fful << 52 | 7ul << 46 | 3ul << 30 | 3ul << 14;
    address = int64_t(descriptor & 0x3fff) << 4;
    stride = int64_t(descriptor >> 32 & 0x3fff) << 4;
    if (mode != 1) return "not the 128-byte swizzle";
    if (offset != 0) return "a base offset, of patterns that begin at multiples of 1024";
    if (descriptor & kUnused) return "unused bits";
    return "";
  }
  // Where 16 bytes of a row are before the swizzle, which works on bits of the address.
  int64_t line(int row) const { return address + row / 8 * stride + row % 8 * 128; }
  static int64_t swizzle(int64_t address) { return address ^ (address >> 7 & 7) << 4; }
};

struct Product {
  uint64_t a, b;  // descriptors
  int half;       // of the sums
  bool accumulate;

  bool operator==(const Product&) const = default;
};

class TensorCores {
 public:
  static constexpr int kRows = 64, kColumns = 128, kDepth = 16, kSums = 128;
  using Group = std::vector<Product>;
  static inline std::array<float, 65536> decoded;  // what two bytes mean

  void reset(Block* block, int warp) {
    block_ = block, warp_ = warp;
    open_.clear(), groups_.clear();
    committed_ = retired_ = 0;
    fenced_ = in_flight_ = false;
  }

  // What is wrong, if anything, of each; all by the last lane of a warp for all of them.

  void fence() { fenced_ = true; }

  template <class Known>
  std::string issue(const Product& product, float* const (&lanes)[32], const Known& known, const Clock& clock,
                    Shadow::Conflict* conflict, int* where) {
    if (!fenced_) return "products without a wgmma.fence after the sums were in use";
    if (!in_flight_) {
      in_flight_ = true;
      std::memcpy(lanes_, lanes, sizeof lanes_);
      exchange([](float& sum, float& value) { sum = value, value = poison(); });
    } else if (std::memcmp(lanes_, lanes, sizeof lanes_) != 0) {
      return "products of other sums while some are in flight";
    }
    Operand operands[2];
    for (int i = 0; i < 2; ++i) {
      const std::string wrong = operands[i].decode(i ? product.b : product.a);
      if (!wrong.empty()) return std::string("a descriptor of ") + (i ? "b: " : "a: ") + wrong;
      for (int row = 0; row < (i ? kColumns : kRows); ++row) {
        const int64_t address = operands[i].line(row);
        const int at = block_->offset(Operand::swizzle(address) & ~int64_t(kLine - 1), kLine);
        if (at < 0 || address % kLine + kDepth * 2 > kLine) return "an operand beyond its line or the block's memory";
        *conflict = block_->shadow.read_by_products(at, warp_, int16_t(committed_ + 1), known, clock);
        *where = at;
        if (conflict->kind) return "";
      }
    }
    open_.push_back(product);
    return "";
  }

  std::string commit() {
    if (++committed_ > kLastTime) return "too many groups for the detector";
    groups_.push_back(std::move(open_));
    open_.clear();
    return "";
  }
  const Group& last() const { return groups_.back(); }

  // Until `left` groups are in flight; the groups before are known to be over.
  std::string wait(int left) {
    if (!open_.empty()) return "waits for products that were not committed";
    while (int(groups_.size()) > left) {
      for (const Product& product : groups_.front()) multiply(product);
      groups_.pop_front();
      ++retired_;
    }
    bool touched = false;
    if (groups_.empty() && in_flight_) {
      in_flight_ = fenced_ = false;
      exchange([&](float& sum, float& value) { touched = touched || !is_poison(value), value = sum; });
    }
    return touched ? "the sums were written to while products were in flight" : "";
  }
  int16_t retired() const { return int16_t(retired_); }
  bool idle() const { return open_.empty() && groups_.empty() && !in_flight_; }

 private:
  static float poison() { return __builtin_nanf("0x2bad"); }
  static bool is_poison(float value) {
    const float other = poison();
    return std::memcmp(&value, &other, sizeof value) == 0;
  }

  // The accumulator fragment ("Register Fragments for wgmma.mma_async.m64nNk16"): thread t of a warp has rows t / 4 and
  // t / 4 + 8 of the warp's 16, pairs of columns 2 (t % 4) and so on of every 8.
  template <class Body>
  void exchange(const Body& body) {
    for (int lane = 0; lane < 32; ++lane) {
      int i = 0;
      for (int half = 0; half < kSums / (kColumns / 2); ++half) {
        for (int eight = 0; eight < kColumns; eight += 8) {
          for (int row = lane / 4; row < 16; row += 8) {
            for (int pair = 0; pair < 2; ++pair, ++i) {
              body(sums_[row][half * kColumns + eight + 2 * (lane % 4) + pair], lanes_[lane][i]);
            }
          }
        }
      }
    }
  }

  void read(const Operand& operand, int row, float (&values)[kDepth]) const {
    for (int chunk = 0; chunk < kDepth; chunk += 8) {
      const int at = block_->offset(Operand::swizzle(operand.line(row) + 2 * chunk), 16);
      uint16_t bits[8];
      std::memcpy(bits, block_->memory.data() + at, sizeof bits);
      for (int i = 0; i < 8; ++i) values[chunk + i] = decoded[bits[i]];
    }
  }

  void multiply(const Product& product) {
    Operand a, b;
    a.decode(product.a), b.decode(product.b);
    alignas(64) static float columns[kDepth][kColumns];
    for (int column = 0; column < kColumns; ++column) {
      float values[kDepth];
      read(b, column, values);
      for (int k = 0; k < kDepth; ++k) columns[k][column] = values[k];
    }
    for (int row = 0; row < 16; ++row) {
      float values[kDepth];
      read(a, warp_ % 4 * 16 + row, values);
      float* __restrict sums = sums_[row] + product.half * kColumns;
      if (!product.accumulate) std::memset(sums, 0, kColumns * sizeof(float));
      for (int k = 0; k < kDepth; k += 4) {
        const float *c0 = columns[k], *c1 = columns[k + 1], *c2 = columns[k + 2], *c3 = columns[k + 3];
        const float v0 = values[k], v1 = values[k + 1], v2 = values[k + 2], v3 = values[k + 3];
        for (int i = 0; i < kColumns; ++i) sums[i] += (v0 * c0[i] + v1 * c1[i]) + (v2 * c2[i] + v3 * c3[i]);
      }
    }
  }

  Block* block_ = nullptr;
  int warp_ = 0, committed_ = 0, retired_ = 0;
  bool fenced_ = false, in_flight_ = false;
  Group open_;
  std::deque<Group> groups_;
  float* lanes_[32];
  alignas(64) float sums_[16][2 * kColumns];
};

}  // namespace hopper_test
