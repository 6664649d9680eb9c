"""The openai client against this server, one idea a file.

Start the server with `make serve`, then run any of them from the repository's root, for
example `python -m openai_examples.streaming`. OPENAI_BASE_URL and OPENAI_API_KEY are
honoured; without them http://127.0.0.1:8000/v1 is asked.
"""
