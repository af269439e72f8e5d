// What an operator sees of ONNX Runtime: its inputs, outputs, attributes and threads.
//
// Every input is checked when it is read: element type, shape, and that it is there. The first
// problem is kept, and the operator returns it before it touches any element. So a damaged graph
// gives an error. Knows no operator.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <initializer_list>
#include <type_traits>

#include "ort_abi.h"

constexpr int64_t kAny = -1;  // any size of an axis
constexpr int kMaxRank = 6;

// A tensor in memory. `data` is null where an optional input is missing.
struct Tensor {
  void* data = nullptr;
  int type = kAnyType;
  int rank = 0;
  int64_t dims[kMaxRank] = {};

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  template <class T>
  T* as() {
    return static_cast<T*>(data);
  }
};

// Attributes of a node, read when its kernel is made. Keeps the first problem.
class Attributes {
 public:
  Attributes(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  int64_t integer(const char* name) {
    int64_t value = 0;
    keep(ort::KernelInfoGetAttribute_int64(api_)(info_, name, &value));
    return value;
  }
  // A number from `least` to `most`.
  int number(const char* name, int64_t least, int64_t most) {
    int64_t value = integer(name);
    if (value < least || value > most) fail("attribute %s is %lld", name, static_cast<long long>(value));
    return static_cast<int>(value);
  }
  float real(const char* name) {
    float value = 0;
    keep(ort::KernelInfoGetAttribute_float(api_)(info_, name, &value));
    return value;
  }
  // Fails where the text does not fit.
  void text(const char* name, char* out, size_t size) {
    keep(ort::KernelInfoGetAttribute_string(api_)(info_, name, out, &size));
  }
  void fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    if (status_) return;
    char message[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    status_ = ort::CreateStatus(api_)(kInvalidArgument, message);
  }
  OrtStatus* status() const { return status_; }

 private:
  void keep(OrtStatus* status) {
    if (!status) return;
    if (status_) ort::ReleaseStatus(api_)(status);
    else status_ = status;
  }
  const OrtApi* api_;
  const OrtKernelInfo* info_;
  OrtStatus* status_ = nullptr;
};

// One run of a node.
class Context {
 public:
  Context(const OrtApi* api, OrtKernelContext* context, const char* op) : api_(api), context_(context), op_(op) {}

  // An input of any shape; fails where it is missing or has another type.
  Tensor input(const char* name, size_t index, int type = kAnyType) {
    Tensor tensor = optional(name, index, type);
    if (!tensor && !status_) fail("input %s is missing", name);
    return tensor;
  }
  // An input of this shape; kAny fits every size.
  Tensor input(const char* name, size_t index, int type, std::initializer_list<int64_t> shape) {
    Tensor tensor = input(name, index, type);
    expect(name, tensor, shape);
    return tensor;
  }
  Tensor optional(const char* name, size_t index, int type, std::initializer_list<int64_t> shape) {
    Tensor tensor = optional(name, index, type);
    if (tensor) expect(name, tensor, shape);
    return tensor;
  }
  Tensor optional(const char* name, size_t index, int type);
  void expect(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape);

  // An output of this shape. Null after a problem.
  void* output(size_t index, std::initializer_list<int64_t> shape);

  void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
  bool failed() const { return status_ != nullptr; }
  OrtStatus* status() const { return status_; }

  // Calls function(0) to function(count - 1), on ONNX Runtime's threads, in any order.
  template <class Function>
  void parallel(size_t count, Function&& function) {
    auto call = [](void* data, size_t index) { (*static_cast<std::remove_reference_t<Function>*>(data))(index); };
    keep(ort::KernelContext_ParallelFor(api_)(context_, call, count, 0, &function));
  }

 private:
  void keep(OrtStatus* status) {
    if (!status) return;
    if (status_) ort::ReleaseStatus(api_)(status);
    else status_ = status;
  }
  const OrtApi* api_;
  OrtKernelContext* context_;
  const char* op_;
  OrtStatus* status_ = nullptr;
};
