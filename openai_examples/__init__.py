"""The openai client (`pip install openai`) against this server, one idea a file.

Start the server with `make serve`, then run any of them as a module from the repository's
root, for example `python -m openai_examples.streaming`; as `python openai_examples/….py` they
would not find each other. OPENAI_BASE_URL and OPENAI_API_KEY are honoured; without them
http://127.0.0.1:8000/v1 is asked.
"""
