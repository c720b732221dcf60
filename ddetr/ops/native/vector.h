// Vectors of W floats by the GCC/Clang vector extension, at the width that the instruction set has: wider ones spill.
#pragma once
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define INLINE_METHOD inline __attribute__((always_inline))

template <int W>
struct Vec;
#define MSDA_VEC(W)                                                  \
    template <>                                                      \
    struct Vec<W> {                                                  \
        typedef float F __attribute__((vector_size(W * 4)));         \
        typedef int32_t I __attribute__((vector_size(W * 4)));       \
        typedef uint32_t U __attribute__((vector_size(W * 4)));      \
        typedef uint16_t H __attribute__((vector_size(W * 2)));      \
    };
MSDA_VEC(4)
#if MSDA_WIDTH >= 8
MSDA_VEC(8)
#endif
#if MSDA_WIDTH >= 16
MSDA_VEC(16)
#endif
#undef MSDA_VEC

struct bfloat16 {
    uint16_t bits;
};

template <int W>
struct Ops {
    typedef typename Vec<W>::F F;
    typedef typename Vec<W>::I I;
    typedef typename Vec<W>::U U;
    typedef typename Vec<W>::H H;

    INLINE F splat(float x) { return x - F{}; }
    INLINE F splat_pair(const float* p) {  // x, y, x, y, ...
        double pair;
        memcpy(&pair, p, 8);
        typedef double D __attribute__((vector_size(W * 4)));
        D both = pair - D{};
        return (F)both;
    }
    INLINE I splat_int(int32_t x) { return x - I{}; }
    INLINE F load(const float* p) {
        F v;
        memcpy(&v, p, sizeof(v));
        return v;
    }
    INLINE F load(const bfloat16* p) {
        H h;
        memcpy(&h, p, sizeof(h));
        U u = __builtin_convertvector(h, U) << 16;
        F v;
        memcpy(&v, &u, sizeof(v));
        return v;
    }
    INLINE void store(float* p, F v) { memcpy(p, &v, sizeof(v)); }
    INLINE void store(bfloat16* p, F v) {  // round to nearest even; NaN stays NaN
        U u;
        memcpy(&u, &v, sizeof(u));
        U rounded = (u + (((u >> 16) & 1) + 0x7fff)) >> 16;
        U nan = (u >> 16) | 0x40;
        I is_nan = (v != v);
        H h = __builtin_convertvector((rounded & ~(U)is_nan) | (nan & (U)is_nan), H);
        memcpy(p, &h, sizeof(h));
    }
    INLINE I load_int(const int32_t* p) {
        I v;
        memcpy(&v, p, sizeof(v));
        return v;
    }
    INLINE void store_int(int32_t* p, I v) { memcpy(p, &v, sizeof(v)); }
    INLINE F select(I mask, F yes, F no) { return (F)(((I)yes & mask) | ((I)no & ~mask)); }
    INLINE I select_int(I mask, I yes, I no) { return (yes & mask) | (no & ~mask); }
    INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
    INLINE I to_int(F v) { return __builtin_convertvector(v, I); }  // towards zero

    // exp(x) for x <= 0 to 2 ulp; below -87.3 it is 0. NaN stays.
    INLINE F exp_nonpositive(F x) {
        const F low = splat(-87.3f);
        I tiny = (x < low);
        F y = select(tiny, low, x);
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
        F t = y * 1.44269504f + magic;
        F k = t - magic;
        F r = y - k * 0.693359375f;
        r = r + k * 2.12194440e-4f;
        F p = splat(1.9875691500e-4f);
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        I exponent = ((I)t - 0x4B400000) + 127;
        F scale = (F)(exponent << 23);
        return (F)((I)(p * scale) & ~tiny);
    }
};

#if defined(__clang__) || __GNUC__ >= 12
#define MSDA_SHUFFLE(W, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MSDA_SHUFFLE(W, a, b, ...) __builtin_shuffle(a, b, Vec<W>::I{__VA_ARGS__})
#endif

