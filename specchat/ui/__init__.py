"""What a person sees and types; the only part that uses rich and prompt_toolkit."""
