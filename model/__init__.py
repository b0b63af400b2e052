"""The Llama runtime around the kernels: loading, drafting, verifying, decoding, and the ``kangaroo`` command.

Read ``decode.py`` first: it is the paper's loop.
"""
