// The kernels, built once per instruction set (MSDA_ISA names the table, MSDA_WIDTH is its vector width in floats).
//
// Queries go in blocks of about 128 points, in four stages over arrays that stay in the L1 cache: coordinates and
// softmax -> rows and coefficients of the four corners -> gather (and scatter) -> gradients. Split like this, no stage
// waits for a store of the one before.
#include "msda.h"
#include "vector.h"

namespace {

typedef Ops<MSDA_WIDTH> V;
typedef Ops<4> V4;

int64_t padded_points(const MsdaArgs* a) { return (block_queries(a) * a->levels * a->points + 15) & ~(int64_t)15; }
int64_t type_bytes(int64_t type) { return type == MSDA_FLOAT32 ? 4 : 2; }
int64_t padded_size(const MsdaArgs* a) { return (a->d + 3) & ~(int64_t)3; }

// A head packed to floats has a border of zero cells, so that the four corners of any point lie at fixed distances and
// none needs a test: one cell before each line (it also ends the line above), a line above and two below each level.
int64_t line_rows(const MsdaArgs* a, int64_t level) { return a->shapes[2 * level + 1] + 1; }
int64_t level_lines(const MsdaArgs* a, int64_t level) { return a->shapes[2 * level] + 2; }
int64_t level_rows(const MsdaArgs* a, int64_t level) { return level_lines(a, level) * line_rows(a, level) + 2; }

int64_t rows(const MsdaArgs* a) {
    int64_t total = 0;
    for (int64_t l = 0; l < a->levels; l++) total += level_rows(a, l);
    return total;
}
int64_t lines(const MsdaArgs* a) {
    int64_t total = 0;
    for (int64_t l = 0; l < a->levels; l++) total += level_lines(a, l);
    return total;
}

// Arrays of one block; `num` points = queries * levels * points, query-major. A pair is an x and a y.
struct Block {
    float* pixel;                    // pairs: coordinates; after the backward, their gradients
    float* weight;                   // attention weight
    float *width, *height;           // of the point's level
    float *fraction_x, *fraction_y;  // position between the corners
    float* coefficient[4];           // weight * bilinear, 0 for points outside
    float* dot[4];                   // corner value . grad_output
    float *scale, *offset, *size;    // pairs, per query and level: pixel = scale * input + offset; width and height
    float* partial;                  // 16 per point: four partial sums of each dot
    float *zero, *waste;             // unpacked: a row to read and a row to write for corners outside
    int32_t *start, *line;           // row of the level's cell (0, 0), rows from line to line
    int32_t* row[4];                 // of the corners; packed: of the upper left one alone
    int64_t* line_bytes;             // per level, packed
};

size_t block_bytes(const MsdaArgs* a) {
    size_t points = (size_t)padded_points(a), row = (size_t)padded_size(a) + 64;
    size_t pairs = 2 * (size_t)(block_queries(a) * a->levels + 16);
    return (points * (2 + 5 + 4 + 4 + 16 + 6) + pairs * 3 + row * 2 + 64) * 4 + (size_t)a->levels * 8;
}

void block_init(Block* k, const MsdaArgs* a, void* memory, bool packed) {
    int64_t num = padded_points(a), pairs = 2 * (block_queries(a) * a->levels + 16), row = padded_size(a) + 64;
    memset(memory, 0, block_bytes(a));
    k->line_bytes = (int64_t*)memory;
    float* p = (float*)(k->line_bytes + a->levels);
    k->pixel = p, p += 2 * num;
    float** arrays[] = {&k->weight, &k->width, &k->height, &k->fraction_x, &k->fraction_y};
    for (float** array : arrays) *array = p, p += num;
    for (int c = 0; c < 4; c++) k->coefficient[c] = p, p += num;
    for (int c = 0; c < 4; c++) k->dot[c] = p, p += num;
    k->partial = p, p += 16 * num;
    k->start = (int32_t*)p, p += num;
    k->line = (int32_t*)p, p += num;
    for (int c = 0; c < 4; c++) k->row[c] = (int32_t*)p, p += num;
    float** tables[] = {&k->scale, &k->offset, &k->size};
    for (float** table : tables) *table = p, p += pairs;
    k->zero = p, p += row;
    k->waste = p;
    int64_t i = 0, pair = 0;
    for (int64_t query = 0; query < block_queries(a); query++) {
        int64_t start = 0;
        for (int64_t l = 0; l < a->levels; l++, pair += 2) {
            int64_t h = a->shapes[2 * l], w = a->shapes[2 * l + 1], line = packed ? line_rows(a, l) : w;
            k->line_bytes[l] = line * padded_size(a) * 4;
            k->size[pair] = (float)w, k->size[pair + 1] = (float)h;
            for (int c = 0; c < 2; c++) {
                k->scale[pair + c] = a->reference_size ? 1.0f : k->size[pair + c];
                k->offset[pair + c] = -0.5f;
            }
            for (int64_t point = 0; point < a->points; point++, i++) {
                k->width[i] = (float)w;
                k->height[i] = (float)h;
                k->start[i] = (int32_t)(packed ? start + line + 1 : start);
                k->line[i] = (int32_t)line;
            }
            start += packed ? level_rows(a, l) : h * w;
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

// pixel = scale * input + offset, per query and level (cell centres at integers)
void coordinate_rules(Block* k, const MsdaArgs* a, int64_t b, int64_t q0, int64_t queries) {
    int64_t size = a->reference_size, num = queries * a->levels;
    const float* reference = a->reference + (b * a->q + q0) * a->levels * size;
    if (size == 2) {
        int64_t i = 0;
        for (; i + 4 <= 2 * num; i += 4)
            V4::store(k->offset + i, V4::load(reference + i) * V4::load(k->size + i) - V4::splat(0.5f));
        for (; i < 2 * num; i++) k->offset[i] = reference[i] * k->size[i] - 0.5f;
    } else if (size == 4) {
        float half = 0.5f / (float)a->points;
        for (int64_t i = 0; i < num; i++)
            for (int c = 0; c < 2; c++) {
                k->offset[2 * i + c] = reference[4 * i + c] * k->size[2 * i + c] - 0.5f;
                k->scale[2 * i + c] = reference[4 * i + 2 + c] * half * k->size[2 * i + c];
            }
    }
}

template <class T>
INLINE void coordinates(Block* k, const MsdaArgs* a, const T* data, int64_t stride, int64_t queries) {
    int64_t levels = a->levels, floats = 2 * a->points;
    const float *scale = k->scale, *offset = k->offset;
    float* out = k->pixel;
    for (int64_t query = 0; query < queries; query++, data += stride) {
        const T* in = data;
        for (int64_t l = 0; l < levels; l++, in += floats, out += floats, scale += 2, offset += 2) {
            int64_t i = 0;
#if MSDA_WIDTH >= 8
            typedef Ops<8> V8;
            for (; i + 8 <= floats; i += 8)
                V8::store(out + i, V8::load(in + i) * V8::splat_pair(scale) + V8::splat_pair(offset));
#endif
            for (; i + 4 <= floats; i += 4)
                V4::store(out + i, V4::load(in + i) * V4::splat_pair(scale) + V4::splat_pair(offset));
            for (; i < floats; i += 2) {
                out[i] = to_float(in[i]) * scale[0] + offset[0];
                out[i + 1] = to_float(in[i + 1]) * scale[1] + offset[1];
            }
        }
    }
}

// Softmax of `num` logits, W at a time; the last few are filled up with -inf, whose exponential is 0.
template <int W, class T>
INLINE void softmax(float* out, const T* in, int64_t num) {
    typedef Ops<W> O;
    typedef typename O::F F;
    int64_t whole = num & ~(int64_t)(W - 1), rest = num - whole;
    float tail[W];
    F last = O::splat(-__builtin_inff()), most = last;
    if (rest) {
        O::store(tail, last);
        for (int64_t i = 0; i < rest; i++) tail[i] = to_float(in[whole + i]);
        most = last = O::load(tail);
    }
    for (int64_t i = 0; i < whole; i += W) {
        F x = O::load(in + i);
        most = O::select(x > most, x, most);
    }
    most = max_of_all(most);
    F sum = O::splat(0);
    for (int64_t i = 0; i < whole; i += W) {
        F e = O::exp_nonpositive(O::load(in + i) - most);
        O::store(out + i, e);
        sum += e;
    }
    if (rest) {
        last = O::exp_nonpositive(last - most);
        sum += last;
    }
    F inverse = O::splat(1.0f) / sum_of_all(sum);
    for (int64_t i = 0; i < whole; i += W) O::store(out + i, O::load(out + i) * inverse);
    if (rest) {
        O::store(tail, last * inverse);
        for (int64_t i = 0; i < rest; i++) out[whole + i] = tail[i];
    }
}

template <class T>
INLINE void weights(Block* k, const T* data, int64_t stride, int64_t queries, int64_t per_query, bool is_step) {
    float* out = k->weight;
    for (int64_t query = 0; query < queries; query++, data += stride, out += per_query) {
        if (!is_step) {
            int64_t i = 0;
            for (; i + 4 <= per_query; i += 4) V4::store(out + i, V4::load(data + i));
            for (; i < per_query; i++) out[i] = to_float(data[i]);
        } else if (per_query % MSDA_WIDTH == 0) {
            softmax<MSDA_WIDTH>(out, data, per_query);
        } else {
            softmax<4>(out, data, per_query);
        }
    }
}

INLINE void prefetch(const void* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)data + i);
}
// To be written: else the stores of a block wait for lines that are read only to be overwritten.
INLINE void prefetch_writes(void* data, int64_t bytes, int64_t stride_bytes, int64_t queries) {
    for (int64_t query = 0; query < queries; query++)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((char*)data + query * stride_bytes + i, 1);
}

void load_block(Block* k, const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t queries, bool more) {
    int64_t per_query = a->levels * a->points;
    coordinate_rules(k, a, b, q0, queries);
    int64_t points_bytes = type_bytes(a->points_type), weights_bytes = type_bytes(a->weights_type);
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

// Packed: points outside move to the lines below their level, where all four corners are zeros.
void corners_packed(Block* k, int64_t num) {
    typedef V::F F;
    typedef V::I I;
    const F before = V::splat(-1.0f);
    for (int64_t i = 0; i < num; i += MSDA_WIDTH) {
        F x, y, w = V::load(k->width + i), h = V::load(k->height + i);
        deinterleave(V::load(k->pixel + 2 * i), V::load(k->pixel + 2 * i + MSDA_WIDTH), &x, &y);
        // NaN and huge coordinates are outside, before anything is converted to an integer
        I inside = (x > before) & (x < w) & (y > before) & (y < h);
        x = V::select(inside, x, before);
        y = V::select(inside, y, h);
        F weight = (F)((I)V::load(k->weight + i) & inside);
        I xi = V::to_int(x), yi = V::to_int(y);
        xi += (I)(V::to_float(xi) > x);  // the mask is -1: floor
        yi += (I)(V::to_float(yi) > y);
        F fx = x - V::to_float(xi), fy = y - V::to_float(yi);
        V::store(k->fraction_x + i, fx);
        V::store(k->fraction_y + i, fy);
        V::store_int(k->row[0] + i, V::load_int(k->start + i) + yi * V::load_int(k->line + i) + xi);
        F lower = weight * fy, upper = weight - lower, upper_right = upper * fx, lower_right = lower * fx;
        V::store(k->coefficient[0] + i, upper - upper_right);
        V::store(k->coefficient[1] + i, upper_right);
        V::store(k->coefficient[2] + i, lower - lower_right);
        V::store(k->coefficient[3] + i, lower_right);
    }
}

// Unpacked: corners outside have no coefficient and row -1.
void corners_direct(Block* k, int64_t num) {
    typedef V::F F;
    typedef V::I I;
    const F one = V::splat(1.0f), low = V::splat(-2.0f);
    const I none = V::splat_int(-1);
    for (int64_t i = 0; i < num; i += MSDA_WIDTH) {
        F x, y, w = V::load(k->width + i), h = V::load(k->height + i), weight = V::load(k->weight + i);
        deinterleave(V::load(k->pixel + 2 * i), V::load(k->pixel + 2 * i + MSDA_WIDTH), &x, &y);
        // NaN and huge coordinates become cells outside before they are converted; the comparisons send NaN to `low`
        x = V::select(x > low, x, low);
        y = V::select(y > low, y, low);
        x = V::select(x < w + one, x, w + one);
        y = V::select(y < h + one, y, h + one);
        I xi = V::to_int(x), yi = V::to_int(y);
        xi += (I)(V::to_float(xi) > x);
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
            V::store_int(k->row[c] + i, V::select_int(valid[c], rows[c], none));
        }
    }
}

// ---- stage 3: gather and scatter ---------------------------------------------------------------------------------

// Where the corners of a point lie: `level` is called before the points of a level, `point` before the corners of a
// point. FLOATS: of a row, 0 = known at run time.
template <int FLOATS>
struct Packed {
    typedef float Type;
    char* base;
    int64_t row_bytes;
    const int32_t* row;
    const int64_t* line_bytes;
    int64_t line;
    char* first;
    INLINE_METHOD int64_t bytes() const { return FLOATS ? FLOATS * 4 : row_bytes; }
    INLINE_METHOD void level(int64_t l) { line = line_bytes[l]; }
    INLINE_METHOD void point(int64_t i) { first = base + row[i] * bytes(); }
    INLINE_METHOD float* corner(int c) const { return (float*)(first + (c & 1 ? bytes() : 0) + (c & 2 ? line : 0)); }
};

template <class T>
struct Direct {
    typedef T Type;
    char* base;
    int64_t row_bytes;
    const int32_t* row[4];
    T* outside;
    T* found[4];
    INLINE_METHOD void level(int64_t) {}
    INLINE_METHOD void point(int64_t i) {
        for (int c = 0; c < 4; c++) {
            int32_t index = row[c][i];
            T* inside = (T*)(base + index * row_bytes);
            found[c] = index < 0 ? outside : inside;
        }
    }
    INLINE_METHOD T* corner(int c) const { return found[c]; }
};

// W lanes, NV vectors at a time, `chunks` times
template <int W, int NV, class Rows, class OutT>
INLINE void gather(const Block* k, const MsdaArgs* a, Rows rows, int64_t chunks, int64_t queries, OutT* out) {
    typedef Ops<W> O;
    typedef typename O::F F;
    const int SUMS = NV >= 4 ? 2 : 4;  // independent sums, so that the adds overlap
    const float* coefficient[4] = {k->coefficient[0], k->coefficient[1], k->coefficient[2], k->coefficient[3]};
    int64_t levels = a->levels, points = a->points, stride = a->m * a->d;
    for (int64_t query = 0; query < queries; query++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            F sum[SUMS][NV];
            for (int s = 0; s < SUMS; s++)
                for (int v = 0; v < NV; v++) sum[s][v] = O::splat(0);
            int64_t i = query * levels * points;
            for (int64_t l = 0; l < levels; l++) {
                rows.level(l);
                for (int64_t end = i + points; i < end; i++) {
                    rows.point(i);
                    for (int c = 0; c < 4; c++) {
                        const typename Rows::Type* row = rows.corner(c) + chunk * (W * NV);
                        F factor = O::splat(coefficient[c][i]);
                        for (int v = 0; v < NV; v++) sum[c % SUMS][v] += factor * O::load(row + v * W);
                    }
                }
            }
            OutT* to = out + query * stride + chunk * (W * NV);
            for (int v = 0; v < NV; v++) {
                F total = sum[0][v];
                if (SUMS == 2) total += sum[1 % SUMS][v];
                if (SUMS == 4) total = (total + sum[1 % SUMS][v]) + (sum[2 % SUMS][v] + sum[3 % SUMS][v]);
                int64_t left = a->d - chunk * (W * NV) - v * W;
                if (left >= W) {
                    O::store(to + v * W, total);
                } else {
                    for (int64_t lane = 0; lane < left; lane++) put(to + v * W + lane, total[lane]);
                }
            }
        }
}

template <int W, int NV, class Rows>
INLINE void scatter(const Block* k, const MsdaArgs* a, Rows rows, Rows grads, int64_t chunks, int64_t queries,
                    const float* grad, int64_t grad_stride) {
    typedef Ops<W> O;
    typedef typename O::F F;
    const float* coefficient[4] = {k->coefficient[0], k->coefficient[1], k->coefficient[2], k->coefficient[3]};
    float* partial = k->partial;
    int64_t levels = a->levels, points = a->points;
    for (int64_t query = 0; query < queries; query++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            F g[NV];
            for (int v = 0; v < NV; v++) g[v] = O::load(grad + query * grad_stride + chunk * (W * NV) + v * W);
            int64_t i = query * levels * points;
            for (int64_t l = 0; l < levels; l++) {
                rows.level(l);
                grads.level(l);
                for (int64_t end = i + points; i < end; i++) {
                    F dot[4];
                    rows.point(i);
                    grads.point(i);
                    for (int c = 0; c < 4; c++) {
                        const float* row = rows.corner(c) + chunk * (W * NV);
                        float* to = grads.corner(c) + chunk * (W * NV);
                        F factor = O::splat(coefficient[c][i]);
                        dot[c] = g[0] * O::load(row);
                        O::store(to, O::load(to) + factor * g[0]);
                        for (int v = 1; v < NV; v++) {
                            dot[c] += g[v] * O::load(row + v * W);
                            O::store(to + v * W, O::load(to + v * W) + factor * g[v]);
                        }
                    }
                    if (chunk == 0) {
                        partial_sums(partial + 16 * i, dot);
                    } else {
                        float more[16];
                        partial_sums(more, dot);
                        for (int j = 0; j < 16; j++) partial[16 * i + j] += more[j];
                    }
                }
            }
        }
}

// ---- stage 4: gradients of weights and coordinates -----------------------------------------------------------------

// On return: pixel = gradients of the pixel coordinates, coefficient[0] = gradient of the weight or logit.
void point_gradients(Block* k, int64_t num, int64_t queries, int64_t per_query, bool softmax) {
    typedef V::F F;
    for (int64_t i = 0; i < num; i += 4) {
        float* dots[4] = {k->dot[0] + i, k->dot[1] + i, k->dot[2] + i, k->dot[3] + i};
        whole_sums<MSDA_WIDTH>(dots, k->partial + 16 * i);
    }
    for (int64_t i = 0; i < num; i += MSDA_WIDTH) {
        F fx = V::load(k->fraction_x + i), fy = V::load(k->fraction_y + i), weight = V::load(k->weight + i);
        F s0 = V::load(k->dot[0] + i), s1 = V::load(k->dot[1] + i);
        F s2 = V::load(k->dot[2] + i), s3 = V::load(k->dot[3] + i);
        F upper_slope = s1 - s0, lower_slope = s3 - s2;
        F upper = s0 + fx * upper_slope, lower = s2 + fx * lower_slope, low, high;
        interleave(weight * (upper_slope + fy * (lower_slope - upper_slope)), weight * (lower - upper), &low, &high);
        V::store(k->pixel + 2 * i, low);
        V::store(k->pixel + 2 * i + MSDA_WIDTH, high);
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
    int64_t floats = 2 * a->points;
    const float *in = k->pixel, *scale = k->scale;
    for (int64_t query = 0; query < queries; query++, out += stride) {
        T* to = out;
        for (int64_t l = 0; l < a->levels; l++, in += floats, to += floats, scale += 2) {
            int64_t i = 0;
#if MSDA_WIDTH >= 8
            typedef Ops<8> V8;
            for (; i + 8 <= floats; i += 8) V8::store(to + i, V8::load(in + i) * V8::splat_pair(scale));
#endif
            for (; i + 4 <= floats; i += 4) V4::store(to + i, V4::load(in + i) * V4::splat_pair(scale));
            for (; i < floats; i += 2) {
                put(to + i, in[i] * scale[0]);
                put(to + i + 1, in[i + 1] * scale[1]);
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
void store_reference(const Block* k, const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t queries,
                     const T* offsets) {
    int64_t points = a->points, size = a->reference_size;
    const float* grad = k->pixel;
    for (int64_t query = 0; query < queries; query++, offsets += a->points_stride_q) {
        float* out = a->grad_reference + (((b * a->q + q0 + query) * a->m + h) * a->levels) * size;
        const T* in = offsets;
        for (int64_t l = 0; l < a->levels; l++, out += size) {
            const float* wh = k->size + 2 * l;
            float sum[2] = {0, 0}, moment[2] = {0, 0};
            for (int64_t point = 0; point < points; point++, grad += 2, in += 2)
                for (int c = 0; c < 2; c++) {
                    sum[c] += grad[c];
                    moment[c] += grad[c] * to_float(in[c]);
                }
            for (int c = 0; c < 2; c++) {
                out[c] = sum[c] * wh[c];
                if (size == 4) out[2 + c] = moment[c] * (0.5f / (float)points) * wh[c];
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

template <int FLOATS>
INLINE Packed<FLOATS> packed_rows(const Block* k, const MsdaArgs* a, const float* base) {
    return {(char*)base, padded_size(a) * 4, k->row[0], k->line_bytes, 0, 0};
}
template <class T>
INLINE Direct<T> direct_rows(const Block* k, const T* base, int64_t stride, float* outside) {
    return {(char*)base, stride * (int64_t)sizeof(T), {k->row[0], k->row[1], k->row[2], k->row[3]}, (T*)outside, {}};
}
template <class T>
INLINE Direct<T> direct_value(const Block* k, const MsdaArgs* a, int64_t b, int64_t h) {
    return direct_rows(k, value_of<T>(a, b, h), a->value_stride_s, k->zero);
}

template <int W, int NV, bool PACKED, class Rows, class OutT>
void forward_body(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, Rows rows, Block* k,
                  int64_t chunks) {
    int64_t per_query = a->levels * a->points, step = block_queries(a);
    for (int64_t q = q0; q < q1; q += step) {
        int64_t queries = q1 - q < step ? q1 - q : step;
        OutT* out = (OutT*)a->output + ((b * a->q + q) * a->m + h) * a->d;
        prefetch_writes(out, a->d * (int64_t)sizeof(OutT), a->m * a->d * (int64_t)sizeof(OutT), queries);
        load_block(k, a, b, h, q, queries, q + 2 * step <= q1);
        PACKED ? corners_packed(k, queries * per_query) : corners_direct(k, queries * per_query);
        gather<W, NV>(k, a, rows, chunks, queries, out);
    }
}

template <int W, int NV, bool PACKED, class Rows>
void forward_rows(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, Rows rows, Block* k,
                  int64_t chunks) {
    if (a->value_type == MSDA_BFLOAT16)
        forward_body<W, NV, PACKED, Rows, bfloat16>(a, b, h, q0, q1, rows, k, chunks);
    else
        forward_body<W, NV, PACKED, Rows, float>(a, b, h, q0, q1, rows, k, chunks);
}

template <int W, int NV>
void forward_types(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, const float* packed, Block* k,
                   int64_t chunks) {
    if (packed && chunks == 1)
        forward_rows<W, NV, true>(a, b, h, q0, q1, packed_rows<W * NV>(k, a, packed), k, 1);
    else if (packed)
        forward_rows<W, NV, true>(a, b, h, q0, q1, packed_rows<0>(k, a, packed), k, chunks);
    else if (a->value_type == MSDA_BFLOAT16)
        forward_rows<W, NV, false>(a, b, h, q0, q1, direct_value<bfloat16>(k, a, b, h), k, chunks);
    else
        forward_rows<W, NV, false>(a, b, h, q0, q1, direct_value<float>(k, a, b, h), k, chunks);
}

template <int W, int NV, bool PACKED, class Rows>
void backward_body(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, Rows rows, Rows grads, Block* k,
                   int64_t chunks) {
    int64_t per_query = a->levels * a->points, step = block_queries(a), d = padded_size(a);
    bool softmax = a->reference_size != 0, plain = a->value_type == MSDA_FLOAT32 && d == a->d;
    int64_t points_bytes = type_bytes(a->points_type), weights_bytes = type_bytes(a->weights_type);
    float* row = (float*)((char*)k + sizeof(Block));  // copies of grad_output where it is not float32 or not padded
    for (int64_t q = q0; q < q1; q += step) {
        int64_t queries = q1 - q < step ? q1 - q : step;
        int64_t first = ((b * a->q + q) * a->m + h) * per_query, next = a->m * per_query;
        prefetch_writes((char*)a->grad_points + 2 * first * points_bytes, 2 * per_query * points_bytes,
                        2 * next * points_bytes, queries);
        prefetch_writes((char*)a->grad_weights + first * weights_bytes, per_query * weights_bytes, next * weights_bytes,
                        queries);
        load_block(k, a, b, h, q, queries, q + 2 * step <= q1);
        PACKED ? corners_packed(k, queries * per_query) : corners_direct(k, queries * per_query);
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
        scatter<W, NV>(k, a, rows, grads, chunks, queries, grad, stride);
        point_gradients(k, queries * per_query, queries, per_query, softmax);
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
    if (packed && chunks == 1) {
        Packed<W * NV> rows = packed_rows<W * NV>(k, a, packed), grads = packed_rows<W * NV>(k, a, grad_packed);
        backward_body<W, NV, true>(a, b, h, q0, q1, rows, grads, k, 1);
    } else if (packed) {
        Packed<0> rows = packed_rows<0>(k, a, packed), grads = packed_rows<0>(k, a, grad_packed);
        backward_body<W, NV, true>(a, b, h, q0, q1, rows, grads, k, chunks);
    } else {
        const float* grad = (const float*)a->grad_value + (b * a->s * a->m + h) * a->d;
        Direct<float> grads = direct_rows(k, grad, a->m * a->d, k->waste);
        backward_body<W, NV, false>(a, b, h, q0, q1, direct_value<float>(k, a, b, h), grads, k, chunks);
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
// The Block, then copies of grad_output, then the arrays.
Block* block_at(const MsdaArgs* a, void* memory, bool packed) {
    char* arrays = (char*)memory + sizeof(Block) + block_queries(a) * padded_size(a) * 4;
    block_init((Block*)memory, a, (void*)(((uintptr_t)arrays + 63) & ~(uintptr_t)63), packed);
    memset((char*)memory + sizeof(Block), 0, (size_t)(block_queries(a) * padded_size(a)) * 4);
    return (Block*)memory;
}

void forward(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, const float* packed, void* memory) {
    Shape shape = shape_of(a);
    Block* k = block_at(a, memory, packed != 0);
#define CALL(W, NV) forward_types<W, NV>(a, b, h, q0, q1, packed, k, shape.chunks)
    switch (shape.width * 8 + shape.vectors) { MSDA_WIDTHS(CALL) }
#undef CALL
}

void backward(const MsdaArgs* a, int64_t b, int64_t h, int64_t q0, int64_t q1, const float* packed, float* grad_packed,
              void* memory) {
    Shape shape = shape_of(a);
    Block* k = block_at(a, memory, packed != 0);
#define CALL(W, NV) backward_types<W, NV>(a, b, h, q0, q1, packed, grad_packed, k, shape.chunks)
    switch (shape.width * 8 + shape.vectors) { MSDA_WIDTHS(CALL) }
#undef CALL
}

int64_t row(const MsdaArgs* a) { return padded_size(a); }

int64_t direct(const MsdaArgs* a, int64_t is_backward) {
    return a->d % 4 == 0 && !(is_backward && a->value_type != MSDA_FLOAT32);
}

// The lines of all levels in order, those of the border included.
struct Line {
    int64_t level, y;     // y from -1 to the level's height
    int64_t row, start;  // packed row of the border cell before it; first cell of the level
};

Line line_at(const MsdaArgs* a, int64_t index) {
    Line line = {0, -1, 0, 0};
    for (; line.level < a->levels && index >= level_lines(a, line.level); line.level++) {
        index -= level_lines(a, line.level);
        line.row += level_rows(a, line.level);
        line.start += a->shapes[2 * line.level] * a->shapes[2 * line.level + 1];
    }
    if (line.level < a->levels) line.row += index * line_rows(a, line.level);
    line.y += index;
    return line;
}
void next_line(const MsdaArgs* a, Line* line) {
    int64_t h = a->shapes[2 * line->level], w = a->shapes[2 * line->level + 1];
    line->row += w + 1;
    if (++line->y <= h) return;
    line->row += 2;
    line->start += h * w;
    line->y = -1;
    line->level++;
}

template <class T>
INLINE void copy_row(float* to, const T* from, int64_t d, int64_t size) {
    int64_t i = 0;
    for (; i + MSDA_WIDTH <= d; i += MSDA_WIDTH) V::store(to + i, V::load(from + i));
    for (; i + 4 <= d; i += 4) V4::store(to + i, V4::load(from + i));
    for (; i < d; i++) to[i] = to_float(from[i]);
    for (; i < size; i++) to[i] = 0;
}

template <class T>
void pack_lines(const MsdaArgs* a, const T* value, int64_t first, int64_t end, float* packed) {
    int64_t d = a->d, size = padded_size(a), stride = a->value_stride_s;
    Line line = line_at(a, first);
    for (int64_t i = first; i < end; i++, next_line(a, &line)) {
        int64_t h = a->shapes[2 * line.level], w = a->shapes[2 * line.level + 1];
        float* to = packed + line.row * size;
        if (line.y < 0 || line.y == h) {
            memset(to, 0, (size_t)((w + 1 + (line.y == h ? 2 : 0)) * size) * 4);
            continue;
        }
        memset(to, 0, (size_t)size * 4);
        const T* from = value + (line.start + line.y * w) * stride;
        for (int64_t x = 0; x < w; x++, from += stride) {
            prefetch(from + 16 * stride, d * (int64_t)sizeof(T));  // rows lie far apart: the hardware does not follow
            copy_row(to + (x + 1) * size, from, d, size);
        }
    }
}

void pack(const MsdaArgs* a, int64_t b, int64_t h, int64_t first, int64_t end, float* packed) {
    if (a->value_type == MSDA_FLOAT32)
        pack_lines(a, value_of<float>(a, b, h), first, end, packed);
    else
        pack_lines(a, value_of<bfloat16>(a, b, h), first, end, packed);
}

template <class T>
void unpack_lines(const MsdaArgs* a, T* grad, int64_t first, int64_t end, const float* packed, int64_t copies,
                  int64_t copy_stride) {
    int64_t d = a->d, size = padded_size(a), stride = a->m * d;
    Line line = line_at(a, first);
    for (int64_t l = first; l < end; l++, next_line(a, &line)) {
        int64_t h = a->shapes[2 * line.level], w = a->shapes[2 * line.level + 1];
        if (line.y < 0 || line.y == h) continue;
        const float* from = packed + (line.row + 1) * size;
        T* to = grad + (line.start + line.y * w) * stride;
        for (int64_t x = 0; x < w; x++, from += size, to += stride) {
            prefetch_writes(to + 16 * stride, d * (int64_t)sizeof(T), 0, 1);
            int64_t i = 0;
            for (; i + MSDA_WIDTH <= d; i += MSDA_WIDTH) {
                V::F sum = V::load(from + i);
                for (int64_t copy = 1; copy < copies; copy++) sum += V::load(from + i + copy * copy_stride);
                V::store(to + i, sum);
            }
            for (; i < d; i++) {
                float sum = from[i];
                for (int64_t copy = 1; copy < copies; copy++) sum += from[i + copy * copy_stride];
                put(to + i, sum);
            }
        }
    }
}

void unpack(const MsdaArgs* a, int64_t b, int64_t h, int64_t first, int64_t end, const float* packed, int64_t copies,
            int64_t copy_stride) {
    int64_t at = (b * a->s * a->m + h) * a->d;
    if (a->value_type == MSDA_FLOAT32)
        unpack_lines(a, (float*)a->grad_value + at, first, end, packed, copies, copy_stride);
    else
        unpack_lines(a, (bfloat16*)a->grad_value + at, first, end, packed, copies, copy_stride);
}

}  // namespace

#define MSDA_TABLE2(isa) msda_kernels_##isa
#define MSDA_TABLE(isa) MSDA_TABLE2(isa)
#define MSDA_NAME2(isa) #isa
#define MSDA_NAME(isa) MSDA_NAME2(isa)
extern const MsdaKernels MSDA_TABLE(MSDA_ISA);
const MsdaKernels MSDA_TABLE(MSDA_ISA) = {MSDA_NAME(MSDA_ISA), row,  rows,   lines,   kernel_bytes,
                                          direct,              pack, unpack, forward, backward};
