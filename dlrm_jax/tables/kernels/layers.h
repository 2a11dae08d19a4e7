// Layers of an MLP on a CPU, for score.cc: products of float32, or of codes of 8 bits, then bias, norm and activation.
//
// Every number is summed in an order that depends on the layer alone, not on how many rows come together.

#pragma once

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

// As serving/artifact/native.py has them.
extern "C" {

// What NumPy says of an array: where it lies, its dtype's `str` as a number (Type), numbers, and bytes between numbers.
struct Array {
  const void* data;
  int64_t type, rows, columns, row_stride, column_stride;
};

// y = x W + b, W (in, out) in panels of kPanel columns, (in, kPanel) each; columns beyond `out`, and of the bias, are 0.
// Then a layer norm, if it has data: (2, out), what is multiplied with and what is added. Then the activation; `slope`
// is that of kPrelu below 0.
// If `codes` has data it stands for W, column j of which is scales[j] times codes of -127 to 127; sums[j] is the sum of
// that column's codes. Of a panel a row has kGroup rows of W: kPanel times as many codes of each column.
struct Layer {
  Array panels, bias, norm, codes, scales, sums;
  int64_t in, out, activation;
  float slope;
};

}  // extern "C"

namespace {

// Lanes of a vector register, and rows of a tile, whose sums of two registers a row stay in the processor's 16 or 32.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 8;
#else
constexpr int kLanes = 4, kTileRows = 6;
#endif
constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kGroup = 4;               // Codes that one instruction multiplies and adds in each lane.
constexpr int64_t kMostCoded = 1 << 16;     // Inputs of a layer of codes: sums of 255 times 127 stay in 32 bits.
constexpr int64_t kWidest = 1 << 20;        // So that no product of widths overflows.
constexpr double kNormEpsilon = 1e-5;       // NORM_EPSILON of config.
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr bool kHasByteProducts = true;
#else
constexpr bool kHasByteProducts = false;
#endif

typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

typedef uint8_t ByteLanes __attribute__((vector_size(kLanes)));

enum Activation : int64_t { kNone, kRelu, kGelu, kSilu, kPrelu };

inline int64_t Padded(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }
inline int64_t Groups(int64_t in) { return (in + kGroup - 1) / kGroup; }

inline const float* Floats(const Array& array) { return static_cast<const float*>(array.data); }

// What follows decides what may be read: whoever calls is not believed.

constexpr int64_t Type(char order, char kind, char bytes) { return order | kind << 8 | bytes << 16; }
constexpr int64_t kFloats = Type('<', 'f', '4'), kInts = Type('<', 'i', '4'), kLongs = Type('<', 'i', '8');
constexpr int64_t kCodes = Type('|', 'i', '1');

inline bool Within(int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; }

// Whether an array has so many numbers of that type, one behind the other.
bool Holds(const Array& array, int64_t type, int64_t rows, int64_t columns) {
  const int64_t bytes = (type >> 16) - '0';
  if (array.type != type || array.rows != rows || array.columns != columns || rows < 0 || columns < 0) return false;
  if (rows == 0 || columns == 0) return true;
  return array.data != nullptr && reinterpret_cast<uintptr_t>(array.data) % bytes == 0 &&
         (columns == 1 || array.column_stride == bytes) && (rows == 1 || array.row_stride == columns * bytes);
}

// Whether a layer has the weights of its sizes, which are known to be sizes.
bool HoldsWeights(const Layer& layer) {
  const int64_t columns = Padded(layer.out), panels = columns / kPanel;
  if (layer.codes.data == nullptr) return Holds(layer.panels, kFloats, panels * layer.in, kPanel);
  return layer.in <= kMostCoded && Holds(layer.codes, kCodes, panels * Groups(layer.in), kPanel * kGroup) &&
         Holds(layer.scales, kFloats, 1, columns) && Holds(layer.sums, kInts, 1, columns);
}

// Whether the layers take `in` numbers and give `out`.
bool Chained(const Layer* layers, int64_t count, int64_t in, int64_t out) {
  for (int64_t i = 0; i < count; in = layers[i++].out) {
    const Layer& layer = layers[i];
    if (layer.in != in || !Within(layer.out, 1, kWidest) || !HoldsWeights(layer)) return false;
    if (!Holds(layer.bias, kFloats, 1, Padded(layer.out))) return false;
    if (layer.norm.data != nullptr && !Holds(layer.norm, kFloats, 2, layer.out)) return false;
    if (!Within(layer.activation, kNone, kPrelu)) return false;
  }
  return in == out;
}

// A layer's input, row by row.
struct FloatRows {
  const float* x;
  int64_t stride;
  FloatRows From(int64_t row) const { return {x + row * stride, stride}; }
};

// The same in codes of 0 to 255, Groups(in) * kGroup of them: a number is scale (code - zero), of its row's scale and zero.
struct CodedRows {
  const uint8_t* codes;
  int64_t stride;
  const float* scale;
  const int32_t* zero;
  CodedRows From(int64_t row) const { return {codes + row * stride, stride, scale + row, zero + row}; }
};

inline void Write(Lanes sum, bool relu, float* y) {
  const Lanes zero = {};
  *reinterpret_cast<Lanes*>(y) = relu ? (sum < zero ? zero : sum) : sum;
}

inline bool EndsWithRelu(const Layer& layer) { return layer.activation == kRelu && layer.norm.data == nullptr; }

// R rows of x times P panels of the layer, from `panel` on.
template <int R, int P>
void Tile(FloatRows x, const Layer& layer, int64_t panel, float* y, int64_t y_stride) {
  constexpr int kSums = 2 * P;
  const float* weights = Floats(layer.panels) + panel * layer.in * kPanel;
  Lanes sums[R][kSums];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) {
      sums[r][j] = *reinterpret_cast<const Lanes*>(Floats(layer.bias) + panel * kPanel + j * kLanes);
    }
  }
  for (int64_t k = 0; k < layer.in; ++k) {
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) {
      const float* place = weights + (j / 2) * layer.in * kPanel + k * kPanel + (j % 2) * kLanes;
      const Lanes w = *reinterpret_cast<const Lanes*>(place);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][j] += x.x[r * x.stride + k] * w;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) {
      Write(sums[r][j], EndsWithRelu(layer), y + r * y_stride + panel * kPanel + j * kLanes);
    }
  }
}

