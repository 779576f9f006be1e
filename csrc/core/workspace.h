// Scratch memory that survives between calls, because asking the system for tens of megabytes costs a page
// fault per 4 KB, every time: more than the work of a small network.
#pragma once
#include <cstdint>

namespace spin {

// Asks for huge pages behind large memory that is about to be written: fewer page faults and TLB misses
// (about 1 % of a network whose weights stream from memory).
void advise_huge_pages(char* data, int64_t bytes);

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
