// Loops that torch has no single fast operation for, compiled at the first use where a compiler is at hand
// (native.py). Whatever they compute, torch computes too (products.py, mixing.py, slots.py): they are there for speed alone.
//
// Sums are in fp32. bf16 is stored as the upper half of an fp32.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

inline float get(float x) { return x; }
inline float get(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    to.bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// Vectors of as many floats as a register holds, and how to read one from each format of weights. Where GCC's own
// widening is slow (one number at a time), the processor's instruction is named.
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));

inline float get(int8_t x) { return float(x); }
inline vec read(const float* from) { return *reinterpret_cast<const vec*>(from); }
inline vec read(const bf16* from) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    uvec wide;
    for (int i = 0; i < LANES; i++) wide[i] = uint32_t(from[i].bits) << 16;
    return (vec)wide;
#endif
}
inline vec read(const int8_t* from) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    vec wide;
    for (int i = 0; i < LANES; i++) wide[i] = float(from[i]);
    return wide;
#endif
}

// As many numbers as a register holds of a row of X and of weights of W, and how both go into a sum. In: what products
// read their rows in where all else is in T: as wide as their sums, unless the processor multiplies pairs of bf16.
template <typename X, typename W>
struct Lane {
    static constexpr int64_t COUNT = LANES;
    typedef vec many;
    template <typename T>
    static many of(const T* from) { return read(from); }
    static void add(vec& sum, many x, many w) { sum += x * w; }
};
#ifdef __AVX512BF16__
template <>
struct Lane<bf16, bf16> {
    static constexpr int64_t COUNT = 2 * LANES;
    typedef __m512bh many;
    static many of(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static void add(vec& sum, many x, many w) { sum = (vec)_mm512_dpbf16_ps((__m512)sum, x, w); }
};
template <typename T, typename W>
using In = std::conditional_t<std::is_same_v<T, bf16> && std::is_same_v<W, bf16>, bf16, float>;
#else
template <typename T, typename W>
using In = float;
#endif

// COLS: columns of w at a time for which sums of four rows, and what goes into them, fit into the registers.
#ifdef __AVX512F__
constexpr int COLS = 4;

// What 16 sums come to, all at once: halves of two are added into one register, then quarters of those, and so on.
inline vec totals(const vec sum[16]) {
    const auto eighths = [&](int i, int j) {
        const __m512 a = (__m512)sum[i], b = (__m512)sum[j];
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const auto quarters = [&](int i) {
        const __m512 a = eighths(i, i + 4), b = eighths(i + 8, i + 12);
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    const auto pairs = [&](int i) {
        const __m512 a = quarters(i), b = quarters(i + 1);
        return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    };
    const __m512 a = pairs(0), b = pairs(2);
    return (vec)_mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
#else
constexpr int COLS = 3;
#endif

// y[r][c] = x[r] . w[c] for ROWS rows of x and WIDTH of w: every number read is used WIDTH or ROWS times.
template <int ROWS, int WIDTH, typename X, typename W>
inline void block(const X* x, const W* w, int64_t n, float y[ROWS][WIDTH]) {
    typedef Lane<X, W> Own;
    vec sum[ROWS][WIDTH];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < WIDTH; c++) sum[r][c] = vec{};
    int64_t j = 0;
    for (; j + Own::COUNT <= n; j += Own::COUNT) {
        typename Own::many part[WIDTH];
#pragma GCC unroll 8
        for (int c = 0; c < WIDTH; c++) {
            part[c] = Own::of(w + c * n + j);
            __builtin_prefetch(w + (c + WIDTH) * n + j);  // of the columns after these
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const typename Own::many own = Own::of(x + r * n + j);
#pragma GCC unroll 8
            for (int c = 0; c < WIDTH; c++) Own::add(sum[r][c], own, part[c]);
        }
    }
#ifdef __AVX512F__
    if constexpr (ROWS * WIDTH == 16) {
        *reinterpret_cast<vec*>(&y[0][0]) = totals(&sum[0][0]);
        for (int64_t k = j; k < n; k++)
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < WIDTH; c++) y[r][c] += get(x[r * n + k]) * get(w[c * n + k]);
        return;
    }
#endif
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < WIDTH; c++) {
            float total = 0;
            for (int i = 0; i < LANES; i++) total += sum[r][c][i];
            for (int64_t k = j; k < n; k++) total += get(x[r * n + k]) * get(w[c * n + k]);
            y[r][c] = total;
        }
}

// x . w for one row: the weights are read straight on, in four sums at a time that do not wait for each other.
template <typename X, typename W>
inline float dot(const X* x, const W* w, int64_t n) {
    typedef Lane<X, W> Own;
    vec sum[4] = {vec{}, vec{}, vec{}, vec{}};
    int64_t j = 0;
    for (; j + 4 * Own::COUNT <= n; j += 4 * Own::COUNT)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) Own::add(sum[i], Own::of(x + j + i * Own::COUNT), Own::of(w + j + i * Own::COUNT));
    for (; j + Own::COUNT <= n; j += Own::COUNT) Own::add(sum[0], Own::of(x + j), Own::of(w + j));
    const vec all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float total = 0;
    for (int i = 0; i < LANES; i++) total += all[i];
    for (; j < n; j++) total += get(x[j]) * get(w[j]);
    return total;
}

