// The C interface: which kernels this processor runs, and how a call is cut into tasks.
//
// A task owns the gradient of the values that it adds to (one head of one image, or one of several copies that are
// summed in order), so there are no atomics and two runs give the same bits.
#include "msda.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#ifndef MSDA_SOURCE
#define MSDA_SOURCE ""
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
extern const MsdaKernels msda_kernels_sse4, msda_kernels_avx2, msda_kernels_avx512;

// Own cpuid: __builtin_cpu_supports answered "no" for AVX2 in libraries cross-compiled by zig.
static const MsdaKernels* detect(int limit) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    if (!(ecx & (1u << 19))) return 0;  // SSE4.1
    const MsdaKernels* best = &msda_kernels_sse4;
    if (!(ecx & (1u << 27)) || !(ecx & (1u << 28)) || !(ecx & (1u << 12))) return best;  // OSXSAVE, AVX, FMA
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    unsigned leaf7 = 0, c7, d7;
    if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &eax, &leaf7, &c7, &d7)) return best;
    if (!(leaf7 & (1u << 5)) || limit < 2) return best;  // AVX2
    best = &msda_kernels_avx2;
    unsigned need = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // AVX-512 F, DQ, BW, VL
    if ((low & 0xe6) != 0xe6 || (leaf7 & need) != need || limit < 3) return best;
    return &msda_kernels_avx512;
}
#else
extern const MsdaKernels msda_kernels_generic;
static const MsdaKernels* detect(int) { return &msda_kernels_generic; }
#endif

static const MsdaKernels* chosen;

static const MsdaKernels* kernels() {
    const MsdaKernels* known = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
    if (known) return known;
    const char* name = getenv("DDETR_OPS_ISA");  // sse4, avx2: to test the other kernels on this processor
    int limit = name && !strcmp(name, "sse4") ? 1 : name && !strcmp(name, "avx2") ? 2 : 3;
    known = detect(limit);
    __atomic_store_n(&chosen, known, __ATOMIC_RELEASE);
    return known;
}

EXPORT const char* msda_source() { return MSDA_SOURCE; }
EXPORT int64_t msda_args_bytes() { return (int64_t)sizeof(MsdaArgs); }
EXPORT const char* msda_isa() { return kernels() ? kernels()->name : "none: SSE4.1 needed"; }

enum { kOk = 0, kNoMemory = 1, kNoProcessor = 2 };

struct Job {
    const MsdaArgs* a;
    const MsdaKernels* k;
    int64_t splits;  // parts of the queries of one head
    float *packed, *grad_packed;  // shared by the tasks where heads are split, else null
    int64_t packed_floats;        // of one head
    int failed;
};

static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
static int64_t cut(int64_t total, int64_t parts, int64_t part) {  // start of a part, without overflow
    return total / parts * part + least(part, total % parts);
}

// The first query of a part. Parts begin where blocks do, so that a block has the same queries, and with them the same
// bits, for any number of parts: compilers may round the last, odd queries of a block unlike the others.
static int64_t cut_queries(const MsdaArgs* a, int64_t parts, int64_t part) {
    int64_t step = block_queries(a), blocks = (a->q + step - 1) / step;
    return least(a->q, cut(blocks, parts, part) * step);
}

// Threads worth waking: a wake-up costs about 10 us, which is some 20k vector operations.
static int64_t worth(const MsdaArgs* a, int64_t threads, bool backward) {
    double work = (double)a->n * a->q * a->m * a->levels * a->points * (4.0 + a->d / 4.0) * (backward ? 3 : 1);
    if (backward) work += (double)a->n * a->s * a->m * a->d / 16.0;
    int64_t most = (int64_t)(work / 60000.0) + 1;
    return threads < 1 ? 1 : least(threads, most);
}

// Packing a head reads and writes it once; it pays where the corners to read are several times as many as the cells.
static bool packs(const MsdaArgs* a, const MsdaKernels* k, bool backward) {
    if (!k->direct(a, backward)) return true;
    return (double)a->q * a->levels * a->points * 4 >= (double)a->s * (backward ? 6 : 8);
}

// The number of parts of a head that ends first when `threads` work on all parts; each part of several has extra cost.
static int64_t splits_of(int64_t heads, int64_t threads, int64_t q, double extra) {
    int64_t best = 1;
    double least_time = 1e300;
    for (int64_t parts = 1; parts <= 64 && (parts == 1 || q / parts >= 32); parts++) {
        double rounds = (double)((heads * parts + threads - 1) / threads);
        double time = rounds * (1.0 / parts + (parts > 1 ? 0.02 : 0)) + (parts > 1 ? extra * (double)heads * parts / threads : 0);
        if (time < least_time * 0.97) least_time = time, best = parts;
    }
    return best;
}

static const size_t kApart = 1088;  // floats: two large arrays must not meet in the same 4 KiB offset

// ---- whole heads: a task packs, works, and unpacks in the scratch of its thread ------------------------------------

static void whole_head(void* context, int64_t task, Scratch* scratch) {
    Job* job = (Job*)context;
    const MsdaArgs* a = job->a;
    size_t floats = (size_t)job->packed_floats, block = (job->k->block_bytes(a) + 63) & ~(size_t)63;
    char* memory = (char*)scratch_get(scratch, block + (2 * floats + kApart) * 4);
    if (!memory) {
        job->failed = 1;
        return;
    }
    int64_t b = task / a->m, h = task % a->m;
    float* packed = (float*)(memory + block);
    int64_t lines = job->k->lines(a);
    job->k->pack(a, b, h, 0, lines, packed);
    if (!a->grad_output) {
        job->k->forward(a, b, h, 0, a->q, packed, memory);
        return;
    }
    float* grad = packed + floats + kApart;
    memset(grad, 0, floats * 4);
    job->k->backward(a, b, h, 0, a->q, packed, grad, memory);
    job->k->unpack(a, b, h, 0, lines, grad, 1, 0);
}

