"""Text: the tokenizer, streaming of text, stop strings, chat templates."""
