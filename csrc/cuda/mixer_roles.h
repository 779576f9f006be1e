// What the warps of the Hopper mixer do, step by step, over a Machine: the GPU's in mixer_kernel.cuh, or the one of
// tests/hopper/emulator.h, which runs this very code with no GPU and looks for races.
//
//     product (2 warpgroups)                                     depthwise (2 warpgroups)
//     wait full[stage]             <- the copy engine            wait planes full
//     wgmma, one step in flight                                  finish x in place, meet, convolve
//     arrive at empty[stage] of both blocks                      y' to memory
//       first thread: wait empty[stage], copy W's rows, and      arrive planes empty
//                     half of y to both blocks
//     wait planes empty            <- planes empty
//     leave pre-activations, arrive planes full ->
//
// A launch without a product (the first depthwise) copies x into the planes; one without a depthwise (the last
// pointwise) writes x to memory. A parity of 1 waits for the phase before the first: it is over at once.
#pragma once
#include "mixer_shape.h"
#include "mixer_values.h"

namespace spin::hopper {

// Of one launch; the tensors' values as bits, null where there is none. Vectors are those of the launch's blocks. Taps
// lie as lanes read them, in panels of kStep channels, past the last channel zeros: every place is a fixed distance
// from a lane's first one.
struct Arguments {
  const float *gain, *pw_affine, *dw_affine;            // (C), (2, C), (2, C)
  const uint16_t *pw_bias, *taps, *dw_bias, *residual;  // (C), (C / 64, k * k, 64), (C), (B, H, W, C)
  uint16_t* out;                                        // (B, H, W, C)
};

// ---- copies: one thread ----

// The next of the steps of all tiles of a block, in order.
struct Copies {
  int tiles, tile;
  Tile at;
  int step = 0;
  Ring ring;
};

// Starts the copies of the next step, if there is one, as soon as its stage is free in both blocks.
template <class Machine>
SPIN_DEVICE void copy_step(Machine& m, const Shape& shape, Copies& next) {
  if (next.tile >= next.tiles) return;
  const Geometry& g = shape.geometry;
  const int stage = next.ring.stage, column = next.step * kStep;
  m.wait(empty(stage), next.ring.phase ^ 1);
  m.arrive_expecting(full(stage), kMatrixBytes + 2 * g.box_bytes());
  m.copy_matrix(matrix_at(stage), full(stage), column, next.at.row, shape.matrix);
  m.copy_tokens_to_cluster(tokens_at(stage) + m.rank() * g.box_bytes(), full(stage), column, g.box_row(m.rank()),
                           next.at.image + g.box_image(m.rank()));
  next.ring.next();
  if (++next.step < shape.steps()) return;
  next.step = 0, next.tile += m.clusters();
  next.at = tile_of(shape, next.tile, m.rank());
}

// Without products: x of every tile into the planes.
template <class Machine>
SPIN_DEVICE void copy_planes(Machine& m, const Shape& shape) {
  const Geometry& g = shape.geometry;
  int phase = 1;
  for (int tile = m.cluster(); tile < shape.tiles(); tile += m.clusters(), phase ^= 1) {
    const Tile t = tile_of(shape, tile, m.rank());
    m.wait(kPlanesEmpty, phase);
    m.arrive_expecting(kPlanesFull, 2 * kPanels * g.box_bytes());
    for (int panel = 0; panel < kPanels; ++panel) {
      for (int box = 0; box < 2; ++box) {
        m.copy_tokens(kPlanesAt + panel * kPanelBytes + box * g.box_bytes(), kPlanesFull, t.row + panel * kStep,
                      g.box_row(box), t.image + g.box_image(box));
      }
    }
  }
}

// ---- product: warps 0 to 7 ----

// gain * sum + bias of a warp's 16 channels into the planes, 16 places at a time.
template <class Value, class Machine>
SPIN_DEVICE void leave_in_planes(Machine& m, const Shape& shape, const Arguments& a, const Tile& t,
                                 const float (&sums)[128]) {
  const int group = m.warp() / 4, thread = m.thread() % 128, lane = m.lane();
  float gain[2], bias[2];
  for (int i = 0; i < 2; ++i) {
    const int channel = t.row + group * kStep + sum_row(thread, 2 * i);
    const bool inside = channel < shape.channels;
    gain[i] = inside && a.gain ? m.load(a.gain + channel) : 1.0f;
    bias[i] = inside && a.pw_bias ? Value::unpack(m.load_one(a.pw_bias + channel)).first : 0.0f;
  }
  // Of the four 8 x 8 matrices of an instruction, lane / 8 says whose line a lane's address is for: two of rows in
  // turn, then two of columns, as the sums lie.
  static_assert(sum_row(0, 2) == 8 && sum_column(0, 4) == 8 && sum_column(0, 8) == 16);
  const int line = lane / 16 * 8 + lane % 8, chunk = m.warp() % 4 * 2 + lane / 8 % 2;
  const int at = kPlanesAt + group * kPanelBytes + swizzled(line, chunk);
#pragma unroll
  for (int first = 0; first < kPlaces; first += 16) {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* sum = sums + first / 2 + 2 * i;
      bits[i] = Value::pack(fmaf(gain[i % 2], sum[0], bias[i % 2]), fmaf(gain[i % 2], sum[1], bias[i % 2]));
    }
    if (first < shape.geometry.places()) m.store_transposed(at + first * kLineBytes, bits);
  }
}