// to[r * stride + c] = x[r] . w[c] for rows of x and WIDTH of w.
template <int WIDTH, typename X, typename W>
inline void columns(float* to, int64_t stride, const X* x, const W* w, int64_t rows, int64_t n) {
    int64_t row = 0;
#define ROWS_AT_ONCE(ROWS)                                                                                             \
    {                                                                                                                  \
        float found[ROWS][WIDTH];                                                                                       \
        block<ROWS, WIDTH>(x + row * n, w, n, found);                                                                   \
        for (int r = 0; r < ROWS; r++)                                                                                 \
            for (int c = 0; c < WIDTH; c++) to[(row + r) * stride + c] = found[r][c];                                   \
    }
    for (; row + 4 <= rows; row += 4) ROWS_AT_ONCE(4)
    if (rows - row == 3) ROWS_AT_ONCE(3)
    if (rows - row == 2) ROWS_AT_ONCE(2)
    if (rows - row == 1) ROWS_AT_ONCE(1)
#undef ROWS_AT_ONCE
}

// The same for any number of columns.
template <typename X, typename W>
inline void product(float* to, int64_t stride, const X* x, const W* w, int64_t rows, int64_t n, int64_t cols) {
    int64_t col = 0;
    if (rows == 1)
        for (; col < cols; col++) to[col] = dot(x, w + col * n, n);
    for (; col + COLS <= cols; col += COLS) columns<COLS>(to + col, stride, x, w + col * n, rows, n);
    for (; col < cols; col++) columns<1>(to + col, stride, x, w + col * n, rows, n);
}

// Sums and activations are in fp32 within a step; these read a format, or write to it.
template <typename T>
inline void widen(float* to, const T* from, int64_t n) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) *reinterpret_cast<vec*>(to + j) = read(from + j);
    for (; j < n; j++) to[j] = get(from[j]);
}

// e to the x, to 2e-7 relative: a power of two, and a polynomial for what is left of the exponent.
inline vec exponential(vec x) {
    typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
    x = x < -87.0f ? vec{} - 87.0f : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    const vec turns = x * 1.44269504f;
    const ivec power = __builtin_convertvector(turns + (turns < 0.0f ? vec{} - 0.5f : vec{} + 0.5f), ivec);
    const vec whole = __builtin_convertvector(power, vec);
    const vec r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (vec)((power + 127) << 23);
}

// Where the factors of a part's adapter lie at a site: a (rank, d_in), b (rank, d_out). rank 0: it has none there.
struct Pair {
    int64_t a, b, rank;
};

