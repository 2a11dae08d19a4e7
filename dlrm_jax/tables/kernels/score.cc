// The forward pass of an exported model on CPUs, whole: serving/artifact/native.py calls it. The meaning is that of
// serving/artifact/export.py's make_forward.
//
// A batch is dealt out to the threads in blocks of rows, and a block goes through the whole model on one thread: its
// activations stay in that core's cache, and threads meet once a batch. Every number is summed in an order that depends
// on the model alone, so a row's score has the same bits in whatever batch it comes, on any number of threads.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "parallel.h"

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
constexpr int64_t kBlockRows = 48;
constexpr int64_t kLeastProducts = 6 << 20;  // Of a thread: 0.1 ms. Waking one for less takes longer.
constexpr int64_t kProductsOfNumber = 32;    // As many as could be done while a number of a table comes from memory.
constexpr int64_t kAhead = 32;               // Slots whose rows are on their way from memory.
constexpr int64_t kLine = 64;

typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

enum Kind : int64_t { kFloat32, kBfloat16, kInt8, kInt4 };
enum Interaction : int64_t { kDot, kCat, kCross };
enum Activation : int64_t { kNone, kRelu, kGelu, kSilu, kPrelu };
constexpr double kNormEpsilon = 1e-5;  // NORM_EPSILON of config.

}  // namespace

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
struct Layer {
  Array panels, bias, norm;
  int64_t in, out, activation;
  float slope;
};

struct Feature {
  Array rows;     // as quantise.py stores them
  Array weights;  // one a row, or without data
  int64_t hotness, mean;
};

// `cross` has `cross_step` layers for each cross layer: v and w, or of full rank w alone; num_cross counts them all. A
// tower, of num_tower layers, takes what the cross layers take, and its output comes behind theirs. Without a bottom MLP,
// num_bottom 0, there are no numbers, or all are embedded: those of the columns `embedded` (1, of them), which rise, by
// `numbers` (of them, width); or both without data.
struct Model {
  int64_t num_dense, num_slots, width, kind, interaction, self_interaction;
  int64_t num_features, num_bottom, num_cross, cross_step, num_tower, num_top;
  Array feature_of_slot, numbers, embedded;
  const Feature* features;
  const Layer *bottom, *cross, *tower, *top;
  float threshold;
};

}  // extern "C"

