// Lookup and update of a stack of tables on CPUs, for XLA (jax.ffi). The meaning is that of ../pooling.py and
// ../updates.py; native.py calls it.
//
// All of it waits for memory: rows lie anywhere in gigabytes. So the rows of the next AHEAD slots are asked for while
// one is worked on. Updates deal the rows out to the threads by a hash, so that no two threads write to one row, and
// each row takes its gradients in the order of the slots however many threads there are: the same bits on any machine
// with the same instructions.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ids = ffi::Buffer<ffi::S32>;
using OutFloats = ffi::ResultBuffer<ffi::F32>;
using OutInts = ffi::ResultBuffer<ffi::S32>;

constexpr int64_t kAhead = 16;
constexpr int64_t kExamplesAtATime = 64;
constexpr int64_t kLine = 64;

// 8 floats, at any address of a float.
typedef float Group __attribute__((vector_size(32), aligned(4), may_alias));

enum class Rule { kSgd, kAdagrad, kRowwiseAdagrad };

inline void AskFor(const float* row, int64_t width) {
  for (int64_t byte = 0; byte < width * 4; byte += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
  }
}

// The slots of a stack: ids (B, K) with rows of the stack, negative ones empty; each slot's feature; each slot's scale,
// if any.
struct Slots {
  const int32_t* ids;
  const float* scale;  // (B, K) or null
  int64_t batch, per_example, num_features, num_rows;
  std::vector<int32_t> feature;  // (K,)

  Slots(const Ids& ids_BxK, const Floats& scale_BxK, ffi::Span<const int64_t> hotness, int64_t num_rows)
      : ids(ids_BxK.typed_data()),
        scale(scale_BxK.element_count() ? scale_BxK.typed_data() : nullptr),
        batch(ids_BxK.dimensions()[0]),
        per_example(ids_BxK.dimensions()[1]),
        num_features(hotness.size()),
        num_rows(num_rows) {
    for (int64_t f = 0; f < num_features; ++f) feature.insert(feature.end(), hotness[f], f);
  }

  bool Holds(int32_t id) const { return static_cast<uint32_t>(id) < static_cast<uint64_t>(num_rows); }
};

// Whether the slots, and what there is one of for each bag, (B, F, width), fit each other.
bool Fits(const Ids& ids, const Floats& scale, ffi::Span<const int64_t> hotness, ffi::Span<const int64_t> bags,
          int64_t width) {
  if (ids.dimensions().size() != 2) return false;
  const int64_t batch = ids.dimensions()[0], num_features = hotness.size();
  int64_t left = ids.dimensions()[1];
  for (const int64_t h : hotness) {
    if (h < 0 || h > left) return false;
    left -= h;
  }
  const int64_t scales = scale.element_count();
  return left == 0 && (scales == 0 || scales == static_cast<int64_t>(ids.element_count())) && bags.size() == 3 &&
         bags[0] == batch && bags[1] == num_features && bags[2] == width;
}

ffi::Error Misfit() { return ffi::Error::InvalidArgument("dlrm_jax: ids, hotness, scales and bags do not fit"); }

// Sums the bags of one feature of examples `start` to `stop`. Its slots are the `h` from `first` on in each example.
// kGroups: the row's groups of 8 floats where that is known now, which keeps the sum in registers; else 0.
template <int kGroups>
void SumBags(const float* table, const Slots& slots, int64_t first, int64_t h, int64_t start, int64_t stop,
             int64_t width, float* __restrict sum, int64_t stride) {
  if (kGroups) width = 8 * kGroups;
  const int32_t* ids = slots.ids + start * slots.per_example + first;
  const float* scales = slots.scale ? slots.scale + start * slots.per_example + first : nullptr;
  // The slot to ask for, kAhead slots before it is needed.
  const int32_t* wanted = ids;
  int64_t wanted_k = 0, left = (stop - start) * h;
  const auto ask = [&] {
    if (left-- <= 0) return;
    if (slots.Holds(wanted[wanted_k])) AskFor(table + wanted[wanted_k] * width, width);
    if (++wanted_k == h) wanted_k = 0, wanted += slots.per_example;
  };
  for (int64_t i = 0; i < kAhead; ++i) ask();
  for (int64_t b = start; b < stop; ++b, ids += slots.per_example, sum += stride) {
    Group kept[kGroups + 1] = {};
    if (!kGroups) std::fill(sum, sum + width, 0.0f);
    for (int64_t k = 0; k < h; ++k) {
      ask();
      if (!slots.Holds(ids[k])) continue;
      const float* row = table + ids[k] * width;
      const float scale = scales ? scales[k] : 1.0f;
      for (int g = 0; g < kGroups; ++g) kept[g] += scale * reinterpret_cast<const Group*>(row)[g];
      if (!kGroups) {
        for (int64_t d = 0; d < width; ++d) sum[d] += scale * row[d];
      }
    }
    for (int g = 0; g < kGroups; ++g) reinterpret_cast<Group*>(sum)[g] = kept[g];
    if (scales) scales += slots.per_example;
  }
}

