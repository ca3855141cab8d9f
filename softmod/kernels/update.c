/* Operations of an update that PyTorch does in several passes over memory, done in one (version 2 of the kernels).
 *
 * Rows are contiguous unless strides are given. `b` is bfloat16, held as 16 bits; `f` is float. Sums are in float, in
 * an order that depends on the processor but not on the data. NaN stays NaN. The second half of this file is included
 * once for each of the two types, named X there.
 *
 * Large loops are shared among PyTorch's threads (OpenMP). Results do not depend on the number of threads: one thread
 * computes an iteration as a whole, and one thread adds up what several iterations contribute to a sum.
 */

#ifndef X

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef uint16_t b;
typedef float f;

#define JOIN_(name, type) name##_##type
#define JOIN(name, type) JOIN_(name, type)
#define TYPED(name) JOIN(name, X)
#define LANES 16
#define ALIGNED __attribute__((aligned(64)))
#define CHUNK 1024 /* values of a parameter that stay in the first cache between passes */
#define BLOCK 64   /* rows whose sum one thread forms */
#define STRIP 128  /* columns whose sums one thread forms */
#define LARGE 8192 /* values from which a loop is shared among threads; starting them takes a few microseconds */
#define COSTLY 8   /* values that take as long as one with exponentials and logarithms */
#define PRAGMA(text) _Pragma(#text)
#define SHARED(values) PRAGMA(omp parallel for schedule(static) if ((values) >= LARGE))

static inline float wide_f(f value) { return value; }

static inline float wide_b(b value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline f narrow_f(float value) { return value; }

static inline b narrow_b(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (b)(value != value ? 0x7fc0 : rounded);
}

/* exp, within 2e-7 of its value for |x| < 20; 0 becomes 1e-38 and infinity 1e38. */
static inline float exponential(float x) {
    x = x > 88 ? 88 : x;
    x = x < -87 ? -87 : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693147180559945309f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    int32_t bits = ((int32_t)(n == n ? n : 0) + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

/* log(1 + t) for t in [0, 1]. */
static inline float log_one_plus(float t) {
    int large = t > 0.41421356f; /* log(1 + t) = log 2 + log(1 + z) with z = (t - 1) / 2 */
    float z = large ? 0.5f * t - 0.5f : t;
    float p = 7.0376836292e-2f;
    p = p * z - 1.1514610310e-1f;
    p = p * z + 1.1676998740e-1f;
    p = p * z - 1.2420140846e-1f;
    p = p * z + 1.4249322787e-1f;
    p = p * z - 1.6668057665e-1f;
    p = p * z + 2.0000714765e-1f;
    p = p * z - 2.4999993993e-1f;
    p = p * z + 3.3333331174e-1f;
    float log = z + z * z * (p * z - 0.5f);
    return large ? log + 0.693147180559945309f : log;
}

/* tanh x, given exp(-2 |x|). */
static inline float hyperbolic(float x, float decay) {
    float z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    float large = (1 - decay) / (1 + decay);
    large = x < 0 ? -large : large;
    return z < 0.390625f ? x + x * z * p : large;
}

static inline float tangent(float x) { return hyperbolic(x, exponential(-2 * fabsf(x))); }

#ifndef __clang__
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */
#endif

typedef float wide __attribute__((vector_size(64), aligned(4), may_alias));
typedef float half_wide __attribute__((vector_size(32)));
typedef float quarter_wide __attribute__((vector_size(16)));

typedef uint32_t wide_bits __attribute__((vector_size(64)));
typedef b wide_half __attribute__((vector_size(32), aligned(2), may_alias));

static inline wide get_f(const f *from) { return *(const wide *)from; }
static inline void put_f(f *to, wide x) { *(wide *)to = x; }
static inline wide get_b(const b *from) {
    return (wide)(__builtin_convertvector(*(const wide_half *)from, wide_bits) << 16);
}
static inline void put_b(b *to, wide x) {
#ifdef __AVX512BF16__
    __m512 values;
    memcpy(&values, &x, sizeof x);
    __m256bh rounded = _mm512_cvtneps_pbh(values);
    memcpy(to, &rounded, sizeof rounded);
#else
    for (int k = 0; k < LANES; k++) to[k] = narrow_b(x[k]);
#endif
}

static inline float across(wide x) {
    half_wide h[2];
    quarter_wide q[2];
    memcpy(h, &x, sizeof x);
    h[0] += h[1];
    memcpy(q, h, sizeof q);
    q[0] += q[1];
    return (q[0][0] + q[0][1]) + (q[0][2] + q[0][3]);
}

/* Sums in four accumulators, since one would wait for each addition. */
static inline float total_of(const float *x, int64_t n) {
    wide a = {0}, c = {0}, d = {0}, e = {0};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        a += *(const wide *)(x + i), c += *(const wide *)(x + i + 16);
        d += *(const wide *)(x + i + 32), e += *(const wide *)(x + i + 48);
    }
    for (; i + 16 <= n; i += 16) a += *(const wide *)(x + i);
    float sum = across((a + c) + (d + e));
    for (; i < n; i++) sum += x[i];
    return sum;
}

static inline float dot_of(const float *x, const float *y, int64_t n) {
    wide a = {0}, c = {0}, d = {0}, e = {0};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        a += *(const wide *)(x + i) * *(const wide *)(y + i);
        c += *(const wide *)(x + i + 16) * *(const wide *)(y + i + 16);
        d += *(const wide *)(x + i + 32) * *(const wide *)(y + i + 32);
        e += *(const wide *)(x + i + 48) * *(const wide *)(y + i + 48);
    }
    for (; i + 16 <= n; i += 16) a += *(const wide *)(x + i) * *(const wide *)(y + i);
    float sum = across((a + c) + (d + e));
    for (; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static inline float largest(const float *row, int64_t n) {
    float lane[LANES], most = row[0];
    int64_t i = 0;
    if (n >= LANES) {
        for (int k = 0; k < LANES; k++) lane[k] = row[k];
        for (i = LANES; i + LANES <= n; i += LANES)
            for (int k = 0; k < LANES; k++) lane[k] = row[i + k] > lane[k] ? row[i + k] : lane[k];
        for (int k = 0; k < LANES; k++) most = lane[k] > most ? lane[k] : most;
    }
    for (; i < n; i++) most = row[i] > most ? row[i] : most;
    return most;
}

/* Rows of softmax are padded with -infinity to whole vectors. */
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Replace a padded row by exp(row - its maximum); return the sum. */
static inline float exponentials(float *row, int64_t n, float *most) {
    int64_t whole = padded(n);
    *most = largest(row, n);
    for (int64_t i = n; i < whole; i++) row[i] = -INFINITY;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) row[i + k] = exponential(row[i + k] - *most);
    return total_of(row, n);
}

/* Replace a padded row by the softmax, given the logarithm of its sum. */
static inline void probabilities(float *row, int64_t n, float log_sum) {
    int64_t whole = padded(n);
    for (int64_t i = n; i < whole; i++) row[i] = -INFINITY;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) row[i + k] = exponential(row[i + k] - log_sum);
}

/* --- the optimizer ------------------------------------------------------------------------------------------------ */

static inline void load(const void *from, int32_t half, int64_t start, float *to, int64_t n) {
    if (half)
        for (int64_t i = 0; i < n; i++) to[i] = wide_b(((const b *)from)[start + i]);
    else
        memcpy(to, (const float *)from + start, n * sizeof(float));
}

static inline int64_t total_size(const int64_t *sizes, int64_t count) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; k++) total += sizes[k];
    return total;
}

