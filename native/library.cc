// What ONNX Runtime calls when the library is registered: the list of all operators.

#include <atomic>

#include "operators.h"
#include "processor.h"

#if defined(_WIN32)
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif

EXPORTED OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  // ONNX Runtime keeps a pointer to the domain as long as a session lives, so it is never released.
  static std::atomic<OrtCustomOpDomain*> shared{nullptr};
  OrtCustomOpDomain* domain = shared.load();
  if (!domain) {
    if (OrtStatus* status = ort::CreateCustomOpDomain(api)("doge_onnx", &domain)) return status;
    for (const OrtCustomOp* op : all_operators()) {
      if (OrtStatus* status = ort::CustomOpDomain_Add(api)(domain, op)) return status;
    }
    OrtCustomOpDomain* none = nullptr;
    if (!shared.compare_exchange_strong(none, domain)) domain = none;
  }
  return ort::AddCustomOpDomain(api)(options, domain);
}

// The instruction set whose kernels new sessions use, such as "avx2".
EXPORTED const char* doge_onnx_instruction_set() { return chosen_kernels().name; }
