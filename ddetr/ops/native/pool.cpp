// A small thread pool. Its own, not OpenMP's: PyTorch bundles differently named libgomps, and a waiting OpenMP team
// spins, which costs small calls ten times their work when cores are shared. Workers sleep; the caller works too and
// waits only for workers that took a task, so a worker that the system never woke delays nobody.
#include "msda.h"

#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
typedef SRWLOCK Mutex;
typedef CONDITION_VARIABLE Condition;
static void mutex_init(Mutex* m) { InitializeSRWLock(m); }
static void condition_init(Condition* c) { InitializeConditionVariable(c); }
static void lock(Mutex* m) { AcquireSRWLockExclusive(m); }
static void unlock(Mutex* m) { ReleaseSRWLockExclusive(m); }
static void wait(Condition* c, Mutex* m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }
static void wake_one(Condition* c) { WakeConditionVariable(c); }
static long process_id() { return (long)GetCurrentProcessId(); }
typedef DWORD ThreadResult;
#define THREAD_CALL WINAPI
static int thread_start(ThreadResult(THREAD_CALL* f)(void*), void* arg) {
    HANDLE handle = CreateThread(0, 0, f, arg, 0, 0);
    if (!handle) return 0;
    CloseHandle(handle);
    return 1;
}
#else
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
typedef pthread_mutex_t Mutex;
typedef pthread_cond_t Condition;
static void mutex_init(Mutex* m) { pthread_mutex_init(m, 0); }
static void condition_init(Condition* c) { pthread_cond_init(c, 0); }
static void lock(Mutex* m) { pthread_mutex_lock(m); }
static void unlock(Mutex* m) { pthread_mutex_unlock(m); }
static void wait(Condition* c, Mutex* m) { pthread_cond_wait(c, m); }
static void wake_one(Condition* c) { pthread_cond_signal(c); }
static long process_id() { return (long)getpid(); }
typedef void* ThreadResult;
#define THREAD_CALL
static int thread_start(ThreadResult (*f)(void*), void* arg) {
    pthread_t thread;
    sigset_t all, before;  // signals belong to the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&thread, 0, f, arg);
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (failed) return 0;
    pthread_detach(thread);
    return 1;
}
#endif

static const int kMaxThreads = 256;
static const size_t kKeepBytes = (size_t)64 << 20;  // a larger scratch is given back after the call

struct Pool {
    Mutex mutex;
    Condition wake, done;
    long pid;
    int busy, workers, seats, active;  // guarded by mutex; seats: workers that may still join the job
    TaskFunction function;
    void* context;
    int64_t tasks, next;  // next: atomic
    Scratch scratch[kMaxThreads];
};

void* scratch_get(Scratch* scratch, size_t bytes) {
    if (scratch->size < bytes) {
        free(scratch->data);
        scratch->size = bytes + bytes / 8;
        scratch->data = (char*)malloc(scratch->size + 64);
        if (!scratch->data) {
            scratch->size = 0;
            return 0;
        }
    }
    return (void*)(((uintptr_t)scratch->data + 63) & ~(uintptr_t)63);
}

static void scratch_trim(Scratch* scratch, size_t keep) {
    if (scratch->size <= keep) return;
    free(scratch->data);
    scratch->data = 0;
    scratch->size = 0;
}

static void work(Pool* pool, Scratch* scratch) {
    for (;;) {
        int64_t task = __atomic_fetch_add(&pool->next, 1, __ATOMIC_RELAXED);
        if (task >= pool->tasks) break;
        pool->function(pool->context, task, scratch);
    }
    scratch_trim(scratch, kKeepBytes);
}

struct Seat {
    Pool* pool;
    int index;
};

static ThreadResult THREAD_CALL worker(void* arg) {
    Seat seat = *(Seat*)arg;
    free(arg);
    Pool* pool = seat.pool;
    lock(&pool->mutex);
    for (;;) {
        while (pool->seats <= 0) wait(&pool->wake, &pool->mutex);
        pool->seats--;
        pool->active++;
        unlock(&pool->mutex);
        work(pool, &pool->scratch[seat.index]);
        lock(&pool->mutex);
        if (--pool->active == 0) wake_one(&pool->done);
    }
    return 0;
}

static Pool* current_pool;

// The pool of this process: after a fork the child has none of the parent's threads and starts its own pool (the old
// one, whose lock may be held for ever, is left alone).
static Pool* get_pool() {
    Pool* pool = __atomic_load_n(&current_pool, __ATOMIC_ACQUIRE);
    long pid = process_id();
    if (pool && pool->pid == pid) return pool;
    Pool* fresh = (Pool*)calloc(1, sizeof(Pool));
    if (!fresh) return 0;
    mutex_init(&fresh->mutex);
    condition_init(&fresh->wake);
    condition_init(&fresh->done);
    fresh->pid = pid;
    if (__atomic_compare_exchange_n(&current_pool, &pool, fresh, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return fresh;
    free(fresh);
    return pool;
}

static void run_here(int64_t tasks, TaskFunction function, void* context, Scratch* scratch) {
    for (int64_t task = 0; task < tasks; task++) function(context, task, scratch);
}

void pool_run(int64_t threads, int64_t tasks, TaskFunction function, void* context) {
    Pool* pool = get_pool();
    int mine = 0;
    if (pool) {
        lock(&pool->mutex);
        mine = !pool->busy;
        if (mine) pool->busy = 1;
        unlock(&pool->mutex);
    }
    if (!mine) {  // another thread of the program is using the pool: work alone rather than wait
        Scratch scratch = {0, 0};
        run_here(tasks, function, context, &scratch);
        scratch_trim(&scratch, 0);
        return;
    }
    if (threads > tasks) threads = tasks;
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads <= 1) {
        run_here(tasks, function, context, &pool->scratch[0]);
        scratch_trim(&pool->scratch[0], kKeepBytes);
    } else {
        int helpers = (int)threads - 1;
        lock(&pool->mutex);
        while (pool->workers < helpers) {
            Seat* seat = (Seat*)malloc(sizeof(Seat));
            if (!seat) break;
            seat->pool = pool;
            seat->index = pool->workers + 1;
            if (!thread_start(worker, seat)) {
                free(seat);
                break;
            }
            pool->workers++;
        }
        pool->function = function;
        pool->context = context;
        pool->tasks = tasks;
        pool->next = 0;
        pool->seats = helpers;
        for (int i = 0; i < helpers; i++) wake_one(&pool->wake);
        unlock(&pool->mutex);
        work(pool, &pool->scratch[0]);
        lock(&pool->mutex);
        pool->seats = 0;
        while (pool->active > 0) wait(&pool->done, &pool->mutex);
        unlock(&pool->mutex);
    }
    lock(&pool->mutex);
    pool->busy = 0;
    unlock(&pool->mutex);
}
