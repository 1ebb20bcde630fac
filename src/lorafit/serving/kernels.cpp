// Two loops that torch has no single operation for, compiled at the first use where a compiler is at hand (native.py).
// Whatever they compute, torch computes too (mixing.py, slots.py): they are there for speed alone.
//
// Sums are in fp32. bf16 is stored as the upper half of an fp32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

// The same for one row x and four rows a: four sums run beside each other.
template <typename T>
inline void dots_of_one(const T* x, const T* a, int64_t n, int64_t ranks, float* u) {
    int64_t r = 0;
    for (; r + 4 <= ranks; r += 4) {
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        const T *a0 = a + r * n, *a1 = a0 + n, *a2 = a1 + n, *a3 = a2 + n;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t j = 0; j < n; j++) {
            float v = get(x[j]);
            s0 += v * get(a0[j]);
            s1 += v * get(a1[j]);
            s2 += v * get(a2[j]);
            s3 += v * get(a3[j]);
        }
        u[r] = s0, u[r + 1] = s1, u[r + 2] = s2, u[r + 3] = s3;
    }
    for (; r < ranks; r++) dots<1>(x, 0, a + r * n, n, u + r, 0);
}

// One row of a table: where the factors of a part's adapter lie at this site. rank 0: it has none there.
struct Pair {
    int64_t a, b, rank;
};

template <typename T>
void add_pairs(T* y, const T* x, int64_t d_in, int64_t d_out, int64_t parts, const int64_t* edges, const Pair* pairs,
               const float* scale) {
    struct Task {
        int64_t row;
        int rows, part;
    };
    static thread_local std::vector<Task> tasks;
    tasks.clear();
    for (int64_t p = 0; p < parts; p++)
        if (pairs[p].rank)
            for (int64_t row = edges[2 * p]; row < edges[2 * p + 1]; row += 4)
                tasks.push_back({row, int(std::min<int64_t>(4, edges[2 * p + 1] - row)), int(p)});
    const Task* all = tasks.data();
    const int64_t count = int64_t(tasks.size());
#pragma omp parallel for schedule(dynamic)
    for (int64_t t = 0; t < count; t++) {
        const Task task = all[t];
        const Pair pair = pairs[task.part];
        const T *a = reinterpret_cast<const T*>(pair.a), *b = reinterpret_cast<const T*>(pair.b);
        const T* from = x + task.row * d_in;
        const int64_t rank = pair.rank;
        static thread_local std::vector<float> inner, sum;
        inner.resize(size_t(4 * rank));
        sum.resize(size_t(d_out));
        float* u = inner.data();
        for (int64_t r = 0; r < rank; r++) {
            const T* row = a + r * d_in;
            if (task.rows == 4) dots<4>(from, d_in, row, d_in, u + r, rank);
            if (task.rows == 3) dots<3>(from, d_in, row, d_in, u + r, rank);
            if (task.rows == 2) dots<2>(from, d_in, row, d_in, u + r, rank);
            if (task.rows == 1) break;
        }
        if (task.rows == 1) dots_of_one(from, a, d_in, rank, u);
        for (int k = 0; k < task.rows; k++) {
            float* to = sum.data();
            std::fill(to, to + d_out, 0.0f);
            const float c = scale[task.row + k];
            int64_t r = 0;
            for (; r + 4 <= rank; r += 4) {
                const float w0 = c * u[k * rank + r], w1 = c * u[k * rank + r + 1], w2 = c * u[k * rank + r + 2],
                            w3 = c * u[k * rank + r + 3];
                const T *b0 = b + r * d_out, *b1 = b0 + d_out, *b2 = b1 + d_out, *b3 = b2 + d_out;
#pragma omp simd
                for (int64_t j = 0; j < d_out; j++)
                    to[j] += w0 * get(b0[j]) + w1 * get(b1[j]) + w2 * get(b2[j]) + w3 * get(b3[j]);
            }
            for (; r < rank; r++) {
                const float w = c * u[k * rank + r];
                const T* b0 = b + r * d_out;
#pragma omp simd
                for (int64_t j = 0; j < d_out; j++) to[j] += w * get(b0[j]);
            }
            T* out = y + (task.row + k) * d_out;
#pragma omp simd
            for (int64_t j = 0; j < d_out; j++) put(out[j], get(out[j]) + to[j]);
        }
    }
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

}  // namespace

extern "C" {
void add_pairs_fp32(float* y, const float* x, int64_t d_in, int64_t d_out, int64_t parts, const int64_t* edges,
                    const Pair* pairs, const float* scale) {
    add_pairs(y, x, d_in, d_out, parts, edges, pairs, scale);
}
void add_pairs_bf16(bf16* y, const bf16* x, int64_t d_in, int64_t d_out, int64_t parts, const int64_t* edges,
                    const Pair* pairs, const float* scale) {
    add_pairs(y, x, d_in, d_out, parts, edges, pairs, scale);
}
void attend_fp32(float* out, const float* q, const float* k, const float* v, int64_t rows, int64_t heads, int64_t kept,
                 int64_t room, int64_t depth, const int64_t* seen, float scale) {
    attend(out, q, k, v, rows, heads, kept, room, depth, seen, scale);
}
void attend_bf16(bf16* out, const bf16* q, const bf16* k, const bf16* v, int64_t rows, int64_t heads, int64_t kept,
                 int64_t room, int64_t depth, const int64_t* seen, float scale) {
    attend(out, q, k, v, rows, heads, kept, room, depth, seen, scale);
}
}
