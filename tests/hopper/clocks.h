// Who knows of whom (vector clocks), and who last touched every word of a block's shared memory: two accesses of which
// one writes and neither happened before the other are a race, whichever came first in this run (FastTrack, Flanagan
// and Freund 2009).
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../csrc/cuda/mixer_shape.h"

namespace hopper_test {

namespace hopper = spin::hopper;

constexpr int kBlocks = hopper::kCluster, kBlockThreads = hopper::kThreads, kProductWarps = hopper::kProductWarps;
constexpr int kDataBytes = hopper::kBarriersAt;  // shared memory that is not barriers
constexpr int kLine = 128, kLineWords = kLine / 4;

// Whose time is counted: every thread; the tensor cores' reading for every product warp; copies in flight, which take
// turns in slots.
constexpr int kSlots = 112;
constexpr int kFirstProducts = kBlocks * kBlockThreads, kFirstSlot = kFirstProducts + kBlocks * kProductWarps;
constexpr int kEntities = kFirstSlot + kSlots;
constexpr int kLastTime = 32000;

struct Clock {
  alignas(64) int16_t at[kEntities];

  void clear() { std::fill(at, at + kEntities, int16_t(0)); }
  void join(const Clock& other) {
    int16_t* __restrict mine = at;
    const int16_t* __restrict theirs = other.at;
    for (int i = 0; i < kEntities; ++i) mine[i] = mine[i] > theirs[i] ? mine[i] : theirs[i];
  }
};

// An entity at a time of its own; time 0: nobody, never.
struct Epoch {
  int16_t entity = 0, time = 0;

  bool before(const Clock& clock) const { return time <= clock.at[entity]; }
  explicit operator bool() const { return time != 0; }
};

// When threads ran fence.proxy.async. Tensor cores and copy engine (the asynchronous proxy) come after what a thread
// has read or written itself if it ran one in between, before it told anybody ("Async proxy", PTX ISA).
struct Fences {
  std::vector<int16_t> times[kFirstProducts];

  void clear() {
    for (auto& of_thread : times) of_thread.clear();
  }
  bool between(Epoch access, const Clock& known) const {
    if (access.entity >= kFirstProducts) return true;
    for (const int16_t time : times[access.entity]) {
      if (access.time <= time && time < known.at[access.entity]) return true;
    }
    return false;
  }
};

class Shadow {
 public:
  enum Kind { kNone, kUninitialised, kRead, kWrite, kProxy };
  struct Conflict {  // with what this one does
    Kind kind = kNone;
    Epoch other;
  };

  void reset() {
    words_.assign(kDataBytes / 4, {});
    lines_.assign(kDataBytes / kLine, {});
    more_.clear();
  }

  Conflict read(int at, Epoch by, const Clock& clock) {
    Word& word = words_[at / 4];
    if (!word.write) return {kUninitialised, {}};
    if (!word.write.before(clock)) return {kWrite, word.write};
    // A read that this one follows needs no record: who comes after this one comes after it, too.
    for (Epoch& other : word.reads) {
      if (!other || other.entity == by.entity || other.before(clock)) return other = by, Conflict{};
    }
    more_.push_back({at / 4, by});
    return {};
  }

  Conflict write(int at, Epoch by, const Clock& clock) {
    Line& line = lines_[at / kLine];
    line.whole = false;
    const Conflict conflict = overwrite(words_[at / 4], at / 4, by, clock, nullptr);
    return conflict.kind ? conflict : products_before(line, clock);
  }
  Conflict write_line(int at, Epoch by, const Clock& clock) {
    Line& line = lines_[at / kLine];
    line.whole = true, line.write = by;
    for (int i = at / 4; i < at / 4 + kLineWords; ++i) {
      if (const Conflict conflict = overwrite(words_[i], i, by, clock, fences); conflict.kind) return conflict;
    }
    return products_before(line, clock);
  }

  // Tensor cores read on behalf of a whole warp, from now until `time` of its products; all lanes must know of what was
  // written. What nobody wrote may be read, its products are not to be used. A line is recorded as a whole.
  template <class Lanes>
  Conflict read_by_products(int at, int warp, int16_t time, const Lanes& known, const Clock& clock) {
    Line& line = lines_[at / kLine];
    line.products[warp] = time;
    if (line.whole) return known(line.write) ? Conflict{} : Conflict{kWrite, line.write};
    for (int i = at / kLine * kLineWords; i < (at / kLine + 1) * kLineWords; ++i) {
      if (!words_[i].write) continue;
      if (!known(words_[i].write)) return {kWrite, words_[i].write};
      if (!fences->between(words_[i].write, clock)) return {kProxy, words_[i].write};
    }
    return {};
  }

  int block = 0;  // which one this is
  const Fences* fences = nullptr;

 private:
  struct Word {
    Epoch write, reads[4];
  };
  struct Line {
    Epoch write;
    bool whole = false;  // all its words were last written together
    int16_t products[kProductWarps] = {};
  };
  struct More {  // the fifth and later readers of a word
    int word;
    Epoch by;
  };

  // With `proxy` from the asynchronous proxy.
  Conflict overwrite(Word& word, int index, Epoch by, const Clock& clock, const Fences* proxy) {
    if (!word.write.before(clock)) return {kWrite, word.write};
    if (proxy && word.write && !proxy->between(word.write, clock)) return {kProxy, word.write};
    for (Epoch& read : word.reads) {
      if (!read.before(clock)) return {kRead, read};
      if (proxy && read && !proxy->between(read, clock)) return {kProxy, read};
      read = {};
    }
    if (!more_.empty()) {
      for (const More& more : more_) {
        if (more.word == index && !more.by.before(clock)) return {kRead, more.by};
      }
      std::erase_if(more_, [&](const More& more) { return more.word == index; });
    }
    word.write = by;
    return {};
  }
  Conflict products_before(const Line& line, const Clock& clock) const {
    for (int warp = 0; warp < kProductWarps; ++warp) {
      const Epoch read{int16_t(kFirstProducts + block * kProductWarps + warp), line.products[warp]};
      if (!read.before(clock)) return {kRead, read};
    }
    return {};
  }

  std::vector<Word> words_;
  std::vector<Line> lines_;
  std::vector<More> more_;
};

}  // namespace hopper_test
