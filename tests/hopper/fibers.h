// The threads of a cluster as fibers of one host thread, run in an order drawn from a seed, and the failure that ends a
// run. Nothing runs at the same time as anything else: whoever may be overtaken says so with pause() or block().
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace hopper_test {

struct Random {  // splitmix64
  uint64_t state;

  uint32_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return uint32_t((z ^ z >> 31) >> 32);
  }
  int below(int n) { return int(uint64_t(bits()) * uint32_t(n) >> 32); }
};

// What a fiber is blocked on, for the message about a deadlock: a printf format of two numbers.
struct Reason {
  const char* format = "";
  int first = 0, second = 0;

  std::string text() const {
    char line[128];
    std::snprintf(line, sizeof line, format, first, second);
    return line;
  }
};

class Fibers {
 public:
  static constexpr int kCount = 1024;
  static constexpr size_t kStackBytes = 64 << 10;

  Fibers() : fibers_(kCount) {
    void* memory = mmap(nullptr, kCount * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks_ = static_cast<char*>(memory);
  }
  Fibers(const Fibers&) = delete;

  // All fibers at the beginning of body(context, fiber). Every seed has its own idea of time: how often threads are
  // interrupted, and which warps hardly get to run.
  void reset(uint64_t seed, void (*body)(void*, int), void* context) {
    random = Random{seed};
    body_ = body, context_ = context;
    ready_.clear();
    done_ = 0;
    failure_.clear();
    for (int f = 0; f < kCount; ++f) fibers_[f].started = false, ready_.push_back(f);
    patience_ = 1 << (4 + 2 * random.below(5));
    const int slow = random.below(4);  // of 8 warps
    for (uint8_t& lazy : lazy_) lazy = random.below(8) < slow ? 250 : 0;
    left_ = 1;
  }

  // Until every fiber is done, nothing can go on, or something failed; `idle` is asked before every choice, whether or
  // not there is something to run, and says whether it did anything.
  template <class Idle>
  void run(Idle idle) {
    while (failure_.empty()) {
      if (idle(!ready_.empty())) continue;
      if (ready_.empty()) break;
      resume(pick());
    }
  }

  bool all_done() const { return done_ == kCount; }
  bool done(int f) const { return fibers_[f].done; }
  int current() const { return current_; }
  const std::string& failure() const { return failure_; }
  const Reason& reason(int f) const { return fibers_[f].reason; }

  // A machine operation: now and then others run before it.
  void step(int cost) {
    if ((left_ -= cost) <= 0) {
      left_ = 1 + random.below(patience_);
      pause();
    }
  }
  void pause() {
    ready_.push_back(current_);
    leave();
  }
  void block(Reason reason) {
    fibers_[current_].reason = reason;
    leave();
  }
  void wake(int f) { ready_.push_back(f); }

  // Ends the run: the first failure counts. From within a fiber it does not return.
  [[gnu::format(printf, 2, 3)]] void fail(const char* format, ...) {
    if (failure_.empty()) {
      char text[1024];
      va_list arguments;
      va_start(arguments, format);
      std::vsnprintf(text, sizeof text, format, arguments);
      va_end(arguments);
      failure_ = text;
    }
    if (current_ >= 0) leave();
  }

  Random random{0};

 private:
  struct Fiber {
    jmp_buf state;
    bool started = false, done = false;
    Reason reason;
  };

  int pick() {
    int i = random.below(int(ready_.size()));
    for (int tries = 0; tries < 6 && random.below(256) < lazy_[ready_[i] / 32]; ++tries) {
      i = random.below(int(ready_.size()));
    }
    const int f = ready_[i];
    ready_[i] = ready_.back();
    ready_.pop_back();
    return f;
  }

  // swapcontext would ask the kernel for the signal mask every time: contexts serve to enter a stack, once.
  void resume(int f) {
    current_ = f;
    if (_setjmp(home_) == 0) {
      if (fibers_[f].started) _longjmp(fibers_[f].state, 1);
      fibers_[f].started = true, fibers_[f].done = false;
      ucontext_t fresh;
      getcontext(&fresh);
      fresh.uc_stack.ss_sp = stacks_ + f * kStackBytes;
      fresh.uc_stack.ss_size = kStackBytes;
      fresh.uc_link = nullptr;
      const uintptr_t self = uintptr_t(this);
      makecontext(&fresh, reinterpret_cast<void (*)()>(&Fibers::enter), 2, uint32_t(self), uint32_t(self >> 32));
      setcontext(&fresh);
    }
    current_ = -1;
  }
  static void enter(uint32_t low, uint32_t high) {
    Fibers& self = *reinterpret_cast<Fibers*>(uintptr_t(low) | uintptr_t(uint64_t(high) << 32));
    self.body_(self.context_, self.current_);
    self.fibers_[self.current_].done = true;
    ++self.done_;
    self.leave();
  }
  void leave() {
    if (_setjmp(fibers_[current_].state) == 0) _longjmp(home_, 1);
  }

  std::vector<Fiber> fibers_;
  char* stacks_;
  jmp_buf home_;
  int current_ = -1, done_ = 0, left_ = 1, patience_ = 1;
  std::vector<int> ready_;
  uint8_t lazy_[kCount / 32] = {};
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::string failure_;
};

}  // namespace hopper_test
