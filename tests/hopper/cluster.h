// Two blocks of a cluster: their threads, memories, barriers, tensor cores and the copy engine between them, with the
// clock of every thread. What the machine of emulator.h does to them is one function each.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "global_memory.h"
#include "tensor_cores.h"

namespace hopper_test {

class Cluster {
 public:
  Fibers fibers;
  GlobalMemory global{fibers};
  Block blocks[kBlocks];
  std::vector<Clock> clocks = std::vector<Clock>(Fibers::kCount);
  TensorCores products[kBlocks * kProductWarps];

  // What all 32 lanes of a warp must do together, with the same numbers.
  struct Call {
    const char* name;
    bool aligned;  // as PTX has it: the warp has converged before
    int a = 0, b = 0, c = 0;

    bool operator==(const Call& other) const {
      return std::strcmp(name, other.name) == 0 && a == other.a && b == other.b && c == other.c;
    }
  };

  void reset(uint64_t seed, void (*body)(void*, int), void* context) {
    fibers.reset(seed, body, context);
    // Dynamic shared memory begins at some multiple of the pattern, after what the system has.
    const int room = (233472 - hopper::kSharedBytes) / 1024;
    const uint32_t base = 1024 * (1 + fibers.random.below(room));
    for (int i = 0; i < kBlocks; ++i) blocks[i].reset(i, base), blocks[i].shadow.fences = &fences_;
    fences_.clear();
    for (int f = 0; f < Fibers::kCount; ++f) clocks[f].clear(), clocks[f].at[f] = 1;
    for (int w = 0; w < kBlocks * kProductWarps; ++w) {
      products[w].reset(&blocks[w / kProductWarps], w % kProductWarps);
    }
    for (auto& log : issued_) log.clear();
    for (Warp& warp : warps_) warp = {};
    for (Slot& slot : slots_) slot = {};
    events_.clear();
    everyone_ = {};
    everyone_.clock.clear();
    // From copies that come at once to copies that come when nobody can go on without them.
    constexpr int kChances[] = {128, 16, 1, 0};
    deliver_ = kChances[fibers.random.below(4)];
  }

  // All threads, to the end or to the first failure.
  void run() {
    fibers.run([this](bool ready) {
      if (events_.empty() || (ready && fibers.random.below(256) >= deliver_)) return false;
      deliver(fibers.random.below(int(events_.size())));
      return true;
    });
    if (fibers.failure().empty()) check_end();
  }

  int block_of(int f) const { return f / kBlockThreads; }
  Epoch now(int f) const { return {int16_t(f), clocks[f].at[f]}; }
  void tick(int f) {
    if (++clocks[f].at[f] > kLastTime) fibers.fail("too many steps of a thread for the detector");
  }
  void waited(int f) { ++warps_[f / 32].waits[f % 32]; }
  bool converged(int f) const {
    const Warp& warp = warps_[f / 32];
    for (int waits : warp.waits) {
      if (waits != warp.waits[0]) return false;
    }
    return true;
  }

  // ---- threads of a warp, of a block, of the cluster ----

  // Blocks until all lanes are there; `work` is done by the last for all of them.
  template <class Work>
  void together(int f, const Call& call, const Work& work) {
    Warp& warp = warps_[f / 32];
    if (warp.arrived == 0) warp.call = call;
    if (!(warp.call == call)) {
      fibers.fail("lanes of warp %d of block %d part: %s(%d, %d, %d) and %s(%d, %d, %d)", f / 32 % (kBlockThreads / 32),
                  block_of(f), warp.call.name, warp.call.a, warp.call.b, warp.call.c, call.name, call.a, call.b,
                  call.c);
    }
    if (++warp.arrived < 32) return fibers.block({call.name});
    warp.arrived = 0;
    if (call.aligned && !converged(f)) {
      fibers.fail("%s of warp %d of block %d is .aligned, but some lanes waited or copied alone since they last met",
                  call.name, f / 32 % (kBlockThreads / 32), block_of(f));
    }
    work();
    for (int lane = f / 32 * 32; lane < f / 32 * 32 + 32; ++lane) {
      if (lane != f) fibers.wake(lane);
    }
  }

