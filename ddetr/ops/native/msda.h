// Multi-scale deformable attention on the CPU: what the C interface (msda.cpp), the kernels (kernel.cpp, built once per
// instruction set) and the thread pool (pool.cpp) share. No C++ runtime is used (no exceptions, RTTI, new, std::), so
// that one file per platform fits every Python, PyTorch and libstdc++.
//
// Shapes: N batch, S cells of all levels, M heads, D head size, Q queries, L levels, P points.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum MsdaType { MSDA_FLOAT32 = 0, MSDA_BFLOAT16 = 1 };

// Every field is 8 bytes; library.py mirrors the order. Strides count elements.
struct MsdaArgs {
    int64_t n, s, m, d, q, levels, points;
    int64_t reference_size;  // 0: `points` are locations and `weights` weights; 2 or 4: offsets and logits of a step
    int64_t value_type;      // of value, output, grad_output, grad_value
    int64_t points_type, weights_type;
    int64_t threads;
    int64_t value_stride_n, value_stride_s;      // (N, S, M, D), last two contiguous
    int64_t points_stride_n, points_stride_q;    // (N, Q, M, L, P, 2), last four contiguous
    int64_t weights_stride_n, weights_stride_q;  // (N, Q, M, L, P), last three contiguous
    const int64_t* shapes;                       // (L, 2) as h, w
    const void* value;
    const void* point_data;
    const void* weight_data;
    const float* reference;      // (N, Q, L, 2 or 4)
    void* output;                // (N, Q, M, D)
    const void* grad_output;     // (N, Q, M, D)
    void* grad_value;            // (N, S, M, D)
    void* grad_points;           // (N, Q, M, L, P, 2)
    void* grad_weights;          // (N, Q, M, L, P)
    float* grad_reference;       // (N, Q, M, L, 2 or 4), to be summed over M by the caller; may be null
};

// Growing memory of one thread, kept between calls: fresh pages cost about 1 ms/MB.
struct Scratch {
    char* data;
    size_t size;
};
void* scratch_get(Scratch* scratch, size_t bytes);  // 64-byte aligned, null if there is no memory

typedef void (*TaskFunction)(void* context, int64_t task, Scratch* scratch);
void pool_run(int64_t threads, int64_t tasks, TaskFunction function, void* context);

// Queries that the kernels work on at a time.
static inline int64_t block_queries(const MsdaArgs* a) {
    const int64_t most_points = 128, most_queries = 8;
    int64_t points = a->levels * a->points, queries = points ? most_points / points : most_queries;
    return queries < 1 ? 1 : queries > most_queries ? most_queries : queries;
}

// One head of one image, with rows of `row` floats: D padded to whole vectors.
struct MsdaKernels {
    const char* name;
    int64_t (*row)(const MsdaArgs*);                // floats in a packed row
    int64_t (*rows)(const MsdaArgs*);               // packed rows of a head: its cells and their border
    int64_t (*lines)(const MsdaArgs*);              // of all levels and their borders: the unit of packing
    size_t (*block_bytes)(const MsdaArgs*);         // scratch of forward and backward
    int64_t (*direct)(const MsdaArgs*, int64_t backward);  // may it work without packing?
    void (*pack)(const MsdaArgs*, int64_t b, int64_t h, int64_t line, int64_t end, float* packed);
    // Sums `copies` gradients (each `copy_stride` floats) of packed lines and writes them to grad_value.
    void (*unpack)(const MsdaArgs*, int64_t b, int64_t h, int64_t line, int64_t end, const float* packed, int64_t copies,
                   int64_t copy_stride);
    // packed: null = read value itself. grad_packed likewise; what it gathers in the border counts for nothing.
    void (*forward)(const MsdaArgs*, int64_t b, int64_t h, int64_t q0, int64_t q1, const float* packed, void* block);
    void (*backward)(const MsdaArgs*, int64_t b, int64_t h, int64_t q0, int64_t q1, const float* packed,
                     float* grad_packed, void* block);
};
