"""An OpenAI-compatible endpoint: ``kangaroo serve``."""