template <class Value, class Machine>
SPIN_DEVICE void product_role(Machine& m, const Shape& shape, const Arguments& a) {
  const bool copies = m.thread() == 0;
  if (!shape.product) {
    if (copies) copy_planes(m, shape);
    return;
  }
  const int tiles = shape.tiles();
  Copies next{tiles, m.cluster(), tile_of(shape, m.cluster(), m.rank())};
  for (int i = 0; copies && i < kStages; ++i) copy_step(m, shape, next);
  m.sync_warp();  // products are for converged warps

  const int rows_at = m.warp() / 4 * kStep * kLineBytes;  // a warpgroup's 64 rows of W
  auto release = [&](int stage) {
    if (m.lane() < kCluster) m.arrive_at(empty(stage), m.lane());
    if (copies) copy_step(m, shape, next);
    m.sync_warp();
  };
  Ring ring;
  int planes_phase = 1;
  for (int tile = m.cluster(); tile < tiles; tile += m.clusters(), planes_phase ^= 1) {
    float sums[128];
    int used = 0;  // the stage whose products are in flight
    for (int step = 0; step < shape.steps(); ++step, ring.next()) {
      m.wait(full(ring.stage), ring.phase);
      m.begin_products(sums);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        m.multiply(sums, matrix_at(ring.stage) + rows_at + part * kPartBytes, tokens_at(ring.stage) + part * kPartBytes,
                   step + part > 0);
      }
      m.end_products();
      if (step > 0) {
        m.template wait_products<1>(sums);
        release(used);
      }
      used = ring.stage;
    }
    m.template wait_products<0>(sums);
    release(used);

    m.wait(kPlanesEmpty, planes_phase);
    leave_in_planes<Value>(m, shape, a, tile_of(shape, tile, m.rank()), sums);
    m.sync_warp();
    if (m.lane() == 0) m.arrive(kPlanesFull);
  }
}

// ---- depthwise: warps 8 to 15; a lane has two neighbouring channels, a warp every fourth segment of the rows ----

// A segment of a row of an image in the tile; advances to the next of a warp.
template <int kSegment>
struct Segment {
  int image, row, column;  // the first

  SPIN_DEVICE static Segment of(const Geometry& g, int number) { return Segment{0, 0, 0}.after(g, number); }
  SPIN_DEVICE Segment after(const Geometry& g, int segments) const {
    Segment s{image, row, column + segments * kSegment};
    while (s.column >= g.columns) s.column -= g.columns, ++s.row;
    while (s.row >= g.height) s.row -= g.height, ++s.image;
    return s;
  }
  SPIN_DEVICE int place(const Geometry& g) const { return (image * g.rows + row) * g.columns + column; }
};

