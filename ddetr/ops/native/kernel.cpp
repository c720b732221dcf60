// The kernels, built once per instruction set (MSDA_ISA names the table, MSDA_WIDTH is its vector width in floats).
//
// Queries go in blocks of about 128 points, in four stages over arrays that stay in the L1 cache: coordinates and
// softmax -> rows and coefficients of the four corners -> gather (and scatter) -> gradients. Split like this, no stage
// waits for a store of the one before (measured: 13.9 -> 10.2 ms forward at the encoder's size).
#include "msda.h"
#include "vector.h"

namespace {

typedef Ops<MSDA_WIDTH> V;
typedef Ops<4> V4;

const int64_t kBlockPoints = 128;
const int64_t kMaxBlockQueries = 8;

int64_t block_queries(const MsdaArgs* a) {
    int64_t points = a->levels * a->points, queries = points ? kBlockPoints / points : kMaxBlockQueries;
    return queries < 1 ? 1 : queries > kMaxBlockQueries ? kMaxBlockQueries : queries;
}
int64_t padded_points(const MsdaArgs* a) { return (block_queries(a) * a->levels * a->points + 15) & ~(int64_t)15; }
int64_t padded_size(const MsdaArgs* a) { return (a->d + 3) & ~(int64_t)3; }

// Arrays of one block; `num` points = queries * levels * points, query-major.
struct Block {
    float *x, *y;                          // pixel coordinates
    float* weight;                         // attention weight
    float *width, *height;                 // of the point's level
    float *fraction_x, *fraction_y;        // position between the corners
    float* coefficient[4];                 // weight * bilinear, 0 for corners outside
    float* dot[4];                         // corner value . grad_output
    float *scale_x, *scale_y, *offset_x, *offset_y;  // per query and level: pixel = scale * input + offset
    float* partial;                        // 16 per point: four partial sums of each dot
    float *zero, *waste;                   // a row to read and a row to write for corners outside
    int32_t* start;                        // first row of the point's level
    int32_t* row[4];                       // of the corners
};

size_t block_bytes(const MsdaArgs* a) {
    size_t points = (size_t)padded_points(a), rows = (size_t)padded_size(a) + 64;
    size_t levels = (size_t)(block_queries(a) * a->levels + 16);
    return (points * (7 + 4 + 4 + 16 + 5) + levels * 4 + rows * 2 + 64) * 4;
}

void block_init(Block* k, const MsdaArgs* a, void* memory) {
    int64_t num = padded_points(a), levels = block_queries(a) * a->levels + 16, row = padded_size(a) + 64;
    memset(memory, 0, block_bytes(a));
    float* p = (float*)memory;
    float** arrays[] = {&k->x, &k->y, &k->weight, &k->width, &k->height, &k->fraction_x, &k->fraction_y};
    for (float** array : arrays) *array = p, p += num;
    for (int c = 0; c < 4; c++) k->coefficient[c] = p, p += num;
    for (int c = 0; c < 4; c++) k->dot[c] = p, p += num;
    k->partial = p, p += 16 * num;
    k->start = (int32_t*)p, p += num;
    for (int c = 0; c < 4; c++) k->row[c] = (int32_t*)p, p += num;
    float** tables[] = {&k->scale_x, &k->scale_y, &k->offset_x, &k->offset_y};
    for (float** table : tables) *table = p, p += levels;
    k->zero = p, p += row;
    k->waste = p;
    int64_t i = 0;
    for (int64_t query = 0; query < block_queries(a); query++) {
        int64_t start = 0;
        for (int64_t l = 0; l < a->levels; l++) {
            for (int64_t point = 0; point < a->points; point++, i++) {
                k->height[i] = (float)a->shapes[2 * l];
                k->width[i] = (float)a->shapes[2 * l + 1];
                k->start[i] = (int32_t)start;
            }
            start += a->shapes[2 * l] * a->shapes[2 * l + 1];
        }
    }
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bfloat16* p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = x != x ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
}

// ---- stage 1: pixel coordinates and weights ----------------------------------------------------------------------

// pixel = scale * input + offset, per query and level (x: column, y: row; cell centres at integers)
void coordinate_rules(Block* k, const MsdaArgs* a, int64_t b, int64_t q0, int64_t queries) {
    int64_t size = a->reference_size, levels = a->levels;
    const float* reference = a->reference + (b * a->q + q0) * levels * size;
    for (int64_t query = 0; query < queries; query++)
        for (int64_t l = 0; l < levels; l++) {
            float h = (float)a->shapes[2 * l], w = (float)a->shapes[2 * l + 1];
            int64_t i = query * levels + l;
            if (size == 0) {
                k->scale_x[i] = w, k->scale_y[i] = h;
                k->offset_x[i] = k->offset_y[i] = -0.5f;
                continue;
            }
            const float* r = reference + i * size;
            k->offset_x[i] = r[0] * w - 0.5f;
            k->offset_y[i] = r[1] * h - 0.5f;
            if (size == 2) {
                k->scale_x[i] = k->scale_y[i] = 1.0f;
            } else {
                float half = 0.5f / (float)a->points;
                k->scale_x[i] = r[2] * half * w;
                k->scale_y[i] = r[3] * half * h;
            }
        }
}

template <class T>
INLINE void coordinates(Block* k, const MsdaArgs* a, const T* data, int64_t stride, int64_t queries) {
    int64_t levels = a->levels, points = a->points, i = 0;
    for (int64_t query = 0; query < queries; query++, data += stride) {
        const T* in = data;
        for (int64_t l = 0; l < levels; l++, i += points, in += 2 * points) {
            int64_t rule = query * levels + l, point = 0;
            float sx = k->scale_x[rule], sy = k->scale_y[rule], ox = k->offset_x[rule], oy = k->offset_y[rule];
            for (; point + 4 <= points; point += 4) {
                V4::F low = V4::load(in + 2 * point), high = V4::load(in + 2 * point + 4);
                V4::store(k->x + i + point, MSDA_SHUFFLE(4, low, high, 0, 2, 4, 6) * sx + ox);
                V4::store(k->y + i + point, MSDA_SHUFFLE(4, low, high, 1, 3, 5, 7) * sy + oy);
            }
            for (; point < points; point++) {
                k->x[i + point] = to_float(in[2 * point]) * sx + ox;
                k->y[i + point] = to_float(in[2 * point + 1]) * sy + oy;
            }
        }
    }
}

INLINE float max2(float a, float b) { return a > b ? a : b; }

template <class T>
INLINE void weights(Block* k, const T* data, int64_t stride, int64_t queries, int64_t per_query, bool softmax) {
    float* w = k->weight;
    for (int64_t query = 0; query < queries; query++, data += stride) {
        float* row = w + query * per_query;
        int64_t i = 0;
        if (!softmax) {
            for (; i + 4 <= per_query; i += 4) V4::store(row + i, V4::load(data + i));
            for (; i < per_query; i++) row[i] = to_float(data[i]);
            continue;
        }
        V4::F most = V4::splat(-__builtin_inff());
        for (; i + 4 <= per_query; i += 4) {
            V4::F v = V4::load(data + i);
            V4::store(row + i, v);
            most = V4::select(v > most, v, most);
        }
        float top = max2(max2(most[0], most[1]), max2(most[2], most[3]));
        for (; i < per_query; i++) top = max2(top, row[i] = to_float(data[i]));
        V4::F shift = V4::splat(top);
        for (i = 0; i + 4 <= per_query; i += 4) V4::store(row + i, V4::load(row + i) - shift);
        for (; i < per_query; i++) row[i] -= top;
    }
    if (!softmax) return;
    int64_t num = queries * per_query;
    for (int64_t i = 0; i < num; i += MSDA_WIDTH) V::store(w + i, V::exp_nonpositive(V::load(w + i)));
    for (int64_t query = 0; query < queries; query++) {
        float* row = w + query * per_query;
        V4::F sum = V4::splat(0);
        int64_t i = 0;
        for (; i + 4 <= per_query; i += 4) sum += V4::load(row + i);
        float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        for (; i < per_query; i++) total += row[i];
        float inverse = 1.0f / total;
        for (i = 0; i + 4 <= per_query; i += 4) V4::store(row + i, V4::load(row + i) * inverse);
        for (; i < per_query; i++) row[i] *= inverse;
    }
}

template <class T>
INLINE const T* query_row(const void* data, int64_t stride_n, int64_t stride_q, int64_t b, int64_t q) {
    return (const T*)data + b * stride_n + q * stride_q;
}

void prefetch(const void* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)data + i);
}