// sum plus, in each lane, the products of the four codes in `x` with that lane's four of `weights`.
inline IntLanes AddProducts(IntLanes sum, int32_t x, const int8_t* weights) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<IntLanes>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(x), _mm512_loadu_si512(weights)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
  return reinterpret_cast<IntLanes>(
      _mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), _mm256_set1_epi32(x), w));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < kGroup; ++i) sum[lane] += (x >> 8 * i & 255) * weights[lane * kGroup + i];
  }
  return sum;
#endif
}

// sum_k scale (code_k - zero) w_k = scale (sum_k code_k w_k - zero sum_k w_k): what is summed are whole numbers.
template <int R, int P>
void Tile(CodedRows x, const Layer& layer, int64_t panel, float* y, int64_t y_stride) {
  constexpr int kSums = 2 * P;
  constexpr int64_t kRow = kPanel * kGroup;
  const int64_t groups = Groups(layer.in);
  const int8_t* weights = static_cast<const int8_t*>(layer.codes.data) + panel * groups * kRow;
  IntLanes sums[R][kSums] = {};
  for (int64_t g = 0; g < groups; ++g) {
    int32_t four[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_memcpy(&four[r], x.codes + r * x.stride + g * kGroup, kGroup);
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) {
      const int8_t* place = weights + (j / 2) * groups * kRow + g * kRow + (j % 2) * kLanes * kGroup;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][j] = AddProducts(sums[r][j], four[r], place);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kSums; ++j) {
    const int64_t column = panel * kPanel + j * kLanes;
    const IntLanes of_column = *reinterpret_cast<const IntLanes*>(static_cast<const int32_t*>(layer.sums.data) + column);
    const Lanes scale = *reinterpret_cast<const Lanes*>(Floats(layer.scales) + column);
    const Lanes bias = *reinterpret_cast<const Lanes*>(Floats(layer.bias) + column);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes sum = __builtin_convertvector(sums[r][j] - x.zero[r] * of_column, Lanes);
      Write(sum * (x.scale[r] * scale) + bias, EndsWithRelu(layer), y + r * y_stride + column);
    }
  }
}

template <typename X>
using TileFunction = void (*)(X, const Layer&, int64_t, float*, int64_t);

template <typename X, int... R>
constexpr TileFunction<X> TileOf(std::integer_sequence<int, R...>, int64_t rows) {
  constexpr TileFunction<X> tiles[] = {Tile<R + 1, 1>...};
  return tiles[rows - 1];
}

