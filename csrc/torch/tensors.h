// What the operators have in common: tensors as raw pointers, torch's threads, pooled memory.
//
// Arguments were checked in Python (spin_kernels/checks.py), with the messages that users see. What is checked again in
// C++, briefly, is whatever could make a kernel read out of bounds.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "../core/cpu.h"
#include "../core/team.h"
#include "../core/workspace.h"

namespace spin {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Parallel torch_parallel() {
  return {int(torch::stable::get_num_threads()), [](int threads, const std::function<void(int)>& body) {
            if (threads == 1) return body(0);
            torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
              for (int64_t thread = first; thread < last; ++thread) body(int(thread));
            });
          }};
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
  return DType::kFloat32;
}

// Owns what pointers point into, all on one kind of device.
struct Keep {
  bool cuda = false;
  std::vector<Tensor> tensors;

  void check(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(cuda ? t.is_cuda() : t.is_cpu(), name, ": expected a ", cuda ? "CUDA" : "CPU", " tensor");
  }
};

// The values of a contiguous tensor of the given shape and type (a copy where needed); on a GPU on a multiple of 16
// bytes.
inline const char* data_of(const Tensor& t, DType type, std::initializer_list<int64_t> shape, const char* name,
                           Keep& keep) {
  keep.check(t, name);
  bool same = t.dim() == int64_t(shape.size()) && dtype_of(t, name) == type;
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(same, name, ": shape or dtype does not fit the other arguments");
  Tensor values = t.is_contiguous() ? t : torch::stable::contiguous(t);
  if (keep.cuda && reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 != 0)
    values = torch::stable::clone(values);
  keep.tensors.push_back(values);
  return static_cast<const char*>(values.const_data_ptr());
}
inline const char* data_of(const std::optional<Tensor>& t, DType type, std::initializer_list<int64_t> shape,
                           const char* name, Keep& keep) {
  return t ? data_of(*t, type, shape, name, keep) : nullptr;
}
template <class MaybeTensor>
const float* floats_of(const MaybeTensor& t, std::initializer_list<int64_t> shape, const char* name, Keep& keep) {
  return reinterpret_cast<const float*>(data_of(t, DType::kFloat32, shape, name, keep));
}

// Expanded tensors may describe results that no memory holds.
template <class Body>
auto within_memory(const char* name, const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, name,
                    ": the call failed, probably for want of memory; use smaller arguments: ", error.what());
  }
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

// Memory from the workspaces' pool: the system's fresh pages, every step anew, took a tenth of it.
inline Tensor pooled(const Tensor& like, int64_t elements, int64_t item_bytes) {
  auto memory = std::make_shared<Workspace>(elements * item_bytes);
  const int64_t stride = 1;
  return torch::stable::from_blob(memory->data(), {&elements, 1}, {&stride, 1}, like.device(), like.scalar_type(),
                                  [memory](void*) {});
}

// What is to be written; null where there is nothing.
inline char* mutable_bytes(const Tensor& t) { return t.numel() ? static_cast<char*>(t.mutable_data_ptr()) : nullptr; }
inline float* mutable_floats(const Tensor& t) { return reinterpret_cast<float*>(mutable_bytes(t)); }

// ---- the operators that make weights ----

inline const Kernels& weight_kernels() { return select_kernels(DType::kFloat32, forced_isa()); }

// A gradient that kernels make as floats, fill(floats), whatever the tensor's type.
template <class Fill>
void fill_as_floats(const Tensor& to, DType type, const Fill& fill) {
  if (type == DType::kFloat32) return fill(mutable_floats(to));
  const Workspace wide(4 * round_up(to.numel(), 64));
  float* floats = reinterpret_cast<float*>(wide.data());
  fill(floats);
  weight_kernels().narrow(floats, type, to.numel(), mutable_bytes(to));
}

}  // namespace spin