// kWidth: that of the image where the code knows it, one segment then; 0: any, in segments of 8 columns.
template <class Value, int kKernel, int kWidth, class Machine>
struct Depthwise {
  static constexpr int kSegment = kWidth ? kWidth : 8, kPad = kKernel / 2, kGroups = kDepthwiseWarps / kPanels;
  static_assert(kSegment % 8 == 0);
  using Values = float[2 * kSegment];

  Machine& m;
  const Shape& shape;
  const Arguments& a;
  int panel, group;  // of the warp
  int channel;       // the lane's first
  bool inside;
  int image;  // the tile's first

  SPIN_DEVICE Pair pair_of(const float* vector) const {
    return inside ? Pair{m.load(vector + channel), m.load(vector + channel + 1)} : Pair{0, 0};
  }
  SPIN_DEVICE Pair pair_of(const uint16_t* vector) const {
    return inside && vector ? Value::unpack(m.load_two(vector + channel)) : Pair{0, 0};
  }
  // The lane's channels of column c of a line whose place is a whole number of 8: c may be negative.
  SPIN_DEVICE int at(int place, int c) const {
    return kPlanesAt + panel * kPanelBytes + place * kLineBytes + swizzled(c, m.lane() / 4) + m.lane() % 4 * 4;
  }
  SPIN_DEVICE bool in_row(const Segment<kSegment>& s, int c) const {
    return kWidth ? c >= 0 && c < kWidth : s.column + c >= 0 && s.column + c < shape.geometry.width;
  }
  // Of the lane's channels at a segment's first column, in a tensor of tokens x channels.
  SPIN_DEVICE int64_t token(const Segment<kSegment>& s) const {
    const Geometry& g = shape.geometry;
    return ((int64_t(image + s.image) * g.height + s.row) * g.width + s.column) * shape.channels + channel;
  }

  template <class Body>
  SPIN_DEVICE void each_segment(const Body& body) const {
    const Geometry& g = shape.geometry;
    for (auto s = Segment<kSegment>::of(g, group); s.image < g.images && image + s.image < shape.batch;
         s = s.after(g, kGroups)) {
      body(s);
    }
  }

  SPIN_DEVICE void store(const Segment<kSegment>& s, const Values& values) const {
    uint16_t* out = a.out + token(s);
#pragma unroll
    for (int c = 0; c < kSegment; ++c) {
      if (inside && in_row(s, c))
        m.store(out + int64_t(c) * shape.channels, Value::pack(values[2 * c], values[2 * c + 1]));
    }
  }

  // x from the pre-activations, in their place or to memory.
  SPIN_DEVICE void finish_product() const {
    const Pair scale = pair_of(a.pw_affine), shift = pair_of(a.pw_affine + shape.channels);
    each_segment([&](const Segment<kSegment>& s) {
      const int place = s.place(shape.geometry);
      Values values;
#pragma unroll
      for (int c = 0; c < kSegment; ++c) {
        const Pair sum = Value::unpack(m.shared(at(place, c)));
        values[2 * c] = sum.first, values[2 * c + 1] = sum.second;
      }
      activate(shape.activation, values);
#pragma unroll
      for (int c = 0; c < kSegment; ++c) {
        values[2 * c] = fmaf(values[2 * c], scale.first, shift.first);
        values[2 * c + 1] = fmaf(values[2 * c + 1], scale.second, shift.second);
      }
      if (shape.residual) {
        const uint16_t* y = a.residual + token(s);
#pragma unroll
        for (int c = 0; c < kSegment; ++c) {
          if (!inside || !in_row(s, c)) continue;
          const Pair more = Value::unpack(m.load_two(y + int64_t(c) * shape.channels));
          values[2 * c] += more.first, values[2 * c + 1] += more.second;
        }
      }
      if (!shape.depthwise) return store(s, values);
#pragma unroll
      for (int c = 0; c < kSegment; ++c) {
        m.set_shared(at(place, c), Value::pack(values[2 * c], values[2 * c + 1]));
      }
    });
  }