// deinterleave: pairs of x and y -> all x, all y; interleave: back. add_neighbours, four lanes at a time: a0+a1 a2+a3
// b0+b1 b2+b3. max_of_all, sum_of_all: in every lane.
INLINE void deinterleave(Vec<4>::F a, Vec<4>::F b, Vec<4>::F* x, Vec<4>::F* y) {
    *x = MSDA_SHUFFLE(4, a, b, 0, 2, 4, 6);
    *y = MSDA_SHUFFLE(4, a, b, 1, 3, 5, 7);
}
INLINE void interleave(Vec<4>::F x, Vec<4>::F y, Vec<4>::F* low, Vec<4>::F* high) {
    *low = MSDA_SHUFFLE(4, x, y, 0, 4, 1, 5);
    *high = MSDA_SHUFFLE(4, x, y, 2, 6, 3, 7);
}
INLINE Vec<4>::F add_neighbours(Vec<4>::F a, Vec<4>::F b) {
    return MSDA_SHUFFLE(4, a, b, 0, 2, 4, 6) +
           MSDA_SHUFFLE(4, a, b, 1, 3, 5, 7);
}
INLINE Vec<4>::F max_of_all(Vec<4>::F v) {
    Vec<4>::F o;
    o = MSDA_SHUFFLE(4, v, v, 2, 3, 0, 1);
    v = Ops<4>::select(v > o, v, o);
    o = MSDA_SHUFFLE(4, v, v, 1, 0, 3, 2);
    v = Ops<4>::select(v > o, v, o);
    return v;
}
INLINE Vec<4>::F sum_of_all(Vec<4>::F v) {
    Vec<4>::F o;
    o = MSDA_SHUFFLE(4, v, v, 2, 3, 0, 1);
    v = v + o;
    o = MSDA_SHUFFLE(4, v, v, 1, 0, 3, 2);
    v = v + o;
    return v;
}
#if MSDA_WIDTH >= 8
INLINE void deinterleave(Vec<8>::F a, Vec<8>::F b, Vec<8>::F* x, Vec<8>::F* y) {
    *x = MSDA_SHUFFLE(8, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    *y = MSDA_SHUFFLE(8, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
INLINE void interleave(Vec<8>::F x, Vec<8>::F y, Vec<8>::F* low, Vec<8>::F* high) {
    *low = MSDA_SHUFFLE(8, x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    *high = MSDA_SHUFFLE(8, x, y, 4, 12, 5, 13, 6, 14, 7, 15);
}
INLINE Vec<8>::F add_neighbours(Vec<8>::F a, Vec<8>::F b) {
    return MSDA_SHUFFLE(8, a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           MSDA_SHUFFLE(8, a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
INLINE Vec<8>::F max_of_all(Vec<8>::F v) {
    Vec<8>::F o;
    o = MSDA_SHUFFLE(8, v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v = Ops<8>::select(v > o, v, o);
    o = MSDA_SHUFFLE(8, v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    v = Ops<8>::select(v > o, v, o);
    o = MSDA_SHUFFLE(8, v, v, 1, 0, 3, 2, 5, 4, 7, 6);
    v = Ops<8>::select(v > o, v, o);
    return v;
}
INLINE Vec<8>::F sum_of_all(Vec<8>::F v) {
    Vec<8>::F o;
    o = MSDA_SHUFFLE(8, v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v = v + o;
    o = MSDA_SHUFFLE(8, v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    v = v + o;
    o = MSDA_SHUFFLE(8, v, v, 1, 0, 3, 2, 5, 4, 7, 6);
    v = v + o;
    return v;
}
#endif
#if MSDA_WIDTH >= 16
INLINE void deinterleave(Vec<16>::F a, Vec<16>::F b, Vec<16>::F* x, Vec<16>::F* y) {
    *x = MSDA_SHUFFLE(16, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *y = MSDA_SHUFFLE(16, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
INLINE void interleave(Vec<16>::F x, Vec<16>::F y, Vec<16>::F* low, Vec<16>::F* high) {
    *low = MSDA_SHUFFLE(16, x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *high = MSDA_SHUFFLE(16, x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
INLINE Vec<16>::F add_neighbours(Vec<16>::F a, Vec<16>::F b) {
    return MSDA_SHUFFLE(16, a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           MSDA_SHUFFLE(16, a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
INLINE Vec<16>::F max_of_all(Vec<16>::F v) {
    Vec<16>::F o;
    o = MSDA_SHUFFLE(16, v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v = Ops<16>::select(v > o, v, o);
    o = MSDA_SHUFFLE(16, v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v = Ops<16>::select(v > o, v, o);
    o = MSDA_SHUFFLE(16, v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v = Ops<16>::select(v > o, v, o);
    o = MSDA_SHUFFLE(16, v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    v = Ops<16>::select(v > o, v, o);
    return v;
}
INLINE Vec<16>::F sum_of_all(Vec<16>::F v) {
    Vec<16>::F o;
    o = MSDA_SHUFFLE(16, v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v = v + o;
    o = MSDA_SHUFFLE(16, v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v = v + o;
    o = MSDA_SHUFFLE(16, v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v = v + o;
    o = MSDA_SHUFFLE(16, v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    v = v + o;
    return v;
}
#endif

// Four vectors -> 16 floats: four partial sums of each.
INLINE void partial_sums(float* out, const Vec<4>::F v[4]) {
    for (int c = 0; c < 4; c++) Ops<4>::store(out + 4 * c, v[c]);
}
#if MSDA_WIDTH >= 8
INLINE void partial_sums(float* out, const Vec<8>::F v[4]) {
    for (int c = 0; c < 4; c += 2) {
        Vec<8>::F low = MSDA_SHUFFLE(8, v[c], v[c + 1], 0, 1, 2, 3, 8, 9, 10, 11);
        Vec<8>::F high = MSDA_SHUFFLE(8, v[c], v[c + 1], 4, 5, 6, 7, 12, 13, 14, 15);
        Ops<8>::store(out + 4 * c, low + high);
    }
}
#endif
#if MSDA_WIDTH >= 16
INLINE void partial_sums(float* out, const Vec<16>::F v[4]) {
    typedef Vec<16>::F F;
    F half[2];
    for (int c = 0; c < 4; c += 2) {
        F low = MSDA_SHUFFLE(16, v[c], v[c + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        F high = MSDA_SHUFFLE(16, v[c], v[c + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        half[c / 2] = low + high;  // 8 of v[c], 8 of v[c + 1]
    }
    F low = MSDA_SHUFFLE(16, half[0], half[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    F high = MSDA_SHUFFLE(16, half[0], half[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    Ops<16>::store(out, low + high);
}
#endif

// Four points' partial sums (16 floats each: 4 of every corner) -> of each corner the four points' sums.
template <int W>
INLINE void whole_sums(float* const to[4], const float* partial) {
    typedef Ops<W> O;
    typedef typename O::F F;
    for (int half = 0; half < 16; half += W) {
        F a = O::load(partial + half), b = O::load(partial + 16 + half);
        F c = O::load(partial + 32 + half), d = O::load(partial + 48 + half);
        F sums = add_neighbours(add_neighbours(a, b), add_neighbours(c, d));
        for (int lane = 0; lane < W; lane += 4) {
            Vec<4>::F four;
            memcpy(&four, (const char*)&sums + lane * 4, 16);
            Ops<4>::store(to[(half + lane) / 4], four);
        }
    }
}