void load_block(Block* k, const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t queries, bool more) {
    int64_t per_query = a->levels * a->points;
    coordinate_rules(k, a, b, q0, queries);
    int64_t points_bytes = a->points_type == MSDA_FLOAT32 ? 4 : 2, weights_bytes = a->weights_type == MSDA_FLOAT32 ? 4 : 2;
    const char* points = (const char*)a->point_data +
                         (b * a->points_stride_n + q0 * a->points_stride_q + h * per_query * 2) * points_bytes;
    const char* weight = (const char*)a->weight_data +
                         (b * a->weights_stride_n + q0 * a->weights_stride_q + h * per_query) * weights_bytes;
    if (more)
        for (int64_t query = queries; query < 2 * queries; query++) {
            prefetch(points + query * a->points_stride_q * points_bytes, per_query * 2 * points_bytes);
            prefetch(weight + query * a->weights_stride_q * weights_bytes, per_query * weights_bytes);
        }
    if (a->points_type == MSDA_FLOAT32)
        coordinates(k, a, (const float*)points, a->points_stride_q, queries);
    else
        coordinates(k, a, (const bfloat16*)points, a->points_stride_q, queries);
    bool softmax = a->reference_size != 0;
    if (a->weights_type == MSDA_FLOAT32)
        weights(k, (const float*)weight, a->weights_stride_q, queries, per_query, softmax);
    else
        weights(k, (const bfloat16*)weight, a->weights_stride_q, queries, per_query, softmax);
}