static inline int64_t chunks_of(int64_t n) { return (n + CHUNK - 1) / CHUNK; }

/* The gradient norm of each of `members`, whose parts of each gradient lie one after another. */
void gradient_norms(const void *const *grad, const int32_t *half, const int64_t *sizes, int64_t count, int64_t members,
                    float *norms) {
    int64_t chunks = 0;
    for (int64_t k = 0; k < count; k++) chunks += chunks_of(sizes[k] / members);
    float *squares = malloc((chunks * members + 1) * sizeof(float));
    if (!squares) { /* an update with a norm that is not finite is undone */
        for (int64_t member = 0; member < members; member++) norms[member] = NAN;
        return;
    }
    PRAGMA(omp parallel if (total_size(sizes, count) >= LARGE))
    for (int64_t k = 0, before = 0; k < count; before += chunks_of(sizes[k++] / members)) {
        int64_t part = sizes[k] / members, own = chunks_of(part);
        PRAGMA(omp for schedule(static) nowait)
        for (int64_t c = 0; c < own * members; c++) {
            int64_t member = c / own, start = c % own * CHUNK, n = part - start < CHUNK ? part - start : CHUNK;
            float g[CHUNK] ALIGNED;
            load(grad[k], half[k], member * part + start, g, n);
            squares[member * chunks + before + c % own] = dot_of(g, g, n);
        }
    }
    for (int64_t member = 0; member < members; member++) {
        double total = 0;
        for (int64_t c = 0; c < chunks; c++) total += squares[member * chunks + c];
        norms[member] = sqrtf((float)total);
    }
    free(squares);
}

/* A step of Adam with clipped gradients. Before it, parameters, moments and steps are copied to `kept`, if not null;
 * after it, `target` moves towards the parameters, and bfloat16 copies of them are written, if not null.
 */
