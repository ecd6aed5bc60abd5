"""The verbs of the command line, a file a subject; `tasks/__main__.py` lists them."""
