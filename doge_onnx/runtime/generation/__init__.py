"""How a text is generated: options, sampling, the loop, and what it returns."""