void adam(float *const *param, const void *const *grad, const int32_t *half, float *const *first, float *const *second,
          float *const *step, float *const *kept, float *const *target, b *const *copies, const int64_t *sizes,
          int64_t count, const float *norms, int64_t members, uint8_t *saved, const double *options) {
    float rate = options[0], beta2 = options[2], eps = options[3], decay = options[4];
    float decoupled = options[5], most = options[6], smoothing = options[7];
    float shrink = decoupled ? 1 - rate * decay : 1, added = decoupled ? 0 : decay;
    float rest1 = 1 - options[1], rest2 = 1 - options[2];
    for (int64_t k = 0; k < count; k++) {
        if (kept) *kept[3 * count + k] = *step[k];
        *step[k] += 1;
    }
    PRAGMA(omp parallel if (total_size(sizes, count) >= LARGE))
    for (int64_t k = 0; k < count; k++) {
        double t = *step[k];
        float size = options[0] / (1 - pow(options[1], t)), root = 1 / sqrt(1 - pow(options[2], t));
        int64_t part = sizes[k] / members, own = chunks_of(part);
        PRAGMA(omp for schedule(static) nowait)
        for (int64_t c = 0; c < own * members; c++) {
            int64_t member = c / own, start = c % own * CHUNK, n = part - start < CHUNK ? part - start : CHUNK;
            int64_t at = member * part + start;
            float clip = norms && most > 0 ? most / (norms[member] + 1e-6f) : 1;
            clip = clip > 1 ? 1 : clip;
            float g[CHUNK] ALIGNED, *p = param[k] + at, *m = first[k] + at, *v = second[k] + at;
            load(grad[k], half[k], at, g, n);
            if (kept) {
                memcpy(kept[k] + at, p, n * sizeof(float));
                memcpy(kept[count + k] + at, m, n * sizeof(float));
                memcpy(kept[2 * count + k] + at, v, n * sizeof(float));
            }
            for (int64_t i = 0; i < n; i++) {
                float x = p[i] * shrink, d = g[i] * clip + added * x;
                float mean = m[i] + rest1 * (d - m[i]), square = beta2 * v[i] + rest2 * d * d;
                m[i] = mean;
                v[i] = square;
                p[i] = x - size * mean / (sqrtf(square) * root + eps);
            }
            if (target) {
                float *slow = target[k] + at;
                for (int64_t i = 0; i < n; i++) slow[i] += smoothing * (p[i] - slow[i]);
            }
            if (copies && copies[k])
                for (int64_t i = 0; i < n; i++) copies[k][at + i] = narrow_b(p[i]);
        }
    }
    if (saved) *saved = 1;
}

void move(float *const *target, const float *const *source, const int64_t *sizes, int64_t count, float smoothing) {
    PRAGMA(omp parallel if (total_size(sizes, count) >= LARGE))
    for (int64_t k = 0; k < count; k++) {
        PRAGMA(omp for schedule(static) nowait)
        for (int64_t i = 0; i < sizes[k]; i++) target[k][i] += smoothing * (source[k][i] - target[k][i]);
    }
}

void to_half(const float *const *from, b *const *to, const int64_t *sizes, int64_t count) {
    PRAGMA(omp parallel if (total_size(sizes, count) >= LARGE))
    for (int64_t k = 0; k < count; k++) {
        PRAGMA(omp for schedule(static) nowait)
        for (int64_t i = 0; i < sizes[k]; i++) to[k][i] = narrow_b(from[k][i]);
    }
}

void all_finite(const float *const *values, const int64_t *sizes, int64_t count, uint8_t *flag) {
    int all = 1;
    for (int64_t k = 0; k < count; k++)
        for (int64_t i = 0; i < sizes[k]; i++) all &= fabsf(values[k][i]) < INFINITY;
    *flag = all;
}

/* --- the batch and the policy's loss ------------------------------------------------------------------------------ */

void observe(const float *obs, const float *mean, const float *scale, float limit, float *out, int64_t rows,
             int64_t n) {
    for (int64_t r = 0; r < rows; r++, obs += n, out += n)
        for (int64_t i = 0; i < n; i++) {
            float x = (obs[i] - mean[i]) * scale[i];
            x = x > limit ? limit : x;
            out[i] = x < -limit ? -limit : x;
        }
}

/* Rewards divided by the size of their task's values. */
void scale_rewards(const float *reward, const float *temperature, const float *most, float entropy, float values,
                   float *out, int64_t tasks, int64_t batch) {
    for (int64_t t = 0; t < tasks; t++, reward += batch, out += batch) {
        float divisor = most[t] > 0 ? (most[t] + temperature[t] * entropy) / values : 1;
        for (int64_t i = 0; i < batch; i++) out[i] = reward[i] / divisor;
    }
}

/* The policy's loss; values are divided by `spread`, their interquartile range within each task, if `least` > 0. */
void policy_loss(const float *value, const float *log_prob, const float *temperature, const float *weight, float least,
                 float *loss, float *spread, int64_t tasks, int64_t batch) {
    float total = 0;
    for (int64_t t = 0; t < tasks; t++, value += batch, log_prob += batch) {
        float divisor = 1, entropy = 0, sum = 0, sorted[batch];
        if (least > 0) {
            for (int64_t i = 0; i < batch; i++) { /* NaN is the largest, as in PyTorch */
                int64_t at = i;
                for (; at > 0 && (sorted[at - 1] > value[i] || sorted[at - 1] != sorted[at - 1]); at--)
                    sorted[at] = sorted[at - 1];
                sorted[at] = value[i];
            }
            divisor = sorted[batch - 1 - batch / 4] - sorted[batch / 4];
            divisor = divisor < least ? least : divisor;
        }
        for (int64_t i = 0; i < batch; i++) entropy += log_prob[i], sum += value[i];
        spread[t] = divisor;
        total += weight[t] * (temperature[t] * entropy - sum / divisor) / batch;
    }
    *loss = total / tasks;
}