// ---- stage 2: rows and coefficients of the corners ---------------------------------------------------------------

void corners(Block* k, int64_t num, int32_t outside_row) {
    typedef V::F F;
    typedef V::I I;
    const F one = V::splat(1.0f), low = V::splat(-2.0f);
    const I outside = V::splat_int(outside_row), none = V::splat_int(-1);
    for (int64_t i = 0; i < num; i += MSDA_WIDTH) {
        F x = V::load(k->x + i), y = V::load(k->y + i), w = V::load(k->width + i), h = V::load(k->height + i);
        F weight = V::load(k->weight + i);
        // NaN and huge coordinates become cells outside before they are converted; the comparisons send NaN to `low`
        x = V::select(x > low, x, low);
        y = V::select(y > low, y, low);
        x = V::select(x < w + one, x, w + one);
        y = V::select(y < h + one, y, h + one);
        I xi = V::to_int(x), yi = V::to_int(y);
        xi += (I)(V::to_float(xi) > x);  // the mask is -1: floor
        yi += (I)(V::to_float(yi) > y);
        F fx = x - V::to_float(xi), fy = y - V::to_float(yi);
        I wi = V::to_int(w), hi = V::to_int(h);
        I left = (xi > none) & (xi < wi), right = (xi + 1 > none) & (xi + 1 < wi);
        I top = (yi > none) & (yi < hi), bottom = (yi + 1 > none) & (yi + 1 < hi);
        I row = V::load_int(k->start + i) + yi * wi + xi;
        F upper = weight * (one - fy), lower = weight * fy, fx_left = one - fx;
        V::store(k->fraction_x + i, fx);
        V::store(k->fraction_y + i, fy);
        I valid[4] = {top & left, top & right, bottom & left, bottom & right};
        I rows[4] = {row, row + 1, row + wi, row + wi + 1};
        F coefficients[4] = {upper * fx_left, upper * fx, lower * fx_left, lower * fx};
        for (int c = 0; c < 4; c++) {
            V::store(k->coefficient[c] + i, (F)((I)coefficients[c] & valid[c]));
            V::store_int(k->row[c] + i, V::select_int(valid[c], rows[c], outside));
        }
    }
}

// ---- stage 3: gather and scatter ---------------------------------------------------------------------------------

// Packed rows are floats with a zero row at S; direct rows are read where they lie, row -1 being outside.
template <class T>
struct Rows {
    const char* base;
    int64_t bytes;  // between rows
    const T* zero;
};

