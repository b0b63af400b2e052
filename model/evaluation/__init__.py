"""Measuring decoding."""