void policy_loss_backward(const float *grad, const float *temperature, const float *weight, const float *spread,
                          float *for_value, float *for_log_prob, int64_t tasks, int64_t batch) {
    for (int64_t t = 0; t < tasks; t++) {
        float each = *grad * weight[t] / (tasks * batch);
        for (int64_t i = 0; i < batch; i++, for_value++, for_log_prob++)
            *for_value = -each / spread[t], *for_log_prob = each * temperature[t];
    }
}

/* The loss of the temperatures and its gradient. */
void temperature_loss(const float *log_temperature, const float *log_prob, float entropy, float *loss, float *gradient,
                      int64_t tasks, int64_t batch) {
    float total = 0;
    for (int64_t t = 0; t < tasks; t++, log_prob += batch) {
        gradient[t] = -(total_of(log_prob, batch) / batch + entropy) / tasks;
        total += log_temperature[t] * gradient[t];
    }
    *loss = total;
}

/* Weights proportional to `start - rate`, with mean 1. */
void distance_weights(const float *rate, float start, float *out, int64_t n) {
    float total = 0;
    for (int64_t i = 0; i < n; i++) total += out[i] = start - rate[i];
    for (int64_t i = 0; i < n; i++) out[i] /= total / n;
}

/* Rows divided by their norms, which are at least `least`. */
void unit(const float *x, float *out, int64_t rows, int64_t n, float least) {
    for (int64_t r = 0; r < rows; r++, x += n, out += n) {
        float norm = sqrtf(dot_of(x, x, n));
        norm = norm < least ? least : norm;
        for (int64_t i = 0; i < n; i++) out[i] = x[i] / norm;
    }
}

void unit_backward(const float *grad, const float *x, float *for_x, int64_t rows, int64_t n, float least) {
    for (int64_t r = 0; r < rows; r++, grad += n, x += n, for_x += n) {
        float norm = sqrtf(dot_of(x, x, n)), along = norm < least ? 0 : dot_of(grad, x, n) / (norm * norm);
        norm = norm < least ? least : norm;
        for (int64_t i = 0; i < n; i++) for_x[i] = (grad[i] - along * x[i]) / norm;
    }
}

#define X f
#include __FILE__
#undef X
#define X b
#include __FILE__

#else /* for each type */

#define WIDE TYPED(wide)
#define NARROW TYPED(narrow)
#define GET TYPED(get)
#define PUT TYPED(put)

/* Layer normalization of rows `x + added[row / batch]`, its ReLU where `relu` is set, and the sum with `residual`. */
void TYPED(norm)(const X *x, const X *added, const X *residual, X *out, float *mean, float *rstd, int64_t rows,
                 int64_t n, int64_t batch, float eps, int32_t relu) {
    int64_t whole = n / LANES * LANES;
    SHARED(rows * n)
    for (int64_t r = 0; r < rows; r++) {
        const X *in = x + r * n;
        X *to = out + r * n;
        float row[n] ALIGNED, low = relu ? 0 : -INFINITY, total = 0, square = 0;
        const X *more = added ? added + r / batch * n : NULL, *rest = residual ? residual + r * n : NULL;
        wide sum = {0}, squares = {0};
        float shift = WIDE(in[0]) + (more ? WIDE(more[0]) : 0); /* so that no large numbers cancel */
        for (int64_t i = 0; i < whole; i += LANES) {
            wide value = GET(in + i) - shift;
            if (more) value += GET(more + i);
            *(wide *)(row + i) = value;
            sum += value;
            squares += value * value;
        }
        for (int64_t i = whole; i < n; i++) {
            row[i] = WIDE(in[i]) - shift + (more ? WIDE(more[i]) : 0);
            total += row[i], square += row[i] * row[i];
        }
        float each = 1.0f / n, middle = (across(sum) + total) * each;
        float variance = (across(squares) + square) * each - middle * middle;
        float scale = 1 / sqrtf((variance < 0 ? 0 : variance) + eps);
        mean[r] = middle + shift, rstd[r] = scale;
        for (int64_t i = 0; i < whole; i += LANES) {
            wide value = (*(wide *)(row + i) - middle) * scale;
            value = (wide)((wide_bits)value & ~(wide_bits)(value < low));
            if (rest) value += GET(rest + i);
            PUT(to + i, value);
        }
        for (int64_t i = whole; i < n; i++) {
            float value = (row[i] - middle) * scale;
            to[i] = NARROW((value < low ? 0 : value) + (rest ? WIDE(rest[i]) : 0));
        }
    }
}

