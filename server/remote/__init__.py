"""An engine in another server, the upstream: vLLM, or a server like this one. Sends token ids."""
