"""Chat with a language model that does not fit in your GPU's memory; the text is exactly what it alone would write."""

__version__ = "0.1.0"