/* The gradient of `norm` with respect to x, and its sums over groups of `batch` rows. */
void TYPED(norm_backward)(const X *grad, const X *x, const X *added, const float *mean, const float *rstd, X *for_x,
                          float *sums, int64_t rows, int64_t n, int64_t batch, int32_t relu) {
    int64_t whole = n / LANES * LANES, groups = batch ? rows / batch : 0, blocks = (batch + BLOCK - 1) / BLOCK;
    float *partial = blocks > 1 ? malloc(groups * blocks * n * sizeof(float)) : sums; /* of blocks of rows */
    SHARED(partial ? rows * n : 0)
    for (int64_t k = 0; k < groups * blocks; k++) {
        int64_t group = k / blocks, start = group * batch + k % blocks * BLOCK;
        int64_t end = start + BLOCK < (group + 1) * batch ? start + BLOCK : (group + 1) * batch;
        int first = partial || k % blocks == 0;
        const X *more = added ? added + group * n : NULL;
        float *column = partial ? partial + k * n : sums + group * n;
        for (int64_t r = start; r < end; r++, first = 0) {
            const X *in = x + r * n, *slope = grad + r * n;
            X *out = for_x + r * n;
            float h[n] ALIGNED, d[n] ALIGNED, middle = mean[r], scale = rstd[r], low = relu ? 0 : -INFINITY;
            float total = 0, dot = 0;
            wide sum = {0}, along = {0};
            for (int64_t i = 0; i < whole; i += LANES) {
                wide value = GET(in + i), g = GET(slope + i);
                if (more) value += GET(more + i);
                value = (value - middle) * scale;
                g = (wide)((wide_bits)g & ~(wide_bits)(value <= low));
                *(wide *)(h + i) = value;
                *(wide *)(d + i) = g;
                sum += g;
                along += g * value;
            }
            for (int64_t i = whole; i < n; i++) {
                h[i] = (WIDE(in[i]) + (more ? WIDE(more[i]) : 0) - middle) * scale;
                d[i] = h[i] <= low ? 0 : WIDE(slope[i]);
                total += d[i], dot += d[i] * h[i];
            }
            total = (across(sum) + total) / n, dot = (across(along) + dot) / n;
            for (int64_t i = 0; i < whole; i += LANES) {
                wide value = scale * (*(wide *)(d + i) - total - *(wide *)(h + i) * dot);
                PUT(out + i, value);
                if (!first) value += *(wide *)(column + i);
                *(wide *)(column + i) = value;
            }
            for (int64_t i = whole; i < n; i++) {
                float value = scale * (d[i] - total - h[i] * dot);
                out[i] = NARROW(value);
                column[i] = first ? value : column[i] + value;
            }
        }
    }
    if (!partial || partial == sums) return;
    for (int64_t k = 0; k < groups * blocks; k++)
        for (int64_t i = 0; i < n; i++) {
            float *sum = sums + k / blocks * n + i;
            *sum = (k % blocks ? *sum : 0) + partial[k * n + i];
        }
    free(partial);
}

/* Sums over groups of `batch` rows, for some columns at a time. */
void TYPED(sums)(const X *x, float *sums, int64_t groups, int64_t batch, int64_t n) {
    int64_t strips = (n + STRIP - 1) / STRIP;
    SHARED(groups * batch * n)
    for (int64_t k = 0; k < groups * strips; k++) {
        int64_t group = k / strips, start = k % strips * STRIP, end = start + STRIP < n ? start + STRIP : n;
        float *out = sums + group * n;
        for (int64_t i = start; i < end; i++) out[i] = 0;
        for (const X *row = x + group * batch * n, *last = row + batch * n; row < last; row += n)
            for (int64_t i = start; i < end; i++) out[i] += WIDE(row[i]);
    }
}

void TYPED(relu)(const X *x, X *out, int64_t n) {
    SHARED(n)
    for (int64_t i = 0; i < n; i++) {
        float h = WIDE(x[i]);
        out[i] = NARROW(h < 0 ? 0 : h);
    }
}

void TYPED(relu_backward)(const X *grad, const X *out, X *for_x, int64_t n) {
    SHARED(n)
    for (int64_t i = 0; i < n; i++) {
        float g = WIDE(grad[i]);
        for_x[i] = NARROW(WIDE(out[i]) <= 0 ? 0 : g);
    }
}

/* Products of rows and one row `y` for each `batch` of them, and their ReLU where `relu` is set. */
void TYPED(product)(const X *x, const X *y, X *out, int64_t rows, int64_t n, int64_t batch, int32_t relu) {
    float low = relu ? 0 : -INFINITY;
    SHARED(rows * n)
    for (int64_t r = 0; r < rows; r++) {
        const X *factor = y + r / batch * n;
        for (int64_t i = 0; i < n; i++) {
            float h = WIDE(x[r * n + i]) * WIDE(factor[i]);
            out[r * n + i] = NARROW(h < low ? 0 : h);
        }
    }
}

