// One level of Strassen's product, in Winograd's form, for the pointwise matrices of a frozen network: seven products
// of quarters instead of eight.
//
//     W = W11 W12   W: halves of the output channels by halves of the input channels
//         W21 W22
//     Y = Y11 Y12   Y: halves of the input channels by halves of the tokens of a cut of an image (some of its rows; of
//         Y21 Y22      an odd number with a token of zeros behind them)
//
//     S1 = W21 + W22   S2 = S1 - W11   S3 = W11 - W21   S4 = W12 - S2      once, by freeze()
//     T1 = Y12 - Y11   T2 = Y22 - T1   T3 = Y22 - Y12   T4 = Y21 - T2      by the thread that makes Y
//
//     U = W11 Y11 + S2 T2        W Y = W11 Y11 + W12 Y21     U + S1 T1 + S4 Y22
//     U' = U + S3 T3                   U' + W22 T4           U' + S1 T1
//
// Sums of products stay with the tile that makes them: a step takes them from, and leaves them in, one of two buffers
// of a panel's size ("kept"), or finishes them. A step does all cuts that a thread has, while its quarter is in L2.
//
// Quarters of Y and T lie one after the other, and a line of one has that half of every cut that a thread has (of a
// group that threads share: of every cut of it, of which a step takes one): it reads nothing else of its lines, so what
// hardware fetches ahead is what comes next. With each cut's Y and T by themselves, both halves in a line, hardware
// fetched the half that the step does not read, too; of seven quarters that barely fit 2 MB of L2 beside panels that
// was too much. Frozen networks on an Emerald Rapids, in turns, time of this / of that at batch 8 and 1: 1024/20 0.935
// and 0.97, 768/32 0.95 and 0.985, 256/8 0.98 and 0.99 (a part of it: sum_up in product.h). The product alone, cuts of
// 64 tokens: 768 channels reach 90 % of the multiply-adds' rate instead of 84, 1024 88 instead of 81. Every step for
// several panels before the next, so that a quarter is read once for all of them, would bring another 1 to 2 % there,
// for buffers as large as the quarter; not done.
//
// The depthwise leaves Y in quarters itself, half of a line's tokens in each. With its lines in a buffer first, and
// quarters copied from there, stores that miss L1 came in bursts of 200, which hold up the next line: 256/8 takes 0.985
// (batch 1) and 0.989 (batch 8) of that, 768/32 and 1024/20 1.00. (Sums of one pair made between rows of the next pair:
// 0.99 to 1.00, for more code.)
//
// Cost: 7/8 of the multiply-adds; 2 % of their number again in vectors kept and taken; sums of Y another 1 %. Memory:
// with the quarter that only a plain product needs, which images of few tokens get, twice the matrix. Time of whole
// networks, medians in turns: 768/32 and 1024/20 on a Zen 5 processor at batch 8 0.92 to 0.96, with AVX2 kernels there
// 0.95 to 0.96; chains of 256, 384 and 512 channels on a Zen 4 0.94, 0.93 and 0.91, of 768 with 32 x 32 or 7 x 7 tokens
// 0.90 and 0.91. Of no help: asking for the next tile's tokens ahead, several panels per step, panels of three vectors
// where an even number of them is narrower. Cuts of 64, 128 and 256 tokens are equally fast.
//
// Numerics: the error of a part of the output grows with all of W and Y, not with its own row and column. So only
// between the ends of a whole network, whose logits mix all tokens of an image anyway, never across images, and in
// float32, with sums of 64 channels that are then added up: of 256, 1024/20's logits on photographs are wrong by
// 1.4e-5, of 128 by 1.05e-5, of 64 by 0.93e-5 (plain product 0.82e-5, eager PyTorch 1.0e-5), 768/32's by 6.6e-7
// (6.2e-7, 7.3e-7). In bfloat16 Strassen's own sums of two cost 1.1 to 1.4 times the error of the logits, for 0.94
// to 1.1 of the time.
#pragma once
#include <initializer_list>

#include "kernels.h"

namespace spin {

// Quarters of a matrix, and sums of them, in the order in which they lie in memory.
enum Quarter { kW11, kW12, kS2, kS3, kS1, kS4, kW22, kW21, kQuarters };

// Where an operand or a result lies: one of the quarters of Y (and of the output), or of T.
struct Place {
  int number;
  constexpr int channel_half() const { return number / 2 % 2; }
  constexpr int token_half() const { return number % 2; }
};
constexpr Place k11{0}, k12{1}, k21{2}, k22{3}, kT1{4}, kT2{5}, kT3{6}, kT4{7};
constexpr int64_t kTokenQuarters = 8;

// kept[from] plus the product goes to kept[keep], kept[base] plus the product is the output's. -1: from zero; not.
struct QuarterStep {
  Quarter weights;
  Place input;
  int from = -1, keep = -1, base = -1;
  Place output = k11;
};

constexpr QuarterStep kStrassenSteps[] = {
    {.weights = kW11, .input = k11, .keep = 0},
    {.weights = kW12, .input = k21, .base = 0, .output = k11},
    {.weights = kS2, .input = kT2, .from = 0, .keep = 0},
    {.weights = kS3, .input = kT3, .from = 0, .keep = 1},
    {.weights = kS1, .input = kT1, .from = 0, .keep = 0, .base = 1, .output = k22},
    {.weights = kS4, .input = k22, .base = 0, .output = k12},
    {.weights = kW22, .input = kT4, .base = 1, .output = k21},
};

// The plain product of the same matrix; the first half of the tokens is all of them.
constexpr QuarterStep kPlainSteps[] = {
    {.weights = kW11, .input = k11, .keep = 0},
    {.weights = kW12, .input = k21, .base = 0, .output = k11},
    {.weights = kW22, .input = k21, .keep = 0},
    {.weights = kW21, .input = k11, .base = 0, .output = k21},
};

// Quarters of a line of Y and of its partner, half of the lines further, are there; T is not.
struct TokenSumsArgs {
  int64_t tokens;
  char* quarters;  // a line of the first; the others follow, each `stride` bytes after the one before
  int64_t stride;
};

// The cuts of an image, the same whoever takes them, so that results do not depend on threads. Up to four of 64 tokens
// or more, if rows allow, then of 128; in halves of fewer than 16, tiles would not be full: 0.
inline int64_t strassen_cuts(int64_t height, int64_t width) {
  int64_t cuts = 1;
  while (2 * cuts <= height && height * width >= 2 * cuts * (cuts < 4 ? 64 : 128)) cuts *= 2;
  return height * width >= 32 ? cuts : 0;
}

template <class V>
void token_sums(const TokenSumsArgs& a) {
  constexpr int64_t kLineBytes = V::kLanes * sizeof(float);
  auto at = [&a](Place place, int64_t token) { return a.quarters + place.number * a.stride + token * kLineBytes; };
  const int64_t half = ceil_div(a.tokens, 2);
  if (a.tokens % 2) {
    for (const Place place : {k12, k22}) V::store(at(place, half - 1), V::zero());
  }
  for (int64_t t = 0; t < half; ++t) {
    const auto y11 = V::load(at(k11, t)), y12 = V::load(at(k12, t)), y21 = V::load(at(k21, t)),
               y22 = V::load(at(k22, t));
    const auto t1 = V::sub(y12, y11), t2 = V::sub(y22, t1);
    V::store(at(kT1, t), t1);
    V::store(at(kT2, t), t2);
    V::store(at(kT3, t), V::sub(y22, y12));
    V::store(at(kT4, t), V::sub(y21, t2));
  }
}

}  // namespace spin
