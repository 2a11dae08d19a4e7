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
#include <vector>

#include "layers.h"
#include "parallel.h"

namespace {

constexpr int64_t kBlockRows = 48;
constexpr int64_t kLeastProducts = 6 << 20;  // Of a thread: 0.1 ms. Waking one for less takes longer.
constexpr int64_t kProductsOfNumber = 32;    // As many as could be done while a number of a table comes from memory.
constexpr int64_t kAhead = 32;               // Slots whose rows are on their way from memory.
constexpr int64_t kLine = 64;

enum Kind : int64_t { kFloat32, kBfloat16, kInt8, kInt4 };
enum Interaction : int64_t { kDot, kCat, kCross };

}  // namespace

// As serving/artifact/native.py has them.
extern "C" {

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

// What follows decides what may be read, as in layers.h.

constexpr int64_t kRowTypes[] = {kFloats, Type('<', 'u', '2'), Type('|', 'u', '1'), Type('|', 'u', '1')};

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
  std::vector<float> vectors, first, second, crossed, joined, panels, products, zeros, scales;
  std::vector<uint8_t> codes;
  std::vector<int32_t> origins;
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
  template <typename T>
  static void Reserve(std::vector<T>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  }

  // The buffer of the two that `x` is not.
  float* Other(const float* x) { return x == scratch_.first.data() ? scratch_.second.data() : scratch_.first.data(); }

  float* Layers(const Layer* layers, int64_t count, const float* x, int64_t x_stride) {
    float* y = nullptr;
    for (int64_t i = 0; i < count; ++i, x = y, x_stride = stride_) {
      y = Other(x);
      if (layers[i].codes.data == nullptr) {
        Apply(layers[i], FloatRows{x, x_stride}, rows_, y, stride_);
      } else {
        Apply(layers[i], Encoded(x, x_stride, layers[i].in), rows_, y, stride_);
      }
      Finish(layers[i], y, stride_, rows_);
    }
    return y;
  }

  CodedRows Encoded(const float* x, int64_t x_stride, int64_t in) {
    const int64_t stride = Groups(in) * kGroup;
    Reserve(scratch_.codes, rows_ * stride);
    Reserve(scratch_.scales, rows_);
    Reserve(scratch_.origins, rows_);
    for (int64_t b = 0; b < rows_; ++b) {
      Encode(x + b * x_stride, in, &scratch_.codes[b * stride], &scratch_.scales[b], &scratch_.origins[b]);
    }
    return {scratch_.codes.data(), stride, scratch_.scales.data(), scratch_.origins.data()};
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
    Layer all{};
    all.panels.data = panels.data(), all.bias.data = scratch_.zeros.data();
    all.in = width, all.out = num_vectors_;
    Apply(all, FloatRows{vectors, width}, num_vectors_, scratch_.products.data(), columns);
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

// Codes of a lane that are multiplied at once.
int64_t dlrm_group() { return kGroup; }

// Whether this processor has an instruction for products of codes: without one they are slower than those of float32.
bool dlrm_has_byte_products() { return kHasByteProducts; }

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
