"""Benchmarks beside other people's models. Both sides share a process, and with it oneDNN's cache of compiled kernels:
it is made large enough that neither evicts those of the other."""

import os

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
