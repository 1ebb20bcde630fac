// Loops that torch has no single fast operation for, compiled at the first use where a compiler is at hand
// (native.py). Whatever they compute, torch computes too (products.py, mixing.py, slots.py): they are there for speed alone.
//
// Sums are in fp32. bf16 is stored as the upper half of an fp32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

// y[r][c] = x[r] . w[c] for ROWS rows of x and COLS of w: every number read is used COLS or ROWS times.
template <int ROWS, int COLS, typename W>
inline void block(const float* x, const W* w, int64_t n, float y[ROWS][COLS]) {
    vec sum[ROWS][COLS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++) sum[r][c] = vec{};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        vec part[COLS];
#pragma GCC unroll 4
        for (int c = 0; c < COLS; c++) part[c] = read(w + c * n + j);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const vec own = read(x + r * n + j);
#pragma GCC unroll 4
            for (int c = 0; c < COLS; c++) sum[r][c] += own * part[c];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++) {
            float total = 0;
            for (int i = 0; i < LANES; i++) total += sum[r][c][i];
            for (int64_t k = j; k < n; k++) total += x[r * n + k] * get(w[c * n + k]);
            y[r][c] = total;
        }
}

// to[r * stride + c] = x[r] . w[c] for rows of x and COLS of w.
template <int COLS, typename W>
inline void columns(float* to, int64_t stride, const float* x, const W* w, int64_t rows, int64_t n) {
    int64_t row = 0;
#define ROWS_AT_ONCE(ROWS)                                                                                             \
    {                                                                                                                  \
        float found[ROWS][COLS];                                                                                       \
        block<ROWS, COLS>(x + row * n, w, n, found);                                                                   \
        for (int r = 0; r < ROWS; r++)                                                                                 \
            for (int c = 0; c < COLS; c++) to[(row + r) * stride + c] = found[r][c];                                   \
    }
    for (; row + 4 <= rows; row += 4) ROWS_AT_ONCE(4)
    if (rows - row == 3) ROWS_AT_ONCE(3)
    if (rows - row == 2) ROWS_AT_ONCE(2)
    if (rows - row == 1) ROWS_AT_ONCE(1)
#undef ROWS_AT_ONCE
}

// The same for any number of columns.
template <typename W>
inline void product(float* to, int64_t stride, const float* x, const W* w, int64_t rows, int64_t n, int64_t cols) {
    int64_t col = 0;
    for (; col + 3 <= cols; col += 3) columns<3>(to + col, stride, x, w + col * n, rows, n);
    for (; col < cols; col++) columns<1>(to + col, stride, x, w + col * n, rows, n);
}

// One row of a table: where the factors of a part's adapter lie at this site. rank 0: it has none there.
struct Pair {
    int64_t a, b, rank;
};

// y (rows, d_out) = x (rows, d_in) wT (* of) + bias, and for the rows of each part, from edges[2p] to before
// edges[2p + 1], + scale[row] * B (A x). The weights are read once, in order, for all rows. w (d_out, d_in): where it is
// missing the parts are added to what y holds. of (d_out,), bias (d_out,): may be missing.
template <typename T, typename W>
void linear(T* y, const T* x, const W* w, const float* of, const T* bias, int64_t rows, int64_t d_in, int64_t d_out,
            int64_t parts, const int64_t* edges, const Pair* pairs, const float* scale) {
    constexpr int64_t WIDE = 48, RANKS = 12;  // columns, and ranks, that a thread takes at a time
    struct Task {
        int64_t part, rank;
    };
    static thread_local std::vector<float> wide, inner;
    static thread_local std::vector<Task> tasks;
    wide.resize(size_t(rows * d_in));
    for (int64_t i = 0; i < rows * d_in; i++) wide[size_t(i)] = get(x[i]);
    int64_t most = 0;
    tasks.clear();
    for (int64_t p = 0; p < parts; p++) {
        most = std::max(most, pairs[p].rank);
        for (int64_t rank = 0; rank < pairs[p].rank; rank += RANKS) tasks.push_back({p, rank});
    }
    inner.resize(size_t(rows * most));
    const float* from = wide.data();
    float* u = inner.data();
    const Task* all = tasks.data();
    const int64_t count = int64_t(tasks.size()), pieces = (d_out + WIDE - 1) / WIDE;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count; t++) {
            const Pair pair = pairs[all[t].part];
            const int64_t first = edges[2 * all[t].part], end = edges[2 * all[t].part + 1], rank = all[t].rank;
            const int64_t some = std::min(RANKS, pair.rank - rank);
            product(u + first * most + rank, most, from + first * d_in,
                    reinterpret_cast<const T*>(pair.a) + rank * d_in, end - first, d_in, some);
            for (int64_t row = first; row < end; row++)
                for (int64_t r = rank; r < rank + some; r++) u[row * most + r] *= scale[row];
        }
        static thread_local std::vector<float> held;
        held.resize(size_t(rows * WIDE));
        float* to = held.data();
