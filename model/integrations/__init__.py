"""Kangaroo in other engines: the drafter as a stock checkpoint, as transformers' assistant, as its ``generate``."""
