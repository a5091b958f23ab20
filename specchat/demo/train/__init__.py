"""Training code of the demo pair: from texts and chats to a target and a draft that share one tokenizer.

    python -m specchat.demo.train.prepare   texts, chats -> token files and tokenizer
    python -m specchat.demo.train.train     token files -> target and draft
    python -m specchat.demo.train.generate  target -> chats for the draft's last phase
    python -m specchat.demo.train.evaluate  pair, held-out chats -> perplexity and agreement
    python -m specchat.demo.train.mtp       target, chats -> MTP head
    python -m specchat.demo.train.block     target, chats -> block drafter

Chatting does not use this code, and this code does not use the network.
"""