// Rows of a step by their adapter: part p has the rows from edges[2p] to before edges[2p + 1]; scale: of every row.
struct Parts {
    int64_t count;
    const int64_t* edges;
    const Pair* pairs;
    const float* scale;

    int64_t most() const {
        int64_t rank = 0;
        for (int64_t p = 0; p < count; p++) rank = std::max(rank, pairs[p].rank);
        return rank;
    }
};

// One product of a site: y (rows, d_out) = x wT (* of) + bias + what the parts add. w (d_out, d_in): where it is missing
// the parts are added to what y holds. of (d_out,), bias (d_out,): may be missing.
template <typename Y, typename T, typename W>
struct Product {
    Y* y;
    const W* w;
    const float* of;
    const T* bias;
    int64_t d_out;
    Parts parts;
};

// Products of one input x (rows, d_in), by all threads of a team; u (count, rows, most): room for what lies between the
// factors. The weights are read once, in order, for all rows.
template <typename Y, typename T, typename W>
void products(const Product<Y, T, W>* all, int64_t count, const In<T, W>* x, int64_t rows, int64_t d_in, float* u) {
    constexpr int64_t WIDE = 48, RANKS = 12;  // columns, and ranks, that a thread takes at a time
    constexpr int64_t TALL = 32;              // rows that stay in a core's cache while columns go by
    int64_t most = 0, parts = 0, pieces = 0;
    for (int64_t i = 0; i < count; i++) {
        most = std::max(most, all[i].parts.most());
        parts = std::max(parts, all[i].parts.count);
        pieces += (all[i].d_out + WIDE - 1) / WIDE;
    }
    const int64_t chunks = (most + RANKS - 1) / RANKS;
    if (most > 0) {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count * parts * chunks; t++) {
            const int64_t i = t / (parts * chunks), p = t / chunks % parts, rank = t % chunks * RANKS;
            if (p >= all[i].parts.count || rank >= all[i].parts.pairs[p].rank) continue;
            const Pair pair = all[i].parts.pairs[p];
            const int64_t first = all[i].parts.edges[2 * p], end = all[i].parts.edges[2 * p + 1];
            const int64_t some = std::min(RANKS, pair.rank - rank);
            float* to = u + i * rows * most;
            product(to + first * most + rank, most, x + first * d_in, reinterpret_cast<const T*>(pair.a) + rank * d_in,
                    end - first, d_in, some);
            for (int64_t row = first; row < end; row++)
                for (int64_t r = rank; r < rank + some; r++) to[row * most + r] *= all[i].parts.scale[row];
        }
    }
    static thread_local std::vector<float> held;
    held.resize(size_t(rows * WIDE));
    float* to = held.data();
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t i = 0, number = piece;
        while (number >= (all[i].d_out + WIDE - 1) / WIDE) number -= (all[i++].d_out + WIDE - 1) / WIDE;
        const Product<Y, T, W>& own = all[i];
        const int64_t col = number * WIDE, cols = std::min(WIDE, own.d_out - col);
        if (own.w)
            for (int64_t row = 0; row < rows; row += TALL)
                product(to + row * WIDE, WIDE, x + row * d_in, own.w + col * d_in, std::min(TALL, rows - row), d_in, cols);
        else
            for (int64_t row = 0; row < rows; row++) widen(to + row * WIDE, own.y + row * own.d_out + col, cols);
        if (own.of || own.bias)
            for (int64_t row = 0; row < rows; row++)
                for (int64_t c = 0; c < cols; c++)
                    to[row * WIDE + c] = to[row * WIDE + c] * (own.of ? own.of[col + c] : 1.0f) +
                                         (own.bias ? get(own.bias[col + c]) : 0.0f);
        for (int64_t p = 0; p < own.parts.count; p++) {
            const T* b = reinterpret_cast<const T*>(own.parts.pairs[p].b) + col;
            float line[WIDE];
            for (int64_t r = 0; r < own.parts.pairs[p].rank; r++) {
                widen(line, b + r * own.d_out, cols);
                for (int64_t row = own.parts.edges[2 * p]; row < own.parts.edges[2 * p + 1]; row++) {
                    const float much = u[(i * rows + row) * most + r];
#pragma omp simd
                    for (int64_t c = 0; c < cols; c++) to[row * WIDE + c] += much * line[c];
                }
            }
        }
        for (int64_t row = 0; row < rows; row++)
            for (int64_t c = 0; c < cols; c++) put(own.y[row * own.d_out + col + c], to[row * WIDE + c]);
    }
}

