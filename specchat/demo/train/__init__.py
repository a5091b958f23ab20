"""How the demo pair is trained: text and chats in, a target and a draft that share one tokenizer out.

    python -m specchat.demo.train.prepare   texts, chats -> token files and tokenizer
    python -m specchat.demo.train.train     token files -> target and draft
    python -m specchat.demo.train.generate  target -> chats for the draft's last stretch
    python -m specchat.demo.train.evaluate  pair, held-out chats -> perplexity and agreement

Nothing here is used while chatting, and nothing here reaches the network.
"""