void TYPED(product_backward)(const X *grad, const X *x, const X *y, const X *out, X *for_x, X *for_y, int64_t groups,
                             int64_t n, int64_t batch, int32_t relu) {
    float low = relu ? 0 : -INFINITY;
    int64_t strips = (n + STRIP - 1) / STRIP;
    SHARED(groups * batch * n)
    for (int64_t k = 0; k < groups * strips; k++) {
        int64_t group = k / strips, start = k % strips * STRIP, width = n - start < STRIP ? n - start : STRIP;
        const X *factor = y + group * n + start;
        float total[STRIP] ALIGNED = {0};
        for (int64_t r = group * batch; r < (group + 1) * batch; r++) {
            int64_t at = r * n + start;
            for (int64_t i = 0; i < width; i++) {
                float g = WIDE(grad[at + i]);
                g = WIDE(out[at + i]) <= low ? 0 : g;
                for_x[at + i] = NARROW(g * WIDE(factor[i]));
                total[i] += g * WIDE(x[at + i]);
            }
        }
        for (int64_t i = 0; i < width; i++) for_y[group * n + start + i] = NARROW(total[i]);
    }
}

void TYPED(softmax)(const X *x, X *out, int64_t rows, int64_t n) {
    int64_t block = n < CHUNK ? CHUNK / n : 1;
    SHARED(rows * n)
    for (int64_t start = 0; start < rows; start += block) {
        int64_t count = rows - start < block ? rows - start : block, size = count * n, at = start * n;
        float row[block * n];
        for (int64_t i = 0; i < size; i++) row[i] = WIDE(x[at + i]);
        for (int64_t r = 0; r < count; r++) {
            float most = largest(row + r * n, n);
            for (int64_t i = 0; i < n; i++) row[r * n + i] -= most;
        }
        for (int64_t i = 0; i < size; i++) row[i] = exponential(row[i]);
        for (int64_t r = 0; r < count; r++) {
            float sum = 0;
            for (int64_t i = 0; i < n; i++) sum += row[r * n + i];
            for (int64_t i = 0; i < n; i++) row[r * n + i] /= sum;
        }
        for (int64_t i = 0; i < size; i++) out[at + i] = NARROW(row[i]);
    }
}

void TYPED(softmax_backward)(const X *grad, const X *out, X *for_x, int64_t rows, int64_t n) {
    SHARED(rows * n)
    for (int64_t r = 0; r < rows; r++) {
        const X *g = grad + r * n, *share = out + r * n;
        float sum = 0;
        for (int64_t i = 0; i < n; i++) sum += WIDE(g[i]) * WIDE(share[i]);
        for (int64_t i = 0; i < n; i++) for_x[r * n + i] = NARROW(WIDE(share[i]) * (WIDE(g[i]) - sum));
    }
}

/* Weighted sums of modules (softmod.networks.mixing). `strides` are those of stack, source and row in `x`. */
void TYPED(mix)(const X *x, const int64_t *strides, const X *route, X *out, int64_t stack, int64_t targets,
                int64_t sources, int64_t rows, int64_t n, int32_t relu) {
    PRAGMA(omp parallel for collapse(3) schedule(static) if (stack * targets * rows * n >= LARGE))
    for (int64_t s = 0; s < stack; s++)
        for (int64_t t = 0; t < targets; t++)
            for (int64_t r = 0; r < rows; r++) {
                const X *weight = route + ((s * rows + r) * targets + t) * sources;
                float total[n] ALIGNED;
                for (int64_t j = 0; j < sources; j++) {
                    const X *from = x + s * strides[0] + j * strides[1] + r * strides[2];
                    float w = WIDE(weight[j]);
                    if (j)
                        for (int64_t i = 0; i < n; i++) total[i] += w * WIDE(from[i]);
                    else
                        for (int64_t i = 0; i < n; i++) total[i] = w * WIDE(from[i]);
                }
                if (relu)
                    for (int64_t i = 0; i < n; i++) total[i] = total[i] < 0 ? 0 : total[i];
                X *to = out + ((s * targets + t) * rows + r) * n;
                for (int64_t i = 0; i < n; i++) to[i] = NARROW(total[i]);
            }
}