namespace {

inline int64_t Padded(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

inline const float* Floats(const Array& array) { return static_cast<const float*>(array.data); }

inline int64_t NumEmbedded(const Model& model) { return model.embedded.data != nullptr ? model.embedded.columns : 0; }

// The bottom MLP's output, if there is one, the features', and those of embedded numbers.
inline int64_t NumVectors(const Model& model) {
  return (model.num_bottom > 0) + model.num_features + NumEmbedded(model);
}

inline int64_t VectorsWidth(const Model& model) { return NumVectors(model) * model.width; }

inline int64_t TowerWidth(const Model& model) { return model.num_tower ? model.tower[model.num_tower - 1].out : 0; }

// Numbers of the top MLP's input.
inline int64_t InteractionWidth(const Model& model) {
  if (model.interaction != kDot) return VectorsWidth(model) + TowerWidth(model);
  const int64_t vectors = NumVectors(model);
  return (model.num_bottom > 0) * model.width + vectors * (vectors - 1) / 2 + (model.self_interaction ? vectors : 0);
}

// Numbers of a stored row, and bytes of each.
inline int64_t RowColumns(const Model& model) {
  return model.kind == kInt8 ? model.width + 4 : model.kind == kInt4 ? (model.width + 1) / 2 + 4 : model.width;
}
inline int64_t RowBytes(const Model& model) {
  return RowColumns(model) * (model.kind == kFloat32 ? 4 : model.kind == kBfloat16 ? 2 : 1);
}

// What follows decides what may be read: whoever calls is not believed.

constexpr int64_t Type(char order, char kind, char bytes) { return order | kind << 8 | bytes << 16; }
constexpr int64_t kFloats = Type('<', 'f', '4'), kInts = Type('<', 'i', '4'), kLongs = Type('<', 'i', '8');
constexpr int64_t kRowTypes[] = {kFloats, Type('<', 'u', '2'), Type('|', 'u', '1'), Type('|', 'u', '1')};
constexpr int64_t kWidest = 1 << 20;  // So that no product of widths overflows.

inline bool Within(int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; }

// Whether an array has so many numbers of that type, one behind the other.
bool Holds(const Array& array, int64_t type, int64_t rows, int64_t columns) {
  const int64_t bytes = (type >> 16) - '0';
  if (array.type != type || array.rows != rows || array.columns != columns || rows < 0 || columns < 0) return false;
  if (rows == 0 || columns == 0) return true;
  return array.data != nullptr && reinterpret_cast<uintptr_t>(array.data) % bytes == 0 &&
         (columns == 1 || array.column_stride == bytes) && (rows == 1 || array.row_stride == columns * bytes);
}

// Whether the layers take `in` numbers and give `out`.
bool Chained(const Layer* layers, int64_t count, int64_t in, int64_t out) {
  for (int64_t i = 0; i < count; in = layers[i++].out) {
    const Layer& layer = layers[i];
    if (layer.in != in || !Within(layer.out, 1, kWidest)) return false;
    const int64_t columns = Padded(layer.out);
    if (!Holds(layer.panels, kFloats, columns / kPanel * in, kPanel)) return false;
    if (!Holds(layer.bias, kFloats, 1, columns)) return false;
    if (layer.norm.data != nullptr && !Holds(layer.norm, kFloats, 2, layer.out)) return false;
    if (!Within(layer.activation, kNone, kPrelu)) return false;
  }
  return in == out;
}

// What is wrong with a model, or null.
const char* Wrong(const Model& model) {
  for (const int64_t count : {model.width, model.num_features, model.num_top}) {
    if (!Within(count, 1, kWidest)) return "its sizes";
  }
  for (const int64_t count : {model.num_dense, model.num_bottom, model.num_cross, model.num_tower}) {
    if (!Within(count, 0, kWidest)) return "its sizes";
  }
  const int64_t embedded = NumEmbedded(model);
  if (!Within(embedded, 0, model.num_dense)) return "its numbers";
  if (embedded && !Holds(model.numbers, kFloats, embedded, model.width)) return "its numbers";
  if (embedded && !Holds(model.embedded, kLongs, 1, embedded)) return "its numbers";
  const auto* columns = static_cast<const int64_t*>(model.embedded.data);
  for (int64_t i = 0; i < embedded; ++i) {
    if (!Within(columns[i], i ? columns[i - 1] + 1 : 0, model.num_dense - 1)) return "its numbers";
  }
  if (!model.num_dense && model.num_bottom) return "its sizes";
  if (!model.num_bottom && embedded < model.num_dense) return "its sizes";
  if (!Within(model.cross_step, 1, 2) || model.num_cross % model.cross_step) return "its sizes";
  if (model.interaction != kCross && (model.num_cross || model.num_tower)) return "its interaction";
  if (!Within(model.kind, kFloat32, kInt4)) return "how its tables are stored";
  if (!Within(model.interaction, kDot, kCross)) return "its interaction";
  if (!(model.threshold >= 0 && model.threshold < 1)) return "its threshold";
  if (!model.features || (model.num_bottom && !model.bottom) || !model.top) return "its parts";
  if ((model.num_cross && !model.cross) || (model.num_tower && !model.tower)) return "its parts";
  if (!Holds(model.feature_of_slot, kLongs, 1, model.num_slots)) return "its slots";
  const auto* feature_of_slot = static_cast<const int64_t*>(model.feature_of_slot.data);
  int64_t slot = 0;
  for (int64_t f = 0; f < model.num_features; ++f) {
    if (slot == model.num_slots || feature_of_slot[slot] != f) return "its slots";  // There may be no such feature.
    const Feature& feature = model.features[f];
    if (!Within(feature.hotness, 1, model.num_slots - slot)) return "its slots";
    for (const int64_t end = slot + feature.hotness; slot < end; ++slot) {
      if (feature_of_slot[slot] != f) return "its slots";
    }
    const int64_t rows = feature.rows.rows;
    if (!Within(rows, 1, INT32_MAX) || !Holds(feature.rows, kRowTypes[model.kind], rows, RowColumns(model))) {
      return "a table's rows";
    }
    if (feature.weights.data != nullptr && !Holds(feature.weights, kFloats, rows, 1)) return "a table's weights";
  }
  if (slot != model.num_slots) return "its slots";
  const int64_t all = VectorsWidth(model);
  if (model.num_bottom && !Chained(model.bottom, model.num_bottom, model.num_dense, model.width)) {
    return "its bottom MLP";
  }
  for (int64_t i = 0; i < model.num_cross; i += model.cross_step) {
    if (!Chained(model.cross + i, model.cross_step, all, all)) return "its cross layers";
  }
  if (model.num_tower && !Within(TowerWidth(model), 1, kWidest)) return "its tower";
  if (model.num_tower && !Chained(model.tower, model.num_tower, all, TowerWidth(model))) return "its tower";
  if (!Chained(model.top, model.num_top, InteractionWidth(model), 1)) return "its top MLP";
  return nullptr;
}

// R rows of x times P panels of the layer, from `panel` on.
template <int R, int P>
void Tile(const float* x, int64_t x_stride, const Layer& layer, int64_t panel, float* y, int64_t y_stride) {
  constexpr int kSums = 2 * P;
  const bool relu = layer.activation == kRelu && layer.norm.data == nullptr;
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
      for (int r = 0; r < R; ++r) sums[r][j] += x[r * x_stride + k] * w;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) {
      const Lanes zero = {};
      const Lanes sum = relu ? (sums[r][j] < zero ? zero : sums[r][j]) : sums[r][j];
      *reinterpret_cast<Lanes*>(y + r * y_stride + panel * kPanel + j * kLanes) = sum;
    }
  }
}

