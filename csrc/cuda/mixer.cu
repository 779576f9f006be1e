// The Hopper mixer's launches: weights made ready, the first depthwise, a launch per pair of blocks, the last
// pointwise.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "mixer.h"
#include "mixer_kernel.cuh"

namespace spin::hopper {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// ---- weights ----

constexpr int kBlock = 256, kChunk = 8;  // threads; values of 16 bytes

// (F, C, k * k) to (F, C / 64, k * k, 64), channels padded with zeros, as mixer_roles.h reads them.
__global__ void lay_out_taps(const uint16_t* from, uint16_t* to, int channels, int taps) {
  const int place = blockIdx.x * kBlock + threadIdx.x, channel = place / kStep / taps * kStep + place % kStep;
  if (place >= ceil_div(channels, kStep) * kStep * taps) return;
  const int tap = place / kStep % taps;
  from += int64_t(blockIdx.y) * channels * taps;
  to += int64_t(blockIdx.y) * ceil_div(channels, kStep) * kStep * taps;
  to[place] = channel < channels ? from[channel * taps + tap] : uint16_t(0);
}

// Matrix s = sum over t of coefficients[s, t] * templates[t], in float32, rounded once; all matrices in one launch.
template <class Value>
__global__ void compose(const uint4* templates, const float* coefficients, uint4* matrices, int count, int chunks) {
  const int chunk = blockIdx.x * kBlock + threadIdx.x;
  if (chunk >= chunks) return;
  float sums[kChunk] = {};
  for (int t = 0; t < count; ++t) {
    const float coefficient = __ldg(coefficients + int64_t(blockIdx.y) * count + t);
    const uint4 values = __ldg(templates + int64_t(t) * chunks + chunk);
    const uint32_t bits[] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const Pair pair = Value::unpack(bits[i]);
      sums[2 * i] = fmaf(coefficient, pair.first, sums[2 * i]);
      sums[2 * i + 1] = fmaf(coefficient, pair.second, sums[2 * i + 1]);
    }
  }
  matrices[int64_t(blockIdx.y) * chunks + chunk] = {Value::pack(sums[0], sums[1]), Value::pack(sums[2], sums[3]),
                                                    Value::pack(sums[4], sums[5]), Value::pack(sums[6], sums[7])};
}

// ---- maps of tensors, for the copy engine ----

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {  // from the driver, which this library does not link
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

// Of a contiguous tensor, its last dimension first; what a box has outside of it comes as zeros.
CUtensorMap map_of(DType type, const void* data, std::vector<cuuint64_t> sizes, std::vector<cuuint32_t> box) {
  std::vector<cuuint64_t> strides;  // bytes, of all dimensions but the first
  cuuint64_t stride = kItemBytes;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) strides.push_back(stride *= sizes[i]);
  const std::vector<cuuint32_t> ones(sizes.size(), 1);
  CUtensorMap map;
  const CUresult status =
      encoder()(&map, type == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                cuuint32_t(sizes.size()), const_cast<void*>(data), sizes.data(), strides.data(), box.data(),
                ones.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  return map;
}

// ---- launches ----

// A kernel with how it is launched, and how many clusters of it a device runs at once.
struct Launcher {
  Kernel kernel;
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config{};
  int clusters = 0;

  explicit Launcher(Kernel kernel_) : kernel(kernel_) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kCluster, 1, 1};
    config.blockDim = kThreads;
    config.dynamicSmemBytes = kSharedBytes + kAlignment;
    config.attrs = &cluster;
    config.numAttrs = 1;
    config.gridDim = kCluster;
  }
  Launcher(const Launcher&) = delete;

  // The first time on a device; cudaOccupancyMaxActiveClusters knows which multiprocessors can pair up.
  void prepare(int device) {
    static std::mutex mutex;
    static std::map<std::pair<Kernel, int>, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    int& found = known[{kernel, device}];
    if (found == 0) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.dynamicSmemBytes)),
            "shared memory of the mixer");
      int count = 0;
      check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "clusters of the mixer");
      if (count == 0) throw std::runtime_error("the device has no room for a cluster of the mixer");
      found = count;
    }
    clusters = found;
  }

  void operator()(const Launch& launch) {
    config.gridDim = kCluster * std::min(clusters, launch.shape.tiles());
    check(cudaLaunchKernelEx(&config, kernel, launch), "launch of the mixer");
  }
};

const uint16_t* row(const void* matrix, int64_t index, int64_t columns) {
  return matrix ? static_cast<const uint16_t*>(matrix) + index * columns : nullptr;
}
const float* row(const float* matrix, int64_t index, int64_t columns) {
  return matrix ? matrix + index * columns : nullptr;
}