// One site, for rows in their own format.
template <typename T, typename W>
void linear(T* y, const T* x, const W* w, const float* of, const T* bias, int64_t rows, int64_t d_in, int64_t d_out,
            Parts parts) {
    static thread_local std::vector<float> wide, inner;
    inner.resize(size_t(rows * parts.most()));
    float* u = inner.data();
    const Product<T, T, W> own{y, w, of, bias, d_out, parts};
    if constexpr (std::is_same_v<T, In<T, W>>) {
#pragma omp parallel
        products(&own, 1, x, rows, d_in, u);
    } else {
        wide.resize(size_t(rows * d_in));
        float* from = wide.data();
#pragma omp parallel
        {
#pragma omp for
            for (int64_t row = 0; row < rows; row++) widen(from + row * d_in, x + row * d_in, d_in);
            products(&own, 1, from, rows, d_in, u);
        }
    }
}

// Attention of every row, by all threads of a team: out and q (rows, heads, depth), keys and values (slots, kept,
// room, depth). Row i sees of slot seen[3i] the tokens from seen[3i + 1] to before seen[3i + 2].
template <typename Out, typename Q, typename T>
void attend(Out* out, const Q* q, const T* keys, const T* values, int64_t rows, int64_t heads, int64_t kept, int64_t room,
            int64_t depth, const int64_t* seen, float scale) {
    const int64_t shared = heads / kept;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t h = 0; h < kept; h++) {
            const int64_t from = seen[3 * i + 1], n = seen[3 * i + 2] - from;
            const int64_t start = ((seen[3 * i] * kept + h) * room + from) * depth;
            const int64_t padded = (n + LANES - 1) / LANES * LANES;
            static thread_local std::vector<float> held;
            held.resize(size_t(shared * (padded + 2 * depth)));
            float *scores = held.data(), *sums = scores + shared * padded, *own = sums + shared * depth;
            const int64_t place = (i * heads + h * shared) * depth;
            widen(own, q + place, shared * depth);
            product(scores, padded, own, keys + start, shared, depth, n);
            std::fill(sums, sums + shared * depth, 0.0f);
            for (int64_t g = 0; g < shared; g++) {
                float *s = scores + g * padded, *to = sums + g * depth, most = s[0], total = 0;
                for (int64_t t = 1; t < n; t++) most = std::max(most, s[t]);
                for (int64_t t = n; t < padded; t++) s[t] = most - 200.0f / scale;  // of no weight
                for (int64_t t = 0; t < padded; t += LANES) {
                    const vec e = exponential((*reinterpret_cast<vec*>(s + t) - most) * scale);
                    *reinterpret_cast<vec*>(s + t) = e;
                }
                for (int64_t t = 0; t < n; t++) total += s[t];
                for (int64_t t = 0; t < n; t++) s[t] /= total;
                const T* v = values + start;
                int64_t t = 0;
                for (; t + 4 <= n; t += 4) {
                    const T *b0 = v + t * depth, *b1 = b0 + depth, *b2 = b1 + depth, *b3 = b2 + depth;
                    int64_t j = 0;
                    for (; j + LANES <= depth; j += LANES)
                        *reinterpret_cast<vec*>(to + j) += s[t] * read(b0 + j) + s[t + 1] * read(b1 + j) +
                                                           s[t + 2] * read(b2 + j) + s[t + 3] * read(b3 + j);
                    for (; j < depth; j++)
                        to[j] += s[t] * get(b0[j]) + s[t + 1] * get(b1[j]) + s[t + 2] * get(b2[j]) + s[t + 3] * get(b3[j]);
                }
                for (; t < n; t++)
                    for (int64_t j = 0; j < depth; j++) to[j] += s[t] * get(v[t * depth + j]);
            }
            for (int64_t j = 0; j < shared * depth; j++) put(out[place + j], sums[j]);
        }
}