/* The gradient of `mix`; `mixed` is its result if it has a ReLU, otherwise null. */
void TYPED(mix_backward)(const X *grad, const X *x, const int64_t *strides, const X *route, const X *mixed, X *for_x,
                         X *for_route, int64_t stack, int64_t targets, int64_t sources, int64_t rows, int64_t n) {
    PRAGMA(omp parallel for collapse(2) schedule(static) if (stack * targets * rows * n >= LARGE))
    for (int64_t s = 0; s < stack; s++)
        for (int64_t r = 0; r < rows; r++) {
            float g[targets][n] ALIGNED, from[n] ALIGNED, total[n] ALIGNED;
            for (int64_t t = 0; t < targets; t++) {
                int64_t at = ((s * targets + t) * rows + r) * n;
                for (int64_t i = 0; i < n; i++) g[t][i] = WIDE(grad[at + i]);
                if (mixed)
                    for (int64_t i = 0; i < n; i++) g[t][i] = WIDE(mixed[at + i]) <= 0 ? 0 : g[t][i];
            }
            for (int64_t j = 0; j < sources; j++) {
                int64_t at = s * strides[0] + j * strides[1] + r * strides[2];
                for (int64_t i = 0; i < n; i++) from[i] = WIDE(x[at + i]);
                for (int64_t t = 0; t < targets; t++) {
                    int64_t link = ((s * rows + r) * targets + t) * sources + j;
                    float w = WIDE(route[link]);
                    for_route[link] = NARROW(dot_of(g[t], from, n));
                    if (t)
                        for (int64_t i = 0; i < n; i++) total[i] += w * g[t][i];
                    else
                        for (int64_t i = 0; i < n; i++) total[i] = w * g[t][i];
                }
                for (int64_t i = 0; i < n; i++) for_x[at + i] = NARROW(total[i]);
            }
        }
}

/* The tanh-Gaussian policy: actions and log-probabilities from a network's outputs and noise. */
void TYPED(sample)(const X *outputs, const float *noise, float *action, float *log_prob, int64_t rows, int64_t n,
                   int32_t tanh) {
    int64_t most = n < CHUNK / 4 ? CHUNK / 4 / n : 1;
    SHARED(COSTLY * rows * n)
    for (int64_t start = 0; start < rows; start += most) {
        int64_t count = rows - start < most ? rows - start : most, size = count * n, at = start * n;
        float raw[most * n], u[most * n], density[most * n];
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < n; i++) {
                const X *row = outputs + 2 * (start + r) * n;
                u[r * n + i] = WIDE(row[i]), raw[r * n + i] = WIDE(row[n + i]);
            }
        if (tanh)
            for (int64_t i = 0; i < size; i++) raw[i] = -10 + 6 * (tangent(raw[i] + 0.805f) + 1);
        else
            for (int64_t i = 0; i < size; i++) {
                float x = raw[i] < -20 ? -20 : raw[i];
                raw[i] = x > 2 ? 2 : x;
            }
        for (int64_t i = 0; i < size; i++) {
            float drawn = noise[at + i], x = u[i] + exponential(raw[i]) * drawn;
            float decay = exponential(-2 * fabsf(x)), above = x < 0 ? -2 * x : 0;
            action[at + i] = hyperbolic(x, decay);
            float correction = 2 * (0.693147180559945309f - x - above - log_one_plus(decay));
            density[i] = -0.5f * drawn * drawn - raw[i] - 0.918938533204672742f - correction;
        }
        for (int64_t r = 0; r < count; r++) log_prob[start + r] = total_of(density + r * n, n);
    }
}

void TYPED(sample_backward)(const float *for_action, const float *for_log_prob, const X *outputs, const float *noise,
                            const float *action, X *for_outputs, int64_t rows, int64_t n, int32_t tanh) {
    int64_t most = n < CHUNK / 4 ? CHUNK / 4 / n : 1;
    SHARED(COSTLY * rows * n)
    for (int64_t start = 0; start < rows; start += most) {
        int64_t count = rows - start < most ? rows - start : most, size = count * n, at = start * n;
        float raw[most * n], for_u[most * n], along[most * n];
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < n; i++) {
                raw[r * n + i] = WIDE(outputs[2 * (start + r) * n + n + i]);
                along[r * n + i] = for_log_prob[start + r];
            }
        for (int64_t i = 0; i < size; i++) {
            float a = action[at + i], slope = tangent(raw[i] + 0.805f), x = raw[i] < -20 ? -20 : raw[i];
            x = x > 2 ? 2 : x;
            float inside = x == raw[i] ? 1 : 0, spread = tanh ? -10 + 6 * (slope + 1) : x;
            float down = for_action[at + i] * (1 - a * a) + along[i] * 2 * a;
            for_u[i] = down;
            raw[i] = (down * exponential(spread) * noise[at + i] - along[i]) * (tanh ? 6 * (1 - slope * slope) : inside);
        }
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < n; i++) {
                X *row = for_outputs + 2 * (start + r) * n;
                row[i] = NARROW(for_u[r * n + i]), row[n + i] = NARROW(raw[r * n + i]);
            }
    }
}