template <class Value>
void enqueue(const Call& call) {
  const NetworkShape& s = call.shape;
  const MixerWeights& w = call.weights;
  const int64_t C = s.channels, k = s.kernel_size;
  const bool fits = call.height <= kPlaces && call.width <= kPlaces;
  const Geometry geometry = fits ? geometry_of(int(call.height), int(call.width)) : Geometry{};
  const Kernel kernel = kernel_of<Value>(k, geometry.width);
  if (kernel == nullptr || geometry.images == 0 || C < kChunk || C > kMostChannels || C % kChunk != 0 ||
      call.batch < 1 || call.batch > (1 << 24) || s.depth < 1) {
    throw std::runtime_error("sizes outside of what the kernel is made for");
  }
  int device = 0;
  check(cudaGetDevice(&device), "device");
  const auto stream = static_cast<cudaStream_t>(call.stream);
  Launcher launcher(kernel);
  launcher.config.stream = stream;
  launcher.prepare(device);

  const auto taps = static_cast<uint16_t*>(call.taps);
  const int64_t filter_values = taps_of(C, k);
  const dim3 tap_grid(unsigned(ceil_div(int(filter_values), kBlock)), unsigned(s.filters));
  lay_out_taps<<<tap_grid, kBlock, 0, stream>>>(row(w.dw_weight, 0, 0), taps, int(C), int(k * k));
  check(cudaGetLastError(), "launch of the taps' layout");
  const void* matrices = w.pw_weight;
  if (w.pw_coefficients) {
    const int chunks = int(C * C / kChunk);
    const dim3 grid(unsigned(ceil_div(chunks, kBlock)), unsigned(s.matrices));
    compose<Value><<<grid, kBlock, 0, stream>>>(reinterpret_cast<const uint4*>(w.pw_weight), w.pw_coefficients,
                                                static_cast<uint4*>(call.composed), int(w.templates), chunks);
    check(cudaGetLastError(), "launch of the composition");
    matrices = call.composed;
  }

  const auto tokens_map = [&](const void* data) {
    return map_of(
        s.type, data, {cuuint64_t(C), cuuint64_t(call.width), cuuint64_t(call.height), cuuint64_t(call.batch)},
        {kStep, cuuint32_t(geometry.columns), cuuint32_t(geometry.box_rows), cuuint32_t(geometry.box_images)});
  };
  const CUtensorMap matrices_map =
      map_of(s.type, matrices, {cuuint64_t(C), cuuint64_t(C), cuuint64_t(s.matrices)}, {kStep, kRows, 1});
  const CUtensorMap y_maps[] = {tokens_map(call.y[0]), tokens_map(call.y[1])};

  // The pointwise half of block d, but for d = -1, and the depthwise half of the block after it, if there is one.
  for (int64_t d = -1; d < s.depth; ++d) {
    const bool product = d >= 0, depthwise = d + 1 < s.depth;
    const void* y = call.y[d & 1];
    Launch launch{matrices_map, product ? y_maps[d & 1] : tokens_map(call.x), {}, {}};
    launch.shape = {geometry, int(call.batch), int(C),        product ? int(s.pw_index[d]) : 0,
                    product,  depthwise,       s.pw_residual, s.activation};
    Arguments& a = launch.arguments;
    a.out = static_cast<uint16_t*>(depthwise ? call.y[(d + 1) & 1] : call.out);
    if (product) {
      a.gain = row(w.pw_gain, d, C), a.pw_affine = row(w.pw_affine, d, 2 * C);
      a.pw_bias = row(w.pw_bias, s.pw_index[d], C), a.residual = row(y, 0, 0);
    }
    if (depthwise) {
      const int64_t filter = s.dw_index[d + 1];
      a.dw_affine = row(w.dw_affine, d + 1, 2 * C);
      a.taps = row(taps, filter, filter_values), a.dw_bias = row(w.dw_bias, filter, C);
    }
    launcher(launch);
  }
}

}  // namespace

int64_t taps_of(int64_t channels, int64_t kernel_size) {
  return int64_t(ceil_div(int(channels), kStep)) * kStep * kernel_size * kernel_size;
}

std::string run(const Call& call) {
  try {
    switch (call.shape.type) {
      case DType::kBFloat16:
        enqueue<BFloat16>(call);
        return "";
      case DType::kFloat16:
        enqueue<Float16>(call);
        return "";
      default:
        return "expected bfloat16 or float16";
    }
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace spin::hopper