#pragma omp for schedule(dynamic)
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t col = piece * WIDE, cols = std::min(WIDE, d_out - col);
            if (w) {
                product(to, WIDE, from, w + col * d_in, rows, d_in, cols);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t c = 0; c < cols; c++)
                        to[row * WIDE + c] =
                            to[row * WIDE + c] * (of ? of[col + c] : 1.0f) + (bias ? get(bias[col + c]) : 0.0f);
            }
            for (int64_t p = 0; p < parts; p++)
                for (int64_t row = edges[2 * p]; row < edges[2 * p + 1]; row++) {
                    float* own = to + row * WIDE;
                    if (!w)
                        for (int64_t c = 0; c < cols; c++) own[c] = get(y[row * d_out + col + c]);
                    const T* b = reinterpret_cast<const T*>(pairs[p].b) + col;
                    for (int64_t r = 0; r < pairs[p].rank; r++) {
                        const float much = u[row * most + r];
                        const T* line = b + r * d_out;
#pragma omp simd
                        for (int64_t c = 0; c < cols; c++) own[c] += much * get(line[c]);
                    }
                    if (!w)
                        for (int64_t c = 0; c < cols; c++) put(y[row * d_out + col + c], own[c]);
                }
            if (w)
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t c = 0; c < cols; c++) put(y[row * d_out + col + c], to[row * WIDE + c]);
        }
    }
}

// u[k] = x[k] . a for up to 4 rows x and one row a; a is read once.
template <int ROWS, typename T>
inline void dots(const T* x, int64_t stride, const T* a, int64_t n, float* u, int64_t u_stride) {
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    const T *x0 = x, *x1 = x + stride, *x2 = x + 2 * stride, *x3 = x + 3 * stride;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < n; j++) {
        float w = get(a[j]);
        s0 += w * get(x0[j]);
        if (ROWS > 1) s1 += w * get(x1[j]);
        if (ROWS > 2) s2 += w * get(x2[j]);
        if (ROWS > 3) s3 += w * get(x3[j]);
    }
    u[0] = s0;
    if (ROWS > 1) u[u_stride] = s1;
    if (ROWS > 2) u[2 * u_stride] = s2;
    if (ROWS > 3) u[3 * u_stride] = s3;
}

// u[g * n] = scale * q[g] . k for the heads that share k, four at a time.
template <typename T>
inline void scores_of(const T* q, const T* k, int64_t depth, int64_t shared, float scale, float* u, int64_t n) {
    int64_t g = 0;
    for (; g + 4 <= shared; g += 4) dots<4>(q + g * depth, depth, k, depth, u + g * n, n);
    if (shared - g == 3) dots<3>(q + g * depth, depth, k, depth, u + g * n, n);
    if (shared - g == 2) dots<2>(q + g * depth, depth, k, depth, u + g * n, n);
    if (shared - g == 1) dots<1>(q + g * depth, depth, k, depth, u + g * n, n);
    for (g = 0; g < shared; g++) u[g * n] *= scale;
}

// Attention of one new token a row: out and q (rows, heads, depth), keys and values (slots, kept, room, depth). Row i
// sees of slot seen[3i] the tokens from seen[3i + 1] to before seen[3i + 2].
template <typename T>
void attend(T* out, const T* q, const T* keys, const T* values, int64_t rows, int64_t heads, int64_t kept,
            int64_t room, int64_t depth, const int64_t* seen, float scale) {
    const int64_t shared = heads / kept;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t h = 0; h < kept; h++) {
            const int64_t from = seen[3 * i + 1], n = seen[3 * i + 2] - from;
            const int64_t start = ((seen[3 * i] * kept + h) * room + from) * depth;
            static thread_local std::vector<float> held;
            held.resize(size_t(shared * (n + depth)));
            float *scores = held.data(), *sum = scores + shared * n;
            const T *k = keys + start, *v = values + start, *own = q + (i * heads + h * shared) * depth;
            for (int64_t t = 0; t < n; t++) scores_of(own, k + t * depth, depth, shared, scale, scores + t, n);
            for (int64_t g = 0; g < shared; g++) {
                float *s = scores + g * n, *to = sum + g * depth, most = s[0], total = 0;
                for (int64_t t = 1; t < n; t++) most = std::max(most, s[t]);
#pragma omp simd reduction(+ : total)
                for (int64_t t = 0; t < n; t++) {
                    s[t] = std::exp(s[t] - most);
                    total += s[t];
                }
                std::fill(to, to + depth, 0.0f);
                int64_t t = 0;
                for (; t + 4 <= n; t += 4) {
                    const T *b0 = v + t * depth, *b1 = b0 + depth, *b2 = b1 + depth, *b3 = b2 + depth;
#pragma omp simd
                    for (int64_t j = 0; j < depth; j++)
                        to[j] += s[t] * get(b0[j]) + s[t + 1] * get(b1[j]) + s[t + 2] * get(b2[j]) + s[t + 3] * get(b3[j]);
                }
                for (; t < n; t++) {
                    const T* b0 = v + t * depth;
#pragma omp simd
                    for (int64_t j = 0; j < depth; j++) to[j] += s[t] * get(b0[j]);
                }
                T* result = out + (i * heads + h * shared + g) * depth;
                for (int64_t j = 0; j < depth; j++) put(result[j], to[j] / total);
            }
        }
}

