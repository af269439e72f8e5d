// The list of all operators. Each is in a file of its own.
#pragma once

#include "operator.h"

struct OperatorList {
  const OrtCustomOp* const* first;
  size_t count;
  const OrtCustomOp* const* begin() const { return first; }
  const OrtCustomOp* const* end() const { return first + count; }
};

OperatorList all_operators();

// Defined in the operator's own file.
const OrtCustomOp* attention_operator();
const OrtCustomOp* embed_operator();
const OrtCustomOp* experts_operator();
const OrtCustomOp* feed_forward_operator();
const OrtCustomOp* int8_attention_operator();
const OrtCustomOp* positions_operator();
const OrtCustomOp* project_heads_operator();
const OrtCustomOp* project_to_vocabulary_operator();
const OrtCustomOp* window_attention_operator();
