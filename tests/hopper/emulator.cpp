// A launch of the Hopper mixer without a GPU, and the maps of mixer_shape.h, for tests/test_hopper.py (through ctypes).
#include "emulator.h"

#include <cmath>
#include <iterator>

namespace hopper_test {
namespace {

// Independent of the conversions in csrc.
float decode(bool bfloat16, uint16_t bits) {
  const int mantissa_bits = bfloat16 ? 7 : 10, exponents = 1 << (15 - mantissa_bits), bias = exponents / 2 - 1;
  const int mantissa = bits & ((1 << mantissa_bits) - 1), exponent = bits >> mantissa_bits & (exponents - 1);
  double value;
  if (exponent == exponents - 1) {
    value = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  return float(bits >> 15 ? -value : value);
}

template <class Value, int kKernel>
auto roles_of(int width) {
  return width == 0 ? &kernel<Value, kKernel, 0> : width == 16 ? &kernel<Value, kKernel, 16> : nullptr;
}
template <class Value>
auto roles_of(int kernel_size, int width) {
  switch (kernel_size) {
    case 3:
      return roles_of<Value, 3>(width);
    case 5:
      return roles_of<Value, 5>(width);
    case 7:
      return roles_of<Value, 7>(width);
    case 9:
      return roles_of<Value, 9>(width);
  }
  return decltype(roles_of<Value, 3>(0))(nullptr);
}

// One for all launches of a process: its stacks are large.
Launch& the_launch() {
  static Launch* launch = new Launch;
  return *launch;
}

}  // namespace
}  // namespace hopper_test

using namespace hopper_test;

extern "C" {

struct HopperLaunch {
  int32_t bfloat16, kernel, compiled_width;
  int32_t batch, height, width, channels, matrices, matrix, clusters;
  int32_t product, depthwise, residual, activation;
  uint32_t seed;
  const char* damage;
  const uint16_t *tokens, *weights, *pw_bias, *taps, *dw_bias, *more;  // more: added to x, of the tokens' shape
  const float *gain, *pw_affine, *dw_affine;
  uint16_t* out;
};

// The name of a kind of damage, null after the last.
const char* hopper_damage(int i) { return i < int(Damage::kCount) ? kDamages[i] : nullptr; }

// 0: it ran, and no more can be said here; 1: `message` says what went wrong; 2: what is wrong with the call.
int hopper_launch(const HopperLaunch* call, char* message, int size) {
  Launch& launch = the_launch();
  const auto answer = [&](int code, const std::string& text) {
    std::snprintf(message, size, "%s", text.c_str());
    return code;
  };

  int damage = 0;
  while (damage < int(Damage::kCount) && std::strcmp(kDamages[damage], call->damage) != 0) ++damage;
  if (damage == int(Damage::kCount)) return answer(2, "unknown damage");
  launch.damage = Damage(damage);
  launch.roles = call->bfloat16 ? roles_of<hopper::BFloat16>(call->kernel, call->compiled_width)
                                : roles_of<hopper::Float16>(call->kernel, call->compiled_width);
  if (!launch.roles) return answer(2, "no such kernel");
  static int table_of = -1;
  if (table_of != call->bfloat16) {
    for (int i = 0; i < 65536; ++i) TensorCores::decoded[i] = decode(call->bfloat16, uint16_t(i));
    table_of = call->bfloat16;
  }

  const hopper::Geometry g = hopper::geometry_of(call->height, call->width);
  if (g.images == 0) return answer(2, "the plane is too large");
  if (call->compiled_width && call->compiled_width != call->width) return answer(2, "compiled for another width");
  const int64_t channels = call->channels, values = channels * call->batch * call->height * call->width;
  launch.shape = {g,
                  call->batch,
                  call->channels,
                  call->matrix,
                  call->product != 0,
                  call->depthwise != 0,
                  call->residual != 0,
                  spin::Activation(call->activation)};
  launch.arguments = {call->gain, call->pw_affine, call->dw_affine, call->pw_bias,
                      call->taps, call->dw_bias,   call->more,      call->out};
  launch.tokens = {"tokens",
                   call->tokens,
                   4,
                   {channels, call->width, call->height, call->batch},
                   {hopper::kStep, g.columns, g.box_rows, g.box_images}};
  launch.matrices = {
      "matrices", call->weights, 3, {channels, channels, call->matrices}, {hopper::kStep, hopper::kRows, 1}};
  for (const TensorMap* map : {&launch.tokens, &launch.matrices}) {
    if (map == &launch.matrices && !call->product) continue;
    if (const std::string refused = map->refused(); !refused.empty()) return answer(2, map->name + (": " + refused));
  }

  GlobalMemory& global = launch.cluster.global;
  global.reset();
  global.add("gain", call->gain, channels, 4);
  global.add("pw_affine", call->pw_affine, 2 * channels, 4);
  global.add("dw_affine", call->dw_affine, 2 * channels, 4);
  global.add("pw_bias", call->pw_bias, channels, 2);
  global.add("taps", call->taps, (channels + 63) / 64 * 64 * call->kernel * call->kernel, 2);
  global.add("dw_bias", call->dw_bias, channels, 2);
  global.add("the residual", call->more, values, 2);
  global.add_output("out", call->out, values, 2);

  launch.clusters = call->clusters;
  for (launch.index = 0; launch.index < launch.clusters; ++launch.index) {
    launch.cluster.reset(
        uint64_t(call->seed) << 16 | uint32_t(launch.index),
        [](void* context, int fiber) {
          Launch& launch = *static_cast<Launch*>(context);
          launch.roles(launch, fiber);
        },
        &launch);
    launch.cluster.run();
    if (const std::string& failure = launch.cluster.fibers.failure(); !failure.empty()) {
      return answer(1, "cluster " + std::to_string(launch.index) + ": " + failure);
    }
  }
  if (const int64_t i = global.first_unwritten(); i >= 0) {
    return answer(1, "value " + std::to_string(i) + " of out is not written");
  }
  return answer(0, "");
}

// ---- mixer_shape.h and mixer_values.h ----

// height, width, images, rows, columns, box_images, box_rows, places, box_bytes, and of both boxes row and image.
void hopper_geometry(int height, int width, int32_t* to) {
  const hopper::Geometry g = hopper::geometry_of(height, width);
  const int32_t values[] = {g.height,     g.width,        g.images,      g.rows,        g.columns,
                            g.box_images, g.box_rows,     g.places(),    g.box_bytes(), g.box_row(0),
                            g.box_row(1), g.box_image(0), g.box_image(1)};
  std::copy(std::begin(values), std::end(values), to);
}
// Steps, tiles; then channel and image of every tile of both ranks while there is room.
void hopper_tiles(int height, int width, int batch, int channels, int32_t* to, int room) {
  const hopper::Shape shape{hopper::geometry_of(height, width), batch, channels, 0, true, true, false, {}};
  to[0] = shape.steps(), to[1] = shape.tiles();
  for (int i = 0; i < shape.tiles() * kBlocks && 3 + 2 * i < room; ++i) {
    const hopper::Tile tile = hopper::tile_of(shape, i / kBlocks, i % kBlocks);
    to[2 + 2 * i] = tile.row, to[3 + 2 * i] = tile.image;
  }
}
// Begin and end of every buffer in shared memory: matrix and tokens of the stages, panels, barriers.
int hopper_shared_memory(int32_t* to) {
  int n = 0;
  const auto add = [&](int at, int bytes) { to[n++] = at, to[n++] = at + bytes; };
  for (int stage = 0; stage < hopper::kStages; ++stage) {
    add(hopper::matrix_at(stage), hopper::kMatrixBytes);
    add(hopper::tokens_at(stage), hopper::kTokensBytes);
  }
  for (int panel = 0; panel < hopper::kPanels; ++panel)
    add(hopper::kPlanesAt + panel * hopper::kPanelBytes, hopper::kPanelBytes);
  add(hopper::kBarriersAt, 8 * hopper::kBarriers);
  to[n++] = hopper::kSharedBytes + hopper::kAlignment;
  return n;
}
void hopper_barriers(int product, int32_t* arrivals) {
  for (int i = 0; i < hopper::kBarriers; ++i) arrivals[i] = hopper::arrivals(i, product != 0);
}
int hopper_swizzled(int line, int chunk) { return hopper::swizzled(line, chunk); }
int hopper_sum(int thread, int i) { return hopper::sum_row(thread, i) << 16 | hopper::sum_column(thread, i); }
void hopper_activate(int activation, float* values, int count) {
  for (int i = 0; i < count; ++i) {
    float one[] = {values[i]};
    hopper::activate(spin::Activation(activation), one);
    values[i] = one[0];
  }
}
}
