"""Text in and out: the tokenizer, text that grows token by token, chat templates."""