// x += delta, where there is one, and y = weight * x / root mean square of x; all (rows, n), weight (n,). By a team.
template <typename Y, typename X, typename T>
void norm(Y* y, X* x, const X* delta, const T* weight, int64_t rows, int64_t n, float epsilon) {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
        X* own = x + row * n;
        Y* to = y + row * n;
        if (delta)
            for (int64_t j = 0; j < n; j++) put(own[j], get(own[j]) + get(delta[row * n + j]));
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < n; j++) total += get(own[j]) * get(own[j]);
        const float by = 1.0f / std::sqrt(total / float(n) + epsilon);
        for (int64_t j = 0; j < n; j++) put(to[j], get(weight[j]) * (get(own[j]) * by));
    }
}

// to = silu(gate) * up, of n numbers; to may be gate. By a team.
template <typename To, typename T>
void gated(To* to, const T* gate, const T* up, int64_t n) {
    constexpr int64_t SOME = 1024;
#pragma omp for
    for (int64_t start = 0; start < n; start += SOME) {
        const int64_t end = std::min(n, start + SOME);
        int64_t j = start;
        for (; j + LANES <= end; j += LANES) {
            const vec x = read(gate + j), y = x / (1.0f + exponential(-x)) * read(up + j);
            for (int i = 0; i < LANES; i++) put(to[j + i], y[i]);
        }
        for (; j < end; j++) put(to[j], get(gate[j]) / (1.0f + std::exp(-get(gate[j]))) * get(up[j]));
    }
}

template <typename To, typename X, typename T>
inline void rotated(To* to, const X* x, const T* cos, const T* sin, int64_t depth) {
    const int64_t half = depth / 2;
    for (int64_t j = 0; j < half; j++) {
        const float a = get(x[j]), b = get(x[j + half]);
        put(to[j], a * get(cos[j]) - b * get(sin[j]));
        put(to[j + half], b * get(cos[j + half]) + a * get(sin[j + half]));
    }
}

// Where the keys and values of a step go: in layers of (slots, kept, room, depth), row i's to slot number[i], token
// position[i].
struct Places {
    const int64_t *number, *position;
    int64_t kept, room, depth;
};

// Rotary positions for q (rows, heads, depth), in place, and for k (rows, kept, depth), which goes with v to its place.
// cos, sin (rows, depth). By a team.
template <typename X, typename T>
void store(X* q, const X* k, const X* v, const T* cos, const T* sin, T* keys, T* values, Places where, int64_t rows,
           int64_t heads) {
    const int64_t kept = where.kept, depth = where.depth;
#pragma omp for
    for (int64_t i = 0; i < rows; i++) {
        const T *c = cos + i * depth, *s = sin + i * depth;
        for (int64_t h = 0; h < heads; h++) {
            X* own = q + (i * heads + h) * depth;
            rotated(own, own, c, s, depth);
        }
        for (int64_t h = 0; h < kept; h++) {
            const int64_t from = (i * kept + h) * depth;
            const int64_t to = ((where.number[i] * kept + h) * where.room + where.position[i]) * depth;
            rotated(keys + to, k + from, c, s, depth);
            for (int64_t j = 0; j < depth; j++) put(values[to + j], get(v[from + j]));
        }
    }
}

