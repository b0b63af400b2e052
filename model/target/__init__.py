"""The target: a checkpoint's configuration and weights, the Llama model, its cache."""
