/* NVIDIA's two driver libraries, pretended: compiled by a test as libcuda.so.1 and as libnvidia-ml.so.1, with what they
   answer as macros. */
#include <stdlib.h>
#include <string.h>

#ifndef DRIVER_VERSION
#define DRIVER_VERSION "550.54.15"
#endif
#ifndef CUDA_VERSION
#define CUDA_VERSION 12040
#endif
#ifndef CU_INIT
#define CU_INIT 0
#endif
#ifndef NVML_INIT
#define NVML_INIT 0
#endif
#ifndef GPUS
#define GPUS 1
#endif
#ifndef MAJOR
#define MAJOR 8
#endif
#ifndef MINOR
#define MINOR 0
#endif

int cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return 0;
}
int cuInit(unsigned flags) {
#ifdef CRASH
  abort();
#endif
  return flags ? 1 : CU_INIT;
}

struct memory {
  unsigned long long total, free, used;
};
int nvmlInit_v2(void) { return NVML_INIT; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 18 ? "Driver/library version mismatch" : "an error"; }
static int say(const char *text, char *out, unsigned length) {
  if (strlen(text) >= length) return 7;
  strcpy(out, text);
  return 0;
}
int nvmlSystemGetDriverVersion(char *out, unsigned length) { return say(DRIVER_VERSION, out, length); }
int nvmlDeviceGetCount_v2(unsigned *count) {
  *count = GPUS;
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  *device = (void *)(unsigned long)(index + 1);
  return index < GPUS ? 0 : 2;
}
int nvmlDeviceGetName(void *device, char *out, unsigned length) {
  return device ? say("NVIDIA Pretender 9000", out, length) : 2;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  *major = MAJOR;
  *minor = MINOR;
  return device ? 0 : 2;
}
int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
  memory->total = 24ULL << 30;
  memory->free = 20ULL << 30;
  memory->used = 4ULL << 30;
  return device ? 0 : 2;
}