template <bool PACKED, int FLOATS, class T>
INLINE const T* row_of(const Rows<T>& rows, int32_t index) {
    if (PACKED && FLOATS) return (const T*)(rows.base + (int64_t)index * (FLOATS * 4));
    if (PACKED) return (const T*)(rows.base + (int64_t)index * rows.bytes);
    const T* row = (const T*)(rows.base + (int64_t)index * rows.bytes);
    return index < 0 ? rows.zero : row;
}

// W lanes, NV vectors at a time, `chunks` times; FLOATS = W * NV where chunks is 1, else 0
template <int W, int NV, bool PACKED, bool SINGLE, class T, class OutT>
INLINE void gather(const Block* k, const Rows<T>& rows, int64_t chunks, int64_t d, int64_t queries, int64_t per_query,
                   OutT* out, int64_t out_stride) {
    typedef Ops<W> O;
    typedef typename O::F F;
    const int SUMS = NV >= 4 ? 2 : 4;  // independent sums, so that the adds overlap
    const int64_t count = SINGLE ? 1 : chunks;
    for (int64_t query = 0; query < queries; query++)
        for (int64_t chunk = 0; chunk < count; chunk++) {
            F sum[SUMS][NV];
            for (int s = 0; s < SUMS; s++)
                for (int v = 0; v < NV; v++) sum[s][v] = O::splat(0);
            for (int64_t i = query * per_query; i < (query + 1) * per_query; i++)
                for (int c = 0; c < 4; c++) {
                    const T* row = row_of<PACKED, SINGLE ? W * NV : 0>(rows, k->row[c][i]) + chunk * (W * NV);
                    F coefficient = O::splat(k->coefficient[c][i]);
                    for (int v = 0; v < NV; v++) sum[c % SUMS][v] += coefficient * O::load(row + v * W);
                }
            OutT* to = out + query * out_stride + chunk * (W * NV);
            for (int v = 0; v < NV; v++) {
                F total = sum[0][v];
                if (SUMS == 2) total += sum[1 % SUMS][v];
                if (SUMS == 4) total = (total + sum[1 % SUMS][v]) + (sum[2 % SUMS][v] + sum[3 % SUMS][v]);
                int64_t left = d - chunk * (W * NV) - v * W;
                if (!PACKED || left >= W) {
                    O::store(to + v * W, total);
                } else {
                    for (int64_t lane = 0; lane < left; lane++) put(to + v * W + lane, total[lane]);
                }
            }
        }
}

template <int W, int NV, bool PACKED, bool SINGLE>
INLINE void scatter(Block* k, const Rows<float>& rows, const Rows<float>& grads, int64_t chunks, int64_t queries,
                    int64_t per_query, const float* grad, int64_t grad_stride) {
    typedef Ops<W> O;
    typedef typename O::F F;
    const int64_t count = SINGLE ? 1 : chunks;
    for (int64_t query = 0; query < queries; query++)
        for (int64_t chunk = 0; chunk < count; chunk++) {
            F g[NV];
            for (int v = 0; v < NV; v++) g[v] = O::load(grad + query * grad_stride + chunk * (W * NV) + v * W);
            for (int64_t i = query * per_query; i < (query + 1) * per_query; i++) {
                F dot[4];
                for (int c = 0; c < 4; c++) {
                    int32_t index = k->row[c][i];
                    const float* row = row_of<PACKED, SINGLE ? W * NV : 0>(rows, index) + chunk * (W * NV);
                    float* to = (float*)row_of<PACKED, SINGLE ? W * NV : 0>(grads, index) + chunk * (W * NV);
                    F coefficient = O::splat(k->coefficient[c][i]);
                    dot[c] = g[0] * O::load(row);
                    O::store(to, O::load(to) + coefficient * g[0]);
                    for (int v = 1; v < NV; v++) {
                        dot[c] += g[v] * O::load(row + v * W);
                        O::store(to + v * W, O::load(to + v * W) + coefficient * g[v]);
                    }
                }
                float* partial = k->partial + 16 * i;
                if (SINGLE || chunk == 0) {
                    partial_sums(partial, dot);
                } else {
                    float more[16];
                    partial_sums(more, dot);
                    for (int j = 0; j < 16; j++) partial[j] += more[j];
                }
            }
        }
}