// (rows, in) to (rows, Padded(out)). Few rows take several panels at a time: a sum waits for its last addition, and
// there must be others meanwhile.
template <typename X>
void Apply(const Layer& layer, X x, int64_t rows, float* y, int64_t y_stride) {
  const int64_t panels = Padded(layer.out) / kPanel, groups = (rows + kTileRows - 1) / kTileRows;
  for (int64_t panel = 0, step; panel < panels; panel += step) {
    step = rows == 1 && panel + 4 <= panels ? 4 : rows == 2 && panel + 2 <= panels ? 2 : 1;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = rows * group / groups, count = rows * (group + 1) / groups - first;
      TileFunction<X> tile = TileOf<X>(std::make_integer_sequence<int, kTileRows>(), count);
      if (step == 4) tile = Tile<1, 4>;
      if (step == 2) tile = Tile<2, 2>;
      tile(x.From(first), layer, panel, y + first * y_stride, y_stride);
    }
  }
}

// A row of a layer's input in codes: its least number, or 0, is code 0, its largest, or 0, code 255. A row with NaN or
// infinity has a scale of NaN, and so no score.
void Encode(const float* x, int64_t in, uint8_t* codes, float* scale, int32_t* zero) {
  Lanes least = {}, most = {}, checked = {};
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    const Lanes v = *reinterpret_cast<const Lanes*>(x + i);
    least = v < least ? v : least;
    most = v > most ? v : most;
    checked += v * 0.0f;
  }
  float low = 0, high = 0, finite = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    low = std::min(low, least[lane]);
    high = std::max(high, most[lane]);
    finite += checked[lane];
  }
  for (; i < in; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
    finite += x[i] * 0.0f;
  }
  const float step = (high - low) / 255, inverse = step > 0 ? 1 / step : 0;
  *scale = finite == 0 ? step : std::numeric_limits<float>::quiet_NaN();
  const float origin = std::min(std::floor(-low * inverse + 0.5f), 255.0f);
  *zero = origin > 0 ? static_cast<int32_t>(origin) : 0;
  const auto code_of = [inverse, shift = *zero + 0.5f](Lanes v) {
    v = v * inverse + shift;
    v = v > 0 ? v : Lanes{};
    v = v < 255 ? v : Lanes{} + 255;
    return __builtin_convertvector(__builtin_convertvector(v, IntLanes), ByteLanes);
  };
  for (i = 0; i + kLanes <= in; i += kLanes) {
    const ByteLanes bytes = code_of(*reinterpret_cast<const Lanes*>(x + i));
    __builtin_memcpy(codes + i, &bytes, sizeof bytes);
  }
  Lanes rest = {};
  for (int64_t k = i; k < in; ++k) rest[k - i] = x[k];
  const ByteLanes bytes = code_of(rest);
  for (int64_t k = i; k < Groups(in) * kGroup; ++k) codes[k] = bytes[k - i];
}

// Of one row, (y - mean) / sqrt(variance + epsilon), times and plus what the norm says.
void Normalise(const Array& norm, float* y, int64_t width) {
  double mean = 0, variance = 0;
  for (int64_t d = 0; d < width; ++d) mean += y[d];
  mean /= width;
  for (int64_t d = 0; d < width; ++d) variance += (y[d] - mean) * (y[d] - mean);
  const double inverse = 1 / std::sqrt(variance / width + kNormEpsilon);
  const float *scale = Floats(norm), *shift = scale + width;
  for (int64_t d = 0; d < width; ++d) y[d] = static_cast<float>((y[d] - mean) * inverse) * scale[d] + shift[d];
}

// What of a layer comes after its product and is not done there.
void Finish(const Layer& layer, float* y, int64_t y_stride, int64_t rows) {
  const bool normed = layer.norm.data != nullptr;
  if (!normed && layer.activation <= kRelu) return;
  for (const float* end = y + rows * y_stride; y != end; y += y_stride) {
    if (normed) Normalise(layer.norm, y, layer.out);
    const auto each = [&](auto function) { std::transform(y, y + layer.out, y, function); };
    switch (layer.activation) {
      case kRelu: each([](float v) { return v < 0 ? 0.0f : v; }); break;
      case kGelu: each([](float v) { return 0.5f * v * std::erfc(-v * 0.70710678f); }); break;
      case kSilu: each([](float v) { return v / (1 + std::exp(-v)); }); break;
      case kPrelu: each([&](float v) { return v >= 0 ? v : layer.slope * v; }); break;
    }
  }
}

}  // namespace