  void sync_warp(int f) {
    together(f, {"sync_warp", false}, [&] {
      static Clock all;
      const int first = f / 32 * 32;
      all = clocks[first];
      for (int lane = first + 1; lane < first + 32; ++lane) all.join(clocks[lane]);
      for (int lane = first; lane < first + 32; ++lane) clocks[lane] = all, tick(lane);
      for (int& waits : warps_[f / 32].waits) waits = 0;
    });
  }

  void sync_named(int f, int id, int threads) {
    together(f, {"bar.sync", true, id, threads}, [] {});
    if (id < 0 || id > 15 || threads % 32) fibers.fail("bar.sync %d, %d", id, threads);
    sync(f, blocks[block_of(f)].named[id], threads, {"waits at named barrier %d for %d threads", id, threads});
  }
  void sync_cluster(int f) {
    together(f, {"barrier.cluster", true}, [] {});
    // It releases what the threads did before, arrivals elsewhere among it; not copies, which are not the threads'.
    if (everyone_.arrived == Fibers::kCount - 1) {
      for (size_t i = events_.size(); i-- > 0;) {
        if (!events_[i]->map) deliver(int(i));
      }
    }
    sync(f, everyone_, Fibers::kCount, {"waits for the cluster"});
  }

  // ---- barriers ----

  void one_of(int barrier) {
    if (barrier < 0 || barrier >= hopper::kBarriers) fibers.fail("there is no barrier %d", barrier);
  }
  // Of a block, used by an entity that knows what `clock` does.
  Barrier& barrier(int block, int i, int entity, const Clock& clock) {
    one_of(i);
    Barrier& b = blocks[block].barriers[i];
    if (!b.count || !b.made.before(clock)) {
      fibers.fail("%s uses %s of block %d and may come before it is initialised", entity_name(entity).c_str(),
                  barrier_name(i).c_str(), block);
    }
    int16_t& used = blocks[block].used.at[entity];
    used = std::max(used, clock.at[entity]);
    return b;
  }

  void arrive(int block, int i, int f, const Clock& clock, int64_t expected = 0) {
    Barrier& b = barrier(block, i, f, clock);
    if (b.pending == 0) fibers.fail("more than %d arrivals at %s of block %d", b.count, barrier_name(i).c_str(), block);
    b.arriving.join(clock);
    count_bytes(block, i, expected);
    --b.pending;
    complete(b);
  }
  // Elsewhere, some time later.
  void arrive_later(int block, int i, int f) {
    one_of(i);
    auto event = std::make_unique<Event>();
    event->block = block, event->barrier = i, event->fiber = f, event->clock = clocks[f];
    events_.push_back(std::move(event));
  }

  // ---- copies ----

  void copy(int f, const TensorMap& map, int to, int i, std::vector<int> start, int only, const char* what) {
    const int64_t bytes = int64_t(map.lines()) * kLine;
    one_of(i);
    if (int(start.size()) != map.rank) fibers.fail("%d coordinates of %s", int(start.size()), map.name);
    if (map.box[0] * 2 != kLine) fibers.fail("a box of %s with short rows", map.name);
    start.resize(TensorMap::kMaxRank);
    for (int block = 0; block < kBlocks; ++block) {
      if (only >= 0 && block != only) continue;
      if (to % kLine || blocks[block].offset(int64_t(blocks[block].base) + to, int(bytes)) < 0) {
        fibers.fail("a box of %s is not aligned or does not fit at %d", map.name, to);
      }
      // Every block's comes on its own, in one piece or several.
      for (int line = 0; line < map.lines();) {
        const int left = map.lines() - line, lines = fibers.random.below(2) ? left : 1 + fibers.random.below(left);
        const int slot = take_slot(f, what, i);
        auto event = std::make_unique<Event>();
        event->map = &map, event->block = block, event->barrier = i, event->to = to, event->slot = slot;
        event->first = line, event->end = line + lines, event->clock = clocks[f];
        event->clock.at[kFirstSlot + slot] = slots_[slot].time;
        std::copy(start.begin(), start.end(), event->start);
        events_.push_back(std::move(event));
        line += lines;
      }
    }
    tick(f);
  }

