#include "network.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "workspace.h"

namespace spin {

// ---- layout of the packed memory ----

Network::Network(const Kernels& kernels, NetworkShape shape, int64_t slots, MatrixForm form)
    : kernels_(&kernels), shape_(std::move(shape)), form_(form) {
  const NetworkShape& s = shape_;
  const int64_t channels = padded(s.channels);
  quartered_ = form == MatrixForm::kQuarters && kernels.token_sums && s.channels % (2 * kernels.line_channels) == 0 &&
               s.channels >= kStrassenChannels;
  auto place = [&](int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += round_up(bytes, kCacheLine);
    return offset;
  };
  taps_ = place(s.filters * channels * s.kernel_size * s.kernel_size * 4);
  dw_bias_ = place(s.filters * channels * 4);
  dw_affine_ = place(s.depth * 2 * channels * 4);
  pw_bias_ = place(s.matrices * channels * 4);
  pw_gain_ = place(s.depth * channels * 4);
  pw_affine_ = place(s.depth * 2 * channels * 4);
  matrices_ = place(slots * pointwise_bytes());
  const int64_t ends = s.whole();
  stem_ = place(ends * matrix_bytes(patch_inputs(), s.channels));
  stem_vectors_ = place(ends * 4 * channels * 4);
  head_ = place(ends * matrix_bytes(s.channels, s.classes));
  head_vectors_ = place(ends * 4 * padded(s.classes) * 4);
}

int64_t Network::row_stride(int64_t inputs) const { return round_up(inputs * size_of(kernels_->operand), kCacheLine); }

int64_t Network::matrix_bytes(int64_t inputs, int64_t outputs) const {
  return form_ == MatrixForm::kRows ? outputs * row_stride(inputs) : vectors(outputs) * vector_bytes(inputs);
}

// ---- packing ----

namespace {

// `count` scalars as floats, zero-padded; without data all are `otherwise`.
void copy_vector(const char* from, DType type, int64_t count, float otherwise, int64_t padded, float* to) {
  if (from && type == DType::kFloat32) {
    std::memcpy(to, from, count * 4);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from ? load_scalar(from, type, i) : otherwise;
  }
  std::fill(to + count, to + padded, 0.f);
}
void copy_vector(const float* from, int64_t count, float otherwise, int64_t padded, float* to) {
  copy_vector(reinterpret_cast<const char*>(from), DType::kFloat32, count, otherwise, padded, to);
}
const char* offset(const char* data, DType type, int64_t elements) {
  return data ? data + elements * size_of(type) : nullptr;
}
const float* offset(const float* data, int64_t elements) { return data ? data + elements : nullptr; }

}  // namespace

void Network::pack_parameters(const MixerWeights& w, int64_t item) const {
  const int64_t channels = shape_.channels, stride = padded(channels);
  if (item < shape_.filters) {
    const int64_t area = shape_.kernel_size * shape_.kernel_size;
    kernels_->pack_taps(offset(w.dw_weight, w.type, item * channels * area), w.type, channels, area,
                        floats(taps_) + item * stride * area);
    copy_vector(offset(w.dw_bias, w.type, item * channels), w.type, channels, 0.f, stride,
                floats(dw_bias_) + item * stride);
    return;
  }
  const int64_t d = item - shape_.filters;
  if (d >= shape_.depth) {
    const int64_t matrix = d - shape_.depth;
    return copy_vector(offset(w.pw_bias, w.type, matrix * channels), w.type, channels, 0.f, stride,
                       floats(pw_bias_) + matrix * stride);
  }
  for (int64_t i = 2 * d; i < 2 * d + 2; ++i) {
    copy_vector(w.dw_affine + i * channels, channels, 0.f, stride, floats(dw_affine_) + i * stride);
    copy_vector(w.pw_affine + i * channels, channels, 0.f, stride, floats(pw_affine_) + i * stride);
  }
  copy_vector(offset(w.pw_gain, d * channels), channels, 1.f, stride, floats(pw_gain_) + d * stride);
}

// The rows of a whole matrix in, one panel of it out.
void Network::pack_panel(PackRowsArgs rows, int64_t panel, char* matrix) const {
  const Panels panels = this->panels(rows.rows);
  const int64_t lanes = kernels_->lanes, lines = this->lines(rows.columns), first = panels.begin(panel) * lanes;
  rows.source += first * rows.columns * size_of(rows.type);
  rows.rows = std::min(panels.begin(panel + 1) * lanes, rows.rows) - first;
  rows.row_stride = row_stride(rows.columns);
  Workspace copy(rows.rows * rows.row_stride);
  rows.to = copy.data();
  kernels_->pack_rows(rows);
  for (int64_t line = 0; line < lines; ++line) {
    kernels_->pack_panels({copy.data() + line * kernels_->line_bytes, rows.row_stride, rows.rows, line, lines,
                           matrix + panels.begin(panel) * vector_bytes(rows.columns)});
  }
}

// The same of all quarters and sums of quarters (strassen.h).
void Network::pack_quarters(PackRowsArgs rows, int64_t panel, char* matrix) const {
  const Panels panels = quarter_panels();
  const int64_t vectors = panels.begin(panel + 1) - panels.begin(panel), first = panels.begin(panel) * kernels_->lanes;
  const int64_t half = rows.columns / 2, lines = this->lines(half), stride = row_stride(rows.columns);
  const char* source = rows.source;
  rows.rows = vectors * kernels_->lanes;
  rows.row_stride = stride;
  Workspace halves(2 * rows.rows * stride), quarter(rows.rows * stride);
  for (int64_t i : {0, 1}) {
    rows.source = source + (i * half + first) * rows.columns * size_of(rows.type);
    rows.to = halves.data() + i * rows.rows * stride;
    kernels_->pack_rows(rows);
  }
  char* to = matrix + kQuarters * quarter_bytes(panels.begin(panel));
  for (int q = 0; q < kQuarters; ++q, to += quarter_bytes(vectors)) {
    for (int64_t r = 0; r < rows.rows; ++r) {
      const auto* upper = reinterpret_cast<const float*>(halves.data() + r * stride);
      const auto* lower = reinterpret_cast<const float*>(halves.data() + (rows.rows + r) * stride);
      auto* sum = reinterpret_cast<float*>(quarter.data() + r * stride);
      for (int64_t c = 0; c < half; ++c) {
        const float w11 = upper[c], w12 = upper[half + c], w21 = lower[c], w22 = lower[half + c];
        const float s1 = w21 + w22, s2 = s1 - w11, s3 = w11 - w21, s4 = w12 - s2;
        const float all[kQuarters] = {w11, w12, s2, s3, s1, s4, w22, w21};
        sum[c] = all[q];
      }
    }
    for (int64_t line = 0; line < lines; ++line) {
      kernels_->pack_panels({quarter.data() + line * kernels_->line_bytes, stride, rows.rows, line, lines, to});
    }
  }
}

void Network::pack_matrix(const MixerWeights& w, int64_t matrix, int64_t slot, int64_t item) const {
  const int64_t channels = shape_.channels;
  const bool composed = w.pw_coefficients != nullptr;
  char* to = at(matrices_) + slot * pointwise_bytes();
  PackRowsArgs rows{
      .source = offset(w.pw_weight, w.type, composed ? 0 : matrix * channels * channels),
      .type = w.type,
      .templates = composed ? w.templates : 1,
      .template_stride = channels * channels,
      .coefficients = composed ? w.pw_coefficients + matrix * w.templates : nullptr,
      .rows = channels,
      .columns = channels,
      .to = to,
      .row_stride = row_stride(channels),
  };
  if (quartered_) return pack_quarters(rows, item, to);
  if (form_ != MatrixForm::kRows) return pack_panel(rows, item, to);
  const int64_t first = item * kernels_->lanes;
  rows.source += first * channels * size_of(w.type);
  rows.rows = std::min(kernels_->lanes, channels - first);
  rows.to += first * rows.row_stride;
  kernels_->pack_rows(rows);
}

void Network::pack_ends(const EndWeights& w) const {
  struct End {
    const char *weight, *bias;
    const float* affine;
    int64_t inputs, outputs, matrix, vectors;
  };
  for (const End& end :
       {End{w.patch_weight, w.patch_bias, w.patch_affine, patch_inputs(), shape_.channels, stem_, stem_vectors_},
        End{w.head_weight, w.head_bias, nullptr, shape_.channels, shape_.classes, head_, head_vectors_}}) {
    const int64_t stride = padded(end.outputs);
    float* to = floats(end.vectors);
    copy_vector(end.bias, shape_.type, end.outputs, 0.f, stride, to);
    copy_vector(nullptr, end.outputs, 1.f, stride, to + stride);
    copy_vector(end.affine, end.outputs, 1.f, stride, to + 2 * stride);
    copy_vector(offset(end.affine, end.outputs), end.outputs, 0.f, stride, to + 3 * stride);
    const PackRowsArgs rows{
        .source = end.weight,
        .type = shape_.type,
        .templates = 1,
        .template_stride = 0,
        .coefficients = nullptr,
        .rows = end.outputs,
        .columns = end.inputs,
        .to = nullptr,
        .row_stride = 0,
    };
    for (int64_t panel = 0; panel < panels(end.outputs).count; ++panel) pack_panel(rows, panel, at(end.matrix));
  }
}

// ---- reading ----

Network::Depthwise Network::depthwise(int64_t block, int64_t line) const {
  const int64_t stride = padded(shape_.channels), channel = line * kernels_->line_channels;
  const int64_t filter = shape_.dw_index[block], area = shape_.kernel_size * shape_.kernel_size;
  return {floats(taps_) + (filter * stride + channel) * area, floats(dw_bias_) + filter * stride + channel,
          floats(dw_affine_) + 2 * block * stride + channel, floats(dw_affine_) + (2 * block + 1) * stride + channel};
}

Pointwise Network::pointwise(int64_t block, int64_t slot) const {
  const int64_t channels = shape_.channels, stride = padded(channels);
  return {at(matrices_) + slot * pointwise_bytes(),
          form_ == MatrixForm::kRows ? row_stride(channels) : 0,
          channels,
          channels,
          quartered_,
          floats(pw_bias_) + shape_.pw_index[block] * stride,
          floats(pw_gain_) + block * stride,
          floats(pw_affine_) + 2 * block * stride,
          floats(pw_affine_) + (2 * block + 1) * stride};
}

Pointwise Network::pointwise(int64_t block, const MixerWeights& w) const {
  Pointwise p = pointwise(block, 0);
  p.row_stride = shape_.channels * size_of(w.type);
  p.matrix = w.pw_weight + shape_.pw_index[block] * shape_.channels * p.row_stride;
  return p;
}

bool Network::reads(const Kernels& kernels, const NetworkShape& shape, const MixerWeights& w) {
  return !w.pw_coefficients && w.type == kernels.operand && shape.channels * size_of(w.type) % kUnitBytes == 0;
}

Pointwise Network::stem() const {
  const int64_t stride = padded(shape_.channels);
  const float* v = floats(stem_vectors_);
  return {at(stem_), 0, patch_inputs(), shape_.channels, false, v, v + stride, v + 2 * stride, v + 3 * stride};
}

Pointwise Network::head() const {
  const int64_t stride = padded(shape_.classes);
  const float* v = floats(head_vectors_);
  return {at(head_), 0, shape_.channels, shape_.classes, false, v, v + stride, v + 2 * stride, v + 3 * stride};
}

// ---- blobs ----

namespace {

struct BlobHeader {
  char magic[8];
  char isa[16];
  int64_t bytes;
  int64_t channels, kernel_size, depth, filters, matrices;
  int64_t in_channels, patch, patch_stride, patch_padding, classes;
  int64_t activation, pw_residual, type;
  // followed by dw_index, pw_index
};
constexpr char kMagic[8] = {'S', 'P', 'I', 'N', 'P', 'K', '0', '4'};

int64_t header_bytes(int64_t depth) { return round_up(int64_t(sizeof(BlobHeader)) + 2 * depth * 8, kCacheLine); }

[[noreturn]] void refuse(const char* reason) {
  throw std::runtime_error(std::string("packed: expected the result of freeze() of this version, got ") + reason +
                           "; freeze the model again");
}

}  // namespace

int64_t blob_bytes(const Network& network) { return header_bytes(network.shape().depth) + network.bytes(); }

void write_blob_header(const Network& network, char* blob) {
  const NetworkShape& s = network.shape();
  BlobHeader h{};
  std::memcpy(h.magic, kMagic, sizeof(kMagic));
  std::strncpy(h.isa, network.kernels().name, sizeof(h.isa) - 1);
  h.bytes = blob_bytes(network);
  h.channels = s.channels, h.kernel_size = s.kernel_size, h.depth = s.depth;
  h.filters = s.filters, h.matrices = s.matrices;
  h.in_channels = s.in_channels, h.patch = s.patch, h.patch_stride = s.patch_stride;
  h.patch_padding = s.patch_padding, h.classes = s.classes;
  h.activation = int64_t(s.activation), h.pw_residual = s.pw_residual, h.type = int64_t(s.type);
  std::memset(blob, 0, header_bytes(s.depth));
  std::memcpy(blob, &h, sizeof(h));
  std::copy(s.dw_index.begin(), s.dw_index.end(), reinterpret_cast<int64_t*>(blob + sizeof(h)));
  std::copy(s.pw_index.begin(), s.pw_index.end(), reinterpret_cast<int64_t*>(blob + sizeof(h)) + s.depth);
}

Network open_blob(char* blob, int64_t bytes) {
  BlobHeader h;
  if (bytes < int64_t(sizeof(h))) refuse("too few bytes");
  std::memcpy(&h, blob, sizeof(h));
  if (std::memcmp(h.magic, kMagic, sizeof(kMagic)) != 0) refuse("something else");
  // Every field is bounded before it enters a product, so no size can overflow.
  auto within = [](int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) refuse("a damaged header");
  };
  constexpr int64_t kMany = int64_t(1) << 20;
  within(h.channels, 1, kMaxChannels);
  within(h.kernel_size, 1, kMaxKernelSize);
  within(h.depth, 0, kMany);
  within(h.filters, 0, kMany);
  within(h.matrices, 0, kMany);
  const int64_t whole = h.patch != 0;  // with patch embedding and classifier
  within(h.in_channels, whole, whole * kMaxChannels);
  within(h.patch, 0, 1024);
  within(h.patch_stride, whole, whole * kMany);
  within(h.patch_padding, 0, whole * kMany);
  within(h.classes, whole, whole * kMany);
  within(h.activation, 0, int64_t(Activation::kIdentity));
  within(h.pw_residual, 0, 1);
  within(h.type, 0, int64_t(DType::kFloat16));
  within(h.bytes, header_bytes(h.depth), bytes);
  h.isa[sizeof(h.isa) - 1] = 0;
  NetworkShape s{
      .channels = h.channels,
      .kernel_size = h.kernel_size,
      .depth = h.depth,
      .filters = h.filters,
      .matrices = h.matrices,
      .dw_index = {},
      .pw_index = {},
      .activation = Activation(h.activation),
      .pw_residual = h.pw_residual != 0,
      .type = DType(h.type),
      .in_channels = h.in_channels,
      .patch = h.patch,
      .patch_stride = h.patch_stride,
      .patch_padding = h.patch_padding,
      .classes = h.classes,
  };
  const int64_t* index = reinterpret_cast<const int64_t*>(blob + sizeof(h));
  s.dw_index.assign(index, index + h.depth);
  s.pw_index.assign(index + h.depth, index + 2 * h.depth);
  for (int64_t d = 0; d < h.depth; ++d) {
    within(s.dw_index[d], 0, h.filters - 1);
    within(s.pw_index[d], 0, h.matrices - 1);
  }
  const std::vector<std::string> isas = available_isas();
  if (std::find(isas.begin(), isas.end(), h.isa) == isas.end()) refuse("weights packed for another processor");
  const MatrixForm form = frozen_form(s);
  Network network(select_kernels(s.type, h.isa), std::move(s), h.matrices, form);
  if (h.bytes != bytes || blob_bytes(network) != bytes) refuse("a wrong number of bytes");
  network.bind(blob + header_bytes(h.depth));
  return network;
}

}  // namespace spin