using TileFunction = void (*)(const float*, int64_t, const Layer&, int64_t, float*, int64_t);

template <int... R>
constexpr TileFunction TileOf(std::integer_sequence<int, R...>, int64_t rows) {
  constexpr TileFunction tiles[] = {Tile<R + 1, 1>...};
  return tiles[rows - 1];
}

// (rows, in) to (rows, Padded(out)). Few rows take several panels at a time: a sum waits for its last addition, and
// there must be others meanwhile.
void Apply(const Layer& layer, const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride) {
  const int64_t panels = Padded(layer.out) / kPanel, groups = (rows + kTileRows - 1) / kTileRows;
  for (int64_t panel = 0, step; panel < panels; panel += step) {
    step = rows == 1 && panel + 4 <= panels ? 4 : rows == 2 && panel + 2 <= panels ? 2 : 1;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = rows * group / groups, count = rows * (group + 1) / groups - first;
      const TileFunction tile = step == 4   ? Tile<1, 4>
                                : step == 2 ? Tile<2, 2>
                                            : TileOf(std::make_integer_sequence<int, kTileRows>(), count);
      tile(x + first * x_stride, x_stride, layer, panel, y + first * y_stride, y_stride);
    }
  }
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

inline float OfBfloat16(const uint8_t* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, 2);
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// sum += scale * row, of a row as quantise.py stores it.
void AddRow(int64_t kind, const uint8_t* row, int64_t width, float scale, float* __restrict sum) {
  if (kind == kFloat32) {
    const float* values = reinterpret_cast<const float*>(row);
    for (int64_t d = 0; d < width; ++d) sum[d] += scale * values[d];
  } else if (kind == kBfloat16) {
    for (int64_t d = 0; d < width; ++d) sum[d] += scale * OfBfloat16(row + 2 * d);
  } else {
    const uint8_t* header = row + (kind == kInt8 ? width : (width + 1) / 2);
    const float step = OfBfloat16(header), bias = OfBfloat16(header + 2);
    for (int64_t d = 0; d < width; ++d) {
      const int code = kind == kInt8 ? row[d] : (row[d / 2] >> (d % 2 * 4)) & 15;
      sum[d] += scale * (static_cast<float>(code) * step + bias);
    }
  }
}

