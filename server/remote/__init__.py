"""An engine that is another server: vLLM, or one like this. Token ids in, tokens out, by HTTP."""