  SPIN_DEVICE void convolve() const {
    const Geometry& g = shape.geometry;
    const Pair scale = pair_of(a.dw_affine), shift = pair_of(a.dw_affine + shape.channels), bias = pair_of(a.dw_bias);
    const int panels = ceil_div(shape.channels, kStep), own = channel / kStep;  // a tile may go past the last
    const uint16_t* taps = a.taps + int64_t(own < panels ? own : 0) * kKernel * kKernel * kStep + 2 * m.lane();
    each_segment([&](const Segment<kSegment>& s) {
      const int place = s.place(g);
      Values values;
#pragma unroll
      for (int c = 0; c < kSegment; ++c) values[2 * c] = bias.first, values[2 * c + 1] = bias.second;
      const int first = s.row < kPad ? kPad - s.row : 0;
      const int end = s.row + kPad < g.height ? kKernel : g.height + kPad - s.row;
#pragma unroll 1
      for (int i = first; i < end; ++i) {
        add_row(s, place + (i - kPad) * g.columns, taps + i * kKernel * kStep, values);
      }
      activate(shape.activation, values);
#pragma unroll
      for (int c = 0; c < kSegment; ++c) {
        const Pair x = Value::unpack(m.shared(at(place, c)));
        values[2 * c] = fmaf(values[2 * c], scale.first, shift.first) + x.first;
        values[2 * c + 1] = fmaf(values[2 * c + 1], scale.second, shift.second) + x.second;
      }
      store(s, values);
    });
  }

  // The lane's row of taps over the row of x at `place`: body(x, tap, column) for every tap that a column has, as bits.
  template <class Body>
  SPIN_DEVICE void each_tap(const Segment<kSegment>& s, int place, const uint16_t* row, const Body& body) const {
    uint32_t taps[kKernel];
#pragma unroll
    for (int j = 0; j < kKernel; ++j) taps[j] = m.load_two(row + j * kStep);
#pragma unroll
    for (int c = -kPad; c < kSegment + kPad; ++c) {
      if (kWidth && !in_row(s, c)) continue;
      const uint32_t x = in_row(s, c) ? m.shared(at(place, c)) : 0;
#pragma unroll
      for (int j = 0; j < kKernel; ++j) {
        const int to = c + kPad - j;
        if (to >= 0 && to < kSegment) body(x, taps[j], to);
      }
    }
  }

  SPIN_DEVICE void add_row(const Segment<kSegment>& s, int place, const uint16_t* row, Values& values) const {
    if constexpr (kKernel >= Value::kPackedKernel) {
      uint32_t sums[kSegment] = {};
      each_tap(s, place, row, [&](uint32_t x, uint32_t tap, int c) { sums[c] = Value::multiply_add(x, tap, sums[c]); });
#pragma unroll
      for (int c = 0; c < kSegment; ++c) {
        const Pair sum = Value::unpack(sums[c]);
        values[2 * c] += sum.first, values[2 * c + 1] += sum.second;
      }
    } else {
      each_tap(s, place, row, [&](uint32_t x, uint32_t tap, int c) {
        const Pair a = Value::unpack(x), b = Value::unpack(tap);
        values[2 * c] = fmaf(a.first, b.first, values[2 * c]);
        values[2 * c + 1] = fmaf(a.second, b.second, values[2 * c + 1]);
      });
    }
  }
};

template <class Value, int kKernel, int kWidth, class Machine>
SPIN_DEVICE void depthwise_role(Machine& m, const Shape& shape, const Arguments& a) {
  const int warp = m.warp() - kProductWarps, panel = warp % kPanels, group = warp / kPanels;
  int phase = 0;
  for (int tile = m.cluster(); tile < shape.tiles(); tile += m.clusters(), phase ^= 1) {
    const Tile t = tile_of(shape, tile, m.rank());
    const int channel = t.row + panel * kStep + 2 * m.lane();
    const Depthwise<Value, kKernel, kWidth, Machine> work{
        m, shape, a, panel, group, channel, channel < shape.channels, t.image};
    m.wait(kPlanesFull, phase);
    if (shape.product) work.finish_product();
    if (shape.product && shape.depthwise) m.sync_panel(panel);
    if (shape.depthwise) work.convolve();
    if (!shape.product) m.fence_copies();  // the next one writes where this read
    m.sync_warp();
    if (m.lane() == 0) m.arrive(kPlanesEmpty);
  }
}

}  // namespace spin::hopper
