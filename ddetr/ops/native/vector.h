// Vectors of W floats by the GCC/Clang vector extension, at the width that the instruction set has: wider ones spill.
#pragma once
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

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

// [a0..a3] [b0..b3] [c0..c3] [d0..d3] -> [sum a, sum b, sum c, sum d]
INLINE Vec<4>::F sum_of_each(Vec<4>::F a, Vec<4>::F b, Vec<4>::F c, Vec<4>::F d) {
    typedef Vec<4>::F F;
    F ab = MSDA_SHUFFLE(4, a, b, 0, 1, 4, 5) + MSDA_SHUFFLE(4, a, b, 2, 3, 6, 7);
    F cd = MSDA_SHUFFLE(4, c, d, 0, 1, 4, 5) + MSDA_SHUFFLE(4, c, d, 2, 3, 6, 7);
    return MSDA_SHUFFLE(4, ab, cd, 0, 2, 4, 6) + MSDA_SHUFFLE(4, ab, cd, 1, 3, 5, 7);
}