// ---- stage 4: gradients of weights and coordinates -----------------------------------------------------------------

// On return: x, y = gradients of the pixel coordinates, coefficient[0] = gradient of the weight or logit.
void point_gradients(Block* k, int64_t num, int64_t queries, int64_t per_query, bool softmax) {
    typedef V::F F;
    for (int64_t i = 0; i < num; i += 4)
        for (int c = 0; c < 4; c++) {
            const float* p = k->partial + 16 * i + 4 * c;
            V4::store(k->dot[c] + i,
                      sum_of_each(V4::load(p), V4::load(p + 16), V4::load(p + 32), V4::load(p + 48)));
        }
    for (int64_t i = 0; i < num; i += MSDA_WIDTH) {
        F fx = V::load(k->fraction_x + i), fy = V::load(k->fraction_y + i), weight = V::load(k->weight + i);
        F s0 = V::load(k->dot[0] + i), s1 = V::load(k->dot[1] + i);
        F s2 = V::load(k->dot[2] + i), s3 = V::load(k->dot[3] + i);
        F upper_slope = s1 - s0, lower_slope = s3 - s2;
        F upper = s0 + fx * upper_slope, lower = s2 + fx * lower_slope;
        V::store(k->x + i, weight * (upper_slope + fy * (lower_slope - upper_slope)));
        V::store(k->y + i, weight * (lower - upper));
        V::store(k->coefficient[0] + i, upper + fy * (lower - upper));
    }
    if (!softmax) return;
    for (int64_t query = 0; query < queries; query++) {
        float *grad = k->coefficient[0] + query * per_query, *weight = k->weight + query * per_query;
        V4::F sum = V4::splat(0);
        int64_t i = 0;
        for (; i + 4 <= per_query; i += 4) sum += V4::load(grad + i) * V4::load(weight + i);
        float mean = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        for (; i < per_query; i++) mean += grad[i] * weight[i];
        for (i = 0; i + 4 <= per_query; i += 4) V4::store(grad + i, V4::load(weight + i) * (V4::load(grad + i) - mean));
        for (; i < per_query; i++) grad[i] = weight[i] * (grad[i] - mean);
    }
}

template <class T>
INLINE void store_points(const Block* k, const MsdaArgs* a, T* out, int64_t stride, int64_t queries) {
    int64_t points = a->points, i = 0;
    for (int64_t query = 0; query < queries; query++, out += stride) {
        T* to = out;
        for (int64_t l = 0; l < a->levels; l++, i += points, to += 2 * points) {
            int64_t rule = query * a->levels + l, point = 0;
            float sx = k->scale_x[rule], sy = k->scale_y[rule];
            for (; point + 4 <= points; point += 4) {
                V4::F x = V4::load(k->x + i + point) * sx, y = V4::load(k->y + i + point) * sy;
                V4::store(to + 2 * point, MSDA_SHUFFLE(4, x, y, 0, 4, 1, 5));
                V4::store(to + 2 * point + 4, MSDA_SHUFFLE(4, x, y, 2, 6, 3, 7));
            }
            for (; point < points; point++) {
                put(to + 2 * point, k->x[i + point] * sx);
                put(to + 2 * point + 1, k->y[i + point] * sy);
            }
        }
    }
}

template <class T>
INLINE void store_weights(const Block* k, T* out, int64_t stride, int64_t queries, int64_t per_query) {
    const float* grad = k->coefficient[0];
    for (int64_t query = 0; query < queries; query++, out += stride, grad += per_query) {
        int64_t i = 0;
        for (; i + 4 <= per_query; i += 4) V4::store(out + i, V4::load(grad + i));
        for (; i < per_query; i++) put(out + i, grad[i]);
    }
}

