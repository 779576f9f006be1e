// Scratch memory that survives between calls, because asking the system for tens of megabytes costs a page
// fault per 4 KB, every time: more than the work of a small network.
#pragma once
#include <cstdint>

namespace spin {

class Workspace {
 public:
  // At least `bytes`, 64-byte aligned, contents undefined. Throws std::bad_alloc.
  explicit Workspace(int64_t bytes);
  ~Workspace();  // goes back to the pool, or to the system when the pool holds enough
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return data_; }

  // Frees what the pool holds; returns the bytes.
  static int64_t release_pool();

 private:
  char* data_;
  int64_t capacity_;
};

}  // namespace spin
