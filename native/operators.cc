#include "operators.h"

OperatorList all_operators() {
  static const OrtCustomOp* const list[] = {
      attention_operator(),
      embed_operator(),
      experts_operator(),
      feed_forward_operator(),
      int8_attention_operator(),
      positions_operator(),
      project_heads_operator(),
      project_to_vocabulary_operator(),
      window_attention_operator(),
  };
  return {list, sizeof list / sizeof *list};
}
