"""What models are and where their bytes lie."""
