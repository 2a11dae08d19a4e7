// Blocks of rows from disk into windows of batches: read, checked, and put where batches want them while the cache has
// them. riegeli.py and unread.py call it, by ctypes.
//
// A shard is a Riegeli/records file (google/riegeli, doc/riegeli_records_file_format.md): chunks, which a header
// interrupts at every 64 KiB. Hashes are HighwayHash-64 (google/highwayhash) under a fixed key.

#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 1 << 16, kBlockHeader = 24, kChunkHeader = 40;
constexpr int64_t kBlocksAtATime = 2;  // Of what is read, so that it is hashed while the cache has it.

#ifdef __AVX2__
using Lanes = __m256i;

inline Lanes Load(const void* from) { return _mm256_loadu_si256(static_cast<const Lanes*>(from)); }

inline Lanes Swapped32(Lanes x) { return _mm256_shuffle_epi32(x, 0xB1); }

class Hash {
 public:
  Hash() {
    alignas(32) static constexpr uint64_t kFirst[] = {0xdbe6d5d5fe4cce2f, 0xa4093822299f31d0, 0x13198a2e03707344,
                                                      0x243f6a8885a308d3};
    alignas(32) static constexpr uint64_t kSecond[] = {0x3bd39e10cb0ef593, 0xc0acf169b5f18a8c, 0xbe5466cf34e90c6c,
                                                       0x452821e638d01377};
    alignas(32) static constexpr char kKey[] = "Riegeli/records\nRiegeli/records\n";
    mul0_ = Load(kFirst);
    mul1_ = Load(kSecond);
    v0_ = _mm256_xor_si256(mul0_, Load(kKey));
    v1_ = _mm256_xor_si256(mul1_, Swapped32(Load(kKey)));
  }

  void Update(Lanes packet) {
    v1_ = _mm256_add_epi64(v1_, _mm256_add_epi64(mul0_, packet));
    mul0_ = _mm256_xor_si256(mul0_, _mm256_mul_epu32(v1_, _mm256_srli_epi64(v0_, 32)));
    v0_ = _mm256_add_epi64(v0_, mul1_);
    mul1_ = _mm256_xor_si256(mul1_, _mm256_mul_epu32(v0_, _mm256_srli_epi64(v1_, 32)));
    v0_ = _mm256_add_epi64(v0_, Zipped(v1_));
    v1_ = _mm256_add_epi64(v1_, Zipped(v0_));
  }

  // The hash, with the last `size` < 32 bytes.
  uint64_t Finish(const uint8_t* bytes, int size) {
    if (size) {
      const int whole = size & ~3, odd = size & 3;
      uint8_t packet[32] = {};
      std::memcpy(packet, bytes, whole);
      if (size & 16) {
        std::memcpy(packet + 28, bytes + size - 4, 4);
      } else if (odd) {
        packet[16] = bytes[whole];
        packet[17] = bytes[whole + (odd >> 1)];
        packet[18] = bytes[size - 1];
      }
      v0_ = _mm256_add_epi64(v0_, _mm256_set1_epi32(size));
      v1_ = _mm256_or_si256(_mm256_slli_epi32(v1_, size), _mm256_srli_epi32(v1_, 32 - size));
      Update(Load(packet));
    }
    for (int i = 0; i < 4; ++i) Update(Swapped32(_mm256_permute2x128_si256(v0_, v0_, 1)));
    const Lanes sum = _mm256_add_epi64(_mm256_add_epi64(v0_, v1_), _mm256_add_epi64(mul0_, mul1_));
    return _mm256_extract_epi64(sum, 0);
  }

 private:
  static Lanes Zipped(Lanes x) {
    return _mm256_shuffle_epi8(x, _mm256_set_epi64x(0x070806090D0A040B, 0x000F010E05020C03, 0x070806090D0A040B,
                                                    0x000F010E05020C03));
  }

  Lanes v0_, v1_, mul0_, mul1_;
};

uint64_t HashOf(const uint8_t* bytes, int64_t size) {
  Hash hash;
  int64_t at = 0;
  for (; at + 32 <= size; at += 32) hash.Update(Load(bytes + at));
  return hash.Finish(bytes + at, static_cast<int>(size - at));
}

uint64_t Number(const uint8_t* bytes) {
  uint64_t number;
  std::memcpy(&number, bytes, 8);
  return number;
}

