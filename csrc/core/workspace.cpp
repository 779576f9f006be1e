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
  {
    Pool& p = pool();
    std::lock_guard lock(p.mutex);
    size_t best = p.blocks.size();
    for (size_t i = 0; i < p.blocks.size(); ++i) {
      if (p.blocks[i].capacity < bytes) continue;
      if (best == p.blocks.size() || p.blocks[i].capacity < p.blocks[best].capacity) best = i;
    }
    if (best < p.blocks.size()) {
      data_ = p.blocks[best].data;
      capacity_ = p.blocks[best].capacity;
      p.bytes -= capacity_;
      p.blocks.erase(p.blocks.begin() + best);
      return;
    }
  }
  const Block block = allocate(bytes);
  data_ = block.data;
  capacity_ = block.capacity;
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
