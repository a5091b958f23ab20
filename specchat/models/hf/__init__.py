"""The only package that imports transformers, so every call that depends on its version is here.

Written against transformers 5.17 to 5.23. These interfaces are used although transformers does not promise them: the
attention and mask registries, the cache layer protocol, the weight conversion mapping, the order of logits processors.
"""