// A whole step of a model of Llama's shape. A row is a token: the next one of an answer, or one of a prompt, which sees
// those before it because all keys and values of the step are stored before any row attends.

// A site: its weight (d_out, d_in), the scale of each output where it is in 8 bits, its bias; 0 where there is none.
struct Site {
    int64_t w, of, bias, d_in, d_out, number;
};

// A block's parts in the order they act, its norms, and its keys and values.
struct Block {
    Site q, k, v, o, gate, up, down;
    int64_t before, after, keys, values;
};

// x (rows, width) fp32 -> logits (told, vocabulary) fp32 of the rows `ends`, which ascend. table (sites, parts): the
// factors of each part at each site. spent (9,): where the seconds of this step are added, in the order of the calls of
// `done`.
template <typename T, typename W>
void step(float* logits, float* x, const Block* blocks, int64_t count, const Site* head, const T* last, const T* cos,
          const T* sin, Places where, const int64_t* seen, int64_t rows, const int64_t* ends, int64_t told, int64_t heads,
          float scale, float epsilon, int64_t parts, const int64_t* edges, const Pair* table, int64_t sites, const float* scales, double* spent) {
    const int64_t width = head->d_in, depth = where.depth, wide = blocks[0].gate.d_out;
    int64_t most = 0;
    for (int64_t i = 0; i < sites * parts; i++) most = std::max(most, table[i].rank);
    static thread_local std::vector<float> held;
    const int64_t own = heads * depth, kept = where.kept * depth;
    static thread_local std::vector<In<T, W>> read;
    held.resize(size_t(rows * (width + own + 2 * kept + 2 * wide + 3 * most)));
    read.resize(size_t(rows * (width + own + wide)));
    float *delta = held.data(), *q = delta + rows * width, *k = q + rows * own, *v = k + rows * kept,
          *gate = v + rows * kept, *up = gate + rows * wide, *u = up + rows * wide;
    In<T, W>*h = read.data(), *mixed = h + rows * width, *act = mixed + rows * own;
    auto before = std::chrono::steady_clock::now();
    const auto done = [&](int what) {
#pragma omp master
        {
            const auto now = std::chrono::steady_clock::now();
            spent[what] += std::chrono::duration<double>(now - before).count();
            before = now;
        }
    };
    std::vector<int64_t> last_edges(size_t(2 * parts));  // of the rows that are told
    std::vector<float> last_scales(static_cast<size_t>(told));
    for (int64_t i = 0; i < 2 * parts; i++) last_edges[i] = std::lower_bound(ends, ends + told, edges[i]) - ends;
    for (int64_t i = 0; i < told; i++) last_scales[i] = scales[ends[i]];
    const auto of = [=](const Site& site, float* y) {
        return Product<float, T, W>{y, reinterpret_cast<const W*>(site.w), reinterpret_cast<const float*>(site.of),
                                    reinterpret_cast<const T*>(site.bias), site.d_out,
                                    Parts{parts, edges, table + site.number * parts, scales}};
    };
#pragma omp parallel
    {
        for (int64_t i = 0; i < count; i++) {
            const Block& block = blocks[i];
            T *keys = reinterpret_cast<T*>(block.keys), *values = reinterpret_cast<T*>(block.values);
            norm(h, x, i ? delta : nullptr, reinterpret_cast<const T*>(block.before), rows, width, epsilon);
            done(0);
            const Product<float, T, W> asked[] = {of(block.q, q), of(block.k, k), of(block.v, v)};
            products(asked, 3, h, rows, width, u);
            done(1);
            store(q, k, v, cos, sin, keys, values, where, rows, heads);
            done(2);
            attend(mixed, q, keys, values, rows, heads, where.kept, where.room, depth, seen, scale);
            done(3);
            const Product<float, T, W> out = of(block.o, delta);
            products(&out, 1, mixed, rows, own, u);
            done(4);
            norm(h, x, delta, reinterpret_cast<const T*>(block.after), rows, width, epsilon);
            done(0);
            const Product<float, T, W> doors[] = {of(block.gate, gate), of(block.up, up)};
            products(doors, 2, h, rows, width, u);
            done(5);
            gated(act, gate, up, rows * wide);
            done(6);
            const Product<float, T, W> down = of(block.down, delta);
            products(&down, 1, act, rows, wide, u);
            done(7);
        }
#pragma omp single
        for (int64_t i = 0; i < told; i++)
            for (float* one : {x, delta}) std::copy_n(one + ends[i] * width, width, one + i * width);
        norm(h, x, count ? delta : nullptr, last, told, width, epsilon);
        done(0);
        Product<float, T, W> out = of(*head, logits);
        out.parts.edges = last_edges.data(), out.parts.scale = last_scales.data();
        products(&out, 1, h, told, width, u);
        done(8);
    }
}

}  // namespace