/* The projected target distribution of categorical critics (softmod.agent.losses.project). */
void TYPED(target)(const float *reward, const float *discount, const X *next, const float *entropy,
                   const float *support, float *out, int64_t critics, int64_t rows, int64_t n) {
    float low = support[0], step = (support[n - 1] - low) / (n - 1);
    SHARED(critics * rows * n)
    for (int64_t r = 0; r < rows; r++) {
        float mean[n] ALIGNED, row[padded(n)] ALIGNED, share[n] ALIGNED, below[n + 1] ALIGNED, above[n + 1] ALIGNED, most;
        int32_t index[n];
        for (int64_t c = 0; c < critics; c++) {
            const X *x = next + (c * rows + r) * n;
            for (int64_t i = 0; i < n; i++) row[i] = WIDE(x[i]);
            float sum = exponentials(row, n, &most) * critics;
            if (c)
                for (int64_t i = 0; i < n; i++) mean[i] += row[i] / sum;
            else
                for (int64_t i = 0; i < n; i++) mean[i] = row[i] / sum;
        }
        float first = reward[r] + discount[r] * entropy[r], total = 0;
        for (int64_t i = 0; i < n; i++) {
            float value = first + discount[r] * support[i], at = (value - low) / step;
            total += value;
            at = at > 0 ? at : 0; /* also for NaN */
            at = at > n - 1 ? n - 1 : at;
            int32_t whole = (int32_t)at;
            index[i] = whole;
            share[i] = at - whole;
        }
        memset(below, 0, sizeof below);
        memset(above, 0, sizeof above);
        for (int64_t i = 0; i < n; i++) {
            below[index[i]] += mean[i] * (1 - share[i]);
            above[index[i] + 1] += mean[i] * share[i];
        }
        above[n - 1] += above[n];
        float invalid = 0.0f * total;
        for (int64_t i = 0; i < n; i++) out[r * n + i] = below[i] + above[i] + invalid;
    }
}

/* Each critic's cross-entropy with the target, and the logarithms of the softmax's sums. */
void TYPED(cross_entropy)(const X *outputs, const float *target, const float *weight, float *loss, float *log_sum,
                          int64_t critics, int64_t tasks, int64_t batch, int64_t n) {
    float of_task[critics * tasks];
    SHARED(critics * tasks * batch * n)
    for (int64_t k = 0; k < critics * tasks; k++) {
        float total = 0;
        for (int64_t r = k * batch; r < (k + 1) * batch; r++) {
            const float *wanted = target + r % (tasks * batch) * n;
            float x[n] ALIGNED, row[padded(n)] ALIGNED, most;
            for (int64_t i = 0; i < n; i++) row[i] = x[i] = WIDE(outputs[r * n + i]);
            log_sum[r] = logf(exponentials(row, n, &most)) + most;
            for (int64_t i = 0; i < n; i++) x[i] -= most;
            total += total_of(wanted, n) * (log_sum[r] - most) - dot_of(wanted, x, n);
        }
        of_task[k] = total / batch * weight[k % tasks];
    }
    for (int64_t c = 0; c < critics; c++) {
        float all = 0;
        for (int64_t t = 0; t < tasks; t++) all += of_task[c * tasks + t];
        loss[c] = all / tasks;
    }
}

void TYPED(cross_entropy_backward)(const float *grad, const X *outputs, const float *target, const float *weight,
                                   const float *log_sum, X *for_outputs, int64_t critics, int64_t tasks, int64_t batch,
                                   int64_t n) {
    int64_t rows = tasks * batch;
    SHARED(critics * rows * n)
    for (int64_t r = 0; r < critics * rows; r++) {
        const float *wanted = target + r % rows * n;
        float row[padded(n)] ALIGNED, mass = total_of(wanted, n);
        float each = grad[r / rows] * weight[r % rows / batch] / rows;
        for (int64_t i = 0; i < n; i++) row[i] = WIDE(outputs[r * n + i]);
        probabilities(row, n, log_sum[r]);
        for (int64_t i = 0; i < n; i++) for_outputs[r * n + i] = NARROW(each * (mass * row[i] - wanted[i]));
    }
}

/* The expected value of each row, averaged over critics; `log_sum` and `own` are kept for the gradient. */
void TYPED(value)(const X *outputs, const float *support, float *value, float *log_sum, float *own, int64_t critics,
                  int64_t rows, int64_t n) {
    SHARED(critics * rows * n)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t at = r; at < critics * rows; at += rows) {
            float row[padded(n)] ALIGNED, most;
            for (int64_t i = 0; i < n; i++) row[i] = WIDE(outputs[at * n + i]);
            float sum = exponentials(row, n, &most), dot = dot_of(row, support, n);
            log_sum[at] = logf(sum) + most;
            own[at] = dot / sum;
            value[r] = (at == r ? 0 : value[r]) + own[at] / critics;
        }
}

void TYPED(value_backward)(const float *grad, const X *outputs, const float *support, const float *log_sum,
                           const float *own, X *for_outputs, int64_t critics, int64_t rows, int64_t n) {
    SHARED(critics * rows * n)
    for (int64_t r = 0; r < critics * rows; r++) {
        float row[padded(n)] ALIGNED, each = grad[r % rows] / critics;
        for (int64_t i = 0; i < n; i++) row[i] = WIDE(outputs[r * n + i]);
        probabilities(row, n, log_sum[r]);
        for (int64_t i = 0; i < n; i++) for_outputs[r * n + i] = NARROW(each * row[i] * (support[i] - own[r]));
    }
}

#undef WIDE
#undef NARROW
#undef GET
#undef PUT

#endif