// Feature by feature, so that all threads read the same table at a time, whose pages' places are then in the cache.
ffi::Error LookUp(ffi::ThreadPool pool, Floats table, Ids ids_BxK, Floats scale_BxK, OutFloats pooled_BxFxD,
                  ffi::Span<const int64_t> hotness) {
  const int64_t width = table.dimensions()[1];
  if (!Fits(ids_BxK, scale_BxK, hotness, pooled_BxFxD->dimensions(), width)) return Misfit();
  const Slots slots(ids_BxK, scale_BxK, hotness, table.dimensions()[0]);
  const auto sum_bags = width == 16    ? SumBags<2>
                        : width == 32  ? SumBags<4>
                        : width == 64  ? SumBags<8>
                        : width == 128 ? SumBags<16>
                                       : SumBags<0>;
  std::vector<int64_t> first(slots.num_features + 1, 0);
  for (int64_t f = 0; f < slots.num_features; ++f) first[f + 1] = first[f] + hotness[f];
  const int64_t parts = (slots.batch + kExamplesAtATime - 1) / kExamplesAtATime;
  InParallel(pool, pool.num_threads(), slots.num_features * parts, [&](int64_t work) {
    const int64_t f = work / parts, start = work % parts * kExamplesAtATime;
    sum_bags(table.typed_data(), slots, first[f], hotness[f], start, std::min(slots.batch, start + kExamplesAtATime),
             width, pooled_BxFxD->typed_data() + (start * slots.num_features + f) * width, slots.num_features * width);
  });
  return ffi::Error::Success();
}

// Which of `threads` threads writes to a row.
inline int64_t Owner(int32_t row, int64_t threads) {
  return static_cast<int64_t>((static_cast<uint64_t>(static_cast<uint32_t>(row) * 0x9E3779B1u) * threads) >> 32);
}

// Sorts by the upper 32 bits, of which `bits` may be set; equal ones stay in order.
void SortByRow(std::vector<uint64_t>& entries, std::vector<uint64_t>& scratch, int bits) {
  constexpr int kDigit = 11;
  scratch.resize(entries.size());
  for (int shift = 32; shift < 32 + bits; shift += kDigit) {
    int64_t starts[(1 << kDigit) + 1] = {};
    for (const uint64_t entry : entries) ++starts[((entry >> shift) & ((1 << kDigit) - 1)) + 1];
    for (int i = 0; i < 1 << kDigit; ++i) starts[i + 1] += starts[i];
    for (const uint64_t entry : entries) scratch[starts[(entry >> shift) & ((1 << kDigit) - 1)]++] = entry;
    entries.swap(scratch);
  }
}

// A float's bits, to be looked at where they are.
typedef uint32_t Bits __attribute__((may_alias));

// Whether none of them is NaN or infinite, whose exponents are all ones: a maximum, which processors take many at a time.
inline bool AllFinite(const float* numbers, int64_t count) {
  constexpr uint32_t kExponent = 0x7f800000;
  const Bits* bits = reinterpret_cast<const Bits*>(numbers);
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, bits[i] & kExponent);
  return most != kExponent;
}

