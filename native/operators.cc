#include "operators.h"

OperatorList all_operators() {
  static const OrtCustomOp* const list[] = {
      embed_operator(),
      project_to_vocabulary_operator(),
  };
  return {list, sizeof list / sizeof *list};
}
