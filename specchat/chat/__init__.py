"""Chat sessions: messages in, text deltas out, and a record of what each answer cost."""
