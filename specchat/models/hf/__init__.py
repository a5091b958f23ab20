"""Every call whose behaviour depends on the version of transformers; nothing else imports it.

Written against transformers 5.17 to 5.23. What is leaned on and not promised by its makers: the attention and mask
registries, the cache layer protocol, the weight conversion mapping, the order of logits processors.
"""