  void fence_copies(int f) {
    fences_.times[f].push_back(clocks[f].at[f]);
    tick(f);
  }

  // ---- tensor cores ----

  void issue(int f, const Product& product, float* const (&lanes)[32]) {
    Epoch seen;
    const Clock* known = &clocks[f / 32 * 32];
    Shadow::Conflict conflict;
    int where = 0;
    const std::string wrong = cores(f).issue(
        product, lanes,
        [&](Epoch write) {
          if (write.entity == seen.entity && write.time == seen.time) return true;
          for (int lane = 0; lane < 32; ++lane) {
            if (!write.before(known[lane])) return false;
          }
          seen = write;
          return true;
        },
        *known, &conflict, &where);
    if (!wrong.empty()) fibers.fail("%s: %s", entity_name(products_of(f)).c_str(), wrong.c_str());
    check(block_of(f), where, conflict, products_of(f), "reads");
  }
  void commit(int f) {
    if (const std::string wrong = cores(f).commit(); !wrong.empty()) fibers.fail("%s", wrong.c_str());
    // Four warps make a warpgroup: all must issue the same.
    const int warp = products_of(f) - kFirstProducts;
    auto& log = issued_[warp / 4];
    const size_t group = ++warps_[f / 32].groups;
    if (group > log.size()) return log.push_back(cores(f).last());
    if (log[group - 1] != cores(f).last()) fibers.fail("warps of a warpgroup issue different products");
  }
  void wait_products(int f, int left) {
    if (const std::string wrong = cores(f).wait(left); !wrong.empty()) {
      fibers.fail("%s: %s", entity_name(products_of(f)).c_str(), wrong.c_str());
    }
    for (int lane = f / 32 * 32; lane < f / 32 * 32 + 32; ++lane) {
      clocks[lane].at[products_of(f)] = cores(f).retired();
    }
  }
  TensorCores& cores(int f) { return products[products_of(f) - kFirstProducts]; }

  // ---- data in shared memory, by threads ----

  uint8_t* word(int f, int at, int bytes) {
    if (at < 0 || at + bytes > kDataBytes || at % bytes) {
      fibers.fail("%s: %d bytes at %d of shared memory", entity_name(f).c_str(), bytes, at);
    }
    return blocks[block_of(f)].memory.data() + at;
  }
  uint32_t load(int f, int at) {
    uint32_t bits;
    std::memcpy(&bits, word(f, at, sizeof bits), sizeof bits);
    check(block_of(f), at, blocks[block_of(f)].shadow.read(at, now(f), clocks[f]), f, "reads");
    return bits;
  }
  void store(int f, int at, const void* values, int bytes) {
    std::memcpy(word(f, at, bytes), values, bytes);
    for (int i = at; i < at + bytes; i += 4) {
      check(block_of(f), i, blocks[block_of(f)].shadow.write(i, now(f), clocks[f]), f, "writes");
    }
  }

  // A block is left when its last thread ends: nothing may come to it afterwards, nor have come by luck before.
  void leave(int f) {
    if (f % kBlockThreads / 32 < kProductWarps && !cores(f).idle()) {
      fibers.fail("%s are not waited for", entity_name(products_of(f)).c_str());
    }
    Block& block = blocks[block_of(f)];
    block.ended.join(clocks[f]);
    if (--block.running) return;
    for (int entity = 0; entity < kEntities; ++entity) {
      if (block.used.at[entity] <= block.ended.at[entity]) continue;
      fibers.fail("%s comes to block %d, which may have ended", entity_name(entity).c_str(), block_of(f));
    }
  }

