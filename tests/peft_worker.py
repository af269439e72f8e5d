"""Runs in the environment of tests/requirements/peft.txt: adapters as PEFT makes and merges them.

Reads a JSON object from its first argument: for each case, the base checkpoint, the arguments of
LoraConfig, and a directory. Writes the adapter into it, and the merged weights.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

torch.set_num_threads(1)


def make(base, options, directory):
    model = transformers.DogeForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # What was trained: everything has moved, magnitudes only a little.
            noise = torch.randn_like(parameter)
            with torch.no_grad():
                parameter.copy_(parameter * (1 + 0.1 * noise) if "magn" in name else noise / 4)
    model.save_pretrained(directory)
    merged = model.merge_and_unload()
    weights = {name: value.clone() for name, value in merged.state_dict().items()}
    save_file(weights, Path(directory) / "merged.safetensors")


def main():
    for case in json.loads(sys.argv[1]):
        make(case["base"], case["options"], case["directory"])


if __name__ == "__main__":
    main()