// What one thread keeps between batches: fresh pages would cost as much as a score.
struct Scratch {
  std::vector<float> vectors, first, second, crossed, joined, panels, products, zeros;
};

class Block {
 public:
  Block(const Model& model, const float* dense, const int32_t* ids, int64_t rows)
      : model_(model), feature_of_slot_(static_cast<const int64_t*>(model.feature_of_slot.data)), dense_(dense),
        ids_(ids), rows_(rows), num_vectors_(NumVectors(model)), vectors_width_(VectorsWidth(model)),
        row_bytes_(RowBytes(model)) {
    stride_ = Padded(InteractionWidth(model));  // And of layers: a tile writes whole panels.
    for (int64_t i = 0; i < model.num_bottom; ++i) stride_ = std::max(stride_, Padded(model.bottom[i].out));
    for (int64_t i = 0; i < model.num_cross; ++i) stride_ = std::max(stride_, Padded(model.cross[i].out));
    for (int64_t i = 0; i < model.num_tower; ++i) stride_ = std::max(stride_, Padded(model.tower[i].out));
    for (int64_t i = 0; i < model.num_top; ++i) stride_ = std::max(stride_, Padded(model.top[i].out));
    for (auto* buffer : {&scratch_.first, &scratch_.second}) Reserve(*buffer, rows * stride_);
    Reserve(scratch_.vectors, rows * vectors_width_);
  }

  void Score(float* probability, float* logit) {
    for (int64_t slot = 0; slot < std::min(kAhead, rows_ * model_.num_slots); ++slot) AskFor(slot);
    float* y = Layers(model_.bottom, model_.num_bottom, dense_, model_.num_dense);
    for (int64_t b = 0; y != nullptr && b < rows_; ++b) {
      std::copy_n(y + b * stride_, model_.width, scratch_.vectors.data() + b * vectors_width_);
    }
    Pool();
    int64_t x_stride = vectors_width_;
    const float* x = Interact(x_stride);
    y = Layers(model_.top, model_.num_top, x, x_stride);
    for (int64_t b = 0; b < rows_; ++b) {
      logit[b] = y[b * stride_];
      const float p = 1.0f / (1.0f + std::exp(-logit[b]));
      probability[b] = model_.threshold > 0 ? std::min(std::max(p, model_.threshold), 1 - model_.threshold) : p;
    }
  }

 private:
  static void Reserve(std::vector<float>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  }

  // The buffer of the two that `x` is not.
  float* Other(const float* x) { return x == scratch_.first.data() ? scratch_.second.data() : scratch_.first.data(); }

  float* Layers(const Layer* layers, int64_t count, const float* x, int64_t x_stride) {
    float* y = nullptr;
    for (int64_t i = 0; i < count; ++i, x = y, x_stride = stride_) {
      y = Other(x);
      Apply(layers[i], x, x_stride, rows_, y, stride_);
      Finish(layers[i], y, stride_, rows_);
    }
    return y;
  }

  // The table's row that a slot names, or -1. Whose ids they are may change them meanwhile: one load decides.
  int64_t RowOf(const Feature& feature, int64_t slot) const {
    const int64_t id = __atomic_load_n(ids_ + slot, __ATOMIC_RELAXED);
    return Within(id, 0, feature.rows.rows - 1) ? id : -1;
  }

  const uint8_t* Stored(const Feature& feature, int64_t row) const {
    return static_cast<const uint8_t*>(feature.rows.data) + row * row_bytes_;
  }

  void AskFor(int64_t slot) const {
    const Feature& feature = model_.features[feature_of_slot_[slot % model_.num_slots]];
    const int64_t number = RowOf(feature, slot);
    if (number < 0) return;
    const uint8_t* row = Stored(feature, number);
    for (int64_t byte = 0; byte < row_bytes_; byte += kLine) __builtin_prefetch(row + byte);
    __builtin_prefetch(row + row_bytes_ - 1);  // A row need not begin with a line.
  }