 private:
  struct Warp {
    int arrived = 0, waits[32] = {};  // what lanes waited for or copied, each, since they last met
    size_t groups = 0;
    Call call{"", false};
  };
  struct Slot {
    bool flying = false;
    int16_t time = 0;
    const char* what = "";
    int issuer = 0, barrier = 0;
  };
  struct Event {  // an arrival elsewhere, or with a map a piece of a box
    const TensorMap* map = nullptr;
    int block, barrier, fiber = 0;
    int start[TensorMap::kMaxRank], to, slot, first, end;
    Clock clock;
  };

  int products_of(int f) const { return kFirstProducts + block_of(f) * kProductWarps + f % kBlockThreads / 32; }

  std::string entity_name(int entity) const {
    char text[128];
    if (entity < kFirstProducts) {
      const int thread = entity % kBlockThreads;
      std::snprintf(text, sizeof text, "thread %d (warp %d, lane %d) of block %d", thread, thread / 32, thread % 32,
                    entity / kBlockThreads);
    } else if (entity < kFirstSlot) {
      const int warp = entity - kFirstProducts;
      std::snprintf(text, sizeof text, "products of warp %d of block %d", warp % kProductWarps, warp / kProductWarps);
    } else {
      const Slot& slot = slots_[entity - kFirstSlot];
      std::snprintf(text, sizeof text, "a copy of %s to %s by block %d", slot.what, barrier_name(slot.barrier).c_str(),
                    slot.issuer / kBlockThreads);
    }
    return text;
  }
  void check(int block, int at, const Shadow::Conflict& conflict, int entity, const char* does) {
    if (conflict.kind == Shadow::kNone) return;
    const std::string who = entity_name(entity), where = place_name(at);
    if (conflict.kind == Shadow::kUninitialised) {
      fibers.fail("%s %s what nobody wrote: block %d, %s", who.c_str(), does, block, where.c_str());
    } else if (conflict.kind == Shadow::kProxy) {
      fibers.fail("block %d, %s: %s %s where %s did before, without a fence.proxy.async in between", block,
                  where.c_str(), who.c_str(), does, entity_name(conflict.other.entity).c_str());
    } else {
      fibers.fail("race in block %d, %s: %s %s, %s %s, in no order", block, where.c_str(), who.c_str(), does,
                  entity_name(conflict.other.entity).c_str(), conflict.kind == Shadow::kRead ? "reads" : "writes");
    }
  }

  void sync(int f, NamedBarrier& b, int threads, Reason reason) {
    if (b.arrived == 0) b.threads = threads, b.clock.clear();
    if (b.threads != threads) fibers.fail("%d and %d threads at one named barrier", b.threads, threads);
    b.clock.join(clocks[f]);
    b.waiting.push_back(f);
    if (++b.arrived < threads) return fibers.block(reason);
    for (int other : b.waiting) {
      clocks[other] = b.clock;
      tick(other);
      if (other != f) fibers.wake(other);
    }
    b.arrived = 0;
    b.waiting.clear();
  }

  void count_bytes(int block, int i, int64_t change) {
    Barrier& b = blocks[block].barriers[i];
    b.bytes += change;
    if (b.bytes > Barrier::kMostBytes || b.bytes < -Barrier::kMostBytes) {
      fibers.fail("%lld bytes at %s of block %d", static_cast<long long>(b.bytes), barrier_name(i).c_str(), block);
    }
  }
  void complete(Barrier& b) {
    if (!b.complete()) return;
    for (int f : b.waiting) fibers.wake(f);
    b.waiting.clear();
  }