// Bytes from `at` to `end`, at most those of kBlocksAtATime blocks, to `into` without block headers; where it ended, or
// -1 where the file ends before, cannot be read, or has a block header that is not whole.
int64_t ReadSome(int file, int64_t at, int64_t end, uint8_t*& into) {
  iovec parts[2 * (kBlocksAtATime + 1)];
  uint8_t headers[kBlocksAtATime + 1][kBlockHeader];
  int count = 0, num_headers = 0;
  int64_t position = at;
  while (position < end && num_headers < kBlocksAtATime) {
    if (position % kBlock == 0) {
      parts[count++] = {headers[num_headers++], static_cast<size_t>(kBlockHeader)};
      position += kBlockHeader;
    }
    const int64_t size = std::min(end - position, kBlock - position % kBlock);
    if (size <= 0) break;
    parts[count++] = {into, static_cast<size_t>(size)};
    into += size;
    position += size;
  }
  if (preadv(file, parts, count, at) != position - at) return -1;
  for (int i = 0; i < num_headers; ++i) {
    if (HashOf(headers[i] + 8, kBlockHeader - 8) != Number(headers[i])) return -1;
  }
  return position;
}

// A chunk on its way into memory.
class Chunk {
 public:
  Chunk(int file, int64_t begin, int64_t end, uint8_t* into)
      : file_(file), begin_(begin), end_(end), into_(into), read_(into), hashed_(into + kChunkHeader) {}

  // Reads some more; whether there was anything, and all was well.
  bool Read() {
    while (begin_ >= 0 && begin_ < end_) {
      begin_ = ReadSome(file_, begin_, end_, read_);
      if (begin_ < 0 || read_ - into_ < kChunkHeader) continue;
      if (size_ < 0) {
        size_ = Number(into_ + 8);
        if (HashOf(into_ + 8, kChunkHeader - 8) != Number(into_) || size_ < 0 || size_ > end_) begin_ = -1;
      }
      return begin_ >= 0;
    }
    return false;
  }

  // Whole packets that are read and not hashed.
  int64_t Packets() const {
    return std::max<int64_t>(0, (std::min<const uint8_t*>(read_, into_ + kChunkHeader + size_) - hashed_) / 32);
  }

  const uint8_t* Take(int64_t packets) {
    hashed_ += 32 * packets;
    return hashed_ - 32 * packets;
  }

  void HashReady() {
    const int64_t packets = Packets();
    const uint8_t* const first = Take(packets);
    Hash held = hash;  // In registers.
    for (int64_t i = 0; i < packets; ++i) held.Update(Load(first + 32 * i));
    hash = held;
  }

  void Note(uint64_t* kind, int64_t* size) {
    *size = -1;
    if (begin_ < 0 || size_ < 0 || read_ - into_ < kChunkHeader + size_) return;
    if (hash.Finish(hashed_, into_ + kChunkHeader + size_ - hashed_) != Number(into_ + 16)) return;
    *kind = Number(into_ + 24);
    *size = size_;
  }

  Hash hash;

 private:
  const int file_;
  int64_t begin_;  // Of what is not read; -1 after an error.
  const int64_t end_;
  uint8_t* const into_;
  uint8_t* read_;
  const uint8_t* hashed_;
  int64_t size_ = -1;  // Of the data, once the header is read.
};

void UpdateBoth(Hash& one, const uint8_t* first, Hash& other, const uint8_t* second, int64_t packets) {
  Hash a = one, b = other;
  for (int64_t i = 0; i < packets; ++i) {
    a.Update(Load(first + 32 * i));
    b.Update(Load(second + 32 * i));
  }
  one = a;
  other = b;
}
#endif

constexpr int64_t kAhead = 16, kLine = 64, kMostStreamed = 16 * kLine;

typedef uint32_t Id __attribute__((aligned(1), may_alias));

// In steps of a size that the compiler knows, the last one overlapping the one before.
template <int64_t step>
inline void CopyBy(uint8_t* to, const uint8_t* from, int64_t size) {
  int64_t at = 0;
  for (; at + step <= size; at += step) std::memcpy(to + at, from + at, step);
  if (at < size) std::memcpy(to + size - step, from + size - step, step);
}

inline void Copy(uint8_t* to, const uint8_t* from, int64_t size) {
  if (size == 4) {
    std::memcpy(to, from, 4);
  } else if (size >= 32) {
    CopyBy<32>(to, from, size);
  } else if (size >= 16) {
    CopyBy<16>(to, from, size);
  } else {
    std::memcpy(to, from, size);
  }
}

// Whether rows are written past the cache, which then need not read the lines that they lie in: of whole lines, and few.
inline bool Streams(int64_t row_bytes) {
#ifdef __AVX2__
  return row_bytes % kLine == 0 && row_bytes <= kMostStreamed;
#else
  return false;
#endif
}

// Rows that are put together here and written some rows later: what was just stored in pieces is read back slowly.
class Lines {
 public:
  explicit Lines(int64_t row_bytes) : row_bytes_(row_bytes) {}

  ~Lines() {
    for (int64_t i = 0; i < kLater; ++i) Write(next_ + i);
#ifdef __AVX2__
    _mm_sfence();  // Other threads see the rows before they see that this one is done.
#endif
  }

