#include "workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "types.h"

namespace spin {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kPooledBytes = 512 << 20;  // the pool never keeps more

struct Block {
  char* data;
  int64_t capacity;
};

// Never destroyed: other threads may still be in a call while the process ends.
struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  int64_t bytes = 0;
};
Pool& pool() {
  static Pool* pool = new Pool;
  return *pool;
}

Block allocate(int64_t bytes) {
  const int64_t capacity = round_up(bytes, bytes < kHugePage ? 4096 : kHugePage);
  void* data = std::aligned_alloc(bytes < kHugePage ? 4096 : kHugePage, capacity);
  if (!data) throw std::bad_alloc();
  advise_huge_pages(static_cast<char*>(data), capacity);
  return {static_cast<char*>(data), capacity};
}

}  // namespace

void advise_huge_pages(char* data, int64_t bytes) {
#if defined(__linux__)
  const int64_t begin = round_up(reinterpret_cast<intptr_t>(data), kHugePage);
  const int64_t end = (reinterpret_cast<intptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Workspace::Workspace(int64_t bytes) {
  if (bytes < 1) bytes = 1;
  Block outgrown{};
  {
    Pool& p = pool();
    std::lock_guard lock(p.mutex);
    auto take = [&](size_t i) {
      const Block block = p.blocks[i];
      p.bytes -= block.capacity;
      p.blocks.erase(p.blocks.begin() + i);
      return block;
    };
    // The smallest that fits; without one, the largest makes way: the pool grows to what calls need, not to the sum.
    size_t fitting = p.blocks.size(), largest = p.blocks.size();
    for (size_t i = 0; i < p.blocks.size(); ++i) {
      const int64_t capacity = p.blocks[i].capacity;
      if (capacity >= bytes) {
        if (fitting == p.blocks.size() || capacity < p.blocks[fitting].capacity) fitting = i;
      } else if (largest == p.blocks.size() || capacity > p.blocks[largest].capacity) {
        largest = i;
      }
    }
    if (fitting < p.blocks.size()) {
      const Block block = take(fitting);
      data_ = block.data, capacity_ = block.capacity;
      return;
    }
    if (largest < p.blocks.size()) outgrown = take(largest);
  }
  std::free(outgrown.data);
  const Block block = allocate(bytes);
  data_ = block.data, capacity_ = block.capacity;
}

Workspace::~Workspace() {
  std::vector<Block> dropped;
  {
    Pool& p = pool();
    std::lock_guard lock(p.mutex);
    p.blocks.push_back({data_, capacity_});
    p.bytes += capacity_;
    while (p.bytes > kPooledBytes) {  // the oldest first
      dropped.push_back(p.blocks.front());
      p.bytes -= p.blocks.front().capacity;
      p.blocks.erase(p.blocks.begin());
    }
  }
  for (const Block& block : dropped) std::free(block.data);
}

int64_t Workspace::release_pool() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  for (const Block& block : p.blocks) std::free(block.data);
  p.blocks.clear();
  return std::exchange(p.bytes, 0);
}

}  // namespace spin
