"""The Llama runtime around the kernels: loading, drafting, verifying, decoding, and the ``kangaroo`` command.

Read ``loop/host.py`` first: it is the paper's loop.
"""
