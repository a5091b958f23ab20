"""GGUF files as models: configuration, tokenizer and tensors, made from the metadata by own tables."""
