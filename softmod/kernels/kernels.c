/* Operations of an update that PyTorch does in several passes over memory, done in one.
 *
 * Rows are contiguous. `b` is bfloat16, held as 16 bits; `f` is float. Sums are in float, in an order that depends on
 * the processor but not on the data. NaN stays NaN.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t b;
typedef float f;

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

/* Layer normalisation of rows, and its ReLU where `relu` is set. */
#define NORM(X)                                                                                                      \
    void norm_##X(const X *x, X *out, float *mean, float *rstd, int64_t rows, int64_t n, float eps,                  \
                       int32_t relu) {                                                                               \
        for (int64_t r = 0; r < rows; r++, x += n, out += n) {                                                       \
            float row[n], total = 0, square = 0;                                                                     \
            for (int64_t i = 0; i < n; i++) total += row[i] = wide_##X(x[i]);                                        \
            float middle = total / n;                                                                                \
            for (int64_t i = 0; i < n; i++) square += (row[i] - middle) * (row[i] - middle);                         \
            float scale = 1 / sqrtf(square / n + eps);                                                               \
            mean[r] = middle, rstd[r] = scale;                                                                       \
            if (relu)                                                                                                \
                for (int64_t i = 0; i < n; i++) {                                                                    \
                    float h = (row[i] - middle) * scale;                                                             \
                    out[i] = narrow_##X(h < 0 ? 0 : h);                                                              \
                }                                                                                                    \
            else                                                                                                     \
                for (int64_t i = 0; i < n; i++) out[i] = narrow_##X((row[i] - middle) * scale);                      \
        }                                                                                                            \
    }

/* The gradient of NORM with respect to its input. */
#define NORM_BACKWARD(X)                                                                                             \
    void norm_backward_##X(const X *grad, const X *x, const float *mean, const float *rstd, X *for_x,                \
                              int64_t rows, int64_t n, int32_t relu) {                                               \
        for (int64_t r = 0; r < rows; r++, grad += n, x += n, for_x += n) {                                          \
            float h[n], d[n], sum = 0, along = 0, middle = mean[r], scale = rstd[r];                                 \
            for (int64_t i = 0; i < n; i++) h[i] = (wide_##X(x[i]) - middle) * scale;                                \
            if (relu)                                                                                                \
                for (int64_t i = 0; i < n; i++) d[i] = h[i] <= 0 ? 0 : wide_##X(grad[i]);                            \
            else                                                                                                     \
                for (int64_t i = 0; i < n; i++) d[i] = wide_##X(grad[i]);                                            \
            for (int64_t i = 0; i < n; i++) sum += d[i], along += d[i] * h[i];                                       \
            sum /= n, along /= n;                                                                                    \
            for (int64_t i = 0; i < n; i++) for_x[i] = narrow_##X(scale * (d[i] - sum - h[i] * along));              \
        }                                                                                                            \
    }

NORM(f)
NORM(b)
NORM_BACKWARD(f)
NORM_BACKWARD(b)
