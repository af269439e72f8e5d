// How a class becomes a custom operator of ONNX Runtime.
//
// The class has
//   static constexpr const char* kName;
//   static constexpr Input kInputs[];                   element type, and whether it may be missing
//   static constexpr int kOutputs[];                    element types
//   explicit Class(Attributes&);                        reads the attributes
//   void run(Context&) const;                           may be called by several threads at once
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "context.h"

struct Input {
  int type;
  int characteristic = kRequired;
};

template <class Class>
struct Operator : OrtCustomOp {
  struct Kernel {
    const OrtApi* api;
    Class object;
  };

  Operator() : OrtCustomOp{} {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp*) { return Class::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const OrtCustomOp*) { return sizeof Class::kInputs / sizeof(Input); };
    GetInputType = [](const OrtCustomOp*, size_t i) { return Class::kInputs[i].type; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return Class::kInputs[i].characteristic; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return sizeof Class::kOutputs / sizeof(int); };
    GetOutputType = [](const OrtCustomOp*, size_t i) { return Class::kOutputs[i]; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return static_cast<int>(kRequired); };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** out) -> OrtStatus* {
      Attributes attributes(api, info);
      void* memory = malloc(sizeof(Kernel));
      if (!memory) return ort::CreateStatus(api)(kFail, "no memory for a kernel");
      Kernel* kernel = new (memory) Kernel{api, Class(attributes)};
      if (OrtStatus* status = attributes.status()) {
        free(kernel);
        return status;
      }
      *out = kernel;
      return nullptr;
    };
    KernelComputeV2 = [](void* data, OrtKernelContext* context) -> OrtStatus* {
      const Kernel* kernel = static_cast<Kernel*>(data);
      Context run(kernel->api, context, Class::kName);
      kernel->object.run(run);
      return run.status();
    };
    KernelDestroy = [](void* data) { free(data); };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    static_assert(std::is_trivially_destructible_v<Class>, "kernels are freed without a destructor");
  }
};