  // A slot may be had again by who knows that its last copy came: then knowing of the new one is knowing of both.
  int take_slot(int f, const char* what, int barrier) {
    for (int s = 0; s < kSlots; ++s) {
      Slot& slot = slots_[s];
      if (slot.flying || slot.time > clocks[f].at[kFirstSlot + s] || slot.time >= kLastTime) continue;
      slot = {true, int16_t(slot.time + 1), what, f, barrier};
      return s;
    }
    fibers.fail("more than %d copies of which nobody knows whether they came", kSlots);
    return 0;
  }

  void deliver(int i) {
    const std::unique_ptr<Event> event = std::move(events_[i]);
    events_[i] = std::move(events_.back());
    events_.pop_back();
    Block& block = blocks[event->block];
    if (block.running == 0) {
      return fibers.fail("%s comes to %s of block %d, which has ended", event->map ? event->map->name : "an arrival",
                         barrier_name(event->barrier).c_str(), event->block);
    }
    if (!event->map) return arrive(event->block, event->barrier, event->fiber, event->clock);
    const int entity = kFirstSlot + event->slot;
    for (int line = event->first; line < event->end; ++line) {
      uint16_t values[kLine / 2];
      event->map->fetch(event->start, line, values);
      const int at = event->to + line * kLine;
      for (int chunk = 0; chunk < kLine; chunk += 16) {
        const uint32_t address = block.base + at + chunk;
        std::memcpy(block.memory.data() + ((address ^ (address >> 7 & 7) << 4) - block.base), values + chunk / 2, 16);
      }
      const Epoch by{int16_t(entity), event->clock.at[entity]};
      check(event->block, at, block.shadow.write_line(at, by, event->clock), entity, "writes");
      if (!fibers.failure().empty()) return;
    }
    slots_[event->slot].flying = false;
    Barrier& b = barrier(event->block, event->barrier, entity, event->clock);
    b.arriving.join(event->clock);
    count_bytes(event->block, event->barrier, -int64_t(event->end - event->first) * kLine);
    complete(b);
  }

  void check_end() {
    if (!fibers.all_done()) {
      std::string text = "deadlock:";
      for (int first = 0; first < Fibers::kCount && text.size() < 900;) {
        const std::string why = waiting_for(first);
        int end = first + 1;
        while (end < Fibers::kCount && end / kBlockThreads == first / kBlockThreads && waiting_for(end) == why) ++end;
        char line[160];
        std::snprintf(line, sizeof line, " block %d threads %d..%d: %s;", block_of(first), first % kBlockThreads,
                      (end - 1) % kBlockThreads, why.c_str());
        text += line;
        first = end;
      }
      return fibers.fail("%s", text.c_str());
    }
    for (int block = 0; block < kBlocks; ++block) {
      for (int i = 0; i < hopper::kBarriers; ++i) {
        const Barrier& b = blocks[block].barriers[i];
        if (b.bytes || b.pending != b.count) {
          return fibers.fail("%s of block %d ends with %d of %d arrivals to come and %lld bytes",
                             barrier_name(i).c_str(), block, b.pending, b.count, static_cast<long long>(b.bytes));
        }
      }
    }
  }
  std::string waiting_for(int f) const {
    if (fibers.done(f)) return "done";
    const Reason& reason = fibers.reason(f);
    if (reason.format == kWaits)
      return "waits for parity " + std::to_string(reason.second) + " of " + barrier_name(reason.first);
    return reason.text();
  }

 public:
  static constexpr const char* kWaits = "waits for barrier %d, parity %d";

 private:
  Warp warps_[Fibers::kCount / 32];
  Slot slots_[kSlots];
  Fences fences_;
  NamedBarrier everyone_;
  std::vector<std::unique_ptr<Event>> events_;
  std::vector<TensorCores::Group> issued_[kBlocks * kProductWarps / 4];
  int deliver_ = 0;
};

}  // namespace hopper_test
