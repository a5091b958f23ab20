"""Token ids in, token ids out, exactly as the target alone would write them."""
