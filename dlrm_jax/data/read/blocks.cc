// Blocks of rows from disk into windows of batches, with two passes over the bytes: one that reads and checks them, one
// that puts rows, in the order of their visit, where batches want them. shards.py and parts.py call it, by ctypes.
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
constexpr int64_t kBlocksAtATime = 4;  // Of what is read, so that it is hashed while the cache has it.

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
#endif

// Rows that follow each other, as bytes of each column: row r of all is at start[c] + r * width[c].
struct Part {
  std::vector<const uint8_t*> start;
};

// For a window of hundreds of parts it is the first part with a row of each cell; the next ones are found by stepping.
constexpr int64_t kCell = 256;
constexpr int64_t kAhead = 32, kLine = 64;

typedef char Bytes16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef char Bytes32 __attribute__((vector_size(32), aligned(1), may_alias));

template <typename Bytes>
inline void CopyBy(uint8_t* to, const uint8_t* from, int64_t size) {
  constexpr int64_t kStep = sizeof(Bytes);
  int64_t at = 0;
  for (; at + kStep <= size; at += kStep) {
    *reinterpret_cast<Bytes*>(to + at) = *reinterpret_cast<const Bytes*>(from + at);
  }
  if (at < size) *reinterpret_cast<Bytes*>(to + size - kStep) = *reinterpret_cast<const Bytes*>(from + size - kStep);
}

inline void Copy(uint8_t* to, const uint8_t* from, int64_t size) {
  if (size == 4) {
    std::memcpy(to, from, 4);
  } else if (size >= 32) {
    CopyBy<Bytes32>(to, from, size);
  } else if (size >= 16) {
    CopyBy<Bytes16>(to, from, size);
  } else {
    std::memcpy(to, from, size);
  }
}

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

// Reads the chunk that lies from `begin` to `end` of a file, behind its header into `into`, which has room for
// end - begin bytes; notes type and number of records (the lowest byte and the rest) in `kind`. Its data's size; -1
// where anything is not as its hashes say, which says nothing of what is wrong.
int64_t dlrm_read_chunk(int file, int64_t begin, int64_t end, uint8_t* into, uint64_t* kind) {
#ifdef __AVX2__
  Hash hash;
  uint8_t* const data = into + kChunkHeader;
  const uint8_t* hashed = data;
  int64_t size = -1;
  for (uint8_t* read = into; begin < end;) {
    begin = ReadSome(file, begin, end, read);
    if (begin < 0) return -1;
    if (size < 0) {
      if (read - into < kChunkHeader && begin < end) continue;
      if (read - into < kChunkHeader || HashOf(into + 8, kChunkHeader - 8) != Number(into)) return -1;
      size = Number(into + 8);
      *kind = Number(into + 24);
      if (size < 0 || size > end) return -1;
    }
    const uint8_t* const stop = std::min<const uint8_t*>(read, data + size);
    for (; hashed + 32 <= stop; hashed += 32) hash.Update(Load(hashed));
    if (begin >= end && read < data + size) return -1;
  }
  if (size < 0 || hash.Finish(hashed, static_cast<int>(data + size - hashed)) != Number(into + 16)) return -1;
  return size;
#else
  return -1;
#endif
}

// Whether an id of (rows, slots) is neither -1 nor below its slot's limit.
int64_t dlrm_any_outside(const uint8_t* ids, int64_t rows, int64_t slots, const int32_t* limits_K) {
  // Many rows are one wide one, as processors are fast where rows are wide.
  const int64_t wide = std::max<int64_t>(1, 256 / std::max<int64_t>(slots, 1));
  std::vector<uint32_t> limits;
  for (int64_t i = 0; i < wide; ++i) limits.insert(limits.end(), limits_K, limits_K + slots);
  uint32_t outside = 0;
  for (int64_t row = 0; row < rows; row += wide) {
    const uint8_t* const first = ids + row * slots * 4;
    const int64_t count = std::min(wide, rows - row) * slots;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t id;
      std::memcpy(&id, first + 4 * i, 4);
      outside |= id + 1 > limits[i];
    }
  }
  return outside;
}

// Puts rows order[0..count) of all parts, one after the other, into each column's `to`. Part p has the rows from
// firsts[p] to firsts[p + 1], its column c at starts[p * columns + c], `widths[c]` bytes a row.
void dlrm_gather(const uint8_t* const* starts, const int64_t* firsts, int64_t parts, const int64_t* order,
                 int64_t count, int64_t columns, const int64_t* widths, uint8_t* const* to) {
  std::vector<const uint8_t*> from(parts * columns);  // Where row 0 of all would be.
  for (int64_t p = 0; p < parts; ++p) {
    for (int64_t c = 0; c < columns; ++c) from[p * columns + c] = starts[p * columns + c] - firsts[p] * widths[c];
  }
  std::vector<int32_t> cells(firsts[parts] / kCell + 1);
  for (int64_t cell = 0, p = 0; cell < static_cast<int64_t>(cells.size()); ++cell) {
    while (p + 1 < parts && firsts[p + 1] <= cell * kCell) ++p;
    cells[cell] = p;
  }
  const auto place = [&](int64_t row) {
    int64_t p = cells[row / kCell];
    while (row >= firsts[p + 1]) ++p;
    return &from[p * columns];
  };
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      const int64_t row = order[i + kAhead];
      const uint8_t* const* const start = place(row);
      for (int64_t c = 0; c < columns; ++c) {
        const uint8_t* const at = start[c] + row * widths[c];
        for (int64_t byte = 0; byte < widths[c]; byte += kLine) __builtin_prefetch(at + byte);
        __builtin_prefetch(at + widths[c] - 1);
      }
    }
    const int64_t row = order[i];
    const uint8_t* const* const start = place(row);
    for (int64_t c = 0; c < columns; ++c) Copy(to[c] + i * widths[c], start[c] + row * widths[c], widths[c]);
  }
}

}  // extern "C"