// Sums the gradients of each row's slots and applies the rule to it, once; gives the number of rows whose sum is not
// finite. Sorting pays for itself even where the rule is linear: rows are then met in the order of memory.
// `accumulator`, of the rule, is (rows, 1), (rows, D) or null.
template <Rule rule>
int32_t UpdateRows(ffi::ThreadPool pool, const Slots& slots, const float* d_pooled, float rate, float eps,
                   int64_t width, float* table, float* accumulator) {
  constexpr bool kPerWeight = rule == Rule::kAdagrad;
  int bits = 0;
  while ((slots.num_rows - 1) >> bits) ++bits;
  const int64_t threads = pool.num_threads();
  std::atomic<int32_t> bad{0};
  const auto d_bag = [&](uint64_t entry) {
    const int64_t slot = static_cast<uint32_t>(entry), b = slot / slots.per_example, k = slot % slots.per_example;
    return d_pooled + (b * slots.num_features + slots.feature[k]) * width;
  };
  InParallel(pool, threads, threads, [&](int64_t thread) {
    thread_local std::vector<uint64_t> mine, scratch;  // Kept: fresh pages would cost as much as the sort.
    mine.clear();
    for (int64_t slot = 0; slot < slots.batch * slots.per_example; ++slot) {
      const int32_t id = slots.ids[slot];
      if (slots.Holds(id) && Owner(id, threads) == thread) mine.push_back(static_cast<uint64_t>(id) << 32 | slot);
    }
    SortByRow(mine, scratch, bits);
    std::vector<float> summed(width);
    float* __restrict gradient = summed.data();
    const int64_t count = mine.size();
    for (int64_t i = 0; i < count;) {
      const int64_t id = mine[i] >> 32;
      std::fill(gradient, gradient + width, 0.0f);
      for (; i < count && static_cast<int64_t>(mine[i] >> 32) == id; ++i) {
        if (i + kAhead < count) {
          const int64_t next = mine[i + kAhead] >> 32;
          AskFor(table + next * width, width);
          AskFor(d_bag(mine[i + kAhead]), width);
          if (rule != Rule::kSgd) AskFor(accumulator + next * (kPerWeight ? width : 1), kPerWeight ? width : 1);
        }
        const float* __restrict d = d_bag(mine[i]);
        const float scale = slots.scale ? slots.scale[static_cast<uint32_t>(mine[i])] : 1.0f;
        for (int64_t j = 0; j < width; ++j) gradient[j] += d[j] * scale;
      }
      if (!AllFinite(gradient, width)) ++bad;
      float* __restrict row = table + id * width;
      if (rule == Rule::kSgd) {
        for (int64_t j = 0; j < width; ++j) row[j] -= rate * gradient[j];
      } else if (rule == Rule::kAdagrad) {
        float* __restrict sum = accumulator + id * width;
        for (int64_t j = 0; j < width; ++j) {
          sum[j] += gradient[j] * gradient[j];
          row[j] -= rate * gradient[j] / (std::sqrt(sum[j]) + eps);
        }
      } else {
        float square = 0.0f;
        for (int64_t j = 0; j < width; ++j) square += gradient[j] * gradient[j];
        accumulator[id] += square / width;
        const float divisor = std::sqrt(accumulator[id]) + eps;
        for (int64_t j = 0; j < width; ++j) row[j] -= rate * gradient[j] / divisor;
      }
    }
  });
  return bad;
}

ffi::Error UpdateSgd(ffi::ThreadPool pool, Floats, Ids ids_BxK, Floats scale_BxK, Floats d_pooled_BxFxD, Floats rate,
                     OutFloats table, OutInts bad, ffi::Span<const int64_t> hotness) {
  if (!Fits(ids_BxK, scale_BxK, hotness, d_pooled_BxFxD.dimensions(), table->dimensions()[1])) return Misfit();
  const Slots slots(ids_BxK, scale_BxK, hotness, table->dimensions()[0]);
  *bad->typed_data() = UpdateRows<Rule::kSgd>(pool, slots, d_pooled_BxFxD.typed_data(), *rate.typed_data(), 0.0f,
                                              table->dimensions()[1], table->typed_data(), nullptr);
  return ffi::Error::Success();
}

template <Rule rule>
ffi::Error UpdateAdaptively(ffi::ThreadPool pool, Floats, Floats, Ids ids_BxK, Floats scale_BxK, Floats d_pooled_BxFxD,
                            Floats rate, OutFloats table, OutFloats accumulator, OutInts bad,
                            ffi::Span<const int64_t> hotness, float eps) {
  const int64_t rows = table->dimensions()[0], width = table->dimensions()[1];
  const size_t sums = rows * (rule == Rule::kAdagrad ? width : 1);
  const bool fits = Fits(ids_BxK, scale_BxK, hotness, d_pooled_BxFxD.dimensions(), width);
  if (!fits || accumulator->element_count() != sums) return Misfit();
  const Slots slots(ids_BxK, scale_BxK, hotness, table->dimensions()[0]);
  *bad->typed_data() = UpdateRows<rule>(pool, slots, d_pooled_BxFxD.typed_data(), *rate.typed_data(), eps,
                                        table->dimensions()[1], table->typed_data(), accumulator->typed_data());
  return ffi::Error::Success();
}

// The first arguments, table and accumulator, are those that the results take the place of.
auto BindUpdate() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_lookup, LookUp,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ids>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<ffi::Span<const int64_t>>("hotness"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_update_sgd, UpdateSgd,
                              BindUpdate()
                                  .Arg<Ids>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<ffi::Span<const int64_t>>("hotness"));
#define DLRM_ADAPTIVE(name, rule)                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, UpdateAdaptively<rule>,            \
                                BindUpdate()                             \
                                    .Arg<Floats>()                       \
                                    .Arg<Ids>()                          \
                                    .Arg<Floats>()                       \
                                    .Arg<Floats>()                       \
                                    .Arg<Floats>()                       \
                                    .Ret<Floats>()                       \
                                    .Ret<Floats>()                       \
                                    .Ret<ffi::Buffer<ffi::S32>>()        \
                                    .Attr<ffi::Span<const int64_t>>("hotness") \
                                    .Attr<float>("eps"))
DLRM_ADAPTIVE(dlrm_update_adagrad, Rule::kAdagrad);
DLRM_ADAPTIVE(dlrm_update_rowwise_adagrad, Rule::kRowwiseAdagrad);