template <class T>
void store_reference(const Block* k, const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t queries, const T* offsets) {
    int64_t points = a->points, size = a->reference_size, i = 0;
    for (int64_t query = 0; query < queries; query++, offsets += a->points_stride_q) {
        float* out = a->grad_reference + (((b * a->q + q0 + query) * a->m + h) * a->levels) * size;
        const T* in = offsets;
        for (int64_t l = 0; l < a->levels; l++, out += size, in += 2 * points) {
            float height = (float)a->shapes[2 * l], width = (float)a->shapes[2 * l + 1];
            float x = 0, y = 0, w = 0, hh = 0;
            for (int64_t point = 0; point < points; point++, i++) {
                x += k->x[i], y += k->y[i];
                w += k->x[i] * to_float(in[2 * point]), hh += k->y[i] * to_float(in[2 * point + 1]);
            }
            out[0] = x * width, out[1] = y * height;
            if (size == 4) {
                float half = 0.5f / (float)points;
                out[2] = w * half * width, out[3] = hh * half * height;
            }
        }
    }
}

// ---- one head of one image ---------------------------------------------------------------------------------------

struct Shape {
    int width, vectors;  // vectors of `width` floats, in chunks of `vectors`
    int64_t chunks;
};
Shape shape_of(const MsdaArgs* a) {
    int64_t d = padded_size(a);
    int width = 4;
#if MSDA_WIDTH >= 8
    if (d % 8 == 0) width = 8;
#endif
#if MSDA_WIDTH >= 16
    if (d % 16 == 0) width = 16;
#endif
    int64_t all = d / width;
    int vectors = all % 4 == 0 ? 4 : all % 2 == 0 ? 2 : 1;
    return {width, vectors, all / vectors};
}

template <class T>
INLINE const T* value_of(const MsdaArgs* a, int64_t b, int64_t h) {
    return (const T*)a->value + b * a->value_stride_n + h * a->d;
}

template <int W, int NV, bool PACKED, class T, class OutT>
void forward_body(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, Rows<T> rows, Block* k, int64_t chunks) {
    int64_t per_query = a->levels * a->points, step = block_queries(a);
    rows.zero = (const T*)k->zero;
    for (int64_t q = q0; q < q1; q += step) {
        int64_t queries = q1 - q < step ? q1 - q : step;
        load_block(k, a, b, h, q, queries, q + 2 * step <= q1);
        corners(k, queries * per_query, PACKED ? (int32_t)a->s : -1);
        OutT* out = (OutT*)a->output + ((b * a->q + q) * a->m + h) * a->d;
        if (chunks == 1)
            gather<W, NV, PACKED, true>(k, rows, chunks, a->d, queries, per_query, out, a->m * a->d);
        else
            gather<W, NV, PACKED, false>(k, rows, chunks, a->d, queries, per_query, out, a->m * a->d);
    }
}

template <int W, int NV>
void forward_types(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, const float* packed, Block* k, int64_t chunks) {
    bool bf16 = a->value_type == MSDA_BFLOAT16;
    if (packed) {
        Rows<float> rows = {(const char*)packed, padded_size(a) * 4, 0};
        if (bf16)
            forward_body<W, NV, true, float, bfloat16>(a, b, h, q0, q1, rows, k, chunks);
        else
            forward_body<W, NV, true, float, float>(a, b, h, q0, q1, rows, k, chunks);
    } else if (bf16) {
        Rows<bfloat16> rows = {(const char*)value_of<bfloat16>(a, b, h), a->value_stride_s * 2, 0};
        forward_body<W, NV, false, bfloat16, bfloat16>(a, b, h, q0, q1, rows, k, chunks);
    } else {
        Rows<float> rows = {(const char*)value_of<float>(a, b, h), a->value_stride_s * 4, 0};
        forward_body<W, NV, false, float, float>(a, b, h, q0, q1, rows, k, chunks);
    }
}

