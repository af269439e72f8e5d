/*
 * A stand-in for the CUDA runtime, good for looking at what a library does with a GPU where there
 * is none. Device memory is host memory, copies copy, and kernels do nothing at all. What happens
 * is a line in the file that CUDA_STAND_IN_LOG names: of a copy its kind and its number of bytes,
 * "kernel", "replay" of a graph, and while one is captured the same after "captured".
 *
 * Whatever CUDA forbids while a stream is captured, from any thread, fails as it does there, and
 * the capture with it.
 *
 * What is not here is made by cuda_stand_in.py: functions that do nothing and report success.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put(void *at, size_t offset, int value) { memcpy((char *)at + offset, &value, 4); }

static void put_size(void *at, size_t offset, size_t value) {
    memcpy((char *)at + offset, &value, sizeof value);
}

/* cudaDeviceProp of CUDA 13, by offset: an H100, as far as anybody asks. */
int cudaGetDeviceProperties(void *properties, int device) {
    memset(properties, 0, 1008);
    strcpy(properties, "stand-in");
    put_size(properties, 288, 80ul << 30); /* totalGlobalMem */
    put_size(properties, 296, 49152);      /* sharedMemPerBlock */
    put(properties, 304, 65536);           /* regsPerBlock */
    put(properties, 308, 32);              /* warpSize */
    put(properties, 320, 1024);            /* maxThreadsPerBlock */
    put(properties, 324, 1024);            /* maxThreadsDim */
    put(properties, 328, 1024);
    put(properties, 332, 64);
    put(properties, 336, 2147483647);      /* maxGridSize */
    put(properties, 340, 65535);
    put(properties, 344, 65535);
    put(properties, 360, 9);               /* major */
    put(properties, 364, 0);               /* minor */
    put(properties, 384, 132);             /* multiProcessorCount */
    put(properties, 604, 2048);            /* maxThreadsPerMultiProcessor */
    put_size(properties, 624, 233472);     /* sharedMemPerMultiprocessor */
    put(properties, 632, 65536);           /* regsPerMultiprocessor */
    put_size(properties, 672, 232448);     /* sharedMemPerBlockOptin */
    put(properties, 688, 32);              /* maxBlocksPerMultiProcessor */
    return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;   /* MaxThreadsPerBlock */
    case 8: *value = 49152; break;  /* MaxSharedMemoryPerBlock */
    case 10: *value = 32; break;    /* WarpSize */
    case 16: *value = 132; break;   /* MultiProcessorCount */
    case 39: *value = 2048; break;  /* MaxThreadsPerMultiProcessor */
    case 75: *value = 9; break;     /* ComputeCapabilityMajor */
    case 81: *value = 233472; break; /* MaxSharedMemoryPerMultiprocessor */
    case 97: *value = 232448; break; /* MaxSharedMemoryPerBlockOptin */
    default: *value = 0;
    }
    return 0;
}

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
/* Error 2: out of memory, or whatever a test wants. */
int cudaSetDevice(int device) {
    const char *error = getenv("CUDA_STAND_IN_ERROR");
    return error ? atoi(error) : 0;
}
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }

static void say(const char *format, ...) {
    const char *path = getenv("CUDA_STAND_IN_LOG");
    FILE *log = path ? fopen(path, "a") : NULL;
    if (!log) return;
    va_list values;
    va_start(values, format);
    vfprintf(log, format, values);
    va_end(values);
    fclose(log);
}

/* The stream that is captured, if one is, and whether something went wrong since. */
static void *captured;
static int spoilt;

enum { CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };

static int forbidden(const char *what) {
    if (!captured) return 0;
    say("forbidden %s\n", what);
    spoilt = 1;
    return CAPTURE_UNSUPPORTED;
}