extern "C" {
#define OF_WEIGHTS(NAME, T, W)                                                                                         \
    void linear_##NAME(T* y, const T* x, const W* w, const float* of, const T* bias, int64_t rows, int64_t d_in,       \
                       int64_t d_out, int64_t parts, const int64_t* edges, const Pair* pairs, const float* scale) {    \
        linear(y, x, w, of, bias, rows, d_in, d_out, Parts{parts, edges, pairs, scale});                               \
    }                                                                                                                  \
    void step_##NAME(float* logits, float* x, const Block* blocks, int64_t count, const Site* head, const T* last,     \
                     const T* cos, const T* sin, const int64_t* number, const int64_t* position, int64_t kept,         \
                     int64_t room, int64_t depth, const int64_t* seen, int64_t rows, const int64_t* ends, int64_t told, \
                     int64_t heads, float scale, float epsilon, int64_t parts, const int64_t* edges,                   \
                     const Pair* table, int64_t sites, const float* scales, double* spent) {                           \
        step<T, W>(logits, x, blocks, count, head, last, cos, sin, Places{number, position, kept, room, depth}, seen,  \
                   rows, ends, told, heads, scale, epsilon, parts, edges, table, sites, scales, spent);                \
    }
OF_WEIGHTS(fp32_fp32, float, float)
OF_WEIGHTS(fp32_int8, float, int8_t)
OF_WEIGHTS(bf16_bf16, bf16, bf16)
OF_WEIGHTS(bf16_int8, bf16, int8_t)

#define OF_ONE_KIND(NAME, T)                                                                                            \
    void attend_##NAME(T* out, const T* q, const T* k, const T* v, int64_t rows, int64_t heads, int64_t kept,          \
                       int64_t room, int64_t depth, const int64_t* seen, float scale) {                                \
        _Pragma("omp parallel") attend(out, q, k, v, rows, heads, kept, room, depth, seen, scale);                     \
    }                                                                                                                  \
    void norm_##NAME(T* y, T* x, const T* delta, const T* weight, int64_t rows, int64_t n, float epsilon) {            \
        _Pragma("omp parallel if (rows > 64)") norm(y, x, delta, weight, rows, n, epsilon);                            \
    }                                                                                                                  \
    void gated_##NAME(T* gate, const T* up, int64_t n) { _Pragma("omp parallel") gated(gate, gate, up, n); }           \
    void store_##NAME(T* q, const T* k, const T* v, const T* cos, const T* sin, T* keys, T* values,                    \
                      const int64_t* number, const int64_t* position, int64_t rows, int64_t heads, int64_t kept,       \
                      int64_t room, int64_t depth) {                                                                   \
        _Pragma("omp parallel if (rows > 64)")                                                                         \
            store(q, k, v, cos, sin, keys, values, Places{number, position, kept, room, depth}, rows, heads);          \
    }
OF_ONE_KIND(fp32, float)
OF_ONE_KIND(bf16, bf16)
}
