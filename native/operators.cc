#include "operators.h"

OperatorList all_operators() {
  static const OrtCustomOp* const list[] = {
      embed_operator(),
  };
  return {list, sizeof list / sizeof *list};
}