int cudaStreamBeginCapture(void *stream, int mode) {
    captured = stream;
    spoilt = getenv("CUDA_STAND_IN_SPOIL") != NULL;
    return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
    captured = NULL;
    *graph = spoilt ? NULL : malloc(16);
    return spoilt ? CAPTURE_INVALIDATED : 0;
}
int cudaStreamIsCapturing(void *stream, int *status) {
    *status = captured && captured == stream;
    return 0;
}
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
    *executable = malloc(16);
    return 0;
}
int cudaGraphLaunch(void *executable, void *stream) {
    if (forbidden("replay")) return CAPTURE_UNSUPPORTED;
    say("replay\n");
    return 0;
}
int cudaStreamSynchronize(void *stream) { return forbidden("cudaStreamSynchronize"); }
int cudaDeviceSynchronize() { return forbidden("cudaDeviceSynchronize"); }
int cudaEventSynchronize(void *event) { return forbidden("cudaEventSynchronize"); }

static int launch() {
    say(captured ? "captured kernel\n" : "kernel\n");
    return 0;
}
int cudaLaunchKernel() { return launch(); }
int __cudaLaunchKernel() { return launch(); }
int cudaLaunchCooperativeKernel() { return launch(); }
int cudaLaunchKernelExC() { return launch(); }
int cudaLaunchHostFunc() { return launch(); }

int cudaMalloc(void **pointer, size_t size) {
    if (forbidden("cudaMalloc")) return CAPTURE_UNSUPPORTED;
    size = (size + 511) & ~255ul;
    *pointer = aligned_alloc(256, size);
    if (!*pointer) return 2;
    memset(*pointer, 0, size);
    return 0;
}
int cudaMallocHost(void **pointer, size_t size) { return cudaMalloc(pointer, size); }
int cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return cudaMalloc(pointer, size); }
int cudaMallocFromPoolAsync(void **pointer, size_t size, void *pool, void *stream) {
    return cudaMalloc(pointer, size);
}
int cudaFree(void *pointer) {
    if (forbidden("cudaFree")) return CAPTURE_UNSUPPORTED;
    free(pointer);
    return 0;
}
int cudaFreeHost(void *pointer) { free(pointer); return 0; }
int cudaFreeAsync(void *pointer, void *stream) { free(pointer); return 0; }
int cudaMemGetInfo(size_t *available, size_t *total) {
    *available = 70ul << 30;
    *total = 80ul << 30;
    return 0;
}
int cudaMemset(void *pointer, int value, size_t size) { memset(pointer, value, size); return 0; }
int cudaMemsetAsync(void *pointer, int value, size_t size, void *stream) {
    memset(pointer, value, size);
    return 0;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    static const char *kinds[] = {"HtoH", "HtoD", "DtoH", "DtoD", "any"};
    if (captured) return say("captured %s %zu\n", kinds[kind], size), 0;
    say("%s %zu\n", kinds[kind], size);
    memmove(to, from, size);
    return 0;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    if (forbidden("cudaMemcpy")) return CAPTURE_UNSUPPORTED;
    return cudaMemcpyAsync(to, from, size, kind, NULL);
}

/* Handles must not be null. */
static int handle(void **made) { *made = malloc(16); return 0; }
int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaMemPoolCreate(void **pool, void *properties) { return handle(pool); }
void **__cudaRegisterFatBinary(void *binary) { static void *made[4]; return made; }

const char *cudaGetErrorString(int error) { return "an error of the stand-in"; }
const char *cudaGetErrorName(int error) { return "an error of the stand-in"; }

int cudaPointerGetAttributes(void *attributes, const void *pointer) {
    memset(attributes, 0, 88);
    put(attributes, 0, 2); /* cudaMemoryTypeDevice */
    put_size(attributes, 8, (size_t)pointer);
    put_size(attributes, 16, (size_t)pointer);
    return 0;
}
int cudaFuncGetAttributes(void *attributes, const void *function) {
    memset(attributes, 0, 144);
    put(attributes, 24, 1024); /* maxThreadsPerBlock */
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *function, int block, size_t memory, unsigned flags) {
    *count = 2;
    return 0;
}

/* The driver. */
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