template <int W, int NV, bool PACKED>
void backward_body(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, Rows<float> rows, Rows<float> grads,
                   Block* k, int64_t chunks) {
    int64_t per_query = a->levels * a->points, step = block_queries(a), d = padded_size(a);
    bool softmax = a->reference_size != 0, plain = a->value_type == MSDA_FLOAT32 && d == a->d;
    rows.zero = k->zero;
    grads.zero = k->waste;
    float* row = (float*)((char*)k + sizeof(Block));  // copies of grad_output where it is not float32 or not padded
    for (int64_t q = q0; q < q1; q += step) {
        int64_t queries = q1 - q < step ? q1 - q : step;
        load_block(k, a, b, h, q, queries, q + 2 * step <= q1);
        corners(k, queries * per_query, PACKED ? (int32_t)a->s : -1);
        int64_t at = ((b * a->q + q) * a->m + h) * a->d, stride = a->m * a->d;
        const float* grad = (const float*)a->grad_output + at;
        if (plain) {
            if (q + 2 * step <= q1)
                for (int64_t query = queries; query < 2 * queries; query++) prefetch(grad + query * stride, d * 4);
        } else {
            for (int64_t query = 0; query < queries; query++)
                for (int64_t i = 0; i < a->d; i++)
                    row[query * d + i] = a->value_type == MSDA_FLOAT32
                                             ? ((const float*)a->grad_output)[at + query * stride + i]
                                             : to_float(((const bfloat16*)a->grad_output)[at + query * stride + i]);
            grad = row;
            stride = d;
        }
        if (chunks == 1)
            scatter<W, NV, PACKED, true>(k, rows, grads, chunks, queries, per_query, grad, stride);
        else
            scatter<W, NV, PACKED, false>(k, rows, grads, chunks, queries, per_query, grad, stride);
        point_gradients(k, queries * per_query, queries, per_query, softmax);
        int64_t first = ((b * a->q + q) * a->m + h) * per_query, next = a->m * per_query;
        if (a->points_type == MSDA_FLOAT32)
            store_points(k, a, (float*)a->grad_points + 2 * first, 2 * next, queries);
        else
            store_points(k, a, (bfloat16*)a->grad_points + 2 * first, 2 * next, queries);
        if (a->weights_type == MSDA_FLOAT32)
            store_weights(k, (float*)a->grad_weights + first, next, queries, per_query);
        else
            store_weights(k, (bfloat16*)a->grad_weights + first, next, queries, per_query);
        if (a->grad_reference) {
            int64_t offset = b * a->points_stride_n + q * a->points_stride_q + h * per_query * 2;
            if (a->points_type == MSDA_FLOAT32)
                store_reference(k, a, b, h, q, queries, (const float*)a->point_data + offset);
            else
                store_reference(k, a, b, h, q, queries, (const bfloat16*)a->point_data + offset);
        }
    }
}

template <int W, int NV>
void backward_types(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, const float* packed,
                    float* grad_packed, Block* k, int64_t chunks) {
    if (packed) {
        int64_t bytes = padded_size(a) * 4;
        Rows<float> rows = {(const char*)packed, bytes, 0}, grads = {(const char*)grad_packed, bytes, 0};
        backward_body<W, NV, true>(a, b, h, q0, q1, rows, grads, k, chunks);
    } else {
        Rows<float> rows = {(const char*)value_of<float>(a, b, h), a->value_stride_s * 4, 0};
        const float* grad = (const float*)a->grad_value + (b * a->s * a->m + h) * a->d;
        Rows<float> grads = {(const char*)grad, a->m * a->d * 4, 0};
        backward_body<W, NV, false>(a, b, h, q0, q1, rows, grads, k, chunks);
    }
}

#define MSDA_VECTORS(W, CALL)                   \
    case W * 8 + 1: CALL(W, 1); break;          \
    case W * 8 + 2: CALL(W, 2); break;          \
    case W * 8 + 4: CALL(W, 4); break;
#if MSDA_WIDTH >= 16
#define MSDA_WIDTHS(CALL) MSDA_VECTORS(4, CALL) MSDA_VECTORS(8, CALL) MSDA_VECTORS(16, CALL)
#elif MSDA_WIDTH >= 8
#define MSDA_WIDTHS(CALL) MSDA_VECTORS(4, CALL) MSDA_VECTORS(8, CALL)
#else
#define MSDA_WIDTHS(CALL) MSDA_VECTORS(4, CALL)
#endif

size_t kernel_bytes(const MsdaArgs* a) {
    return sizeof(Block) + (size_t)(block_queries(a) * padded_size(a)) * 4 + 64 + block_bytes(a);
}
Block* block_at(const MsdaArgs* a, void* memory) {  // the Block, then copies of grad_output, then the arrays
    char* arrays = (char*)memory + sizeof(Block) + block_queries(a) * padded_size(a) * 4;
    block_init((Block*)memory, a, (void*)(((uintptr_t)arrays + 63) & ~(uintptr_t)63));
    memset((char*)memory + sizeof(Block), 0, (size_t)(block_queries(a) * padded_size(a)) * 4);
    return (Block*)memory;
}

