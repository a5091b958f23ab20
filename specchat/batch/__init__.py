"""Files of prompts: reading, answering many at once, and results that can be continued."""
