#include "context.h"

#include <cstring>

Tensor Context::optional(const char* name, size_t index, int type) {
  Tensor tensor;
  if (status_) return tensor;
  size_t count = 0;
  keep(ort::KernelContext_GetInputCount(api_)(context_, &count));
  const OrtValue* value = nullptr;
  if (index < count) keep(ort::KernelContext_GetInput(api_)(context_, index, &value));
  if (!value || status_) return tensor;
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  keep(ort::GetTensorTypeAndShape(api_)(value, &shape));
  if (!shape) return tensor;
  size_t rank = 0;
  keep(ort::GetTensorElementType(api_)(shape, &tensor.type));
  keep(ort::GetDimensionsCount(api_)(shape, &rank));
  if (rank > kMaxRank) fail("input %s has %zu axes", name, rank);
  else keep(ort::GetDimensions(api_)(shape, tensor.dims, rank));
  ort::ReleaseTensorTypeAndShapeInfo(api_)(shape);
  tensor.rank = static_cast<int>(rank);
  if (status_) return Tensor();
  if (type != kAnyType && tensor.type != type) {
    fail("input %s has the element type %d, not %d", name, tensor.type, type);
    return Tensor();
  }
  keep(ort::GetTensorMutableData(api_)(const_cast<OrtValue*>(value), &tensor.data));
  // An input without elements is there all the same.
  static char nothing;
  if (!tensor.data) tensor.data = &nothing;
  return tensor;
}

void Context::expect(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (status_) return;
  bool fits = tensor.rank == static_cast<int>(shape.size());
  const int64_t* have = tensor.dims;
  for (int64_t want : shape) {
    if (!fits) break;
    fits = want == kAny || *have == want;
    have++;
  }
  if (fits) return;
  char text[2][96] = {"", ""};
  auto write = [&](char* out, size_t size, const int64_t* dims, size_t count) {
    size_t at = 0;
    for (size_t i = 0; i < count && at + 24 < size; i++)
      at += snprintf(out + at, size - at, i ? ", %lld" : "%lld", static_cast<long long>(dims[i]));
  };
  write(text[0], sizeof text[0], tensor.dims, tensor.rank);
  write(text[1], sizeof text[1], shape.begin(), shape.size());
  fail("input %s has the shape [%s], not [%s] (-1 is any size)", name, text[0], text[1]);
}

void* Context::output(size_t index, std::initializer_list<int64_t> shape) {
  if (status_) return nullptr;
  OrtValue* value = nullptr;
  void* data = nullptr;
  keep(ort::KernelContext_GetOutput(api_)(context_, index, shape.begin(), shape.size(), &value));
  if (!status_ && !value) fail("output %zu is not wanted", index);
  if (!status_) keep(ort::GetTensorMutableData(api_)(value, &data));
  return status_ ? nullptr : data;
}

void Context::fail(const char* format, ...) {
  if (status_) return;
  char message[320];
  int at = snprintf(message, sizeof message, "doge_onnx.%s: ", op_);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + at, sizeof message - at, format, arguments);
  va_end(arguments);
  status_ = ort::CreateStatus(api_)(kInvalidArgument, message);
}
