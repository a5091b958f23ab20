"""The terminal interface; the only package that uses rich and prompt_toolkit."""
