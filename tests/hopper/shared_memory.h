// A block's shared memory: bytes, what is known of every word, and the barriers in it, as the PTX ISA has them.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "clocks.h"
#include "fibers.h"

namespace hopper_test {

// An mbarrier. A phase is over when all arrivals are in and all bytes expected have come; bytes may come before they
// are expected, the count of them is then negative.
struct Barrier {
  static constexpr int64_t kMostBytes = (1 << 20) - 1;
  int count = 0, pending = 0, phase = 0;  // count 0: not initialised
  int64_t bytes = 0;
  Clock arriving, done;  // who arrived knew this, in this phase and in the one before
  Epoch made;            // when it was initialised: who uses it must know
  std::vector<int> waiting;

  void init(int arrivals, Epoch by) {
    count = pending = arrivals, made = by;
    phase = 0, bytes = 0;
    arriving.clear(), done.clear();
  }
  // Of the phase before the current one, whose parity this must be.
  bool over(int parity) const { return (phase & 1) != parity; }
  bool complete() {
    if (pending || bytes) return false;
    ++phase, pending = count;
    done = arriving;
    arriving.clear();
    return true;
  }
};

inline std::string barrier_name(int i) {
  const int stages = hopper::kStages;
  if (i < stages) return "full[" + std::to_string(i) + "]";
  if (i < 2 * stages) return "empty[" + std::to_string(i - stages) + "]";
  return i == hopper::kPlanesFull ? "planes full" : "planes empty";
}

inline std::string place_name(int at) {
  char text[96];
  if (const int stage = at / hopper::kStageBytes; stage < hopper::kStages) {
    const int rest = at % hopper::kStageBytes, line = rest / kLine;
    const bool matrix = rest < hopper::kMatrixBytes;
    std::snprintf(text, sizeof text, "stage %d's %s, line %d, byte %d", stage, matrix ? "matrix" : "tokens",
                  matrix ? line : line - hopper::kMatrixBytes / kLine, rest % kLine);
  } else {
    const int rest = at - hopper::kPlanesAt;
    std::snprintf(text, sizeof text, "planes' panel %d, place %d, byte %d", rest / hopper::kPanelBytes,
                  rest % hopper::kPanelBytes / kLine, rest % kLine);
  }
  return text;
}

struct NamedBarrier {
  int arrived = 0, threads = 0;
  Clock clock;
  std::vector<int> waiting;
};

struct Block {
  uint32_t base = 0;  // where shared memory begins for the program, a multiple of 1024
  std::vector<uint8_t> memory;
  Shadow shadow;
  Barrier barriers[hopper::kBarriers];
  NamedBarrier named[16];
  int running = 0;    // threads
  Clock used, ended;  // the last of everybody's operations on its barriers, and what the threads knew when they ended

  void reset(int index, uint32_t at) {
    base = at;
    memory.assign(kDataBytes, 0xff);  // NaN of either type
    shadow.block = index;
    shadow.reset();
    for (Barrier& barrier : barriers) barrier.count = 0, barrier.waiting.clear();
    for (NamedBarrier& barrier : named) barrier.arrived = 0, barrier.waiting.clear();
    running = kBlockThreads;
    used.clear(), ended.clear();
  }

  // Of `address` and as many bytes, all data; -1 if they are not.
  int offset(int64_t address, int bytes) const {
    const int64_t at = address - base;
    return at >= 0 && at + bytes <= kDataBytes ? int(at) : -1;
  }
};

}  // namespace hopper_test
