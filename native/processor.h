// Which instruction sets the processor has, and which kernels follow from that.
#pragma once

#include "kernels.h"

// The kernels of the best instruction set that the processor has; with the environment variable
// DOGE_ONNX_INSTRUCTIONS, those of the set of that name, if the processor has it. Read anew at each
// call, so that a test can choose.
const Kernels& chosen_kernels();