  // Where to put the row that belongs to `to`.
  uint8_t* Next(uint8_t* to) {
    Write(next_);
    const int64_t slot = next_++ % kLater;
    to_[slot] = to;
    return rows_ + slot * kMostStreamed;
  }

 private:
  void Write(int64_t number) {
    const int64_t slot = number % kLater;
    uint8_t* const to = to_[slot];
    const uint8_t* const row = rows_ + slot * kMostStreamed;
    if (to == nullptr) return;
#ifdef __AVX2__
    if (reinterpret_cast<uintptr_t>(to) % sizeof(Lanes) == 0) {
      for (int64_t byte = 0; byte < row_bytes_; byte += sizeof(Lanes)) {
        _mm256_stream_si256(reinterpret_cast<Lanes*>(to + byte), Load(row + byte));
      }
      return;
    }
#endif
    std::memcpy(to, row, row_bytes_);
  }

  static constexpr int64_t kLater = 4;
  const int64_t row_bytes_;
  int64_t next_ = 0;
  uint8_t* to_[kLater] = {};
  alignas(kLine) uint8_t rows_[kLater * kMostStreamed] = {};
};

}  // namespace

extern "C" {

// Whether this processor hashes fast enough that reading here is worth it.
int64_t dlrm_reads() {
#ifdef __AVX2__
  return 1;
#else
  return 0;
#endif
}

// Reads `count` chunks, which lie from begins[i] to ends[i] of files[i], header included, into intos[i], which has room
// for all these bytes; notes type and number of records (the lowest byte and the rest) in kinds[i], and in sizes[i] its
// data's size, or -1 where anything is not as its hashes say, which says nothing of what is wrong.
void dlrm_read_chunks(int64_t count, const int32_t* files, const int64_t* begins, const int64_t* ends,
                      uint8_t* const* intos, uint64_t* kinds, int64_t* sizes) {
#ifdef __AVX2__
  // Two at a time, as each step of a hash waits for the one before.
  for (int64_t i = 0; i < count; i += 2) {
    Chunk one(files[i], begins[i], ends[i], intos[i]);
    if (i + 1 == count) {
      while (one.Read()) one.HashReady();
      one.Note(&kinds[i], &sizes[i]);
      break;
    }
    Chunk other(files[i + 1], begins[i + 1], ends[i + 1], intos[i + 1]);
    for (bool more = true, others = true; more || others;) {
      more = more && one.Read();
      others = others && other.Read();
      const int64_t packets = std::min(more ? one.Packets() : 0, others ? other.Packets() : 0);
      UpdateBoth(one.hash, one.Take(packets), other.hash, other.Take(packets), packets);
      if (more) one.HashReady();
      if (others) other.HashReady();
    }
    one.Note(&kinds[i], &sizes[i]);
    other.Note(&kinds[i + 1], &sizes[i + 1]);
  }
#else
  for (int64_t i = 0; i < count; ++i) sizes[i] = -1;
#endif
}

// Whether an id of (rows, slots) is neither -1 nor below its slot's limit.
int64_t dlrm_any_outside(const uint8_t* ids, int64_t rows, int64_t slots, const uint32_t* limits_K) {
  // Many rows are one wide one, as processors are fast where rows are wide.
  const int64_t wide = std::max<int64_t>(1, 256 / std::max<int64_t>(slots, 1));
  std::vector<uint32_t> repeated;
  for (int64_t i = 0; i < wide; ++i) repeated.insert(repeated.end(), limits_K, limits_K + slots);
  const uint32_t* const limits = repeated.data();
  uint32_t outside = 0;
  for (int64_t row = 0; row < rows; row += wide) {
    const Id* const first = reinterpret_cast<const Id*>(ids + row * slots * 4);
    const int64_t count = std::min(wide, rows - row) * slots;
    uint32_t here = 0;  // -1 is 0, one more than an id at most its limit.
    for (int64_t i = 0; i < count; ++i) here |= std::max<uint32_t>(first[i] + 1, limits[i]) ^ limits[i];
    outside |= here;
  }
  return outside != 0;
}

// Puts `count` rows into windows of packed rows. Column c of row i is at starts[c] + i * widths[c]; the columns of a row,
// and without `weighted` a weight of 1, belong side by side into row r of window w, of places[i] = w << 32 | r, which is
// at windows[w] + r * row_bytes. A row of a negative place goes nowhere.
void dlrm_scatter(const uint8_t* const* starts, const int64_t* widths, int64_t columns, int64_t weighted,
                  int64_t row_bytes, const int64_t* places, int64_t count, uint8_t* const* windows) {
  const float one = 1;
  const auto to = [&](int64_t place) { return windows[place >> 32] + (place & 0xffffffff) * row_bytes; };
  const auto put = [&](int64_t i, uint8_t* at) {
    for (int64_t c = 0; c < columns; at += widths[c++]) Copy(at, starts[c] + i * widths[c], widths[c]);
    if (!weighted) std::memcpy(at, &one, 4);
  };
  if (Streams(row_bytes)) {
    Lines rows(row_bytes);
    for (int64_t i = 0; i < count; ++i) {
      if (places[i] >= 0) put(i, rows.Next(to(places[i])));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count && places[i + kAhead] >= 0) {
      uint8_t* const at = to(places[i + kAhead]);
      for (int64_t byte = 0; byte < row_bytes; byte += kLine) __builtin_prefetch(at + byte, 1);
      __builtin_prefetch(at + row_bytes - 1, 1);
    }
    if (places[i] >= 0) put(i, to(places[i]));
  }
}

// Where rows that are visited in this order, from `first` on, belong: to[rows[i]] = first + i.
void dlrm_places(const int64_t* rows, int64_t count, int64_t first, int64_t* to) {
  for (int64_t i = 0; i < count; ++i) to[rows[i]] = first + i;
}

// Where the columns are in the data of plain chunks of `size` bytes and `rows` rows, and the bytes that are no column's:
// gap g begins at gaps[2 * g] and has gaps[2 * g + 1] bytes; `between` has them, one after the other.
struct Layout {
  int64_t size, rows, num_gaps, ids, slots, num_columns, weighted, row_bytes;
  const int64_t* gaps;
  const uint8_t* between;
  const int64_t *columns, *widths;
  const uint32_t* limits_K;
};

// Reads chunks as dlrm_read_chunks and puts their rows into windows as dlrm_scatter: of chunk i those of the stretches
// firsts[i] to firsts[i + 1]; a stretch is three numbers: its first row, that behind its last, and where in `places` it
// begins. `memory` is twice `room` bytes, which are enough for any of the chunks. done[i] says whether it was: a chunk
// of another layout, one that is not as its hashes say, and one with an id outside its table are not.
void dlrm_fill(const Layout* layout, int64_t count, const int32_t* files, const int64_t* begins, const int64_t* ends,
               uint8_t* memory, int64_t room, const int64_t* firsts, const int64_t* stretches, const int64_t* places,
               uint8_t* const* windows, uint8_t* done) {
  std::vector<const uint8_t*> starts(layout->num_columns);
  for (int64_t i = 0; i < count; i += 2) {
    const int64_t some = std::min<int64_t>(2, count - i);
    uint8_t* const intos[] = {memory, memory + room};
    uint64_t kinds[2];
    int64_t sizes[2];
    dlrm_read_chunks(some, files + i, begins + i, ends + i, intos, kinds, sizes);
    for (int64_t j = 0; j < some; ++j) {
      const uint8_t* const data = intos[j] + kChunkHeader;
      bool plain = sizes[j] == layout->size && kinds[j] == (1 << 8 | 'r');
      const uint8_t* between = layout->between;
      for (int64_t g = 0; plain && g < layout->num_gaps; between += layout->gaps[2 * g++ + 1]) {
        plain = !std::memcmp(data + layout->gaps[2 * g], between, layout->gaps[2 * g + 1]);
      }
      done[i + j] = plain && !dlrm_any_outside(data + layout->ids, layout->rows, layout->slots, layout->limits_K);
      for (int64_t k = firsts[i + j]; done[i + j] && k < firsts[i + j + 1]; ++k) {
        const int64_t* const stretch = stretches + 3 * k;
        for (int64_t c = 0; c < layout->num_columns; ++c) {
          starts[c] = data + layout->columns[c] + stretch[0] * layout->widths[c];
        }
        dlrm_scatter(starts.data(), layout->widths, layout->num_columns, layout->weighted, layout->row_bytes,
                     places + stretch[2], stretch[1] - stretch[0], windows);
      }
    }
  }
}

// What numpy.random.Generator.permutation(count) gives, by the bit generator whose `next` and `state` these are: each
// row, the last one first, changes places with one of those up to it, whose number is drawn anew while it is above.
void dlrm_permutation(uint32_t (*next)(void*), void* state, int64_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = i;
  uint32_t others[kAhead];  // Known ahead, so that they are asked for before they are swapped.
  for (int64_t last = count - 1; last > 0;) {
    const uint32_t mask = ~uint32_t{0} >> __builtin_clz(static_cast<uint32_t>(last));
    // Of these the mask is the same.
    const int64_t some = std::min<int64_t>(kAhead, last - (mask >> 1));
    for (int64_t i = 0; i < some;) {  // Without a jump that nobody foresees.
      const uint32_t other = next(state) & mask;
      others[i] = other;
      i += other <= last - i;
    }
    for (int64_t i = 0; i < some; ++i) __builtin_prefetch(to + others[i], 1);
    for (int64_t i = 0; i < some; ++i) std::swap(to[last - i], to[others[i]]);
    last -= some;
  }
}

}  // extern "C"
