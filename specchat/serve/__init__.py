"""An HTTP server that speaks OpenAI's protocol: one engine, a queue, and answers that share its passes."""
