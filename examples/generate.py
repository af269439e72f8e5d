"""Continue a prompt with a bundle, by way of the public API.

    doge-onnx export examples/doge-tiny bundle
    python examples/generate.py bundle "It was a dark and stormy night"

Needs the base install only: no torch.
"""

import sys

import doge_onnx


def main() -> None:
    """Stream up to 60 tokens, always the most likely one."""
    if len(sys.argv) != 3:
        sys.exit("usage: generate.py BUNDLE PROMPT")
    bundle, prompt = sys.argv[1:]
    model = doge_onnx.load(bundle)
    # For another text each time, try temperature=0.8, top_p=0.95 instead.
    for piece in model.stream(prompt, max_new_tokens=60, temperature=0):
        print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