void forward(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, const float* packed, void* memory) {
    Shape shape = shape_of(a);
    Block* k = block_at(a, memory);
#define CALL(W, NV) forward_types<W, NV>(a, b, h, q0, q1, packed, k, shape.chunks)
    switch (shape.width * 8 + shape.vectors) { MSDA_WIDTHS(CALL) }
#undef CALL
}

void backward(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, const float* packed, float* grad_packed,
              void* memory) {
    Shape shape = shape_of(a);
    Block* k = block_at(a, memory);
#define CALL(W, NV) backward_types<W, NV>(a, b, h, q0, q1, packed, grad_packed, k, shape.chunks)
    switch (shape.width * 8 + shape.vectors) { MSDA_WIDTHS(CALL) }
#undef CALL
}

int64_t row(const MsdaArgs* a) { return padded_size(a); }

int64_t direct(const MsdaArgs* a, int64_t is_backward) {
    return a->d % 4 == 0 && !(is_backward && a->value_type != MSDA_FLOAT32);
}

template <class T>
void pack_rows(const MsdaArgs* a, const T* value, int64_t s0, int64_t s1, float* packed) {
    int64_t d = a->d, size = padded_size(a);
    for (int64_t s = s0; s < s1; s++) {
        const T* from = value + s * a->value_stride_s;
        float* to = packed + s * size;
        int64_t i = 0;
        for (; i + 4 <= d; i += 4) V4::store(to + i, V4::load(from + i));
        for (; i < d; i++) to[i] = to_float(from[i]);
        for (; i < size; i++) to[i] = 0;
    }
}

void pack(const MsdaArgs* a, int64_t b, int64_t h, int64_t s0, int64_t s1, float* packed) {
    if (a->value_type == MSDA_FLOAT32)
        pack_rows(a, value_of<float>(a, b, h), s0, s1, packed);
    else
        pack_rows(a, value_of<bfloat16>(a, b, h), s0, s1, packed);
}

template <class T>
void unpack_rows(const MsdaArgs* a, T* grad, int64_t s0, int64_t s1, const float* packed, int64_t copies, int64_t copy_stride) {
    int64_t d = a->d, size = padded_size(a);
    for (int64_t s = s0; s < s1; s++) {
        const float* from = packed + s * size;
        T* to = grad + s * a->m * d;
        int64_t i = 0;
        for (; i + 4 <= d; i += 4) {
            V4::F sum = V4::load(from + i);
            for (int64_t copy = 1; copy < copies; copy++) sum += V4::load(from + i + copy * copy_stride);
            V4::store(to + i, sum);
        }
        for (; i < d; i++) {
            float sum = from[i];
            for (int64_t copy = 1; copy < copies; copy++) sum += from[i + copy * copy_stride];
            put(to + i, sum);
        }
    }
}

void unpack(const MsdaArgs* a, int64_t b, int64_t h, int64_t s0, int64_t s1, const float* packed, int64_t copies,
            int64_t copy_stride) {
    int64_t at = (b * a->s * a->m + h) * a->d;
    if (a->value_type == MSDA_FLOAT32)
        unpack_rows(a, (float*)a->grad_value + at, s0, s1, packed, copies, copy_stride);
    else
        unpack_rows(a, (bfloat16*)a->grad_value + at, s0, s1, packed, copies, copy_stride);
}

}  // namespace

#define MSDA_TABLE2(isa) msda_kernels_##isa
#define MSDA_TABLE(isa) MSDA_TABLE2(isa)
#define MSDA_NAME2(isa) #isa
#define MSDA_NAME(isa) MSDA_NAME2(isa)
extern const MsdaKernels MSDA_TABLE(MSDA_ISA);
const MsdaKernels MSDA_TABLE(MSDA_ISA) = {MSDA_NAME(MSDA_ISA), row,    kernel_bytes, direct,
                                          pack,                unpack, forward,      backward};
