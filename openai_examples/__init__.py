"""Examples of the openai client (`pip install openai`) with this server, one idea per file.

Start the server with `make serve`, then run an example as a module from the repository's root:
`python -m openai_examples.streaming`. Not as a file: the examples import each other. They read
OPENAI_BASE_URL (default: http://127.0.0.1:8000/v1) and OPENAI_API_KEY.
"""
