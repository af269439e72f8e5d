// The part of ONNX Runtime's C interface that a library of custom operators needs.
//
// The table of functions only grows at its end, so a position never changes. `tests/native` holds
// this file against the installed ONNX Runtime. Knows positions and layouts; `operator.h` knows how
// they are used.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtCustomOp;

// The version of the table that is asked for. Any later ONNX Runtime serves it.
constexpr uint32_t kOrtApiVersion = 17;

// ONNXTensorElementDataType; kAnyType accepts every type.
enum ElementType : int {
  kAnyType = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
  kDouble = 11,
  kBfloat16 = 16,
};

// OrtCustomOpInputOutputCharacteristic.
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// OrtErrorCode.
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

struct OrtApi {
  void* functions[284];
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// A function of the table as a C++ function: its name, its position, its result, its arguments.
#define ORT_FUNCTION(name, position, result, ...)                                \
  inline result (*name(const OrtApi* api))(__VA_ARGS__) {                        \
    return reinterpret_cast<result (*)(__VA_ARGS__)>(api->functions[position]);  \
  }

namespace ort {
ORT_FUNCTION(CreateStatus, 0, OrtStatus*, int, const char*)
ORT_FUNCTION(CreateCustomOpDomain, 26, OrtStatus*, const char*, OrtCustomOpDomain**)
ORT_FUNCTION(CustomOpDomain_Add, 27, OrtStatus*, OrtCustomOpDomain*, const OrtCustomOp*)
ORT_FUNCTION(AddCustomOpDomain, 28, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*)
ORT_FUNCTION(GetTensorMutableData, 51, OrtStatus*, OrtValue*, void**)
ORT_FUNCTION(GetTensorElementType, 60, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int*)
ORT_FUNCTION(GetDimensionsCount, 61, OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t*)
ORT_FUNCTION(GetDimensions, 62, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)
ORT_FUNCTION(GetTensorTypeAndShape, 65, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo**)
ORT_FUNCTION(KernelInfoGetAttribute_float, 85, OrtStatus*, const OrtKernelInfo*, const char*, float*)
ORT_FUNCTION(KernelInfoGetAttribute_int64, 86, OrtStatus*, const OrtKernelInfo*, const char*, int64_t*)
ORT_FUNCTION(KernelInfoGetAttribute_string, 87, OrtStatus*, const OrtKernelInfo*, const char*, char*, size_t*)
ORT_FUNCTION(KernelContext_GetInputCount, 88, OrtStatus*, const OrtKernelContext*, size_t*)
ORT_FUNCTION(KernelContext_GetInput, 90, OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**)
ORT_FUNCTION(KernelContext_GetOutput, 91, OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)
ORT_FUNCTION(ReleaseStatus, 93, void, OrtStatus*)
ORT_FUNCTION(ReleaseTensorTypeAndShapeInfo, 99, void, OrtTensorTypeAndShapeInfo*)
ORT_FUNCTION(KernelContext_ParallelFor, 274, OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)
}  // namespace ort

#undef ORT_FUNCTION

// A custom operator. ONNX Runtime reads `version` first, and no further than that version goes.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};