// x += delta, where there is one, and y = weight * x / root mean square of x; all (rows, n), weight (n,).
template <typename T>
void norm(T* y, T* x, const T* delta, const T* weight, int64_t rows, int64_t n, float epsilon) {
#pragma omp parallel for if (rows > 64)
    for (int64_t row = 0; row < rows; row++) {
        T *own = x + row * n, *to = y + row * n;
        if (delta)
            for (int64_t j = 0; j < n; j++) put(own[j], get(own[j]) + get(delta[row * n + j]));
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < n; j++) total += get(own[j]) * get(own[j]);
        const float by = 1.0f / std::sqrt(total / float(n) + epsilon);
        for (int64_t j = 0; j < n; j++) put(to[j], get(weight[j]) * (get(own[j]) * by));
    }
}

// gate = silu(gate) * up, of n numbers.
template <typename T>
void gated(T* gate, const T* up, int64_t n) {
#pragma omp parallel for simd if (n > 65536)
    for (int64_t j = 0; j < n; j++) {
        const float x = get(gate[j]);
        put(gate[j], x / (1.0f + std::exp(-x)) * get(up[j]));
    }
}

template <typename T>
inline void rotated(T* to, const T* x, const T* cos, const T* sin, int64_t depth) {
    const int64_t half = depth / 2;
    for (int64_t j = 0; j < half; j++) {
        const float a = get(x[j]), b = get(x[j + half]);
        put(to[j], a * get(cos[j]) - b * get(sin[j]));
        put(to[j + half], b * get(cos[j + half]) + a * get(sin[j + half]));
    }
}

// Rotary positions for q (rows, heads, depth), in place, and for k (rows, kept, depth), which goes with v to row i's
// place among keys and values (slots, kept, room, depth): slot number[i], token position[i]. cos, sin (rows, depth).
template <typename T>
void store(T* q, const T* k, const T* v, const T* cos, const T* sin, T* keys, T* values, const int64_t* number,
           const int64_t* position, int64_t rows, int64_t heads, int64_t kept, int64_t room, int64_t depth) {
#pragma omp parallel for if (rows > 64)
    for (int64_t i = 0; i < rows; i++) {
        const T *c = cos + i * depth, *s = sin + i * depth;
        for (int64_t h = 0; h < heads; h++) {
            T* own = q + (i * heads + h) * depth;
            rotated(own, own, c, s, depth);
        }
        for (int64_t h = 0; h < kept; h++) {
            const int64_t from = (i * kept + h) * depth;
            const int64_t to = ((number[i] * kept + h) * room + position[i]) * depth;
            rotated(keys + to, k + from, c, s, depth);
            std::memcpy(values + to, v + from, size_t(depth) * sizeof(T));
        }
    }
}

}  // namespace

extern "C" {
#define LINEAR(NAME, T, W)                                                                                             \
    void linear_##NAME(T* y, const T* x, const W* w, const float* of, const T* bias, int64_t rows, int64_t d_in,       \
                       int64_t d_out, int64_t parts, const int64_t* edges, const Pair* pairs, const float* scale) {    \
        linear(y, x, w, of, bias, rows, d_in, d_out, parts, edges, pairs, scale);                                      \
    }
LINEAR(fp32_fp32, float, float)
LINEAR(fp32_int8, float, int8_t)
LINEAR(bf16_bf16, bf16, bf16)
LINEAR(bf16_int8, bf16, int8_t)

#define OF_ONE_KIND(NAME, T)                                                                                            \
    void attend_##NAME(T* out, const T* q, const T* k, const T* v, int64_t rows, int64_t heads, int64_t kept,          \
                       int64_t room, int64_t depth, const int64_t* seen, float scale) {                                \
        attend(out, q, k, v, rows, heads, kept, room, depth, seen, scale);                                             \
    }                                                                                                                  \
    void norm_##NAME(T* y, T* x, const T* delta, const T* weight, int64_t rows, int64_t n, float epsilon) {            \
        norm(y, x, delta, weight, rows, n, epsilon);                                                                   \
    }                                                                                                                  \
    void gated_##NAME(T* gate, const T* up, int64_t n) { gated(gate, up, n); }                                         \
    void store_##NAME(T* q, const T* k, const T* v, const T* cos, const T* sin, T* keys, T* values,                    \
                      const int64_t* number, const int64_t* position, int64_t rows, int64_t heads, int64_t kept,       \
                      int64_t room, int64_t depth) {                                                                   \
        store(q, k, v, cos, sin, keys, values, number, position, rows, heads, kept, room, depth);                      \
    }
OF_ONE_KIND(fp32, float)
OF_ONE_KIND(bf16, bf16)
}
