// Global memory: the tensors a launch may touch, and what tensor maps make of them.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "fibers.h"

namespace hopper_test {

class GlobalMemory {
 public:
  explicit GlobalMemory(Fibers& fibers) : fibers_(fibers) {}

  void reset() { tensors_.clear(), written_.clear(); }
  void add(const char* name, const void* begin, int64_t items, int item_bytes) {
    if (begin) tensors_.push_back({name, static_cast<const char*>(begin), items * item_bytes, item_bytes});
  }
  void add_output(const char* name, const void* begin, int64_t items, int item_bytes) {
    add(name, begin, items, item_bytes);
    written_.assign(items, false);
  }

  template <class T>
  T load(const void* p, int item_bytes) {
    touch(p, sizeof(T), item_bytes, "load");
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }

  // Two neighbouring values of the output, which nobody may have written before.
  void store_two(uint16_t* p, uint32_t bits) {
    const Tensor& tensor = touch(p, sizeof bits, 2, "store");
    if (&tensor != &tensors_.back()) fibers_.fail("a store to %s", tensor.name);
    const int64_t first = (reinterpret_cast<const char*>(p) - tensor.begin) / 2;
    for (int64_t i = first; i < first + 2; ++i) {
      if (written_[i]) fibers_.fail("value %lld of %s is written twice", static_cast<long long>(i), tensor.name);
      written_[i] = true;
    }
    std::memcpy(p, &bits, sizeof bits);
  }

  // The first value of the output that is not written, -1: all are.
  int64_t first_unwritten() const {
    for (size_t i = 0; i < written_.size(); ++i) {
      if (!written_[i]) return int64_t(i);
    }
    return -1;
  }

 private:
  struct Tensor {
    const char* name;
    const char* begin;
    int64_t bytes;
    int item;
  };

  const Tensor& touch(const void* p, int bytes, int item_bytes, const char* what) {
    const char* at = static_cast<const char*>(p);
    for (const Tensor& tensor : tensors_) {
      if (at < tensor.begin || at >= tensor.begin + tensor.bytes) continue;
      if (at + bytes > tensor.begin + tensor.bytes) fibers_.fail("a %s runs over the end of %s", what, tensor.name);
      if (tensor.item != item_bytes) fibers_.fail("a %s of items of %d bytes from %s", what, item_bytes, tensor.name);
      if (uintptr_t(at) % bytes) fibers_.fail("a %s of %d bytes from %s is not aligned", what, bytes, tensor.name);
      return tensor;
    }
    fibers_.fail("a %s outside all tensors (null: %d)", what, p == nullptr);
    return tensors_.front();
  }

  Fibers& fibers_;
  std::vector<Tensor> tensors_;  // the output is the last
  std::vector<bool> written_;
};

// A tiled tensor map of 2-byte values (cuTensorMapEncodeTiled): dimensions from the innermost one, no gaps, no element
// strides, SWIZZLE_128B, zeros beyond the bounds.
struct TensorMap {
  static constexpr int kMaxRank = 4;
  const char* name = "";
  const uint16_t* base = nullptr;
  int rank = 0;
  int64_t dims[kMaxRank] = {};
  int box[kMaxRank] = {};

  // What the driver would refuse.
  std::string refused() const {
    if (uintptr_t(base) % 16) return "the address is not a multiple of 16";
    int64_t stride = 2;
    for (int i = 0; i < rank; ++i) {
      if (dims[i] < 1 || dims[i] > int64_t(1) << 32) return "a dimension";
      if (box[i] < 1 || box[i] > 256) return "a box of more than 256";
      if (i > 0 && stride % 16) return "a stride is not a multiple of 16 bytes";
      stride *= dims[i];
    }
    if (box[0] * 2 > 128) return "rows of the box are longer than the swizzle";
    if (box[0] * 2 % 16) return "rows of the box are not a multiple of 16 bytes";
    return "";
  }

  int lines() const {
    int product = 1;
    for (int i = 1; i < rank; ++i) product *= box[i];
    return product;
  }

  // Row `line` of the box whose first element is at `start`, in the order in which the box is written.
  void fetch(const int (&start)[kMaxRank], int line, uint16_t* to) const {
    int64_t offset = 0, stride = dims[0];
    bool inside = true;
    for (int i = 1; i < rank; ++i) {
      const int64_t at = start[i] + line % box[i];
      line /= box[i];
      inside = inside && at >= 0 && at < dims[i];
      offset += at * stride;
      stride *= dims[i];
    }
    for (int x = 0; x < box[0]; ++x) {
      const int64_t at = int64_t(start[0]) + x;
      to[x] = inside && at >= 0 && at < dims[0] ? base[offset + at] : 0;
    }
  }
};

}  // namespace hopper_test