// ---- split heads: pack all, barrier, work in parts, barrier, sum the parts' gradients in order ---------------------

static void pack_part(void* context, int64_t task, Scratch*) {
    Job* job = (Job*)context;
    const MsdaArgs* a = job->a;
    int64_t head = task / job->splits, part = task % job->splits, lines = job->k->lines(a);
    float* packed = job->packed + head * job->packed_floats;
    job->k->pack(a, head / a->m, head % a->m, cut(lines, job->splits, part), cut(lines, job->splits, part + 1), packed);
    if (job->grad_packed) memset(job->grad_packed + task * job->packed_floats, 0, (size_t)job->packed_floats * 4);
}

static void work_part(void* context, int64_t task, Scratch* scratch) {
    Job* job = (Job*)context;
    const MsdaArgs* a = job->a;
    void* memory = scratch_get(scratch, job->k->block_bytes(a));
    if (!memory) {
        job->failed = 1;
        return;
    }
    int64_t head = task / job->splits, part = task % job->splits;
    int64_t q0 = cut_queries(a, job->splits, part), q1 = cut_queries(a, job->splits, part + 1);
    const float* packed = job->packed ? job->packed + head * job->packed_floats : 0;
    if (a->grad_output)
        job->k->backward(a, head / a->m, head % a->m, q0, q1, packed,
                         job->grad_packed ? job->grad_packed + task * job->packed_floats : 0, memory);
    else
        job->k->forward(a, head / a->m, head % a->m, q0, q1, packed, memory);
}

static void unpack_part(void* context, int64_t task, Scratch*) {
    Job* job = (Job*)context;
    const MsdaArgs* a = job->a;
    int64_t head = task / job->splits, part = task % job->splits, lines = job->k->lines(a);
    job->k->unpack(a, head / a->m, head % a->m, cut(lines, job->splits, part), cut(lines, job->splits, part + 1),
                   job->grad_packed + head * job->splits * job->packed_floats, job->splits, job->packed_floats);
}

static void clear_part(void* context, int64_t task, Scratch*) {
    Job* job = (Job*)context;
    const MsdaArgs* a = job->a;
    int64_t total = a->n * a->s * a->m * a->d, parts = job->splits;
    int64_t start = cut(total, parts, task), end = cut(total, parts, task + 1);
    memset((float*)a->grad_value + start, 0, (size_t)(end - start) * 4);
}

// Large results are fresh memory, which costs about 1 ms/MB to touch in pages of 4 KiB (in virtual machines; more than
// the arithmetic) and little in pages of 2 MiB. A hint: where the system has no such pages, nothing changes.
static void use_large_pages(void* data, int64_t count, int64_t type) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)2 << 20;
    uintptr_t start = ((uintptr_t)data + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)data + (uintptr_t)(count * (type == MSDA_FLOAT32 ? 4 : 2))) & ~(page - 1);
    if (data && end > start + page) madvise((void*)start, end - start, MADV_HUGEPAGE);
#endif
}

static int run(const MsdaArgs* a, bool backward) {
    const MsdaKernels* k = kernels();
    if (!k) return kNoProcessor;
    int64_t logits = a->n * a->q * a->m * a->levels * a->points;
    if (backward) {
        use_large_pages(a->grad_value, a->n * a->s * a->m * a->d, a->value_type);
        use_large_pages(a->grad_points, logits * 2, a->points_type);
        use_large_pages(a->grad_weights, logits, a->weights_type);
    } else {
        use_large_pages(a->output, a->n * a->q * a->m * a->d, a->value_type);
    }
    int64_t heads = a->n * a->m, threads = worth(a, a->threads, backward);
    if (heads == 0 || a->d == 0) return kOk;
    Job job = {a, k, 1, 0, 0, k->rows(a) * k->row(a), 0};
    if (!packs(a, k, backward)) {
        if (backward) {
            job.splits = threads * 4;
            pool_run(threads, job.splits, clear_part, &job);
            job.splits = 1;  // a head's gradient has one owner
        } else {
            job.splits = splits_of(heads, threads, a->q, 0.0);
        }
        pool_run(threads, heads * job.splits, work_part, &job);
        return job.failed ? kNoMemory : kOk;
    }
    double corners = (double)a->q * a->levels * a->points * 4 + 1, copies = (double)a->s / corners * (backward ? 2.0 : 0.5);
    job.splits = splits_of(heads, threads, a->q, copies);
    if (job.splits == 1) {
        pool_run(threads, heads, whole_head, &job);
        return job.failed ? kNoMemory : kOk;
    }
    size_t floats = (size_t)(heads * job.packed_floats) * (size_t)(backward ? job.splits + 1 : 1);
    job.packed = (float*)malloc((floats + kApart) * 4);
    if (!job.packed) return kNoMemory;
    if (backward) job.grad_packed = job.packed + heads * job.packed_floats + kApart;
    pool_run(threads, heads * job.splits, pack_part, &job);
    pool_run(threads, heads * job.splits, work_part, &job);
    if (backward && !job.failed) pool_run(threads, heads * job.splits, unpack_part, &job);
    free(job.packed);
    return job.failed ? kNoMemory : kOk;
}

EXPORT int64_t msda_forward(const MsdaArgs* a) { return run(a, false); }
EXPORT int64_t msda_backward(const MsdaArgs* a) { return run(a, true); }
