// A custom operator that calls every function that ort_abi.h declares, and reports what it saw.
//
// `Check` has an input of any type, one that may be missing, and the attributes "integer", "real",
// "text", "element" (the name of an element type), "rounds" (how often to ask again) and "fail" (the
// code of an error to return, or 0). The report is 16 numbers; test_abi.py names them.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "ort_abi.h"

#if defined(_WIN32)
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif

namespace {

struct Kernel {
  const OrtApi* api;
  int64_t integer, rounds, fail;
  float real;
  char text[32], element[32];
  bool lacks_nothing;  // whether an attribute that is not there was found
};

const struct {
  const char* name;
  int type;
} kTypes[] = {
    {"float", kFloat},     {"uint8", kUint8},     {"int8", kInt8},     {"int32", kInt32},
    {"int64", kInt64},     {"float16", kFloat16}, {"double", kDouble}, {"bfloat16", kBfloat16},
};

OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** out) {
  Kernel* kernel = static_cast<Kernel*>(calloc(1, sizeof(Kernel)));
  kernel->api = api;
  OrtStatus* status = ort::KernelInfoGetAttribute_int64(api)(info, "integer", &kernel->integer);
  if (!status) status = ort::KernelInfoGetAttribute_int64(api)(info, "rounds", &kernel->rounds);
  if (!status) status = ort::KernelInfoGetAttribute_int64(api)(info, "fail", &kernel->fail);
  if (!status) status = ort::KernelInfoGetAttribute_float(api)(info, "real", &kernel->real);
  size_t size = sizeof kernel->text;
  if (!status) status = ort::KernelInfoGetAttribute_string(api)(info, "text", kernel->text, &size);
  size = sizeof kernel->element;
  if (!status) status = ort::KernelInfoGetAttribute_string(api)(info, "element", kernel->element, &size);
  if (status) {
    free(kernel);
    return status;
  }
  int64_t nothing = 0;
  OrtStatus* lacking = ort::KernelInfoGetAttribute_int64(api)(info, "nothing", &nothing);
  kernel->lacks_nothing = lacking == nullptr;
  if (lacking) ort::ReleaseStatus(api)(lacking);
  *out = kernel;
  return nullptr;
}

OrtStatus* compute(void* data, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(data);
  const OrtApi* api = kernel.api;
  if (kernel.fail) return ort::CreateStatus(api)(static_cast<int>(kernel.fail), "as it was asked to");
  size_t inputs = 0, rank = 0;
  const OrtValue *value = nullptr, *missing = nullptr;
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  OrtStatus* status = ort::KernelContext_GetInputCount(api)(context, &inputs);
  if (!status) status = ort::KernelContext_GetInput(api)(context, 0, &value);
  if (!status) status = ort::KernelContext_GetInput(api)(context, 1, &missing);
  int type = -1;
  int64_t dims[8] = {};
  // More than once, so that a shape that is not really released is seen as memory that grows.
  for (int64_t round = 0; round <= kernel.rounds && !status; round++) {
    status = ort::GetTensorTypeAndShape(api)(value, &shape);
    if (!status) status = ort::GetTensorElementType(api)(shape, &type);
    if (!status) status = ort::GetDimensionsCount(api)(shape, &rank);
    if (!status) status = ort::GetDimensions(api)(shape, dims, rank < 8 ? rank : 8);
    ort::ReleaseTensorTypeAndShapeInfo(api)(shape);
    if (!status) ort::ReleaseStatus(api)(ort::CreateStatus(api)(kFail, "a long text, so that it takes memory"));
  }
  void* memory = nullptr;
  if (!status) status = ort::GetTensorMutableData(api)(const_cast<OrtValue*>(value), &memory);
  std::atomic<int64_t> sum{0};
  auto add = [](void* at, size_t index) { *static_cast<std::atomic<int64_t>*>(at) += int64_t{1} << index; };
  if (!status) status = ort::KernelContext_ParallelFor(api)(context, add, 40, 0, &sum);
  const int64_t count = 16;
  OrtValue* output = nullptr;
  void* report = nullptr;
  if (!status) status = ort::KernelContext_GetOutput(api)(context, 0, &count, 1, &output);
  if (!status) status = ort::GetTensorMutableData(api)(output, &report);
  if (status) return status;
  bool known = false;
  for (const auto& each : kTypes) known |= !strcmp(each.name, kernel.element) && each.type == type;
  int64_t* at = static_cast<int64_t*>(report);
  memset(at, 0, count * sizeof *at);
  *at++ = static_cast<int64_t>(inputs);
  *at++ = missing != nullptr;
  *at++ = static_cast<int64_t>(rank);
  *at++ = dims[0];
  *at++ = dims[1];
  *at++ = known;
  *at++ = *static_cast<unsigned char*>(memory);
  *at++ = kernel.integer;
  *at++ = static_cast<int64_t>(kernel.real * 1000);
  *at++ = static_cast<int64_t>(strlen(kernel.text));
  *at++ = kernel.lacks_nothing;
  *at++ = sum;
  return nullptr;
}

OrtCustomOp make_operator() {
  OrtCustomOp op{};
  op.version = kOrtApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "Check"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) -> int { return index ? kFloat : kAnyType; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int { return index ? kOptional : kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return kInt64; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kRequired; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* data) { free(data); };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

const OrtApiBase* registered_by = nullptr;

}  // namespace

EXPORTED OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static const OrtCustomOp op = make_operator();
  registered_by = base;
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* status = ort::CreateCustomOpDomain(api)("abi_check", &domain)) return status;
  if (OrtStatus* status = ort::CustomOpDomain_Add(api)(domain, &op)) return status;
  return ort::AddCustomOpDomain(api)(options, domain);
}

// The version of the ONNX Runtime that has registered the library.
EXPORTED const char* version() { return registered_by->GetVersionString(); }
