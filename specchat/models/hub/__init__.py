"""The Hugging Face hub, through huggingface_hub alone: its local cache, downloads and errors."""