  // Each bag's rows into its vector of the example, behind the bottom MLP's; then the embedded numbers' vectors.
  void Pool() {
    const int64_t end_of_slots = rows_ * model_.num_slots;
    int64_t slot = 0;
    for (int64_t b = 0; b < rows_; ++b) {
      float* sum = scratch_.vectors.data() + b * vectors_width_ + (model_.num_bottom > 0) * model_.width;
      for (int64_t f = 0; f < model_.num_features; ++f, sum += model_.width) {
        const Feature& feature = model_.features[f];
        const int64_t end = slot + feature.hotness;
        std::fill(sum, sum + model_.width, 0.0f);
        int64_t filled = 0;
        for (int64_t i = slot; i < end; ++i) filled += RowOf(feature, i) >= 0;
        const float scale = feature.mean && filled > 1 ? 1.0f / filled : 1.0f;
        for (; slot < end; ++slot) {
          if (slot + kAhead < end_of_slots) AskFor(slot + kAhead);
          const int64_t row = RowOf(feature, slot);
          if (row < 0) continue;
          const float weight = feature.weights.data == nullptr ? scale : scale * Floats(feature.weights)[row];
          AddRow(model_.kind, Stored(feature, row), model_.width, weight, sum);
        }
      }
      const auto* columns = static_cast<const int64_t*>(model_.embedded.data);
      const float* vector = Floats(model_.numbers);
      for (int64_t i = 0; i < NumEmbedded(model_); ++i) {
        const float x = dense_[b * model_.num_dense + columns[i]];
        for (int64_t d = 0; d < model_.width; ++d) *sum++ = x * *vector++;
      }
    }
  }

  // The top MLP's input, and its stride.
  const float* Interact(int64_t& stride) {
    if (model_.interaction == kCat) return scratch_.vectors.data();
    if (model_.interaction == kCross && !model_.num_tower) return Cross();
    if (model_.interaction == kCross) return CrossAndTower(stride);
    stride = stride_;
    for (int64_t b = 0; b < rows_; ++b) Dots(scratch_.vectors.data() + b * vectors_width_, &scratch_.first[b * stride_]);
    return scratch_.first.data();
  }

  // An example's vectors times themselves, of which the lower triangle is wanted.
  void Dots(const float* vectors, float* out) {
    const int64_t width = model_.width, columns = Padded(num_vectors_);
    auto& panels = scratch_.panels;
    Reserve(panels, columns * width);
    Reserve(scratch_.products, num_vectors_ * columns);
    Reserve(scratch_.zeros, columns);
    for (int64_t v = 0; v < columns; ++v) {
      float* column = panels.data() + v / kPanel * width * kPanel + v % kPanel;
      for (int64_t d = 0; d < width; ++d) column[d * kPanel] = v < num_vectors_ ? vectors[v * width + d] : 0.0f;
    }
    const Layer all{{panels.data()}, {scratch_.zeros.data()}, {}, width, num_vectors_, kNone, 0};
    Apply(all, vectors, width, num_vectors_, scratch_.products.data(), columns);
    if (model_.num_bottom > 0) out = std::copy_n(vectors, width, out);
    for (int64_t v = 0; v < num_vectors_; ++v) {
      out = std::copy_n(scratch_.products.data() + v * columns, v + (model_.self_interaction ? 1 : 0), out);
    }
  }

  // Cross layers' output, then the tower's.
  const float* CrossAndTower(int64_t& stride) {
    stride = vectors_width_ + TowerWidth(model_);
    auto& both = scratch_.joined;
    Reserve(both, rows_ * stride);
    const float* crossed = Cross();
    for (int64_t b = 0; b < rows_; ++b) std::copy_n(crossed + b * vectors_width_, vectors_width_, &both[b * stride]);
    const float* y = Layers(model_.tower, model_.num_tower, scratch_.vectors.data(), vectors_width_);
    for (int64_t b = 0; b < rows_; ++b) {
      std::copy_n(y + b * stride_, TowerWidth(model_), &both[b * stride + vectors_width_]);
    }
    return both.data();
  }

