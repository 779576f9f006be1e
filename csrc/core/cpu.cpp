#include "cpu.h"

#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace spin {
namespace {

#if defined(__x86_64__)
// Linux gives tiles, 8 KB of state per thread, to processes that ask for them; before 5.16 nobody has them.
bool may_use_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
#if defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return CpuFeatures{
        .vendor = __builtin_cpu_is("intel") ? "intel"
                  : __builtin_cpu_is("amd") ? "amd"
                                            : "other",
        .avx2_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
        .avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
        .avx512_bf16 = bool(__builtin_cpu_supports("avx512bf16")),
        .amx_bf16 = may_use_tiles(),
        // Zen 3 and 4: 24 lines. Bursts of 4 KB from 20 places of memory, asked for two ahead by two cores of a Zen 4,
        // come with 21 to 25 GB/s where that is L1 and with 27 to 30 where it is L2. On a Zen 5 it is the other way
        // round.
        .few_l1_misses = bool(__builtin_cpu_is("amdfam19h")),
    };
#else
    return CpuFeatures{"other", false, false, false, false, false};
#endif
  }();
  return features;
}

int64_t band_bytes() {
  // Measured with 2 MB of L2 (best calls): at 32 x 32 tokens of 1024 channels, batch 2, bands of 0.6, 1.1, 2 and 5 MB
  // take 264, 262, 268 and 312 ms. Smaller L2 have an L3 behind them: with 512 KB (AMD EPYC, in turns) bands of 0.3 MB
  // take 1.14 times as long as those of 1.2 at 16 x 16 tokens and batch 1, 1.05 at batch 8.
  static const int64_t bytes = [] {
    int64_t l2 = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::max<int64_t>(l2, 2 << 20) * 5 / 8;
  }();
  return bytes;
}

std::vector<std::string> available_isas() {
  const CpuFeatures& cpu = cpu_features();
  std::vector<std::string> names{"portable"};
  if (cpu.avx2_fma && kernels_avx2()) names.push_back("avx2");
  if (cpu.avx512 && kernels_avx512()) names.push_back("avx512");
  if (cpu.avx512 && cpu.avx512_bf16 && kernels_avx512_bf16()) names.push_back("avx512_bf16");
  if (cpu.avx512 && cpu.avx512_bf16 && cpu.amx_bf16 && kernels_amx()) names.push_back("amx");
  return names;
}

const Kernels& select_kernels(DType type, const std::string& isa) {
  static const std::vector<std::string> names = available_isas();
  std::string chosen = isa;
  if (chosen.empty()) {
    chosen = names.back();
    // vdpbf16ps does two multiply-adds per lane. Zen 4 and 5 issue it as often as a float32 multiply-add;
    // an Emerald Rapids a quarter as often (measured: 100 against 195 GFLOP/s on one core without AMX, 83 against 171
    // with it), and so, we assume, do its relatives: there bf16 is faster, and more precise, in the float32 kernels.
    if (chosen == "avx512_bf16" && cpu_features().vendor != "amd") chosen = "avx512";
  } else if (std::find(names.begin(), names.end(), chosen) == names.end()) {
    std::string list;
    for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
    throw std::runtime_error("SPIN_CPU_ISA: expected one of " + list + " on this processor, got '" + chosen +
                             "'; unset it or choose one of these");
  }
  if (chosen == "amx") return type == DType::kBFloat16 ? *kernels_amx() : *kernels_avx512();
  if (chosen == "avx512_bf16") return type == DType::kBFloat16 ? *kernels_avx512_bf16() : *kernels_avx512();
  if (chosen == "avx512") return *kernels_avx512();
  if (chosen == "avx2") return *kernels_avx2();
  return *kernels_portable();
}

const Kernels& select_training_kernels(DType type, const std::string& isa) {
  const Kernels& kernels = select_kernels(type, isa);
  if (&kernels == kernels_amx()) return *kernels_avx512();  // products of training know no tiles
  return kernels.chain == DType::kFloat32 ? kernels : *kernels_avx512_bf16_training();
}

std::string forced_isa() {
  const char* value = std::getenv("SPIN_CPU_ISA");
  return value ? value : "";
}

}  // namespace spin
