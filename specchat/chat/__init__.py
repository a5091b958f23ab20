"""Messages in, text deltas out: the chat itself, and the records that say what each answer took."""