  // x_{l+1} = x_0 (W_l V_l x_l + b_l) + x_l.
  const float* Cross() {
    auto& x = scratch_.crossed;
    Reserve(x, rows_ * vectors_width_);
    const float* x0 = scratch_.vectors.data();
    std::copy_n(x0, rows_ * vectors_width_, x.data());
    for (int64_t i = 0; i < model_.num_cross; i += model_.cross_step) {
      const float* y = Layers(model_.cross + i, model_.cross_step, x.data(), vectors_width_);
      for (int64_t b = 0; b < rows_; ++b) {
        for (int64_t d = 0; d < vectors_width_; ++d) {
          x[b * vectors_width_ + d] += x0[b * vectors_width_ + d] * y[b * stride_ + d];
        }
      }
    }
    return x.data();
  }

  const Model& model_;
  const int64_t* feature_of_slot_;
  const float* dense_;
  const int32_t* ids_;
  const int64_t rows_, num_vectors_, vectors_width_, row_bytes_;
  int64_t stride_;
  static thread_local Scratch scratch_;
};

thread_local Scratch Block::scratch_;

// Threads that help whoever has work to deal out.
class Helpers {
 public:
  // Starts so many where there are fewer; how many there are, which the system may hold down.
  int64_t Start(int64_t threads) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; started_ < threads; ++started_) std::thread([this] { Help(); }).detach();
    } catch (const std::system_error&) {
    }
    return started_;
  }

  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void Help() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  int64_t started_ = 0;
};

// Never destroyed, as its threads are never told to end. A forked process has none of them, and maybe locks that they
// held: it begins anew.
Helpers* helpers = [] {
  pthread_atfork(nullptr, nullptr, [] { helpers = new Helpers; });
  return new Helpers;
}();

// What a row's score takes, in products of weights.
double ProductsOfRow(const Model& model) {
  double products = static_cast<double>(model.num_slots) * model.width * kProductsOfNumber;
  const double vectors = NumVectors(model);
  if (model.interaction == kDot) products += vectors * vectors * model.width;
  const auto add = [&](const Layer* layers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) products += static_cast<double>(layers[i].in) * layers[i].out;
  };
  add(model.bottom, model.num_bottom);
  add(model.cross, model.num_cross);
  add(model.tower, model.num_tower);
  add(model.top, model.num_top);
  return products;
}

}  // namespace

extern "C" {

// Columns of a panel of weights.
int64_t dlrm_panel() { return kPanel; }

// What of a model does not fit the rest of it, or null. Static text, as that of dlrm_score.
const char* dlrm_wrong(const Model* model) { return Wrong(*model); }

// dense (rows, num_dense), ids (rows, num_slots) to probability and logit, (2, rows). Returns null, or the name of what
// cannot be used, and nothing was read of it.
const char* dlrm_score(const Model* model, const Array* dense, const Array* ids, const Array* out, int64_t threads) {
  if (const char* wrong = Wrong(*model)) return wrong;
  const int64_t rows = dense->rows;
  if (!Within(rows, 0, INT32_MAX) || !Holds(*dense, kFloats, rows, model->num_dense)) return "dense";
  if (!Holds(*ids, kInts, rows, model->num_slots)) return "ids";
  if (!Holds(*out, kFloats, 2, rows)) return "out";
  auto* const probability = static_cast<float*>(const_cast<void*>(out->data));
  const int64_t worth = static_cast<int64_t>(std::min(rows * ProductsOfRow(*model) / kLeastProducts, 1e9));
  const int64_t most = std::max<int64_t>(1, std::min({threads, rows, worth}));
  const int64_t parts = ((rows + kBlockRows - 1) / kBlockRows + most - 1) / most * most;
  const int64_t helping = most > 1 ? std::min(most - 1, helpers->Start(most - 1)) : 0;
  std::atomic<bool> full{false};
  InParallel(*helpers, 1 + helping, parts, [&](int64_t part) {
    const int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
    try {
      Block(*model, Floats(*dense) + first * model->num_dense,
            static_cast<const int32_t*>(ids->data) + first * model->num_slots, count)
          .Score(probability + first, probability + rows + first);
    } catch (const std::exception&) {  // Scratch memory: nothing else here throws.
      full = true;
    }
  });
  return full ? "memory" : nullptr;
}

}  // extern "C"
